"""A reward with a deadline: what hangs, exits or crashes in the child process, and what else it must not change."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.children import forked_children
from helpers.waiting import LONG, wait_until

import remax_lightning
from remax_lightning.errors import RewardError, UserError
from remax_lightning.rewards import FunctionReward, Reward, TimedReward, WeightedReward, checked_scores, child_process
from remax_lightning.rewards import timed as timed_rewards
from remax_lightning.rewards.child_process import CallTimeoutError, Child, Target
from remax_lightning.types import Response

pytestmark = pytest.mark.slow(3)  # it starts processes

SOURCE = """
import ctypes, os, re, subprocess, sys, time; import torch; from remax_lightning.rewards import Reward, Scores
calls = 0

def judge(responses):
    for response in responses:
        if response == "loop":
            while True:
                try:
                    time.sleep(1)
                except BaseException:
                    pass
        if response == "backtracks":
            re.search(r"(a+)+$", "a" * 60 + "b")
        if response == "computes":
            9 ** 9 ** 9
        if response == "starts another":
            other = subprocess.Popen(["sleep", "600"])
            open(os.environ["OTHER"], "w").write(str(other.pid))
            other.wait()
        if response == "exits":
            sys.exit(0)
        if response == "leaves":
            os._exit(0)
        if response == "crashes":
            ctypes.string_at(0)
        if response == "raises":
            raise KeyError("no such unit")
    return [float(len(response)) for response in responses]

def score(prompts, responses, rows):
    return judge(responses)

def counts(prompts, responses, rows):
    global calls
    calls += 1
    return [calls + 0.0 * value for value in judge(responses)]

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return judge([solution_str])[0]

async def ask(data_source, solution_str, ground_truth, extra_info=None):
    return judge([solution_str])[0]

class Parts(Reward):
    def __init__(self, hang=""):
        self.hang, self.device = hang, torch.device("meta")

    def load(self, device):
        self.device = device

    def score(self, prompts, responses, rows):
        while self.hang in responses:
            time.sleep(0.1)
        values = torch.tensor([float(len(text)) for text in responses], device=self.device)
        return Scores(values, {"half": values / 2})

def check_row(row, where):
    judge([row["text"]])
    if row["text"] == "wrong":
        raise ValueError("wrong")

def checks(prompts, responses, rows):
    return judge(responses)

checks.check_row = check_row

class Checks(Parts):
    def check_prompts(self, prompts):
        judge(prompts)

def tokens(prompts, responses, rows):
    judge(responses)
    return [[0.5] * len(response.token_ids) for response in responses]

def path_of(_):
    import remax_lightning
    return lambda _: [__file__, remax_lightning.__file__]

def completions(completions, **columns):
    return [None if completion == "skip" else 1.0 for completion in completions]
"""


@pytest.fixture(scope="module", autouse=True)
def judges(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A user's module, on the path for this file."""
    folder = tmp_path_factory.mktemp("judges")
    (folder / "judges.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("judges", None)


ROW = {"data_source": "d", "ground_truth": "4"}


def scores(reward: Reward, *responses: str) -> list[float]:
    return checked_scores(reward, ["p"] * len(responses), responses, [ROW] * len(responses)).reward.tolist()


@pytest.fixture
def started() -> None:
    """For tests whose children are started as in a run; those of the others, of which many are killed, are forks."""


@pytest.fixture(autouse=True)
def _forks(request: pytest.FixtureRequest) -> Iterator[None]:
    with nullcontext() if "started" in request.fixturenames else forked_children():
        yield


@pytest.fixture(scope="module")
def timed(judges: Path) -> FunctionReward:
    """One child serves the tests that do not kill it."""
    return FunctionReward("judges.score", timeout=60.0)


@pytest.mark.usefixtures("started")
def test_the_function_runs_in_a_process_that_keeps_its_state() -> None:
    reward = FunctionReward("judges.counts", timeout=60.0)
    assert scores(reward, "a", "bb") == [1.0, 1.0]
    assert scores(reward, "a", "bb") == [2.0, 2.0]
    assert sys.modules["judges"].calls == 0


@pytest.mark.usefixtures("started")
def test_the_child_imports_from_the_path_of_the_trainer(judges: Path) -> None:
    """A path that the environment does not have, as of a checkout beside an installed package."""
    assert str(judges) not in os.environ.get("PYTHONPATH", "")
    child = Child(Target("judges", "path_of"))
    child.start()
    expected = [str(judges / "judges.py"), remax_lightning.__file__]
    assert child.call(None, 60) == expected


@pytest.mark.parametrize("response", ["loop", "backtracks", "computes"])
def test_what_never_returns_is_killed_and_shown(response: str) -> None:
    """Code that swallows exceptions, a library that never lets another thread run, one that ignores signals."""
    reward = FunctionReward("judges.score", timeout=1.0)
    message = r"FunctionReward\(judges.score\) took more than 1 s for 3 responses and was stopped"
    with pytest.raises(RewardError, match=rf"{message}\n.*\n  response 1: '{response}'"):
        scores(reward, "a", response, "bb")
    assert scores(reward, "a", "bb") == [1.0, 2.0]  # in another child


@pytest.mark.parametrize("function", ["score", "compute_score", "ask"])
def test_a_score_for_those_that_take_too_long(function: str) -> None:
    reward = FunctionReward(f"judges.{function}", timeout=1.0, on_timeout=-2.5)
    assert scores(reward, "a", "backtracks", "bb", "ccc") == [1.0, -2.5, 2.0, 3.0]


def test_a_deadline_without_a_child_left_to_ask_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """More responses hang than twice the time allows: the rest have the score unasked."""
    started: list[Target] = []
    monkeypatch.setattr(timed_rewards, "Child", lambda target: started.append(target) or Child(target))
    reward = FunctionReward("judges.score", timeout=0.5, on_timeout=0.0)
    assert scores(reward, *["loop"] * 30) == [0.0] * 30
    assert len(started) < 6  # each that hangs costs one, of half a second: of all responses, and of some alone


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("exits", r"FunctionReward\(judges.score\) raised SystemExit: 0 \(.*judges.py:22\)"),
        ("raises", r"FunctionReward\(judges.score\) raised KeyError: 'no such unit' \(.*judges.py:28\)"),
        ("leaves", r"the process of FunctionReward\(judges.score\) ended with exit code 0"),
        ("crashes", r"the process of FunctionReward\(judges.score\) was killed by SIGSEGV"),
    ],
)
def test_an_exception_an_exit_and_a_crash_show_the_response(response: str, message: str, timed: FunctionReward) -> None:
    with pytest.raises(RewardError, match=rf"{message}\n.*\n  response 1: '{response}'"):
        scores(timed, "a", response)
    assert scores(timed, "a", "bb") == [1.0, 2.0]


