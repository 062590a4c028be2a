"""Checksums of checkpoints and exported models: a flipped bit or a truncated file is named before it is loaded.

| what | where its checksums are |
|---|---|
| a file of `torch.save` | in the file: a CRC32 for every tensor, which `torch.save` writes and `torch.load` ignores |
| a folder of DeepSpeed or FSDP2, an exported model | in `checksums.json`: the size and the CRC32 of every file |

CRC32 finds every flipped bit and every burst of up to 32 bits; other damage passes once in four billion cases. It is no
protection against somebody who changes files on purpose. Checking reads each byte once, at about 0.25 s per GB beside
the time of the disk, and a file that this process has checked already is not read again.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from remax_lightning.errors import UserError
from remax_lightning.files import load_json

MANIFEST = "checksums.json"
"""File in a folder with the size and the CRC32 of its other files."""

_CHUNK = 2**20
"""Bytes read at once: large enough for the speed of the disk, small enough for the cache of the processor."""
_WEIGHTS = (".safetensors", ".bin", ".pt")
_checked: set[tuple[str, int, int, int]] = set()
"""Files that this process has found whole: their path, inode, size and time of the last change."""


class Checksum(NamedTuple):
    """Size in bytes and CRC32 of a file."""

    size: int
    crc32: int


# ---- Write ----


def list_files(folder: Path) -> list[str]:
    """Return the files of a folder that a manifest lists, by their path inside with `/`, in order."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return sorted(path.relative_to(folder).as_posix() for path in files)


def compute_checksums(folder: Path, names: Iterable[str]) -> dict[str, Checksum]:
    """Read files of a folder and return their checksums; ranks may share the files among them."""
    return {name: _checksum(folder / name) for name in names}


def write_manifest(folder: Path, checksums: Mapping[str, Checksum]) -> None:
    """Write the checksums of the files of a folder into it."""
    files = {name: {"bytes": item.size, "crc32": f"{item.crc32:08x}"} for name, item in sorted(checksums.items())}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def _checksum(file: Path) -> Checksum:
    buffer, crc, size = bytearray(_CHUNK), 0, 0
    view = memoryview(buffer)  # slices of it copy nothing
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            crc, size = zlib.crc32(view[:count], crc), size + count
    return Checksum(size, crc)


# ---- Check ----


class Damage(NamedTuple):
    """A file that is not what was written, and what differs."""

    file: Path
    what: str

    def error(self, key: str) -> UserError:
        """Return the error for a checkpoint or model that messages call `key`."""
        return UserError(
            f"{key}: {str(self.file)!r} is damaged: {self.what}; give an earlier one, or copy this one again from where"
            " it is whole"
        )


def check_whole(path: Path, key: str) -> None:
    """Refuse a checkpoint with a file that is damaged or incomplete.

    One without checksums, of an earlier version, passes as far as `torch.save` wrote some.

    Args:
        path: a file of `torch.save`, or a checkpoint folder; what does not exist passes.
        key: what messages call it.

    Raises:
        UserError: with the file and what is wrong with it.
    """
    if damage := find_damage(path, unchecked_files(path, key)):
        raise damage.error(key)


def unchecked_files(path: Path, key: str) -> list[str]:
    """Return the files of a checkpoint that have checksums and that this process has not checked, as `list_files` does.

    A checkpoint that is a single file has the empty name.

    Raises:
        UserError: if the manifest is damaged.
    """
    # A file of `torch.save` has its checksums inside, so the manifest is only for folders.
    if path.is_file():
        names = [""]
    elif (path / MANIFEST).is_file():
        names = list(_read_manifest(path, key))
    else:  # a folder of an earlier version
        names = [name for name in list_files(path) if name.endswith(".pt")] if path.is_dir() else []
    return [name for name in names if _identity(path / name) not in _checked]


