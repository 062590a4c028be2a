"""What the values of Lightning's and torch's keys must be, which take a wrong value in silence, or refuse it late.

Nothing here needs torch or jsonargparse, so a value out of its range is told before they are imported. The classes of
this package have the ranges in their annotations (`errors.Range`).
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from fnmatch import translate
from string import Formatter
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a value must be.

    Attributes:
        keys: patterns of the key, as in the YAML without `init_args` of model and data.
        expected: what is right, in words.
        holds: whether a value is right; null is not asked.
    """

    keys: tuple[str, ...]
    expected: str
    holds: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(low: int, high: float = float("inf")) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _from(low: float, high: float = float("inf")) -> Callable[[Any], bool]:
    return lambda value: _number(value) and low <= value <= high


def _share_or_count(value: Any) -> bool:
    if isinstance(value, float):
        return 0 <= value <= 1 or (value > 1 and value.is_integer())
    return _whole(0)(value)


def _interval(value: Any) -> bool:
    """Whether Lightning can count by it: batches, a share of an epoch, or a duration."""
    if isinstance(value, float):
        return 0 < value <= 1
    return _whole(1)(value) or isinstance(value, str | Mapping | Namespace)


def _duration(value: Any) -> bool:
    if isinstance(value, str):
        return _DURATION.fullmatch(value) is not None
    if isinstance(value, Mapping | Namespace):
        parts = value if isinstance(value, Mapping) else vars(value)
        return all(name in _UNITS and _from(0)(number) for name, number in parts.items())
    return True


def _devices(value: Any) -> bool:
    if isinstance(value, str):
        if value.strip() in ("auto", "-1"):
            return True
        # "2" is a number of devices; "2,", "0,1" are indices
        parts = [part.strip() for part in value.strip().strip(",").split(",")]
        if not all(part.isdecimal() for part in parts):
            return False
        return int(parts[0]) >= 1 if "," not in value else len(set(parts)) == len(parts)
    if isinstance(value, Sequence):
        return bool(value) and all(_whole(0)(index) for index in value) and len(set(value)) == len(value)
    return value == -1 or _whole(1)(value)


def _pair_below_one(value: Any) -> bool:
    return isinstance(value, Sequence) and all(_number(beta) and 0 <= beta < 1 for beta in value)


def _file_name(value: Any) -> bool:
    """Whether the fields of a name are figures, whole numbers or others, in a form that Python writes."""
    try:
        forms = [form or "" for _, field, form, _ in Formatter().parse(str(value)) if field is not None]
    except ValueError:
        return False
    return all(any(_can_write(number, form) for number in (1, 1.0)) for form in forms)


def _can_write(number: float, form: str) -> bool:
    try:
        return bool(format(number, form))
    except ValueError:
        return False


_DURATION = re.compile(r"\d+:\d\d?:\d\d?:\d\d?")
_UNITS = ("weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds")
_OPTIMIZER = "*.optimizer.init_args."
_SCHEDULER = "*.lr_scheduler.init_args."
_CALLBACK = "trainer.callbacks.*.init_args."

