"""Monitors how much variance the gradient has with the baseline of the run, and how much it would have with others."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from typing import Annotated, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from remax_lightning.baselines import KINDS, Auto, Baseline, BaselineInputs, Comparison, Figure, Measurement
from remax_lightning.callbacks.monitors import (
    log_step,
    response_baseline,
    response_length,
    response_reward,
    rollout_output,
)
from remax_lightning.distributed import gather_over_ranks, max_over_ranks
from remax_lightning.errors import at_least, check_ranges
from remax_lightning.evaluation.statistics import cheapest_baseline
from remax_lightning.types import PromptBatch, StepOutput

FIRST_PRICE, PRICE_EVERY = 40, 200
"""Rollouts before the first measurement of what greedy responses cost, and between two; each decodes once more."""
IDLE_EVERY = 8
"""Without a KL, measured rollouts from one in which all responses are run to the next."""
NEWS = 1 / 8
"""Share of the measured rollouts that must be new for figures to be made again; logging so many costs milliseconds."""


class GradientVariance(Callback):
    """Compares baselines by the variance of the gradient that they would give, on the responses of the run itself.

    A response adds `(r - b)² · w` to the second moment of the gradient, with `w = Σ_t |onehot(y_t) - π_t|²` in place of
    the squared norm of its gradient over all weights: the logits are there anyway. Unbiased baselines leave the mean of
    the gradient, so second moments compare variances. `remax baselines` has the norms over all weights.

    Logged, for every baseline that the responses of the run can tell of, over the last rollouts and divided by the
    baseline in use, each with the ends of its 95 % interval (bootstrap over prompts) under the same name with `_low`
    and `_high`:

    - `train/gradient_variance/NAME`.
    - `train/variance_seconds/NAME`: the same times the seconds of a step with that baseline, which is the time that a
      gradient of the same precision takes.

    The lines of progress, and one at the end of training, name the cheapest, where its interval is clear of 1. With
    `auto` the figures are those that the baseline decides by.

    Figures are logged again once an eighth of the rollouts that they are made of is new.

    Its price: the norms of every `every_n_rollouts`-th rollout. Without a KL, every eighth of these runs responses
    without an advantage once, without gradients. Where every rollout has greedy responses, the prompts of rollout 40
    and of every 200th after it are decoded once more without them, to know what they cost.

    Args:
        window: rollouts that count.
        every_n_rollouts: rollouts from one that is measured to the next; 0 measures none.

    Raises:
        UserError: if `window` is below 1, or `every_n_rollouts` is negative.
    """

    def __init__(
        self,
        window: Annotated[int, at_least(1, note="rollouts")] = 200,
        every_n_rollouts: Annotated[int, at_least(0, zero="off")] = 4,
    ) -> None:
        super().__init__()
        check_ranges(GradientVariance.__init__, locals(), "gradient_variance")
        self.window, self.every_n_rollouts = window, every_n_rollouts
        self._saved: dict[str, Any] = {}
        self._clear()

    def _clear(self) -> None:
        self._comparison: Comparison | None = None  # None where nothing is compared here
        self._auto: Auto | None = None
        self._used = ""
        self._parts: list[StepOutput] = []
        self._rollouts = 0
        self._prices: list[float] = []  # what greedy responses add to a step, as a share of one without them
        self._plain_seconds: float | None = None  # of decoding the prompts of this rollout without them
        self._start = 0.0
        self._num_new = 0  # measured rollouts that the logged figures do not have
        self._shown: dict[str, Figure] = {}  # of `auto`, as logged last

    # ---- The run ----

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the state of an earlier fit, and make the baselines that are compared."""
        self._clear()
        baseline: Baseline | None = getattr(getattr(pl_module, "objective", None), "baseline", None)
        if baseline is None or not self.every_n_rollouts:
            return
        if isinstance(baseline, Auto):
            self._auto = baseline
            return
        module: Any = pl_module
        # The run's own, with its memory of an earlier part of the run, and all others of the package.
        self._used = next((name for name, kind in KINDS.items() if type(baseline) is kind), type(baseline).__name__)
        compared = {self._used: copy.deepcopy(baseline)}
        for name, kind in KINDS.items():
            other = kind()
            # With one sample, the greedy response and the other samples are the greedy response alone.
            is_same = name == "greedy_and_samples" and module.sampling.num_samples == 1
            if other.is_unbiased and not is_same:
                compared.setdefault(name, other)
        self._comparison = Comparison(compared, self.window)
        if self._saved.get("used") == self._used:
            self._comparison.load_state_dict(self._saved["comparison"])
            self._rollouts, self._prices = self._saved["rollouts"], list(self._saved["prices"])
            self._num_new = self._saved.get("new", 0)
            self._comparison.greedy_price = statistics.median(self._prices) if self._prices else None
        self._saved = {}
        module.norm_askers.append(self.needs_norms)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the baseline that would have taken the least time, if that is clear."""
        figures = {} if self._comparison is None else self._comparison.figures(self._used)
        cheapest = cheapest_baseline(_metrics(figures))
        if cheapest is not None and cheapest.high < 1:
            rank_zero_warn(f"On this run the baseline {cheapest}. See docs/baselines.md.")
        askers = getattr(pl_module, "norm_askers", [])
        if self.needs_norms in askers:
            askers.remove(self.needs_norms)

    def state_dict(self) -> dict[str, Any]:
        """Return what was compared so far; the same on every rank."""
        if self._comparison is None:
            return {}
        values = {"used": self._used, "rollouts": self._rollouts, "prices": self._prices, "new": self._num_new}
        return values | {"comparison": self._comparison.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until training starts."""
        self._saved = dict(state_dict)

    # ---- A rollout ----

    def needs_norms(self, *, is_free: bool) -> bool:
        """Whether the rollout that was just made is one that is measured."""
        number, every = self._rollouts - 1, self.every_n_rollouts
        return number % (every if is_free else every * IDLE_EVERY) == 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock of a rollout; now and then measure decoding without greedy responses."""
        if self._comparison is None or not isinstance(batch, PromptBatch) or batch.micro_batch_index:
            return
        module: Any = pl_module
        is_due = self._rollouts >= FIRST_PRICE and (self._rollouts - FIRST_PRICE) % PRICE_EVERY == 0
        self._rollouts += 1
        # An engine that writes ahead has other prompts under way.
        if is_due and module.objective.baseline.greedy == "always" and not module.worker.ahead:
            self._plain_seconds = _seconds_without_greedy(module, batch)
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect a micro-batch; compare baselines once the last one of a rollout is trained on."""
        output = rollout_output(outputs)
        if output is None or (self._comparison is None and self._auto is None):
            return
        if self._comparison is not None:
            self._parts.append(output)
        if not output["closes_step"]:
            return
        # Of several updates on a rollout the last one, since baselines and seconds are those of whole rollouts.
        if self._comparison is not None and batch.micro_batch_index + 1 == batch.num_micro_batches:
            parts, self._parts = self._parts, []
            if len(parts) >= batch.num_micro_batches:  # fewer where the run was resumed in between
                self._compare(trainer, self._comparison, parts)
            if self._comparison is None:
                cast(Any, pl_module).norm_askers.remove(self.needs_norms)
        # ---- Figures of the steps that are logged ----
        if trainer.global_step % max(1, cast(Any, trainer).log_every_n_steps) == 0:
            log_step(pl_module, _metrics(self._new_figures()))

    def _compare(self, trainer: Trainer, comparison: Comparison, parts: Sequence[StepOutput]) -> None:
        """Add a rollout to the comparison."""
        rollouts = [part["rollout"] for part in parts]
        # Rewards of tokens, and parts on scales of their own, have no single number to compare.
        if any(rollout.token_rewards is not None or rollout.normalized_reward is not None for rollout in rollouts):
            self._comparison = None
            return
        norms = [part["squared_norm"] for part in parts if "squared_norm" in part]
        is_measured = len(norms) == len(parts)
        comparison.observe(_inputs(trainer, parts), is_measured=is_measured)
        # ---- Seconds, of the slowest rank ----
        elapsed = time.perf_counter() - self._start
        decoding, scoring = (sum(part["times"][phase] for part in parts) for phase in ("rollout", "reward"))
        plain = decoding if self._plain_seconds is None else self._plain_seconds
        elapsed, decoding, scoring, plain = max_over_ranks(trainer, [elapsed, decoding, scoring, plain])
        if self._plain_seconds is not None:
            # Of the same prompts, one after the other.
            added = max(0.0, decoding - plain)
            self._prices.append(added / max(elapsed - added, 1e-9))
            comparison.greedy_price = statistics.median(self._prices)
            self._plain_seconds = None
        is_whole = sum(len(rollout.reward) for rollout in rollouts) and decoding > 0
        training = elapsed - decoding - scoring if is_whole else None
        rows = _rows_over_ranks(trainer, norms) if is_measured else None  # [S, R]
        comparison.measure(Measurement(rows, decoding + scoring, training))
        self._num_new += is_measured

    def _new_figures(self) -> dict[str, Figure]:
        """Return the figures to log; none where those that were logged last are new enough."""
        if self._auto is not None:
            if self._auto.figures is self._shown:
                return {}
            self._shown = self._auto.figures
            return self._shown
        if self._comparison is None or self._num_new < max(1, NEWS * self._comparison.num_measured):
            return {}
        self._num_new = 0
        return self._comparison.figures(self._used)


