"""One process of two fails, is killed or is told to end, under the command: all end, in seconds, and say why.

One run is started as a shell does, with a new Python for each rank; the others are forks of a process that has imported
what they need.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed.killing import WarmCommand, hit, remax, write_run
from helpers.training import save_policy

from benchmarks.chaos.runs import STEPS, STRATEGIES, losses

pytestmark = pytest.mark.slow(40)

SOON = 90.0
"""Seconds: Lightning looks for dead processes every 5, more on a busy machine. A collective would wait 1800."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmCommand]:
    command = WarmCommand()
    yield command
    command.close()


@pytest.fixture(scope="module")
def whole(warm: WarmCommand, policy: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    ended = warm(folder, *write_run(folder, policy, "ddp", []))
    assert ended.code == 0, ended.out
    found = losses(folder)
    assert sorted(found) == list(range(1, STEPS + 1))
    return [found[step][0] for step in found]


def test_a_reward_that_fails_on_one_rank_ends_the_run_with_its_message(
    warm: WarmCommand, policy: str, tmp_path: Path
) -> None:
    reward = {"function": "distributed.hanging.reward", "arguments": {"rank": 1}}
    changes = {"model__reward__init_args": reward, "evaluation__at_start": False}  # it fails in its second batch
    ended = warm(tmp_path, *write_run(tmp_path, policy, "ddp", [], **changes))
    assert ended.code == 2, ended.out
    message = "remax: error: rank 1: model.reward: FunctionReward(distributed.hanging.reward) raised"
    assert ended.out.count(message) == 1
    assert "ConnectionError: the scorer is gone" in ended.out
    assert "Traceback" not in ended.out
    assert [sorted(losses(tmp_path, rank)) for rank in (0, 1)] == [[1], [1]]


def test_an_error_of_one_rank_alone_is_told_once_and_ends_the_run(
    warm: WarmCommand, policy: str, tmp_path: Path
) -> None:
    """The other rank only sees a broken connection; its message would stand above the one that matters."""
    fails = {"class_path": "distributed.killing.FailAlone"}
    ended = warm(tmp_path, *write_run(tmp_path, policy, "ddp", [fails]))
    assert ended.code == 2, ended.out
    assert ended.out.count("remax: error:") == 1
    assert "/scratch/rank1" in ended.out.partition("remax: error:")[2]
    assert "Traceback" not in ended.out


@pytest.mark.slow(25)
@pytest.mark.parametrize(("rank", "code"), [(1, 1), (0, -9)])
def test_a_rank_killed_in_a_rollout_ends_the_run_in_seconds(
    rank: int, code: int, request: pytest.FixtureRequest, policy: str, tmp_path: Path
) -> None:
    run = remax if rank == 1 else request.getfixturevalue("warm")
    ended = run(tmp_path, *write_run(tmp_path, policy, "ddp", [hit(tmp_path, "rollout", rank)]))
    assert ended.code == code, ended.out
    assert ended.seconds is not None
    assert ended.seconds < SOON
    told = "rank 1 of this machine was killed (SIGKILL)" if rank == 1 else "which started rank 1, has ended"
    assert told in ended.out
    assert "Traceback" not in ended.out


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_no_other_is_ended_too(rank: int, warm: WarmCommand, policy: str, tmp_path: Path) -> None:
    """As on GPUs, where a broken connection is not noticed: the other rank is busy for long."""
    reward = {"function": "distributed.hanging.reward", "arguments": {"rank": 1 - rank, "waits": 1000.0}}
    killed = [hit(tmp_path, "rollout", rank)]
    changes = {"model__reward__init_args": reward, "evaluation__at_start": False}  # it waits in its second batch
    ended = warm(tmp_path, *write_run(tmp_path, policy, "ddp", killed, **changes))
    assert ended.code == (1 if rank == 1 else -9), ended.out
    assert ("rank 1 of this machine was killed (SIGKILL)" in ended.out) == (rank == 1)
    assert ended.seconds is not None
    assert ended.seconds < SOON


@pytest.mark.parametrize(
    ("deadline", "code"), [({"timeout": 3.0}, 2), ({"timeout": 1.0, "on_timeout": -1.0}, 0), ({}, None)]
)
def test_a_reward_that_never_returns_on_one_rank_holds_up_no_other(
    deadline: dict[str, float], code: int | None, warm: WarmCommand, policy: str, tmp_path: Path
) -> None:
    """It has a deadline, with an error on all ranks or a score; or the run has one, which ends all ranks."""
    reward = {"function": "distributed.hanging.reward", "arguments": {"rank": 1, "waits": 600.0}}
    changes = {"model__reward__init_args": reward | deadline, "model__stall_timeout": 600.0 if deadline else 8.0}
    changes |= {"evaluation__at_start": False, "trainer__max_steps": 2}  # it hangs in the second step
    changes |= {"data__batch_size": 1} if "on_timeout" in deadline else {}  # each response that hangs costs a new child
    ended = warm(tmp_path, *write_run(tmp_path, policy, "ddp", [], **changes))
    assert "Traceback" not in ended.out
    if code is None:
        assert ended.code != 0
        assert ended.out.count("remax: error: no progress for 8 s (model.stall_timeout)") == 1
        assert "scoring 8 responses with FunctionReward(distributed.hanging.reward)" in ended.out
        [waits] = tmp_path.glob("runs/remax/*/stall-rank1.txt")
        assert "in reward" in waits.read_text()
        assert waits.with_name("stall-rank0.txt").exists()
        return
    assert ended.code == code, ended.out
    took = "rank 1: model.reward: FunctionReward(distributed.hanging.reward) took more than 3 s for"
    assert ended.out.count(took) == (code == 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_killed_within_a_save_goes_on_from_the_checkpoint_before(
    strategy: str, warm: WarmCommand, policy: str, whole: list[float], tmp_path: Path
) -> None:
    """Half of a file of the third checkpoint is there; the second is whole, and the first gone as it should be."""
    writer = 0 if strategy == "ddp" else 1  # where every rank has a part, rank 0's may be complete
    arguments = write_run(tmp_path, policy, strategy, [hit(tmp_path, "saving", writer, step=2)])
    ended = warm(tmp_path, *arguments)
    assert ended.code != 0
    [folder] = tmp_path.glob("runs/remax/*/checkpoints")
    assert [path.name for path in folder.glob("*.ckpt")] == ["step=2.ckpt"]
    # Where every rank has a part, the one that lives on may have removed what cannot be completed.
    assert len(list(folder.glob(".step=3.ckpt.*.tmp"))) in ((1,) if strategy == "ddp" else (0, 1))
    arguments = write_run(tmp_path, policy, strategy, [])
    ended = warm(tmp_path, *arguments, "--ckpt_path", "last")
    assert ended.code == 0, ended.out
    found = losses(tmp_path)
    assert {step: len(times) for step, times in found.items()} == {1: 1, 2: 1, 3: 2, 4: 1}
    assert found[3][0] == found[3][1]
    assert [times[-1] for times in found.values()] == pytest.approx(whole, abs=1e-5)
    assert not list(folder.glob(".*"))


class Told:
    """Sends SIGTERM to the command, as a scheduler does, once the first step is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, process: int) -> None:
        while not losses(self.folder) and Path(f"/proc/{process}").exists():
            time.sleep(0.02)
        os.kill(process, signal.SIGTERM)


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp2"])
def test_sigterm_to_the_command_saves_and_the_run_goes_on(
    strategy: str, warm: WarmCommand, policy: str, whole: list[float], tmp_path: Path
) -> None:
    arguments = write_run(tmp_path, policy, strategy, [], save_every=100)
    ended = warm(tmp_path, *arguments, during=Told(tmp_path))
    assert ended.code == 143, ended.out
    done = [losses(tmp_path, rank) for rank in (0, 1)]
    assert len(done[0]) == len(done[1]) < STEPS
    [saved] = tmp_path.glob("runs/remax/*/checkpoints/*")
    assert saved.name == "last.ckpt"
    ended = warm(tmp_path, *arguments, "--ckpt_path", "last")
    assert ended.code == 0, ended.out
    found = losses(tmp_path)
    assert all(len(times) == 1 for times in found.values())
    assert [found[step][0] for step in sorted(found)] == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("place", ["rollout", "validation"])
def test_sigterm_to_another_rank_ends_all_at_the_same_step(
    place: str, warm: WarmCommand, policy: str, tmp_path: Path
) -> None:
    told = hit(tmp_path, place, rank=1, step=2, signum="SIGTERM")
    arguments = write_run(tmp_path, policy, "ddp", [told])  # two steps to an epoch, which then validates
    ended = warm(tmp_path, *arguments)
    assert ended.code == 143, ended.out
    steps = 3 if place == "rollout" else 2
    assert [sorted(losses(tmp_path, rank)) for rank in (0, 1)] == [list(range(1, steps + 1))] * 2
    assert [path.name for path in tmp_path.glob("runs/remax/*/checkpoints/*")] == [f"step={steps}.ckpt"]


def test_a_callback_that_stops_one_rank_stops_all(warm: WarmCommand, policy: str, tmp_path: Path) -> None:
    stop: dict[str, Any] = {"class_path": "distributed.killing.StopAlone"}
    ended = warm(tmp_path, *write_run(tmp_path, policy, "ddp", [stop]))
    assert ended.code == 0, ended.out
    assert [sorted(losses(tmp_path, rank)) for rank in (0, 1)] == [[1, 2], [1, 2]]
