"""`remax fit`, `validate`, `test` and `predict`: Lightning's command line with the classes of this package."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers.utils.logging import disable_progress_bar

from remax_lightning import callbacks, data, launcher, loggers, modules, rewards, rollout, strategies
from remax_lightning.callbacks.run_progress import RunBar, messages_above_bars
from remax_lightning.cli_errors import user_error_message
from remax_lightning.cli_exit import current_rank, stage
from remax_lightning.cli_help import RUNS
from remax_lightning.cli_parser import RemaxParser
from remax_lightning.errors import RankError, UserError
from remax_lightning.files import silence_tensorboard_thread
from remax_lightning.models.checkpoint_reader import inspect_checkpoint
from remax_lightning.models.checksums import check_whole
from remax_lightning.run_folder import continue_run, earlier_checkpoint_folders, folder_of_checkpoint, run_folder
from remax_lightning.shipped_configs import config_folder

CALLBACKS = {
    "kl_monitor": callbacks.KLMonitor,
    "samples": callbacks.SampleDump,
    "baseline_monitor": callbacks.BaselineMonitor,
    "gradient_variance": callbacks.GradientVariance,
    "collapse": callbacks.CollapseDetector,
    "throughput": callbacks.Throughput,
    "export": callbacks.ExportPolicy,
    "tensorboard": callbacks.TensorBoardReport,
    "predictions": callbacks.PredictionWriter,
    "evaluation": callbacks.Evaluation,
    "lm_eval": callbacks.LMEval,
    "progress": callbacks.RunProgress,
}
"""The callbacks of this package by their configuration key. Those of a user are listed in `trainer.callbacks`."""

# Imported so that short class names work as `class_path`.
KNOWN = (data, loggers, modules, rewards, rewards.HTTPReward, rewards.JudgeReward, rollout)


def _tokenizer_path(module: Any, data: Any) -> str | None:
    """Return the tokenizer path of the module's model; for a module without a model, that of the data module."""
    key = _tokenizer_key(module)
    if key == "data.tokenizer":
        return cast("str | None", data.get("tokenizer"))
    return str(module.get("tokenizer") or module[key.split(".")[1]]["path"])


def _tokenizer_key(module: Any) -> str:
    """Return the key that the path of the tokenizer stands at, by the arguments of the module."""
    # The policy of ReMax and SFT, the reward model of its own stage.
    for name in ("policy", "reward_model"):
        if isinstance(module.get(name), Mapping | Namespace):
            return "model.tokenizer" if module.get("tokenizer") else f"model.{name}.path"
    return "data.tokenizer"


def computes_in_bfloat16(accelerator: Any) -> bool:
    """Whether a run with this `trainer.accelerator` takes GPUs that compute in bfloat16."""
    if accelerator not in (None, "auto", "gpu", "cuda") or not torch.cuda.is_available():
        return False
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def progress_bar_options(options: Any) -> dict[str, Any]:
    """Return the options of the trainer that choose its bar; none where the configuration chooses.

    On a terminal it is tqdm's, which leaves room for the bars of rollouts; Lightning would take rich's where rich is
    installed. A log file has no use for a bar: `RunProgress` prints lines there.

    Args:
        options: `trainer` of the configuration, its callbacks made.
    """
    given = options.get("callbacks") or []
    given = list(given) if isinstance(given, list | tuple) else [given]
    has_bar = any(isinstance(callback, ProgressBar) for callback in given)
    if has_bar or options.get("barebones") or options.get("enable_progress_bar") is not None:
        return {}
    return {"callbacks": [*given, RunBar()]} if sys.stdout.isatty() else {"enable_progress_bar": False}


