"""What a vLLM server is: the command that starts one, what it tells of itself, and one in a child process."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from remax_lightning.config import SamplingConfig
from remax_lightning.errors import UserError
from remax_lightning.models import LoRAConfig, ModelConfig, has_adapter
from remax_lightning.rollout.vllm_broadcast import check_workers
from remax_lightning.rollout.vllm_client import (
    KEY,
    MissingError,
    RefusedError,
    ServerGoneError,
    ServerInfo,
    VLLMServer,
)
from remax_lightning.rollout.vllm_proof import log_probs_mode
from remax_lightning.rollout.vllm_weights import BACKEND
from remax_lightning.sharding import unwrap_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks of adapters that vLLM can be started for."""
_TOKENS_TRIED = 64
"""Tokens that trainer and server write as text, to compare their tokenizers."""


class ServedPolicy(NamedTuple):
    """What a server has to serve.

    Args:
        path: folder or hub name.
        dtype: that it computes in.
        sampling: of the run.
        max_prompt_length: tokens of the longest prompt; None leaves the limit to the model.
        lora_rank: of the adapter that is trained; None without one.
        tokenizer: folder or hub name, where it is not the policy's.
        revision: on the hub.
        trust_remote_code: run code of the policy's repository.
        from_scratch: there are no weights before the trainer sends some.
    """

    path: str
    dtype: str
    sampling: SamplingConfig
    max_prompt_length: int | None
    lora_rank: int | None = None
    tokenizer: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    from_scratch: bool = False


def served_policy(
    source: ModelConfig, dtype: str, sampling: SamplingConfig, max_prompt_length: int | None, tokenizer: str | None
) -> ServedPolicy:
    """Return what a server has to serve for a policy.

    Args:
        source: where the policy is loaded from.
        dtype: that the trainer computes in.
        sampling: of the run.
        max_prompt_length: tokens of the longest prompt; None leaves the limit to the model.
        tokenizer: folder or hub name, where it is not the policy's.
    """
    return ServedPolicy(
        path=source.path,
        dtype=dtype,
        sampling=sampling,
        max_prompt_length=max_prompt_length,
        lora_rank=None if source.lora is None else _lora_rank(source.lora),
        tokenizer=tokenizer,
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
        from_scratch=source.from_scratch,
    )


def source_of(model: PreTrainedModel) -> ModelConfig:
    """Return where a policy comes from that was loaded elsewhere."""
    lora = LoRAConfig(r=_rank_of(model)) if has_adapter(model) else None
    return ModelConfig(unwrap_peft(model).name_or_path, lora=lora)


def _rank_of(model: Any) -> int:
    """Return the largest rank of a model's adapters, of which single layers may have one of their own."""
    adapters: dict[str, Any] = model.peft_config
    return max(
        int(rank) for adapter in adapters.values() for rank in [adapter.r, *(adapter.rank_pattern or {}).values()]
    )


def _lora_rank(lora: LoRAConfig) -> int:
    """Return the rank of an adapter."""
    if lora.path is None:
        return lora.r
    file = Path(lora.path, "adapter_config.json")
    if not file.is_file():
        return 64  # of a hub's adapter, most have less
    saved = json.loads(file.read_text())
    return int(max([saved["r"], *(saved.get("rank_pattern") or {}).values()]))


def _server_rank(rank: int) -> int:
    """Return the least of vLLM's largest ranks that holds a rank; above all of them, vLLM says so."""
    return next((limit for limit in _RANKS if rank <= limit), rank)


def computed_dtype(model: Any) -> str:
    """Return the dtype that a policy computes in here: autocast's, where that is on."""
    device = model.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    return str(dtype).removeprefix("torch.")


