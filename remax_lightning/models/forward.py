"""Forward passes of any causal language model over left-padded rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from remax_lightning.sharding import is_peft_wrapper, unwrap_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@lru_cache(maxsize=64)
def _forward_parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model inside a PEFT wrapper that adapts layers; a wrapper for prompt learning is kept."""
    wrapper: Any = model
    if not is_peft_wrapper(model) or wrapper.active_peft_config.is_prompt_learning:
        return model
    return cast("PreTrainedModel", unwrap_peft(model))


def accepts_argument(model: PreTrainedModel, argument: str) -> bool:
    """Return whether the model's `forward` has a parameter of that name; BLOOM, for example, has no `position_ids`."""
    return argument in _forward_parameters(type(language_model(model)).forward)


def prompt_index_per_row(prompt_ids: Tensor, num_samples: int, greedy: bool) -> Tensor:
    """Return `[N]` the index of each row's prompt: sampled rows first, prompt by prompt, then one greedy row each."""
    prompts = torch.arange(len(prompt_ids), device=prompt_ids.device)
    return torch.cat([prompts.repeat_interleave(num_samples), prompts if greedy else prompts[:0]])


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
    if accepts_argument(model, "position_ids"):
        inputs["position_ids"] = position_ids(mask)
    return inputs


@contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into eval mode inside.

    Needed for decoding: in train mode with gradient checkpointing a model drops its cache and generates wrong tokens.
    """
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
