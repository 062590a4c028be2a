"""Stop strings: texts that end a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from remax_lightning.rollout.base import StopCheck

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_string_check(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> StopCheck | None:
    """Return a check whether the last token of a response completes one of the strings; None without strings.

    It wraps transformers' `StopStringCriteria`, which reads token ids only, so decoding makes no text.
    """
    if not strings:
        return None
    from transformers import StopStringCriteria

    criteria: Any = StopStringCriteria(tokenizer, list(strings))

    def stop_check(ids: Tensor) -> Tensor:
        is_stopped: Tensor = criteria(ids, None)  # [M]
        return is_stopped

    return stop_check
