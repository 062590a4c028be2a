"""What callbacks and data modules of a user put into a checkpoint: it has to come back without running code."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
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
            states[name] = apply_to_collection(states[name], np.generic, lambda number: number.item())
            if (reason := _obstacle(states[name])) is None:
                continue
            del states[name]
            if name not in self._told:
                self._told.add(name)
                rank_zero_warn(
                    f"The state of {name} is left out of checkpoints, and a resumed run starts it anew: it holds"
                    f" {reason}, which could only be read by running code. Let its state_dict() return tensors, numbers"
                    " and text, in lists and dicts."
                )


def _states(checkpoint: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each state that a user may have written: what holds it, and its name there."""
    callbacks = checkpoint.get("callbacks", {})
    yield from ((callbacks, name) for name in callbacks)
    yield from ((checkpoint, name) for name in checkpoint if name not in (*OF_LIGHTNING, "callbacks"))


def _obstacle(state: Any) -> str | None:
    """Return what of a state cannot be read back; None if it can."""
    # Without the numbers of its tensors: a state may hold all weights, averaged.
    light, stream = apply_to_collection(state, Tensor, lambda _: torch.empty(0)), io.BytesIO()
    try:
        save(light, stream)
    except Exception as error:  # pickle raises what the object raises
        return f"what cannot be saved ({type(error).__name__}: {error})"
    stream.seek(0)
    try:
        load(stream, weights_only=True)
    except Exception as error:
        stream.seek(0)
        return refused_code(error, stream) or f"what cannot be read ({type(error).__name__})"
    return None
