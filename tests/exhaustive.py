"""What `make test` leaves to `make test-all`: the rest of matrices of which it runs a representative.

Each row is a file and a regular expression for the names of its tests. Every row has a representative in `make test`:
the same check for another strategy, family, shape or benchmark. Continuous integration runs the rest, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

EXHAUSTIVE = (
    # Kills and signals: one strategy each stands for the others, DDP's file in a kill and ZeRO-3's folder at a signal.
    ("distributed/test_failures.py", r"killed_within_a_save.*\[(zero1|zero2|zero3|fsdp2)\]"),
    ("distributed/test_failures.py", r"sigterm_to_the_command.*\[(ddp|fsdp2)\]"),
    ("distributed/test_failures.py", r"killed_in_a_rollout.*\[0--9\]"),
    ("distributed/test_failures.py", r"waits_for_no_other.*\[1\]"),
    ("distributed/test_failures.py", r"sigterm_to_another_rank.*\[validation\]"),
    # Two ranks: all strategies are met in test_invariance.py, the sharded ones in test_sharded.py too.
    ("distributed/test_lora.py", r"\[(ddp|fsdp2|zero1|zero2)\]|fsdp2_resumes"),
    ("distributed/test_placements.py", r"\[(?!ddp-shard-k1|zero3-cpu-k1)"),
    ("distributed/test_evaluation.py", r"\[(zero3|fsdp2|shared)\]"),
    # Benchmarks and tables of the documentation: one whole benchmark stays, and the parts of the others.
    ("test_benchmarks.py", r"in_shards|step_measures|leaves_out_ppo|plan_is_held|picture_of_a_report"),
    ("benchmarks/test_log_probs_memory.py", r"it_runs_and"),
    ("test_architecture.py", r"measure"),
    ("tools/test_plan.py", r"the_table_of_the_page"),
    # Families: one of each cache layout stays (plain, grouped queries, learned positions, sliding window).
    ("rollout/test_families.py", r"passes_every_check\[(?!Llama\]|Qwen2\]|OPT\]|Mistral)"),
    # Whole runs on the fake CUDA device: one in 32 and one in 16 bits stay.
    (
        "modules/test_on_cuda.py",
        r"^(?!test_remax_trains_as_on_a_cpu\[parked models\]|test_remax_trains_in_16_bits\[bf16-mixed\])",
    ),
)


def is_exhaustive(path: str, name: str) -> bool:
    """Whether a test, by its path under `tests` and its name, only runs in `make test-all`."""
    return any(path == file and re.search(pattern, name) for file, pattern in EXHAUSTIVE)


def unmatched(collected: Iterable[tuple[str, str]]) -> list[str]:
    """The rows for files that were collected in which they match no test: renamed, or gone."""
    tests = list(collected)
    files = {path for path, _ in tests}
    return [
        f"{file} {pattern}"
        for file, pattern in EXHAUSTIVE
        if file in files and not any(path == file and re.search(pattern, name) for path, name in tests)
    ]


def without_representative(collected: Iterable[tuple[str, str]]) -> list[str]:
    """The files with rows of which `make test` would run nothing at all."""
    tests = list(collected)
    left = {path for path, name in tests if not is_exhaustive(path, name)}
    return sorted({path for path, _ in tests} & {file for file, _ in EXHAUSTIVE} - left)
