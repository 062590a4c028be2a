"""Runs the command and whole trials in forks of one warm process, each with a deadline.

A start of `remax` costs 8 seconds of imports. Here they are paid once: a fork has the modules and no state of another
trial. It runs `remax_lightning.cli.main`, with the wall that turns errors into lines, and ends like an interpreter
does: threads are joined and exit handlers called, so a hang at the end is seen, too. The further ranks that Lightning
starts are forks as well, made before the command has done anything.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "tests" / "command_script.py"
DEADLINE = 90.0
"""Seconds for one command. The slowest takes about 10 on an idle core; another process may have the machine."""
TRIAL_DEADLINE = 600.0
LEFT_OVER = 30.0
"""Seconds that further processes of a command may take to end after it."""
MEMORY = 12 * 2**30
"""Bytes of data that one process may hold, so that a mutation that asks for more does not end the machine's others."""

RIGHT, CLEAR, SKIPPED = "right", "clear", "skipped"
TRACEBACK, UNCLEAR, HANG, CRASH, WRONG, CODE = (
    "traceback",
    "unclear",
    "hang",
    "crash",
    "silently wrong",
    "code executed",
)
OUTCOMES = (RIGHT, CLEAR, SKIPPED, TRACEBACK, UNCLEAR, HANG, CRASH, WRONG, CODE)
PROBLEMS = (TRACEBACK, UNCLEAR, HANG, CRASH, WRONG, CODE)
"""Outcomes that must not happen."""


class Outcome(NamedTuple):
    """What came of a trial.

    Attributes:
        outcome: one of `OUTCOMES`.
        detail: the line that the user saw, or what was wrong.
        case: what the trial did, in words.
    """

    outcome: str
    detail: str = ""
    case: str = ""


class Trial(NamedTuple):
    """One trial: what it does in its folder, with random numbers that depend on nothing else."""

    kind: str
    index: int
    seed: int
    run: Callable[[Path, random.Random], Outcome]

    @property
    def key(self) -> str:
        """Name in the log."""
        return f"{self.kind}:{self.seed}:{self.index}"


class Ended(NamedTuple):
    """How a command ended: exit code (minus the signal that ended it, None after the deadline) and what it printed."""

    code: int | None
    text: str
    seconds: float


