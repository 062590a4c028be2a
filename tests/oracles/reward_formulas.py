"""How other projects' reward models score, written after their own code as loops in float64.

The body gives hidden states; all that stands behind it is done number by number here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def dot(hidden: Tensor, weight: Tensor) -> float:
    return sum(float(a) * float(b) for a, b in zip(hidden.tolist(), weight.tolist(), strict=True))


def padded(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows)) + 2
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


@torch.no_grad()
def deepspeed_chat(body: Any, v_head: Tensor, rows: list[list[int]], pad_id: int, num_padding: int) -> list[float]:
    """The chosen responses' end scores of its `RewardModel.forward`: it looks for pad tokens in the padded rows."""
    ids, mask = padded(rows, pad_id)
    hidden = body.double()(ids, attention_mask=mask).last_hidden_state
    scores = []
    for number, row in enumerate(ids.tolist()):
        places = []
        for place, token in enumerate(row):
            if token == pad_id:
                places.append(place)
        end = places[num_padding] if len(places) > num_padding else len(row)
        scores.append(dot(hidden[number, end - 1], v_head[0]))
    return scores


@torch.no_grad()
def openrlhf(body: Any, head: Tensor, rows: list[list[int]], mean: float | None, std: float | None) -> list[float]:
    """`RewardModel.forward` in eval mode: the last place with a mask; normalized where `normalize_reward` is on."""
    ids, mask = padded(rows, 0)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    hidden = body.double()(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    scores = []
    for number, row in enumerate(mask.tolist()):
        end = max(place for place, real in enumerate(row) if real)
        score = dot(hidden[number, end], head[0])
        scores.append(score if mean is None or std is None else (score - mean) / std)
    return scores


@torch.no_grad()
def trl_value_head(body: Any, weight: Tensor, bias: float, rows: list[list[int]]) -> list[float]:
    """`AutoModelForCausalLMWithValueHead` at the last token: a linear layer with a bias over the last hidden states."""
    scores = []
    for row in rows:
        hidden = body.double()(torch.tensor([row])).last_hidden_state
        scores.append(dot(hidden[0, len(row) - 1], weight[0]) + bias)
    return scores


def with_lora(weight: Tensor, down: Tensor, up: Tensor, alpha: float) -> Tensor:
    """A weight with its LoRA update, entry by entry."""
    changed = weight.double().clone()
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            update = sum(float(up[i, k]) * float(down[k, j]) for k in range(down.shape[0]))
            changed[i, j] += alpha / down.shape[0] * update
    return changed
