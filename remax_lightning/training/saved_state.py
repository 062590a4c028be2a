"""What callbacks and data modules of a user put into a checkpoint: it has to come back without running code."""

from __future__ import annotations

import io
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.serialization import load, save

from remax_lightning.models.checkpoint_reader import refused_code

OF_LIGHTNING = ("epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "optimizer_states",
                "lr_schedulers")  # fmt: skip
"""Parts of a checkpoint that no user writes, and without which no run could resume."""


class UnreadableStates:
    """Keeps out of checkpoints what `torch.load(weights_only=True)` would refuse, and the whole file with it."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def leave_out(self, checkpoint: dict[str, Any]) -> None:
        """Remove each state that cannot be read back, with a warning; write NumPy's numbers as Python's.

        Args:
            checkpoint: as Lightning is about to save it; changed in place.
        """
        for states, name in list(_states(checkpoint)):
            states[name], reason = _readable(states[name])
            if reason is None:
                continue
            del states[name]
            if name not in self._told:
                self._told.add(name)
                rank_zero_warn(
                    f"The state of {name} is left out of checkpoints, and a resumed run starts it anew: it holds"
                    f" {reason}. Let its state_dict() return tensors, numbers and text, in lists and dicts."
                )


def _states(checkpoint: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each state that a user may have written: what holds it, and its name there."""
    callbacks = checkpoint.get("callbacks", {})
    yield from ((callbacks, name) for name in callbacks)
    yield from ((checkpoint, name) for name in checkpoint if name not in (*OF_LIGHTNING, "callbacks"))


def _readable(state: Any) -> tuple[Any, str | None]:
    """Return a state with Python's numbers, and what of it cannot be read back; None if all of it can."""
    stream = io.BytesIO()
    try:
        state = _replaced(state, np.generic, lambda number: number.item())
        # Without the numbers of its tensors: a state may hold all weights, averaged.
        save(_replaced(state, Tensor, lambda _: torch.empty(0)), stream)
    except Exception as error:  # pickle raises what the object raises
        return state, f"what cannot be saved ({type(error).__name__}: {error})"
    stream.seek(0)
    try:
        load(stream, weights_only=True)
    except Exception as error:
        stream.seek(0)
        code = refused_code(error, stream)
        unread = f"what cannot be read back ({type(error).__name__})"
        return state, f"{code}, which could only be read by running code" if code else unread
    return state, None


def _replaced(state: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Return a state with the result of `function` for each value of a kind.

    Only in collections that can be read back; any other, such as a frozen dataclass, may not be made anew.
    """
    if isinstance(state, kind):
        return function(state)
    if type(state) in (dict, OrderedDict, Counter):
        pairs = {_replaced(key, kind, function): _replaced(value, kind, function) for key, value in state.items()}
        return type(state)(pairs)
    if type(state) in (list, tuple, set):
        return type(state)(_replaced(item, kind, function) for item in state)
    return state
