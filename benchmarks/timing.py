"""Measuring side by side, and writing down what was measured."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from machine import description, installed

KEY = ("benchmark", "size", "lengths", "phase", "variant", "device", "dtype")
"""What tells one figure from another; a new measurement takes the place of the old one."""


def interleaved(
    variants: Mapping[str, Callable[[int], dict[str, float]]], repetitions: int, warmup: int
) -> dict[str, dict[str, list[float]]]:
    """Run the variants in turn, A B C A B C, so that a drift of the machine meets all of them alike.

    Args:
        variants: by name; each is called with the number of the round and returns figures of it, seconds among them.
        repetitions: rounds that count.
        warmup: rounds before those.

    Returns:
        Per variant and figure, its values of the rounds that count.
    """
    found: dict[str, dict[str, list[float]]] = {name: {} for name in variants}
    for turn in range(-warmup, repetitions):
        for name, run in variants.items():
            figures = run(turn)
            for figure, value in figures.items() if turn >= 0 else ():
                found[name].setdefault(figure, []).append(value)
    return found


def medians(figures: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median of each figure."""
    return {name: statistics.median(values) for name, values in figures.items()}


def seconds(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return how long `run` takes, the device's own work included, and what it returns."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - start, result


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Return what the device is called in the results."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def save(path: Path, lines: list[dict[str, Any]]) -> None:
    """Print the lines and write them to `path` as JSON, each in the place of an older one of the same `KEY`."""
    machine = description() | {"versions": versions()}
    new = [machine | {name: _rounded(value) for name, value in line.items()} for line in lines]
    keys = [_key(line) for line in new]
    old = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    others = [line for line in old if _key(line) not in keys]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in [*others, *new]))
    for line in lines:
        print(json.dumps({name: _rounded(value) for name, value in line.items()}), flush=True)


def versions() -> dict[str, str]:
    """Return the versions of the packages, those of the peers among them where they are installed."""
    found: dict[str, str] = description()["versions"]
    return found | installed("trl", "vllm")


def trl_version() -> str | None:
    """Return the version of TRL, or None where it is not installed."""
    return installed("trl").get("trl")


def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(line.get(name) for name in KEY)


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
