"""List the tensors in weight files without loading them, and detect from their names which project saved them."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from remax_lightning.errors import UserError
from remax_lightning.json_text import read_json_object

Kind = Literal["transformers", "deepspeed_chat", "openrlhf", "trl_value_head"]

DEEPSPEED_CHAT_BODIES = ("rwtranrsformer", "rwtransformer")
"""DeepSpeed-Chat's names for the transformer: with a typo until 2023-11, correct since."""


class StoredTensor(NamedTuple):
    """A tensor in a weight file.

    Args:
        file: the weight file.
        shape: its size in each dimension.
    """

    file: Path
    shape: tuple[int, ...]


class RewardCheckpoint(NamedTuple):
    """How a reward model was saved.

    Args:
        kind: the format, named by its project.
        head: name of the score head's weight in the files; None where the model's own class knows it.
        renames: patterns of stored names to the names of the transformers classifier.
        bias: name of a bias of the score head that the transformers classifier has no place for.
    """

    kind: Kind
    head: str | None = None
    renames: dict[str, str] = {}  # noqa: RUF012 - never changed
    bias: str | None = None

    def target_name(self, name: str) -> str:
        """Return what the transformers classifier calls a stored tensor."""
        for pattern, target in self.renames.items():
            name = re.sub(pattern, target, name)
        return name


def detect_format(names: dict[str, StoredTensor], config: Any, body: str) -> RewardCheckpoint:
    """Detect the format of a reward model from the names of its tensors.

    Args:
        names: the stored tensors.
        config: its configuration.
        body: what the transformers classifier calls its transformer, such as `model`.
    """
    # ---- DeepSpeed-Chat: "rwtransformer.layers.0...", "v_head.weight" -> "model.layers.0...", "score.weight" ----
    for prefix in DEEPSPEED_CHAT_BODIES:
        if any(name.startswith(f"{prefix}.") for name in names):
            renames = {rf"^{prefix}\.": f"{body}.", r"^v_head\.": "score."}
            return RewardCheckpoint("deepspeed_chat", "v_head.weight", renames)
    # ---- TRL's value head: "v_head.summary.weight", perhaps with a bias, beside the names of the language model ----
    if "v_head.summary.weight" in names:
        bias = "v_head.summary.bias" if "v_head.summary.bias" in names else None
        renames = {r"^v_head\.summary\.weight$": "score.weight"}
        return RewardCheckpoint("trl_value_head", "v_head.summary.weight", renames, bias)
    # ---- OpenRLHF: config.json names the head under `value_head_prefix`; the default was "value_head" ----
    for head in (getattr(config, "value_head_prefix", None), "value_head"):
        if head and f"{head}.weight" in names:
            renames = {} if head == "score" else {rf"^{re.escape(head)}\.": "score."}
            return RewardCheckpoint("openrlhf", f"{head}.weight", renames)
    return RewardCheckpoint("transformers")


def list_tensors(path: str, revision: str | None, allow_pickle: bool) -> dict[str, StoredTensor]:
    """Return the tensors in the weight files of a folder or a repository on the hub, without loading them.

    Safetensors come first, whole or in shards. `.bin` files are opened where that is allowed, by
    `torch.load(weights_only=True)`; where it is not, or there are no weights at all, nothing is returned, and whoever
    loads the model will say so.
    """
    # ---- Whole, then in shards: {"weight_map": {"score.weight": "model-00002-of-00002.safetensors", ...}} ----
    for name in ("model.safetensors", "pytorch_model.bin"):
        if name.endswith(".bin") and not allow_pickle:
            break
        if (single := find_file(path, name, revision)) is not None:
            return _tensors_in(single)
        if (index := find_file(path, f"{name}.index.json", revision)) is not None:
            tensors: dict[str, StoredTensor] = {}
            shards = read_json_object(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise UserError(f"{index}: expected names of files under weight_map; complete the download")
            for shard in sorted(set(shards.values())):
                file = find_file(path, shard, revision)
                if file is None:
                    raise UserError(f"{index}: there is no file {shard!r}, which it names; complete the download")
                tensors |= _tensors_in(file)
            return tensors
    return {}


def find_file(path: str, name: str, revision: str | None) -> Path | None:
    """Return a file of a folder or of a repository on the hub, downloaded, or None where it has no such file."""
    from transformers.utils.hub import cached_file

    # With these three a file that is absent, gated or out of reach is None; else transformers raises an error.
    file = cached_file(
        path,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if file is None else Path(file)


def read_tensor(stored: StoredTensor, name: str) -> Tensor:
    """Return one tensor of a weight file."""
    from safetensors import safe_open

    if stored.file.suffix == ".safetensors":
        with safe_open(stored.file, "pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]
    return _load_pickle(stored.file, "cpu")[name]


def _tensors_in(file: Path) -> dict[str, StoredTensor]:
    from safetensors import safe_open

    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            # the header of the file has the shapes
            names = opened.keys()
            return {name: StoredTensor(file, tuple(opened.get_slice(name).get_shape())) for name in names}
    weights = _load_pickle(file, "meta")  # shapes alone
    return {name: StoredTensor(file, tuple(value.shape)) for name, value in weights.items() if hasattr(value, "shape")}


def _load_pickle(file: Path, device: str) -> dict[str, Tensor]:
    # Mapped into memory, a file is read only where it is looked at; the format before 2020 cannot be.
    weights = torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    if not isinstance(weights, dict):
        raise UserError(f"{file}: expected a dictionary of tensors by name, got a {type(weights).__name__}")
    return weights
