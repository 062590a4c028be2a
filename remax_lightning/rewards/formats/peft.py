"""Read a reward model that was saved as a PEFT adapter, and merge it into its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from remax_lightning.errors import UserError
from remax_lightning.models.checksums import check_exported
from remax_lightning.rewards.formats.detect import find_file
from remax_lightning.sharding import is_zero3_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    weights = _weights(adapter)
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


def _weights(adapter: Adapter) -> dict[str, Tensor]:
    if adapter.weights.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(adapter.weights)
    import torch

    weights: dict[str, Tensor] = torch.load(adapter.weights, map_location="cpu", weights_only=True)
    return weights
