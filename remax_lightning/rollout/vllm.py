"""`VLLMEngine`: responses from vLLM servers, which get the weights of the policy before each rollout."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from remax_lightning.config import SamplingConfig
from remax_lightning.distributed import rank
from remax_lightning.errors import UserError
from remax_lightning.models.lora import has_adapter
from remax_lightning.rollout.base import GenerationOutput, GenerationRequest
from remax_lightning.rollout.vllm_client import (
    KEY,
    ClientOptions,
    MissingError,
    ServerGoneError,
    ServerInfo,
    VLLMServer,
)
from remax_lightning.rollout.vllm_proof import ProvenRow, log_probs_mode, prove
from remax_lightning.rollout.vllm_weights import (
    BACKEND,
    WeightFiles,
    adapter_name,
    compare_checksums,
    has_version,
    load_version,
    same_dtype,
    wait_for_files,
    weight_version,
)
from remax_lightning.strategies import rollout_parameters
from remax_lightning.strategies.stall_watchdog import report_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_UNLIKELY = -100.0
"""Bias of a token that must not be drawn, the least that vLLM takes: it has then a probability of e^-100 or less."""


class VLLMEngine:
    """Generates responses with vLLM servers in processes of their own, for large policies and long, uneven responses.

    Before a rollout the servers get the policy's weights: all of them, or the adapter alone of a policy with one.
    Sampled and greedy requests of all prompts are under way together. The servers are started by `remax serve`, in an
    environment with vLLM; the trainer itself never imports vLLM. The weights that a server says it has are compared
    with the trainer's at every update and in every response, and log-probs of a few responses are computed by both: a
    difference beyond rounding ends the run. What rounding leaves, `model.loss.mismatch` corrects.

    Args:
        urls: where the servers listen, such as `http://node7:8000`. Prompts are spread over them by their tokens; all
            ranks share them.
        served_model: name of the policy on the servers; None takes the only one that they serve.
        transfer_dir: folder that trainer and servers see, for the weights of one version. None takes one in the shared
            memory of the machine; servers on other machines need one on a shared disk.
        api_key_env: environment variable with the servers' key. Keys do not stand in configurations, which are saved.
        ca_file: certificates that the servers' are checked with under https; None takes the usual authorities.
        concurrency: requests under way at once at one server; 256, vLLM's own limit of sequences.
        timeout: seconds that one response may take.
        transfer_timeout: seconds that a server may take to load weights.
        restart_timeout: seconds that a server which is gone is waited for. It gets the weights anew, and only responses
            that were not finished are asked for again, with their seeds.
        retries: how often one response is asked for again.
        prove_every: rollouts between two comparisons of log-probs; the first one and the first after an update are
            always compared. A comparison is a pass of the policy over `prove_responses` responses.
        prove_responses: sampled responses that are compared, and as many greedy ones.
        checksums: compare SHA-256 of the weights that a server computes with after each update, where vLLM keeps them
            as they were sent. It reads all weights once on both sides; false leaves it to version and log-probs.

    Raises:
        UserError: if a value is out of its range.
    """

    gathers_parameters = True
    """The engine gathers a sharded policy itself, a parameter at a time, to send it."""

    def __init__(
        self,
        urls: list[str],
        served_model: str | None = None,
        transfer_dir: str | None = None,
        api_key_env: str | None = None,
        ca_file: str | None = None,
        concurrency: int = 256,
        timeout: float = 600.0,
        transfer_timeout: float = 600.0,
        restart_timeout: float = 300.0,
        retries: int = 3,
        prove_every: int = 10,
        prove_responses: int = 8,
        checksums: bool = True,
    ) -> None:
        checks = (
            ("urls", urls, bool(urls), "a list of at least one URL"),
            ("concurrency", concurrency, concurrency >= 1, "at least 1"),
            ("timeout", timeout, 0 < timeout < math.inf, "above 0 and finite (seconds)"),
            ("transfer_timeout", transfer_timeout, 0 < transfer_timeout < math.inf, "above 0 and finite (seconds)"),
            ("restart_timeout", restart_timeout, 0 <= restart_timeout < math.inf, "0 or more and finite (seconds)"),
            ("retries", retries, retries >= 0, "0 or more"),
            ("prove_every", prove_every, prove_every >= 1, "at least 1"),
            ("prove_responses", prove_responses, prove_responses >= 1, "at least 1"),
        )
        for name, value, holds, expected in checks:
            if not holds:
                raise UserError(f"{KEY}.{name} must be {expected}, got {value}")
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise UserError(f"{KEY}.api_key_env: the environment variable {api_key_env} is not set; export it")
        options = ClientOptions(timeout, transfer_timeout, restart_timeout, concurrency, api_key_env, ca_file)
        self.servers = [VLLMServer(url, options) for url in urls]
        self.served_model, self.options, self.retries, self.checksums = served_model, options, retries, checksums
        self.prove_every, self.prove_responses = prove_every, prove_responses
        self._files = WeightFiles(Path(transfer_dir) if transfer_dir else _default_folder())
        self._infos: dict[str, ServerInfo] = {}
        self._version, self._versions, self._rollouts = "", 0, 0
        self._metrics: dict[str, float] = {}

    # ---- Before training ----

    def check(self, model: PreTrainedModel, sampling: SamplingConfig, max_prompt_length: int | None) -> None:
        """Refuse servers that cannot roll out with the policy, before the first rollout.

        Args:
            model: the policy.
            sampling: of the run.
            max_prompt_length: tokens of the longest prompt; None where it is not known.

        Raises:
            UserError: naming the server and what it lacks.
        """
        for server in self.servers:
            if server.url not in self._infos:
                server.wait()
                self._infos[server.url] = server.describe(self.served_model)
            self._check_server(server, self._infos[server.url], model, sampling, max_prompt_length or 0)

    def _check_server(
        self, server: VLLMServer, info: ServerInfo, model: Any, sampling: SamplingConfig, prompt_length: int
    ) -> None:
        vocabulary = model.config.get_text_config().vocab_size
        if not server.knows_token(info.model, vocabulary - 1):
            raise UserError(
                f"{server!r} serves {info.model!r} with a smaller vocabulary than the {vocabulary} tokens of the"
                " policy; start it with the folder of model.policy.path"
            )
        length = prompt_length + sampling.max_response_length
        if length > info.max_model_len:
            raise UserError(
                f"{server!r} takes {info.max_model_len} tokens, and prompts of {prompt_length} with responses of"
                f" model.sampling.max_response_length {sampling.max_response_length} have {length}; start it with"
                f" --max-model-len {length}"
            )
        if has_adapter(model):
            if not info.has_lora:
                raise UserError(
                    f"{server!r} takes no adapters, and model.policy.lora trains one; start it with `remax serve`, or"
                    " with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
                )
        elif info.transfer_backend != BACKEND:
            raise UserError(
                f"{server!r} takes weights by {info.transfer_backend or 'nothing'}, expected {BACKEND}; start it with"
                " `remax serve`"
            )
        mode = log_probs_mode(sampling)
        if mode not in (None, "neither", info.logprobs_mode):
            raise UserError(
                f"{server!r} returns {info.logprobs_mode}, and model.sampling trains {mode.replace('_', ' ')}; start it"
                f" with --logprobs-mode {mode}"
            )

    def describe(self) -> list[str]:
        """Return what each server is, in words, after `check`."""
        return [
            f"{server.url}: vLLM {server.version()}, {info.model} in {info.dtype}, {info.max_model_len} tokens,"
            f" {info.logprobs_mode}"
            for server, info in ((server, self._infos[server.url]) for server in self.servers)
        ]

    def metrics(self) -> dict[str, float]:
        """Return figures of the rollouts since the last call, by the name that they are logged under."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    # ---- A rollout ----

    def generate(self, model: PreTrainedModel, request: GenerationRequest) -> GenerationOutput:
        """Generate responses with the servers; see `RolloutEngine`."""
        if len(self._infos) < len(self.servers):
            self.check(model, request.sampling, request.prompt_ids.shape[1])
        # ---- The servers get the weights ----
        is_new = self._update(model)
        is_proven = self._rollouts % self.prove_every == 0 or (is_new and self._versions == 2)
        self._rollouts += 1
        # ---- Every row is a request of its own, all of them under way together ----
        rows = self._rows(request, is_adapter=has_adapter(model), log_probs=request.return_log_probs or is_proven)
        choices = self._respond_to_all(rows)
        output = self._output(request, choices)
        if is_proven:
            self._prove(model, request, rows, choices)
        return output

    def _rows(self, request: GenerationRequest, *, is_adapter: bool, log_probs: bool) -> list[_Row]:
        """Return the requests: `S` sampled rows, prompt by prompt, then `B` greedy ones."""
        sampling = request.sampling
        prompts = [
            ids[mask].tolist() for ids, mask in zip(request.prompt_ids.cpu(), request.prompt_mask.cpu(), strict=True)
        ]
        # One seed per row: what a row draws depends on no other row, server or retry.
        device = request.generator.device
        size = (len(prompts), sampling.num_samples)
        seeds = torch.randint(0, 2**31 - 1, size, generator=request.generator, device=device).tolist()
        common = _common_parameters(request)
        drawn = {
            "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
            "min_p": sampling.min_p, **({"logprobs": 0} if log_probs else {}),
        }  # fmt: skip
        likeliest = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        # All rows of a prompt go to one server, which keeps the prompt's keys and values.
        servers = self._spread([len(prompt) for prompt in prompts], sampling)

        def row(index: int, parameters: dict[str, Any]) -> _Row:
            server, version = servers[index], self._version
            model = adapter_name(version) if is_adapter else self._infos[server.url].model
            body = {"model": model, "token_ids": prompts[index], "sampling_params": {**common, **parameters}}
            return _Row(server, body, is_adapter)

        rows = [row(i, {**drawn, "seed": seed}) for i, of_prompt in enumerate(seeds) for seed in of_prompt]
        return rows + ([row(i, likeliest) for i in range(len(prompts))] if request.greedy else [])

    def _spread(self, lengths: Sequence[int], sampling: SamplingConfig) -> list[VLLMServer]:
        """Return the server of each prompt, so that all get as many tokens; ranks begin at different servers."""
        first = rank() % len(self.servers)
        servers = self.servers[first:] + self.servers[:first]
        tokens = [0] * len(servers)
        chosen = []
        for length in lengths:
            index = tokens.index(min(tokens))
            tokens[index] += length + (sampling.num_samples + 1) * sampling.max_response_length
            chosen.append(servers[index])
        return chosen

    def _respond_to_all(self, rows: list[_Row]) -> list[dict[str, Any]]:
        """Return vLLM's choice for each row; the first row that fails ends all."""
        pool = ThreadPoolExecutor(min(len(rows), self.options.concurrency * len(self.servers)))
        stop = threading.Event()
        try:
            futures: list[Future[dict[str, Any]]] = [pool.submit(self._respond, row, stop) for row in rows]
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=60.0, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()  # raises what ended it
                report_progress(f"waiting for {len(pending)} responses of {self.servers[0].url}")
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        return [future.result() for future in futures]

    def _respond(self, row: _Row, stop: threading.Event) -> dict[str, Any]:
        """Return vLLM's choice for one row, asking again as long as that may help."""
        server, problem = row.server, ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(0.1 * 2**attempt, 5.0))
                with server.recovery:
                    if stop.is_set():
                        break
                    server.wait(problem)
            try:
                if attempt:
                    with server.recovery:
                        self._bring_up_to_date(server, is_adapter=row.is_adapter)
                answer = server.post("/inference/v1/generate", row.body, self.options.timeout)
            except (ServerGoneError, MissingError) as error:  # an adapter is missing after a restart
                problem = str(error)
                continue
            choice: dict[str, Any] = answer["choices"][0]
            problem = self._staleness(answer, choice, row)
            if not problem:
                return choice
        raise UserError(f"{server!r} gave no response in {self.retries + 1} tries ({KEY}.retries): {problem}")

    def _staleness(self, answer: dict[str, Any], choice: dict[str, Any], row: _Row) -> str:
        """Return why a response is not one of the weights that are trained, or an empty string."""
        if choice.get("finish_reason") == "abort":
            return "the request was aborted"
        if row.is_adapter:
            model = answer.get("model")
            return "" if model in (None, row.body["model"]) else f"it generated with {model!r}, expected the adapter"
        versions = {span["version"] for span in choice.get("weight_versions") or []}
        other = sorted(versions - {self._version})
        return f"it generated with weights of version {other[0]}, the trainer has {self._version}" if other else ""

    def _output(self, request: GenerationRequest, choices: list[dict[str, Any]]) -> GenerationOutput:
        """Return token ids, log-probs and ends of all rows as tensors."""
        device, length, num_sampled = (
            request.prompt_ids.device,
            request.sampling.max_response_length,
            request.num_sampled,
        )
        ids = torch.full((len(choices), length), request.pad_id)  # [N, R]
        log_probs = torch.zeros(num_sampled, length)  # [S, R]
        stopped_at = torch.zeros(len(choices), dtype=torch.long)  # [N]
        for index, choice in enumerate(choices):
            tokens = self._tokens(choice, request)
            ids[index, : len(tokens)] = torch.tensor(tokens)
            # A string that ended the response; ids are numbers.
            if isinstance(choice.get("stop_reason"), str):
                stopped_at[index] = len(tokens)
            if request.return_log_probs and index < num_sampled:
                log_probs[index, : len(tokens)] = torch.tensor(_log_probs(choice))
        # Where neither of vLLM's modes has the log-probs that are trained, there are none.
        is_known = request.return_log_probs and log_probs_mode(request.sampling, request) != "neither"
        return GenerationOutput(
            ids[:num_sampled].to(device),
            ids[num_sampled:].to(device) if request.greedy else None,
            log_probs.to(device) if is_known else None,
            stopped_at.to(device) if request.stop_check is not None else None,
        )

    def _tokens(self, choice: dict[str, Any], request: GenerationRequest) -> list[int]:
        tokens: list[int] = choice["token_ids"]
        limit, reason = request.sampling.max_response_length, choice.get("finish_reason")
        if reason == "length" and len(tokens) < limit:
            raise UserError(
                f"model.rollout: vLLM cut a response after {len(tokens)} of model.sampling.max_response_length"
                f" {limit} tokens; start the servers with a larger --max-model-len"
            )
        if reason not in ("stop", "length") or not 0 < len(tokens) <= limit:
            raise UserError(f"model.rollout: vLLM ended a response of {len(tokens)} tokens with {reason!r}")
        return tokens

    # ---- Weights ----

    def _update(self, model: PreTrainedModel) -> bool:
        """Bring all servers to the weights of the policy; returns whether those are new."""
        start = time.perf_counter()
        version, is_adapter = weight_version(model), has_adapter(model)
        is_new = version != self._version
        if is_new:
            dtype = None if is_adapter else same_dtype(model, self._infos)
            num_bytes = self._files.write(model, version, dtype, is_writer=rank() == 0)
            self._metrics["rollout/weight_sync_bytes"] = float(num_bytes * len(self.servers))
            self._version, self._versions = version, self._versions + 1
        with ThreadPoolExecutor(len(self.servers)) as pool:
            list(pool.map(lambda server: self._update_server(server, is_adapter), self.servers))
        seconds = self._metrics.get("time/weight_sync_s", 0.0) + time.perf_counter() - start
        self._metrics["time/weight_sync_s"] = seconds
        if is_new:
            log.info("servers have weights %s after %.2f s", version, seconds)
        return is_new

    def _update_server(self, server: VLLMServer, is_adapter: bool) -> None:
        problem = ""
        for _ in range(self.retries + 1):
            try:
                self._bring_up_to_date(server, is_adapter=is_adapter)
                return
            except ServerGoneError as error:
                problem = str(error)
                server.wait(problem)
        raise UserError(f"{server!r} took no weights in {self.retries + 1} tries ({KEY}.retries): {problem}")

    def _bring_up_to_date(self, server: VLLMServer, *, is_adapter: bool) -> None:
        """Let one server load the current weights unless it has them; any rank may find that it has not."""
        import fcntl  # POSIX, as vLLM is

        version, files = self._version, self._files
        if has_version(server, version, is_adapter=is_adapter):
            return
        wait_for_files(files, version, self.options.transfer_timeout)
        # One rank at a time; the next one finds the server up to date.
        with (files.root / f".{server.url.partition('://')[2].replace('/', '_')}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if has_version(server, version, is_adapter=is_adapter):
                return
            load_version(server, files, version, is_adapter=is_adapter)
            if self.checksums and not is_adapter:
                self._check_checksums(server)

    def _check_checksums(self, server: VLLMServer) -> None:
        result = compare_checksums(server, self._files, self._version, self._infos[server.url])
        if result.different:
            raise UserError(
                f"{server!r} says that it has the weights of version {self._version}, but {len(result.different)} of"
                f" {result.compared} tensors are others: {', '.join(result.different[:3])}"
            )
        log.debug("%s: %d tensors have the trainer's checksums", server.url, result.compared)

    # ---- Proof ----

    def _prove(
        self, model: PreTrainedModel, request: GenerationRequest, rows: list[_Row], choices: list[dict[str, Any]]
    ) -> None:
        """Compare a few responses with the trainer's own passes."""
        num_sampled, device = request.num_sampled, request.prompt_ids.device
        proven = []
        for first, stop in ((0, num_sampled), (num_sampled, len(rows))):
            # Spread over the rows, so that every server has some.
            step = max(1, (stop - first) // self.prove_responses)
            for index in range(first, stop, step)[: self.prove_responses]:
                tokens, prompt = choices[index]["token_ids"], rows[index].body["token_ids"]
                log_probs = torch.tensor(_log_probs(choices[index])) if index < num_sampled else None
                proven.append(ProvenRow(rows[index].server.url, _ids(prompt, device), _ids(tokens, device), log_probs))
        report_progress(f"comparing log-probs of {len(proven)} responses with the servers'")
        is_16_bit = any(info.dtype not in (None, "float32") for info in self._infos.values())
        with rollout_parameters(model):
            self._metrics["rollout/log_prob_gap"] = prove(model, request, proven, is_16_bit=is_16_bit)


class _Row(NamedTuple):
    """A request for one response.

    Args:
        server: that it is sent to.
        body: as vLLM's `/inference/v1/generate` reads it.
        is_adapter: whether it names the adapter of a version as its model.
    """

    server: VLLMServer
    body: dict[str, Any]
    is_adapter: bool


def vllm_plugin_folder() -> Path:
    """Return the folder of what runs inside a server; it goes on the path of the server's Python."""
    return Path(__file__).parent / "vllm_plugin"


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


def _log_probs(choice: dict[str, Any]) -> list[float]:
    """Return the log-probs of the tokens of a choice."""
    content = (choice.get("logprobs") or {}).get("content") or []
    tokens = choice["token_ids"]
    if [entry["token_id"] for entry in content] != tokens:
        raise UserError(f"model.rollout: vLLM returned log-probs of {len(content)} tokens for {len(tokens)} tokens")
    return [float(entry["logprob"]) for entry in content]


def _ids(tokens: list[int], device: torch.device) -> Tensor:
    return torch.tensor(tokens, dtype=torch.long, device=device)


def _default_folder() -> Path:
    """Return a folder in the machine's shared memory, where there is one."""
    shared = Path("/dev/shm")
    return (shared if shared.is_dir() else Path(tempfile.gettempdir())) / f"remax-lightning-{os.getuid()}"