def _metrics(figures: dict[str, Figure]) -> dict[str, float]:
    """Return figures by the keys that they are logged under."""
    metrics: dict[str, float] = {}
    for name, figure in figures.items():
        for kind, values in (("gradient_variance", figure.variance), ("variance_seconds", figure.cost)):
            if values is not None:
                ends = zip(("", "_low", "_high"), values, strict=True)
                metrics |= {f"train/{kind}{end}/{name}": value for end, value in ends}
    return metrics


def _inputs(trainer: Trainer, parts: Sequence[StepOutput]) -> BaselineInputs:
    """Return the scores of a rollout, from its micro-batches and all ranks."""
    rollouts = [part["rollout"] for part in parts]
    n = rollouts[0].num_samples
    # ---- One row per response, so that one collective moves all columns ----
    reward = torch.cat([response_reward(part) for part in parts])  # [S]
    places = [rollout.prompt.indices for rollout in rollouts]
    has_places = all(part is not None for part in places)
    numbers = [float(place) for part in places for place in part or () for _ in range(n)]
    columns = [
        reward,
        torch.cat([response_length(part) for part in parts]),
        torch.tensor(numbers, dtype=torch.float64) if has_places else torch.zeros_like(reward),
    ]
    if all(rollout.baseline_reward is not None for rollout in rollouts):
        columns.append(torch.cat([cast(Tensor, response_baseline(part)) for part in parts]))
    rows = gather_over_ranks(trainer, torch.stack(columns, 1).flatten()).view(-1, len(columns))
    reward, lengths, prompts, *greedy = rows.unbind(1)
    return BaselineInputs(
        reward=reward,
        num_samples=n,
        greedy_reward=greedy[0][::n] if greedy else None,
        lengths=lengths,
        prompts=[int(place) for place in prompts[::n]] if has_places else None,
    )


