"""`remax lm-eval`: measure an exported policy with the tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import torch

from remax_lightning.config import WeightDType
from remax_lightning.data.tokenizers import load_tokenizer
from remax_lightning.errors import UserError
from remax_lightning.evaluation.harness import (
    HarnessOptions,
    TaskFigure,
    format_figures,
    load_tasks,
    measure,
    task_figures,
)
from remax_lightning.files import describe_disk_error, load_json
from remax_lightning.models import ModelConfig
from remax_lightning.models.checksums import check_exported
from remax_lightning.tools.parsers import lm_eval_parser

_PACKAGES = ("remax-lightning", "lm_eval", "transformers", "torch", "peft")


def main(args: Sequence[str]) -> None:
    """Measure an exported policy, a full model or an adapter, with tasks of lm-evaluation-harness.

    Prints a table with standard errors and writes the same figures as JSON beside the folder. Needs the extra lm-eval
    of this package.

    Args:
        args: the arguments after `remax lm-eval`.
    """
    options = lm_eval_parser().parse_args(args)
    # ---- What can be wrong before anything is loaded ----
    harness_options = HarnessOptions(
        options.limit,
        options.num_fewshot,
        options.batch_size,
        options.apply_chat_template,
        options.confirm_run_unsafe_code,
        key="--",
    )
    output = _output_file(options.folder, options.output)
    base = _base_of(options.folder, options.base)
    specs = [spec.strip() for text in options.tasks for spec in text.split(",") if spec.strip()]
    if not specs:
        raise UserError("--tasks must name at least one task, such as hellaswag, or a YAML file")
    device = _device(options.device)
    # ---- Tasks, model, tokenizer ----
    tasks = load_tasks(specs, "--tasks")
    dtype, trusted = options.dtype, options.trust_checkpoint
    model = _load_policy(options.folder, base, dtype, trusted).to(device).eval()
    tokenizer = load_tokenizer(str(options.folder), trust_remote_code=trusted, pad_token="eos", key="FOLDER")
    # ---- Figures ----
    results = measure(model, tokenizer, tasks, harness_options)
    figures = task_figures(results)
    print(f"\nlm-eval of {options.folder}\n\n{format_figures(figures)}\n")
    settings = {"tasks": specs, "dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
    settings |= {name: getattr(options, name) for name in ("limit", "num_fewshot", "batch_size", "apply_chat_template")}
    answer = {
        "model": str(options.folder),
        "base": base,
        "figures": _by_task(figures),
        "settings": settings,
        "task_versions": results.get("versions", {}),
        "num_fewshot": results.get("n-shot", {}),
        "packages": dict(filter(None, map(_version, _PACKAGES))),
    }
    _write(output, answer)
    print(f"Wrote {output}.")


def _output_file(folder: Path, chosen: Path | None) -> Path:
    """Return a file that does not exist: the chosen one, or the first free one beside the folder."""
    if chosen is not None:
        if chosen.exists():
            raise UserError(f"--output must be a new file, and {str(chosen)!r} exists; give another name")
        return chosen
    folder = folder.resolve()
    numbers = ("", *(f"_{number}" for number in range(1, 10_000)))
    names = (folder.with_name(f"{folder.name}_lm_eval{number}.json") for number in numbers)
    return next(name for name in names if not name.exists())


# ---- The policy ----


def _base_of(folder: Path, chosen: str | None) -> str | None:
    """Return the base of an adapter, None of a full model.

    Raises:
        UserError: if the folder holds neither, or an adapter without its base.
    """
    if not folder.is_dir():
        raise UserError(f"FOLDER: there is no folder {str(folder)!r}; give an exported policy, such as policy/best")
    adapter = folder / "adapter_config.json"
    if (folder / "config.json").is_file() or not adapter.is_file():
        if chosen is not None:
            raise UserError(f"--base must be left out, because {str(folder)!r} is no adapter; got {chosen!r}")
        if not (folder / "config.json").is_file():
            raise UserError(
                f"FOLDER: {str(folder)!r} has neither config.json nor adapter_config.json; give an exported policy, or"
                " write one with remax export"
            )
        return None
    base = chosen or load_json(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise UserError(f"--base must name the model of the adapter {str(folder)!r}, which does not say it")
    return str(base)


def _load_policy(folder: Path, base: str | None, dtype: Any, trusted: bool) -> Any:
    """Return the model; an adapter around its base, whose embeddings keep their size, as in training."""
    path = str(folder) if base is None else base
    key = "FOLDER" if base is None else "--base"
    source = ModelConfig(path, dtype=dtype or _saved_dtype(path, trusted), trust_remote_code=trusted)
    try:
        model = source.load(key)
    except UserError as error:  # which speaks of a key of a configuration
        raise UserError(str(error).replace(f"{key}.path", key)) from error
    if base is None:
        return model
    from peft import PeftModel

    check_exported(folder, "FOLDER")
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (OSError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(f"--base: the adapter {str(folder)!r} does not fit {base!r}: {text}") from error


def _saved_dtype(path: str, trusted: bool) -> Any:
    """Return the dtype that a model was saved in; None where its configuration does not say, or cannot be read."""
    from transformers import AutoConfig

    try:
        dtype = AutoConfig.from_pretrained(path, trust_remote_code=trusted).dtype
    except Exception:  # told when the model is loaded
        return None
    name = str(dtype).removeprefix("torch.")
    return name if name in get_args(WeightDType) else None


def _device(chosen: str | None) -> torch.device:
    name = chosen or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device must be a device of this machine, got {name!r} ({reason})") from error


# ---- The file ----


def _by_task(figures: Sequence[TaskFigure]) -> dict[str, dict[str, dict[str, float | int | None]]]:
    tasks: dict[str, dict[str, dict[str, float | int | None]]] = {}
    for figure in figures:
        values = {"value": figure.value, "stderr": figure.stderr, "n": figure.n}
        tasks.setdefault(figure.task, {})[figure.metric] = values
    return tasks


def _version(package: str) -> tuple[str, str] | None:
    try:
        return package, version(package)
    except PackageNotFoundError:  # such as a checkout that is not installed
        return None


def _write(path: Path, answer: dict[str, Any]) -> None:
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(answer, indent=2, default=str) + "\n", encoding="utf-8")
        new.replace(path)
    except OSError as error:
        raise UserError(f"--output: {describe_disk_error(error, path)}. The table above shows the figures") from error
