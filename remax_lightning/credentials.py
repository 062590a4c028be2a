"""Which options hold secrets: loggers, model cards and uploaded folders may be public."""

from __future__ import annotations

import re

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
"""A word of a name: `api`, `key` in `api_key`, `apiKey` and `API-KEY`."""

_ALWAYS = frozenset((
    *("secret", "secrets", "password", "passwords", "passwd", "passphrase", "credential", "credentials"),
    *("authorization", "auth", "bearer", "headers", "signature", "sig", "apikey", "authtoken", "accesstoken"),
))  # fmt: skip
_BEFORE_KEY = frozenset(("api", "access", "account", "private", "auth", "secret", "signing", "encryption"))
_TEXT_TOKENS = frozenset(("pad", "eos", "bos", "unk", "sep", "cls", "mask", "stop", "special", "per"))
"""What is before `token` where that is a piece of a text."""

_NAME = re.compile(r"([\w.-]+)(?=['\"]?\s*[:=])")
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")
_IN_QUERY = re.compile(r"([?&])([\w.-]+)=([^&#\s'\"]+)")


def is_secret(name: str) -> bool:
    """Whether an option's value must not be published, by its name, such as `--model.reward.init_args.api_key`.

    The value of `token_env` is the name of a variable, and that of `prompt_key` the name of a column.
    """
    return any(_is_secret_word([word.lower() for word in _WORD.findall(part)]) for part in name.split("."))


def _is_secret_word(words: list[str]) -> bool:
    if not words or words[-1] == "env":
        return False
    if _ALWAYS & set(words):
        return True
    for before, word in zip(["", *words], words, strict=False):
        if word in ("key", "keys") and (before in _BEFORE_KEY or len(words) == 1):
            return True
    return (words[-1] == "token" and not _TEXT_TOKENS & set(words[-2:-1])) or words == ["tokens"]


def has_secret(text: str) -> bool:
    """Whether a text in YAML or JSON, such as a section of a configuration in braces, names an option with a secret."""
    return any(is_secret(name) for name in _NAME.findall(text))


def hide_credentials(text: str) -> str:
    """Return a text whose addresses have stars in place of `user:password@` and of `?token=...`."""
    text = _IN_ADDRESS.sub("***@", text)
    return _IN_QUERY.sub(lambda found: f"{found[1]}{found[2]}={'***' if is_secret(found[2]) else found[3]}", text)