def server_arguments(python: str, policy: ServedPolicy, host: str, port: int, extra: Sequence[str] = ()) -> list[str]:
    """Return the command of a server, the program first.

    Args:
        python: of the environment with vLLM.
        policy: that is served.
        host: address to listen at.
        port: to listen at.
        extra: further arguments for vLLM.
    """
    arguments = [python, "-m", "remax_vllm_serve", "serve", policy.path, "--host", host, "--port", str(port)]
    arguments += ["--dtype", policy.dtype]
    # ---- How weights come ----
    arguments += ["--weight-transfer-config", json.dumps({"backend": BACKEND})]
    arguments += ["--worker-extension-cls", "remax_vllm_transfer.Extension"]
    if policy.lora_rank is not None:
        arguments += ["--enable-lora", "--max-lora-rank", str(_server_rank(policy.lora_rank))]
    # ---- Token ids in and out; what the trainer decides alone ----
    mode = log_probs_mode(policy.sampling)
    arguments += ["--enable-scale-out", "--generation-config", "vllm"]
    arguments += ["--logprobs-mode", mode if mode and mode != "neither" else "raw_logprobs"]
    if policy.max_prompt_length is not None:
        arguments += ["--max-model-len", str(policy.max_prompt_length + policy.sampling.max_response_length)]
    if policy.tokenizer is not None:
        arguments += ["--tokenizer", policy.tokenizer]
    if policy.revision is not None:
        arguments += ["--revision", policy.revision]
    if policy.trust_remote_code:
        arguments.append("--trust-remote-code")
    if policy.from_scratch:
        arguments += ["--load-format", "dummy"]
    return [*arguments, *extra]


