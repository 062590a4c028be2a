"""Disks that are too small, and disks that become read-only during a run: real file systems, where root may mount.

Small disks are tmpfs of several sizes. A read-only disk is an ext4 on a loop device with `errors=remount-ro`; the
kernel's `trigger_fs_error` makes it read-only while files are open for writing, as a failing drive does. Afterwards the
disk is mended and the run resumed: it must then be the undisturbed one.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.chaos.runs import Fixtures, configuration, difference, undisturbed, write
from benchmarks.chaos.strike import PHASES
from benchmarks.chaos.warm import CLEAR, RIGHT, SKIPPED, UNCLEAR, WRONG, Outcome, Trial, command, judge

SIZES = ("64k", "256k", "512k", "1m", "1500k", "2m", "3m", "5m", "8m", "12m", "20m")
PLACES = ("runs", "cache", "predictions")
WAITS = ("data", "backward", "logging", "samples", "write", "rename", "evaluation", "export")
"""Phases at which the disk becomes read-only; the others write nothing before the next of these."""


def trials(fixtures: Fixtures, seed: int, quick: bool = False) -> Iterator[Trial]:
    """Yield the trials: sizes for each place, then phases."""
    sizes = [(size, place) for place in PLACES for size in (SIZES if place == "runs" else SIZES[:4])]
    for index, (size, place) in enumerate(sizes[1:10:3] if quick else sizes):
        yield Trial("disk", index, seed, partial(small, fixtures, size, place))
    phases = [phase for phase in PHASES if phase in WAITS]
    for index, phase in enumerate(phases[3:5] if quick else phases):
        yield Trial("readonly", index, seed, partial(read_only, fixtures, phase))


def why_not() -> str:
    """Return why this process may not mount file systems; empty if it may."""
    if os.geteuid() != 0:
        return "only root may mount file systems"
    allowed = subprocess.run(["unshare", "--mount", "true"], capture_output=True)
    return "" if allowed.returncode == 0 else f"mounting is not allowed here: {allowed.stderr.decode().strip()}"


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """Mount a file system at a folder, and unmount it in the end."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", *options, str(folder)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


def small(fixtures: Fixtures, size: str, place: str, folder: Path, _: random.Random) -> Outcome:
    """Run on a disk of a size, then resume on a large one."""
    case = f"{place} on a disk of {size}"
    if reason := why_not():
        return Outcome(SKIPPED, reason, case)
    disk = folder / "disk"
    with mounted(disk, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):

        def enlarge() -> None:
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True, capture_output=True)

        if place == "predictions":
            return _predictions(fixtures, folder, disk)._replace(case=case)
        return _fit_and_resume(fixtures, folder, disk, place, enlarge)._replace(case=case)


def _fit_and_resume(
    fixtures: Fixtures,
    folder: Path,
    disk: Path,
    place: str,
    mend: Callable[[], None],
    phase: str = "",
    device: str = "",
) -> Outcome:
    """Run with the logger's folder, or the cache of the data, on a disk; mend that and resume."""
    expected = undisturbed(fixtures, "single")
    save_dir = disk / "runs" if place == "runs" else folder / "runs"
    environment = {"HF_DATASETS_CACHE": str(disk if place == "cache" else folder / "cache")}
    strikes = []
    if phase:
        init_args = {"folder": str(folder), "phase": phase, "action": f"write 1 /sys/fs/ext4/{device}/trigger_fs_error"}
        strikes = [{"class_path": "benchmarks.chaos.strike.Strike", "init_args": init_args}]
        if phase == "data":
            environment["HF_DATASETS_CACHE"] = str(disk / "cache")

    def run(*arguments: str, callbacks: list[dict[str, object]]) -> Outcome:
        config = configuration(fixtures, folder, save_dir=save_dir, callbacks=callbacks)
        path = write(folder / "run.yaml", config)
        return judge(command(folder, "fit", "--config", path, *arguments, environment=environment))

    outcome = run(callbacks=strikes)
    if outcome.outcome not in (RIGHT, CLEAR):
        return outcome
    if phase and not (folder / "hit").exists():
        return Outcome(UNCLEAR, "the disk did not become read-only")
    if outcome.outcome == RIGHT and (lost := difference(folder, expected, save_dir)) and "exported" not in lost:
        return Outcome(WRONG, f"it went on, but {lost}")
    mend()
    resumed = run("--ckpt_path", "last", callbacks=[])
    if resumed.outcome != RIGHT:
        detail = f"after the disk was mended: {resumed.detail}"
        return Outcome(UNCLEAR if resumed.outcome == CLEAR else resumed.outcome, detail)
    lost = difference(folder, expected, save_dir)
    return Outcome(WRONG, f"after the disk was mended {lost}") if lost else outcome


def _predictions(fixtures: Fixtures, folder: Path, disk: Path) -> Outcome:
    """Predict into a file on the disk, with a row that alone is longer than the smallest one."""
    config = configuration(fixtures, folder)
    rows = [{"prompt": "1+1=", "response": "2", "note": "x" * 40_000} for _ in range(24)]
    import json

    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config["data"] |= {"val_path": config["data"]["path"], "val_size": 0}
    path, target = write(folder / "run.yaml", config), disk / "predictions.jsonl"
    outcome = judge(command(folder, "predict", "--config", path, "--predictions.path", str(target)))
    if outcome.outcome == RIGHT and len(target.read_text().splitlines()) != len(rows):
        return Outcome(WRONG, "exit code 0, but predictions are missing")
    return outcome


def _administrators(program: str) -> str | None:
    """Return the path of a program of the administrator's; a user's PATH may lack its folders."""
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))


def read_only(fixtures: Fixtures, phase: str, folder: Path, _: random.Random) -> Outcome:
    """Run on a disk that becomes read-only at a phase, then resume on the mended one."""
    case = f"a disk that becomes read-only at {phase}"
    if reason := why_not():
        return Outcome(SKIPPED, reason, case)
    image, disk = folder / "image", folder / "disk"
    with image.open("wb") as file:
        file.truncate(32 * 2**20)
    make, check = _administrators("mkfs.ext4"), _administrators("fsck.ext4")
    if make is None or check is None:
        return Outcome(SKIPPED, "there is no mkfs.ext4, or no fsck.ext4", case)
    subprocess.run([make, "-q", str(image)], check=True, capture_output=True)
    options = ("-o", "loop,errors=remount-ro", str(image))
    try:
        with mounted(disk, *options):
            places = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
            device = next(source for source, target, *_ in places if target == str(disk)).rpartition("/")[2]

            def mend() -> None:
                subprocess.run(["umount", str(disk)], check=True, capture_output=True)
                subprocess.run([check, "-y", str(image)], check=False, capture_output=True)
                subprocess.run(["mount", *options, str(disk)], check=True, capture_output=True)

            return _fit_and_resume(fixtures, folder, disk, "runs", mend, phase, device)._replace(case=case)
    except subprocess.CalledProcessError as error:
        return Outcome(SKIPPED, f"{' '.join(error.cmd[:3])}: {error.stderr.decode().strip()[:200]}", case)
