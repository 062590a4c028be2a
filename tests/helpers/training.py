"""Small real runs on the CPU: a saved policy, a data module, a trainer, and what a callback saw of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conftest import make_tokenizer, tiny_model
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from remax_lightning.data import PromptDataModule
from remax_lightning.models import ModelConfig
from remax_lightning.modules import ReMaxModule
from remax_lightning.rewards.base import Reward, Scores
from remax_lightning.rollout import GenerationOutput, GenerationRequest, SamplingConfig
from remax_lightning.types import StepOutput

EARLY_ENDS = (2, *range(4, 28))
"""Token ids that end a response of a random policy after a few tokens: without them nearly all would be cut."""

PROMPTS = ["12+34=", "a", "hello there", "1+1=", "xyz?", "the longest prompt of all", "Q: ", "007"]


class CharacterReward(Reward):
    """A reward that differs between nearly all responses: it looks at characters and at the prompt."""

    def __init__(self) -> None:
        self.loaded = 0
        self.scored: list[int] = []

    def load(self, device: torch.device) -> None:
        self.loaded += 1

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> Scores:
        self.scored.append(len(responses))
        letters = [sum(map(ord, text)) % 17 / 8 - 1 for text in responses]
        lengths = [(len(prompt) + 3 * len(text)) % 5 / 4 for prompt, text in zip(prompts, responses, strict=True)]
        parts = {"letters": torch.tensor(letters), "lengths": torch.tensor(lengths)}
        return Scores(sum(parts.values()), parts)


class FixedEngine:
    """Hands out the responses that it was made with."""

    def __init__(self, sampled: Sequence[Sequence[int]], greedy: Sequence[Sequence[int]] = ()) -> None:
        self.sampled, self.greedy = torch.tensor(sampled), torch.tensor(greedy)
        self.requests: list[GenerationRequest] = []

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        self.requests.append(request)
        return GenerationOutput(self.sampled.clone(), self.greedy.clone() if request.greedy else None)


class PromptEngine:
    """Writes what the prompt alone decides, so that it does not matter which rank reads it."""

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        rows = []
        for ids, mask in zip(request.prompt_ids, request.prompt_mask, strict=True):
            generator = torch.Generator().manual_seed(int((ids * mask).sum()))
            rows.append(torch.randint(4, 90, (2, 6), generator=generator))
            for row in rows[-1]:
                row[int(torch.randint(0, 8, (1,), generator=generator)) :] = 2
        sampled, greedy = torch.stack(rows, 1)
        return GenerationOutput(sampled, greedy)


def save_policy(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    noise: float = 0.0,
    ends: Sequence[int] = EARLY_ENDS,
    pad_is_eos: bool = False,
) -> str:
    """Save a random policy with its tokenizer, as `from_pretrained` reads them; `noise` moves it off its seed."""
    model = tiny_model(family, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    model.generation_config.eos_token_id = list(ends)
    model.save_pretrained(folder)
    make_tokenizer(pad_is_eos=pad_is_eos).save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write rows as JSONL and return the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompt_data(
    folder: Path,
    policy: str,
    prompts: Sequence[str] = PROMPTS,
    kind: type[PromptDataModule] = PromptDataModule,
    **options: Any,
) -> PromptDataModule:
    """A data module over `prompts`, the same ones for validation; by default one batch holds them all."""
    path = write_rows(folder / "prompts.jsonl", ({"prompt": prompt} for prompt in prompts))
    defaults = {"val_path": path, "batch_size": len(prompts), "max_prompt_length": 64}
    return kind(path, policy, **(defaults | options))


def remax_module(
    policy: str | ModelConfig,
    reference: str | ModelConfig | None = None,
    kind: type[ReMaxModule] = ReMaxModule,
    **options: Any,
) -> ReMaxModule:
    """A module with plain gradient descent of rate 1, so that a step's gradient is weights before minus after."""
    defaults: dict[str, Any] = {
        "policy": ModelConfig(policy) if isinstance(policy, str) else policy,
        "reward": CharacterReward(),
        "reference": ModelConfig(reference) if isinstance(reference, str) else reference,
        "kl_coef": 0.0 if reference is None else 0.05,
        "sampling": SamplingConfig(max_response_length=6),
        "optimizer": partial(torch.optim.SGD, lr=1.0),
        "stall_timeout": None,  # test_stalling.py has it; a process for every run of a test costs its start
        "check_on_policy": False,  # engines with fixed responses are off-policy; test_on_policy.py has the check
    }
    return kind(**(defaults | options))


def make_trainer(folder: Path, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    """A silent trainer on one CPU process that writes nothing unless asked to; one step by default."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
    }
    return Trainer(**(defaults | options), callbacks=list(callbacks))


OF_THE_OPTIMIZER = {"train/lr", "train/grad_norm", "train/skipped_steps"}
"""What every stage logs of its optimizer."""


def without_optimizer(logged: dict[str, Any]) -> dict[str, Any]:
    """What a stage logs of its own."""
    return {name: value for name, value in logged.items() if name not in OF_THE_OPTIMIZER}


class Recorder(Callback):
    """Keeps what a run did: outputs of its steps, logged figures, and the weights around every optimizer step."""

    def __init__(self) -> None:
        self.outputs: list[StepOutput] = []
        self.validations: list[StepOutput] = []
        self.logged: list[dict[str, float]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights.append(weights_of(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.outputs.append(outputs)
        if trainer.global_step == len(self.weights):
            self.weights.append(weights_of(pl_module))
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.validations.append(outputs)

    def step(self, number: int = 0) -> dict[str, Tensor]:
        """Weights before minus after an optimizer step: with `remax_module` its gradient."""
        before, after = self.weights[number], self.weights[number + 1]
        return {name: before[name] - after[name] for name in before}


def weights_of(module: LightningModule) -> dict[str, Tensor]:
    """A copy of the weights of the module's policy."""
    policy: Any = module.policy
    return {name: copy.deepcopy(value.detach()) for name, value in policy.named_parameters()}


def fit(module: LightningModule, data: Any, folder: Path, seed: int = 0, **options: Any) -> Recorder:
    """Train for one step, or what `options` of the trainer say, and return what was recorded."""
    recorder = Recorder()
    torch.manual_seed(seed)
    make_trainer(folder, [recorder, *options.pop("callbacks", ())], **options).fit(module, data)
    return recorder


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest difference between two gradients, as a share of the largest entry of the second."""
    scale = max(float(value.abs().max()) for value in second.values())
    return max(float((first[name] - second[name]).abs().max()) for name in second) / scale
