"""The numbers to expect in docs/recipes.md: `python benchmarks/recipes.py` trains its real model, with three seeds.

Configuration, reward and prompts are those of the page. One JSON line per seed goes to results/recipes.jsonl; the
tables of the page are written from it and from the results of the demo and the pipeline, with `--table` alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from machine import RESULTS, description

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "recipes.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SEEDS = (0, 1, 2)
COMMAND = "from remax_lightning.cli import main; main()"
FIGURES = ("val/reward", "val/baseline_reward", "val/kl_per_response", "val/response_length")


class Line(NamedTuple):
    """What a recipe gave with one seed.

    Args:
        seed: of the whole run.
        before: held-out reward of sampled and of greedy responses before ReMax.
        after: the same after it.
        kl: to the start of ReMax, nats per response; None where it was not measured.
        seconds: of the whole command.
        machine: `processor`, `threads` and `date` of the measurement.
    """

    seed: int
    before: tuple[float, float]
    after: tuple[float, float]
    kl: float | None
    seconds: float
    machine: dict[str, Any]


def measure(model: Path, seed: int) -> dict[str, Any]:
    """Train the sentiment recipe in a folder of its own and return its validations.

    Args:
        model: folder of SmolLM2-135M-Instruct.
        seed: in place of the page's.
    """
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, text in blocks:
            (folder / name).write_text(text.replace(MODEL, str(model)), encoding="utf-8")
        subprocess.run([sys.executable, "write_prompts.py"], cwd=folder, check=True)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        command = [sys.executable, "-c", COMMAND, "fit", "--config", "sentiment.yaml"]
        started = time.perf_counter()
        subprocess.run([*command, "--seed_everything", str(seed)], cwd=folder, env=environment, check=True)
        seconds = time.perf_counter() - started
        curves = _curves(folder)
    figures = {f"{when}/{key}": round(curves[key][place], 4) for when, place in (("before", 0), ("after", -1))
               for key in FIGURES if key in curves}  # fmt: skip
    return {"benchmark": "sentiment", "seed": seed, **figures, "seconds": round(seconds, 1), **description()}


def _curves(folder: Path) -> dict[str, list[float]]:
    from remax_lightning.tools.report.run import read_curves

    curves, _ = read_curves(folder / "runs" / "remax" / "version_0", [])
    return {key: curve.values for key, curve in curves.items()}


def lines(recipe: str) -> Iterator[Line]:
    """Yield the results of a recipe: `demo`, `pipeline` or `sentiment`."""
    file = RESULTS / ("recipes.jsonl" if recipe == "sentiment" else f"{recipe}.jsonl")
    for text in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        machine = {name: row[name] for name in ("processor", "threads", "date")}
        if recipe != "pipeline":
            before, after = (
                (row[f"{when}/val/reward"], row[f"{when}/val/baseline_reward"]) for when in ("before", "after")
            )
            kl = row.get("after/val/kl_per_response")
            yield Line(row["seed"], before, after, kl, row["seconds"], machine)
        elif row["benchmark"] == "pipeline":
            scores = [(row[when]["true_score"]["value"], row[when]["greedy_true_score"]["value"])
                      for when in ("before", "after")]  # fmt: skip
            seed = int(row["variant"].removeprefix("seed "))
            yield Line(seed, *scores, row["after"]["kl_per_response"]["value"], row["seconds"]["all"], machine)


def table(recipe: str) -> str:
    """Return the table of a recipe for the page, with the mean and the range over the seeds in the last row."""
    results = list(lines(recipe))
    score = "true score" if recipe == "pipeline" else "held-out reward"
    rows = [
        f"| seed | {score} before, sampled | after | before, greedy | after | KL, nats per response | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in results:
        values = (line.before[0], line.after[0], line.before[1], line.after[1])
        kl = "–" if line.kl is None else f"{line.kl:.2f}"  # noqa: RUF001 - the dash of a table
        threads = f"{line.machine['threads']} thread{'s' if line.machine['threads'] > 1 else ''}"
        cells = " | ".join(f"{value:.3f}" for value in values)
        rows.append(f"| {line.seed} | {cells} | {kl} | {line.seconds / 60:.1f} min, {threads} |")
    columns = [[line.before[0], line.after[0], line.before[1], line.after[1]] for line in results]
    cells = [
        f"{sum(column) / len(column):.2f} ({min(column):.2f} to {max(column):.2f})"
        for column in zip(*columns, strict=True)
    ]
    rows.append(f"| mean, range | {' | '.join(cells)} | | |")
    machines = sorted({f"{line.machine['processor']}, {line.machine['date']}" for line in results})
    return "\n".join([*rows, "", f"Measured on {'; '.join(machines)}."])


def page(text: str) -> str:
    """Return the page with its tables as the results have them."""
    pattern = r"(<!-- made by python benchmarks/recipes.py: (\w+) -->\n).*?(<!-- end of what is made -->)"
    return re.sub(pattern, lambda match: f"{match[1]}\n{table(match[2])}\n\n{match[3]}", text, flags=re.DOTALL)


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--model", type=Path, help="folder of the model; by default that of tests/real/fetch.py")
    parser.add_argument("--table", action="store_true", help="only write the tables of the page")
    options = parser.parse_args()
    if not options.table:
        model = options.model or _fetched_model()
        measured = []
        for seed in options.seeds:
            measured.append(json.dumps(measure(model, seed)))
            print(measured[-1], flush=True)
        (RESULTS / "recipes.jsonl").write_text("\n".join(measured) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def _fetched_model() -> Path:
    sys.path.insert(0, str(ROOT / "tests"))
    from real.fetch import fetch

    return fetch("smollm2")


if __name__ == "__main__":
    main()
