from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from remax_lightning.errors import RewardError, UserError
from remax_lightning.rewards import FunctionReward, Reward, WeightedReward, checked_scores
from remax_lightning.types import Conversation, Prompt, Response

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
        ("my_rewards.py", r"expected a dotted path .*; did you mean my_rewards\.my_function\?"),
        ("../a/my_rewards.py:politeness", r"; did you mean my_rewards\.politeness with PYTHONPATH=\.\./a\?"),
        ("textwrap.dedent", r"must take \(prompts, responses, rows, ...\), or .* it takes \(text\)"),
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


def test_a_function_that_takes_its_arguments_apart_leaves_those_of_the_run() -> None:
    row = {"answer": "4"}  # one for the sampled and the greedy response

    def reward(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        return [float(responses.pop(0) == row.pop("answer")) for row in rows]

    assert checked_scores(FunctionReward(reward), ["2+2", "2+2"], ["4", "5"], [row, row]).total.tolist() == [1.0, 0.0]
    assert row == {"answer": "4"}


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


# Styles


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a module with a function `score` and returns the function's path."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, source: str) -> str:
        sys.modules.pop(name, None)  # of another test
        importlib.invalidate_caches()
        (tmp_path / f"{name}.py").write_text(source + "\n")
        return f"{name}.score"

    return write


ROWS = [{"answer": "4", "level": 1}, {"answer": "6", "level": 2}]


def scores(reward: Reward, rows: list[dict[str, Any]] = ROWS, prompts: Any = ("2+2", "3+3")) -> list[float]:
    return checked_scores(reward, prompts, ["4", "5"], rows).reward.tolist()


@pytest.mark.parametrize(
    "source",
    [
        "def score(prompts, completions, answer, **kwargs):\n"
        "    assert kwargs['level'] == [1, 2] and prompts == ['2+2', '3+3'] and 'trainer_state' not in kwargs\n"
        "    return [float(c == a) for c, a in zip(completions, answer)]",
        "def score(completions, answer):\n    return [float(c == a) for c, a in zip(completions, answer)]",
        "def score(completions, answer=None, trainer_state=None, *, absent='x'):\n"
        "    assert absent == 'x'\n    return [float(c == a) for c, a in zip(completions, answer)]",
        "def score(**kwargs):\n    return [float(c == a) for c, a in zip(kwargs['completions'], kwargs['answer'])]",
        "async def score(completions, answer, **_):\n    return [float(c == a) for c, a in zip(completions, answer)]",
        "class Score:\n    async def __call__(self, completions, answer):\n"
        "        return [float(c == a) for c, a in zip(completions, answer)]\nscore = Score()",
        "def score(solution_str, answer=None, ground_truth='4'):\n    return solution_str == '4'",
    ],
)
def test_functions_of_other_trainers_are_told_by_their_parameters(write: Callable[..., str], source: str) -> None:
    assert scores(FunctionReward(write("other_trainer", source))) == [1.0, 0.0]


def test_trl_functions_get_messages_where_the_prompt_is_made_of_messages(write: Callable[..., str]) -> None:
    path = write(
        "with_messages",
        "def score(prompts, completions, **kwargs):\n"
        "    return [len(p[0]['content']) + 10 * (c[0] == {'role': 'assistant', 'content': '4'})"
        " for p, c in zip(prompts, completions)]",
    )
    prompts = [Prompt("<user>abc", Conversation([{"role": "user", "content": "abc"}]))] * 2
    assert scores(FunctionReward(path), prompts=prompts) == [13.0, 3.0]


VERL = "def score(data_source, solution_str, ground_truth, extra_info=None):\n    "


@pytest.mark.parametrize(
    ("source", "rows"),
    [
        (VERL + "return float(solution_str == ground_truth)", [{"data_source": "d", "ground_truth": "4"}] * 2),
        (
            VERL + "return {'score': float(solution_str == ground_truth), 'acc': True}",
            [{"data_source": "d", "reward_model": {"style": "rule", "ground_truth": "4"}}] * 2,
        ),
        (
            "async " + VERL + "return float(solution_str == ground_truth and extra_info['index'] == 7)",
            [{"data_source": "d", "ground_truth": "4", "extra_info": {"index": 7}}] * 2,
        ),
        (
            "def score(data_source, solution_str, ground_truth, extra_info):\n"
            "    assert extra_info == {}\n    return solution_str == ground_truth",
            [{"data_source": "d", "ground_truth": "4"}] * 2,
        ),
        ("def score(solution_str, **more):\n    assert more == {}\n    return solution_str == '4'", [{}, {}]),
    ],
)
def test_verl_functions_are_called_for_each_response(
    write: Callable[..., str], source: str, rows: list[dict[str, Any]]
) -> None:
    assert scores(FunctionReward(write("of_verl", source)), rows) == [1.0, 0.0]


def test_columns_are_renamed_and_arguments_come_first(write: Callable[..., str]) -> None:
    trl = write(
        "renamed",
        "def score(completions, gold, word):\n    return [float(c == g == word) for c, g in zip(completions, gold)]",
    )
    assert scores(FunctionReward(trl, {"word": "4"}, columns={"gold": "answer"})) == [1.0, 0.0]
    verl = write("renamed_too", VERL + "return float(solution_str == ground_truth)")
    reward = FunctionReward(verl, {"data_source": "mine"}, columns={"ground_truth": "right.answer"})
    assert scores(reward, [{"right": {"answer": "4"}}] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            "def score(completions, trainer_state): ...",
            {},
            r"function: .* requires 'trainer_state', which only another",
        ),
        ("def score(solution_str, tokenizer): ...", {}, r"function: .* requires 'tokenizer', which only another"),
        (
            "def score(data_sources, solution_strs, ground_truths, extra_infos=None): ...",
            {},
            r"whole batches, as verl's",
        ),
        ("def score(completions): ...", {"style": "verl"}, r"style: verl calls the function with 'solution_str'"),
        ("def score(solution_str): ...", {"style": "trl"}, r"style: trl calls the function with 'completions'"),
        ("def score(completions): ...", {"style": "remax"}, r"must take \(prompts, responses, rows"),
        ("def score(completions): ...", {"arguments": {"wrd": 1}}, r"arguments\.wrd: .* no such argument"),
        ("def score(completions): ...", {"columns": {"wrd": "x"}}, r"columns\.wrd: .* no such argument"),
        ("def score(prompts, responses, rows): ...", {"columns": {"a": "x"}}, r"columns: .* gets whole rows"),
    ],
)
def test_functions_that_cannot_be_called_are_refused_when_constructed(
    write: Callable[..., str], source: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"^model\.reward\.init_args\..*{message}"):
        FunctionReward(write("refused", source), **options)


