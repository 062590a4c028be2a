"""The run that trials disturb, four optimizer steps of a tiny policy, and what an undisturbed one does."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning.pytorch import Callback

from benchmarks.chaos.warm import Ended, command, in_fork

STEPS = 4
PROMPTS = 24
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
ENOUGH = 99
"""Exit code of a command that `stop_after` ended: it trained."""


class Fixtures(NamedTuple):
    """Files that trials share.

    Attributes:
        folder: where they are.
        policy: folder of the tiny policy.
        chat_policy: folder of the same policy, whose tokenizer has a chat template.
    """

    folder: Path
    policy: Path
    chat_policy: Path


CHAT = "{% for message in messages %}<turn>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}<turn>"


def make_fixtures(folder: Path) -> Fixtures:
    """Save the policies, unless an earlier call has."""

    def save() -> None:
        from conftest import make_tokenizer
        from helpers.training import save_policy

        for name, template in (("policy", None), ("chat_policy", CHAT)):
            save_policy(folder / name)
            make_tokenizer(chat_template=template).save_pretrained(folder / name)
        (folder / "complete").touch()

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "complete").exists():
        in_fork(save)
    return Fixtures(folder, folder / "policy", folder / "chat_policy")


def configuration(
    fixtures: Fixtures,
    folder: Path,
    *,
    strategy: str = "single",
    callbacks: list[dict[str, Any]] | None = None,
    save_dir: Path | None = None,
    logger: str = "TensorBoardLogger",
) -> dict[str, Any]:
    """Return the configuration of a run that saves, validates, exports, logs and writes samples.

    Args:
        fixtures: where the policy is.
        folder: of the trial; gets the data.
        strategy: `single` is one process, others are two.
        callbacks: further entries of `trainer.callbacks`.
        save_dir: of the logger; `runs` in the folder by default.
        logger: class of Lightning.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}+{n}=", "response": str(2 * n)}) + "\n" for n in range(PROMPTS)))
    saves = {"every_n_train_steps": 1, "filename": "{step}"}  # keeps the last one only, as by default
    config: dict[str, Any] = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": STEPS,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "val_check_interval": 2,
            "gradient_clip_val": 1.0,
            "logger": {
                "class_path": f"lightning.pytorch.loggers.{logger}",
                "init_args": {"save_dir": str(save_dir or folder / "runs"), "name": "remax"},
            },
            "callbacks": [
                {"class_path": "benchmarks.chaos.runs.WriteLosses", "init_args": {"folder": str(folder)}},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saves},
                *(callbacks or []),
            ],
        },
        "model": {
            "policy": {"path": str(fixtures.policy)},
            "reference": {"path": str(fixtures.policy)},
            "reward": {
                "class_path": "FunctionReward",
                "init_args": {"function": "remax_lightning.rewards.verifiers.length_penalty",
                              "arguments": {"target": 2, "coef": 0.5}},
            },
            "sampling": {"max_response_length": 6},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
        "data": {"path": str(data), "val_size": 4, "batch_size": 4, "max_prompt_length": 16},
        "samples": {"every_n_steps": 1, "num_samples": 2},
        "export": {"best": False},
        "evaluation": {"num_resamples": 20},
    }  # fmt: skip
    if strategy != "single":
        from remax_lightning.shipped_configs import config_folder

        overlay = yaml.safe_load((config_folder() / "strategies" / f"{strategy}.yaml").read_text())
        config["trainer"] |= {"devices": 2, **overlay["trainer"]}
    if strategy == "zero3":  # spread even what is small
        spread = {"stage": 3, "stage3_param_persistence_threshold": 0}
        init_args = {"config": {"zero_allow_untested_optimizer": True, "zero_optimization": spread}}
        config["trainer"]["strategy"]["init_args"] = init_args
    return config


def write(path: Path, config: dict[str, Any]) -> str:
    """Write a configuration as YAML and return its path as text."""
    path.write_text(yaml.safe_dump(config))
    return str(path)


