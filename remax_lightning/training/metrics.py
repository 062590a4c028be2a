"""Metrics of training steps and of preference pairs, the step that they are logged at, and loggers that may fail.

Figures by name for the logs, what a baseline learns of a step, predictions as plain dictionaries, scores of held-out
pairs with each pair once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from remax_lightning.baselines import Baseline, Measurement
from remax_lightning.distributed import gather_objects, gather_over_ranks, max_over_ranks
from remax_lightning.files import silence_tensorboard_thread, tolerate_disk_errors
from remax_lightning.functional import bradley_terry_loss
from remax_lightning.run_folder import run_folder
from remax_lightning.training.resume import gather_rank_states
from remax_lightning.types import PreferenceBatch, Responses, Rollout, StepOutput

if TYPE_CHECKING:
    from remax_lightning.functional import TokenStatistics
    from remax_lightning.training.experience import Experience, TrainingPass
    from remax_lightning.training.objective import Objective
    from remax_lightning.training.rollouts import UpdatePlan

Figures: TypeAlias = dict[str, tuple[Tensor, Tensor | None]]
"""By name: values whose mean is logged, and a mask of those that count, or None for all."""


class GlobalStepConnector(_LoggerConnector):
    """Sends metrics to the loggers, with the number of optimizer steps done as their step.

    Lightning logs a training step, and the validation after it, under the number of steps before it. Samples,
    histograms and checkpoints are numbered by the steps done, so one moment would have two numbers.
    """

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Log at `trainer.global_step`, unless the caller or a metric called `step` says another."""
        if metrics and step is None and "step" not in metrics:
            step = self.trainer.global_step
            metrics = {"epoch": torch.tensor(self.trainer.current_epoch), **metrics}
        super().log_metrics(metrics, step)


def log_at_global_step(trainer: Trainer) -> None:
    """Log every figure of a run, of callbacks too, at the optimizer steps done; call this before a run starts."""
    if type(trainer._logger_connector) is _LoggerConnector:
        trainer._logger_connector = GlobalStepConnector(trainer)