@pytest.mark.parametrize(
    "source", ["def score(completions, gold): ...", "def score(solution_str, gold, ground_truth): ..."]
)
def test_a_missing_column_names_parameter_column_and_row(write: Callable[..., str], source: str) -> None:
    name = "gold" if "completions" in source else "ground_truth"
    arguments = {} if name == "gold" else {"gold": 1}
    reward = FunctionReward(write("lacking", source), arguments)
    message = rf"parameter '{name}' from column '{name}', and the row has the columns answer, level; .*columns\.{name}"
    with pytest.raises(UserError, match=r"^train.jsonl, line 2: .*" + message):
        reward.check_rows([{name: 1}, ROWS[1]], ["train.jsonl, line 1", "train.jsonl, line 2"])
    with pytest.raises(UserError, match=r"^the row of the prompt '3\+3': .*" + message):
        scores(reward, [ROWS[0] | {name: 1}, ROWS[1]])


def test_a_dict_without_a_score_shows_the_response(write: Callable[..., str]) -> None:
    with pytest.raises(RewardError, match=r"returned a dict with acc, expected a number, or one under 'score'\n.*2\+2"):
        scores(FunctionReward(write("scoreless", "def score(solution_str):\n    return {'acc': 1}")))


def test_none_means_not_applicable_in_trls_style_only(write: Callable[..., str]) -> None:
    trl = FunctionReward(
        write("partial", "def score(completions):\n    return [2.0 if c == '4' else None for c in completions]")
    )
    with pytest.raises(RewardError, match=r"None at index 1, so it does not apply there.*\n  prompt 1: '3\+3'"):
        scores(trl)
    length = FunctionReward(f"{VERIFIERS}.length_penalty", {"target": 0, "coef": 1.0})
    result = checked_scores(WeightedReward({"some": trl, "length": length}), ["p"] * 2, ["4", "5"], [{}] * 2)
    assert result.reward.tolist() == [1.0, -1.0]
    assert result.parts["some"].tolist() == [2.0, 0.0]
    with pytest.raises(RewardError, match=r"no part scores response 1, a, b returned None\n  prompt 1: '3\+3'"):
        scores(WeightedReward({"a": trl, "b": trl}))
    ours = write("none_of_ours", "def score(prompts, responses, rows):\n    return [1.0, None]")
    verl = write("none_of_verl", "def score(solution_str):\n    return None")
    for path in (ours, verl):
        with pytest.raises(RewardError, match=r"returned None at index"):
            scores(WeightedReward({"a": FunctionReward(path), "b": length}))


def test_a_function_checks_rows_itself(write: Callable[..., str]) -> None:
    source = (
        "def score(prompts, responses, rows, least): ...\n"
        "def check(row, where, least):\n    assert row['n'] >= least, 'too small'\nscore.check_row = check"
    )
    reward = WeightedReward({"checked": FunctionReward(write("checking", source), {"least": 3})})
    reward.check_rows([{"n": 3}], ["a.jsonl, line 1"])
    with pytest.raises(
        RewardError, match=r"part 'checked' .*a.jsonl, line 2: .*check_row raised AssertionError: too small"
    ):
        reward.check_rows([{"n": 3}, {"n": 2}], ["a.jsonl, line 1", "a.jsonl, line 2"])