RULES = (
    # the trainer
    Rule(("seed_everything",), "a whole number from 0 to 4294967295, true or false",
         lambda value: isinstance(value, bool) or _whole(0, 2**32 - 1)(value)),
    Rule(("trainer.accumulate_grad_batches", "trainer.num_nodes", "trainer.check_val_every_n_epoch"),
         "a whole number from 1", _whole(1)),
    Rule(("trainer.devices",), "auto, -1 (all), a number from 1, or indices such as [0, 1]", _devices),
    Rule(("trainer.strategy",), "a strategy whose processes are commands of their own, such as ddp",
         lambda value: not isinstance(value, str) or not re.search("spawn|fork|notebook", value)),
    Rule(("trainer.strategy.init_args.stage",), "a stage of ZeRO from 0 to 3", _whole(0, 3)),
    Rule(("trainer.max_epochs", "trainer.max_steps"), "-1 (no limit), or a whole number from 0", _whole(-1)),
    Rule(("trainer.num_sanity_val_steps",), "-1 (all), or a whole number from 0", _whole(-1)),
    Rule(("trainer.min_epochs", "trainer.min_steps", "trainer.reload_dataloaders_every_n_epochs",
          "trainer.log_every_n_steps"), "a whole number from 0", _whole(0)),
    Rule(("trainer.limit_*_batches", "trainer.overfit_batches"),
         "a share from 0.0 to 1.0, or a whole number of batches from 0", _share_or_count),
    Rule(("trainer.val_check_interval",),
         "a share above 0.0 up to 1.0, a whole number of batches from 1, or a duration", _interval),
    Rule(("trainer.gradient_clip_val",), "a number from 0 (no clipping)", _from(0)),
    Rule(("trainer.gradient_clip_algorithm",), "norm or value", lambda value: value in ("norm", "value")),
    Rule(("trainer.max_time",), "a duration DD:HH:MM:SS, or {days: ..., hours: ..., minutes: ..., seconds: ...}",
         _duration),
    Rule(("trainer.barebones",), "false, since a run logs and saves (turn off trainer.logger,"
         " trainer.enable_checkpointing, trainer.enable_progress_bar or trainer.enable_model_summary instead)",
         lambda value: value is not True),
    # optimizers and schedulers of torch and transformers
    Rule((f"{_OPTIMIZER}lr", f"{_OPTIMIZER}weight_decay", f"{_OPTIMIZER}eps", f"{_OPTIMIZER}momentum",
          f"{_OPTIMIZER}lambd", f"{_OPTIMIZER}alpha", f"{_OPTIMIZER}lr_decay"), "a number from 0",
         lambda value: not _number(value) or _from(0)(value)),  # Adafactor's eps is a pair
    Rule((f"{_OPTIMIZER}betas",), "numbers from 0 to below 1", _pair_below_one),
    Rule((f"{_SCHEDULER}warmup_steps", f"{_SCHEDULER}last_epoch", f"{_SCHEDULER}num_warmup_steps",
          f"{_SCHEDULER}patience", f"{_SCHEDULER}cooldown"), "a whole number from 0", _whole(-1)),
    Rule((f"{_SCHEDULER}total_steps", f"{_SCHEDULER}total_iters", f"{_SCHEDULER}T_max", f"{_SCHEDULER}T_0",
          f"{_SCHEDULER}step_size"), "a whole number from 1", _whole(1)),
    Rule((f"{_SCHEDULER}gamma", f"{_SCHEDULER}eta_min"), "a number from 0", _from(0)),
    Rule((f"{_SCHEDULER}factor", f"{_SCHEDULER}start_factor", f"{_SCHEDULER}end_factor"),
         "a number from 0 to 1", _from(0, 1)),
    # callbacks of Lightning
    Rule(("trainer.callbacks.*.class_path",),
         "a callback that searches for no batch size (`remax plan` computes the memory) and no learning rate (compare"
         " runs of several)",
         lambda value: not str(value).endswith((".BatchSizeFinder", ".LearningRateFinder"))),
    Rule((f"{_CALLBACK}filename",), "a name with figures in braces, such as {step} or {val/reward:.2f}", _file_name),
    Rule((f"{_CALLBACK}save_top_k",), "-1 (all), or a whole number from 0", _whole(-1)),
    Rule((f"{_CALLBACK}every_n_train_steps", f"{_CALLBACK}every_n_epochs", f"{_CALLBACK}patience",
          f"{_CALLBACK}refresh_rate"), "a whole number from 0", _whole(0)),
)  # fmt: skip
"""What Lightning and torch do not check at once."""


_BY_PATTERN = [(re.compile("|".join(map(translate, rule.keys))), rule) for rule in RULES]


def explain_rule(key: str, value: Any) -> str | None:
    """Return what is wrong with the value of a key by the first rule that it breaks; None if it keeps all.

    Args:
        key: as in the YAML, without `init_args` of model and data.
        value: null is not asked.
    """
    if value is None:
        return None
    for pattern, rule in _BY_PATTERN:
        if pattern.match(key) and not rule.holds(value):
            return f"expected {rule.expected}, got {value}"
    return None
