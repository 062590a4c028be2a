"""`VLLMEngine`: responses from vLLM servers, which get the weights of the policy before each rollout."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_args

from remax_lightning.config import ProofConfig, SamplingConfig
from remax_lightning.distributed import agree_on_errors, gather_objects
from remax_lightning.errors import UserError, above, at_least, check_ranges
from remax_lightning.files import DEFAULT_PYTHON
from remax_lightning.models import ModelConfig, has_adapter
from remax_lightning.rollout.base import GenerationOutput, GenerationRequest
from remax_lightning.rollout.vllm_broadcast import Broadcast, FileTransfer, SharedMemory
from remax_lightning.rollout.vllm_client import (
    KEY,
    ClientOptions,
    MissingError,
    ServerGoneError,
    ServerInfo,
    VLLMServer,
    pause_before,
)
from remax_lightning.rollout.vllm_files import WeightFiles, default_folder
from remax_lightning.rollout.vllm_process import ServerProcess, free_port, memory_share, start_server
from remax_lightning.rollout.vllm_proof import compare_checksums, prove
from remax_lightning.rollout.vllm_requests import (
    Flight,
    Row,
    RowRequest,
    WrittenResponses,
    digest,
    fault_of,
    moved,
    proven_rows,
    row_requests,
    spread,
    staleness,
)
from remax_lightning.rollout.vllm_server import (
    check_server,
    check_tokenizer,
    computed_dtype,
    describe,
    restarted_otherwise,
    served_policy,
    source_of,
)
from remax_lightning.rollout.vllm_weights import WeightSync, adapter_name, end_open_update, same_dtype
from remax_lightning.strategies import forward_is_collective, rollout_parameters
from remax_lightning.strategies.stall_watchdog import report_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

VLLMMode: TypeAlias = Literal["server", "colocate"]
"""Who starts the servers: somebody else, or the engine."""
VLLMTransfer: TypeAlias = Literal["files", "broadcast", "ipc"]
"""How servers get weights: they read them in a folder, or the trainer sends them, or shows them in its memory."""
_WAYS = {"files": FileTransfer, "broadcast": Broadcast, "ipc": SharedMemory}


class VLLMEngine:
    """Generates responses with vLLM servers in processes of their own, for large policies and long, uneven responses.

    Before a rollout the servers get the policy's weights: all of them, or the adapter alone of a policy with one.
    Sampled and greedy requests of all prompts are under way together. A server has an environment with vLLM, which the
    trainer itself never imports; `remax serve` starts it, or with `mode: colocate` the engine itself. The weights that
    a server says it has are compared with the trainer's at every update and in every response, and log-probs of a few
    responses are computed by both: a difference beyond rounding ends the run. What rounding leaves,
    `model.loss.mismatch` corrects.

    Args:
        urls: where the servers listen, such as `http://node7:8000`. Prompts are spread over them by their tokens; all
            ranks share them. None with `mode: colocate`.
        served_model: name of the policy on the servers; None takes the only one that they serve.
        transfer_dir: folder for the weights of one version, which all ranks and servers see with `files`, and rank 0
            alone with `broadcast`; with `colocate` the first rank of each node writes for the servers there. None takes
            one in the shared memory of the machine.
        api_key_env: environment variable with the servers' key. Keys do not stand in configurations, which are saved.
        ca_file: certificates that the servers' are checked with under https; None takes the usual authorities.
        concurrency: requests under way at once at one server; 256, vLLM's own limit of sequences.
        timeout: seconds that one response may take, from the request to its last byte.
        transfer_timeout: seconds that a server may take to load weights.
        restart_timeout: seconds that a server which is gone is waited for. It gets the weights anew, and only responses
            that were not finished are asked for again, with their seeds.
        retries: how often one response is asked for again.
        ahead: rollouts that are written ahead. With 1, the servers write the next one while this one is trained on,
            with the weights from before the update, which `model.loss.mismatch` corrects and has to be set for. 0 by
            default, because responses are then always those of the policy that is trained.
        proof: how the servers are proven to hold the policy.
        mode: `server`, or `colocate`: every rank starts a server of its own on its own device, which sleeps while the
            policy is trained and ends with the run. Not run on a GPU yet.
        python: with `colocate`, Python of the environment that vLLM is installed in.
        server_args: with `colocate`, further arguments of `vllm serve`, such as `[--gpu-memory-utilization, "0.5"]`.
        transfer: `files` lets the servers read the weights in `transfer_dir`. `broadcast` sends them from rank 0 to the
            workers of the servers, over NCCL between GPUs (not run on one yet) and over gloo between CPUs, for servers
            on machines without a disk in common; it is for whole policies, since vLLM reads adapters from files. `ipc`,
            with `colocate`, lets the server read them on the device that it shares, by CUDA IPC (not run on a GPU yet),
            without a copy of them on the host; adapters and policies that a strategy shards still travel in files.

    Raises:
        UserError: if a value is out of its range.
    """

    gathers_parameters = True
    """The engine gathers a sharded policy itself, a parameter at a time, to send it."""

    def __init__(
        self,
        urls: list[str] | None = None,
        served_model: str | None = None,
        transfer_dir: str | None = None,
        api_key_env: str | None = None,
        ca_file: str | None = None,
        concurrency: Annotated[int, at_least(1)] = 256,
        timeout: Annotated[float, above(0, note="seconds")] = 600.0,
        transfer_timeout: Annotated[float, above(0, note="seconds")] = 600.0,
        restart_timeout: Annotated[float, at_least(0, note="seconds")] = 300.0,
        retries: Annotated[int, at_least(0)] = 3,
        ahead: Annotated[int, at_least(0, at_most=1, note="rollouts")] = 0,
        proof: ProofConfig = ProofConfig(),  # noqa: B008 (frozen)
        mode: VLLMMode = "server",
        python: str = DEFAULT_PYTHON,
        server_args: list[str] | None = None,
        transfer: VLLMTransfer = "files",
    ) -> None:
        check_ranges(VLLMEngine.__init__, locals(), KEY)
        is_server = mode == "server"
        expected_urls = "a list of at least one URL" if is_server else "null with mode colocate"
        checks = (
            ("mode", mode, mode in get_args(VLLMMode), f"one of {', '.join(get_args(VLLMMode))}"),
            ("transfer", transfer, transfer in get_args(VLLMTransfer), f"one of {', '.join(get_args(VLLMTransfer))}"),
            ("transfer", transfer, is_server or transfer != "broadcast", "files or ipc with mode colocate"),
            ("transfer", transfer, not is_server or transfer != "ipc", "files or broadcast without mode colocate"),
            ("urls", urls, bool(urls) is is_server, expected_urls),
            ("server_args", server_args, server_args is None or not is_server, "null without mode colocate"),
            ("ahead", ahead, is_server or ahead == 0, "0 with mode colocate, whose server sleeps during training"),
        )
        for name, value, holds, expected in checks:
            if not holds:
                raise UserError(f"{KEY}.{name} must be {expected}, got {value}")
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise UserError(f"{KEY}.api_key_env: the environment variable {api_key_env} is not set; export it")
        options = ClientOptions(timeout, transfer_timeout, restart_timeout, concurrency, retries, api_key_env, ca_file)
        urls = urls or [f"http://127.0.0.1:{free_port()}"]
        self.servers = [VLLMServer(url, options) for url in urls]
        if len({server.url for server in self.servers}) < len(urls):
            raise UserError(f"{KEY}.urls must be different servers, got {', '.join(urls)}")
        self.mode, self.transfer, self._python, self.server_args = mode, transfer, python, server_args or []
        memory_share(self.server_args)  # refuses what is none
        self.process: ServerProcess | None = None
        """The server of this rank, with mode `colocate` and once `check` has started it."""
        self.served_model, self.options, self.ahead, self.proof = served_model, options, ahead, proof
        files = WeightFiles(Path(transfer_dir) if transfer_dir else default_folder())
        self._way = _WAYS[transfer]()
        check = self._check_weights if proof.checksums else None
        self._sync = WeightSync(self.servers, files, self._way, transfer_timeout, not is_server, self._inspect, check)
        self._infos: dict[str, ServerInfo] = {}
        self._rollouts = 0
        self._metrics: dict[str, float] = {}
        self._written: WrittenResponses | None = None  # ahead, or under way
        self._started: WrittenResponses | None = None  # until `generate` or `begin` has ended

    # ---- Before training ----

    def check(
        self,
        model: PreTrainedModel,
        sampling: SamplingConfig,
        max_prompt_length: int | None,
        source: ModelConfig | None = None,
        tokenizer: str | None = None,
    ) -> None:
        """Refuse servers that cannot roll out with the policy, before the first rollout; start that of `colocate`.

        Args:
            model: the policy; under autocast, a server that is started computes in its dtype.
            sampling: of the run.
            max_prompt_length: tokens of the longest prompt; None where it is not known.
            source: where the policy is loaded from; None takes what the model itself says.
            tokenizer: folder or hub name; None takes the policy's.

        Raises:
            UserError: naming the server and what it lacks.
        """
        with agree_on_errors():
            if self.mode == "colocate" and self.process is None:
                source = source or source_of(model)
                policy = served_policy(source, computed_dtype(model), sampling, max_prompt_length, tokenizer)
                self.process = start_server(self.servers[0], policy, self._python, self.server_args, model.device)
                # With this engine, or with the process: several runs in one process each have a server of theirs.
                weakref.finalize(self, self.process.stop)
            for server in self.servers:
                if server.url not in self._infos:
                    server.wait()
                    server.insist(partial(end_open_update, server), "resuming")
                info = self._infos.get(server.url) or server.insist(
                    partial(describe, server, self.served_model), "a description"
                )
                check = partial(check_server, server, info, model, sampling, max_prompt_length)
                server.insist(partial(check, sends_weights=self.transfer == "broadcast"), "a check")
                self._infos[server.url] = info

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse servers with another tokenizer, after `check`: they would look for stop strings in other texts.

        Args:
            tokenizer: of the run.

        Raises:
            UserError: naming the server and a text that differs.
        """
        with agree_on_errors():
            for server in self.servers:
                server.insist(partial(check_tokenizer, server, self._infos[server.url], tokenizer), "its tokenizer")

    def close(self) -> None:
        """End the server of this rank, with mode `colocate`; it ends with the engine or the process anyway."""
        self.drop()
        if self.process is not None:
            self.process.stop()
            self.process = None
            self._infos.clear()

    def describe(self) -> list[str]:
        """Return what each server is, in words, after `check`."""
        lines = []
        for server in self.servers:
            info, version = self._infos[server.url], server.insist(server.version, "its version")
            length, mode = info.max_model_len, info.logprobs_mode
            lines.append(f"{server.url}: vLLM {version}, {info.model} in {info.dtype}, {length} tokens, {mode}")
        return lines

    def metrics(self) -> dict[str, float]:
        """Return figures of the rollouts since the last call, by the name that they are logged under."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    # ---- A rollout ----

    def generate(self, model: PreTrainedModel, request: GenerationRequest) -> GenerationOutput:
        """Generate responses with the servers, or return those that were written ahead; see `RolloutEngine`."""
        requests = row_requests(request, log_probs=request.return_log_probs)
        written, asked = self._written, digest(requests)
        with self._cancelled_on_errors():
            if written is not None and written.asked == asked:
                self._written, self._started = None, written
            else:
                written = self._start(model, request, requests, asked)
            # A rank that fails alone would leave the others in the collectives of the next rollout's weights.
            with agree_on_errors() if self.ahead or forward_is_collective(model) else nullcontext():
                output = written.output()
        if self.mode == "colocate":
            self._tell("/sleep?level=1")  # training gets its memory; evaluations need the weights again, on the host
        return moved(output, request.prompt_ids.device)

    @contextmanager
    def _cancelled_on_errors(self) -> Iterator[None]:
        """Leave no request under way where an error or Ctrl-C, at any moment, ends what is inside."""
        try:
            yield
        except BaseException:
            if self._started is not None:
                self._started.cancel()
            raise
        finally:
            self._started = None

    def _tell(self, path: str) -> None:
        """Let the server of this rank sleep, or wake up."""
        [server] = self.servers
        server.insist(partial(server.post, path, None, self.options.transfer_timeout), "sleeping and waking up")

    def begin(self, model: PreTrainedModel, request: GenerationRequest) -> None:
        """Let the servers write responses with the weights of now, which `generate` returns to the same request later.

        Args:
            model: the policy.
            request: prompts, settings and a generator in the state in which `generate` will get it.
        """
        if self._written is not None:
            log.warning("responses that were written ahead were never asked for; they are dropped")
        self.drop()
        requests = row_requests(request, log_probs=request.return_log_probs)
        with self._cancelled_on_errors():
            self._written = self._start(model, request, requests, digest(requests))

    def drop(self) -> None:
        """Give up on responses that are written ahead."""
        if self._written is not None:
            self._written.cancel()
            self._written = None

    def state_dict(self) -> dict[str, Any] | None:
        """Return the responses that are written ahead as tensors, which are waited for; None where there are none.

        Later they could not be written again: they are of weights that no checkpoint holds.
        """
        if self._written is None:
            return None
        return {"asked": self._written.asked, **self._written.output()._asdict()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore the result of `state_dict`."""
        self.drop()
        if state is not None:
            state = dict(state)
            self._written = WrittenResponses(state.pop("asked"), None, None, GenerationOutput(**state))

    def _start(
        self, model: PreTrainedModel, request: GenerationRequest, requests: list[RowRequest], asked: str
    ) -> WrittenResponses:
        """Send the weights, then all requests; at a proof, return once they are answered and compared."""
        if len(self._infos) < len(self.servers):
            self.check(model, request.sampling, request.prompt_ids.shape[1])
        # ---- The servers get the weights ----
        if self.mode == "colocate":
            with self._agreed(model):
                self._tell("/wake_up?tags=weights")
        is_new = self._update(model)
        has_restarted = self._has_restarted(model)
        if self.mode == "colocate":  # behind the weights, whose loading takes memory of its own
            with self._agreed(model):
                self._tell("/wake_up?tags=kv_cache")
        # A server that has come back may hold another base below the adapter, or sample with other options.
        is_first = has_restarted or (is_new and self._sync.num_versions == 2)
        is_proven = self._rollouts % self.proof.every == 0 or is_first
        self._rollouts += 1
        # ---- Every row is a request of its own, all of them under way together ----
        if is_proven:
            for row in requests[: request.num_sampled]:
                row.parameters.setdefault("logprobs", 0)
        rows = self._rows(requests, is_adapter=has_adapter(model))
        flight = Flight(rows, self._respond, self.servers, self.options.concurrency * len(self.servers))
        self._started = responses = WrittenResponses(asked, request, flight)
        responses.start()
        if is_proven:
            with self._agreed(model):
                choices = responses.choices()
            with self._agreed(model):
                self._prove(model, request, rows, choices)
        return responses

    @staticmethod
    def _agreed(model: PreTrainedModel) -> AbstractContextManager[None]:
        """A rank that fails alone inside would leave the others in the collectives of a sharded policy."""
        return agree_on_errors() if forward_is_collective(model) else nullcontext()

    def _has_restarted(self, model: PreTrainedModel) -> bool:
        """Whether a server has restarted since the last call; the same on all ranks that share a sharded policy."""
        restarts, self._sync.num_restarts = self._sync.num_restarts, 0
        return any(gather_objects(restarts)) if forward_is_collective(model) else restarts > 0

    def _drain(self) -> None:
        """Wait for what is written ahead."""
        if self._written is not None:
            self._written.output()

    def _update(self, model: PreTrainedModel) -> bool:
        """Bring all servers to the weights of the policy; returns whether those are new."""
        start = time.perf_counter()
        with self._agreed(model):
            is_new = self._sync.update(model, same_dtype(model, self._infos), self._drain)
            self._drain()  # one batch is under way at a time
        if is_new:
            self._metrics["rollout/weight_sync_bytes"] = float(self._sync.num_bytes * len(self.servers))
        seconds = self._metrics.get("time/weight_sync_s", 0.0) + time.perf_counter() - start
        self._metrics["time/weight_sync_s"] = seconds
        if is_new:
            log.info("servers have weights %s after %.2f s", self._sync.version, seconds)
        return is_new

    def _rows(self, requests: list[RowRequest], *, is_adapter: bool) -> list[Row]:
        servers, version, rows = spread(self.servers, requests), self._sync.version, []
        for request in requests:
            server = servers[request.prompt]
            model = adapter_name(version) if is_adapter else self._infos[server.url].model
            body = {"model": model, "token_ids": request.token_ids, "sampling_params": request.parameters}
            rows.append(Row(server, body, is_adapter))
        return rows

    def _inspect(self, server: VLLMServer) -> None:
        """Refuse a server that has come back as another one: what was checked before training holds no more."""
        changes = restarted_otherwise(describe(server, self.served_model), self._infos[server.url])
        if changes:
            raise UserError(
                f"{server!r} has restarted as another one: {changes}; start it as before, and resume the run with"
                " --ckpt_path last"
            )

    def _respond(self, row: Row, stop: threading.Event) -> dict[str, Any]:
        """Return vLLM's choice for one row, asking again as long as that may help."""
        server, path, problem = row.server, "/inference/v1/generate", ""
        for attempt in range(self.options.retries + 1):
            if attempt:
                stop.wait(pause_before(attempt))
                with server.recovery:
                    if stop.is_set():
                        break
                    server.wait(problem, stop)
                    if stop.is_set():
                        break
            try:
                if attempt:
                    with server.recovery:
                        self._sync.bring_up_to_date(server, is_adapter=row.is_adapter)
                answer = server.post(path, row.body, self.options.timeout)
            except (ServerGoneError, MissingError) as error:  # an adapter is missing after a restart
                problem = str(error)
                continue
            choice: dict[str, Any] = server.read(path, answer, "choices", 0)
            server.read(path, choice, "token_ids")
            if fault := fault_of(choice):
                raise UserError(f"{server!r} answered {path} with {fault}; is it a vLLM server of 0.32 or later?")
            problem = staleness(answer, choice, row, self._sync.version)
            if not problem:
                return choice
        raise UserError(f"{server!r} gave no response in {self.options.retries + 1} tries ({KEY}.retries): {problem}")

    # ---- Proof ----

    def _check_weights(self, server: VLLMServer, files: WeightFiles, version: str) -> None:
        weights = self._way.weights()
        result = compare_checksums(server, files.folder(version), weights, self._infos[server.url])
        if result.different:
            raise UserError(
                f"{server!r} says that it has the weights of version {version}, but {len(result.different)} of"
                f" {result.compared} tensors are others: {', '.join(result.different[:3])}"
            )
        log.debug("%s: %d tensors have the trainer's checksums", server.url, result.compared)

    def _prove(
        self, model: PreTrainedModel, request: GenerationRequest, rows: list[Row], choices: list[dict[str, Any]]
    ) -> None:
        """Compare a few responses with the trainer's own passes."""
        proven = proven_rows(request, rows, choices, self.proof.responses)
        report_progress(f"comparing log-probs of {len(proven)} responses with the servers'")
        start = time.perf_counter()
        is_16_bit = any(info.dtype not in (None, "float32") for info in self._infos.values())
        with rollout_parameters(model):
            self._metrics["rollout/log_prob_gap"] = prove(model, request, proven, self.proof, is_16_bit=is_16_bit)
        self._metrics["time/proof_s"] = time.perf_counter() - start
