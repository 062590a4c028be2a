"""Requests to vLLM servers: one for each response, all of them under way together, and their answers as tensors."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from remax_lightning.distributed import rank
from remax_lightning.errors import UserError
from remax_lightning.rollout.base import GenerationOutput, GenerationRequest
from remax_lightning.rollout.vllm_client import VLLMServer
from remax_lightning.rollout.vllm_proof import ProvenRow, log_probs_mode
from remax_lightning.strategies.stall_watchdog import report_progress

Item = TypeVar("Item")
Result = TypeVar("Result")

_UNLIKELY = -100.0
"""Bias of a token that must not be drawn, the least that vLLM takes: it has then a probability of e^-100 or less."""
_SECONDS_TO_END = 1.0
"""For threads whose connections are closed to end; they are daemons, and the process does not wait for them."""
_TOLD_EVERY = 60.0
"""Seconds between two reports about responses that are waited for."""


class Row(NamedTuple):
    """A request for one response.

    Args:
        server: that it is sent to.
        body: as vLLM's `/inference/v1/generate` reads it.
        is_adapter: whether it names the adapter of a version as its model.
    """

    server: VLLMServer
    body: dict[str, Any]
    is_adapter: bool


# ---- From a request to rows ----


class RowRequest(NamedTuple):
    """What one row asks for, whatever server and weights answer.

    Args:
        prompt: its number, from 0.
        token_ids: of the prompt.
        parameters: vLLM's sampling parameters.
    """

    prompt: int
    token_ids: list[int]
    parameters: dict[str, Any]


def row_requests(request: GenerationRequest, *, log_probs: bool) -> list[RowRequest]:
    """Return what is asked for: `S` sampled rows, prompt by prompt, then `B` greedy ones.

    Args:
        request: of the engine; its generator is advanced by the same amount whatever is returned.
        log_probs: whether sampled rows return the log-probs of their tokens.
    """
    sampling = request.sampling
    prompts = [
        ids[mask].tolist() for ids, mask in zip(request.prompt_ids.cpu(), request.prompt_mask.cpu(), strict=True)
    ]
    # One seed per row: what a row draws depends on no other row, server or retry.
    size = (len(prompts), sampling.num_samples)
    seeds = torch.randint(0, 2**31 - 1, size, generator=request.generator, device=request.generator.device).tolist()
    drawn = {
        "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
        "min_p": sampling.min_p, **({"logprobs": 0} if log_probs else {}),
    }  # fmt: skip
    likeliest = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    common = _common_parameters(request)
    rows = [
        RowRequest(index, prompts[index], {**common, **drawn, "seed": seed})
        for index, of_prompt in enumerate(seeds)
        for seed in of_prompt
    ]
    greedy = [RowRequest(index, ids, {**common, **likeliest}) for index, ids in enumerate(prompts)]
    return rows + (greedy if request.greedy else [])


def _common_parameters(request: GenerationRequest) -> dict[str, Any]:
    """Return vLLM's sampling parameters that sampled and greedy rows share.

    All are written out: what is left out, a server may take from the `generation_config.json` of its model.
    """
    sampling = request.sampling
    stops = list(sampling.stop_strings) if request.stop_check is not None else []
    parameters: dict[str, Any] = {
        "n": 1, "max_tokens": sampling.max_response_length, "min_tokens": sampling.min_response_length,
        "stop": stops, "stop_token_ids": list(request.eos_ids), "ignore_eos": True,  # only the trainer's ends count
        "detokenize": bool(stops), "skip_special_tokens": False, "include_stop_str_in_output": True,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip
    if request.unused_ids:
        parameters["logit_bias"] = {str(token): _UNLIKELY for token in request.unused_ids}
    return parameters


def spread(servers: Sequence[VLLMServer], requests: Sequence[RowRequest]) -> list[VLLMServer]:
    """Return the server of each prompt, so that all get as many tokens; ranks begin at different servers.

    All rows of a prompt go to one server, which keeps the prompt's keys and values.
    """
    first = rank() % len(servers)
    servers = [*servers[first:], *servers[:first]]
    # ---- Tokens by prompt: read once, and at most written by every row ----
    lengths: dict[int, int] = {}
    for request in requests:
        written = lengths.get(request.prompt, len(request.token_ids))
        lengths[request.prompt] = written + int(request.parameters["max_tokens"])
    tokens, chosen = [0] * len(servers), []
    for prompt in sorted(lengths):
        index = tokens.index(min(tokens))
        tokens[index] += lengths[prompt]
        chosen.append(servers[index])
    return chosen


def digest(requests: Sequence[RowRequest]) -> str:
    """Return a digest of what rows ask for: equal where the same prompts are asked for with the same seeds."""
    text = json.dumps([request._asdict() for request in requests], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# ---- Under way ----


class Flight(Generic[Item, Result]):
    """Requests that are under way, each in a thread of its own up to a limit, until they are done or cancelled.

    Threads are daemons: Python's own pools are waited for at the end of a process, so that Ctrl-C would take as long as
    a response may.

    Args:
        items: one for each request.
        work: makes the request of an item and returns its result; ends early where the event is set.
        servers: whose connections are closed when the requests are cancelled.
        num_threads: requests under way at once.
    """

    def __init__(
        self,
        items: Sequence[Item],
        work: Callable[[Item, threading.Event], Result],
        servers: Sequence[VLLMServer],
        num_threads: int,
    ) -> None:
        self._items, self._respond, self._servers = items, work, servers
        self._results: dict[int, Result] = {}  # by place
        self._order = iter(range(len(items)))
        self._lock, self._stop, self._done = threading.Lock(), threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, daemon=True, name=f"vllm-request-{number}")
            for number in range(min(len(items), num_threads))
        ]
        self._waiting = self._threads  # until `start`

    def start(self) -> None:
        """Send the first requests. Whoever cannot go on to `wait` from here, as after Ctrl-C, has to cancel them."""
        threads, self._waiting = self._waiting, []
        for thread in threads:
            thread.start()

    def _work(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                index = next(self._order, None)
            if index is None:
                return
            try:
                result = self._respond(self._items[index], self._stop)
            except BaseException as error:  # `wait` raises it
                self._error = self._error or error
                self._stop.set()
                self._done.set()
                return
            with self._lock:
                self._results[index] = result
                if len(self._results) == len(self._items):
                    self._done.set()

    def wait(self, what: str) -> list[Result]:
        """Start the requests, if that is not done, and return all results in the order of the items.

        The first request that fails ends all.

        Args:
            what: is waited for, for messages about a run that gets no further.
        """
        try:
            self.start()
            while not self._done.wait(_TOLD_EVERY):
                report_progress(f"waiting for {len(self._items) - len(self._results)} {what}")
        except BaseException:  # Ctrl-C
            self.cancel()
            raise
        if self._error is not None:
            self.cancel()
            raise self._error
        return [self._results[index] for index in range(len(self._items))]

    def cancel(self) -> None:
        """End all requests now: their connections are closed, so that the servers give up on them, too."""
        if self._done.is_set() and self._error is None:
            return
        self._stop.set()
        # A thread may have looked at the event just before, and begin another request.
        end = time.monotonic() + _SECONDS_TO_END
        while any(thread.is_alive() for thread in self._threads) and time.monotonic() < end:
            for server in self._servers:
                server.abort()
            time.sleep(0.01)
        self._done.set()


# ---- From answers to tensors ----


def output_of(request: GenerationRequest, choices: Sequence[dict[str, Any]]) -> GenerationOutput:
    """Return token ids, log-probs and ends of all rows as tensors on the CPU.

    Raises:
        UserError: if a response was cut, or has an end that was not asked for.
    """
    length, num_sampled = request.sampling.max_response_length, request.num_sampled
    ids = torch.full((len(choices), length), request.pad_id)  # [N, R]
    log_probs = torch.zeros(num_sampled, length)  # [S, R]
    stopped_at = torch.zeros(len(choices), dtype=torch.long)  # [N]
    for index, choice in enumerate(choices):
        tokens = _tokens(choice, length)
        _check_end(choice, request)
        ids[index, : len(tokens)] = torch.tensor(tokens)
        # A string that ended the response; ids are numbers.
        if isinstance(choice.get("stop_reason"), str):
            stopped_at[index] = len(tokens)
        if request.return_log_probs and index < num_sampled:
            log_probs[index, : len(tokens)] = torch.tensor(log_probs_of(choice))
    # Where neither of vLLM's modes has the log-probs that are trained, there are none.
    is_known = request.return_log_probs and log_probs_mode(request.sampling, request) != "neither"
    return GenerationOutput(
        ids[:num_sampled],
        ids[num_sampled:] if request.greedy else None,
        log_probs if is_known else None,
        stopped_at if request.stop_check is not None else None,
    )


class WrittenResponses:
    """The responses to one request, under way or written.

    Args:
        asked: digest of the requests.
        request: that they answer; None where `output` is there.
        flight: their requests.
        output: what came of them.
    """

    def __init__(
        self,
        asked: str,
        request: GenerationRequest | None,
        flight: Flight[Row, dict[str, Any]] | None,
        output: GenerationOutput | None = None,
    ) -> None:
        self.asked, self._request, self._flight, self._output = asked, request, flight, output

    def choices(self) -> list[dict[str, Any]]:
        """Return vLLM's choices, which are waited for."""
        assert self._flight is not None
        return self._flight.wait("responses of vLLM")

    def output(self) -> GenerationOutput:
        """Return the responses on the CPU, which are waited for."""
        if self._output is None:
            assert self._request is not None
            self._output, self._flight = output_of(self._request, self.choices()), None
        return self._output

    def start(self) -> None:
        """Send the requests."""
        if self._flight is not None:
            self._flight.start()

    def cancel(self) -> None:
        """Give up on them."""
        if self._flight is not None:
            self._flight.cancel()


