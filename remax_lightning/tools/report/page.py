"""Renders a run as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from remax_lightning.tools.report.charts import build_sections, single_values, smooth_values, thin_indices
from remax_lightning.tools.report.run import Curve, Run

FILES = Path(__file__).parent
SCRIPTS = ("dom.js", "charts.js", "samples.js")

_TEXTS = ("stage", "prompt", "response", "greedy_response")
_NUMBERS = ("step", "reward", "baseline_reward", "advantage", "kl", "response_length")

TILES = (
    ("Held-out reward, greedy", "val/baseline_reward"),
    ("Held-out reward, sampled", "val/reward"),
    ("Training reward", "train/reward"),
    ("Held-out accuracy", "val/accuracy"),
    ("Held-out perplexity", "val/perplexity"),
    ("KL, nats per token", "val/kl"),
    ("KL, nats per token", "train/kl"),
    ("Response length, tokens", "val/response_length"),
    ("Response length, tokens", "train/response_length"),
    ("Truncation rate", "val/truncation_rate"),
    ("Truncation rate", "train/truncation_rate"),
    ("Entropy, nats per token", "val/entropy"),
    ("Entropy, nats per token", "train/entropy"),
)
"""Tiles at the top: label and log key; of tiles with the same label, the first that exists is shown."""


def render_page(run: Run, max_samples: int) -> str:
    """Return the HTML of a run.

    Args:
        run: the data of the run.
        max_samples: maximum number of sampled responses in the page; of more, evenly spaced ones are kept.
    """
    # ---- Data: charts, samples, notes ----
    sections, missing = build_sections(run.curves)
    samples = [run.samples[i] for i in thin_indices(len(run.samples), max_samples)]
    notes = [*_alarm_notes(run), *run.notes, *_missing_notes(run, missing)]
    if len(samples) < len(run.samples):
        notes.append(f"{len(samples):,} of {len(run.samples):,} samples are shown, spread evenly over the run.")
    # ---- The page ----
    script = "\n".join((FILES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    # The page allows scripts by their hash, so that text of samples cannot run.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _fill_template(
        (FILES / "page.html").read_text(encoding="utf-8"),
        {
            # Only this script runs and nothing is fetched, whatever a sample contains.
            "policy": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
            "title": escape(_run_name(run.folder)),
            "style": (FILES / "style.css").read_text(encoding="utf-8"),
            "subtitle": escape(_subtitle(run)),
            "tiles": _tiles_html(run),
            "notes": _notes_html(notes),
            "config": _config_html(run.config),
            "evaluation": _evaluation_html(run.figures) + _single_values_html(run),
            "data": _json_data(
                {
                    "sections": sections,
                    "samples": [_sample_data(sample) for sample in samples],
                    "trained": _has_trained(run),
                }
            ),
            "script": script,
        },
    )


def _fill_template(template: str, values: Mapping[str, str]) -> str:
    """Replace `{{name}}` in one pass, so that values are not searched for names."""
    return re.sub(r"{{(\w+)}}", lambda match: values[match[1]], template)


def _run_name(folder: Path) -> str:
    """Return the last two folders of a path."""
    return "/".join(folder.resolve().parts[-2:])


def _subtitle(run: Run) -> str:
    # "ReMaxModule · policy runs/sft/last · reward my_rewards.politeness · data train.jsonl · 27 Nov 2026, 18:00 UTC"
    model = _mapping(run.settings.get("model"))
    arguments = _mapping(model.get("init_args"))
    name = next((name for name in ("policy", "reward_model") if arguments.get(name)), "policy")
    reward, data = _mapping(arguments.get("reward")), _mapping(_mapping(run.settings.get("data")).get("init_args"))
    named = {
        "": str(model.get("class_path") or "").rpartition(".")[2],
        f"{name.replace('_', ' ')} ": _mapping(arguments.get(name)).get("path"),
        "reward ": _mapping(reward.get("init_args")).get("function") or reward.get("class_path"),
        "data ": data.get("path"),
    }
    parts = [f"{word}{text}" for word, text in named.items() if text]
    if run.started is not None:
        parts.append(time.strftime("%d %b %Y, %H:%M UTC", time.gmtime(run.started)).lstrip("0"))
    return " · ".join(parts)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _has_trained(run: Run) -> bool:
    """Return whether step 0 is before training: evaluations alone are all at step 0, whatever they evaluate."""
    return any(key.startswith("train/") for key in run.curves) or any(row["stage"] == "train" for row in run.samples)


def _tiles_html(run: Run) -> str:
    sections: dict[str, str] = {}
    # ---- Steps, the metrics that exist, speed, time ----
    if _has_trained(run) and run.curves:
        sections["Optimizer steps"] = _tile(f"{max(curve.steps[-1] for curve in run.curves.values()):,}", "")
    for label, key in TILES:
        if key in run.curves and label not in sections:
            sections[label] = _curve_tile(run.curves[key], noisy=key.startswith("train/"))
    if rate := run.curves.get("throughput/tokens_per_s"):
        sections["Response tokens per second"] = _tile(
            format_number(sorted(rate.values)[len(rate.values) // 2]), "median"
        )
    if run.seconds > 0:
        sections["Time"] = _tile(format_duration(run.seconds), "first to last log")
    return "".join(f"<div class=tile><dt>{escape(label)}</dt>{text}</div>" for label, text in sections.items())


def _curve_tile(curve: Curve, noisy: bool) -> str:
    # a single training step says little, so its curve is smoothed
    values = (smooth_values(curve) if noisy else curve).values
    at_start = " before training" if curve.steps[0] == 0 else ""
    before = f"from {format_number(values[0])}{at_start}" if len(values) > 1 else ""
    return _tile(format_number(values[-1]), f"{before} (smoothed)" if noisy and before else before)


def _tile(value: str, note: str) -> str:
    return f"<dd>{escape(value)}</dd><dd class=note>{escape(note)}</dd>"


def format_number(value: float) -> str:
    """Return a number with four significant digits."""
    # 1234.4 -> "1,234", 0.123456 -> "0.1235", 2e9 -> "2e+09"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units."""
    # 75 -> "1 min 15 s", 4000 -> "1 h 7 min"
    minutes, hours = divmod(round(seconds), 60), divmod(round(seconds / 60), 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes[0]} min {minutes[1]} s" if seconds < 3600 else f"{hours[0]} h {hours[1]} min"


