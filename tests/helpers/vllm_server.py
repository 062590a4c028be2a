"""A small server with the endpoints of vLLM 0.32 that rollouts use, in a thread, with a tiny model of transformers.

It answers as the real one: paths, fields and statuses are those of `vllm/entrypoints`. A test makes it faulty.
"""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from helpers.waiting import wait_until
from torch import Tensor

from remax_lightning.rollout import GenerationRequest, SamplingConfig, VLLMEngine
from remax_lightning.rollout.vllm_plugin.remax_vllm_group import WeightGroup, make_store, read_folder, read_shared

GENERATE = "/inference/v1/generate"


class FakeVLLM:
    """Serves a policy; use it as a context manager.

    Args:
        model: the policy, of which the server has a copy.
        tokenizer: turns its tokens into text, for stop strings.
        key: that requests must have.
        port: that it listens at; 0 takes a free one.
        faults: attributes to change: see below.
    """

    max_model_len = 128
    logprobs_mode = "raw_logprobs"
    backend: str | None = "remax"
    has_lora = False
    max_lora_rank = 16
    dtype = "float32"
    """That it says it computes in."""
    dev_mode = True
    scale_out = True
    seconds = 0.0
    """That a response takes besides its model's."""
    delays: tuple[float, ...] = ()
    """Seconds that responses take besides, in the order of their requests, again and again."""
    breaks: Mapping[str, Any] = MappingProxyType({})
    """Values in place of those of a response, and of the first of its log-probs."""
    drips = 0.0
    """Seconds in which it sends spaces, one after the other, before a response."""
    vocab_size: int | None = None
    writes: Callable[[str], str] | None = None
    """Changes the texts of its tokenizer."""
    workers: Mapping[str, Any] = MappingProxyType({"device": "cpu", "nccl": None})
    """What its workers say of themselves."""
    refuses_files = False
    """Answers that its workers failed when they load weights."""
    drops_updates = False
    """Takes an update, and goes on with the weights and the version that it had."""
    keeps_weights = False
    """Takes an update and its version, and goes on with the weights that it had."""
    generates_with: str | None = None
    """Version that responses say they were generated with."""
    temperature = 1.0
    """Factor of the temperature that it samples at, and of its log-probs."""
    samples_at = 1.0
    """Factor of the temperature that it samples at; its log-probs are right."""
    own_top_k = 0
    """Tokens that it draws from at most; its log-probs are right. 0 draws from all."""
    greedy_is_random = False
    permutes: tuple[str, str] | None = None
    """Two weights that change places when they are loaded."""
    statuses: dict[str, list[int]]
    """By path, statuses of the next answers."""
    ends: list[tuple[str, int]]
    """Reasons for which the next responses end, and their tokens."""
    blank: str | None = None
    """Path that answers with an empty object."""
    tls: ssl.SSLContext | None = None
    """Speaks https."""
    dies_after: int | None = None
    """Responses until it drops connections and forgets its weights."""
    back_after: float | None = None
    """Seconds from then until it is there again."""
    gathers = 0
    """Requests that it waits for before it answers any but the first; not for long if they do not come."""
    on_death: Callable[[], None] | None = None
    """Called when it has died."""

    def __init__(self, model: Any, tokenizer: Any, *, key: str | None = None, port: int = 0, **faults: Any) -> None:
        self.key, self.tokenizer, self.base = key, tokenizer, deepcopy(model).eval()
        self.start = {name: value.clone() for name, value in self.base.state_dict().items()}
        self.adapters: dict[str, Any] = {}
        self.statuses, self.requests, self.paths, self.dead = {}, [], [], False
        self.ends = []
        self.versions: list[str] = []  # that generated, by request
        self.restarts = self.accepted = 0
        self.open: set[int] = set()  # threads whose requests were accepted and have no answer yet
        self.at_once = self.most_at_once = 0
        self.lock = threading.RLock()
        for name, value in faults.items():
            assert hasattr(type(self), name), name
            setattr(self, name, value)
        self.version, self.updating, self.paused = "default", False, False
        self.group: WeightGroup | None = None
        self.awake = {"weights", "kv_cache"}
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        if self.tls is not None:
            self._server.socket = self.tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"http{'s' if self.tls else ''}://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeVLLM:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def restart(self) -> None:
        """Come back with the weights of the folder and no adapters, as a process that is started again."""
        with self.lock:
            self.base.load_state_dict(self.start)
            self.adapters, self.version, self.updating, self.dead = {}, "default", False, False
            self.group = None
            self.awake = {"weights", "kv_cache"}
            self.restarts += 1

    # ---- HTTP ----

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # it holds the body back for 40 ms, until the headers are acknowledged

            def do_GET(self) -> None:
                self._handle(None)

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self._handle(json.loads(content) if content else {})

            def _handle(self, body: Any) -> None:
                path = self.path.partition("?")[0]
                if server.dead:
                    self.close_connection = True
                    self.connection.close()
                    return
                if path == "/wake_up":
                    body = {"tag": self.path.partition("tags=")[2]}
                try:
                    status, answer = server.answer(path, body, self.headers)
                    if server.dead:
                        self.close_connection = True
                        self.connection.close()
                        return
                    content = b"" if answer is None else json.dumps(answer).encode()
                    server.send(self, path, status, content)
                finally:  # also where nobody hears it, or there is none
                    with server.lock:
                        server.open.discard(threading.get_ident())

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def send(self, handler: BaseHTTPRequestHandler, path: str, status: int, content: bytes) -> None:
        """Send an answer."""
        spaces = round(self.drips / 0.01) if path == GENERATE else 0
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content) + spaces))
        if 300 <= status < 400:
            handler.send_header("Location", "http://elsewhere.invalid/")
        handler.end_headers()
        with suppress(OSError):  # the client has given up
            for _ in range(spaces):
                handler.wfile.write(b" ")
                threading.Event().wait(0.01)
            handler.wfile.write(content)

    def answer(self, path: str, body: Any, headers: Any) -> tuple[int, Any]:
        """Return status and content."""
        with self.lock:
            self.paths.append(path)
            waiting = self.statuses.get(path)
            if waiting:
                status = waiting.pop(0)
                if status != 200:
                    return status, {"error": {"message": f"not now ({status})"}}
        is_guarded = self.key is not None and path.startswith(("/v1", "/inference"))
        if is_guarded and headers.get("Authorization") != f"Bearer {self.key}":
            return 401, {"error": "Unauthorized"}
        if path == self.blank:
            return 200, {}
        endpoints: dict[str, Callable[[Any], tuple[int, Any]]] = {
            "/health": lambda _: (200, None),
            "/version": lambda _: (200, {"version": "0.32.0"}),
            "/v1/models": self._models,
            "/detokenize": self._detokenize,
            "/inference/v1/generate": self._generate,
        }
        if self.dev_mode:
            endpoints |= {
                "/server_info": self._info,
                "/weight_info": lambda _: (200, {"weight_version": self.version}),
                "/weight_checker": self._checksums,
                "/sleep": self._sleep,
                "/wake_up": self._wake_up,
                "/is_paused": lambda _: (200, {"is_paused": self.paused}),
                "/pause": self._pause,
                "/resume": self._resume,
                "/collective_rpc": lambda _: (200, {"results": [dict(self.workers)]}),
                "/get_world_size": lambda _: (200, {"world_size": 1}),
                "/init_weight_transfer_engine": self._join,
                "/start_weight_update": self._start,
                "/update_weights": self._update,
                "/finish_weight_update": self._finish,
            }
        if self.has_lora:
            endpoints |= {"/v1/load_lora_adapter": self._load_adapter, "/v1/unload_lora_adapter": self._unload_adapter}
        if path not in endpoints:
            return 404, {"detail": "Not Found"}
        return endpoints[path](body)

    def _models(self, _: Any) -> tuple[int, Any]:
        base = {"id": "policy", "parent": None, "max_model_len": self.max_model_len}
        adapters = [{"id": name, "root": name, "parent": "policy"} for name in self.adapters]
        return 200, {"object": "list", "data": [base, *adapters]}

    def _detokenize(self, body: Any) -> tuple[int, Any]:
        text = self.tokenizer.decode(body["tokens"], skip_special_tokens=False)
        return 200, {"prompt": text if self.writes is None else self.writes(text)}

    def _info(self, _: Any) -> tuple[int, Any]:
        config: dict[str, Any] = {
            "model_config": {
                "dtype": f"torch.{self.dtype}",
                "max_model_len": self.max_model_len,
                "logprobs_mode": self.logprobs_mode,
            },
            "lora_config": {"max_lora_rank": self.max_lora_rank} if self.has_lora else None,
            "weight_transfer_config": None if self.backend is None else {"backend": self.backend},
        }
        return 200, {"vllm_config": config}

    # ---- Weights ----

    def _sleep(self, _: Any) -> tuple[int, Any]:
        self.awake = set()
        return 200, {"status": "sleeping", "level": 1}

    def _wake_up(self, body: Any) -> tuple[int, Any]:
        self.awake.add(body["tag"])
        return 200, {"status": "awake" if len(self.awake) == 2 else "sleeping"}

    def _pause(self, _: Any) -> tuple[int, Any]:
        self.paused = True
        return 200, {"status": "paused"}

    def _resume(self, _: Any) -> tuple[int, Any]:
        self.paused = False
        return 200, {"status": "resumed"}

    def _start(self, _: Any) -> tuple[int, Any]:
        if self.updating or not self.paused:
            return 500, {"error": "start_weight_update called while a weight update is already active"}
        self.updating = True
        return 200, {"message": "Weight update started"}

    def _join(self, body: Any) -> tuple[int, Any]:
        info = body["init_info"]
        if info:
            store = make_store(info["host"], info["port"], info["seconds"], is_master=False)
            arguments = (info["name"], 1, info["size"], torch.device("cpu"), info["host"], info["seconds"])
            self.group = WeightGroup(store, *arguments)
        return 200, {"message": "Weight transfer initialized"}

    def _update(self, body: Any) -> tuple[int, Any]:
        if not self.updating or self.awake != {"weights"} | (self.awake & {"kv_cache"}):
            return 500, {"error": "start_weight_update must be called before update_weights."}
        if self.refuses_files:
            self.updating = False
            return 500, {"error": {"message": "Worker failed with error 'no room'"}}
        info = body["update_info"]
        if "folder" in info:
            weights = dict(read_folder(Path(info["folder"])))
        elif "shared" in info:
            weights = dict(read_shared(info["shared"], info["places"], torch.device("cpu")))
        else:
            assert self.group is not None
            weights = dict(self.group.receive(info["tensors"]))
        if self.permutes is not None:
            one, other = self.permutes
            weights[one], weights[other] = weights[other], weights[one]
        if not (self.drops_updates or self.keeps_weights):
            with self.lock:
                self.base.load_state_dict(weights, strict=False)
        return 200, {"message": "Weights updated"}

    def _finish(self, body: Any) -> tuple[int, Any]:
        self.updating = False
        if not self.drops_updates:
            self.version = body["weight_version"]
        return 200, {"message": "Weight update finished"}

    def _checksums(self, body: Any) -> tuple[int, Any]:
        """Digests of tensors as vLLM has them, with attention and feed-forward weights stacked."""
        state: dict[str, Tensor] = dict(self.base.named_parameters())
        stacks = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
        for stack, parts in stacks.items():
            for name in [name for name in state if f".{parts[0]}." in name]:
                names = [name.replace(parts[0], part) for part in parts]
                state[name.replace(parts[0], stack)] = torch.cat([state.pop(part) for part in names])
        digests = {
            f"dp0:pp0:pcp0:tp0:{name}": hashlib.sha256(
                value.detach().to(getattr(torch, self.dtype)).contiguous().view(-1).view(torch.uint8).numpy()
            ).hexdigest()
            for name, value in state.items()
        }
        return 200, {"checksums": digests}

    def _load_adapter(self, body: Any) -> tuple[int, Any]:
        from peft import PeftModel

        if body["lora_name"] in self.adapters:
            return 400, {"error": {"message": "has already been loaded"}}
        if not Path(body["lora_path"], "adapter_config.json").is_file():
            return 404, {"error": {"message": f"No adapter found for {body['lora_path']}"}}
        if not self.drops_updates:
            self.adapters[body["lora_name"]] = PeftModel.from_pretrained(deepcopy(self.base), body["lora_path"]).eval()
        return 200, None

    def _unload_adapter(self, body: Any) -> tuple[int, Any]:
        if self.adapters.pop(body["lora_name"], None) is None:
            return 404, {"error": {"message": "cannot be found"}}
        return 200, None

    # ---- Responses ----

    def _generate(self, body: Any) -> tuple[int, Any]:
        with self.lock:
            self.requests.append(body)
            if self.dies_after is not None:
                self.dies_after -= 1
            dies = self.dies_after is not None and self.dies_after < 0
            if not dies:
                self.accepted += 1
                self.open.add(threading.get_ident())
                number = self.accepted
                self.versions.append(body.get("model") if body.get("model") in self.adapters else self.version)
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
        if dies:
            return self._die()
        name = body.get("model", "policy")
        try:
            if len(self.awake) < 2:
                return 500, {"error": {"message": "it sleeps"}}
            if not self.scale_out:
                return 403, {"error": {"message": "Scale-out endpoints are disabled. Restart with --enable-scale-out."}}
            if name != "policy" and name not in self.adapters:
                return 404, {"error": {"message": f"The model `{name}` does not exist."}}
            if max(body["token_ids"]) >= (self.vocab_size or self.base.config.vocab_size):
                return 400, {"error": {"message": "Token id is out of vocabulary"}}
            if self.paused and not wait_until(lambda: not self.paused, 5.0):  # the real one answers never
                return 500, {"error": {"message": "it is paused"}}
            self._wait(number)
            if self.accepted > 1:
                wait_until(lambda: self.most_at_once >= self.gathers)
            model = self.base if name == "policy" else self.adapters[name]
            version = self.generates_with or self.version
            with torch.no_grad(), self.lock:  # peft's layers keep a state while they run
                choice = self._respond(model, body["token_ids"], body["sampling_params"])
        finally:
            with self.lock:
                self.at_once -= 1
        self._cut(choice)
        choice |= {"index": 0, "weight_versions": [{"version": version, "start": 0, "end": len(choice["token_ids"])}]}
        return 200, {"request_id": "1", "model": name, "choices": [self._broken(choice)]}

    def _wait(self, number: int) -> None:
        threading.Event().wait(self.seconds + (self.delays[number % len(self.delays)] if self.delays else 0.0))

    def _cut(self, choice: dict[str, Any]) -> None:
        """End a response as `ends` says, if it does."""
        with self.lock:
            if not self.ends:
                return
            choice["finish_reason"], count = self.ends.pop(0)
        choice["token_ids"] = choice["token_ids"][:count]
        if choice["logprobs"] is not None:
            choice["logprobs"]["content"] = choice["logprobs"]["content"][:count]

    def _broken(self, choice: dict[str, Any]) -> dict[str, Any]:
        for part in (choice, *(choice["logprobs"] or {"content": []})["content"][:1]):
            part |= {name: value for name, value in self.breaks.items() if name in part}
        return choice

    def _die(self) -> tuple[int, Any]:
        """Die once the requests before have their answers, however slow the machine is."""
        assert wait_until(lambda: not self.open)
        with self.lock:
            if self.dies_after is not None:  # nobody died for it yet
                self.dead, self.dies_after = True, None
                if self.back_after is not None:
                    threading.Timer(self.back_after, self.restart).start()
                if self.on_death is not None:
                    threading.Timer(0.1, self.on_death).start()
        return 500, None

    def _respond(self, model: Any, prompt: list[int], parameters: dict[str, Any]) -> dict[str, Any]:
        """Decode one response without a cache; `parameters` are vLLM's."""
        # The parameters that a server does not get have its own defaults.
        parameters = {"top_k": 0, "top_p": 1.0, "min_tokens": 0, "stop_token_ids": [], "stop": []} | parameters
        greedy = parameters["temperature"] == 0
        generator = torch.Generator().manual_seed(parameters.get("seed", 0))
        ids: list[int] = []
        log_probs: list[float] = []
        reason: str = "length"
        stop_reason: int | str | None = None
        room = min(parameters["max_tokens"], self.max_model_len - len(prompt))
        while len(ids) < room:
            logits = model(torch.tensor([prompt + ids]), use_cache=False).logits[0, -1]
            raw = logits.log_softmax(-1)
            for token, bias in (parameters.get("logit_bias") or {}).items():
                logits[int(token)] += bias
            if len(ids) < parameters["min_tokens"]:
                logits[parameters["stop_token_ids"]] = -torch.inf
            if not greedy:
                logits = logits / (parameters["temperature"] * self.temperature)
            logits = _truncated(logits, parameters)
            drawn = _truncated(logits, {"top_k": self.own_top_k, "top_p": 1.0})
            if greedy and not self.greedy_is_random:
                token = int(logits.argmax())
            else:
                probs = (drawn / self.samples_at).softmax(-1)
                token = int(torch.multinomial(probs, 1, generator=generator))
            ids.append(token)
            processed = logits.log_softmax(-1) if self.logprobs_mode == "processed_logprobs" else raw
            if self.temperature != 1:
                processed = (raw / self.temperature).log_softmax(-1)
            log_probs.append(float(processed[token]))
            if token in parameters["stop_token_ids"]:
                reason, stop_reason = "stop", token
                break
            text = self.tokenizer.decode(ids, skip_special_tokens=False) if parameters["stop"] else ""
            found = [stop for stop in parameters["stop"] if stop in text]
            if found and len(ids) > parameters["min_tokens"]:
                reason, stop_reason = "stop", found[0]
                break
        content = [{"token_id": token, "logprob": value} for token, value in zip(ids, log_probs, strict=True)]
        return {
            "token_ids": ids,
            "finish_reason": reason,
            "stop_reason": stop_reason,
            "logprobs": {"content": content} if parameters.get("logprobs") is not None else None,
        }


