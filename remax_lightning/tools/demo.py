"""`remax demo`: train a policy from scratch on the embedded task, align it, and print what it gained."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from remax_lightning.errors import UserError
from remax_lightning.tasks.addition import write_addition_task

FOLDER = Path("runs/demo")
"""Folder that `configs/demo.yaml` and `configs/demo_sft.yaml` read and write."""


def main(args: Sequence[str]) -> dict[str, float]:
    """Write the task, fine-tune a policy on it, align it with ReMax, and print what changed.

    Args:
        args: the arguments after `remax demo`.

    Returns:
        The figures of the table, `before/...` and `after/...` by their log key, and `seconds`.
    """
    # ---- The task ----
    options = make_parser().parse_args(args)
    write_addition_task(FOLDER / "task")
    print(f"Wrote additions of two- and three-digit numbers to {FOLDER / 'task'}.")
    seed = [f"--seed_everything={options.seed}"]
    # ---- Supervised fine-tuning, evaluation, ReMax ----
    started = time.perf_counter()
    _run("fit", "demo_sft.yaml", seed)
    before = _run("validate", "demo.yaml", [*seed, "--trainer.logger.init_args.name=before"])
    steps = [] if options.max_steps is None else [f"--trainer.max_steps={options.max_steps}"]
    after = _run("fit", "demo.yaml", seed + steps)
    seconds = time.perf_counter() - started
    print(_format_table(before, after, seconds))
    figures = {f"before/{name}": value for name, value in before.items()}
    return figures | {f"after/{name}": value for name, value in after.items()} | {"seconds": seconds}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments after `remax demo`."""
    description = main.__doc__.partition("Args:")[0] if main.__doc__ else None
    parser = argparse.ArgumentParser(prog="remax demo", description=description, allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data order and sampling (default: 0)")
    parser.add_argument("--max_steps", type=int, help="stop ReMax after this many optimizer steps")
    return parser


def _run(subcommand: str, config: str, more: list[str]) -> dict[str, float]:
    """Run a subcommand and return its validation metrics."""
    from remax_lightning.cli_run import run
    from remax_lightning.shipped_configs import config_folder

    path = config_folder() / config
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    print(f"\n$ remax {subcommand} --config {shown} {' '.join(more)}", flush=True)
    # in this process, which has loaded PyTorch and transformers already
    trainer = run([subcommand, "--config", str(path), *more]).trainer
    if trainer.interrupted:
        raise UserError("remax demo was interrupted")
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def _format_table(before: dict[str, float], after: dict[str, float], seconds: float) -> str:
    rows = [
        ("greedy accuracy", "val/baseline_reward", "{:.1%}"),
        ("sampled reward", "val/reward", "{:.3f}"),
        ("KL to the reference, nats per token", "val/kl", "{:.4f}"),
    ]
    # columns of 38, 10 and 13 characters
    lines = ["", f"{'on held-out additions':38}{'before':>10}{'after ReMax':>13}", "-" * 61]
    for label, name, form in rows:
        lines.append(f"{label:38}{form.format(before[name]):>10}{form.format(after[name]):>13}")
    return "\n".join(
        [
            *lines,
            "",
            f"trained in          {seconds:.0f} s",
            f"TensorBoard logs    {FOLDER / 'logs'}",
            f"samples             {_latest('logs/remax/*/samples')}",
            f"exported policy     {FOLDER / 'policy' / 'last'} (best in validation: {FOLDER / 'policy' / 'best'})",
            "",
            "Look at the curves:",
            f"  tensorboard --logdir {FOLDER / 'logs'}",
        ]
    )


def _latest(pattern: str) -> Path:
    """Return the latest folder that matches; an earlier demo may have left others."""
    return max(FOLDER.glob(pattern), key=lambda path: path.stat().st_mtime)
