"""A tiny policy must learn a task whose answer is known, and must not where the reward is turned round."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tiny_config
from helpers.training import make_trainer, prompt_data, write_rows

from remax_lightning.data import SFTDataModule
from remax_lightning.models import ModelConfig
from remax_lightning.modules import AdvantageConfig, LossConfig, ReMaxModule, SFTModule
from remax_lightning.rewards.base import Reward
from remax_lightning.rollout import SamplingConfig

LETTERS = "abc"
PROMPTS = [f"{first}{last}" for first in "abcdefghijklmnopqrstuvwx" for last in LETTERS]


class CopyLastLetter(Reward):
    """1 for the last letter of the prompt and nothing else, times a sign."""

    def __init__(self, sign: float) -> None:
        self.sign = sign

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
        return [self.sign * (text == prompt[-1]) for prompt, text in zip(prompts, responses, strict=True)]


@pytest.fixture(scope="module")
def guesser(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy that was shown wrong letters most of the time: its likeliest response is never right."""
    folder = tmp_path_factory.mktemp("guesser")
    tiny_config("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    usual = {"a": "bbbcca", "b": "cccaab", "c": "aaabbc"}
    rows = [{"prompt": prompt, "response": letter} for prompt in PROMPTS for letter in usual[prompt[-1]]]
    torch.manual_seed(0)
    module = SFTModule(ModelConfig(str(folder), from_scratch=True), optimizer=partial(torch.optim.AdamW, lr=3e-3))
    path = write_rows(folder / "rows.jsonl", rows)
    make_trainer(folder, max_steps=80, max_epochs=-1).fit(module, SFTDataModule(path, str(folder), batch_size=144))
    module.policy.save_pretrained(folder)
    return str(folder)


def validated(
    guesser: str, folder: Path, steps: int, sign: float = 1.0, lr: float = 3e-3, **options: Any
) -> list[float]:
    """Train by ReMax and return sampled and greedy accuracy before and after."""
    torch.manual_seed(options.pop("seed", 0))
    splits = options.pop("splits", 1)
    module = ReMaxModule(
        ModelConfig(guesser),
        CopyLastLetter(sign),
        ModelConfig(guesser),
        sampling=options.pop("sampling", SamplingConfig(max_response_length=3)),
        kl_coef=0.01,
        optimizer=partial(torch.optim.AdamW, lr=lr),
        **options,
    )
    data = prompt_data(folder, guesser, PROMPTS, micro_batch_size=len(PROMPTS) // splits)
    # An epoch is a rollout: a validation after each would take as long as the training.
    trainer = make_trainer(folder, max_steps=steps, max_epochs=-1, limit_val_batches=1.0, check_val_every_n_epoch=999)
    found = [*trainer.validate(module, data, verbose=False)]
    trainer.fit(module, data)
    found += trainer.validate(module, data, verbose=False)
    return [sign * metrics[f"val/{name}"] for metrics in found for name in ("reward", "baseline_reward")]


@pytest.mark.slow(6)
def test_learns_to_copy_a_letter(guesser: str, tmp_path: Path) -> None:
    sampled_before, greedy_before, sampled, greedy = validated(guesser, tmp_path, 120)
    assert greedy_before == 0
    assert sampled_before < 0.4
    assert sampled > 0.9
    assert greedy > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "options"), [
    # Two updates of half the prompts each: a larger rate, or one sample, may lose a letter before it was ever rewarded.
    (240, {"splits": 2, "loss": LossConfig("clipped"), "lr": 1e-3, "sampling": SamplingConfig(3, num_samples=2)}),
    (60, {"sampling": SamplingConfig(3, num_samples=4), "advantage": AdvantageConfig("leave_one_out")}),
])  # fmt: skip
def test_learns_it_in_other_variants(steps: int, options: dict[str, Any], guesser: str, tmp_path: Path) -> None:
    _, _, sampled, greedy = validated(guesser, tmp_path, steps, **options)
    assert sampled > 0.9
    assert greedy > 0.9


@pytest.mark.slow
def test_the_opposite_reward_teaches_the_opposite(guesser: str, tmp_path: Path) -> None:
    sampled_before, _, sampled, greedy = validated(guesser, tmp_path, 60, sign=-1.0)
    assert sampled_before > 0.15
    assert sampled < 0.05
    assert greedy == 0
