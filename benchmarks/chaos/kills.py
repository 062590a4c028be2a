"""Kills and signals at every phase of a run of one and two processes; each run is resumed and compared bit by bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.chaos.runs import STRATEGIES, Fixtures, difference, exported_digest, fit, undisturbed
from benchmarks.chaos.strike import PHASES
from benchmarks.chaos.warm import CLEAR, RIGHT, UNCLEAR, WRONG, Ended, Outcome, Trial, judge

SIGNALS = ("SIGKILL", "SIGTERM")
SHARDED_PHASES = ("rollout", "backward", "optimizer", "write", "rename", "export")
"""Phases for DeepSpeed and FSDP2; the others do not touch what they shard."""
TERMINATED = 128 + 15
DEADLINE = 240.0


def cases(quick: bool = False) -> list[tuple[str, str, str, int]]:
    """Return strategy, phase, signal and rank of every trial."""
    grid = [
        (strategy, phase, name, (number // 2) % 2 if strategy == "ddp" else 0)
        for strategy in ("single", "ddp")
        for number, phase in enumerate(PHASES)
        for name in SIGNALS
    ]
    for number, strategy in enumerate(STRATEGIES[1:]):
        grid += [(strategy, phase, "SIGKILL", (number + i) % 2) for i, phase in enumerate(SHARDED_PHASES)]
    # Rank 0 alone prepares the data, writes samples, and under DDP the checkpoint and the exported policy.
    alone = {"data", "samples", "logging", "export", "write", "rename"}
    grid = [
        (strategy, phase, name, 0 if phase in alone - ({"write"} if strategy not in ("ddp",) else set()) else rank)
        for strategy, phase, name, rank in grid
    ]
    if quick:
        one = [case for case in grid if case[0] == "single"]
        return [*one[::5], ("ddp", "backward", "SIGKILL", 1)]
    return grid


def trials(fixtures: Fixtures, seed: int, quick: bool = False) -> Iterator[Trial]:
    """Yield the trials; the undisturbed runs that they are compared with are made first."""
    for index, case in enumerate(cases(quick)):
        yield Trial("kill", index, seed, partial(kill, fixtures, *case))


def kill(
    fixtures: Fixtures, strategy: str, phase: str, name: str, rank: int, folder: Path, _: random.Random
) -> Outcome:
    """Strike a run at a phase, resume it, and compare it with one that nothing happened to."""
    case = f"{name} at {phase} on rank {rank} under {strategy}"
    expected = undisturbed(fixtures, strategy)
    strike = {
        "class_path": "benchmarks.chaos.strike.Strike",
        "init_args": {"folder": str(folder), "phase": phase, "action": name, "rank": rank},
    }
    struck = fit(fixtures, folder, strategy=strategy, callbacks=[strike])
    if not (folder / "hit").exists():
        return Outcome(UNCLEAR, f"nothing was struck: {struck.text[-300:]}", case)
    if problem := end_problem(struck, name, rank):
        return problem._replace(case=case)
    if name == "SIGTERM" and struck.code == 0 and not exported_digest(folder):
        return Outcome(WRONG, "it says that it is done, without an exported policy", case)
    resumed = fit(fixtures, folder, "--ckpt_path", "last", strategy=strategy)
    outcome = judge(resumed)
    if outcome.outcome != RIGHT:
        return outcome._replace(outcome=UNCLEAR if outcome.outcome == CLEAR else outcome.outcome, case=case)
    lost = difference(folder, expected)
    return Outcome(WRONG if lost else RIGHT, lost, case)


def end_problem(ended: Ended, name: str, rank: int) -> Outcome | None:
    """Return what is wrong with how a run ended that was struck; None if nothing."""
    if ended.code is None:
        return judge(ended)
    if "Traceback (most recent call last)" in ended.text:
        return Outcome("traceback", ended.text[-400:])
    if name == "SIGTERM":
        is_right = ended.code in (0, TERMINATED, -15)  # -15: before there is a trainer
    else:
        is_right = ended.code == (-9 if rank == 0 else 1)
        is_right = is_right and (rank == 0 or ended.text.count("was killed (SIGKILL)") == 1)
    return None if is_right else Outcome(UNCLEAR, f"exit code {ended.code}: {ended.text[-300:]}")