class MeanMetrics:
    """Weighted sums by name, gathered over the parts of an optimizer step; one reduction over ranks makes means.

    Largest values are gathered, too, where a step has some; they need a reduction of their own.

    All names share that reduction, in float64. `torchmetrics.MeanMetric` gathers two tensors for each name, in float32.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}

    def add_largest(self, values: dict[str, Tensor]) -> None:
        """Add numbers of which the largest counts."""
        for name, value in values.items():
            self._largest[name] = torch.maximum(self._largest[name], value) if name in self._largest else value

    def add(self, figures: Figures) -> None:
        """Add values, or those under their mask, each with weight 1."""
        for name, (values, mask) in figures.items():
            # Counts of tokens outgrow float32; Apple's GPUs have nothing wider.
            dtype = torch.float32 if values.device.type == "mps" else torch.float64
            weights = torch.ones_like(values, dtype=dtype) if mask is None else mask.to(dtype)
            weighted = values.detach().to(dtype).masked_fill(weights == 0, 0.0)
            pair = torch.stack([weighted.sum(), weights.sum()])  # sum and count
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def means(
        self, reduce: Callable[[Tensor], Tensor], reduce_max: Callable[[Sequence[float]], list[float]] = list
    ) -> dict[str, float]:
        """Return means and largest values by name, and reset.

        Args:
            reduce: sums a tensor over ranks.
            reduce_max: takes the largest of each number over ranks.
        """
        # [names, 2]: one reduction for all figures. Every rank has added the same names.
        names, sums = list(self._sums), torch.stack(list(self._sums.values()))
        self._sums = {}
        total, weight = reduce(sums).unbind(-1)
        means = dict(zip(names, (total / weight.clamp_min(1)).tolist(), strict=True))
        if self._largest:
            largest = reduce_max([float(value) for value in self._largest.values()])
            means |= dict(zip(self._largest, largest, strict=True))
            self._largest = {}
        return means


class StepMetrics(MeanMetrics):
    """The means of training steps."""

    def report(
        self, result: TrainingPass, objective: Objective, times: dict[str, float], *, closes_step: bool
    ) -> StepOutput:
        """Return what callbacks get of a training step, and add its values to the means of the optimizer step.

        Args:
            result: of the pass, or of all passes.
            objective: says which tokens are trained on, and what is compared.
            times: seconds by phase.
            closes_step: whether the optimizer step ends with it.
        """
        rollout, stats = result.experience.rollout, result.statistics
        output = StepOutput(
            loss=result.loss,
            rollout=rollout._replace(reference_hidden=None),  # a callback may keep outputs
            advantages=cast(Tensor, result.experience.advantages),
            kl=result.experience.kl,
            entropy=cast(Tensor, stats.entropy),
            entropy_mask=rollout.sampled.response_mask & result.active[:, None],
            times=times,
            closes_step=closes_step,
        )
        if result.squared_norm is not None:
            output["squared_norm"] = result.squared_norm
        # ---- Sums over micro-batches and all ranks, divided once ----
        values = {**step_values(output), "loss": (result.loss, None)}
        if objective.loss_config.kind == "clipped":
            mask = objective.loss_mask(rollout)
            # A mean already; weighted by its tokens it adds up with those of the other micro-batches.
            values["clip_fraction"] = (result.clip_fraction.expand_as(mask), mask)
        if rollout.engine_log_probs is not None:
            log_probs = stats.log_probs.detach()
            figures, largest = objective.mismatch_values(log_probs, rollout, rollout.engine_log_probs, result.active)
            values |= figures
            self.add_largest(largest)
        if rollout.baseline_reward is None and objective.baseline.greedy == "sometimes":
            # NaN and not a missing key: Lightning would log the last value again.
            values["baseline_reward"] = (rollout.reward.new_full((1,), torch.nan), None)
        self.add(values)
        return output


def step_values(output: StepOutput) -> Figures:
    """Return the values to log of a step, in training and in evaluation."""
    rollout = output["rollout"]
    mask = rollout.sampled.response_mask
    values: Figures = {
        "reward": (rollout.reward, None),
        "advantage": (output["advantages"], mask),
        "entropy": (output["entropy"], output["entropy_mask"]),
        "response_length": (mask.sum(-1).float(), None),
        "truncation_rate": (rollout.sampled.truncated.float(), None),
    }
    if rollout.baseline_reward is not None:
        values["baseline_reward"] = (rollout.baseline_reward, None)
    if output["kl"] is not None:
        values["kl"] = (output["kl"], mask)
    for name, part in rollout.reward_parts.items():
        values[f"reward_part/{name}"] = (part, None)
    return values


def predictions(rollout: Rollout) -> list[dict[str, Any]]:
    """Return one JSON-ready dictionary per sampled response, with the greedy response of its prompt."""
    greedy = cast(Responses, rollout.greedy)
    baseline = cast(Tensor, rollout.baseline_reward).tolist()
    lengths = rollout.sampled.response_mask.sum(-1).tolist()
    rows = []
    for i, reward in enumerate(rollout.reward.tolist()):
        prompt = i // rollout.num_samples
        rows.append(
            {
                "prompt": rollout.prompt.prompts[prompt],
                "response": rollout.sampled.texts[i],
                "reward": reward,
                "greedy_response": greedy.texts[prompt],
                "baseline_reward": baseline[prompt],
                "response_length": lengths[i],
                "truncated": bool(rollout.sampled.truncated[i]),
                "row": rollout.prompt.rows[prompt],
            }
        )
    return rows


class TrainingMeter:
    """Gathers a `Measurement` from the training passes on one rollout, of this rank until it is finished."""

    def __init__(self) -> None:
        self._norms: list[Tensor] | None = None  # [s] of each micro-batch of this rank
        self._rollout_seconds: float | None = None  # None before a rollout
        self._training_seconds: float | None = None
        self._start: float | None = None

    def start(self, rollout_seconds: float) -> None:
        """Start the clock, right behind decoding and scoring, which took `rollout_seconds`."""
        self._norms, self._rollout_seconds, self._training_seconds = None, rollout_seconds, None
        self._start = time.perf_counter()

    def ask(
        self,
        experience: Experience,
        plan: UpdatePlan,
        baseline: Baseline,
        askers: Sequence[Callable[..., bool]],
        statistics: Callable[[Rollout, Tensor, Sequence[Tensor], bool], TokenStatistics],
    ) -> Experience:
        """Return the rollout with the norms that its training passes do not have, if anybody asks for norms.

        Args:
            experience: the rollout.
            plan: of the updates on it.
            baseline: may learn.
            askers: say whether others want the norms.
            statistics: runs the policy over some responses in some passes, and returns squared norms if asked.
        """
        asked = [asks(is_free=plan.has_kl) for asks in askers]
        if baseline.learns_from_training:
            asked.append(baseline.needs_norms(is_free=plan.has_kl))
            self._norms = [] if asked[-1] else None
        if not any(asked):
            return experience
        if plan.has_kl:
            return experience._replace(squared_norm=torch.zeros_like(experience.rollout.sampled.response_mask.float()))
        # Without a KL, training leaves out responses without an advantage, whose norms count all the same.
        idle, passes = experience.idle_responses(plan.num_micro_batches), experience.passes(plan.num_micro_batches)
        before = time.perf_counter()
        with torch.no_grad():
            norms = statistics(experience.rollout, idle, passes, True).squared_norm
        if self._start is not None:  # what measuring takes is no part of a step
            if idle.device.type == "cuda":
                torch.cuda.synchronize(idle.device)
            self._start += time.perf_counter() - before
        return experience._replace(squared_norm=norms)

    def add(self, result: TrainingPass) -> None:
        """Add the squared norms of the next responses of the rollout, if the baseline has asked for them."""
        if self._norms is not None:
            norms = cast(Tensor, result.squared_norm).double().sum(1).cpu()  # [s]
            # NaN would be lost between ranks
            self._norms.append(norms.nan_to_num(nan=torch.inf, posinf=torch.inf))

    def stop(self) -> None:
        """Read the clock; the last reading before the next rollout counts."""
        if self._start is not None:
            self._training_seconds = time.perf_counter() - self._start

    def tell(self, baseline: Baseline, trainer: Trainer) -> None:
        """Let a baseline learn from training on the rollout that is over, the same on every rank."""
        if self._rollout_seconds is None:  # nothing was measured, or by another number of ranks
            return
        norms = None if self._norms is None else gather_over_ranks(trainer, torch.cat(self._norms))  # [ranks * S]
        unknown = self._training_seconds is None
        own = [self._rollout_seconds, self._training_seconds or 0.0, float(unknown)]
        rollout_seconds, training_seconds, is_unknown = max_over_ranks(trainer, own)
        self._norms = self._rollout_seconds = self._training_seconds = self._start = None
        measurement = Measurement(norms, rollout_seconds, None if is_unknown else training_seconds)
        line = baseline.observe_training(measurement)
        if line is not None:
            rank_zero_info(f"step {trainer.global_step}: {line}")

    # ---- Checkpoints ----

    def state_dict(self) -> list[dict[str, Any] | None]:
        """Return what every rank has gathered; a collective. The clock does not run on in a resumed run."""
        self.stop()
        state = {"norms": self._norms, "rollout": self._rollout_seconds, "training": self._training_seconds}
        return gather_rank_states(state)

    def load_state_dict(self, states: list[dict[str, Any] | None] | None, trainer: Trainer) -> None:
        """Restore it; on another number of ranks one measurement is left out."""
        state = states[trainer.global_rank] if states and len(states) == trainer.world_size else None
        state = state or {"norms": None, "rollout": None, "training": None}
        self._norms, self._rollout_seconds = state["norms"], state["rollout"]
        self._training_seconds, self._start = state["training"], None


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
        # The model is as sure as sigmoid(|difference|) that the response with the higher score is the chosen one.
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
        # By index, because a sampler that fills up a rank repeats pairs.
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


RETRY_SECONDS = 60.0
"""How long a TensorBoard writer that failed is left alone: each attempt creates another event file."""


class TolerantMethod:
    """Stands in for a method of a logger: a file that cannot be written is a warning, once for each logger.

    TensorBoard writes in a thread, which ends at its first error and raises that from every later call. A writer that
    failed is dropped, so that the next call opens another one.
    """

    def __init__(self, logger: Logger, method: Callable[..., Any], folder: Path, warned: set[str]) -> None:
        self._logger, self._method, self._folder, self._warned = logger, method, folder, warned

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the method, unless its logger failed a moment ago."""
        logger: Any = self._logger
        # ---- Leave a writer that has just failed alone ----
        if time.monotonic() < vars(logger).get("_retry_at", 0.0):
            return None
        with tolerate_disk_errors(self._folder, self._warned, "Training goes on; the log is tried again."):
            return self._method(*args, **options)
        # ---- It failed: drop the writer, whose thread has ended ----
        if isinstance(logger, TensorBoardLogger):
            logger._experiment = None
            logger._retry_at = time.monotonic() + RETRY_SECONDS
        return None


def tolerate_failing_logs(trainer: Trainer) -> None:
    """Have a run go on where a logger's files cannot be written; a second call changes nothing."""
    folder = run_folder(trainer)
    for logger in trainer.loggers:
        warned: set[str] = set()
        # Every method through which Lightning writes a file of a logger.
        for name in ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize"):
            method = getattr(logger, name)
            if not isinstance(method, TolerantMethod):
                setattr(logger, name, TolerantMethod(logger, method, folder, warned))
    if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        silence_tensorboard_thread()
