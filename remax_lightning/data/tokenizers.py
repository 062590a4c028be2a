"""The one place where a tokenizer is loaded, so that data and models agree on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from remax_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(
    path: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    pad_token: str | None = None,
    needs_eos: bool = True,
    key: str = "data.tokenizer",
    pad_key: str = "data.loading.pad_token",
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads on the left and has an end-of-sequence and a pad token.

    Args:
        path: a folder or a hub name.
        trust_remote_code: whether code that comes with the tokenizer may run; off, because it is somebody
            else's code.
        revision: branch, tag or commit on the hub.
        pad_token: `eos` to pad with the end-of-sequence token, or the text of a token of the vocabulary. None
            keeps the tokenizer's own. Padding with the end-of-sequence token is safe here: masks tell the two
            apart.
        needs_eos: whether it must have an end-of-sequence token; a reward model's need not.
        key: configuration key of `path`, for messages.
        pad_key: configuration key of `pad_token`, for messages.

    Raises:
        UserError: if the tokenizer cannot be loaded, or lacks an end-of-sequence or a pad token.
    """
    tokenizer = _from_pretrained(path, trust_remote_code, revision, key)
    if tokenizer.eos_token_id is None and needs_eos:
        raise UserError(
            f"{key}: the tokenizer {path!r} has no end-of-sequence token, so no response could ever end; "
            "save it with an eos_token that the policy was trained with"
        )
    if pad_token == "eos":
        tokenizer.pad_token = tokenizer.eos_token
    elif pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise UserError(
                f"{pad_key} must be 'eos' or a token of the vocabulary of {path!r}, got {pad_token!r}; "
                "a new token would need a larger embedding matrix"
            )
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"{key}: the tokenizer {path!r} has no pad token; save it with one, or set {pad_key}: eos")
    tokenizer.padding_side = "left"
    return tokenizer


def _from_pretrained(path: str, trust_remote_code: bool, revision: str | None, key: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    folder = Path(path).expanduser()
    if path.startswith((".", "/", "~")) and not folder.is_dir():
        raise UserError(f"{key}: there is no folder {path!r}; give a folder with a tokenizer, or a hub name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else path, trust_remote_code=trust_remote_code, revision=revision
        )
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{key}: no tokenizer could be loaded from {path!r} ({reason}); give a folder with tokenizer.json "
            "and tokenizer_config.json, or a hub name that this machine can reach"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"{key}: {path!r} holds a {type(tokenizer).__name__}, expected a text tokenizer")
    return tokenizer
