"""Constant buffers of a model, such as rotary frequencies, that have to stay in float32 when the weights are cast."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

HALVES = (torch.bfloat16, torch.float16)


class Float32Buffers:
    """Copies of the non-persistent floating-point buffers of a model, in float32.

    transformers creates them in float32 whatever the dtype of the weights. Lightning and DeepSpeed cast them with the
    weights, and rotary frequencies in bfloat16 change the angle of every position: the policy would differ from its
    reference before the first update, and from itself after an export.

    Args:
        model: the model after loading, before a strategy casts it.
    """

    def __init__(self, model: nn.Module) -> None:
        _recompute_rounded(model)
        self._float32_copies = [
            (module, name, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set and buffer.is_floating_point() and not buffer.is_meta
        ]

    def restore(self) -> None:
        """Replace buffers that were cast by the float32 copies, on the current device of the model."""
        for module, name, buffer in self._float32_copies:
            current = module._buffers[name]
            if current is not None and current.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(current.device)


def _recompute_rounded(model: nn.Module) -> None:
    """Let transformers recompute in float32 what it created in 16 bits, as it does under ZeRO-3."""
    make: Any = getattr(model, "_init_weights", None)
    for module in model.modules() if make is not None else ():
        names = module._non_persistent_buffers_set
        rounded = [name for name in names if getattr(module._buffers[name], "dtype", None) in HALVES]
        if rounded and not list(module.parameters(recurse=False)):  # or it would initialize the weights, too
            for name in rounded:
                module._buffers[name] = cast(Tensor, module._buffers[name]).float()
            make(module)