def moved(output: GenerationOutput, device: torch.device) -> GenerationOutput:
    """Return an output on another device."""
    ids, *others = output
    return GenerationOutput(ids.to(device), *(value if value is None else value.to(device) for value in others))


def _tokens(choice: dict[str, Any], limit: int) -> list[int]:
    tokens: list[int] = choice["token_ids"]
    reason = choice.get("finish_reason")
    if reason == "length" and len(tokens) < limit:
        raise UserError(
            f"model.rollout: vLLM cut a response after {len(tokens)} of model.sampling.max_response_length {limit}"
            " tokens; start the servers with a larger --max-model-len"
        )
    if reason not in ("stop", "length") or not 0 < len(tokens) <= limit:
        raise UserError(f"model.rollout: vLLM ended a response of {len(tokens)} tokens with {reason!r}")
    return tokens


def _check_end(choice: dict[str, Any], request: GenerationRequest) -> None:
    """Refuse a response that ended where none does here: its padding would be trained on."""
    tokens, stop = choice["token_ids"], choice.get("stop_reason")
    is_end = tokens[-1] in request.eos_ids or (isinstance(stop, str) and request.stop_check is not None)
    if choice["finish_reason"] == "stop" and not is_end:
        raise UserError(
            f"model.rollout: vLLM ended a response of {len(tokens)} tokens by {stop!r} behind token {tokens[-1]}, and"
            f" only {', '.join(map(str, request.eos_ids)) or 'no token'} and model.sampling.stop_strings end one; start"
            " the servers with `remax serve`, or with --generation-config vllm"
        )


