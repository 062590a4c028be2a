"""Exports the trained policy as a Hugging Face folder."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from remax_lightning.callbacks.monitors import is_dry_run
from remax_lightning.distributed import broadcast
from remax_lightning.errors import UserError
from remax_lightning.files import describe_disk_error, first_existing, home_path, is_disk_error, tolerate_disk_errors
from remax_lightning.loggers import logger_adapters
from remax_lightning.models.checksums import MANIFEST, compute_checksums, list_files, write_manifest
from remax_lightning.models.hf_export import NotFiniteError, policy_weights, save_exported, save_policy
from remax_lightning.models.lora import check_mergeable
from remax_lightning.models.model_card import CardFacts, LoggedFigure, read_evaluation, update_figures, write_model_card
from remax_lightning.run_folder import known_run_folder, run_folder
from remax_lightning.sharding import unwrap_peft
from remax_lightning.strategies import nonfinite_in_model


class ExportPolicy(Callback):
    """Saves policy and tokenizer for `from_pretrained`, at the end of fit and at the best validation.

    Works with every module that has `policy` and `tokenizer`, and with modules whose `exported` returns another model,
    such as the reward model with normalized scores. Weights are safetensors. A folder is written atomically.

    Args:
        folder: folder of `last` and `best`; `policy` in the run's folder by default. Use another one for each run.
        monitor: the logged metric that decides which validation is best.
        mode: whether a higher (`max`) or a lower (`min`) value is better.
        best: save at each new best value of `monitor`.
        last: save at the end of fit.
        merge_adapter: with `model.policy.lora`, merge the adapter into a copy of the full model. False, because an
            adapter alone is a few megabytes; transformers loads it by itself where PEFT is installed, and needs its
            base. vLLM and converters to other formats need the merged model.
        push_to_hub: `owner/name` on the Hugging Face hub. At the end of training, `last` (`best` where `last` is false)
            is uploaded there. A repository that does not exist becomes a private one. The token is that of
            `hf auth login` or `HF_TOKEN`. A failure is a warning.
        log_artifact: also store each exported folder in the loggers that take artifacts (Weights & Biases, MLflow,
            trackio, Comet), with the alias `last` or `best`. Off by default, because it uploads whole models.

    Raises:
        UserError: if `mode`, `monitor` or `push_to_hub` is invalid, no logger takes artifacts, the weights cannot be
            gathered under the strategy, or `best` or `last` in the folder is a file or holds something else.
    """

    folder_key = "export.folder"

    def __init__(
        self,
        folder: str | None = None,
        monitor: str = "val/reward",
        mode: Literal["max", "min"] = "max",
        best: bool = True,
        last: bool = True,
        merge_adapter: bool = False,
        push_to_hub: str | None = None,
        log_artifact: bool = False,
    ) -> None:
        super().__init__()
        if mode not in ("max", "min"):
            raise UserError(f"export.mode must be max or min, got {mode!r}")
        if best and not monitor:
            raise UserError("export.monitor must name a logged metric where export.best is true, got ''")
        if push_to_hub is not None:
            _check_repository(push_to_hub)
            if not (best or last):
                raise UserError("export.push_to_hub needs export.last or export.best, got false for both")
        self.folder = folder
        self.monitor = monitor
        self.mode = mode
        self.best = best
        self.last = last
        self.merge_adapter = merge_adapter
        self.push_to_hub = push_to_hub
        self.log_artifact = log_artifact
        self.best_score: float | None = None
        self.best_path: str | None = None
        self._directory: Path | None = None
        self._metric_appeared = self._exported_last = self._wrote_last = False
        self._figures: dict[str, LoggedFigure] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder. Every rank has to call this, because rank 0 broadcasts the folder."""
        # ---- Refuse what would fail after hours of training ----
        from lightning.pytorch.strategies import FSDPStrategy

        self._exported_last = self._wrote_last = False
        if stage != "fit" or is_dry_run(trainer):
            self._directory = None
            return
        if isinstance(trainer.strategy, FSDPStrategy) and (self.best or self.last):
            raise UserError(
                "export.best and export.last must be false under trainer.strategy: fsdp, "
                "whose flat parameters cannot be gathered, got true; or use DDP, DeepSpeed or ModelParallelStrategy"
            )
        if self.log_artifact and not any(adapter.has_artifacts for adapter in logger_adapters(trainer)):
            raise UserError(
                "export.log_artifact must be false without a logger that takes artifacts, got true; set trainer.logger"
                " to WandbLogger, MLFlowLogger, TrackioLogger or CometLogger"
            )
        self._directory = Path(home_path(self.folder)) if self.folder is not None else run_folder(trainer) / "policy"
        for target in [self._directory / name for name in ("best", "last") if getattr(self, name)]:
            if trainer.is_global_zero:
                with suppress(OSError):  # a disk that refuses this refuses the export, too, which says so
                    recover_folder(target)
            if problem := why_not_replaced(target):
                raise UserError(f"{self.folder_key}: {problem}; give another folder")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse an adapter that could not be merged at the end."""
        policy = getattr(pl_module, "policy", None)
        if self.merge_adapter and self._directory is not None and policy is not None:
            check_mergeable(policy, "export.merge_adapter")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log where the best policy of a resumed run is, if that is another folder."""
        self._metric_appeared = False
        if self.best_path is not None and self._directory is not None and self._resolved_path("best") != self.best_path:
            rank_zero_info(f"Best policy so far: {self.monitor} = {self.best_score:.4g}, in {self.best_path}.")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the figures of the model card, as often as the loggers do: reading one waits for the device."""
        step, every = trainer.global_step, cast("Any", trainer).log_every_n_steps
        if self._directory is not None and every and (step == 1 or step % every == 0):
            update_figures(self._figures, step, trainer.callback_metrics, "train")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the policy if this validation is the best so far."""
        if self._directory is not None and not trainer.sanity_checking:
            update_figures(self._figures, trainer.global_step, trainer.callback_metrics, "val")
        if not self.best or trainer.sanity_checking or self._directory is None:
            return
        # None if this validation does not log it
        metric = trainer.callback_metrics.get(self.monitor)
        if metric is None:
            return
        self._metric_appeared = True
        # Rank 0 decides for all ranks: saving is a collective, and metrics may differ in their last digit.
        score = broadcast(trainer.strategy, float(metric))
        if self._is_better(score):
            try:
                is_written = self._export(trainer, pl_module, self._directory / "best")
            except UserError as error:  # the disk; the best policy before this one is still there
                rank_zero_warn(f"{error}. Training goes on; the next better policy is tried again.")
                is_written = False
            if is_written:
                self.best_score, self.best_path = score, self._resolved_path("best")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the policy, and warn if there was no best one."""
        if self._directory is None:
            return
        update_figures(self._figures, trainer.global_step, trainer.callback_metrics, "train")
        if self.last:
            self._wrote_last = self._export(trainer, pl_module, self._directory / "last")
            self._exported_last = True
        missed = self.best and not self._metric_appeared and self.best_path is None
        if missed and (hasattr(pl_module, "policy") or hasattr(pl_module, "exported")):
            rank_zero_warn(f"No best policy was exported{self._why_no_best(trainer.callback_metrics)}")

    def _why_no_best(self, metrics: Mapping[str, Any]) -> str:
        if self.monitor.startswith("val/") and not any(name.startswith("val/") for name in metrics):
            return ", because no validation ran."
        return (
            f": export.monitor = {self.monitor!r} was never logged. Logged metrics:"
            f" {', '.join(sorted(metrics)) or 'none'}."
            " Set export.monitor to one of these, or export.best to false."
        )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the policy of a run that was resumed at its end, of which no training ends; then push it."""
        if self.last and self._directory is not None and not self._exported_last and trainer.global_step > 0:
            self._wrote_last = self._export(trainer, pl_module, self._directory / "last")
        # Here, because the last checkpoint is written by now; and not in the seconds that a preempted run has.
        wanted = self.push_to_hub is not None and self._directory is not None and trainer.is_global_zero
        if wanted and not trainer.received_sigterm:
            self._push(cast("str", self.push_to_hub))

    def state_dict(self) -> dict[str, Any]:
        """Return the best score so far, the folder of its policy, and the figures of the model card."""
        figures = {name: tuple(figure) for name, figure in self._figures.items()}
        return {
            "monitor": self.monitor, "best_score": self.best_score, "best_path": self.best_path, "figures": figures
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the figures, and the best score unless it is of another metric."""
        # Checkpoints of earlier versions have none.
        self._figures = {name: LoggedFigure(*figure) for name, figure in state_dict.get("figures", {}).items()}
        if state_dict["monitor"] == self.monitor:
            self.best_score, self.best_path = state_dict["best_score"], state_dict["best_path"]

    def _resolved_path(self, name: str) -> str:
        return str((cast("Path", self._directory) / name).resolve())

    def _is_better(self, score: float) -> bool:
        # NaN is never better; any number is better than none.
        if math.isnan(score) or self.best_score is None:
            return not math.isnan(score)
        return score > self.best_score if self.mode == "max" else score < self.best_score

    def _export(self, trainer: Trainer, pl_module: LightningModule, target: Path) -> bool:
        """Write the policy, unless a weight is not finite; return whether it was written. A collective."""
        module = cast("Any", pl_module)
        exported = module.exported() if hasattr(module, "exported") else None
        model = exported.model if exported is not None else getattr(module, "policy", None)
        if model is None or not hasattr(module, "tokenizer"):
            return True  # this module has nothing to export
        damaged = nonfinite_in_model(trainer, model)
        # ---- Gather on all ranks, write on rank 0, and let the others wait ----
        merge = self.merge_adapter
        weights = policy_weights(model, keep=trainer.is_global_zero, merge_adapter=merge)  # a collective
        problem = ""
        if trainer.is_global_zero and damaged is None:
            try:
                write_folder_atomically(target, partial(self._write, trainer, module, exported, model, weights))
            except NotFiniteError as error:
                damaged = str(error)
            except Exception as error:
                if not is_disk_error(error):
                    raise
                problem = f"export: {describe_disk_error(error, target)}"
        damaged, problem = broadcast(trainer.strategy, (damaged, problem))  # the other ranks wait here
        if problem:
            raise UserError(problem)
        if damaged is None:
            rank_zero_info(f"Exported the model of optimizer step {trainer.global_step} to {target}.")
            if self.log_artifact and trainer.is_global_zero:
                for adapter in logger_adapters(trainer):
                    with tolerate_disk_errors(target, set(), "The folder itself is there; the logger has no copy."):
                        adapter.log_artifact(target, "policy", target.name)
        else:
            rank_zero_warn(
                f"Optimizer step {trainer.global_step}: the model is not exported to {target}, because {damaged} is not"
                " finite; what is there stays."
            )
        return damaged is None

    def _write(
        self, trainer: Trainer, module: Any, exported: Any, model: Any, weights: dict[str, Tensor] | None, folder: Path
    ) -> None:
        if exported is not None:
            save_exported(exported, module.tokenizer, weights, folder)
        else:
            save_policy(model, module.tokenizer, weights, folder, merge_adapter=self.merge_adapter)
        write_model_card(folder, lambda: self._describe(trainer, module, exported, model))

    def _describe(self, trainer: Trainer, module: Any, exported: Any, model: Any) -> CardFacts:
        """Return what the card says; rank 0 alone calls this, so nothing here is a collective."""
        data: Any = getattr(trainer, "datamodule", None)
        paths = getattr(data, "path", None) or []
        reward = getattr(module, "reward", None)
        folder = known_run_folder(trainer)
        name = str(unwrap_peft(model).config._name_or_path or type(unwrap_peft(model)).__name__)
        source = "" if reward is None else f"{type(reward).__name__} {getattr(reward, 'path', None) or ''}".strip()
        return CardFacts(
            base_model=name,
            trained_with=type(module).__name__,
            is_adapter=hasattr(model, "peft_config") and not self.merge_adapter,
            is_language_model=exported is None,
            data=[paths] if isinstance(paths, str) else [str(path) for path in paths],
            reward=source,
            figures=self._figures,
            evaluation={} if folder is None else read_evaluation(folder),
            command=sys.argv,
        )

    def _push(self, repository: str) -> None:
        """Upload the exported folder; every failure is a warning, because the folder is there to be pushed later."""
        if self.last:
            folder = self._directory / "last" if self._wrote_last and self._directory is not None else None
        else:
            folder = None if self.best_path is None else Path(self.best_path)
        if folder is None or not folder.is_dir():
            rank_zero_warn(f"export.push_to_hub: nothing is pushed to {repository}, because no policy was exported.")
            return
        try:
            from huggingface_hub import HfApi

            api = HfApi()  # the token of the environment, or of `hf auth login`
            api.create_repo(repository, private=True, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload policy/{folder.name}")
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())  # the client's messages have several lines
            rank_zero_warn(
                f"export.push_to_hub: {folder} is not on the hub ({why}). The folder is whole; push it with: hf upload"
                f" {repository} {folder}"
            )
        else:
            rank_zero_info(f"Pushed {folder} to https://huggingface.co/{repository}.")


def _check_repository(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    problem = "" if name.count("/") == 1 else "it has no owner"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        problem = str(error)
    if problem:
        raise UserError(f"export.push_to_hub must be owner/name of a repository on the hub, got {name!r}: {problem}")


_EXPORTED = (MANIFEST, "config.json", "adapter_config.json")
"""Files of which an exported folder of this or an earlier version has one."""


def why_not_replaced(target: Path) -> str:
    """Return why an export must not, or cannot, take the place of what is at `target`; empty if it may."""
    first = first_existing(target)
    if not first.is_dir():
        return f"{str(first)!r} is a file"
    if first == target and any(target.iterdir()) and not any((target / name).is_file() for name in _EXPORTED):
        return f"{str(target)!r} would be replaced, and holds something else than an exported model"
    return ""


def recover_folder(target: Path) -> None:
    """Restore a folder whose replacement was interrupted between the two renames of `write_folder_atomically`."""
    target = target.resolve()
    old = _beside(target, "old")
    if old.exists() and not target.exists():
        old.rename(target)


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}")


def write_folder_atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with an empty folder beside `target`, add checksums of its files, and rename it to `target`.

    Of a link, the folder that it leads to is replaced.
    """
    # ---- Write beside the target ----
    target = target.resolve()
    new, old = _beside(target, "new"), _beside(target, "old")
    # What a run has left that was killed: first the only whole copy, if it is under its other name.
    recover_folder(target)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        write(new)
        write_manifest(new, compute_checksums(new, list_files(new)))
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    # ---- Swap: if the rename fails, the old folder comes back ----
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
