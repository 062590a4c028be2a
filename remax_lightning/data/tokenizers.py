"""Load tokenizers, and convert responses to text and back. No other module does, so that all parts agree."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remax_lightning.errors import DataError, UserError

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
    # ---- End-of-sequence token ----
    tokenizer = _from_pretrained(path, trust_remote_code, revision, key)
    if tokenizer.eos_token_id is None and needs_eos:
        raise UserError(
            f"{key}: the tokenizer {path!r} has no end-of-sequence token, so no response could ever end; "
            "save it with an eos_token that the policy was trained with"
        )
    # ---- Pad token ----
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
    tokenizer.padding_side = "left"  # responses begin right behind their prompts
    return tokenizer


def _from_pretrained(path: str, trust_remote_code: bool, revision: str | None, key: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    folder = Path(path).expanduser()
    if path.startswith((".", "/", "~")) and not folder.is_dir():
        raise UserError(f"{key}: there is no folder {path!r}; give a folder with a tokenizer, or a hub name")
    other = ", or set model.tokenizer" if key.startswith("model.") and key != "model.tokenizer" else ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else path, trust_remote_code=trust_remote_code, revision=revision
        )
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{key}: no tokenizer could be loaded from {path!r} ({reason}); give a folder with tokenizer.json "
            f"and tokenizer_config.json, or a hub name that this machine can reach{other}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"{key}: {path!r} holds a {type(tokenizer).__name__}, expected a text tokenizer")
    return tokenizer


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids that `decode(..., skip_special_tokens=True)` leaves out of a text."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    # Added tokens such as <think> may be special without a role (eos, pad, ...), which `all_special_ids` would miss.
    marked = {token_id for token_id, token in added.items() if token.special}
    return frozenset({*getattr(tokenizer, "all_special_ids", ()), *marked})


def hidden_ids(
    tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], *, skip_special_tokens: bool
) -> frozenset[int]:
    """Return the ids that are left out of a response's text.

    Args:
        tokenizer: the policy's.
        eos_ids: ids that end a response.
        skip_special_tokens: True leaves out every special token, False only those that end or pad a response. An
            ordinary token of the vocabulary that ends a response, such as a newline, is text in both cases.
    """
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    special = special_ids(tokenizer)
    # A newline that ends a response is an ordinary token, so it stays.
    ends = frozenset({*eos_ids, tokenizer.pad_token_id}) & {*special, *added}
    return special | ends if skip_special_tokens else ends


def check_characters(text: str, what: str) -> None:
    r"""Refuse half a surrogate pair, which JSON can spell (`"\ud83d"`) and no tokenizer takes.

    Args:
        text: a text of the data set.
        what: where it stands, for messages.

    Raises:
        DataError: if it holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = ascii(text[error.start])[1:-1]
        raise DataError(
            f"{what} holds half a surrogate pair ({character}), which is no text; write the whole character, or remove"
            " it"
        ) from None