def test_a_kill_reaches_what_the_function_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER", str(tmp_path / "other"))
    with pytest.raises(RewardError, match="took more than 2 s"):
        scores(FunctionReward("judges.score", timeout=2.0), "starts another")
    wait_for_end(int((tmp_path / "other").read_text()))


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(process: int) -> None:
    assert wait_until(lambda: not is_running(process))


# The file alone: the package would take seconds to import.
PARENT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("child_process", sys.argv[1])
sys.modules["child_process"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
child = module.Child(module.Target(sys.argv[2], "load"))
child.start()
print(child.process.pid, flush=True)
child.call(sys.argv[3], 600)
"""
CALLED = "import re\ndef load(_):\n    return lambda text: re.search(r'(a+)+$', text) or text\n"


@pytest.mark.skipif(sys.platform != "linux", reason="a signal of Linux ends a library that never returns")
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_ends_with_its_parent_whatever_it_does(signum: int, tmp_path: Path) -> None:
    (tmp_path / "called.py").write_text(CALLED)
    command = [sys.executable, "-c", PARENT, child_process.__file__, str(tmp_path / "called.py"), "a" * 60 + "b"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.3)  # for the search to begin
    assert is_running(child)
    os.kill(parent.pid, signum)
    parent.communicate(timeout=LONG)
    wait_for_end(child)


@pytest.mark.usefixtures("started")
def test_a_schedulers_signal_leaves_the_child_to_its_parent(tmp_path: Path) -> None:
    """SLURM signals every process of a job; the step that is under way goes on to its end."""
    (tmp_path / "called.py").write_text(CALLED)
    child = Child(Target(str(tmp_path / "called.py"), "load"))
    child.start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(child.process.pid, number)
    assert child.call("x", 60) == "x"
    with pytest.raises(CallTimeoutError):
        child.call("a" * 60 + "b", 0.2)
    assert not child.is_alive


# Rewards of other kinds


def test_a_class_of_the_users_and_its_parts(judges: Path) -> None:
    from judges import Parts

    reward = TimedReward(Parts("hang"), timeout=1.0, on_timeout=9.0)
    reward.load(torch.device("cpu"))
    result = checked_scores(reward, ["p"] * 3, ["a", "hang", "bb"], [{}] * 3)
    assert result.reward.tolist() == [1.0, 9.0, 2.0]
    assert result.parts["half"].tolist() == [0.5, 0.0, 1.0]


def test_a_response_that_takes_too_long_has_its_score_on_the_last_token(judges: Path) -> None:
    responses = [Response("a", None, (7, 2)), Response("loop", None, (7, 8, 2))]
    reward = FunctionReward("judges.tokens", timeout=0.5, on_timeout=-1.0)
    result = checked_scores(reward, ["p"] * 2, responses, [{}] * 2)
    assert result.reward.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, -1.0]]


@pytest.mark.parametrize(("text", "message"), [
    ("loop", r"^b.jsonl, line 2: .*check_rows of FunctionReward\(judges.checks\) took more than 0.5 s and was stopped"),
    ("leaves", r"the process of FunctionReward\(judges.checks\) ended with exit code 0 in check_rows"),
    ("exits", r"^b.jsonl, line 2: FunctionReward\(judges.checks\): check_row raised SystemExit: 0"),
    ("wrong", r"^b.jsonl, line 2: FunctionReward\(judges.checks\): check_row raised ValueError: wrong"),
])  # fmt: skip
def test_the_check_of_rows_has_the_deadline_too(text: str, message: str) -> None:
    reward = FunctionReward("judges.checks", timeout=0.5)
    with pytest.raises(RewardError, match=message.replace("b.jsonl, line 2", "c.jsonl, line 1")):
        reward.check_rows([{"text": text}], ["c.jsonl, line 1"])


@pytest.mark.parametrize(("text", "message"), [
    ("loop", r"^b.jsonl, line 2: .*check_rows of FunctionReward\(judges.checks\) took more than 0.5 s and was stopped"),
    ("wrong", r"^b.jsonl, line 2: FunctionReward\(judges.checks\): check_row raised ValueError: wrong"),
])  # fmt: skip
def test_the_row_that_takes_too_long_is_found(text: str, message: str) -> None:
    reward = FunctionReward("judges.checks", timeout=0.5)
    with pytest.raises(RewardError, match=message):
        reward.check_rows([{"text": "a"}, {"text": text}], ["b.jsonl, line 1", "b.jsonl, line 2"])


@pytest.mark.slow
def test_refused_rows_are_found_in_one_child(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(timed_rewards, "Child", lambda target: started.append(target) or Child(target))
    reward = WeightedReward({"checked": FunctionReward("judges.checks", timeout=60.0), "other": lambda *_: []})
    rows = [{"text": text} for text in ("a", "wrong", "b", "wrong")]
    places = [f"b.jsonl, line {n}" for n in range(1, 5)]
    problem = "part 'checked' of the reward: {}: FunctionReward(judges.checks): check_row raised ValueError: wrong"
    assert reward.refused_rows(rows, places) == {n: problem.format(places[n]) for n in (1, 3)}
    assert len(started) == 1
    hangs = FunctionReward("judges.checks", timeout=0.5)
    with pytest.raises(
        RewardError, match=r"^b.jsonl, line 2: .*check_rows of FunctionReward\(judges.checks\) took more"
    ):
        hangs.refused_rows([{"text": "a"}, {"text": "loop"}], places[:2])


def test_the_check_of_prompts_has_the_deadline_too(judges: Path) -> None:
    from judges import Checks

    reward = TimedReward(Checks(), timeout=0.5)
    reward.check_prompts(["a"])
    reward.check_rows([{}], ["b.jsonl, line 1"])  # it has none of its own
    with pytest.raises(RewardError, match=r"^the prompt 'loop': .*check_prompts of Checks took more than 0.5 s"):
        reward.check_prompts(["a", "loop"])


def test_a_function_given_itself_is_timed_too(judges: Path) -> None:
    from judges import score

    assert scores(FunctionReward(score, timeout=60.0), "a", "bb") == [1.0, 2.0]


def test_parts_of_a_weighted_reward_may_have_deadlines_and_leave_responses_out() -> None:
    columns = FunctionReward("judges.completions", timeout=60.0)
    both = WeightedReward({"some": columns, "all": FunctionReward("judges.compute_score")}, {"some": 10.0})
    assert scores(both, "skip", "bb") == [4.0, 12.0]


def test_what_cannot_be_sent_or_timed_is_refused(judges: Path) -> None:
    from judges import Parts

    class Local(Parts):
        pass

    with pytest.raises(UserError, match=r"timeout: Local cannot be sent to another process .* dotted path"):
        TimedReward(Local())
    with pytest.raises(UserError, match=r"lambda.* cannot be sent to another process"):
        FunctionReward(lambda prompts, responses, rows: [0.0], timeout=1.0)
    in_script = type("InScript", (Parts,), {"__module__": "__main__"})
    sys.modules["__main__"].InScript = in_script  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="is defined in the script that is run"):
        TimedReward(in_script())
    for timeout in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match=r"timeout must be null or above 0( and finite)? \(seconds\), got"):
            FunctionReward("judges.score", timeout=timeout)
    with pytest.raises(UserError, match="on_timeout: expected error or a finite score"):
        TimedReward(Parts(), on_timeout=float("nan"))
    with pytest.raises(UserError, match=r"on_timeout needs model\.reward\.init_args\.timeout"):
        FunctionReward("judges.score", on_timeout=0.0)
