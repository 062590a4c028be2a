"""Runs with the real vLLM, for CPUs: its server, started by the command of `remax serve`, and training with it."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from helpers.training import PROMPTS, CharacterReward, make_trainer, prompt_data, remax_module
from lightning.pytorch import Callback

from remax_lightning.config import LossConfig, MismatchConfig
from remax_lightning.files import DEFAULT_PYTHON
from remax_lightning.models import LoRAConfig, ModelConfig
from remax_lightning.rollout import GenerationOutput, GenerationRequest, SamplingConfig, VLLMEngine
from remax_lightning.tools.serve import serve_command
from remax_lightning.types import Rollout

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("REMAX_VLLM_PYTHON", ROOT / DEFAULT_PYTHON))
STEPS, LENGTH = 10, 12


class Server:
    """A server in a process group of its own."""

    def __init__(self, folder: Path, policy: Path, lora: bool) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        model = {
            "policy": {"path": str(policy), "dtype": "float32"} | ({"lora": {"r": 8}} if lora else {}),
            "kl_coef": 0.0,
            "reward": "remax_lightning.rewards.exact_match",
            "rollout": {"class_path": "VLLMEngine", "init_args": {"urls": [self.url]}},
            "sampling": {"max_response_length": 64},
        }
        data = {"path": str(folder / "rows.jsonl"), "max_prompt_length": 64}
        (folder / "rows.jsonl").write_text('{"prompt": "Hello"}\n')
        (folder / "serve.yaml").write_text(
            yaml.safe_dump({"model": model, "data": data, "trainer": {"accelerator": "cpu"}})
        )
        extra = ["--enforce-eager", "--max-num-seqs", "64"]
        self.command = serve_command(["--config", str(folder / "serve.yaml")], str(PYTHON), None, None, extra)
        self.log = folder / "server.log"
        self.start()

    def start(self) -> None:
        # No threads beside those of vLLM's own, and little memory for keys and values.
        environment = {**os.environ, **self.command.environment, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        environment["REMAX_VLLM_PARENT"] = str(os.getpid())  # it ends with this process, however that ends
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command.arguments, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self) -> None:
        """End all its processes at once, as the kernel does where memory runs out."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def engine(self, folder: Path, **options: Any) -> VLLMEngine:
        return VLLMEngine([self.url], transfer_dir=str(folder / "weights"), **({"restart_timeout": 600.0} | options))


class Rollouts(Callback):
    """Keeps rollouts and figures of a run, and its weights at the end."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []
        self.logged: list[dict[str, float]] = []
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.rollouts.append(outputs["rollout"])
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trained = ((name, value) for name, value in pl_module.policy.named_parameters() if value.requires_grad)
        self.weights = {name: value.detach().clone() for name, value in trained}


class Replay:
    """An engine that hands out the responses of another run."""

    def __init__(self, rollouts: list[Rollout]) -> None:
        self.rollouts = list(rollouts)

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        rollout: Any = self.rollouts.pop(0)
        return GenerationOutput(rollout.sampled.response_ids, rollout.greedy.response_ids)


def train(
    policy: Path,
    lora: bool,
    folder: Path,
    engine: Any,
    mismatch: MismatchConfig,
    *,
    steps: int = STEPS,
    callbacks: Sequence[Callback] = (),
    checkpoint: Path | None = None,
) -> Rollouts:
    """Train, and return what was recorded."""
    gc.collect()  # the policies and optimizers of earlier runs, in cycles with their trainers, are a gigabyte each
    module = remax_module(
        ModelConfig(str(policy), dtype="float32", lora=LoRAConfig(r=8, alpha=16) if lora else None),
        rollout=engine,
        reward=CharacterReward(),
        sampling=SamplingConfig(max_response_length=LENGTH),
        loss=LossConfig(mismatch=mismatch),
        optimizer=partial(torch.optim.SGD, lr=1e-2),
    )
    data = prompt_data(folder, str(policy), PROMPTS[:4], val_path=None)
    recorder = Rollouts()
    torch.manual_seed(0)
    options = {"max_steps": steps, "max_epochs": STEPS, "enable_checkpointing": bool(callbacks)}
    make_trainer(folder, [recorder, *callbacks], **options).fit(module, data, ckpt_path=checkpoint)
    return recorder