def warm_up() -> None:
    """Do what a run does before it reads its arguments: import, with one thread and no network, and make the parser."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    for path in (ROOT, ROOT / "tests"):
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
    import_all()
    from helpers.parsing import share_parser

    from remax_lightning.cli_run import command_parser
    from remax_lightning.shipped_configs import config_folder

    share_parser(SimpleNamespace(setattr=setattr))
    # Each class that a configuration names has a parser of its own, made when it is first read.
    command_parser().parse_args(["fit", "--config", str(config_folder() / "demo.yaml")])
    gc.collect()
    gc.freeze()  # or every collection of a fork would copy the memory of all these objects
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()][1:]
    if others := set(threads) - {"jemalloc_bg_thd"}:  # Arrow's allocator takes care of its thread in forks
        print(f"threads run before the forks, which could hold a lock in them: {', '.join(others)}", file=sys.stderr)


def import_all() -> None:
    """Import what runs import, however late they do, and compute with one thread."""
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401 - transformers imports it for every export
    import peft  # noqa: F401
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401

    from remax_lightning import cli_run  # noqa: F401

    torch.set_num_threads(1)


# ---- Commands ----


def command(
    folder: Path,
    *arguments: str,
    deadline: float = DEADLINE,
    ranks: int = 1,
    prepare: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run `remax` with these arguments in a fork, in a session of its own, and wait for all processes of that.

    Args:
        folder: current folder of the command; its output is added to `output.txt` there.
        arguments: what follows `remax`.
        deadline: seconds; then the stacks of all threads are printed and the session is killed.
        ranks: processes of the run; those that Lightning starts are forks too. 1 leaves them to Lightning.
        prepare: called in the fork before the command.
        environment: further variables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "output.txt"
    start = log.stat().st_size if log.exists() else 0
    begun = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _become_command(folder, log, arguments, deadline, ranks, prepare, environment or {})
    code = _wait(pid, deadline)
    if code is not None and not _session_ends(pid, LEFT_OVER):
        code = None
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if code is None:
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
    text = log.read_bytes()[start:].decode(errors="replace")
    return Ended(code, text, time.monotonic() - begun)


def _become_command(
    folder: Path,
    log: Path,
    arguments: Sequence[str],
    deadline: float,
    ranks: int,
    prepare: Callable[[], None] | None,
    environment: Mapping[str, str],
) -> None:
    """Run the command in this process, a fork, and end it."""
    try:
        # ---- What a shell would set up ----
        os.setsid()
        _end_with_parent()
        null, output = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for source, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        os.chdir(folder)
        os.environ.update({"HF_DATASETS_CACHE": str(folder / "cache"), **environment})
        sys.argv = [str(COMMAND), *arguments]
        sys.modules["__main__"].__spec__ = None  # Lightning starts further ranks by sys.argv
        atexit._clear()  # those of the warm process are not this command's
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if ranks > 1:
            _fork_further_ranks(ranks - 1)
        begin_anew(rank=0)
        faulthandler.dump_traceback_later(max(deadline - 2, 1), exit=False)
        if prepare is not None:
            prepare()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    _end_as_command()


def begin_anew(rank: int) -> None:
    """Set what modules read of their process when they are imported: the time of its start, and its rank."""
    # What is not imported yet reads it when it is.
    if checkpoints := sys.modules.get("remax_lightning.strategies.atomic_checkpoint"):
        checkpoints._STARTED = time.time()  # type: ignore[attr-defined]
    if ranks := sys.modules.get("lightning.fabric.utilities.rank_zero"):
        ranks.rank_zero_only.rank = rank


def _end_as_command() -> NoReturn:
    """Run the command of `sys.argv` in this process, a fork, and end it as an interpreter ends."""
    code = 1
    try:
        code = _main()
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


# ---- Further ranks ----


def _fork_further_ranks(count: int) -> None:
    """Fork processes that wait to become what Lightning starts, and let it start them in place of new interpreters.

    A run of two ranks would pay for the imports again, in a row: the second rank starts when the first has parsed.
    """
    from lightning.pytorch.strategies.launchers import subprocess_script

    waiting: list[tuple[int, Connection]] = []
    for _ in range(count):
        theirs, ours = Pipe(duplex=False)
        pid = os.fork()
        if pid == 0:
            _become_rank(theirs)
        theirs.close()
        waiting.append((pid, ours))

    class Started(subprocess.Popen[bytes]):
        """A fork in place of a new process: it gets the command and the variables, and this side its exit code."""

        def _execute_child(self, *options: Any) -> None:
            command, cwd, variables = options[0], options[5], options[6]
            self.pid, connection = waiting.pop(0)
            self._child_created = True
            with suppress(BrokenPipeError):  # it was killed while it waited
                connection.send((list(command), cwd, dict(variables)))
            connection.close()

    # Lightning's launcher alone: a reward with a deadline starts processes of its own
    subprocess_script.subprocess = SimpleNamespace(Popen=Started)  # type: ignore[assignment]


def _become_rank(connection: Connection) -> NoReturn:
    """Wait in this process, a fork, for a command and its variables, and run it."""
    try:
        _end_with_parent()  # while it waits; a rank must see for itself that the first one has ended
        command, cwd, variables = connection.recv()
        _end_with_parent(signum=0)
        os.environ.clear()
        os.environ.update(variables)
        if cwd is not None:
            os.chdir(cwd)
        sys.argv = command[1:]
        begin_anew(int(variables["LOCAL_RANK"]))
    except BaseException:
        os._exit(1)
    _end_as_command()


def _main() -> int:
    """Return the exit code of the command; what it lets out is printed as the interpreter does."""
    from remax_lightning.cli import main

    try:
        main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end_with_parent(signum: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends (PR_SET_PDEATHSIG); 0 takes that back."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signum)


def _wait(pid: int, deadline: float) -> int | None:
    """Return the exit code of a child, negative for a signal; None if it does not end in time."""
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def _session_ends(session: int, seconds: float) -> bool:
    """Whether all processes of a session end in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def judge(ended: Ended) -> Outcome:
    """Return what the user saw of a command that may end in any way: right, clear, or a problem.

    `right` means exit code 0; whether the results are right is for the caller to see.
    """
    errors = [line for line in ended.text.splitlines() if line.startswith("remax: error:")]
    detail = errors[0][:400] if errors else "\n".join(ended.text.strip().splitlines()[-3:])[:400]
    if ended.code is None:
        stacks = [line.strip() for line in ended.text.splitlines() if line.startswith('  File "')]
        return Outcome(HANG, "; ".join(stacks[:6]) or detail)
    if "Traceback (most recent call last)" in ended.text or "looks like a bug" in ended.text:
        return Outcome(TRACEBACK, detail)
    if ended.code < 0:
        return Outcome(CRASH, f"signal {-ended.code}: {detail}")
    if ended.code == 0:
        return Outcome(RIGHT)
    noise = any(word in ended.text for word in ("usage:", "Namespace("))
    if ended.code == 2 and len(errors) == 1 and not noise:
        return Outcome(CLEAR, detail)
    return Outcome(UNCLEAR, f"exit code {ended.code}, {len(errors)} error lines: {detail}")


