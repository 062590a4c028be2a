"""Formats of reward models: which project saved the files, PEFT adapters, and where DeepSpeed-Chat reads the score."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from remax_lightning.errors import UserError
from remax_lightning.files import read_json_object
from remax_lightning.models.checkpoint_reader import refused_pickle
from remax_lightning.models.checksums import check_exported
from remax_lightning.sharding import is_zero3_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# ---- Tensors in weight files, listed without loading them; their names tell the project ----


Kind = Literal["transformers", "deepspeed_chat", "openrlhf", "trl_value_head"]

DEEPSPEED_CHAT_BODIES = ("rwtranrsformer", "rwtransformer")
"""DeepSpeed-Chat's names for the transformer: with a typo until 2023-11, correct since."""


class StoredTensor(NamedTuple):
    """A tensor in a weight file.

    Args:
        file: the weight file.
        shape: its size in each dimension.
    """

    file: Path
    shape: tuple[int, ...]


class RewardCheckpoint(NamedTuple):
    """How a reward model was saved.

    Args:
        kind: the format, named by its project.
        head: name of the score head's weight in the files; None where the model's own class knows it.
        renames: patterns of stored names to the names of the transformers classifier.
        bias: name of a bias of the score head that the transformers classifier has no place for.
    """

    kind: Kind
    head: str | None = None
    renames: dict[str, str] = {}  # noqa: RUF012 - never changed
    bias: str | None = None

    def target_name(self, name: str) -> str:
        """Return what the transformers classifier calls a stored tensor."""
        for pattern, target in self.renames.items():
            name = re.sub(pattern, target, name)
        return name


def detect_format(names: dict[str, StoredTensor], config: Any, body: str) -> RewardCheckpoint:
    """Detect the format of a reward model from the names of its tensors.

    Args:
        names: the stored tensors.
        config: its configuration.
        body: what the transformers classifier calls its transformer, such as `model`.
    """
    # ---- DeepSpeed-Chat: "rwtransformer.layers.0...", "v_head.weight" -> "model.layers.0...", "score.weight" ----
    for prefix in DEEPSPEED_CHAT_BODIES:
        if any(name.startswith(f"{prefix}.") for name in names):
            renames = {rf"^{prefix}\.": f"{body}.", r"^v_head\.": "score."}
            return RewardCheckpoint("deepspeed_chat", "v_head.weight", renames)
    # ---- TRL's value head: "v_head.summary.weight", perhaps with a bias, beside the names of the language model ----
    if "v_head.summary.weight" in names:
        bias = "v_head.summary.bias" if "v_head.summary.bias" in names else None
        renames = {r"^v_head\.summary\.weight$": "score.weight"}
        return RewardCheckpoint("trl_value_head", "v_head.summary.weight", renames, bias)
    # ---- OpenRLHF: config.json names the head under `value_head_prefix`; the default was "value_head" ----
    for head in (getattr(config, "value_head_prefix", None), "value_head"):
        if head and f"{head}.weight" in names:
            renames = {} if head == "score" else {rf"^{re.escape(head)}\.": "score."}
            return RewardCheckpoint("openrlhf", f"{head}.weight", renames)
    return RewardCheckpoint("transformers")


