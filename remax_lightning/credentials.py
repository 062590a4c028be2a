"""Which options hold secrets: loggers, model cards and uploaded folders may be public."""

from __future__ import annotations

import re

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
"""A word of a name: `api`, `key` in `api_key`, `apiKey` and `API-KEY`."""

_ANYWHERE = re.compile(
    r"secret|passw(or)?d|passphrase|credential|bearer|authorization|signature|(api|access|private|auth)(key|token)"
)
_ALONE = frozenset(("headers", "auth", "sig"))
_TEXT_TOKENS = frozenset((
    *("pad", "eos", "bos", "unk", "sep", "cls", "mask", "stop", "special", "per", "max", "min", "new", "num"),
))  # fmt: skip
"""What is before `token` and `tokens` where those are pieces of a text."""

_NAME = re.compile(r"([\w.-]+)(?=['\"]?\s*[:=])")
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")
_IN_QUERY = re.compile(r"([?&])([\w.-]+)=([^&#\s'\"]+)")
_IN_PARAMETER = re.compile(r"key|token|secret|passw|credential|signature|auth", re.IGNORECASE)
"""What hides a parameter of an address wherever it stands in its name: little is lost with one that is no secret."""


def is_secret(name: str) -> bool:
    """Whether an option's value must not be published, by its name, such as `--model.reward.init_args.api_key`.

    The value of `token_env` is the name of a variable. A name that ends with `key` counts, whatever is before it.
    """
    return any(_is_secret([word.lower() for word in _WORD.findall(part)]) for part in name.split("."))


def _is_secret(words: list[str]) -> bool:
    if not words or words[-1] == "env":
        return False
    if _ANYWHERE.search("".join(words)) or _ALONE & set(words) or words[-1] in ("key", "keys"):
        return True
    return words[-1] in ("token", "tokens") and not _TEXT_TOKENS & set(words[-2:-1])


def has_secret(text: str) -> bool:
    """Whether a text in YAML or JSON, such as a section of a configuration in braces, names an option with a secret."""
    return any(is_secret(name) for name in _NAME.findall(text))


def hide_credentials(text: str) -> str:
    """Return a text whose addresses have stars in place of `user:password@` and of `?token=...`."""

    def shown(found: re.Match[str]) -> str:
        sign, name, value = found.groups()
        return f"{sign}{name}={'***' if is_secret(name) or _IN_PARAMETER.search(name) else value}"

    return _IN_QUERY.sub(shown, _IN_ADDRESS.sub("***@", text))
