"""The last layer of a reward model: where it is, and how it scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ScoreHead(nn.Linear):
    """A linear layer with one output that scores in float32 whatever the weights are, and normalizes the scores.

    Half precision would round the scores of like responses to the same number. Parameters have the names of the plain
    layer's; what a score is normalized with is not among them.
    """

    mean: float = 0.0
    """What is subtracted from a score."""
    std: float = 1.0
    """What the difference is divided by."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return `[..., 1]` scores of `[..., D]` hidden states."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            scores = F.linear(hidden.to(dtype), self.weight.to(dtype), bias)
        return (scores - self.mean) / self.std


def score_head_name(model: PreTrainedModel) -> str | None:
    """Return the name of the linear layer with one output that stands outside of the body, None unless there is one."""
    body = set() if model.base_model is model else set(model.base_model.modules())
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == 1 and module not in body
    ]
    return names[0] if len(names) == 1 else None


def score_head(model: PreTrainedModel) -> ScoreHead | None:
    """Return the model's score head, turned into a `ScoreHead` in place, or None where there is none to be found."""
    name = score_head_name(model)
    if name is None:
        return None
    head = model.get_submodule(name)
    if type(head) is nn.Linear:
        head.__class__ = ScoreHead
    return head if isinstance(head, ScoreHead) else None
