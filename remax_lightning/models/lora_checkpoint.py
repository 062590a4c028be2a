"""Load a LoRA adapter from a checkpoint into the model that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from remax_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def contains_adapter(weights: Mapping[str, Tensor]) -> bool:
    """Whether the weights include a LoRA adapter of PEFT."""
    return any(".lora_" in name for name in weights)


def adapter_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype of the adapter among `weights`, the default dtype of its run."""
    return next(value.dtype for name, value in weights.items() if ".lora_" in name)


def load_adapter(model: PreTrainedModel, weights: dict[str, Tensor], lora: Mapping[str, Any]) -> Any:
    """Return `model` in a PEFT wrapper with the adapter of a checkpoint.

    Args:
        model: the base; on the meta device if only the adapter is needed.
        weights: weights by their names in the adapted model; may include those of the base.
        lora: the keys of `model.policy.lora`.

    Raises:
        UserError: if the weights do not fit such an adapter.
    """
    from peft import PeftConfig, get_peft_model

    empty = next(model.parameters()).is_meta
    path = lora.get("path")
    config: Any = PeftConfig.from_pretrained(path) if path else _infer_lora_config(weights, lora)
    config.inference_mode = False
    # Keep the dtype of the run, so that a merge rounds as it would have there.
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=empty)
    # ---- Every weight of the checkpoint must have a place, and every adapter weight a value ----
    wanted = {name for name in adapted.state_dict() if ".lora_" in name}
    unknown = sorted(weights.keys() - adapted.state_dict().keys()) + sorted(wanted - weights.keys())
    if unknown:
        raise UserError(
            f"checkpoint: its adapter does not match model.policy.lora; {len(unknown)} weights differ:"
            f" {', '.join(unknown[:3])}; give the configuration of its run with --config"
        )
    adapted.load_state_dict(weights, strict=False, assign=True)
    return adapted


def _infer_lora_config(weights: Mapping[str, Tensor], lora: Mapping[str, Any]) -> Any:
    from peft import LoraConfig

    [rank, *others] = {len(value) for name, value in weights.items() if ".lora_A." in name}
    if others or "alpha" not in lora:
        raise UserError(
            "the checkpoint holds an adapter, so the configuration of the run must have model.policy.lora with its"
            f" alpha, got {dict(lora) or 'nothing'}; give the configuration with --config"
        )
    return LoraConfig(
        r=rank,
        lora_alpha=lora["alpha"],
        lora_dropout=lora.get("dropout", 0.0),
        target_modules=lora.get("target_modules") or "all-linear",
        task_type="CAUSAL_LM",
    )
