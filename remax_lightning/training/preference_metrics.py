"""Scores of held-out pairs, gathered over ranks with each pair once, and their metrics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from remax_lightning.distributed import gather_objects
from remax_lightning.functional import bradley_terry_loss
from remax_lightning.types import PreferenceBatch

CALIBRATION_BINS = 15
"""Bins of equal width that probabilities are compared with frequencies in, as is usual (Guo et al. 2017)."""


class PairScores(NamedTuple):
    """Scores of pairs.

    Args:
        chosen: `[M]` float64 scores of the chosen responses.
        rejected: `[M]` float64 scores of the rejected ones.
        margin: `[M]` float64, the required difference of the scores.
    """

    chosen: Tensor
    rejected: Tensor
    margin: Tensor

    def figures(self, centering_coef: float) -> dict[str, float]:
        """Return the metrics of the pairs.

        `calibration_error` is the expected calibration error of `sigmoid(difference)`, the probability that the model
        gives to the response with the higher score.
        """
        from torchmetrics.functional.classification import binary_calibration_error

        difference = self.chosen - self.rejected  # [M]
        right = (difference > 0).long()  # [M]
        mean, std = self.moments()
        loss = bradley_terry_loss(self.chosen, self.rejected, len(difference), self.margin, centering_coef)
        error = binary_calibration_error(torch.sigmoid(difference.abs()), right, n_bins=CALIBRATION_BINS, norm="l1")
        return {
            "loss": float(loss),
            "accuracy": float(right.double().mean()),
            "calibration_error": float(error),
            "margin": float(difference.mean()),
            "reward_mean": mean,
            "reward_std": std,
        }

    def moments(self) -> tuple[float, float]:
        """Return mean and standard deviation of all `2M` scores, the latter over `2M`, so that the variance is 1."""
        scores = torch.cat([self.chosen, self.rejected])
        return float(scores.mean()), float(scores.std(correction=0))


class PairScoreSums:
    """Gathers scores batch by batch."""

    def __init__(self) -> None:
        self._scores: dict[int, tuple[float, float, float]] = {}

    def add(self, batch: PreferenceBatch, chosen: Tensor, rejected: Tensor, margin: Tensor) -> None:
        """Add the `[B]` scores of a batch; a repeated pair counts once."""
        columns = [values.detach().double().tolist() for values in (chosen, rejected, margin)]
        self._scores |= dict(zip(batch.indices, zip(*columns, strict=True), strict=True))

    def gather(self) -> PairScores | None:
        """Return the scores of all ranks, the same on each rank, and reset; None if there are none."""
        local, self._scores = self._scores, {}
        scores = {index: row for part in gather_objects(local) for index, row in part.items()}
        if not scores:
            return None
        # In one order on every rank: a sum of float64 depends on it in its last digit.
        values = torch.tensor([scores[index] for index in sorted(scores)], dtype=torch.float64)  # [M, 3]
        return PairScores(*values.unbind(1))
