"""Baselines: what the reward of a sampled response is compared with.

A baseline reads the scores of the rollout batch of all ranks and returns one number per sampled response. It runs once
per rollout, so it may remember earlier ones. Subclass `Baseline` for one of your own, and name the class under
`model.advantage.baseline`; `docs/baselines.md` has an example.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from remax_lightning.baselines.auto import Auto
from remax_lightning.baselines.base import Baseline, BaselineInputs, Measurement, checked_values
from remax_lightning.baselines.comparison import Comparison, Figure
from remax_lightning.baselines.kinds import (
    KINDS,
    BatchMean,
    CachedGreedy,
    CalibratedGreedy,
    Greedy,
    GreedyAndSamples,
    GroupMean,
    LeaveOneOut,
    NoBaseline,
    OptimalConstant,
    OptimalPerToken,
    Shrinkage,
    Tracker,
)
from remax_lightning.errors import UserError

BaselineName: TypeAlias = Literal[
    "greedy",
    "none",
    "batch_mean",
    "group_mean",
    "leave_one_out",
    "optimal_constant",
    "optimal_per_token",
    "shrinkage",
    "greedy_and_samples",
    "calibrated_greedy",
    "cached_greedy",
    "tracker",
    "auto",
]
"""Short names of the baselines, with their defaults."""
BASELINES: dict[str, Callable[[], Baseline]] = {**KINDS, "auto": Auto}
"""Their classes."""


def make_baseline(source: BaselineName | Baseline) -> Baseline:
    """Return a baseline from its short name; of an object a copy, since a configuration may serve several modules.

    Raises:
        UserError: if there is no such baseline.
    """
    if isinstance(source, Baseline):
        return copy.deepcopy(source)
    if source not in BASELINES:
        raise UserError(f"model.advantage.baseline must be one of {', '.join(BASELINES)}, or a class, got {source!r}")
    return BASELINES[source]()


def baseline_name(source: BaselineName | Baseline) -> str:
    """Return what messages call a baseline: its short name, or its class."""
    return source if isinstance(source, str) else type(source).__name__


def baseline_to_dict(source: BaselineName | Baseline) -> str | dict[str, Any]:
    """Return a baseline as text and numbers, for checkpoints: its name, or class and arguments."""
    if isinstance(source, str):
        return source
    kind = type(source)
    arguments = {name: getattr(source, name, None) for name in inspect.signature(kind).parameters}
    plain = {name: value for name, value in arguments.items() if isinstance(value, bool | int | float | str | list)}
    # Of this package the name that YAML has, wherever in it the class stands.
    home = __name__ if kind.__module__.startswith(f"{__name__}.") else kind.__module__
    return {"class_path": f"{home}.{kind.__qualname__}", "init_args": plain}


def baseline_from_dict(values: Mapping[str, Any]) -> Baseline:
    """Return a baseline of this module from what `baseline_to_dict` made of it.

    Raises:
        UserError: if it is of another module: nothing that a checkpoint names is imported.
    """
    path, arguments = str(values.get("class_path")), dict(values.get("init_args") or {})
    for kind in BASELINES.values():
        if path == f"{__name__}.{getattr(kind, '__qualname__', '')}":
            return kind(**arguments)
    raise UserError(
        f"model.advantage.baseline of the checkpoint is {path}, a class of your own: pass"
        " advantage=AdvantageConfig(baseline=...) as an argument"
    )


__all__ = [
    "BASELINES",
    "KINDS",
    "Auto",
    "Baseline",
    "BaselineInputs",
    "BaselineName",
    "BatchMean",
    "CachedGreedy",
    "CalibratedGreedy",
    "Comparison",
    "Figure",
    "Greedy",
    "GreedyAndSamples",
    "GroupMean",
    "LeaveOneOut",
    "Measurement",
    "NoBaseline",
    "OptimalConstant",
    "OptimalPerToken",
    "Shrinkage",
    "Tracker",
    "baseline_from_dict",
    "baseline_name",
    "baseline_to_dict",
    "checked_values",
    "make_baseline",
]
