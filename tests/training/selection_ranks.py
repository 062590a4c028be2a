"""A run with a selection of prompts, alone and on two ranks; run by test_prompt_selection.py."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from helpers.training import PromptEngine, Recorder, fit, prompt_data, remax_module
from modules.two_ranks import own_folder

from remax_lightning.data import SelectionConfig
from remax_lightning.rewards import Reward

PROMPTS = [str(number) for number in range(16)]


class LuckyReward(Reward):
    """Pays sampled responses to prompts with an even number 1 and greedy ones 0; to the others nothing.

    Args:
        pays: False for a reward that is always 0.
    """

    def __init__(self, pays: bool = True) -> None:
        self.pays = pays

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
        # The greedy responses, one for each prompt, come last.
        sampled = len(prompts) // 2
        return [float(self.pays and int(prompt) % 2 == 0 and number < sampled) for number, prompt in enumerate(prompts)]


def prompts_of(recorder: Recorder) -> list[list[str]]:
    """The prompts of each micro-batch that was trained on."""
    return [[str(text) for text in output["rollout"].prompt.prompts] for output in recorder.outputs]


VARIANTS = {
    "left_out": SelectionConfig(skip_uninformative=1, curriculum=0.5),
    "oversampled": SelectionConfig(skip_uninformative=1, oversample=2),
}


def selected_run(policy: str, folder: Path, variant: str, ranks: int) -> dict[str, Any]:
    """The prompts of the steps, and what the stream remembers at the end."""
    module = remax_module(policy, reward=LuckyReward(), rollout=PromptEngine())
    data = prompt_data(own_folder(folder), policy, PROMPTS, batch_size=4 // ranks, selection=VARIANTS[variant])
    ddp = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    recorder = fit(module, data, folder, max_steps=8, max_epochs=-1, **ddp)
    state = data._selecting.stream.state_dict()  # type: ignore[union-attr]
    plain = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    return {"prompts": prompts_of(recorder), "state": plain}


def main(policy: str, folder: Path) -> None:
    """Run on the ranks of this process group."""
    for variant in VARIANTS:
        found = selected_run(policy, folder / variant, variant, ranks=2)
        torch.save(found, folder / f"{variant}-{os.environ['LOCAL_RANK']}.pt")