def list_tensors(path: str, revision: str | None, allow_pickle: bool) -> dict[str, StoredTensor]:
    """Return the tensors in the weight files of a folder or a repository on the hub, without loading them.

    Safetensors come first, whole or in shards. `.bin` files are opened where that is allowed, by
    `torch.load(weights_only=True)`; where it is not, or there are no weights at all, nothing is returned, and whoever
    loads the model will say so.
    """
    # ---- Whole, then in shards: {"weight_map": {"score.weight": "model-00002-of-00002.safetensors", ...}} ----
    for name in ("model.safetensors", "pytorch_model.bin"):
        if name.endswith(".bin") and not allow_pickle:
            break
        if (single := find_file(path, name, revision)) is not None:
            return _tensors_in(single)
        if (index := find_file(path, f"{name}.index.json", revision)) is not None:
            tensors: dict[str, StoredTensor] = {}
            shards = read_json_object(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise UserError(f"{index}: expected names of files under weight_map; complete the download")
            for shard in sorted(set(shards.values())):
                file = find_file(path, shard, revision)
                if file is None:
                    raise UserError(f"{index}: there is no file {shard!r}, which it names; complete the download")
                tensors |= _tensors_in(file)
            return tensors
    return {}


def find_file(path: str, name: str, revision: str | None) -> Path | None:
    """Return a file of a folder or of a repository on the hub, downloaded, or None where it has no such file."""
    from transformers.utils.hub import cached_file

    # With these three a file that is absent, gated or out of reach is None; else transformers raises an error.
    file = cached_file(
        path,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if file is None else Path(file)


def read_tensor(stored: StoredTensor, name: str) -> Tensor:
    """Return one tensor of a weight file."""
    from safetensors import safe_open

    if stored.file.suffix == ".safetensors":
        with safe_open(stored.file, "pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]
    return _load_pickle(stored.file, "cpu")[name]


def _tensors_in(file: Path) -> dict[str, StoredTensor]:
    from safetensors import safe_open

    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            # the header of the file has the shapes
            names = opened.keys()
            return {name: StoredTensor(file, tuple(opened.get_slice(name).get_shape())) for name in names}
    weights = _load_pickle(file, "meta")  # shapes alone
    return {name: StoredTensor(file, tuple(value.shape)) for name, value in weights.items() if hasattr(value, "shape")}


def _load_pickle(file: Path, device: str) -> dict[str, Tensor]:
    # Mapped into memory, a file is read only where it is looked at; the format before 2020 cannot be.
    weights = torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    if not isinstance(weights, dict):
        raise UserError(f"{file}: expected a dictionary of tensors by name, got a {type(weights).__name__}")
    return weights


# ---- Adapters, merged into their base ----


class Adapter(NamedTuple):
    """A saved adapter.

    Args:
        path: its folder or hub name.
        config: PEFT's configuration of it.
        weights: its file.
        base_path: folder or hub name of the model that it changes.
        base_revision: branch, tag or commit of that model.
        has_tokenizer: whether a tokenizer was saved with it.
    """

    path: str
    config: Any
    weights: Path
    base_path: str
    base_revision: str | None
    has_tokenizer: bool


def read_adapter(path: str, revision: str | None, allow_pickle: bool, key: str) -> Adapter | None:
    """Return the adapter at `path`, None where there is none.

    Raises:
        UserError: if it has no weights in a permitted format, or does not say which model it changes.
    """
    try:
        if find_file(path, "adapter_config.json", revision) is None:
            return None
    except OSError:  # no such folder, no such repository: whoever loads the model says so
        return None
    check_exported(Path(path), f"{key}.path")
    from peft import PeftConfig

    try:
        # ---- Its configuration, and the model that it changes ----
        config = PeftConfig.from_pretrained(path, revision=revision)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{key}.path: {path}/adapter_config.json cannot be read: {reason}") from error
    if not config.base_model_name_or_path:
        raise UserError(
            f"{key}.path: base_model_name_or_path in {path}/adapter_config.json must name the model that the adapter"
            f" changes, got {config.base_model_name_or_path!r}"
        )
    # ---- Its weights: safetensors, or a .bin file where that is allowed ----
    weights = find_file(path, "adapter_model.safetensors", revision)
    pickled = None if weights is not None else find_file(path, "adapter_model.bin", revision)
    if pickled is not None and not allow_pickle:
        raise UserError(
            f"{key}.path: the adapter {path!r} has no safetensors; convert its weights, or set {key}.allow_pickle if"
            " you trust their source"
        )
    if weights is None and pickled is None:
        raise UserError(f"{key}.path: the adapter {path!r} has no weights; expected adapter_model.safetensors in it")
    has_tokenizer = any(find_file(path, name, revision) for name in ("tokenizer.json", "tokenizer_config.json"))
    return Adapter(
        path, config, weights or Path(str(pickled)), config.base_model_name_or_path, config.revision, has_tokenizer
    )


def merge_adapter(model: PreTrainedModel, adapter: Adapter, *, needs_head: bool, key: str) -> PreTrainedModel:
    """Return `model` with the adapter merged into its weights.

    Args:
        model: the sequence classifier that it changes.
        adapter: the saved adapter.
        needs_head: whether the score head has to come from it.
        key: the configuration key of the reward model, for messages.

    Raises:
        UserError: if the adapter does not fit the model, or brings no score head to a model without one.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    if is_zero3_sharded(model):
        raise UserError(
            f"{key}.path: the adapter {adapter.path!r} cannot be merged into a model that ZeRO-3 partitions; take"
            " another strategy, or give the merged model"
        )
    # ---- The score head: from the adapter ("...modules_to_save.score.weight"), or from its base ----
    weights = _weights(adapter, key)
    what = f"{key}.path: the adapter {adapter.weights}"
    if needs_head and not any(name.endswith("score.weight") or "classifier" in name for name in weights):
        raise UserError(
            f"{what} has no score head, and neither has its base {adapter.base_path!r}; name an adapter that was"
            " trained as a reward model (with modules_to_save: [score])"
        )
    try:
        # ---- Add the adapter; nothing may be missing or left over ----
        wrapped: Any = get_peft_model(model, adapter.config)
        report = set_peft_model_state_dict(wrapped, weights)
    except Exception as error:
        reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), str(error))
        raise UserError(f"{what} does not fit its base {adapter.base_path!r}: {reason}") from error
    missing = [name for name in report.missing_keys if "lora_" in name or "modules_to_save" in name]
    if missing or report.unexpected_keys:
        names = ", ".join(sorted([*missing, *report.unexpected_keys])[:4])
        raise UserError(f"{what} does not fit its base {adapter.base_path!r}, which differs from it in {names}")
    # ---- Merge ----
    merged: PreTrainedModel = wrapped.merge_and_unload()
    return merged


def _weights(adapter: Adapter, key: str) -> dict[str, Tensor]:
    if adapter.weights.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(adapter.weights)
    import torch

    try:
        weights: dict[str, Tensor] = torch.load(adapter.weights, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle makes torch raise nearly anything
        reason = refused_pickle(error) or "its weights are damaged, or no file of weights; copy or download it again"
        raise UserError(f"{key}.path: cannot load the adapter {adapter.path!r}: {reason}") from error
    return weights


# ---- The position at which DeepSpeed-Chat's models read the score: it depends on pad tokens, not on the mask ----


@dataclass(frozen=True)
class DeepSpeedChatConfig:
    """Settings of DeepSpeed-Chat's training that are not saved with its reward models.

    Args:
        num_padding_at_beginning: pad tokens that every text begins with and that do not end it: 1 for OPT, whose first
            token is the one that it is padded with there. None counts them in what the tokenizer makes of no text.
        pad_token: `eos`, or the text of a token; None takes what tokenizer and configuration agree on. DeepSpeed-Chat
            pads with the end-of-sequence token, and so scores the token before it.
    """

    num_padding_at_beginning: int | None = None
    pad_token: str | None = None


class PadCutoff:
    """Truncates texts after the scored token, the last one before padding; pad tokens at the beginning do not count.

    Args:
        config: what the user said.
        tokenizer: the reward model's.
        model_config: the reward model's configuration.
        key: the configuration key of `config`, for messages.

    Raises:
        UserError: if the pad token is not known.
    """

    def __init__(
        self, config: DeepSpeedChatConfig, tokenizer: PreTrainedTokenizerBase, model_config: Any, key: str
    ) -> None:
        self.key = key
        self.pad_id = _pad_id(config.pad_token, tokenizer, model_config, key)
        if config.num_padding_at_beginning is None:
            # OPT begins every text with </s>, id 2, which DeepSpeed-Chat also pads with: [2] -> 1. Llama: [1] -> 0.
            empty = list(tokenizer("")["input_ids"])
            self.num_padding = next((i for i, token in enumerate(empty) if token != self.pad_id), len(empty))
        else:
            self.num_padding = config.num_padding_at_beginning

    def cut(self, ids: Sequence[int]) -> list[int]:
        """Return the tokens of one text without those behind the scored one.

        Raises:
            UserError: if nothing is left, since the text begins with a pad token that is not expected there.
        """
        # Pad token 2, one at the beginning: [2, 5, 6, 2, 2] -> pads [0, 3, 4], end 3 -> [2, 5, 6]
        pads = [position for position, token in enumerate(ids) if token == self.pad_id]
        end = pads[self.num_padding] if len(pads) > self.num_padding else len(ids)
        if end == 0 and ids:
            raise UserError(
                f"{self.key}.num_padding_at_beginning is {self.num_padding}, but texts begin with pad token"
                f" {self.pad_id}, and nothing is left to score; set it to 1, as for OPT, or correct pad_token"
            )
        return list(ids[:end])


def _pad_id(pad_token: str | None, tokenizer: PreTrainedTokenizerBase, model_config: Any, key: str) -> int:
    # ---- As the user says ----
    text: Any = tokenizer.eos_token if pad_token == "eos" else pad_token
    if text is not None:
        known = tokenizer.get_vocab()
        if text not in known:
            raise UserError(
                f"{key}.pad_token must be eos or a token of the reward model's tokenizer, got {pad_token!r}"
            )
        return known[text]
    # ---- As tokenizer and configuration say, if they agree ----
    named = [token for token in (tokenizer.pad_token_id, model_config.pad_token_id) if isinstance(token, int)]
    if len(set(named)) != 1:
        tokens = " and ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in named) or "neither"
        raise UserError(
            f"{key}.pad_token must say what the reward model was padded with in training, because its score is read"
            f" before that token; tokenizer and configuration say {tokens}. DeepSpeed-Chat takes eos for most models"
        )
    return named[0]
