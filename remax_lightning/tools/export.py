"""`remax export`: export a checkpoint of any strategy for transformers, as a full model or as an adapter of PEFT."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from remax_lightning.callbacks.export_policy import write_folder_atomically
from remax_lightning.cli_run import silence_library_warnings
from remax_lightning.data.tokenizers import load_tokenizer
from remax_lightning.errors import UserError
from remax_lightning.files import TRUST, first_existing
from remax_lightning.models import ModelConfig
from remax_lightning.models.checkpoint_reader import read_weights
from remax_lightning.models.hf_export import deduplicate_tied, save_policy
from remax_lightning.models.lora import adapter_dtype, check_mergeable, contains_adapter, load_adapter
from remax_lightning.models.model_card import CardFacts, LoggedFigure, read_evaluation, update_figures, write_model_card
from remax_lightning.sharding import nonfinite_name
from remax_lightning.tools.parsers import export_parser
from remax_lightning.tools.report import run as report
from remax_lightning.yaml_files import read_yaml

POLICY = "policy."
"""Prefix of the names of the policy's weights in a checkpoint."""
_CONFIG = re.compile(r"config(_\d+)?\.yaml")
_LEVELS = 3
"""Number of parent folders of a checkpoint in which its configuration is searched."""
_SOURCE_KEYS = ("path", "dtype", "disable_dropout", "revision", "trust_remote_code", "allow_pickle")
"""Keys of `model.policy` that say where the model comes from; the others are about training."""


class Run(NamedTuple):
    """The settings of the policy in the configuration of a run.

    Args:
        source: the model at the start of training.
        tokenizer: folder or hub name.
        pad_token: `data.loading.pad_token`.
        lora: `model.policy.lora`; empty without one.
        quantization: `model.policy.quantization`, the format of the base while an adapter was trained.
    """

    source: ModelConfig
    tokenizer: str
    pad_token: str | None
    lora: dict[str, Any]
    quantization: str | None


def main(args: Sequence[str]) -> None:
    """Write the policy of a checkpoint, with tokenizer and generation settings, so that `from_pretrained` reads it.

    Reads checkpoints of one process, DDP, DeepSpeed ZeRO-1, 2 and 3 and FSDP2. A LoRA adapter is written
    alone, in PEFT's format. Memory holds one copy of the model, and the shards of one rank at a time.

    Args:
        args: the arguments after `remax export`.
    """
    # ---- Options; the folder is checked before anything is read ----
    options = export_parser().parse_args(args)
    silence_library_warnings()
    out = check_target(options.out, options.checkpoint, options.overwrite)
    # ---- Read: weights of the checkpoint, settings of its run, tokenizer ----
    weights = read_weights(options.checkpoint, POLICY, trusted=options.trust_checkpoint)
    config = options.config or find_config(options.checkpoint)
    run = read_run(config)
    if run.source.trust_remote_code and not options.trust_checkpoint:
        raise UserError(
            f"{config}: model.policy.trust_remote_code is true, so that code which comes with {run.source.path!r} would"
            f" run; the file of a run says what its author trusted: if you trust it, too, add {TRUST}"
        )
    tokenizer = load_tokenizer(
        run.tokenizer,
        trust_remote_code=run.source.trust_remote_code,
        revision=run.source.revision,
        pad_token=run.pad_token,
        key="model.tokenizer",
    )
    # ---- Write: the adapter alone, or the full model with an adapter merged; each with a model card ----
    if contains_adapter(weights):
        # of an adapter: the weights of its base are not in the checkpoint
        _check_finite(weights.items(), options.checkpoint)
    adapter_alone = contains_adapter(weights) and not options.merge
    describe = partial(_describe, config, run, adapter_alone)
    if adapter_alone:
        adapter = _adapter_model(weights, run)

        def write(folder: Path) -> None:
            adapter.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            write_model_card(folder, describe)

    else:
        model, whole = _merged_model(weights, run) if options.merge else _full_model(weights, run)
        if whole is not None:
            _check_finite(((name, whole[name]) for name, _ in model.named_parameters()), options.checkpoint)

        def write(folder: Path) -> None:
            save_policy(model, tokenizer, whole, folder, max_shard_size=options.max_shard_size)
            write_model_card(folder, describe)

    write_folder_atomically(out, write)
    print(f"Exported the {'adapter' if adapter_alone else 'policy'} of {options.checkpoint} to {options.out}.")