def server_environment(api_key_env: str | None) -> dict[str, str]:
    """Return the variables that a server needs, beside those of this process."""
    plugin = str(Path(__file__).parent / "vllm_plugin")
    variables = {
        "PYTHONPATH": os.pathsep.join([plugin, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VLLM_SERVER_DEV_MODE": "1",  # the endpoints for weights
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    return variables | ({} if api_key_env is None else {"VLLM_API_KEY": os.environ[api_key_env]})


# ---- What a server is ----


def describe(server: VLLMServer, model: str | None) -> ServerInfo:
    """Return what the server is.

    Args:
        server: that is asked.
        model: name of the policy there; None takes the only one.

    Raises:
        UserError: if it is no vLLM server for training, or does not serve that model.
        ServerGoneError: if it does not answer.
    """
    try:
        cards = server.value("/v1/models", "data")
    except MissingError:
        raise UserError(f"{server!r} is no vLLM server: it has no list of models at /v1/models") from None
    # An adapter has the model below it as its parent.
    bases = {card["id"]: card for card in cards if card.get("parent") is None}
    if model is None and len(bases) != 1:
        raise UserError(f"{server!r} serves {', '.join(map(repr, bases))}; name the policy in {KEY}.served_model")
    name = next(iter(bases)) if model is None else model
    if name not in bases:
        raise UserError(f"{server!r} serves {', '.join(map(repr, bases))}, not {KEY}.served_model {model!r}")
    try:
        config = server.value("/server_info?config_format=json", "vllm_config")
        server.get("/weight_info")
    except MissingError:
        raise UserError(
            f"{server!r} has no endpoints for weights; start it with `remax serve`, or with VLLM_SERVER_DEV_MODE=1"
            " and a vLLM of 0.32 or later"
        ) from None
    return _server_info(name, bases[name], config)


def knows_token(server: VLLMServer, model: str, token: int) -> bool:
    """Whether a token is in the vocabulary of a model; asks for one greedy token behind it.

    Raises:
        UserError: if the server makes no responses of token ids.
        ServerGoneError: if it does not answer.
    """
    parameters = {"temperature": 0.0, "max_tokens": 1}
    try:
        server.post("/inference/v1/generate", {"model": model, "token_ids": [token], "sampling_params": parameters})
    except RefusedError as error:
        if error.status != 400:
            raise
        return False
    except MissingError:
        raise UserError(f"{server!r} takes no token ids; it needs a vLLM of 0.32 or later") from None
    return True


def check_tokenizer(server: VLLMServer, info: ServerInfo, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a server that writes other texts for tokens than the run's tokenizer: it looks for stop strings in them.

    Args:
        server: that is asked.
        info: what it said of itself.
        tokenizer: of the run.

    Raises:
        UserError: if the texts differ in more than spaces.
        ServerGoneError: if it does not answer.
    """
    special = set(tokenizer.all_special_ids)
    ids = sorted(token for token in tokenizer.get_vocab().values() if token not in special)
    ids = ids[:: max(1, len(ids) // _TOKENS_TRIED)][:_TOKENS_TRIED]
    path = "/detokenize"
    try:
        answer = server.post(path, {"model": info.model, "tokens": ids})
    except (MissingError, RefusedError):  # it has no tokenizer, or none that it shows
        return
    except ServerGoneError as error:
        if error.status != 500:
            raise
        return
    theirs = "".join(str(server.read(path, answer, "prompt")).split())
    ours = "".join(str(tokenizer.decode(ids, skip_special_tokens=False)).split())
    if theirs != ours:
        first = next((i for i, (one, other) in enumerate(zip(theirs, ours, strict=False)) if one != other), 0)
        raise UserError(
            f"{server!r} has another tokenizer than the run: it writes {theirs[first : first + 20]!r} where"
            f" {tokenizer.name_or_path!r} writes {ours[first : first + 20]!r}; start it with `remax serve`, or with"
            " --tokenizer"
        )


def _server_info(name: str, card: dict[str, Any], config: dict[str, Any]) -> ServerInfo:
    """Return what the list of models and the configuration of a server say."""
    model_config = config.get("model_config") or {}
    transfer, lora = config.get("weight_transfer_config") or {}, config.get("lora_config")
    return ServerInfo(
        model=name,
        max_model_len=int(card.get("max_model_len") or model_config["max_model_len"]),
        dtype=None if model_config.get("dtype") is None else str(model_config["dtype"]).removeprefix("torch."),
        logprobs_mode=str(model_config.get("logprobs_mode", "raw_logprobs")),
        transfer_backend=transfer.get("backend"),
        max_lora_rank=None if lora is None else int(lora.get("max_lora_rank", 16)),  # 16 is vLLM's default
        device=str((config.get("device_config") or {}).get("device", "")),
    )


def restarted_otherwise(info: ServerInfo, before: ServerInfo) -> str:
    """Return in what a server differs from what it was, in words; empty if it will do as before.

    Args:
        info: what it says of itself now.
        before: what it said when the run began.
    """
    now = info._replace(max_model_len=min(info.max_model_len, before.max_model_len))  # more tokens do no harm
    return ", ".join(
        f"{name.replace('_', ' ')} {value}, before {old}"
        for name, value, old in zip(now._fields, now, before, strict=True)
        if value != old
    )


def check_server(
    server: VLLMServer,
    info: ServerInfo,
    model: Any,
    sampling: SamplingConfig,
    max_prompt_length: int | None,
    *,
    sends_weights: bool,
) -> None:
    """Refuse a server that cannot roll out with the policy.

    Args:
        server: that is asked.
        info: what it said of itself.
        model: the policy.
        sampling: of the run.
        max_prompt_length: tokens of the longest prompt; None where it is not known.
        sends_weights: whether the trainer sends weights in a group with the server's workers.

    Raises:
        UserError: naming the server and what it lacks.
        ServerGoneError: if it does not answer.
    """
    prompt_length, vocabulary = max_prompt_length or 0, model.config.get_text_config().vocab_size
    if not knows_token(server, info.model, vocabulary - 1):
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
        _check_adapter(server, info, model)
        if sends_weights:
            raise UserError(
                f"{KEY}.transfer broadcast sends all weights, and vLLM reads that of model.policy.lora from files;"
                " set it to files"
            )
    elif info.transfer_backend != BACKEND:
        raise UserError(
            f"{server!r} takes weights by {info.transfer_backend or 'nothing'}, expected {BACKEND}; start it with"
            " `remax serve`"
        )
    elif sends_weights:
        check_workers(server, model.device)
    mode = log_probs_mode(sampling)
    if mode not in (None, "neither", info.logprobs_mode):
        raise UserError(
            f"{server!r} returns {info.logprobs_mode}, and model.sampling trains {mode.replace('_', ' ')}; start it"
            f" with --logprobs-mode {mode}"
        )


def _check_adapter(server: VLLMServer, info: ServerInfo, model: Any) -> None:
    if info.max_lora_rank is None:
        raise UserError(
            f"{server!r} takes no adapters, and model.policy.lora trains one; start it with `remax serve`, or"
            " with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        )
    if (rank := _rank_of(model)) > info.max_lora_rank:
        raise UserError(
            f"{server!r} takes adapters of rank {info.max_lora_rank} at most, and model.policy.lora has {rank}; start"
            f" it with `remax serve`, or with --max-lora-rank {_server_rank(rank)}"
        )
