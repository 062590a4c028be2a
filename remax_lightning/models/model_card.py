"""The model card, README.md of an exported folder: where a model comes from, and what its run measured."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from remax_lightning.credentials import has_secret, hide_credentials, is_secret
from remax_lightning.files import load_json

CARD = "README.md"
_PACKAGES = ("remax-lightning", "torch", "transformers", "lightning", "peft")
_FIGURES = ("reward", "baseline_reward", "kl", "accuracy", "loss")
"""What the card shows of the stages `train` and `val`, in this order."""
MAX_POINTS = 256
"""Values of a curve that are kept for the card."""
_BARS, _BAR_COLUMNS = "▁▂▃▄▅▆▇█", 32
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class LoggedFigure(NamedTuple):
    """The course of one logged figure.

    Args:
        first: optimizer step and value when it was first seen.
        last: the same of the latest.
        best: the same of the best: the highest, of a loss the lowest. None of a KL, which is better in no direction.
        course: its values so far, thinned where they are many; empty of checkpoints of earlier versions.
    """

    first: tuple[int, float]
    last: tuple[int, float]
    best: tuple[int, float] | None
    course: Sequence[tuple[int, float]] = ()


class CardFacts(NamedTuple):
    """What a card says.

    Args:
        base_model: folder or hub name of the model at the start of training.
        trained_with: name of the Lightning module.
        is_adapter: whether the folder holds a LoRA adapter alone.
        is_language_model: whether the model generates text; a reward model does not.
        data: files, or names on the hub, of the training rows.
        reward: what the reward is, in a few words; empty without one.
        figures: figures by log key.
        evaluation: the file that `remax test` wrote; empty without one.
        command: the arguments of the process, the program first; empty if unknown.
    """

    base_model: str
    trained_with: str
    is_adapter: bool
    is_language_model: bool
    data: Sequence[str]
    reward: str
    figures: Mapping[str, LoggedFigure]
    evaluation: Mapping[str, Any]
    command: Sequence[str]


def write_model_card(folder: Path, describe: Callable[[], CardFacts]) -> None:
    """Write README.md into an exported folder, without network. A failure is a warning: the model counts.

    Args:
        folder: the folder of the model; a card of PEFT in it is replaced.
        describe: returns the facts; what it raises is a failure, too.
    """
    from lightning.pytorch.utilities import rank_zero_warn  # late: reading a model must not load Lightning

    try:
        from huggingface_hub import ModelCard

        # The class parses the metadata, so that a card which the hub could not read is not written.
        ModelCard(render_card(describe())).save(folder / CARD)
    except Exception as error:
        rank_zero_warn(f"export: no model card was written ({type(error).__name__}: {error}). The model is whole.")


def update_figures(figures: dict[str, LoggedFigure], step: int, metrics: Mapping[str, Any], stage: str) -> None:
    """Add the present values of the figures that a card shows.

    Args:
        figures: figures by log key; changed in place.
        step: the optimizer step.
        metrics: values by log key; the others are left out.
        stage: `train` or `val`.
    """
    for name in (f"{stage}/{suffix}" for suffix in _FIGURES):
        value = float(metrics[name]) if name in metrics else float("nan")
        if value != value:  # NaN: nothing to show
            continue
        here, old = (step, value), figures.get(name)
        best: tuple[int, float] | None = here if old is None else old.best
        if name.endswith("/kl"):
            best = None
        elif best is not None and (value < best[1] if name.endswith("/loss") else value > best[1]):
            best = here
        course = [] if old is None else [point for point in old.course if point[0] != step]  # told again at the end
        course.append(here)
        if len(course) > MAX_POINTS:  # every second one, and the first and the last
            course = [course[0], *course[2:-1:2], course[-1]]
        figures[name] = LoggedFigure(here if old is None else old.first, here, best, course)


def read_evaluation(folder: Path) -> dict[str, Any]:
    """Return the latest `evaluation*.json` in the folder of a run, with its file name; empty if there is none."""
    files = sorted(folder.glob("evaluation*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        return {}
    return {"file": files[-1].name, **load_json(files[-1].read_text(encoding="utf-8"))}


# ---- Text ----


def render_card(facts: CardFacts) -> str:
    """Return the card as Markdown, with the metadata of the hub at its beginning."""
    sections = (_head(facts), _usage(facts), _origin(facts), _course(facts.figures), _evaluation(facts.evaluation))
    body = "\n\n".join(part for part in (*sections, _license()) if part)
    return f"---\n{_metadata(facts)}\n---\n\n{body}\n"


def _metadata(facts: CardFacts) -> str:
    from huggingface_hub import ModelCardData

    # The hub refuses names that it cannot have, such as local folders; those are in the text alone.
    base = facts.base_model if _is_hub_name(facts.base_model) else None
    data = ModelCardData(
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="text-generation" if facts.is_language_model else "text-classification",
        tags=["remax-lightning", *(["lora"] if facts.is_adapter else [])],
        base_model=base,
        base_model_relation=None if base is None else ("adapter" if facts.is_adapter else "finetune"),
        datasets=[name for name in facts.data if _is_hub_name(name)] or None,
    )
    return data.to_yaml()


def _is_hub_name(name: str) -> bool:
    # "prompts/train.jsonl" has the form of a name, too
    is_file = Path(name).exists() or re.search(r"\.(jsonl?|csv|tsv|parquet|arrow|txt|gz|zst|xz)$", name) is not None
    return _HUB_NAME.fullmatch(name) is not None and not name.startswith(".") and not is_file


def _head(facts: CardFacts) -> str:
    kind = "A LoRA adapter" if facts.is_adapter else "A model" if facts.is_language_model else "A reward model"
    name = Path(facts.base_model).name or "Model"
    title = f"# {_line(name)}, trained with remax-lightning"
    return f"{title}\n\n{kind} of `{facts.trained_with}`, from {_code(facts.base_model)}."


def _usage(facts: CardFacts) -> str:
    if not facts.is_language_model:
        return ""
    note = "The base is loaded by its name, which needs `pip install peft`.\n\n" if facts.is_adapter else ""
    return (
        f"## Use\n\n{note}```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder, or its name on the hub\n'
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n```"
    )


def _origin(facts: CardFacts) -> str:
    rows = [("base model", _code(facts.base_model)), ("module", _code(facts.trained_with))]
    rows.append(("data", ", ".join(map(_code, facts.data)) or "not known"))
    if facts.reward:
        rows.append(("reward", _code(facts.reward)))
    rows.append(("versions", ", ".join(f"{name} {number}" for name, number in _versions())))
    table = _table(("", "value"), rows)
    command = f"\n\n```console\n{_command(facts.command)}\n```" if facts.command else ""
    return f"## Training\n\n{table}{command}"


def _versions() -> Iterable[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:  # such as a checkout that is not installed
            continue


def _command(arguments: Sequence[str]) -> str:
    """Return the command with the values of options that look like secrets replaced: cards are published."""
    shown = [Path(arguments[0]).name]
    hide = False
    for argument in arguments[1:]:
        name, equals, _ = argument.partition("=")
        is_option = argument.startswith("-")
        # A section in braces may hold one anywhere.
        hides = (is_option and is_secret(name)) or ("{" in argument and has_secret(argument))
        if hides and is_option and equals:
            shown.append(f"{name}=***")
        elif (hide or hides) and not is_option:
            shown.append("***")
        else:
            shown.append(hide_credentials(argument))
        hide = hides and is_option and not equals
    return _line(shlex.join(shown)).replace("`", "'")


def _course(figures: Mapping[str, LoggedFigure]) -> str:
    names = [f"{stage}/{name}" for stage in ("train", "val") for name in _FIGURES]
    # The loss of a policy gradient says nothing about progress.
    names = [name for name in names if name in figures and not (name.endswith("/loss") and _has_reward(figures, name))]
    if not names:
        return ""
    rows = [(_code(name), *map(_at, figures[name][:3]), draw_course(figures[name].course)) for name in names]
    heads = ("", "first", "last", "best", "course, from lowest to highest")
    return f"## Figures of the run\n\nWith the optimizer step.\n\n{_table(heads, rows)}"


def draw_course(course: Sequence[tuple[int, float]]) -> str:
    """Return a curve as a line of bars, each the mean over a range of steps; empty where there is one value."""
    if len(course) < 2:
        return ""
    # ---- Means over equal ranges of steps; a range without a value has that of the one before ----
    first, last = course[0][0], course[-1][0]
    columns: list[list[float]] = [[] for _ in range(min(_BAR_COLUMNS, len(course)))]
    for step, value in course:
        columns[min(len(columns) * (step - first) // max(last - first, 1), len(columns) - 1)].append(value)
    heights: list[float] = []
    for values in columns:
        heights.append(sum(values) / len(values) if values else heights[-1])
    # ---- From the lowest to the highest ----
    low, high = min(heights), max(heights)
    top = len(_BARS) - 1
    return "".join(_BARS[round(top * (height - low) / (high - low)) if high > low else top // 2] for height in heights)


def _has_reward(figures: Mapping[str, LoggedFigure], name: str) -> bool:
    return f"{name.partition('/')[0]}/reward" in figures


def _at(point: tuple[int, float] | None) -> str:
    return "-" if point is None else f"{point[1]:.4g} ({point[0]})"


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    figures = evaluation.get("figures")
    if not figures:
        return ""
    rows = []
    for name, figure in figures.items():
        low, high = figure.get("low"), figure.get("high")
        interval = f"{low:.4g} to {high:.4g}" if low is not None and high is not None else ""
        rows.append((_code(name), _number(figure.get("value")), interval, str(figure.get("n", ""))))
    # Which weights were measured: the evaluation may be of another checkpoint of the run.
    what = f"{_code(str(evaluation.get('checkpoint') or 'the loaded policy'))}, {evaluation.get('num_prompts')} prompts"
    return f"## Evaluation\n\nOf {what}.\n\n{_table(('', 'value', '95 % interval', 'n'), rows)}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _license() -> str:
    return (
        "## License\n\nNot set: add `license` to the metadata of this file. The licenses of the base model and of the"
        " data apply, too."
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _code(text: str) -> str:
    return f"`{_line(text).replace('`', chr(39))}`"


def _line(text: str) -> str:
    return " ".join(text.split())[:1000]
