"""One optimizer step on two ranks, in several variants; run by test_two_ranks.py."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from helpers.training import (
    PROMPTS,
    CharacterReward,
    PromptEngine,
    Recorder,
    fit,
    make_trainer,
    prompt_data,
    remax_module,
)

from remax_lightning.modules import AdvantageConfig, KLConfig, LossConfig
from remax_lightning.rewards import Reward, Scores, WeightedReward


class OnePromptReward(CharacterReward):
    """Rewards answers to one prompt: a rank that does not have it has nothing to learn from."""

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> Scores:
        found = super().score(prompts, responses, rows)
        chosen = torch.tensor([prompt == PROMPTS[0] for prompt in prompts])
        return Scores(found.reward * chosen, {})


class LengthReward(Reward):
    """On another scale than `CharacterReward`."""

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
        return [100.0 * len(text) for text in responses]


class TokenReward(Reward):
    """A number for each token, of the id and its place."""

    def score(self, prompts: Sequence[str], responses: Sequence[Any], rows: Sequence[dict[str, Any]]) -> Any:
        return [[(7 * token + place) % 5 / 4 for place, token in enumerate(text.token_ids)] for text in responses]


def normalized() -> WeightedReward:
    """Two parts on their own scales; the rewards of the parts differ by a factor of hundreds."""
    return WeightedReward({"character": CharacterReward(), "length": LengthReward()}, {"length": -0.5}, "std")


VARIANTS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "responses": {"loss": LossConfig(normalizer="responses")},
    "whitened": {"advantage": AdvantageConfig(whiten=True)},
    "clipped": {"loss": LossConfig("clipped"), "kl": KLConfig(loss_coef=0.3)},
    "normalized": {"reward": normalized(), "advantage": AdvantageConfig(overlong="penalize")},
    "per_token": {"reward": TokenReward(), "advantage": AdvantageConfig(gamma=0.9, overlong="penalize")},
    "calibrated": {"advantage": AdvantageConfig(baseline="calibrated_greedy")},  # reads the prompts of all ranks
    "tracker": {"advantage": AdvantageConfig(baseline="tracker")},
    "optimal_per_token": {"advantage": AdvantageConfig(baseline="optimal_per_token")},
    "skipped": {"kl_coef": 0.0, "reward": OnePromptReward()},
}


class Keep(Recorder):
    """Writes the step and the figures of a rank, since the recorder of another process cannot be read."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        path = Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.pt"
        torch.save({"step": self.step(), "logged": self.logged[0]}, path)


def own_folder(folder: Path) -> Path:
    """A folder that no other rank writes to."""
    own = folder / f"rank{os.environ.get('LOCAL_RANK', '0')}"
    own.mkdir(parents=True)
    return own


def run(variant: str, policy: str, reference: str, folder: Path, ranks: int, splits: int) -> None:
    module = remax_module(policy, reference, rollout=PromptEngine(), **VARIANTS[variant])
    data = prompt_data(own_folder(folder), policy, batch_size=8 // ranks, micro_batch_size=8 // ranks // splits)
    ddp = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    fit(module, data, folder, callbacks=[Keep()], accumulate_grad_batches=splits, **ddp)


def evaluate(policy: str, reference: str, folder: Path, ranks: int) -> dict[str, float]:
    """Evaluate on prompts that the ranks cannot share equally, and write the figures down."""
    module = remax_module(policy, reference, rollout=PromptEngine())
    own = own_folder(folder)
    data = prompt_data(own, policy, PROMPTS[:7], batch_size=2)
    ddp = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    found = make_trainer(folder, limit_val_batches=1.0, **ddp).validate(module, data, verbose=False)[0]
    torch.save(dict(found), own / "found.pt")
    return dict(found)


def main(policy: str, reference: str, folder: Path) -> None:
    evaluate(policy, reference, folder / "evaluation", ranks=2)
    for name in VARIANTS:
        run(name, policy, reference, folder / name, ranks=2, splits=2)