def _describe(path: Path, run: Run, is_adapter: bool) -> CardFacts:
    """Return what the model card says, from the folder of the run: its configuration, curves and evaluation."""
    # ---- Configuration ----
    config = read_yaml(path)
    model, data = (_section(config, name) for name in ("model", "data"))
    paths, reward = data.get("path") or [], model.get("reward") or ""
    if isinstance(reward, dict):  # the name of the class and its model; other arguments may be secrets
        name = str(reward.get("class_path", "")).rpartition(".")[2]
        reward = f"{name} {_section(model, 'reward').get('path') or ''}".strip()
    # ---- Curves: first, last and best ----
    figures: dict[str, LoggedFigure] = {}
    try:
        curves = report.read_run(path.parent).curves
    except UserError:  # a run without a log
        curves = {}
    for name, curve in curves.items():
        for step, value in zip(curve.steps, curve.values, strict=True):
            update_figures(figures, step, {name: value}, name.partition("/")[0])
    return CardFacts(
        base_model=run.source.path,
        trained_with=str((config.get("model") or {}).get("class_path") or "ReMaxModule").rpartition(".")[2],
        is_adapter=is_adapter,
        is_language_model=True,
        data=[paths] if isinstance(paths, str) else [str(item) for item in paths],
        reward=str(reward),
        figures=figures,
        evaluation=read_evaluation(path.parent),
        command=sys.argv,
    )


def check_target(out: Path, checkpoint: Path, overwrite: bool) -> Path:
    """Return the resolved folder to write to.

    Args:
        out: the folder that the user names.
        checkpoint: the checkpoint that is read; `out` must not contain it.
        overwrite: whether a non-empty folder may be replaced.

    Raises:
        UserError: if `out` is a file, is not empty, or contains the checkpoint or the current folder.
    """
    # Replacing the folder removes what is in it, so it must not hold the checkpoint or the current folder.
    target = out.resolve()
    if target in (checkpoint.resolve(), *checkpoint.resolve().parents, *Path.cwd().resolve().parents, Path.cwd()):
        raise UserError(
            f"out must be a new folder, got {str(out)!r}, which contains the checkpoint or the current folder"
        )
    if not (first := first_existing(target)).is_dir():
        raise UserError(
            f"out must be a folder, and {str(out if first == target else first)!r} is a file; give another name"
        )
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"out: {str(out)!r} is not empty; give another folder, or --overwrite to replace it")
    return target


def find_config(checkpoint: Path) -> Path:
    """Return the configuration that the command line saved in the folder of the run.

    Raises:
        UserError: if there is none, or if there are several with different policies.
    """
    # A run that was resumed in its folder has config.yaml, config_1.yaml, ...
    for folder in checkpoint.absolute().parents[:_LEVELS]:
        paths = [path for path in sorted(folder.glob("config*.yaml")) if _CONFIG.fullmatch(path.name)]
        if not paths:
            continue
        runs = [read_run(path) for path in paths]
        if any(run != runs[0] for run in runs):
            names = ", ".join(path.name for path in paths)
            raise UserError(f"--config must be one of {names} in {folder}, because their policies differ")
        return paths[0]
    raise UserError(
        f"--config must be the configuration of the run of {str(checkpoint)!r}: there is no config.yaml in the"
        " folders above it"
    )


