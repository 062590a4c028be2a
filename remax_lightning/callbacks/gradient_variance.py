"""Monitors how much variance the gradient has with the baseline of the run, and how much it would have with others."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from remax_lightning.baselines import (
    KINDS,
    Auto,
    Baseline,
    BaselineInputs,
    checked_values,
    make_baseline,
)
from remax_lightning.callbacks.monitors import (
    log_step,
    response_baseline,
    response_length,
    response_reward,
    rollout_output,
)
from remax_lightning.distributed import gather_over_ranks
from remax_lightning.errors import UserError
from remax_lightning.evaluation.statistics import percentile_interval, resampled_ratios
from remax_lightning.types import PromptBatch, StepOutput

NUM_RESAMPLES = 300
"""Draws of the bootstrap: enough for the ends of an interval that is looked at, few enough to cost nothing."""
EVERY = 100
"""Optimizer steps between two measurements of what greedy responses cost; each takes two more rollouts."""


class StepScores(NamedTuple):
    """What a step knows of its sampled responses, those of all ranks.

    Args:
        inputs: what baselines read.
        squared_norms: `[S]` of the gradient of `log π(y)` at the logits.
        seconds: of the optimizer step.
        rollout_seconds: of decoding among them.
    """

    inputs: BaselineInputs
    squared_norms: Tensor
    seconds: float
    rollout_seconds: float


class GradientVariance(Callback):
    """Compares baselines by the variance of the gradient that they would give, on the responses of the run itself.

    A response adds `(r - b)² · w` to the second moment of the gradient, with `w = Σ_t |onehot(y_t) - π_t|²` in place of
    the squared norm of its gradient over all weights: the logits are there anyway. Unbiased baselines leave the mean of
    the gradient, so second moments compare variances. `remax baselines` has the norms over all weights.

    Logged, for every baseline that the responses of the run can tell of, over the last `window` steps and divided by
    the baseline in use:

    - `train/gradient_variance/NAME`, and the ends of its 95 % interval, `train/gradient_variance_low/NAME` and
      `_high/NAME` (bootstrap over prompts).
    - `train/variance_seconds/NAME`: the same times the seconds of a step with that baseline, which is the time that a
      gradient of the same precision takes. What greedy responses cost is measured every 100 steps, by decoding
      twice more without them.

    At the end of training one line names the cheapest baseline, if its interval is clear of 1. Nothing is logged
    without a KL, since responses without an advantage are then left out of the training pass.

    Args:
        window: optimizer steps; 50 of 64 prompts give intervals of about 10 %.

    Raises:
        UserError: if `window` is below 1.
    """

    def __init__(self, window: int = 50) -> None:
        super().__init__()
        if window < 1:
            raise UserError(f"gradient_variance.window must be at least 1 (optimizer steps), got {window}")
        self.window = window
        self._clear()

    def _clear(self) -> None:
        self._parts: list[StepOutput] = []
        self._moments: deque[dict[str, Tensor]] = deque(maxlen=self.window)  # [B] per name and step
        self._seconds: deque[tuple[float, float]] = deque(maxlen=self.window)  # of the step, of its rollout
        self._compared: dict[str, Baseline] = {}
        self._plain_share = 1.0  # seconds of a rollout without greedy responses, as a share of one with them
        self._plain_seconds: float | None = None
        self._next_measurement = 2  # the first steps warm up
        self._step_start = 0.0
        self._is_silent = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the state of an earlier fit, and make the baselines that are compared."""
        self._clear()
        objective = getattr(pl_module, "objective", None)
        # `auto` compares them itself; one that reads gradients cannot be told from norms of whole responses.
        if objective is None or isinstance(objective.baseline, Auto) or objective.baseline.reads_gradients:
            self._is_silent = True
            return
        cast(Any, pl_module).reports_squared_norm = True
        # The run's own, with its memory of an earlier part of the run, and all others of the package.
        self._used = _name_of(objective.baseline)
        self._compared = {self._used: copy.deepcopy(objective.baseline)}
        num_samples = cast(Any, pl_module).sampling.num_samples
        for name in KINDS:
            other = make_baseline(cast(Any, name))
            if other.is_unbiased and not other.reads_gradients and other.min_samples <= num_samples:
                self._compared.setdefault(name, other)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock of a step; now and then measure a rollout without greedy responses."""
        if self._is_silent or not isinstance(batch, PromptBatch) or batch.micro_batch_index:
            return
        module: Any = pl_module
        if module.objective.baseline.greedy == "always" and trainer.global_step >= self._next_measurement:
            self._next_measurement = trainer.global_step + EVERY
            self._plain_seconds = _seconds_without_greedy(module, batch)
        self._step_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect a micro-batch; compare baselines at the end of the optimizer step."""
        output = rollout_output(outputs)
        if self._is_silent or output is None or "squared_norm" not in output:
            return
        # Asked of the rollout and not of the responses that were run: all ranks have to decide alike.
        if output["rollout"].reference_log_probs is None:
            self._is_silent = True
            rank_zero_info(
                "gradient_variance compares no baselines: without a KL, responses without an advantage are not run"
            )
            return
        self._parts.append(output)
        if not output["closes_step"]:
            return
        scores = _scores(trainer, self._parts, time.perf_counter() - self._step_start)
        self._parts = []
        self._observe(scores)
        if self._used not in self._compared:
            self._is_silent = True  # nothing to compare with
            return
        if trainer.global_step % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            log_step(pl_module, self._figures())
        self._step_start = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the baseline that would have taken the least time, if that is clear."""
        if not self._moments or self._is_silent:
            return
        figures = self._figures()
        if not figures:  # every reward was its baseline
            return
        costs = {name: figures[f"train/variance_seconds/{name}"] for name in self._moments[-1]}
        best = min(costs, key=lambda name: costs[name])
        factor = costs[best] / max(figures[f"train/gradient_variance/{best}"], 1e-12)
        low, high = (factor * figures[f"train/gradient_variance_{end}/{best}"] for end in ("low", "high"))
        if best != self._used and high < 1:
            rank_zero_warn(
                f"On this run the baseline {best} would have needed {costs[best]:.2f} of the seconds of {self._used}"
                f" for a gradient of the same precision (95 %: {low:.2f} to {high:.2f}, over the last"
                f" {len(self._moments)} steps). See docs/baselines.md."
            )

    # ---- Figures ----

    def _observe(self, scores: StepScores) -> None:
        """Add the second moments of a step, `[B]` for each baseline."""
        inputs, n = scores.inputs, scores.inputs.num_samples
        if self._plain_seconds is not None and scores.rollout_seconds > 0:
            # Of the same prompts, one rollout after the other.
            self._plain_share = min(1.0, self._plain_seconds / scores.rollout_seconds)
            self._plain_seconds = None

        def moments(values: Tensor) -> Tensor:
            return ((inputs.reward - values).square() * scores.squared_norms).view(-1, n).mean(1)  # [B]

        found: dict[str, Tensor] = {}
        for name, baseline in list(self._compared.items()):
            if not _can_value(baseline, inputs):
                # A comparison needs the same steps for all, so what cannot be told of one step is left out.
                del self._compared[name]
                continue
            found[name] = moments(checked_values(baseline, inputs))
            baseline.observe(inputs)
        self._moments.append(found)
        self._seconds.append((scores.seconds, scores.rollout_seconds))

    def _figures(self) -> dict[str, float]:
        """Return what is logged, from the steps of the window."""
        names = [name for name in self._moments[-1] if all(name in step for step in self._moments)]
        columns = torch.stack([torch.cat([step[name] for step in self._moments]) for name in names], 1)  # [P, F]
        base = columns[:, names.index(self._used)]
        if not base.sum() > 0:
            return {}
        denominators = base[:, None].expand_as(columns)
        intervals = percentile_interval(resampled_ratios(columns, denominators, NUM_RESAMPLES, seed=0))
        figures: dict[str, float] = {}
        for name, column, (low, high) in zip(names, columns.unbind(1), intervals.tolist(), strict=True):
            ratio = float(column.sum() / base.sum())
            figures[f"train/gradient_variance/{name}"] = ratio
            figures[f"train/gradient_variance_low/{name}"] = low
            figures[f"train/gradient_variance_high/{name}"] = high
            figures[f"train/variance_seconds/{name}"] = ratio * self._price(name) / self._price(self._used)
        return figures

    def _price(self, name: str) -> float:
        """Return the seconds of a step with a baseline; greedy responses in every rollout cost what was measured."""
        total = sum(seconds for seconds, _ in self._seconds)
        greedy = sum(rollout for _, rollout in self._seconds) * (1 - self._plain_share)
        return total - greedy * (1 - self._compared[name].greedy_share)


def _name_of(baseline: Baseline) -> str:
    return next((name for name, kind in KINDS.items() if type(baseline) is kind), type(baseline).__name__)


def _can_value(baseline: Baseline, inputs: BaselineInputs) -> bool:
    if baseline.remembers_prompts and inputs.prompts is None:
        return False
    return inputs.greedy_reward is not None or not baseline.needs_greedy(inputs.prompts)


def _scores(trainer: Trainer, parts: Sequence[StepOutput], seconds: float) -> StepScores:
    """Return the scores of an optimizer step, from its micro-batches and all ranks."""
    rollouts = [part["rollout"] for part in parts]
    n = rollouts[0].num_samples
    norms = torch.cat([cast(Tensor, part.get("squared_norm")).double().sum(1).cpu() for part in parts])  # [S]
    # ---- One row per response, so that one collective moves all columns ----
    places = [rollout.prompt.indices for rollout in rollouts]
    has_places = all(part is not None for part in places)
    numbers = [float(place) for part in places for place in part or () for _ in range(n)]
    columns = [
        torch.cat([response_reward(part) for part in parts]),
        torch.cat([response_length(part) for part in parts]),
        norms,
        torch.tensor(numbers, dtype=torch.float64) if has_places else torch.zeros_like(norms),
    ]
    if all(rollout.baseline_reward is not None for rollout in rollouts):
        columns.append(torch.cat([cast(Tensor, response_baseline(part)) for part in parts]))
    rows = gather_over_ranks(trainer, torch.stack(columns, 1).flatten()).view(-1, len(columns))
    reward, lengths, squared_norms, prompts, *greedy = rows.unbind(1)
    inputs = BaselineInputs(
        reward=reward,
        num_samples=n,
        greedy_reward=greedy[0][::n] if greedy else None,
        lengths=lengths,
        prompts=[int(place) for place in prompts[::n]] if has_places else None,
    )
    return StepScores(inputs, squared_norms, seconds, sum(part["times"]["rollout"] for part in parts))


def _seconds_without_greedy(module: Any, batch: PromptBatch) -> float:
    """Return the seconds of decoding the batch again, without greedy responses; nothing of it is kept."""
    worker = module.worker
    timer, worker.timer = worker.timer, type(worker.timer)()  # these rollouts are none of the step's
    module.rollouts.free_gradients()  # as the step does before its own
    try:
        # In the precision of the step. The first one allocates, and captures graphs; only the second counts.
        with module.trainer.precision_plugin.train_step_context():
            for _ in range(2):
                worker.timer.pop()
                generator = torch.Generator(module.device).manual_seed(0)
                worker.generate_responses(module.policy, batch, generator, greedy=False)
        return float(worker.timer.pop()["rollout"])
    finally:
        worker.timer = timer