def _rows_over_ranks(trainer: Trainer, parts: Sequence[Tensor]) -> Tensor:
    """Return `[S, R]` the rows of all parts and ranks, 0 where one has fewer columns."""
    width = int(max_over_ranks(trainer, [max(part.shape[1] for part in parts)])[0])
    rows = torch.cat([F.pad(part.double().cpu(), (0, width - part.shape[1])) for part in parts])
    rows = rows.nan_to_num(nan=torch.inf, posinf=torch.inf)  # NaN would be lost between ranks
    return gather_over_ranks(trainer, rows.flatten()).view(-1, width)


def _seconds_without_greedy(module: Any, batch: PromptBatch) -> float:
    """Return the seconds of decoding the batch again, without greedy responses; nothing of it is kept."""
    worker = module.worker
    timer, worker.timer = worker.timer, type(worker.timer)()  # these rollouts are none of the step's
    module.rollouts.free_gradients()  # as the step does before its own
    try:
        # In the precision of the step. On CUDA the first one captures graphs; only the last counts.
        with module.trainer.precision_plugin.train_step_context():
            for _ in range(2 if module.device.type == "cuda" else 1):
                worker.timer.pop()
                generator = torch.Generator(module.device).manual_seed(0)
                worker.generate_responses(module.policy, batch, generator, greedy=False)
        return float(worker.timer.pop()["rollout"])
    finally:
        worker.timer = timer