@pytest.mark.parametrize("source", [
    "def score(prompts, responses, rows):\n    return [[1.0] * len(r.token_ids) for r in responses]",
    "async def score(completions, completion_ids):\n    return [[1.0] * len(ids) for ids in completion_ids]",
    "def score(solution_str):\n    return {'score': [1.0] * len(solution_str.token_ids)}",
])  # fmt: skip
def test_every_style_may_return_a_number_for_each_token(write: Callable[..., str], source: str) -> None:
    responses = [Response("4", None, (5, 2)), Response("5", None, (6, 6, 2))]
    result = checked_scores(FunctionReward(write("tokens", source)), ["p"] * 2, responses, [{}] * 2)
    assert result.reward.tolist() == [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("path", ["my_rewards.py:politeness", "./my_rewards.politeness", "my_rewards:politeness"])
def test_a_path_in_another_form_is_corrected(path: str) -> None:
    with pytest.raises(UserError, match=r"function: expected a dotted path .*; did you mean my_rewards\.politeness\?"):
        FunctionReward(path)


def test_a_class_is_no_function(write: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"a_class\.score is a class, no function; set model\.reward\.class_path to it"):
        FunctionReward(write("a_class", "class score:\n    def __call__(self, prompts, responses, rows): ..."))
    with pytest.raises(UserError, match=r"style: expected one of auto, remax, trl, verl, got 'TRL'"):
        FunctionReward(write("a_style", "def score(completions): ..."), style="TRL")  # type: ignore[arg-type]


def test_sys_exit_in_check_row_is_an_error_of_the_row(write: Callable[..., str]) -> None:
    source = "def score(prompts, responses, rows): ...\ndef check(row, where):\n    raise SystemExit(0)\n"
    source += "score.check_row = check"
    with pytest.raises(RewardError, match=r"a.jsonl, line 1: .*check_row raised SystemExit: 0"):
        FunctionReward(write("exits_early", source)).check_rows([{}], ["a.jsonl, line 1"])


# Coroutines

MEETING = """
import asyncio
arrived = []
async def meet(count):
    arrived.append(1)
    while len(arrived) < count:
        await asyncio.sleep(0.001)
"""


def test_coroutines_run_at_the_same_time(write: Callable[..., str]) -> None:
    path = write(
        "meeting", MEETING + "async def score(solution_str):\n    await asyncio.wait_for(meet(2), 20)\n    return 1.0"
    )
    assert scores(FunctionReward(path)) == [1.0, 1.0]
    path = write(
        "parts_meet",
        MEETING
        + "async def score(completions):\n    await asyncio.wait_for(meet(2), 20)\n    return [1.0] * len(completions)",
    )
    assert scores(WeightedReward({"a": FunctionReward(path), "b": FunctionReward(path)})) == [2.0, 2.0]


def test_coroutines_share_a_loop_and_run_inside_another(write: Callable[..., str]) -> None:
    source = (
        "import asyncio\nloops = set()\nasync def score(prompts, responses, rows):\n"
        "    loops.add(asyncio.get_running_loop())\n    return [1.0] * len(rows)"
    )
    reward = FunctionReward(write("looping", source))

    async def in_a_notebook() -> list[float]:
        return scores(reward)

    assert scores(reward) == asyncio.run(in_a_notebook()) == [1.0, 1.0]
    assert len(sys.modules["looping"].loops) == 1


def test_a_coroutine_that_fails_or_exits_names_the_response(write: Callable[..., str]) -> None:
    for name, line in (("failing", "raise KeyError('x')"), ("exiting", "raise SystemExit(0)")):
        path = write(
            name, f"async def score(solution_str):\n    if solution_str == '5':\n        {line}\n    return 1.0"
        )
        with pytest.raises(
            RewardError,
            match=rf"FunctionReward\({name}.score\) raised .*(KeyError|SystemExit)[^\n]*\n  prompt 1: '3\+3'",
        ):
            scores(FunctionReward(path))
        assert scores(FunctionReward(write(f"{name}_not", "async def score(solution_str):\n    return 1.0"))) == [
            1.0,
            1.0,
        ]


@pytest.mark.parametrize(
    "parameters",
    ["queries, prompts, labels", "query, prompt, label", "responses, prompts, rows", "rows, prompts, responses"],
)
def test_a_function_of_other_lists_is_refused(parameters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenRLHF's takes whole texts first: by position it would score prompts, and nobody would know."""
    (tmp_path / "of_others.py").write_text(f"def score({parameters}, **more):\n    return [1.0] * 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "of_others", raising=False)
    with pytest.raises(UserError, match=rf"of_others\.score takes \({parameters}\), and is passed prompts, responses"):
        FunctionReward("of_others.score")