# ---- Trials ----


def run_trials(
    trials: Iterable[Trial], folder: Path, workers: int, keep: bool = False
) -> Iterator[tuple[Trial, Outcome, float]]:
    """Run trials in forks, `workers` at once, and yield each as it ends, with its seconds.

    Args:
        trials: each gets a folder of its own in `folder`, which is removed afterwards unless it shows a problem.
        folder: where.
        workers: trials at once.
        keep: whether all folders are kept.
    """
    waiting, running = iter(trials), {}
    while True:
        while len(running) < workers and (trial := next(waiting, None)) is not None:
            place = folder / trial.key.replace(":", "-")
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            sys.stdout.flush()
            if (pid := os.fork()) == 0:
                _become_trial(trial, place)
            running[pid] = (trial, place, time.monotonic())
        if not running:
            return
        for pid, (trial, place, begun) in list(running.items()):
            done, _ = os.waitpid(pid, os.WNOHANG)
            late = time.monotonic() - begun > TRIAL_DEADLINE
            if not done and not late:
                continue
            if late:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            del running[pid]
            result = place / "outcome.json"
            outcome = Outcome(*json.loads(result.read_text())) if result.exists() else Outcome(HANG, "the trial itself")
            if not keep and outcome.outcome not in PROBLEMS:
                shutil.rmtree(place, ignore_errors=True)
            yield trial, outcome, time.monotonic() - begun
        time.sleep(0.01)


def _become_trial(trial: Trial, place: Path) -> None:
    """Run a trial in this process, a fork, write down its outcome and end."""
    try:
        _end_with_parent()
        outcome = trial.run(place, random.Random(trial.key))
        (place / "outcome.json").write_text(json.dumps(outcome))
    except BaseException:
        text = traceback.format_exc(limit=-8)
        print(text, file=sys.stderr)
        (place / "outcome.json").write_text(json.dumps(Outcome(UNCLEAR, f"the trial itself failed: {text[-800:]}")))
    finally:
        sys.stdout.flush()
        os._exit(0)


def in_fork(function: Callable[[], None]) -> None:
    """Call a function in a fork, so that this process starts no threads, and wait for it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        raise RuntimeError(f"{function} failed in its fork")
