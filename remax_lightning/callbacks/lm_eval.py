"""Measures the policy in training with the tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from remax_lightning.callbacks.monitors import is_dry_run
from remax_lightning.distributed import broadcast
from remax_lightning.errors import UserError, at_least, check_ranges
from remax_lightning.evaluation import harness
from remax_lightning.strategies import rollout_parameters

_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class LMEval(Callback):
    """Measures the policy with tasks of lm-evaluation-harness, in validations and at the end of training.

    Logs `lm_eval/TASK/METRIC`, and its standard error as `lm_eval/TASK/METRIC_stderr`, so that `export.monitor` and
    `ModelCheckpoint` can choose by it. Needs `pip install 'remax-lightning[lm-eval]'`. Training is the same with and
    without it, bit for bit. Rank 0 measures, under strategies that shard after they have gathered the policy as for a
    rollout. The other ranks wait, at most as long as `model.stall_timeout` and the timeout of the process group allow.

    Args:
        tasks: names of tasks or groups (`hellaswag`, `mmlu`), or paths of YAML files with tasks of your own, which may
            name Python code that then runs; none turns the callback off.
        every_n_steps: optimizer steps between two measurements at least; they are part of validations, the first of
            which is before training. 0 measures in no validation of a fit.
        at_end: measure when training ends, too.
        limit: documents of each task, the first ones: a count, or a share below 1. 100, because a whole task takes
            longer than a validation; null takes all.
        num_fewshot: solved examples in each prompt; null takes the task's own number.
        batch_size: requests in one forward pass.
        apply_chat_template: write each prompt as a message of the user.

    Raises:
        UserError: if a value is out of its range.
    """

    def __init__(
        self,
        tasks: list[str] | None = None,
        every_n_steps: Annotated[int, at_least(0, zero="in no validation")] = 1,
        at_end: bool = True,
        limit: float | None = 100,
        num_fewshot: harness.FewShot = None,
        batch_size: harness.BatchSize = 8,
        apply_chat_template: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(tasks, str):
            raise UserError(f"lm_eval.tasks must be a list of names, got {tasks!r}; write [{tasks}]")
        check_ranges(LMEval.__init__, locals(), "lm_eval")
        self.tasks, self.every_n_steps, self.at_end = list(tasks or ()), every_n_steps, at_end
        self.options = harness.HarnessOptions(limit, num_fewshot, batch_size, apply_chat_template)
        self.figures: list[harness.TaskFigure] = []
        """Those of the latest measurement, on every rank."""
        self._loaded: Any = None  # lm-eval's tasks, on rank 0
        self._last_step: int | None = None  # optimizer step of the latest measurement

    # ---- When to measure ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the tasks, which may be unknown or out of reach, before a model is loaded."""
        if not self._is_on(trainer):
            return
        from lightning.pytorch.strategies import FSDPStrategy

        if isinstance(trainer.strategy, FSDPStrategy):
            raise UserError(
                "lm_eval.tasks must be empty under trainer.strategy: fsdp, whose flat parameters cannot be gathered;"
                " use DDP, DeepSpeed or ReMaxFSDP2Strategy, or measure the exported policy with remax lm-eval"
            )
        problem = ""
        if trainer.is_global_zero and self._loaded is None:
            try:
                self._loaded = harness.load_tasks(self.tasks, "lm_eval.tasks")
            except UserError as error:
                problem = str(error)
        if problem := broadcast(trainer.strategy, problem):
            raise UserError(problem)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure if enough optimizer steps have passed, and in every validation outside of a fit."""
        if not self._is_on(trainer) or trainer.sanity_checking:
            return
        passed = None if self._last_step is None else trainer.global_step - self._last_step
        in_fit = trainer.state.fn == TrainerFn.FITTING
        if not in_fit or (self.every_n_steps > 0 and (passed is None or passed >= self.every_n_steps)):
            pl_module.log_dict(self._measure(trainer, pl_module), batch_size=1)  # the same on every rank

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure."""
        if self._is_on(trainer):
            pl_module.log_dict(self._measure(trainer, pl_module), batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the trained policy, unless its last step was measured, or the process has only seconds left."""
        wanted = self.at_end and self._is_on(trainer) and not trainer.received_sigterm
        if not wanted or self._last_step == trainer.global_step:
            return
        logged = self._measure(trainer, pl_module)
        for logger in trainer.loggers if trainer.is_global_zero and logged else ():
            logger.log_metrics(logged, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the latest measurement."""
        return {"last_step": self._last_step} if self.tasks else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step of the latest measurement."""
        self._last_step = state_dict["last_step"]

    def _is_on(self, trainer: Trainer) -> bool:
        predicts = trainer.state.fn == TrainerFn.PREDICTING
        return bool(self.tasks) and not is_dry_run(trainer) and not predicts

    # ---- Measuring ----

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Return the figures by log key, the same on every rank; none where a measurement in a fit has failed."""
        module = cast("Any", pl_module)
        policy = getattr(module, "policy", None)
        if policy is None or not hasattr(module, "tokenizer"):
            raise UserError(f"lm_eval.tasks must be empty for {type(module).__name__}, which has no policy to measure")
        figures: list[harness.TaskFigure] = []
        problem = ""
        # Under a strategy that shards layer by layer, the other ranks gather the layers that rank 0 runs.
        with torch.no_grad(), rollout_parameters(policy):
            if trainer.is_global_zero:
                try:
                    mixed = _MIXED.get(str(trainer.precision))
                    results = harness.measure(policy, module.tokenizer, self._loaded, self.options, mixed)
                    figures = harness.task_figures(results)
                except Exception as error:
                    problem = str(error) if isinstance(error, UserError) else f"lm_eval: {harness.describe(error)}"
        problem, figures = broadcast(trainer.strategy, (problem, figures))  # the other ranks wait here
        # ---- A fit is worth more than a figure ----
        if problem and trainer.state.fn != TrainerFn.FITTING:
            raise UserError(problem)
        self._last_step = trainer.global_step
        if problem:
            rank_zero_warn(f"{problem}. Training goes on; optimizer step {trainer.global_step} is not measured.")
            return {}
        self.figures = figures
        rank_zero_info(f"lm-eval at optimizer step {trainer.global_step}: {_in_one_line(figures)}")
        return harness.logged_figures(figures)


def _in_one_line(figures: Sequence[harness.TaskFigure]) -> str:
    texts = []
    for figure in figures:
        error = "" if figure.stderr is None else f" ± {figure.stderr:.2g}"
        texts.append(f"{figure.task} {figure.metric} {figure.value:.4g}{error}")
    return ", ".join(texts) or "no figures"
