"""Measures a language model with lm-evaluation-harness (lm-eval), by the tasks that others publish figures of."""

from __future__ import annotations

import difflib
import logging
import math
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from remax_lightning.errors import UserError, at_least, check_ranges
from remax_lightning.evaluation.intervals import format_number, format_table
from remax_lightning.strategies.stall_watchdog import report_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXTRA = "pip install 'remax-lightning[lm-eval]'"
BOOTSTRAP_DRAWS = 1000
"""For the standard errors of metrics that have no formula for it, such as F1; that of a mean has one."""
SEED = 1234
"""Of the examples in prompts and of sampled responses, lm-eval's own default."""


FewShot: TypeAlias = Annotated[int | None, at_least(0)]
BatchSize: TypeAlias = Annotated[int, at_least(1)]
"""Options of the callback, too."""


@dataclass(frozen=True)
class HarnessOptions:
    """How the tasks are measured.

    Args:
        limit: documents of each task, the first ones: a count, or a share below 1; None takes all.
        num_fewshot: solved examples in each prompt; None takes the task's own number.
        batch_size: requests in one forward pass.
        apply_chat_template: write each prompt as a message of the user.
        confirm_run_unsafe_code: run tasks that execute code which the model has written.
        key: what messages name the options by, such as `lm_eval`.

    Raises:
        UserError: if a value is out of its range.
    """

    limit: float | None = None
    num_fewshot: FewShot = None
    batch_size: BatchSize = 8
    apply_chat_template: bool = False
    confirm_run_unsafe_code: bool = False
    key: str = "lm_eval."

    def __post_init__(self) -> None:
        limit = self.limit
        is_count = limit is not None and limit >= 1 and limit == int(limit)
        if not (limit is None or is_count or 0 < limit < 1):
            raise UserError(f"{self.key}limit must be a count of documents, or a share below 1, got {limit}")
        check_ranges(type(self), vars(self), self.key)


class TaskFigure(NamedTuple):
    """One figure of a task or of a group of tasks.

    Args:
        task: its name.
        metric: the name of the metric, with that of the filter of responses after a slash if there is one.
        value: the figure.
        stderr: its standard error; None where lm-eval has none.
        n: documents that it is made of.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int

    @property
    def log_key(self) -> str:
        """The name in a logger; MLflow takes no other characters than these."""
        return re.sub(r"[^\w\-./ ]", "_", f"lm_eval/{self.task}/{self.metric}")


# ---- Tasks ----


def load_tasks(specs: Sequence[str], key: str) -> Any:
    """Return lm-eval's tasks, with their documents, which are downloaded where they are not on this machine.

    Args:
        specs: names of tasks, groups or tags, or paths of YAML files.
        key: what names them in messages.

    Raises:
        UserError: if lm-eval is not installed, or a task is unknown or cannot be loaded.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        needed = "lm-eval" if str(error.name).startswith("lm_eval") else error.name  # or a package that it needs
        raise UserError(f"{key} needs {needed}; {EXTRA}") from None
    # ---- Names are looked up in an index of some ten thousand files; tasks of a user's own need not wait for it ----
    is_file = [Path(spec).suffix in (".yaml", ".yml") for spec in specs]
    for spec in (spec for spec, named in zip(specs, is_file, strict=True) if named and not Path(spec).is_file()):
        raise UserError(f"{key}: there is no file {spec!r}; give the path of a task's YAML file, or the name of a task")
    with _quiet():
        manager = TaskManager(include_defaults=not all(is_file))
        known = manager.all_tasks
        for spec in (spec for spec, named in zip(specs, is_file, strict=True) if not named and spec not in known):
            close = difflib.get_close_matches(spec, known, n=3)
            tip = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists their names"
            raise UserError(f"{key}: lm-eval has no task {spec!r}; {tip}")
        try:
            return manager.load(list(specs))
        except Exception as error:
            raise UserError(f"{key}: lm-eval cannot load {', '.join(specs)}: {describe(error)}") from error


