"""Run by test_two_ranks.py in a process of its own: one optimizer step on two ranks, in several variants."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from helpers.training import PROMPTS, CharacterReward, Recorder, fit, make_trainer, prompt_data, remax_module

from remax_lightning.modules import AdvantageConfig, KLConfig, LossConfig
from remax_lightning.rewards.base import Scores
from remax_lightning.rollout import GenerationOutput, GenerationRequest


class OnePromptReward(CharacterReward):
    """Rewards answers to one prompt: a rank that does not have it has nothing to learn from."""

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> Scores:
        found = super().score(prompts, responses, rows)
        chosen = torch.tensor([prompt == PROMPTS[0] for prompt in prompts])
        return Scores(found.reward * chosen, {})


VARIANTS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "responses": {"loss": LossConfig(normalizer="responses")},
    "whitened": {"advantage": AdvantageConfig(whiten=True)},
    "clipped": {"loss": LossConfig("clipped"), "kl": KLConfig(loss_coef=0.3)},
    "skipped": {"kl_coef": 0.0, "reward": OnePromptReward()},
}


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


class Keep(Recorder):
    """Writes the step and the figures of a rank, since the recorder of another process cannot be read."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        path = Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.pt"
        torch.save({"step": self.step(), "logged": self.logged[0]}, path)


def run(variant: str, policy: str, reference: str, folder: Path, ranks: int, splits: int) -> None:
    module = remax_module(policy, reference, rollout=PromptEngine(), **VARIANTS[variant])
    folder.mkdir(parents=True)
    data = prompt_data(folder, policy, batch_size=8 // ranks, micro_batch_size=8 // ranks // splits)
    ddp = {"devices": ranks, "strategy": "ddp_fork"} if ranks > 1 else {}
    fit(module, data, folder, callbacks=[Keep()], accumulate_grad_batches=splits, **ddp)


def evaluate(policy: str, reference: str, folder: Path, ranks: int) -> dict[str, float]:
    """Evaluate on prompts that the ranks cannot share equally, and write the figures down."""
    module = remax_module(policy, reference, rollout=PromptEngine())
    folder.mkdir(parents=True)
    data = prompt_data(folder, policy, PROMPTS[:7], batch_size=2)
    ddp = {"devices": ranks, "strategy": "ddp_fork"} if ranks > 1 else {}
    found = make_trainer(folder, limit_val_batches=1.0, **ddp).validate(module, data, verbose=False)[0]
    torch.save(dict(found), folder / "found.pt")
    return dict(found)


if __name__ == "__main__":
    evaluate(sys.argv[1], sys.argv[2], Path(sys.argv[3]) / "evaluation", ranks=2)
    for name in VARIANTS:
        run(name, sys.argv[1], sys.argv[2], Path(sys.argv[3]) / name, ranks=2, splits=2)