def _truncated(logits: Tensor, parameters: dict[str, Any]) -> Tensor:
    """Drop what top-k and top-p leave out."""
    if parameters["top_k"]:
        logits = logits.masked_fill(logits < logits.topk(parameters["top_k"]).values[-1], -torch.inf)
    if parameters["top_p"] < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        logits[order[(probs.cumsum(-1) - probs) >= parameters["top_p"]]] = -torch.inf
    return logits


# ---- What it is asked for in tests ----

PROMPTS = [[5, 9, 20], [7], [30, 31, 32, 33, 34], [8, 8]]
ENDS = [2, *range(4, 30)]
"""So many that responses are short: the server's model decodes without a cache."""


def engine_for(folder: Path, *servers: FakeVLLM, **options: Any) -> VLLMEngine:
    defaults = {"transfer_dir": str(folder / "weights"), "restart_timeout": 60.0, "timeout": 60.0, "retries": 2}
    return VLLMEngine([server.url for server in servers], **(defaults | options))


def request_for(num_samples: int = 1, seed: int = 0, **options: Any) -> GenerationRequest:
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[3] * (longest - len(row)) + row for row in PROMPTS])
    mask = torch.arange(longest) >= longest - torch.tensor([[len(row)] for row in PROMPTS])
    fields = {"max_response_length": 6, "num_samples": num_samples}
    sampling = SamplingConfig(
        **(fields | {name: options.pop(name) for name in list(options) if hasattr(SamplingConfig, name)})
    )
    defaults: dict[str, Any] = {"eos_ids": ENDS, "pad_id": 3, "return_log_probs": True}
    return GenerationRequest(ids, mask, sampling, generator=torch.Generator().manual_seed(seed), **(defaults | options))


def shake(model: Any, size: float = 0.1) -> None:
    """Change every weight, as an optimizer step does."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
