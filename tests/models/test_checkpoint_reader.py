"""What a checkpoint may hold beside weights. Whole ones, of every strategy: tests/distributed/test_export.py."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from remax_lightning.errors import UserError
from remax_lightning.models.checkpoint_reader import _Metadata, load_torch_file
from remax_lightning.models.zero_reader import _allow_deepspeed_classes


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
        with pytest.raises(UserError, match=rf"looks up '{name}' in a <.*may run any code"):
            read(tmp_path, kind, name)