class WriteLosses(Callback):
    """Appends the loss of each step to a file of the rank's own, which stays when the process is killed."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write step and loss."""
        loss = float(trainer.callback_metrics["train/loss"])
        with (self.folder / f"losses-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps([trainer.global_step, loss]) + "\n")


def losses(folder: Path, rank: int = 0) -> dict[int, list[float]]:
    """Return by step its loss each time that the step was taken."""
    losses: dict[int, list[float]] = {}
    path = folder / f"losses-{rank}.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        step, loss = json.loads(line)
        losses.setdefault(step, []).append(loss)
    return losses


class Undisturbed(NamedTuple):
    """What a run does that nothing happens to: the loss of each step, and a digest of the exported weights."""

    losses: dict[int, float]
    exported: str


def undisturbed(fixtures: Fixtures, strategy: str) -> Undisturbed:
    """Run once for each strategy, and remember it among the fixtures."""
    path = fixtures.folder / f"undisturbed-{strategy}.json"
    if not path.exists():
        folder = fixtures.folder / f"undisturbed-{strategy}"
        ended = fit(fixtures, folder, strategy=strategy)
        if ended.code != 0:
            raise RuntimeError(f"the undisturbed run under {strategy} ended with {ended.code}:\n{ended.text}")
        taken = {step: values[0] for step, values in losses(folder).items()}
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps([list(taken.items()), exported_digest(folder)]))
        new.rename(path)
    steps, digest = json.loads(path.read_text())
    return Undisturbed(dict(steps), digest)


def fit(fixtures: Fixtures, folder: Path, *arguments: str, **options: Any) -> Ended:
    """Run `remax fit` with the configuration of a trial; `options` are those of `configuration`."""
    config = configuration(fixtures, folder, **options)
    path = write(folder / "run.yaml", config)
    return command(folder, "fit", "--config", path, *arguments, ranks=config["trainer"]["devices"])


def exported_digest(folder: Path) -> str:
    """Return a digest of the last policy that runs in a folder have exported; empty if there is none."""
    files = sorted(folder.rglob("policy/last/model.safetensors"), key=lambda path: path.stat().st_mtime)
    return hashlib.sha256(files[-1].read_bytes()).hexdigest() if files else ""


def difference(folder: Path, expected: Undisturbed, runs: Path | None = None) -> str:
    """Return what a run that was disturbed and resumed lacks or does otherwise; empty if nothing.

    Args:
        folder: with the losses.
        expected: of the undisturbed run; losses and weights are compared bit by bit.
        runs: folder of the exported policy, if it is another.
    """
    taken = losses(folder)
    if sorted(taken) != sorted(expected.losses):
        return f"it took the steps {sorted(taken)}"
    largest = max(abs(loss - expected.losses[step]) for step, values in taken.items() for loss in values)
    if largest > 0:
        return f"losses differ by up to {largest:.1e}"
    exported = exported_digest(runs or folder)
    if exported != expected.exported:
        return "the exported policy differs" if exported else "there is no exported policy"
    return ""


def stop_after(batches: int) -> Callable[[], None]:
    """Return a function that has a command end with `ENOUGH` once it has trained or evaluated so many batches.

    A mutated configuration may be one of a long run: what is to be seen is whether it begins.
    """

    def prepare() -> None:
        from lightning.pytorch.loops import evaluation_loop, training_epoch_loop
        from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

        def counting(kind: Any, name: str, limit: int) -> None:
            method, count = getattr(kind, name), 0

            def counted(*args: Any, **options: Any) -> Any:
                nonlocal count
                result = method(*args, **options)
                count += 1
                if count >= limit:
                    os._exit(ENOUGH)
                return result

            setattr(kind, name, counted)

        counting(training_epoch_loop._TrainingEpochLoop, "advance", batches)
        counting(evaluation_loop._EvaluationLoop, "_evaluation_step", 4 * batches)
        # A number of devices that was mutated to 10,000 would start as many processes.
        setattr(_SubprocessScriptLauncher, "_call_children_scripts", lambda *_: os._exit(ENOUGH))  # noqa: B010

    return prepare
