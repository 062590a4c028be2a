"""A model's constants, such as rotary frequencies, which a cast of its weights must not round."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

HALVES = (torch.bfloat16, torch.float16)


class Float32Buffers:
    """The floating buffers of a model that no checkpoint holds, as they were made.

    transformers makes them in float32, whatever the weights are in. Lightning and DeepSpeed cast them with the weights,
    and rotary frequencies in bfloat16 give every position another angle: the policy would differ from its reference
    before the first update, and from itself as it is loaded later.

    Args:
        model: as it was loaded.
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
        """Put back those that were cast, on the device where the model is now."""
        for module, name, buffer in self._float32_copies:
            now = module._buffers[name]
            if now is not None and now.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(now.device)


def _recompute_rounded(model: nn.Module) -> None:
    """Have transformers make again in float32 what came out rounded: under ZeRO-3 it makes all in 16 bits."""
    make: Any = getattr(model, "_init_weights", None)
    for module in model.modules() if make is not None else ():
        names = module._non_persistent_buffers_set
        rounded = [name for name in names if getattr(module._buffers[name], "dtype", None) in HALVES]
        if rounded and not list(module.parameters(recurse=False)):  # it would make weights anew, too
            for name in rounded:
                module._buffers[name] = cast(Tensor, module._buffers[name]).float()
            make(module)
