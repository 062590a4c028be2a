from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from remax_lightning.loggers.hyperparameters import _plain, _without_secrets, git_state


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_git_state_is_the_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {}
    git(tmp_path, "init", "--quiet")
    assert git_state(tmp_path) == {}  # without a commit
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "--quiet", "-m", "a")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "new").touch()  # not tracked: outputs of runs are no change of the code
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_without_git_there_is_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(Path.cwd()) == {}


def test_secrets_do_not_leave_the_machine() -> None:
    config = {
        "reward": {
            "headers": {"Authorization": "Bearer abc"},
            "url": "https://me:pw@host/x?token=abc&n=1",
            "api_key": "abc",
        },
        "parts": [{"hub_token": "abc", "password": "abc", "OPENAI_API_KEY": "abc"}],
        "tokenizer": "gpt2",
        "max_tokens": 8,
        "key": None,
    }
    assert _without_secrets(config) == {
        "reward": {"headers": "***", "url": "https://***@host/x?token=***&n=1", "api_key": "***"},
        "parts": [{"hub_token": "***", "password": "***", "OPENAI_API_KEY": "***"}],
        "tokenizer": "gpt2",
        "max_tokens": 8,
        "key": None,
    }


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ({"a": (1, Path("x"), None)}, {"a": [1, "x", None]}),
        (Path, "pathlib.Path"),
        (object(), "builtins.object"),
        (test_secrets_do_not_leave_the_machine, f"{__name__}.test_secrets_do_not_leave_the_machine"),
    ],
)
def test_objects_are_told_by_their_class(value: object, plain: object) -> None:
    assert _plain(value) == plain
