"""Stop strings: texts that end a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from remax_lightning.rollout.base import StopCheck

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_string_check(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> StopCheck | None:
    """Return what says whether the last token of a response completes one of the strings; None without strings.

    It is transformers' own check, which looks at token ids only: no text is made while decoding.
    """
    if not strings:
        return None
    from transformers import StopStringCriteria

    criteria: Any = StopStringCriteria(tokenizer, list(strings))

    def ended(ids: Tensor) -> Tensor:
        found: Tensor = criteria(ids, None)
        return found

    return ended