def describe(error: Exception) -> str:
    """Return the kind of an exception with the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


# ---- Measuring ----


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Any,
    options: HarnessOptions,
    mixed_precision: torch.dtype | None = None,
) -> dict[str, Any]:
    """Return lm-eval's results. Model, tokenizer and random numbers of the process stay as they are.

    Log-probs are computed in float32, whatever the dtype of the logits: in bfloat16 likely answers would tie.

    Args:
        model: a causal language model, whole on this process.
        tokenizer: its tokenizer.
        tasks: of `load_tasks`.
        options: how the tasks are measured.
        mixed_precision: dtype that forward passes compute in; None takes that of the weights.

    Raises:
        UserError: if a task cannot be measured, such as one that runs code.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet(), _unchanged(model), _seeded():
        for task in tasks["tasks"].values():
            _set_fewshot(task, options.num_fewshot)
        # The tokenizer is a copy, because lm-eval sets its padding.
        harness_model = HFLM(
            pretrained=model,
            tokenizer=deepcopy(tokenizer),
            backend="causal",
            batch_size=options.batch_size,
            softmax_dtype=torch.float32,
            mixed_precision_dtype=mixed_precision,
        )
        try:
            results: dict[str, Any] = evaluate(
                lm=harness_model,
                task_dict=tasks,
                limit=options.limit,
                bootstrap_iters=BOOTSTRAP_DRAWS,
                log_samples=False,
                apply_chat_template=options.apply_chat_template,
                confirm_run_unsafe_code=options.confirm_run_unsafe_code,
            )
        except ValueError as error:  # lm-eval's own checks
            raise UserError(f"{options.key}tasks: lm-eval refuses: {describe(error)}") from error
    return results


def _set_fewshot(task: Any, count: int | None) -> None:
    """Set the number of examples as lm-eval's own command does: a task that is made for none keeps 0."""
    own = task.get_config("num_fewshot")
    if count is not None and own != 0:
        task.set_config(key="num_fewshot", value=count)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEED)


@contextmanager
def _quiet() -> Iterator[None]:
    """Show errors of lm-eval only, and have it bootstrap in this process: a fork would copy one that holds a GPU."""
    log, variable = logging.getLogger("lm_eval"), "DISABLE_MULTIPROC"
    level, before = log.level, os.environ.get(variable)
    log.setLevel(logging.ERROR)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        log.setLevel(level)
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """Restore the modes of all layers afterwards; inside, every forward pass is news for the watchdog of the run."""
    modes = {module: module.training for module in model.modules()}
    hook = model.register_forward_pre_hook(lambda *_: report_progress("a forward pass of lm-eval"))
    # lm-eval ties the weights of any model anew; those of a policy are tied, and may be gathered for the moment.
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights
        hook.remove()
        for module, training in modes.items():
            module.training = training


@contextmanager
def _seeded() -> Iterator[None]:
    """Give every measurement the same random numbers; those of the run go on as if there had been none."""
    with isolate_rng():
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        yield


# ---- Figures ----


def task_figures(results: Mapping[str, Any]) -> list[TaskFigure]:
    """Return the figures that are numbers, by task in lm-eval's order."""
    figures = []
    for task, entries in results["results"].items():
        for name, value in entries.items():
            metric, comma, chosen = name.partition(",")  # "exact_match,strict-match"; "acc,none" without a filter
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            stderr = entries.get(f"{metric}_stderr,{chosen}")
            figures.append(
                TaskFigure(
                    task,
                    metric if chosen == "none" else f"{metric}/{chosen}",
                    float(value),
                    float(stderr) if _is_number(stderr) and math.isfinite(float(stderr)) else None,
                    int(entries.get("sample_len", 0)),
                )
            )
    return figures


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)  # numpy's numbers, too


def logged_figures(figures: Sequence[TaskFigure]) -> dict[str, float]:
    """Return the figures and their standard errors by log key."""
    values: dict[str, float] = {}
    for figure in figures:
        values[figure.log_key] = figure.value
        if figure.stderr is not None:
            values[f"{figure.log_key}_stderr"] = figure.stderr
    return values


def format_figures(figures: Sequence[TaskFigure]) -> str:
    """Return the figures as a table with their standard errors."""
    rows = [("task", "metric", "value", "standard error", "n", "")]
    rows += [
        (figure.task, figure.metric, format_number(figure.value), format_number(figure.stderr), str(figure.n), "")
        for figure in figures
    ]
    return format_table(rows)