def log_probs_of(choice: dict[str, Any]) -> list[float]:
    """Return the log-probs of the tokens of a choice.

    Raises:
        UserError: if they are those of other tokens.
    """
    content = (choice.get("logprobs") or {}).get("content") or []
    tokens = choice["token_ids"]
    if [entry["token_id"] for entry in content] != tokens:
        raise UserError(f"model.rollout: vLLM returned log-probs of {len(content)} tokens for {len(tokens)} tokens")
    return [float(entry["logprob"]) for entry in content]


def fault_of(choice: dict[str, Any]) -> str:
    """Return what of a choice is none of vLLM's, in words, or an empty string: ids and log-probs have to be numbers."""
    tokens = choice["token_ids"]
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        return f"token_ids {str(tokens)[:100]}"
    content = (choice.get("logprobs") or {}).get("content") or []
    for entry in content:
        token, value = (entry.get(name) if isinstance(entry, dict) else None for name in ("token_id", "logprob"))
        if type(token) is not int or not isinstance(value, int | float):
            return f"{str(entry)[:100]} in logprobs.content"
    return ""


def staleness(answer: dict[str, Any], choice: dict[str, Any], row: Row, version: str) -> str:
    """Return why a response is not one of the weights that are trained, or an empty string.

    Args:
        answer: of the server.
        choice: in it.
        row: that was asked for.
        version: of the weights.
    """
    if choice.get("finish_reason") in ("abort", "error"):
        return f"the request ended with {choice['finish_reason']!r}"
    if row.is_adapter:
        model = answer.get("model")
        return "" if model in (None, row.body["model"]) else f"it generated with {model!r}, expected the adapter"
    other = sorted({span["version"] for span in choice.get("weight_versions") or []} - {version})
    if not other:
        return ""
    return (
        f"it generated with weights of version {other[0]}, the trainer has {version}; one address has to be one server"
        " of this run alone"
    )


def proven_rows(
    request: GenerationRequest, rows: Sequence[Row], choices: Sequence[dict[str, Any]], count: int
) -> list[ProvenRow]:
    """Return `count` sampled responses and as many greedy ones, spread over the rows, so that every server has some."""
    device, num_sampled, proven = request.prompt_ids.device, request.num_sampled, []
    for first, stop in ((0, num_sampled), (num_sampled, len(rows))):
        step = max(1, (stop - first) // count)
        for index in range(first, stop, step)[:count]:
            prompt, tokens = (
                torch.tensor(ids, dtype=torch.long, device=device)
                for ids in (rows[index].body["token_ids"], choices[index]["token_ids"])
            )
            log_probs = torch.tensor(log_probs_of(choices[index])) if index < num_sampled else None
            proven.append(ProvenRow(rows[index].server.url, prompt, tokens, log_probs))
    return proven
