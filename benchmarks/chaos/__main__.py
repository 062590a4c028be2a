"""Runs the chaos suite, or pieces of it; `python -m benchmarks.chaos --help`.

Every trial is a run of the real command that something is done to: it is killed, its disk fills up, its reward server
is hostile, its checkpoint is damaged, its configuration or data are mutated, or its files hold code. It must end clear
(one line, exit code 2), or go on and be right. Each trial depends on kind, seed and index alone. Outcomes go to a log,
so that a suite that was stopped goes on where it was; the totals go to `benchmarks/results/chaos.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.chaos import warm
from benchmarks.chaos.totals import RESULTS, write_table, write_totals

COUNTS = {"flip": 200, "truncate": 200, "yaml": 500, "jsonl": 500, "endurance": 2000}
QUICK = {"flip": 4, "truncate": 4, "yaml": 8, "jsonl": 8, "endurance": 400}
"""Of `--quick`: what continuous integration runs in some minutes."""
KINDS = ("yaml", "jsonl", "flip", "truncate", "payload", "server", "disk", "readonly", "kill", "endurance")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials and write totals; returns 1 if there was a problem."""
    options = parse(arguments)
    if options.table:
        write_table(options.results)
        return 0
    warm.warm_up()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="remax-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    done = {} if options.again else read_log(options.log)
    options.log.parent.mkdir(parents=True, exist_ok=True)
    wanted = {trial.key: trial for trial in make_trials(options, folder) if is_chosen(trial, options.only)}
    waiting = [trial for key, trial in wanted.items() if key not in done]
    print(f"{len(wanted)} trials, {len(wanted) - len(waiting)} of them in {options.log}", flush=True)
    problems = 0
    with options.log.open("a") as log:
        for trial, outcome, seconds in warm.run_trials(waiting, folder, options.workers, options.keep):
            entry = {"key": trial.key, "kind": trial.kind, "seed": trial.seed, "index": trial.index,
                     **outcome._asdict(), "seconds": round(seconds, 1)}  # fmt: skip
            done[trial.key] = entry
            log.write(json.dumps(entry) + "\n")
            log.flush()
            is_problem = outcome.outcome in warm.PROBLEMS
            problems += is_problem
            if is_problem or options.verbose:
                print(f"{trial.key} {outcome.outcome}: {outcome.case}: {outcome.detail}", flush=True)
    chosen = [done[key] for key in wanted]
    for kind, counts in totals(chosen).items():
        print(kind, dict(counts), flush=True)
    if options.results is not None and not options.only:
        write_totals(options.results, chosen)
    if options.folder is None and not problems and not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return int(any(entry["outcome"] in warm.PROBLEMS for entry in chosen))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; all by default", metavar="KIND")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices; default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="trials at once; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a few trials of each kind")
    parser.add_argument("--count", type=int, help="trials of each random kind, or steps of endurance")
    parser.add_argument("--only", nargs="+", default=[], help="trials by KIND:SEED:INDEX, as the log has them")
    parser.add_argument("--folder", type=Path, help="of the trials' files; those of problems are kept")
    parser.add_argument("--keep", action="store_true", help="keep the files of all trials")
    parser.add_argument("--log", type=Path, default=Path("runs/chaos.jsonl"), help="outcomes; default: %(default)s")
    parser.add_argument("--again", action="store_true", help="run trials that are in the log, too")
    parser.add_argument("--verbose", action="store_true", help="print every trial")
    parser.add_argument("--results", type=Path, default=RESULTS, help="totals; default: %(default)s")
    parser.add_argument("--table", action="store_true", help="write the totals into README.md, and run nothing")
    options = parser.parse_args(arguments)
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"there is no kind {', '.join(sorted(unknown))}; the kinds are {', '.join(KINDS)}")
    if options.only:
        options.kinds = list(dict.fromkeys(key.partition(":")[0] for key in options.only))
    return options


def is_chosen(trial: warm.Trial, only: Sequence[str]) -> bool:
    """Whether a trial is to run."""
    return not only or trial.key in only


def read_log(path: Path) -> dict[str, dict[str, Any]]:
    """Return the outcomes in a log by the key of the trial, the last of each."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["key"]: entry for entry in map(json.loads, lines)}


def make_trials(options: argparse.Namespace, folder: Path) -> Iterator[warm.Trial]:
    """Return the trials of the kinds that were asked for."""
    from benchmarks.chaos import config_mutations, damage, data_mutations, disks, endurance, kills, runs, servers

    fixtures = runs.make_fixtures(folder / "fixtures")
    seed, quick = options.seed, options.quick
    kinds = options.kinds or KINDS
    counts = {kind: options.count or (QUICK if quick else COUNTS)[kind] for kind in COUNTS}
    parts: dict[str, Iterator[warm.Trial]] = {
        "yaml": config_mutations.trials(fixtures, seed, counts["yaml"]),
        "jsonl": data_mutations.trials(fixtures, seed, counts["jsonl"]),
        "flip": damage.trials(fixtures, seed, "flip", counts["flip"]),
        "truncate": damage.trials(fixtures, seed, "truncate", counts["truncate"]),
        "payload": damage.payload_trials(fixtures, seed, quick),
        "server": servers.trials(fixtures, seed, quick),
        "disk": (trial for trial in disks.trials(fixtures, seed, quick) if trial.kind == "disk"),
        "readonly": (trial for trial in disks.trials(fixtures, seed, quick) if trial.kind == "readonly"),
        "kill": kills.trials(fixtures, seed, quick),
        "endurance": endurance.trials(fixtures, seed, counts["endurance"]),
    }
    return chain.from_iterable(parts[kind] for kind in KINDS if kind in kinds)


def totals(entries: Sequence[dict[str, Any]]) -> dict[str, Counter[str]]:
    """Return how often each outcome came up, by kind."""
    counts: dict[str, Counter[str]] = {}
    for entry in entries:
        counts.setdefault(entry["kind"], Counter())[entry["outcome"]] += 1
    return counts


if __name__ == "__main__":
    sys.exit(main())
