"""The `remax` command: Lightning's command line with the project's modules, data and callbacks wired in."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from jsonargparse import DefaultHelpFormatter
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from transformers.utils.logging import disable_progress_bar

from remax_lightning import callbacks, data, modules, rewards, rollout, strategies
from remax_lightning.cli_errors import RemaxParser, user_error_message
from remax_lightning.errors import RankError, RankUserError, UserError
from remax_lightning.strategies import process_watchdog as launcher
from remax_lightning.training.preemption import EXIT_CODE
from remax_lightning.training.resume import previous_checkpoint_folders

CALLBACKS = {
    "kl_monitor": callbacks.KLMonitor,
    "samples": callbacks.SampleDump,
    "baseline_monitor": callbacks.BaselineMonitor,
    "collapse": callbacks.CollapseDetector,
    "throughput": callbacks.Throughput,
    "export": callbacks.ExportPolicy,
    "tensorboard": callbacks.TensorBoardReport,
    "predictions": callbacks.PredictionWriter,
    "evaluation": callbacks.Evaluation,
}
"""The project's callbacks by the key that configures them; a user's own stand under `trainer.callbacks`."""

# Imported so that their short names work as `class_path`.
KNOWN = (data, modules, rewards, rollout)

TOOLS = {
    "compare": ("compare", "set the figures of two checkpoints side by side, with paired intervals"),
    "convert-reward": ("convert_reward", "write another project's reward model as a plain sequence classifier"),
    "demo": ("demo", "train a tiny policy on an embedded task, on a CPU in minutes"),
    "doctor": ("doctor", "check a configuration's models and data before any training"),
    "export": ("export", "write a checkpoint's policy as a Hugging Face folder"),
    "pipeline": ("pipeline", "go from generated preferences to an aligned policy in three stages, in minutes"),
    "plan": ("plan", "tell from a configuration what memory each device needs"),
    "report": ("report", "write a page about a run: curves, and samples to browse"),
}
"""Subcommands beyond Lightning's own: the module under `tools` that has their `main`, and what they are for."""

TOOL_MODULES = {"plan": "remax_lightning.tools.plan.command", "doctor": "remax_lightning.tools.doctor.command"}
"""Tools that are packages: the module with their `main`; any other is a file of `tools`."""


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the epilog."""


def config_folder() -> Path:
    """Return the folder of the shipped configurations, in a wheel or in a checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _tokenizer_path(module: Any, data: Any) -> str | None:
    """Return the tokenizer of a module's model, whatever that is called; a module without one leaves it to the data."""
    for name in ("policy", "reward_model"):
        if module.get(name) is not None:
            return str(module.get("tokenizer") or module[name]["path"])
    return cast("str | None", data.get("tokenizer"))