def read_run(path: Path) -> Run:
    """Read the settings of the policy from a configuration.

    Raises:
        UserError: if the file cannot be read or has no policy.
    """
    try:
        config = read_yaml(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config: {str(path)!r} cannot be read: {str(error).splitlines()[0]}") from error
    # ---- Sections of the configuration, in the form of a class or of plain keys ----
    model, data = (_section(config, name) for name in ("model", "data"))
    policy = _section(model, "policy")
    if not isinstance(policy.get("path"), str):
        raise UserError(f"--config: {str(path)!r} has no model.policy.path; give the configuration of the run")
    return Run(
        source=ModelConfig(**{name: policy[name] for name in _SOURCE_KEYS if name in policy}),
        tokenizer=model.get("tokenizer") or policy["path"],
        pad_token=_section(data, "loading").get("pad_token"),
        lora=_section(policy, "lora"),
        quantization=policy.get("quantization"),
    )


def _section(config: Any, name: str) -> dict[str, Any]:
    """Return a section of the configuration; for a class, the section `init_args` in it."""
    # {"path": ...}, or {"class_path": ..., "init_args": {"path": ...}}
    value = config.get(name) if isinstance(config, dict) else None
    value = value if isinstance(value, dict) else {}
    inner = value.get("init_args")
    return inner if isinstance(inner, dict) else value


def _check_finite(weights: Iterable[tuple[str, Tensor]], checkpoint: Path) -> None:
    if name := nonfinite_name(weights):
        raise UserError(f"checkpoint: {name} in {str(checkpoint)!r} is not finite; export an earlier checkpoint")


def _full_model(weights: dict[str, Tensor], run: Run) -> tuple[Any, dict[str, Tensor]]:
    """Return the model on the meta device, and its full weights from the checkpoint."""
    dtype = next((value.dtype for value in weights.values() if value.is_floating_point()), torch.float32)
    model: Any = run.source.empty_model("model.policy", dtype)
    # With `keep_vars` tied names have the same parameter, so they can be told by its id.
    parameters: dict[str, Tensor] = model.state_dict(keep_vars=True)
    shared = deduplicate_tied(model, weights)
    tensors = {id(parameters[name]): shared[name] for name in shared}  # one per parameter, also if tied
    # ---- Every difference between checkpoint and model is an error ----
    for names, problem in (
        ([name for name, parameter in parameters.items() if id(parameter) not in tensors], "lacks"),
        ([name for name in weights if name not in parameters], "has, unlike model.policy.path,"),
        ([name for name in shared if shared[name].shape != parameters[name].shape], "has in another shape"),
        (
            [
                name
                for name in shared
                if shared[name] is not weights[name] and not torch.equal(shared[name], weights[name])
            ],
            "has untied, contrary to the configuration of the model,",
        ),
    ):
        if names:
            raise UserError(
                f"checkpoint: it {problem} {len(names)} weights ({', '.join(names[:3])}); give the configuration of its"
                " run with --config"
            )
    return model, {name: tensors[id(parameter)] for name, parameter in parameters.items()}


def _adapter_model(weights: dict[str, Tensor], run: Run) -> Any:
    """Return the adapter around a model without weights."""
    return load_adapter(run.source.empty_model("model.policy", adapter_dtype(weights)), weights, run.lora)


def _merged_model(weights: dict[str, Tensor], run: Run) -> tuple[Any, None]:
    """Return the base with the adapter merged into its weights."""
    if not contains_adapter(weights):
        raise UserError("--merge needs a checkpoint with a LoRA adapter, but this one has full weights; leave it out")
    if run.quantization is not None:
        raise UserError(
            f"model.policy.quantization is {run.quantization}: the adapter was trained on a quantized base and"
            " would be merged into a different one; export it without --merge, or use the export of the run itself"
        )
    # ---- The base, in the dtype of the adapter ----
    default = torch.get_default_dtype()
    torch.set_default_dtype(adapter_dtype(weights))  # the dtype in which the run loaded the base
    try:
        base = run.source.load("model.policy")
    finally:
        torch.set_default_dtype(default)
    adapted = load_adapter(base, weights, run.lora)
    check_mergeable(adapted, "--merge")
    return adapted.merge_and_unload(safe_merge=True), None
