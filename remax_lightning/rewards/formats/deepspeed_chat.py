"""The position at which DeepSpeed-Chat's reward models read the score: it depends on pad tokens, not on the mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from remax_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DeepSpeedChatConfig:
    """Settings of DeepSpeed-Chat's training that are not saved with its reward models.

    Args:
        num_padding_at_beginning: pad tokens that every text begins with and that do not end it: 1 for OPT, whose first
            token is the one that it is padded with there. None counts them in what the tokenizer makes of no text.
        pad_token: `eos`, or the text of a token; None takes what tokenizer and configuration agree on. DeepSpeed-Chat
            pads with the end-of-sequence token, and so scores the token before it.
    """

    num_padding_at_beginning: int | None = None
    pad_token: str | None = None


class PadCutoff:
    """Truncates texts after the scored token, the last one before padding; pad tokens at the beginning do not count.

    Args:
        config: what the user said.
        tokenizer: the reward model's.
        model_config: the reward model's configuration.
        key: the configuration key of `config`, for messages.

    Raises:
        UserError: if the pad token is not known.
    """

    def __init__(
        self, config: DeepSpeedChatConfig, tokenizer: PreTrainedTokenizerBase, model_config: Any, key: str
    ) -> None:
        self.key = key
        self.pad_id = _pad_id(config.pad_token, tokenizer, model_config, key)
        if config.num_padding_at_beginning is None:
            # OPT begins every text with </s>, id 2, which DeepSpeed-Chat also pads with: [2] -> 1. Llama: [1] -> 0.
            empty = list(tokenizer("")["input_ids"])
            self.num_padding = next((i for i, token in enumerate(empty) if token != self.pad_id), len(empty))
        else:
            self.num_padding = config.num_padding_at_beginning

    def cut(self, ids: Sequence[int]) -> list[int]:
        """Return the tokens of one text without those behind the scored one.

        Raises:
            UserError: if nothing is left, since the text begins with a pad token that is not expected there.
        """
        # Pad token 2, one at the beginning: [2, 5, 6, 2, 2] -> pads [0, 3, 4], end 3 -> [2, 5, 6]
        pads = [position for position, token in enumerate(ids) if token == self.pad_id]
        end = pads[self.num_padding] if len(pads) > self.num_padding else len(ids)
        if end == 0 and ids:
            raise UserError(
                f"{self.key}.num_padding_at_beginning is {self.num_padding}, but texts begin with pad token"
                f" {self.pad_id}, and nothing is left to score; set it to 1, as for OPT, or correct pad_token"
            )
        return list(ids[:end])


def _pad_id(pad_token: str | None, tokenizer: PreTrainedTokenizerBase, model_config: Any, key: str) -> int:
    # ---- As the user says ----
    text: Any = tokenizer.eos_token if pad_token == "eos" else pad_token
    if text is not None:
        known = tokenizer.get_vocab()
        if text not in known:
            raise UserError(
                f"{key}.pad_token must be eos or a token of the reward model's tokenizer, got {pad_token!r}"
            )
        return known[text]
    # ---- As tokenizer and configuration say, if they agree ----
    named = [token for token in (tokenizer.pad_token_id, model_config.pad_token_id) if isinstance(token, int)]
    if len(set(named)) != 1:
        tokens = " and ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in named) or "neither"
        raise UserError(
            f"{key}.pad_token must say what the reward model was padded with in training, because its score is read"
            f" before that token; tokenizer and configuration say {tokens}. DeepSpeed-Chat takes eos for most models"
        )
    return named[0]
