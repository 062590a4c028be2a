"""Compares baselines on the rollouts of a run: the variance of the gradient with each, and what it costs.

A response adds `(r - b)² · |∇ log π(y)|²` to the second moment of the gradient. Unbiased baselines leave the mean of
the gradient, so second moments compare variances. Times the seconds of a step, they compare the time that a gradient of
the same precision takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remax_lightning.baselines.base import Baseline, BaselineInputs, Measurement, can_value, checked_values
from remax_lightning.evaluation.statistics import percentile_interval

NUM_RESAMPLES = 400
"""Draws of the bootstrap: enough for the ends of a 95 % interval, few enough to cost nothing."""
GROUPS = 8
"""Most groups of prompts that a rollout is drawn by in the bootstrap; more of them would only cost time."""
MIN_GROUPS = 2 * GROUPS
"""Groups of prompts with an advantage that a cost needs: of fewer, too often all are on one side by chance, and so are
all draws. Where responses hardly ever differ from a baseline, the rare ones that do may be missing from a window."""
WARM_UP = 2
"""Rollouts at the start of a run whose seconds do not count: they allocate memory and choose kernels."""


class Figure(NamedTuple):
    """What is known of a baseline, each as a value and the ends of its 95 % interval, divided by the one in use.

    Args:
        variance: second moment of the gradient.
        cost: that times the seconds of a step; None while seconds with and without greedy responses are not known, or
            too few groups of prompts tell of it.
        num_groups: groups of prompts in which responses have an advantage, with it and with the one in use.
    """

    variance: tuple[float, float, float]
    cost: tuple[float, float, float] | None
    num_groups: int = 0


class _Moments(NamedTuple):
    """A measured rollout: its number, and by baseline `[G]` sums of second moments and if it asked for greedy rows."""

    number: int
    sums: dict[str, Tensor]
    needs: dict[str, bool]

    def resampled(self) -> NDArray[np.float64]:
        """Return `[1 + K, F]` sums over the rollout: of all its groups, and of the bootstrap's draws of them.

        A draw takes each group as often as a Poisson variable of mean 1 says: the bootstrap for data that arrives bit
        by bit (Oza and Russell 2001), since what is drawn of a rollout depends on no other. The sums of a draw over a
        window are then sums of these, made once per rollout, and a resumed run draws the same.
        """
        sums = torch.stack(list(self.sums.values()), 1).numpy()  # [G, F]
        counts = np.random.default_rng(self.number).poisson(1.0, (NUM_RESAMPLES, len(sums)))  # [K, G]
        return np.concatenate([sums.sum(0, keepdims=True), counts @ sums])


class Comparison:
    """Second moments under several baselines, and seconds of steps, over the last rollouts.

    Everything that enters is the same on all ranks, and so is what comes out.

    Args:
        candidates: baselines by name; the objects learn here and serve nothing else.
        window: rollouts that count.
        greedy_price: seconds that greedy responses add to a step, as a share of one without them; None takes what was
            measured.
    """

    def __init__(self, candidates: Mapping[str, Baseline], window: int, greedy_price: float | None = None) -> None:
        self.candidates, self.window, self.greedy_price = dict(candidates), window, greedy_price
        self.number = 0
        """Rollouts that were observed."""
        self._moments: list[_Moments] = []
        self._resampled: list[NDArray[np.float64]] = []  # [1 + K, F] of each of them
        # (number, seconds of rollout, of training), of rollouts without and with greedy responses
        self._seconds: dict[bool, list[tuple[int, float, float]]] = {False: [], True: []}
        # Of the last rollout: [S] squared advantages by name, which await their gradients; n; with greedy responses?
        self._pending: dict[str, Tensor] = {}
        self._needs: dict[str, bool] = {}
        self._num_samples, self._has_greedy = 1, False
        self._inputs: BaselineInputs | None = None

    # ---- Observing ----

    def observe(self, inputs: BaselineInputs, *, is_measured: bool = True) -> None:
        """Value a rollout with every candidate that can, and let each learn from it.

        Args:
            inputs: the scores of the rollout.
            is_measured: whether norms will follow; without them it is enough that the candidates learn.
        """
        self.number += 1
        self._pending, self._needs, self._inputs = {}, {}, inputs
        self._num_samples, self._has_greedy = inputs.num_samples, inputs.greedy_reward is not None
        for name, baseline in self.candidates.items():
            # Its price counts those that it would have asked for, also where it got none.
            needs = self._needs[name] = baseline.needs_greedy(inputs.prompts)
            if not can_value(baseline, inputs):
                continue
            # One that would not have asked for greedy responses gets none: a cached reward is as old as it would be.
            seen = inputs if needs else inputs._replace(greedy_reward=None)
            if is_measured:
                self._pending[name] = (inputs.reward - checked_values(baseline, seen)).square()  # [S]
            baseline.observe(seen)

    def measure(self, measurement: Measurement) -> None:
        """Add what training on the rollout has shown."""
        norms = measurement.squared_norms
        # A pass that overflows has none; its optimizer step is skipped, and in a sum nothing else would be seen.
        if norms is not None and self._pending and bool(norms.isfinite().all()):
            num_prompts = len(norms) // self._num_samples
            moments = self._second_moments(norms)  # [S] each
            # [B] -> G groups; of sums and not of means, since ratios of sums are taken
            parts = torch.arange(num_prompts).tensor_split(min(GROUPS, num_prompts))
            groups = torch.cat([torch.full_like(part, number) for number, part in enumerate(parts)])
            groups = groups.repeat_interleave(self._num_samples)  # [S]
            zeros = torch.zeros(len(parts), dtype=torch.float64)
            sums = {name: zeros.index_add(0, groups, moment) for name, moment in moments.items()}
            self._moments.append(_Moments(self.number, sums, self._needs))
            self._resampled.append(self._moments[-1].resampled())
        if measurement.training_seconds is not None and self.number > WARM_UP:
            seconds = self.number, measurement.rollout_seconds, measurement.training_seconds
            self._seconds[self._has_greedy].append(seconds)
        self._pending = {}
        # ---- What is older than the window ----
        oldest = self.number - self.window
        old = sum(moments.number <= oldest for moments in self._moments)
        del self._moments[:old], self._resampled[:old]
        for values in self._seconds.values():
            values[:] = [row for row in values if row[0] > oldest]

    def _second_moments(self, norms: Tensor) -> dict[str, Tensor]:
        """Return `[S]` what each response adds to the second moment of the gradient."""
        whole = norms if norms.dim() == 1 else norms.sum(1)  # [S]
        moments = {name: square * whole for name, square in self._pending.items()}
        if norms.dim() == 1 or self._inputs is None:
            return moments
        # ---- One value per token: logits of different tokens are different numbers, so their squares add up ----
        inputs = self._inputs._replace(squared_norms=norms)
        for name, baseline in self.candidates.items():
            if baseline.reads_gradients and can_value(baseline, inputs):
                advantages = inputs.reward[:, None] - checked_values(baseline, inputs)  # [S, R]
                moments[name] = (advantages.square() * norms).sum(1)
        return moments

    # ---- Figures ----

    @property
    def num_measured(self) -> int:
        """Measured rollouts in the window."""
        return len(self._moments)

    def figures(self, used: str, confidence: float = 0.95) -> dict[str, Figure]:
        """Return what is known of each candidate, by the measured rollouts of the window that tell of both.

        A rollout without greedy responses tells of the baselines that need none. Empty where there is nothing to divide
        by: no measured rollout, or every reward is the baseline in use.

        Args:
            used: the candidate that the others are divided by.
            confidence: of the intervals.
        """
        rows = [row for row in self._moments if used in row.sums]
        names = [name for name in self.candidates if any(name in row.sums for row in rows)]
        sums, bases = self._window_sums(names, used)  # [1 + K, F] each
        known = bases[0] > 0
        sums, bases = sums[:, known], bases[:, known]
        names = [name for name, is_known in zip(names, known, strict=True) if is_known]
        if used not in names:
            return {}
        base = names.index(used)
        # Paired over baselines, as both are of the same draws; a draw without anything of the base tells nothing.
        drawn = sums / np.where(bases > 0, bases, np.nan)  # [1 + K, F]
        ends = percentile_interval(drawn[1:], confidence)  # [F, 2]
        groups = [_num_told(rows, name, used) for name in names]
        figures = {name: Figure(_with_ends(drawn[0, i], ends[i]), None, groups[i]) for i, name in enumerate(names)}
        asked = [[row.needs[name] for row in rows if name in row.needs] for name in names]
        shares = [sum(needs) / len(needs) for needs in asked]
        prices = self._prices(np.array(shares))
        if prices is None:
            return figures
        prices = prices / prices[:, [base]]  # [1 + K, F], or [1, F] without draws
        costs = drawn[0] * prices[0]
        cost_ends = ends * prices.T if len(prices) == 1 else percentile_interval(drawn[1:] * prices[1:], confidence)
        for i, name in enumerate(names):
            # What a pass before training costs was not measured, unless the run makes it.
            has_price = self.candidates[name].reads_gradients == self.candidates[used].reads_gradients
            if has_price and groups[i] >= MIN_GROUPS:
                figures[name] = figures[name]._replace(cost=_with_ends(costs[i], cost_ends[i]))
        return figures

    def _window_sums(self, names: list[str], used: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return `[1 + K, F]` sums over the window and its draws, and of the one in use over the same rollouts."""
        sums, bases = np.zeros((2, 1 + NUM_RESAMPLES, len(names)))
        for row, resampled in zip(self._moments, self._resampled, strict=True):
            if used not in row.sums:
                continue
            order, told = list(row.sums), [name for name in names if name in row.sums]
            places = slice(None) if told == names else [names.index(name) for name in told]
            sums[:, places] += resampled if order == told else resampled[:, [order.index(name) for name in told]]
            bases[:, places] += resampled[:, [order.index(used)]]
        return sums, bases

    def _prices(self, shares: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """Return `[1 + K, F]` seconds of a step and of its draws, by the share of rollouts with greedy rows.

        `[1, F]` where they are known without draws.
        """
        if self.greedy_price is not None or (shares == shares[0]).all():
            return 1 + (self.greedy_price or 0.0) * shares[None]
        if any(len(rows) < 2 for rows in self._seconds.values()):
            return None
        generator = np.random.default_rng(self.number)
        plain, greedy = (_step_seconds(rows, generator) for rows in self._seconds.values())  # [1 + K] each
        added = np.maximum(greedy - plain, 0.0)
        return plain[:, None] + added[:, None] * shares  # [1 + K, F]

    # ---- Checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """Return all that was observed, as tensors, numbers and text."""
        return {
            "number": self.number,
            "moments": [row._asdict() for row in self._moments],
            "seconds": [[list(row) for row in rows] for rows in self._seconds.values()],
            "pending": (self._pending, self._needs, self._num_samples, self._has_greedy),
            "candidates": {name: baseline.state_dict() for name, baseline in self.candidates.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it; candidates that the checkpoint does not have start anew."""
        self.number = int(state["number"])
        self._moments = [_Moments(**row) for row in state["moments"]]
        self._resampled = [row.resampled() for row in self._moments]
        self._seconds = {
            bool(kind): [(int(number), rollout, training) for number, rollout, training in rows]
            for kind, rows in enumerate(state["seconds"])
        }
        self._pending, self._needs, self._num_samples, self._has_greedy = state["pending"]
        for name, baseline in self.candidates.items():
            if name in state["candidates"]:
                baseline.load_state_dict(state["candidates"][name])


def _num_told(rows: Sequence[_Moments], name: str, used: str) -> int:
    """Return in how many groups of prompts responses have an advantage with either of two baselines."""
    pairs = [(row.sums[name], row.sums[used]) for row in rows if name in row.sums]
    return min(sum(int((sums > 0).sum()) for sums in column) for column in zip(*pairs, strict=True))


def _with_ends(value: float, ends: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return a figure as numbers of Python."""
    return float(value), float(ends[0]), float(ends[1])


def _step_seconds(rows: list[tuple[int, float, float]], generator: np.random.Generator) -> NDArray[np.float64]:
    """Return `[1 + K]` the typical seconds of a step, and those of `K` draws of steps.

    Medians, since a checkpoint or another user of the machine makes single steps long. Rollout and training apart, so
    that what greedy responses add is not hidden by steps that train more.
    """
    seconds = np.array([row[1:] for row in rows])  # [M, 2]
    draws = generator.integers(0, len(seconds), (NUM_RESAMPLES, len(seconds)))
    resampled = np.concatenate([seconds[None], seconds[draws]])  # [1 + K, M, 2]
    return np.asarray(np.median(resampled, axis=1).sum(-1))
