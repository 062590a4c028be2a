"""Files and folders that are not there are told before torch is imported, and what may be on the hub is left to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from remax_lightning import cli_keys
from remax_lightning.cli_keys import refuse_wrong_keys
from remax_lightning.cli_paths import ROW_FILES
from remax_lightning.data.reading import BUILDERS
from remax_lightning.data.text_files import COMPRESSED, EXTENSIONS
from remax_lightning.errors import UserError

MODEL: dict[str, Any] = {"policy": "owner/name", "reward": "my_rewards.politeness"}
DATA: dict[str, Any] = {"path": "rows.jsonl"}


def told(folder: Path, *options: str, model: Any = MODEL, data: Any = DATA) -> str:
    """What the command says before torch is imported; empty if it goes on."""
    (folder / "run.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    (folder / "rows.jsonl").touch()
    (folder / "policy").mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(cli_keys, "is_current", lambda: True)  # also while somebody adds a key to the package
        try:
            refuse_wrong_keys(["fit", "--config", "run.yaml", *options])
        except UserError as error:
            return str(error)
    return ""


CLASSIFIER = {"class_path": "ClassifierReward", "init_args": {"path": "./gone"}}
MISSING: dict[str, tuple[dict[str, Any], str]] = {
    "a policy": ({"model": MODEL | {"policy": "./gone"}}, "model.policy.path: there is no folder './gone'"),
    "its group": ({"model": MODEL | {"policy": {"path": "/a/gone"}}}, "model.policy.path: there is no folder '/a/gone"),
    "three parts": ({"model": MODEL | {"policy": "a/b/gone"}}, "model.policy.path: there is no folder 'a/b/gone'"),
    "a similar name": ({"model": MODEL | {"policy": "./polcy"}}, "(did you mean 'policy'?)"),
    "a reference": ({"model": MODEL | {"reference": {"path": "~/gone"}}}, "model.reference.path: there is no folder"),
    "an adapter": (
        {"model": MODEL | {"policy": {"path": "owner/name", "lora": {"path": "./gone"}}}},
        "model.policy.lora.path: there is no folder './gone'",
    ),
    "a reward model": ({"model": MODEL | {"reward": CLASSIFIER}}, "model.reward.init_args.path: there is no folder"),
    "a part of a reward": (
        {"model": MODEL | {"reward": {"class_path": "WeightedReward", "init_args": {"parts": {"a": CLASSIFIER}}}}},
        "model.reward.init_args.parts.a.init_args.path: there is no folder",
    ),
    "rows": ({"data": {"path": "rwos.jsonl"}}, "data.path: there is no file 'rwos.jsonl' (did you mean 'rows.jsonl'?)"),
    "compressed rows": ({"data": {"path": "gone.CSV.gz"}}, "data.path: there is no file 'gone.CSV.gz'; give"),
    "one of several": ({"data": {"path": ["rows.jsonl", "gone.json"]}}, "data.path: there is no file 'gone.json'"),
    "held-out rows": ({"data": DATA | {"val_path": "./gone"}}, "data.val_path: there is no file './gone'"),
    "no folder around": ({"data": {"path": "far/rows.csv"}}, "(there is no folder 'far' either)"),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_not_there_is_told_first(case: str, tmp_path: Path) -> None:
    changes, expected = MISSING[case]
    said = told(tmp_path, **changes)
    assert expected in said
    assert "\n" not in said


def test_wrong_keys_and_missing_files_are_told_together(tmp_path: Path) -> None:
    lines = told(tmp_path, "--model.kl_coeff=1", model=MODEL | {"policy": "./gone"}, data={"path": "gone.csv"})
    keys = {line.split(":")[0].strip() for line in lines.splitlines()}
    assert keys == {"model.kl_coeff", "model.policy.path", "data.path"}


@pytest.mark.parametrize("path", ["gone.ckpt", "./runs/gone"])
def test_a_checkpoint_that_is_not_there_is_told_first(path: str, tmp_path: Path) -> None:
    assert f"ckpt_path: there is no checkpoint {path!r}" in told(tmp_path, "--ckpt_path", path)


@pytest.mark.parametrize(
    "path", ["last", "best", "hpc", "registry:owner/space/name", "https://host/a", "a.ckpt", "b.ckpt"]
)
def test_a_checkpoint_that_there_may_be_is_left_to_the_run(path: str, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").touch()
    (tmp_path / "b.ckpt.replaced").touch()  # such a name is left where a save was interrupted, and restored
    assert told(tmp_path, "--ckpt_path", path) == ""


LEFT: dict[str, tuple[list[str], dict[str, Any]]] = {
    "hub names": ([], {"data": {"path": "openai/gsm8k"}}),
    "a name with a dot": ([], {"model": MODEL | {"policy": "Qwen/Qwen2.5-0.5B"}, "data": {"path": "owner/rows.v2"}}),
    "addresses": ([], {"data": {"path": ["https://host/a/b.jsonl", "hf://datasets/a/b/c.parquet"]}}),
    "a pattern": ([], {"data": {"path": "data/**/part-*.jsonl"}}),
    "what is there": ([], {"model": MODEL | {"policy": "./policy"}, "data": {"path": ["./rows.jsonl", "policy"]}}),
    "the last value": (["--model.policy=./policy", "--data.path=rows.jsonl"], {"model": MODEL | {"policy": "./gone"}}),
    "a path after a text": (["--model.policy.path=./policy"], {"model": MODEL | {"policy": "./gone"}}),
    "a text after a path": (["--model.policy=./policy"], {"model": MODEL | {"policy": {"path": "./gone"}}}),
    "a class of one's own": ([], {"data": {"class_path": "mine.Rows", "init_args": {"path": "gone.csv"}}}),
    "such a class, later": (["--data=mine.Rows"], {"data": {"path": "gone.csv"}}),
    "printed only": (["--print_config"], {"data": {"path": "gone.csv"}}),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_may_be_right_is_left_to_the_run(case: str, tmp_path: Path) -> None:
    options, changes = LEFT[case]
    assert told(tmp_path, *options, **changes) == ""


def test_a_place_that_cannot_be_looked_at_is_left_to_the_run(tmp_path: Path) -> None:
    too_long = f"./{'a' * 5000}"
    assert told(tmp_path, model=MODEL | {"policy": too_long}) == ""


def test_all_endings_of_files_that_can_be_read_are_known() -> None:
    for ending in (*EXTENSIONS, *BUILDERS):
        for compression in ("", *COMPRESSED):
            assert ROW_FILES.search(f"rows{ending}{compression}")
