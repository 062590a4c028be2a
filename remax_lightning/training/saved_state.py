"""What callbacks, data modules and other code of a user put into a checkpoint: it comes back without running code."""

from __future__ import annotations

import io
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.serialization import load, save

from remax_lightning.models.checkpoint_reader import refused_code

OF_LIGHTNING = ("epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "optimizer_states",
                "lr_schedulers")  # fmt: skip
"""Parts of a checkpoint that are not a user's as a whole, and without which no run could resume."""
_NEEDED = {"optimizer_states": "the optimizer", "state_dict": "the module (`get_extra_state`)"}
"""Those of them that a class of a user's own may write to."""


def keep_readable_checkpoints(strategy: Strategy) -> None:
    """Keep out of the checkpoints of a strategy what `torch.load(weights_only=True)` would refuse.

    A strategy is handed a checkpoint when every hook has written to it, that of a subclass of a module last.

    Args:
        strategy: of a trainer that is about to run; a second call changes nothing.
    """
    if not isinstance(strategy.save_checkpoint, _ReadableSave):
        save = _ReadableSave(strategy.save_checkpoint)
        strategy.save_checkpoint = save  # type: ignore[method-assign]


def write_plain_numbers(optimizer: Optimizer) -> None:
    """Write the options of an optimizer that are NumPy's numbers as Python's: DeepSpeed saves optimizers itself."""
    for group in optimizer.param_groups:
        group.update({key: _mapped(value, _number) for key, value in group.items() if key != "params"})


class _ReadableSave:
    """Stands in for `strategy.save_checkpoint`."""

    def __init__(self, save: Callable[..., None]) -> None:
        self._save = save
        self._told: set[str] = set()

    def __call__(self, checkpoint: dict[str, Any], *args: Any, **options: Any) -> None:
        # ---- NumPy's numbers as Python's, in new dicts and lists: a state may be what its owner works with ----
        weights = checkpoint.get("state_dict")
        checkpoint = {key: value if value is weights else _mapped(value, _number) for key, value in checkpoint.items()}
        # ---- What cannot be read is left out ----
        for states, key, name in list(_states(checkpoint)):
            if (reason := _obstacle(states[key])) is None:
                continue
            if isinstance(states, list):
                states[key] = None  # the others keep their places
            else:
                del states[key]
            if name not in self._told:
                self._told.add(name)
                rank_zero_warn(
                    f"The state of {name} is left out of checkpoints, and a resumed run starts it anew: it holds"
                    f" {reason}. Let its state_dict() return tensors, numbers and text, in lists and dicts."
                )
        # ---- What cannot be left out is told at the first checkpoint, and not when a run resumes ----
        for key, name in _NEEDED.items():
            if key not in self._told and (reason := _obstacle(checkpoint.get(key))) is not None:
                rank_zero_warn(
                    f"No run can resume from the checkpoints of this one: the state of {name} holds {reason}. Let it be"
                    " tensors, numbers and text, in lists and dicts. Exported policies are whole."
                )
            self._told.add(key)
        self._save(checkpoint, *args, **options)


def _states(checkpoint: dict[str, Any]) -> Iterator[tuple[Any, Any, str]]:
    """Yield each state that a user may have written: what holds it, its key there, and its name."""
    callbacks = checkpoint.get("callbacks", {})
    yield from ((callbacks, name, name) for name in callbacks)
    yield from ((checkpoint, name, name) for name in checkpoint if name not in (*OF_LIGHTNING, "callbacks"))
    for state in checkpoint.get("lr_schedulers", []):
        yield from _parts_of_schedule(state)
    loaders = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
    if "combined_loader" in loaders:
        yield loaders, "combined_loader", "the data loader"


def _parts_of_schedule(state: dict[str, Any]) -> Iterator[tuple[Any, Any, str]]:
    """Yield the attributes of a schedule: one that is left out stays as the resumed run makes it."""
    for key, value in state.items():
        if key == "_schedulers":  # SequentialLR and ChainedScheduler
            for part in value:
                yield from _parts_of_schedule(part)
        elif key == "lr_lambdas":  # LambdaLR: None, or the attributes of an object that is called
            yield from ((value, index, f"the schedule's {key}") for index in range(len(value)))
        else:
            yield state, key, f"the schedule's {key}"


def _mapped(state: Any, change: Callable[[Any], Any]) -> Any:
    """Return a state with what is in its dicts, lists and tuples changed.

    Only in collections that can be read back; any other, such as a frozen dataclass, may not be made anew.
    """
    if type(state) in (dict, OrderedDict, Counter):
        return type(state)({change(key): _mapped(value, change) for key, value in state.items()})
    if type(state) in (list, tuple, set):
        return type(state)(_mapped(value, change) for value in state)
    return change(state)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _obstacle(state: Any) -> str | None:
    """Return what of a state cannot be read back; None if it can."""
    # Without the numbers of its tensors: a state may hold all weights, averaged.
    empty, stream = torch.empty(0), io.BytesIO()
    light = _mapped(state, lambda value: empty if isinstance(value, Tensor) else value)
    try:
        save(light, stream)
    except Exception as error:  # pickle raises what the object raises
        return f"what cannot be saved ({type(error).__name__}: {error})"
    stream.seek(0)
    try:
        load(stream, weights_only=True)
    except Exception as error:
        stream.seek(0)
        if code := refused_code(error, stream):
            return f"{code}, which could only be read by running code"
        return f"what cannot be read back ({type(error).__name__})"
    return None