def response_texts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    hidden: Collection[int] = (),
) -> list[str]:
    """Return the text of each response, decoded behind its prompt: what prompt and response read less the prompt.

    A response that is decoded alone loses what its tokenizer strips at the start of a text. SentencePiece (Llama 2,
    Mistral) strips a space, so that " 4" would read "4" and the first line of a piece of code would lose its indent.
    Behind a special token it puts a space in front of a text, which is none of the response's and left out.

    Args:
        tokenizer: the policy's.
        prompts: token ids of `B` prompts, without padding.
        responses: token ids of `M = B * k` responses without padding, those of one prompt next to each other.
        hidden: ids that are left out of the responses, see `hidden_ids`.
    """
    if not responses:
        return []
    per_prompt = len(responses) // len(prompts)  # k
    # ---- Decode the prompts, and each prompt with its response ----
    shown = [[token for token in ids if token not in hidden] for ids in responses]
    # Some tokenizers are saved to take the space before a full stop or comma away, which is part of what was written.
    decode = partial(tokenizer.batch_decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    contexts = decode([list(ids) for ids in prompts])
    wholes = decode([[*prompts[i // per_prompt], *ids] for i, ids in enumerate(shown)])
    # ---- Subtract the prompt ----
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    last_ids = {ids[-1] for ids in prompts if len(ids)}
    spaced = {token for token in last_ids if token in added and _puts_space_behind(tokenizer, added[token].content)}
    texts = []
    for i, (whole, ids) in enumerate(zip(wholes, shown, strict=True)):
        context, prompt = contexts[i // per_prompt], prompts[i // per_prompt]
        # A decoder that rewrites the end of the prompt leaves no boundary: the response is then read alone.
        text = whole[len(context) :] if whole.startswith(context) else decode([ids])[0]
        texts.append(text.removeprefix(" ") if len(prompt) and prompt[-1] in spaced else text)
    return texts


def _puts_space_behind(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    """Whether a text right behind a special token gets a space that it has not, as encoding and decoding show."""
    ids = encode_batch(tokenizer, [f"{token}a"])
    return list(tokenizer.batch_decode(ids, skip_special_tokens=False)) == [f"{token} a"]


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str]
) -> list[list[int]]:
    """Return the token ids of each response as they stand behind its prompt; decoded there they read `responses`.

    Most tokenizers write a text in the same tokens wherever it stands. SentencePiece puts a space in front of a text
    that is encoded alone, so that "2+2=" with the response "4" would train "2+2= 4".

    Args:
        tokenizer: the policy's.
        prompts: `M` prompts as the policy reads them.
        responses: `M` responses, without special tokens but those that they spell out.
    """
    # ---- Alone, where "a" behind "a" still reads "a"; SentencePiece encodes it as "_a", which reads " a" there ----
    alone, probe = encode_batch(tokenizer, responses), encode_batch(tokenizer, ["a"])
    if response_texts(tokenizer, probe, probe) == ["a"]:
        return alone
    # ---- Else behind the prompt, cut off at its end ----
    prompt_ids = encode_batch(tokenizer, prompts)
    together = encode_batch(tokenizer, [prompt + response for prompt, response in zip(prompts, responses, strict=True)])
    return [
        # Where a token spans prompt and response there is no boundary to cut at: any other text in front will do.
        whole[len(prompt) :] if whole[: len(prompt)] == prompt else _encode_behind(tokenizer, response, ids)
        for prompt, whole, response, ids in zip(prompt_ids, together, responses, alone, strict=True)
    ]


def _encode_behind(tokenizer: PreTrainedTokenizerBase, response: str, alone: list[int]) -> list[int]:
    """Return the ids of `response` behind a short text whose tokens stay apart from it; `alone` if there is none."""
    for text in ("\n", ".", "a", "1"):
        context, whole = encode_batch(tokenizer, [text, text + response])
        ids = whole[len(context) :]
        if whole[: len(context)] == context and response_texts(tokenizer, [context], [ids]) == [response]:
            return ids
    return alone


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    """Return the token ids of each text, without padding and never cut: lengths are judged by the configuration.

    They are what `tokenizer(texts)` returns. A tokenizer of the tokenizers library is called without the offsets of its
    tokens, which nobody reads here and which take a third of the time.

    Args:
        tokenizer: of transformers.
        texts: as many as there are.
        add_special_tokens: whether the tokenizer puts its special tokens around each text.
    """
    from transformers import PreTrainedTokenizerFast

    if not texts:
        return []
    # A class with an encoding of its own is asked for it.
    if isinstance(tokenizer, PreTrainedTokenizerFast) and _is_plain(type(tokenizer)):
        # Truncation and padding of an earlier call stay set on the backend; then the slower way below resets them.
        backend = tokenizer.backend_tokenizer
        if backend.truncation is None and backend.padding is None and not tokenizer.split_special_tokens:
            backend.encode_special_tokens = False  # "</s>" in a text is the token, as by default
            encodings = backend.encode_batch_fast(list(map(str, texts)), add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in encodings]
    encoded = tokenizer(list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _is_plain(kind: type) -> bool:
    """Whether a tokenizer's class encodes as transformers' own base does."""
    from transformers import PreTrainedTokenizerFast

    names = ("__call__", "_encode_plus", "_batch_encode_plus", "encode", "prepare_for_tokenization")
    return all(getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, None) for name in names)