def find_damage(path: Path, names: Sequence[str]) -> Damage | None:
    """Compare files of a checkpoint with their checksums and return the first that differs.

    Args:
        path: the checkpoint.
        names: some of `unchecked_files`: ranks may share the reading.
    """
    # Files of an earlier version have no entry, and are checked by what `torch.save` wrote into them.
    expected = _read_manifest(path, "") if (path / MANIFEST).is_file() else {}
    for name in names:
        file = path / name if name else path
        # Taken before the file is read: if it changes meanwhile, the next check reads it again.
        identity = _identity(file)
        try:
            what = _compare(file, expected[name]) if name in expected else _check_records(file)
        except OSError as error:
            what = f"it cannot be read ({error.strerror or error})"
        if what:
            return Damage(file, what)
        if identity is not None:
            _checked.add(identity)
    return None


def check_exported(folder: Path, key: str) -> None:
    """Refuse an exported model whose weights are damaged; warn where another file differs, which may be intended.

    A folder without a manifest, such as a published model, passes.

    Raises:
        UserError: with the file and what is wrong with it.
    """
    from lightning.pytorch.utilities import rank_zero_warn  # late: reading a model must not load Lightning

    if not (folder / MANIFEST).is_file():
        return
    for name in unchecked_files(folder, key):
        damage = find_damage(folder, [name])
        if damage is None:
            continue
        if name.endswith(_WEIGHTS):
            raise damage.error(key)
        # Tokenizers and generation settings are edited by hand at times; weights are not.
        rank_zero_warn(
            f"{key}: {damage.file} differs from what was exported ({damage.what}). If you have changed it on purpose,"
            f" remove {folder / MANIFEST}."
        )


def check_stream(stream: IO[bytes], name: str, key: str) -> None:
    """Do what `check_whole` does for a remote file, which is read for it, and set it back to its start."""
    what = _check_records(stream)
    stream.seek(0)
    if what:
        raise Damage(Path(name), what).error(key)


def _compare(file: Path, expected: Checksum) -> str:
    """Return how a file differs from what the manifest says; empty if it does not."""
    if not file.is_file():
        return f"it is missing, but {MANIFEST} beside it lists it"
    if (size := file.stat().st_size) != expected.size:
        return f"it has {size} bytes, and was written with {expected.size}"
    if _checksum(file) != expected:
        return f"its content has changed since it was written (CRC32, by {MANIFEST})"
    return ""


def _check_records(file: Path | IO[bytes]) -> str:
    """Return which tensor of a file of `torch.save` differs from its CRC32; empty if none does.

    What is no zip file, such as one of an old version of torch or a truncated one, is left to `torch.load`.
    """
    if not zipfile.is_zipfile(file):
        return ""
    try:
        with zipfile.ZipFile(file) as archive:
            record = archive.testzip()  # reads every record; the name of the first with another CRC32, or None
    except OSError:
        raise
    except Exception as error:  # damaged tables make zipfile raise nearly anything
        return f"its table of contents cannot be read ({error})"
    return f"its content has changed since it was written (CRC32 of {record})" if record else ""


def _read_manifest(folder: Path, key: str) -> dict[str, Checksum]:
    """Return the manifest of a folder; names that lead out of the folder count as damage, too."""
    file = folder / MANIFEST
    try:
        files = load_json(file.read_text(encoding="utf-8"))["files"]
        checksums = {name: Checksum(int(item["bytes"]), int(item["crc32"], 16)) for name, item in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise Damage(file, f"it is no list of checksums ({type(error).__name__})").error(key) from None
    for name in checksums:
        # A manifest may come from somebody else: it must not make us read other files.
        parts = PurePosixPath(name).parts
        if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name:
            raise Damage(file, f"it lists {name[:50]!r}, which is no file of the folder").error(key)
    return checksums


def _identity(file: Path) -> tuple[str, int, int, int] | None:
    """Return what changes when a file is written again; None if there is none."""
    try:
        status = file.stat()
    except (OSError, ValueError):  # ValueError: a name with a null character
        return None
    return str(file.absolute()), status.st_ino, status.st_size, status.st_mtime_ns
