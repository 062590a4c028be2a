"""Calling a causal language model on left-padded rows, whatever its family."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@lru_cache(maxsize=64)
def _forward_parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether the model's `forward` has a parameter of that name; `BLOOM`, for one, has no position ids."""
    return argument in _forward_parameters(type(model).forward)


def position_ids(mask: Tensor) -> Tensor:
    """Return `[M, T]` positions that count real tokens only, from 0, so that left padding shifts nothing."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def model_inputs(model: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """Return the arguments of a forward pass over rows padded on either side.

    Args:
        model: whose `forward` will be called.
        input_ids: `[M, T]` token ids.
        mask: `[M, T]` bool, True on real tokens.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask.long()}
    if takes(model, "position_ids"):
        inputs["position_ids"] = position_ids(mask)
    return inputs
