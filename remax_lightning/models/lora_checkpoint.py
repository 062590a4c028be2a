"""A LoRA adapter out of a checkpoint, put around the model that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from remax_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def contains_adapter(weights: Mapping[str, Tensor]) -> bool:
    """Whether weights are those of a model that PEFT has adapted by LoRA, or of the adapter alone."""
    return any(".lora_" in name for name in weights)


def adapter_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype of the adapter among `weights`; unless it is told otherwise, the base was loaded in the same."""
    return next(value.dtype for name, value in weights.items() if ".lora_" in name)


def load_adapter(model: PreTrainedModel, weights: dict[str, Tensor], lora: Mapping[str, Any]) -> Any:
    """Return `model` in PEFT's wrapper with the adapter of a checkpoint.

    Args:
        model: the base; without weights of its own if only the adapter is wanted.
        weights: by the names that they have in the adapted model. Those of the base may be among them.
        lora: the keys of `model.policy.lora`.

    Raises:
        UserError: if the weights are not those of such an adapter.
    """
    from peft import PeftConfig, get_peft_model

    empty = next(model.parameters()).is_meta
    path = lora.get("path")
    config: Any = PeftConfig.from_pretrained(path) if path else _infer_lora_config(weights, lora)
    config.inference_mode = False
    # No other precision than that of the run: a merge is to round as it would have there.
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=empty)
    wanted = {name for name in adapted.state_dict() if ".lora_" in name}
    unknown = sorted(weights.keys() - adapted.state_dict().keys()) + sorted(wanted - weights.keys())
    if unknown:
        raise UserError(
            f"checkpoint: its adapter is not the one of model.policy.lora; they differ in {len(unknown)} weights:"
            f" {', '.join(unknown[:3])}; give the configuration of its run with --config"
        )
    adapted.load_state_dict(weights, strict=False, assign=True)
    return adapted


def _infer_lora_config(weights: Mapping[str, Tensor], lora: Mapping[str, Any]) -> Any:
    from peft import LoraConfig

    [rank, *others] = {len(value) for name, value in weights.items() if ".lora_A." in name}
    if others or "alpha" not in lora:
        raise UserError(
            "model.policy.lora must be in the configuration of the run, since the checkpoint holds an adapter, with its"
            f" alpha; got {dict(lora) or 'nothing'}; give the configuration with --config"
        )
    return LoraConfig(
        r=rank,
        lora_alpha=lora["alpha"],
        lora_dropout=lora.get("dropout", 0.0),
        target_modules=lora.get("target_modules") or "all-linear",
        task_type="CAUSAL_LM",
    )
