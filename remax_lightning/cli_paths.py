"""Files and folders of a configuration that are not there, found before torch is imported.

What may be a name on the hub is left to the run, which asks the hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from glob import escape, has_magic
from pathlib import Path
from typing import Any

_MODEL = re.compile(
    r"model\.(?:(?:policy|reference|reward_model)(?:(?:\.lora)?\.path)?"
    r"|reward(?:\.init_args\.parts\.[^.]+)?\.init_args\.path)"
)
"""Keys of models: a folder, or a name on the hub."""
_DATA = ("data.path", "data.val_path")
"""Keys of rows: a file, a folder, a pattern, an address, or a name on the hub; or a list of them."""
ROW_FILES = re.compile(
    r"\.(?:jsonl|ndjson|json|csv|tsv|parquet|arrow|txt|xml|h5|hdf5|tar)(?:\.(?:gz|bz2|xz|zst|lz4|zip))?$", re.IGNORECASE
)
"""Endings of files with rows, which no name on the hub has."""


def missing_paths(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each key that names a file or folder which is not there, with what is wrong.

    Args:
        values: the last value of each key, groups among them, of the classes of this package.
    """
    for key, value in values.items():
        if _MODEL.fullmatch(key):
            replaced = key.endswith(".path") and isinstance(values.get(key.removesuffix(".path")), str)
            if not replaced and isinstance(value, str) and _is_place(value) and not _exists(value):
                name = key if key.endswith(".path") else f"{key}.path"  # "model.policy: ./folder" is its path
                yield name, f"there is no folder {value!r}{_similar(value)}; give a folder or a hub name"
        elif key in _DATA:
            for path in value if isinstance(value, list) else [value]:
                is_file = isinstance(path, str) and (_is_place(path) or ROW_FILES.search(path)) and "://" not in path
                if is_file and not has_magic(path) and not _exists(path):
                    yield key, f"there is no file {path!r}{_similar(path)}; give an existing file or a hub name"
        elif key == "ckpt_path" and isinstance(value, str) and _is_missing_checkpoint(value):
            yield key, f"there is no checkpoint {value!r}{_similar(value)}; give the path of a checkpoint, or last"


def _is_missing_checkpoint(path: str) -> bool:
    # "best", "last", "hpc" and "registry:..." are words of Lightning; an interrupted save leaves a name around the path
    if ("/" not in path and not path.endswith(".ckpt")) or "://" in path or path.startswith("registry"):
        return False
    place = Path(path)
    with suppress(OSError, ValueError):
        return not place.exists() and not any(place.parent.glob(f"*{escape(place.name)}*"))
    return False


def _is_place(path: str) -> bool:
    # "name" and "owner/name" may be on the hub
    return "://" not in path and (path.startswith((".", "/", "~")) or path.count("/") > 1)


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # no permission, no home, a null character: the run says what it is
        return True


def _similar(path: str) -> str:
    """Return a hint at a neighbor of a similar name, or at the folder that is missing around it."""
    place = Path(path).expanduser()
    if not place.parent.is_dir():
        return f" (there is no folder {str(place.parent)!r} either)"
    with suppress(OSError):
        close = get_close_matches(place.name, (neighbor.name for neighbor in place.parent.iterdir()), 1, cutoff=0.8)
        return f" (did you mean {str(place.with_name(close[0]))!r}?)" if close else ""
    return ""