def _alarm_notes(run: Run) -> Iterable[str]:
    curve = run.curves.get("train/collapse_alarms")
    crossed = [] if curve is None else [step for step, value in zip(*curve, strict=True) if value > 0]
    if crossed:
        times = f"{len(crossed):,} optimizer steps, first" if len(crossed) > 1 else "an optimizer step,"
        yield f"A guard against collapse was crossed at {times} {crossed[0]:,}: see Signs of collapse."


def _missing_notes(run: Run, sections: Sequence[str]) -> Iterable[str]:
    if not run.curves:
        yield "There are no curves, because there are no TensorBoard event files."
    elif not _has_trained(run):
        yield "Nothing was trained in this run: it has evaluations alone."
    elif sections:
        yield f"Nothing was logged for: {', '.join(sections)}."
    if _has_trained(run) and run.curves and not any(key.startswith("val/") for key in run.curves):
        yield "The run had no validation."
    if _has_trained(run) and run.curves and "train/kl" not in run.curves and "val/kl" not in run.curves:
        yield "There is no KL: the run had no reference."
    if not run.samples:
        yield "There are no sample dumps (samples/train.jsonl, samples/validation.jsonl)."
    elif not any(sample.get("tokens") for sample in run.samples):
        yield "The sample dumps have no tokens to shade."
    if not run.config:
        yield "There is no config.yaml."


def _notes_html(notes: Sequence[str]) -> str:
    return "<ul class=notes>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>" if notes else ""


def _config_html(config: str) -> str:
    return f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>" if config else ""


def _evaluation_html(figures: Mapping[str, Mapping[str, float]]) -> str:
    if not figures:
        return ""
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th>{_figure_cells(figure)}</tr>" for name, figure in figures.items()
    )
    head = "".join(f"<th scope=col>{name}</th>" for name in ("figure", "value", "95 % interval", "n"))
    table = f"<table class=figures><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    heading = "<h2 id=evaluation>Evaluation</h2>"
    return f"<section aria-labelledby=evaluation>{heading}<div class=scroll>{table}</div></section>"


def _single_values_html(run: Run) -> str:
    """Return a table of what was logged once, but for figures that the table of the evaluation has."""
    values = {
        key: value for key, value in single_values(run.curves).items() if key.removeprefix("test/") not in run.figures
    }
    if not values:
        return ""
    rows = "".join(
        f"<tr><th scope=row>{escape(key)}</th><td>{format_number(value)}</td></tr>" for key, value in values.items()
    )
    table = (
        f"<table class=figures><thead><tr><th>logged once</th><th>value</th></tr></thead><tbody>{rows}</tbody></table>"
    )
    heading = "<h2 id=once>Values logged once</h2>"
    return f"<section aria-labelledby=once>{heading}<div class=scroll>{table}</div></section>"


def _figure_cells(figure: Mapping[str, float]) -> str:
    dash = "\N{EN DASH}"
    interval = f"{format_number(figure['low'])} to {format_number(figure['high'])}" if "low" in figure else dash
    value, count = (format_number(figure[key]) if key in figure else dash for key in ("value", "n"))
    return "".join(f"<td>{text}</td>" for text in (value, interval, count))


def _sample_data(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a sample for the page; dumps of earlier versions may lack some."""
    # ---- Texts, numbers, parts of the reward ----
    shown: dict[str, Any] = {name: str(sample[name]) for name in _TEXTS if sample.get(name) is not None}
    shown |= {name: value for name in _NUMBERS if (value := _finite(sample.get(name))) is not None}
    shown |= {"parts": {str(name): _finite(value) for name, value in _mapping(sample.get("parts")).items()}}
    shown["truncated"] = bool(sample.get("truncated"))
    # Tokens are shown only if they add up to the response.
    tokens = sample.get("tokens")
    if not isinstance(tokens, list) or "".join(map(str, tokens)) != shown["response"]:
        return shown
    shown["tokens"] = [str(token) for token in tokens]
    for name in ("token_kl", "token_advantages"):
        values = sample.get(name)
        if isinstance(values, list) and len(values) == len(tokens):
            shown[name] = [_finite(value, digits=4) for value in values]
    return shown


def _finite(value: Any, digits: int = 6) -> float | None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")


def _json_data(data: Any) -> str:
    """Return JSON that is safe inside a script element."""
    # "</script>" in a sample would end the element
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
