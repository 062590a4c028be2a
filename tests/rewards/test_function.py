from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from remax_lightning.errors import UserError
from remax_lightning.rewards import FunctionReward, Reward, checked_scores

PLUGINS = Path(__file__).parents[1] / "plugins"
VERIFIERS = "remax_lightning.rewards.verifiers"


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PLUGINS)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)


def test_a_shipped_function_by_its_dotted_path() -> None:
    reward = FunctionReward(f"{VERIFIERS}.exact_match", {"column": "right"})
    assert reward.score(["", ""], ["a", "b"], [{"right": "a"}, {"right": "a"}]) == [1.0, 0.0]


def test_a_users_function_and_class_by_their_dotted_path(plugins: None) -> None:
    reward = FunctionReward("my_rewards.politeness", {"word": "thanks"})
    assert checked_scores(reward, ["p"] * 2, ["no thanks", "please"], [{}] * 2).reward.tolist() == [1.0, 0.0]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Reward, "reward")
    config = {"class_path": "my_rewards.DigitReward", "init_args": {"scale": 2.0}}
    built = parser.instantiate(parser.parse_object({"reward": config})).reward
    assert checked_scores(built, ["p"], ["12ab"], [{}]).reward.tolist() == [1.0]


def test_a_module_in_the_current_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here_only.py").write_text("def score(prompts, responses, rows):\n    return [7.0] * len(rows)\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    assert FunctionReward("here_only.score").score(["p"], ["r"], [{}]) == [7.0]
    assert sys.path[-1] == str(tmp_path)  # last: it shadows nothing
    FunctionReward("here_only.score")
    assert sys.path.count(str(tmp_path)) == 1


def test_an_error_inside_the_function_names_it(plugins: None) -> None:
    with pytest.raises(UserError, match=r"FunctionReward\(my_rewards.politeness\) raised TypeError"):
        checked_scores(FunctionReward("my_rewards.politeness", {"word": 3}), ["p"], ["r"], [{}])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_such_module.score", "names the module 'no_such_module', and there is none"),
        ("my_rewards.deeper.score", "names the module 'my_rewards.deeper', and there is none"),
        ("my_rewards.rudeness", r"my_rewards.py\) has no 'rudeness'; its functions are: politeness"),
        ("my_rewards.annotations", "expected a function, got 'my_rewards.annotations', a _Feature"),
        ("politeness", "expected a dotted path"),
        ("my_rewards.", "expected a dotted path"),
        ("textwrap.dedent", r"must take \(prompts, responses, rows, ...\), it takes \(text\)"),
    ],
)
def test_a_wrong_path_is_refused_when_constructed(plugins: None, function: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.reward\.init_args\.function: .*{message}"):
        FunctionReward(function)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import not_installed_anywhere", "importing the module 'broken' failed with ModuleNotFoundError"),
        ("1 / 0", "importing the module 'broken' failed with ZeroDivisionError"),
    ],
)
def test_a_module_that_cannot_be_imported_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message):
        FunctionReward("broken.score")


def test_wrong_arguments_are_refused_when_constructed() -> None:
    with pytest.raises(
        UserError, match=r"arguments\.colum: .*no such argument; its arguments are: column, ignore_case"
    ):
        FunctionReward(f"{VERIFIERS}.exact_match", {"colum": "answer"})
    with pytest.raises(UserError, match=r"arguments\.rows: .*no such argument"):
        FunctionReward(f"{VERIFIERS}.exact_match", {"rows": []})
    with pytest.raises(UserError, match=r"arguments\.pattern: .*cannot do without this argument"):
        FunctionReward(f"{VERIFIERS}.regex_format")


def test_open_and_keyword_only_arguments_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shapes.py").write_text(
        "def loose(prompts, responses, rows, **more):\n    return [float(more['x'])]\n"
        "def strict(prompts, responses, rows, *, y):\n    return [float(y)]\n"
        "def star(*all):\n    return [float(len(all))]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert FunctionReward("shapes.loose", {"x": 4}).score([""], [""], [{}]) == [4.0]
    assert FunctionReward("shapes.strict", {"y": 5}).score([""], [""], [{}]) == [5.0]
    assert FunctionReward("shapes.star").score([""], [""], [{}]) == [3.0]
    with pytest.raises(UserError, match=r"arguments\.y"):
        FunctionReward("shapes.strict")


def test_importing_the_rewards_loads_no_model() -> None:
    code = (
        "import sys, remax_lightning.rewards as r; assert r.__all__; "
        "heavy = [m for m in sys.modules if m.startswith(('transformers.models.', 'datasets', 'deepspeed'))]; "
        "assert not heavy, heavy; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
