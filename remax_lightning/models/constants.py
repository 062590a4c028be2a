"""A model's constants, such as rotary frequencies, which a cast of its weights must not round."""

from __future__ import annotations

from torch import nn


class Constants:
    """The floating buffers of a model that no checkpoint holds, as they were made.

    transformers makes them in float32, whatever the weights are in. Lightning and DeepSpeed cast them with the weights,
    and rotary frequencies in bfloat16 give every position another angle: the policy would differ from its reference
    before the first update, and from itself as it is loaded later.

    Args:
        model: as it was loaded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            (module, name, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set and buffer.is_floating_point() and not buffer.is_meta
        ]

    def restore(self) -> None:
        """Put back those that were cast, on the device where the model is now."""
        for module, name, kept in self._kept:
            now = module._buffers[name]
            if now is not None and now.dtype != kept.dtype:
                module._buffers[name] = kept.to(now.device)
