"""What a checkpoint may hold beside weights. Whole ones, of every strategy: tests/distributed/test_export.py."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from helpers.payloads import RunsCode, fsdp2_folder, lightning_file, reaches_code, zero_folder
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from remax_lightning.errors import UserError
from remax_lightning.models.checkpoint_reader import inspect_checkpoint, load_torch_file, read_weights
from remax_lightning.models.shard_reader import _allow_deepspeed_classes, _Metadata


class LookedUp:
    """Is written as Python before 3.11.4 writes the member of an enumeration."""

    def __init__(self, kind: Any, name: str) -> None:
        self.kind, self.name = kind, name

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, str]]:
        return getattr, (self.kind, self.name)


def through_a_file(folder: Path, kind: Any, name: str) -> Any:
    torch.save({"it": LookedUp(kind, name)}, folder / "file.pt")
    return load_torch_file(folder / "file.pt", trusted=False, known=_allow_deepspeed_classes())["it"]


def through_a_table(_: Path, kind: Any, name: str) -> Any:
    return _Metadata(io.BytesIO(pickle.dumps(LookedUp(kind, name), protocol=2))).load()


READERS = [(through_a_file, ZeroStageEnum.gradients), (through_a_table, _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT)]


@pytest.mark.parametrize(("read", "member"), READERS)
def test_members_of_enumerations_that_an_older_python_wrote(read: Any, member: Any, tmp_path: Path) -> None:
    assert read(tmp_path, type(member), member.name) is member


@pytest.mark.parametrize(("read", "member"), READERS)
def test_nothing_else_is_looked_up(read: Any, member: Any, tmp_path: Path) -> None:
    for kind, name in ((type(member), "__init_subclass__"), (torch.Size, "numel")):
        with pytest.raises((UserError, pickle.UnpicklingError), match=rf"getattr\({kind.__name__},{name}\)"):
            read(tmp_path, kind, name)


FORMATS: dict[str, Callable[[Path, Any], None]] = {
    "zip": lambda file, payload: torch.save(payload, file),
    "zip of a later pickle": lambda file, payload: torch.save(payload, file, pickle_protocol=4),
    "before zip": lambda file, payload: torch.save(payload, file, _use_new_zipfile_serialization=False),
    "pickle": lambda file, payload: file.write_bytes(pickle.dumps(payload, protocol=2)),
    "a later pickle": lambda file, payload: file.write_bytes(pickle.dumps(payload, protocol=5)),
}
KINDS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "one process": (lambda path: lightning_file(path), [""]),
    "ZeRO-2": (
        lambda path: zero_folder(path, 2),
        ["checkpoint/mp_rank_00_model_states.pt", "checkpoint/zero_pp_rank_1_mp_rank_00_optim_states.pt"],
    ),
    "ZeRO-3": (
        lambda path: zero_folder(path, 3),
        [
            f"checkpoint/zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
            for rank in (0, 1)
            for kind in ("model", "optim")
        ],
    ),
    "FSDP2": (lambda path: fsdp2_folder(path), ["meta.pt", ".metadata"]),
}
FILES = [(kind, name) for kind, (_, names) in KINDS.items() for name in names]


def no_advice(message: str) -> bool:
    """Whether nothing asks the user to turn the limit off."""
    return not any(word in message for word in ("weights_only", "add_safe_globals", "Re-running"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_checkpoint_is_described(kind: str, tmp_path: Path) -> None:
    info = inspect_checkpoint(KINDS[kind][0](tmp_path / "a.ckpt"))
    assert info.step == 3
    assert info.shapes == {"policy.a": torch.Size([4 if "ZeRO" in kind else 2])}
    assert [names for names, _ in info.optimizer_groups] == ([] if kind == "one process" else [{"lr"}])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("kind", "name"), FILES)
def test_code_in_any_file_is_named_and_not_run(kind: str, name: str, form: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", KINDS[kind][0](tmp_path / "a.ckpt")
    FORMATS[form](tmp_path / "evil", {"state_dict": {}, "callbacks": RunsCode(mark)})
    (tmp_path / "evil").replace(path / name if name else path)
    with pytest.raises(UserError) as error:
        inspect_checkpoint(path)
    assert not mark.exists()
    said = str(error.value)
    assert said.startswith(f"ckpt_path: '{path / name if name else path}'")
    assert no_advice(said)
    # torch's own file inside of .metadata is no pickle of metadata at all
    if name != ".metadata" or form in ("pickle", "a later pickle"):
        assert "the file holds code (posix.system), which is not run" in said


def test_code_among_the_numbers_of_a_shard_is_not_run(tmp_path: Path) -> None:
    """torch unpickles these without a limit."""
    mark = tmp_path / "mark"
    path = fsdp2_folder(tmp_path / "a.ckpt", setting=RunsCode(mark))
    mark.unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"__0_0\.distcp': the file holds code \(posix\.system\)"):
        inspect_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint", "metadata.os.system"),
        ("torch", "os.system"),
        ("pathlib", "os.system"),
    ],
)
def test_code_is_not_reached_through_a_harmless_module(module: str, name: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", fsdp2_folder(tmp_path / "a.ckpt")
    pickled = reaches_code(mark, module, name)
    (path / ".metadata").write_bytes(pickled)
    for read in (inspect_checkpoint, lambda path: read_weights(path, "policy.")):
        with pytest.raises(UserError, match=rf"the file holds code \({module}.{name}\), which is not run"):
            read(path)
    (tmp_path / "b.ckpt").write_bytes(pickled)
    with pytest.raises(UserError):
        inspect_checkpoint(tmp_path / "b.ckpt")
    assert not mark.exists()


@pytest.mark.parametrize(("kind", "name"), FILES)
@pytest.mark.parametrize("keep", [0, 1, 60, 0.5, 0.97, None])
def test_half_of_a_checkpoint_is_named_in_one_line(keep: float | None, kind: str, name: str, tmp_path: Path) -> None:
    path = KINDS[kind][0](tmp_path / "a.ckpt")
    file = path / name if name else path
    data = file.read_bytes()
    if keep is None:
        file.unlink()
    else:
        file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError) as error:
        inspect_checkpoint(path)
    assert str(error.value).startswith("ckpt_path: ")
    assert "a.ckpt" in str(error.value)
    assert "\n" not in str(error.value)
    assert no_advice(str(error.value))


@pytest.mark.parametrize("seed", range(20))
def test_a_changed_pickle_is_read_or_refused(seed: int, tmp_path: Path) -> None:
    """Whatever a flipped byte makes of the pickle, no other exception gets out."""
    kind, name = FILES[seed % len(FILES)]
    path = KINDS[kind][0](tmp_path / "a.ckpt")
    file = path / name if name else path
    data = bytearray(file.read_bytes())
    for place in torch.randint(0, min(len(data), 1500), (4,), generator=torch.Generator().manual_seed(seed)).tolist():
        data[place] ^= 1 << seed % 8
    file.write_bytes(bytes(data))
    with suppress(UserError):
        inspect_checkpoint(path)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(("kind", "name"), FILES)
def test_any_flipped_bit_is_read_or_named(kind: str, name: str, tmp_path: Path) -> None:
    """A pickle may stay readable and lose an attribute, a name or a length, which only its use shows."""
    path = KINDS[kind][0](tmp_path / "a.ckpt")
    file = path / name if name else path
    whole = file.read_bytes()
    generator = torch.Generator().manual_seed(len(whole))
    for place, bit in zip(
        torch.randint(0, len(whole), (60,), generator=generator).tolist(),
        torch.randint(0, 8, (60,), generator=generator).tolist(),
        strict=True,
    ):
        data = bytearray(whole)
        data[place] ^= 1 << bit
        file.write_bytes(bytes(data))
        for read in (inspect_checkpoint, lambda path: read_weights(path, "policy.")):
            with suppress(UserError):
                read(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda file: torch.save({"weight": torch.ones(2)}, file), "no checkpoint of a run: it has no state_dict"),
        (lambda file: torch.save([1, 2], file), "holds a list"),
        (lambda file: torch.jit.script(torch.nn.Linear(1, 1)).save(str(file)), "cannot be read"),
        (lambda file: file.write_text("hello"), "cannot be read"),
        (lambda file: file.mkdir(), "neither a .ckpt file nor a folder"),
        (lambda file: None, "does not exist"),
    ],
)
def test_what_is_no_checkpoint_is_named(make: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    make(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=rf"ckpt_path: '.*a\.ckpt'.*{said}") as error:
        inspect_checkpoint(tmp_path / "a.ckpt")
    assert no_advice(str(error.value))


def test_the_checkpoints_in_a_runs_folder_are_named(tmp_path: Path) -> None:
    last = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    for folder in (tmp_path, tmp_path / "version_0", last.parent):
        for read in (inspect_checkpoint, lambda path: read_weights(path, "policy.")):
            with pytest.raises(UserError, match=rf"{folder}' is neither .*; give one in it: {last}$"):
                read(folder)


@pytest.mark.parametrize("tag", ["..", "../other", "/tmp", "", "a/b"])
def test_latest_names_a_folder_of_the_checkpoint(tag: str, tmp_path: Path) -> None:
    path = zero_folder(tmp_path / "a.ckpt", 2)
    (path / "latest").write_text(tag)
    with pytest.raises(UserError, match="it names no folder of the checkpoint"):
        inspect_checkpoint(path)
