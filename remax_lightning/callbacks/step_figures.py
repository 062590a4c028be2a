"""Figures of one optimizer step over all ranks, for the collapse detector."""

from __future__ import annotations

import math
from hashlib import blake2b

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from remax_lightning.callbacks.step_output import response_kl, response_length, response_reward
from remax_lightning.distributed import gather_over_ranks, sum_over_ranks
from remax_lightning.types import StepOutput


class StepFigures:
    """Gathers the parts of an optimizer step."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._reward: list[Tensor] = []
        self._length: list[Tensor] = []
        self._ended: list[Tensor] = []
        self._texts: list[float] = []
        self._sums = dict.fromkeys(("entropy", "entropy_tokens", "kl", "kl_responses"), 0.0)

    def add(self, output: StepOutput) -> None:
        """Add a part."""
        responses = output["rollout"].sampled
        self._reward.append(response_reward(output))
        self._length.append(response_length(output))
        self._ended.append(~responses.truncated.cpu())
        self._texts += [_number(text) for text in responses.texts]
        mask = output["entropy_mask"]
        self._sums["entropy"] += output["entropy"].detach().double().masked_fill(~mask, 0.0).sum().item()
        self._sums["entropy_tokens"] += mask.sum().item()
        if (kl := response_kl(output)) is not None:
            self._sums["kl"] += kl.sum().item()
            self._sums["kl_responses"] += kl.numel()

    def close(self, trainer: Trainer) -> dict[str, float]:
        """Return the figures of the step and begin another; NaN for what there is none of.

        Returns:
            `eos_rate`, `response_length` (tokens), `entropy` (nats per token), `kl` (nats per response),
            `length_correlation` (Pearson's, of reward and length) and `distinct_share`, the same on every rank.
        """
        reward, length, ended = torch.cat(self._reward), torch.cat(self._length), torch.cat(self._ended)
        texts, sums = torch.tensor(self._texts, dtype=torch.float64), list(self._sums.values())
        self._clear()
        local = [float(reward.numel()), ended.sum().item(), length.sum().item(), reward.sum().item(), *sums]
        count, whole, tokens, rewards, entropy, entropy_tokens, kl, kl_responses = sum_over_ranks(trainer, local)
        # In a second pass, because a variance from sums of squares would lose its digits.
        x, y = reward - rewards / count, length - tokens / count
        xx, yy, xy = sum_over_ranks(trainer, [(x * x).sum().item(), (y * y).sum().item(), (x * y).sum().item()])
        return {
            "eos_rate": whole / count,
            "response_length": tokens / count,
            "entropy": entropy / entropy_tokens if entropy_tokens else math.nan,
            "kl": kl / kl_responses if kl_responses else math.nan,
            "length_correlation": xy / (xx**0.5 * yy**0.5) if xx > 0 and yy > 0 else math.nan,
            "distinct_share": len(gather_over_ranks(trainer, texts).unique()) / count,
        }


def _number(text: str) -> float:
    """Return a number for a text, on every rank the same: 48 bits, which float64 holds and ranks can gather."""
    return float(int.from_bytes(blake2b(text.encode("utf-8", "backslashreplace"), digest_size=6).digest(), "big"))
