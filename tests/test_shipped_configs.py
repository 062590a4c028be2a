"""`remax configs`, `--config NAME` and `--version`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.cli import in_folder, remax, remax_parser

from remax_lightning import UserError, __version__
from remax_lightning.shipped_configs import config_folder, config_names, config_path, shipped_config

FUNCTION = "remax_lightning.rewards.verifiers.exact_match"


def test_every_shipped_file_has_a_name() -> None:
    assert {f"{name}.yaml" for name in config_names()} == {
        path.relative_to(config_folder()).as_posix() for path in config_folder().rglob("*.yaml")
    }
    assert {"opt1.3b", "presets/verl", "strategies/zero3", "loggers/wandb"} <= set(config_names())


@pytest.mark.slow
def test_a_name_is_read_where_a_file_could_stand(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"model": {"reward": FUNCTION}, "data": {"path": "r.jsonl"}}))
    names = ["--config", "opt1.3b", "--config", "mine.yaml", "--config=presets/verl"]
    with in_folder(tmp_path):
        model = remax_parser().parse_args(["fit", *names]).fit.model.init_args
    assert (
        model.policy.path
        == yaml.safe_load(shipped_config("opt1.3b").read_text())["model"]["init_args"]["policy"]["path"]
    )
    assert (model.sampling.num_samples, model.kl_coef) == (4, 0.001)  # verl's


def test_a_file_comes_before_a_name_and_text_stays_text(tmp_path: Path) -> None:
    with in_folder(tmp_path):
        (tmp_path / "demo").write_text("{}")
        assert config_path("demo") == "demo"
        for text in ("{model: {}}", "model: {}", "a\nb", "missing.yaml", "folder/missing.yml"):
            assert config_path(text) == text


@pytest.mark.parametrize("name", config_names())
def test_its_first_line_says_what_it_is_for(name: str) -> None:
    """`remax configs list` shows that line, and nothing of the next."""
    first = (config_folder() / f"{name}.yaml").read_text().partition("\n")[0]
    assert first.startswith("# ")
    assert first.endswith(".")
    assert len(first) <= 120


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("verl", "did you mean presets/verl?"),
        ("presets/verll", "did you mean presets/verl?"),
        ("xyzzy", "remax configs list shows them"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest(name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="neither a file") as error:
        config_path(name)
    assert str(error.value).endswith(said)
    ended = remax(capsys, "configs", "show", name)
    assert ended.code == 2
    assert ended.err == f"remax: error: {error.value}\n"


def test_the_list_says_what_each_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    ended = remax(capsys, "configs", "list")
    assert ended.code == 0
    assert [line.split()[0] for line in ended.out.splitlines()] == config_names()
    assert all(len(line.split()) > 2 for line in ended.out.splitlines())


def test_one_is_shown_and_copied_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shipped_config("presets/verl").read_text()
    assert remax(capsys, "configs", "show", "presets/verl").out == text
    with in_folder(tmp_path):
        assert remax(capsys, "configs", "copy", "presets/verl").code == 0
        assert remax(capsys, "configs", "copy", "opt1.3b", "mine/big.yaml").code == 0
        again = remax(capsys, "configs", "copy", "presets/verl")
    assert (tmp_path / "verl.yaml").read_text() == text
    assert (tmp_path / "mine" / "big.yaml").exists()
    assert again.code == 2
    assert "is there already" in again.err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert remax(capsys, "--version").out == f"remax-lightning {__version__}\n"
