"""Draw the curves of a run from its TensorBoard logs.

`python benchmarks/draw_curves.py runs/demo/logs/remax/version_0`; needs matplotlib, which the test extras install.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

LIMIT = 150_000
"""Largest picture in bytes: it lies in the repository and is loaded with the README."""

Curves = dict[str, tuple[list[int], list[float]]]
"""Optimizer steps and values by logged key."""


class Panel(NamedTuple):
    """One of the four charts.

    Args:
        title: what it shows, with the unit.
        curves: the logged key of each curve and its label.
        noisy: whether its curves are of single steps: drawn faint, under their running mean.
    """

    title: str
    curves: dict[str, str]
    noisy: bool = True


PANELS = (
    Panel(
        "held-out reward",
        {"val/baseline_reward": "greedy response (accuracy)", "val/reward": "sampled response"},
        noisy=False,
    ),
    Panel(
        "training reward",
        {"train/baseline_reward": "greedy response (baseline)", "train/reward": "sampled response"},
    ),
    Panel("KL to the reference, nats per token", {"train/kl": "training"}),
    Panel(
        "seconds of an optimizer step",
        {
            "time/rollout_s": "rollout",
            "time/train_s": "training pass and update",
            "time/reward_s": "reward and reference",
        },
    ),
)


def read_curves(folder: Path) -> Curves:
    """Return every scalar in the event files of `folder`.

    Raises:
        SystemExit: if there is no event file, or a curve that the picture needs was not logged.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not list(folder.glob("events.out.tfevents.*")):
        raise SystemExit(f"{folder} holds no TensorBoard event file; give the folder of a run (.../version_0)")
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: every value, not a sample
    accumulator.Reload()
    curves = {}
    for key in accumulator.Tags()["scalars"]:
        events = accumulator.Scalars(key)
        curves[key] = ([event.step for event in events], [event.value for event in events])
    missing = [key for panel in PANELS for key in panel.curves if key not in curves]
    if missing:
        raise SystemExit(f"{folder} has no {', '.join(missing)}; was it a ReMax run with a reference and validation?")
    return curves


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of each value and up to `width - 1` values before it."""
    windows = (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw(curves: Curves, path: Path) -> None:
    """Draw the four panels and save them as PNG.

    Raises:
        SystemExit: if the picture is larger than `LIMIT`.
    """
    import matplotlib as mpl
    from PIL import Image

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    for panel, axis in zip(PANELS, axes.flat, strict=True):
        _draw_panel(panel, curves, axis)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=100)
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)  # a palette: a third of the bytes
    if path.stat().st_size > LIMIT:
        raise SystemExit(f"{path} has {path.stat().st_size} bytes, more than {LIMIT}; lower dpi in this script")


def _draw_panel(panel: Panel, curves: Curves, axis: Any) -> None:
    for number, (key, label) in enumerate(panel.curves.items()):
        steps, values = curves[key]
        color = f"C{number}"
        if panel.noisy:
            axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            values = running_mean(values, max(1, len(values) // 25))
        axis.plot(steps, values, color=color, label=label, marker="" if panel.noisy else "o", markersize=4)
    axis.set_title(panel.title, fontsize=11)
    axis.set_xlabel("optimizer steps")
    axis.grid(alpha=0.3)
    if len(panel.curves) > 1:
        axis.legend(fontsize=9)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read a run's folder and write the picture."""
    parser = argparse.ArgumentParser(description="Draw the curves of a ReMax run from its TensorBoard logs.")
    parser.add_argument("folder", type=Path, help="folder of the run that holds events.out.tfevents.*")
    parser.add_argument("--output", type=Path, default=Path("docs/demo_curves.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    draw(read_curves(options.folder), options.output)
    print(f"wrote {options.output} ({options.output.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