class _SaveConfig(SaveConfigCallback):
    """Saves the configuration beside the run, and never over a file: without a logger that may be the user's own."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        names = ("config.yaml", *(f"config_{number}.yaml" for number in range(1, 10_000)))
        self.config_filename = next(name for name in names if not (folder / name).exists())
        super().setup(trainer, pl_module, stage)


class RemaxCLI(LightningCLI):
    """LightningCLI with `configs/base.yaml` under every run and one tokenizer for module and data."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the top parser, whose help also names the subcommands that are not Lightning's."""
        others = "\n".join(f"  {name:16}{text}" for name, (_, text) in TOOLS.items())
        return super().init_parser(
            prog="remax",
            epilog=f"further subcommands:\n{others}",
            formatter_class=_HelpFormatter,
            **kwargs | {"description": "Align language models with ReMax, REINFORCE with a greedy baseline."},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give the project's callbacks keys of their own, so that overlays merge into them."""
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.link_arguments(
            ("model.init_args", "data.init_args"),
            "data.init_args.tokenizer",
            compute_fn=_tokenizer_path,
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer; what it refuses is the user's to correct."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise UserError(str(error) if isinstance(error, UserError) else f"trainer: {error}") from error

    def _parse_ckpt_path(self) -> None:
        """Check that the checkpoint is there, and take nothing from it: what the configuration says counts.

        Lightning would let hyper-parameters in a checkpoint beat the command line, and read the whole file for them.
        """
        subcommand = self.config.get("subcommand")
        path = str(self.config[subcommand].get("ckpt_path") or "best") if subcommand else "best"
        if path in ("best", "last", "hpc") or "://" in path or path.startswith("registry"):
            return
        strategies.recover_interrupted(Path(path).parent)
        if not Path(path).exists():
            raise UserError(f"ckpt_path: there is no checkpoint {path!r}; give one of an earlier run, or last")

    def instantiate_classes(self) -> None:
        """Make trainer, module and data, and find out which checkpoint is the last one."""
        super().instantiate_classes()
        arguments = self.config_init.get(self.subcommand) if self.subcommand else None
        if arguments is not None and arguments.get("ckpt_path") == "last":
            arguments["ckpt_path"] = self._last_checkpoint()

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it, in all the processes that Lightning starts for it: what they write and how they end belongs to it."""
        launched = launcher.ChildProcesses(self.trainer)
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            if user_error_message(error) is None and (death := launched.describe_killed_process()):
                raise SystemExit(f"remax: error: {death}") from None  # without it nothing had failed here
            raise
        if any(launched.exit_codes()):
            raise SystemExit(1)

    def _last_checkpoint(self) -> str | None:
        """Return the latest complete checkpoint of this run and of those before it, whatever its name.

        Lightning would look for the name only, and in the folder of this run, which is new.
        """
        folders = previous_checkpoint_folders(self.trainer)
        checkpoint = strategies.latest_checkpoint(folders, requeued=Path(self.trainer.default_root_dir))
        if checkpoint is not None:
            return str(checkpoint)
        if self.subcommand != "fit":
            raise UserError("ckpt_path: last, and there is no checkpoint of an earlier run; give the path of one")
        rank_zero_warn(
            "ckpt_path: last, and there is no checkpoint of an earlier run yet: this one starts from scratch."
        )
        return None


def main() -> None:
    """Run the command line.

    A mistake of the user's ends it with a message and exit code 2, without a traceback; SIGTERM, after a last
    checkpoint, with 143. The processes that Lightning starts for further devices come through here, too.
    """
    launched = launcher.is_launched()
    if launched:
        launcher.exit_with_launcher()
    else:
        launcher.mark_launcher()
    try:
        if sys.argv[1:2] and sys.argv[1] in TOOLS:
            tool, _ = TOOLS[sys.argv[1]]
            import_module(TOOL_MODULES.get(tool, f"remax_lightning.tools.{tool}")).main(sys.argv[2:])
        else:
            run()
    except SIGTERMException:
        # Of the processes that it has started, Lightning takes any other code for a failure.
        raise SystemExit(0 if launched else EXIT_CODE) from None
    except Exception as error:
        agreed = isinstance(error, RankUserError | RankError)
        if agreed and launched:
            time.sleep(10)  # rank 0 says it; Lightning would kill it as soon as this process ends
        mistake = user_error_message(error)
        if mistake is None:
            raise
        if not agreed or getattr(rank_zero_only, "rank", 0) == 0:
            print(f"remax: error: {mistake}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None


def run(args: list[str] | None = None, kind: type[RemaxCLI] = RemaxCLI) -> RemaxCLI:
    """Run one of Lightning's subcommands and return the command line with its trainer, module and data.

    Args:
        args: what stands after `remax`; None takes the process's own.
        kind: what reads the configuration and makes the objects.
    """
    silence_library_warnings()
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        # A user's classes lie in the current folder. Last, so that no file there hides an installed package.
        sys.path.append(str(Path.cwd()))
    base = str(config_folder() / "base.yaml")
    return kind(
        LightningModule,
        LightningDataModule,
        parser_class=RemaxParser,
        save_config_callback=_SaveConfig,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        parser_kwargs={name: {"default_config_files": [base]} for name in ("fit", "validate", "test", "predict")},
        args=args,
    )


def silence_library_warnings() -> None:
    """Drop what libraries say about each other: a user can do nothing about it, and it hides our own lines."""
    for message in (
        "'set_vital' is deprecated",
        r".*isinstance\(treespec, LeafSpec\)",
        "`is_gradient_checkpointing` is deprecated",
        "LightningCLI's args parameter",
        "`is_gradient_checkpointing` is deprecated",  # asked by PEFT of transformers
    ):
        warnings.filterwarnings("ignore", message=message)
    for name, text in (("lightning.pytorch.utilities.rank_zero", "Tip:"), ("DeepSpeed", "Setting accelerator to CPU")):
        logging.getLogger(name).addFilter(partial(_does_not_mention, text))
    disable_progress_bar()


def _does_not_mention(text: str, record: logging.LogRecord) -> bool:
    return text not in record.getMessage()