class _SaveConfig(SaveConfigCallback):
    """Saves the configuration in the folder of the run, and never overwrites a file."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.already_saved:
            return
        self.already_saved = True
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            # A run that is resumed in its folder keeps the configurations of its earlier starts.
            names = ("config.yaml", *(f"config_{number}.yaml" for number in range(1, 10_000)))
            path = next(folder / name for name in names if not (folder / name).exists())
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(path), skip_none=False, multifile=self.multifile)


class RemaxCLI(LightningCLI):
    """LightningCLI with defaults from `configs/base.yaml`, and one tokenizer for module and data."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Create the parser around those of the subcommands."""
        return super().init_parser(prog="remax", **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give each callback of this package a key, so that overlays can change single options."""
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        cast(RemaxParser, parser).checked_callbacks = CALLBACKS
        # data.tokenizer follows from the model, so that both read the same token ids.
        parser.link_arguments(
            ("model.init_args", "data.init_args"),
            "data.init_args.tokenizer",
            compute_fn=_tokenizer_path,
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the trainer; its errors are mistakes in the configuration."""
        stage.name = "trainer"
        options: Any = self._get(self.config_init, "trainer") or {}
        if options.get("precision") is None and computes_in_bfloat16(options.get("accelerator")):
            # Half of the memory of activations, and twice the speed or more; weights and optimizer stay in float32.
            kwargs = {"precision": "bf16-mixed"} | kwargs
        try:
            # Lightning's strategy of the same name needs a GPU, and divides the loss twice.
            if (strategy := strategies.strategy_of_name(options.get("strategy"))) is not None:
                kwargs = {"strategy": strategy} | kwargs
            trainer = super().instantiate_trainer(**progress_bar_options(options) | kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise UserError(str(error) if isinstance(error, UserError) else f"trainer: {error}") from error
        stage.trainer = trainer
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Check that the checkpoint is whole and runs no code, and take nothing from it: the configuration counts.

        Lightning would read it all, and its hyper-parameters would override the command line.
        """
        # ---- A path: not a word that Lightning resolves later, nor an address ----
        subcommand = self.config.get("subcommand")
        given = self.config[subcommand].get("ckpt_path") if subcommand else None
        if given == "best":  # Lightning asks the ModelCheckpoint of this process, which has trained nothing yet
            raise UserError(
                "ckpt_path: best is known only to a trainer that has trained; give the path of a checkpoint, or last"
            )
        path = "hpc" if given is None else str(given)
        if not path.strip():
            raise UserError("ckpt_path: expected the path of a checkpoint, or last, got nothing")
        strategies.check_address(path)
        if path in ("last", "hpc") or "://" in path or path.startswith("registry"):
            return
        # ---- It must exist, hold plain tensors, and be whole ----
        strategies.recover_interrupted(Path(path).parent)
        if not Path(path).exists():
            raise UserError(f"ckpt_path: there is no checkpoint {path!r}; give the path of a checkpoint, or last")
        if not launcher.is_launched():
            inspect_checkpoint(Path(path))
            if Path(path).is_file():  # the files of a folder are shared among the ranks when they load it
                check_whole(Path(path), "ckpt_path")

    def instantiate_classes(self) -> None:
        """Create trainer, module and data, and resolve `ckpt_path: last`."""
        # ---- A logger without its package would fail with its own long advice ----
        config = self.config[self.subcommand] if self.subcommand else self.config
        loggers.check_loggers(config.get("trainer.logger"))
        stage.name = "model or data"  # made first, by the parser; the trainer follows
        super().instantiate_classes()
        if isinstance(self.datamodule, data.TextDataModule):
            self.datamodule.tokenizer_key = _tokenizer_key(config.get("model.init_args") or {})
        arguments = self.config_init.get(self.subcommand) if self.subcommand else None
        if arguments is None:
            return
        is_last = arguments.get("ckpt_path") == "last"
        if is_last:
            arguments["ckpt_path"] = self._last_checkpoint()
        if self.subcommand == "fit":
            self._choose_checkpointing()
            self._continue_run(arguments.get("ckpt_path") or self._requeued_checkpoint(), is_last)

    def _choose_checkpointing(self) -> None:
        """Decide `gradient_checkpointing: auto` by the plan; where it cannot be planned, checkpointing is on."""
        source = getattr(self.model, "policy_source", None)
        if not isinstance(self.model, modules.ReMaxModule) or source is None or source.gradient_checkpointing != "auto":
            return
        from remax_lightning.tools.plan import command, run_config

        if self.trainer.strategy.root_device.type != "cuda":
            self.model.policy_source = replace(source, gradient_checkpointing=False)
            return
        chosen = {"precision": self.trainer.precision, "devices": self.trainer.num_devices}
        trainer = dict(self.config_init["fit"]["trainer"]) | chosen
        try:
            planned = run_config.planned_run(trainer, self.model, self.datamodule)
            reason, _ = command.choose_checkpointing(planned, command.device_memory())
        except UserError as error:
            self.model.policy_source = replace(source, gradient_checkpointing=True)
            reason = f"model.policy.gradient_checkpointing: auto is true, because the run cannot be planned: {error}"
        rank_zero_info(reason)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the subcommand. A failure of a process that Lightning started is a failure of the command."""
        # made before the run starts them
        launched = launcher.ChildProcesses(self.trainer)
        stage.name = subcommand
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            is_told = isinstance(error, RankError) or user_error_message(error) is not None
            if not is_told and (end := launched.end_of_another()):
                raise end from None  # the error here is only its consequence
            raise
        if any(launched.exit_codes()):
            raise SystemExit(1)

    def _requeued_checkpoint(self) -> str | None:
        """Return the checkpoint that Lightning loads in a requeued SLURM job without being told."""
        return self.trainer._checkpoint_connector._hpc_resume_path if SLURMEnvironment.detect() else None

    def _continue_run(self, checkpoint: str | None, is_last: bool) -> None:
        """Go on in the folder of the run that saved the checkpoint, if nothing there would be overwritten.

        From an earlier checkpoint than its run's latest, a new run branches off.
        """
        if checkpoint is None or launcher.is_launched() or not Path(checkpoint).exists():
            return
        path = Path(checkpoint)
        info = inspect_checkpoint(path)
        folder = folder_of_checkpoint(path, info.run_folder)
        if folder is None:
            return
        latest = None if is_last else strategies.latest_checkpoint([path.parent], requeued=path.parent)
        if latest is not None and (step := inspect_checkpoint(latest).step) > info.step:
            reason: str | None = f"{folder} goes on to optimizer step {step}"
        else:
            reason = continue_run(self.trainer, folder, info.step)
        if reason is None:
            rank_zero_info(f"This run continues {folder} at optimizer step {info.step}.")
        else:
            rank_zero_info(f"A new run starts from {path}, in a folder of its own, because {reason}.")

    def _last_checkpoint(self) -> str | None:
        """Return the latest complete checkpoint of this run and of earlier runs, whatever its name.

        Lightning would only look for `last.ckpt` in the folder of this run, which is new.
        """
        if launcher.is_launched():  # it is read to its end once, by the process that started this one
            return launcher.last_checkpoint()
        # ---- Find it, and tell the processes that this one starts ----
        folders = earlier_checkpoint_folders(self.trainer)
        checkpoint = strategies.latest_checkpoint(folders, requeued=Path(self.trainer.default_root_dir))
        launcher.tell_last_checkpoint(checkpoint)
        if checkpoint is not None:
            return str(checkpoint)
        # ---- There is none: a new run can start without, an evaluation cannot ----
        if self.subcommand != "fit":
            raise UserError(
                "ckpt_path is last, but there is no checkpoint of an earlier run; give the path of a checkpoint"
            )
        rank_zero_warn("ckpt_path is last, but there is no checkpoint of an earlier run: this run starts from scratch.")
        return None


def run(args: list[str] | None = None, kind: type[RemaxCLI] = RemaxCLI) -> RemaxCLI:
    """Run one of Lightning's subcommands and return the command line with its trainer, module and data.

    Args:
        args: the arguments after `remax`; None takes those of the process.
        kind: the class that reads the configuration and creates the objects.
    """
    silence_library_warnings()
    silence_tensorboard_thread()  # before a logger is made, whose thread may meet a full disk at once
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        # Classes of a user may be in the current folder. It comes last, so that no file there hides an installed
        # package.
        sys.path.append(str(Path.cwd()))
    if args is None and "--help-all" in sys.argv:
        # cli.py answers --help itself, with the keys that most runs set
        sys.argv = [argument.replace("--help-all", "--help") for argument in sys.argv]
    base = str(config_folder() / "base.yaml")
    with messages_above_bars():
        return kind(
            LightningModule,
            LightningDataModule,
            parser_class=RemaxParser,
            save_config_callback=_SaveConfig,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_kwargs={name: {"default_config_files": [base]} for name in RUNS},
            args=args,
        )


class _ParserMade(Exception):  # noqa: N818 - nothing went wrong
    """Ends the command line as soon as it has its parser."""

    def __init__(self, parser: RemaxParser) -> None:
        super().__init__()
        self.parser = parser


class _ParserOnly(RemaxCLI):
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        raise _ParserMade(cast(RemaxParser, parser))


def command_parser() -> RemaxParser:
    """Return the parser of `remax fit`, `validate`, `test` and `predict`, which nothing has been read with."""
    try:
        run([], _ParserOnly)
    except _ParserMade as made:
        return made.parser
    raise AssertionError("LightningCLI parses what it is given")


def silence_library_warnings() -> None:
    """Silence warnings of libraries about each other, which a user cannot fix."""
    for message in (
        "'set_vital' is deprecated",
        r".*isinstance\(treespec, LeafSpec\)",
        "`is_gradient_checkpointing` is deprecated",
        "LightningCLI's args parameter",
        "Total length of `list` across ranks is zero",  # of a run without validation rows
        "`is_gradient_checkpointing` is deprecated",  # asked by PEFT of transformers
    ):
        warnings.filterwarnings("ignore", message=message)
    for name, text in (("lightning.pytorch.utilities.rank_zero", "Tip:"), ("DeepSpeed", "Setting accelerator to CPU")):
        logging.getLogger(name).addFilter(partial(_does_not_mention, text))
    if not sys.stderr.isatty() or current_rank():
        disable_progress_bar()  # of loading models and downloads: one process shows them, and no log file


def _does_not_mention(text: str, record: logging.LogRecord) -> bool:
    return text not in record.getMessage()
