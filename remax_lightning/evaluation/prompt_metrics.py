"""What an evaluation measured, prompt by prompt: gathered over ranks, each prompt once, and the figures made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import cast

import torch
from torch import Tensor

from remax_lightning.config import EvalConfig
from remax_lightning.distributed import gather_objects
from remax_lightning.evaluation.statistics import best_of_k, majority_vote, pass_at_k, win_rates
from remax_lightning.files import PromptRecord
from remax_lightning.training.metrics import step_values
from remax_lightning.types import Responses, StepOutput

MAX_NATS = 700.0
"""Nats per token whose exponential a float still holds."""


def prompt_records(output: StepOutput) -> list[PromptRecord]:
    """Return what a step measured of the policy's own responses, one record for each of its `B` prompts."""
    rollout = output["rollout"]
    prompt, sampled, greedy = rollout.prompt, rollout.sampled, cast(Responses, rollout.greedy)
    count = len(prompt.prompts)
    # ---- Sums and counts of each figure by prompt, `B` pairs of both ----
    columns = {name: sums_by_prompt(*values_and_mask, count) for name, values_and_mask in step_values(output).items()}
    if output["kl"] is not None:
        columns["kl_per_response"] = sums_by_prompt(output["kl"].sum(-1), None, count)  # [S], summed over tokens
    # ---- Texts and rewards by prompt ----
    texts, rewards = group_by_prompt(sampled.texts, count), rollout.reward.view(count, -1).tolist()
    baseline = cast(Tensor, rollout.baseline_reward).tolist()
    return [
        PromptRecord(
            None if prompt.indices is None else prompt.indices[i],
            prompt.prompts[i],
            {"sampled": texts[i], "greedy": [greedy.texts[i]]},
            {"sampled": rewards[i], "greedy": [baseline[i]]},
            {name: column[i] for name, column in columns.items()},
        )
        for i in range(count)
    ]


def sums_by_prompt(values: Tensor, mask: Tensor | None, num_prompts: int) -> list[tuple[float, float]]:
    """Return for each prompt the sum of its values, and how many they are.

    Args:
        values: `[S]`, `[B]` or `[S, R]`, prompt by prompt.
        mask: of the same shape, what is counted of them; None for all.
        num_prompts: `B`.
    """
    counted = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    wide = values.cpu().double().masked_fill(~counted.cpu(), 0.0)  # NaN outside of the mask does not count
    tops, bottoms = (tensor.reshape(num_prompts, -1).sum(1).tolist() for tensor in (wide, counted.cpu()))
    return [(top, float(bottom)) for top, bottom in zip(tops, bottoms, strict=True)]


def group_by_prompt(values: Sequence[str], num_prompts: int) -> list[list[str]]:
    """Return `S` values as those of each prompt."""
    size = len(values) // num_prompts
    return [list(values[i * size : (i + 1) * size]) for i in range(num_prompts)]


def add_comparison(record: PromptRecord, other: str, texts: list[str], rewards: list[float]) -> PromptRecord:
    """Return a record with responses of `other` to the same prompt, and how the policy's rewards compare with theirs.

    Args:
        record: what the policy wrote.
        other: whose responses they are: `reference` or `chosen`.
        texts: the responses.
        rewards: their rewards.
    """
    sampled = record.rewards["sampled"]
    # n * m pairs; a share times their number gives wins, which add up over prompts.
    comparisons = float(len(sampled) * len(rewards))
    won = float(win_rates([sampled], [rewards])[0]) * comparisons
    sums = {f"{other}_reward": (sum(rewards), float(len(rewards))), f"win_rate_{other}": (won, comparisons)}
    return record._replace(
        responses={**record.responses, other: texts},
        rewards={**record.rewards, other: rewards},
        sums={**record.sums, **sums},
    )


def add_repeated(record: PromptRecord, config: EvalConfig, answer_of: Callable[[str], Hashable]) -> PromptRecord:
    """Return a record with `pass_at_k`, `maj_at_k` and `best_of_k` of its `n` sampled responses.

    Each is a mean of one prompt, and counts as many as its `n // k` disjoint groups of `k` responses, which an interval
    takes for trials: `maj_at_k` is their mean, and the others, over all subsets, vary no more.

    Args:
        record: what the policy wrote, with `n` rewards.
        config: the numbers `k`, all at most `n`, and when a response passes.
        answer_of: returns the answer of a response, None where it has none.
    """
    rewards = record.rewards["sampled"]
    passed = [reward >= config.pass_threshold for reward in rewards]
    values = {f"pass_at_{k}": (pass_at_k(sum(passed), len(passed), k), len(rewards) // k) for k in config.pass_at_k}
    if config.maj_at_k:
        answers = [answer_of(text) for text in record.responses["sampled"]]
        for k in config.maj_at_k:
            groups = [slice(start, start + k) for start in range(0, len(rewards) - k + 1, k)]
            votes = [majority_vote(answers[group], passed[group]) for group in groups]
            values[f"maj_at_{k}"] = math.fsum(votes) / len(votes), len(votes)
    values |= {f"best_of_{k}": (best_of_k(rewards, k), len(rewards) // k) for k in config.best_of_k}
    sums = {name: (value * groups, float(groups)) for name, (value, groups) in values.items()}
    return record._replace(sums={**record.sums, **sums})


class PromptSums:
    """Gathers records batch by batch, for the logs."""

    def __init__(self) -> None:
        self._known: dict[int, dict[str, tuple[float, float]]] = {}
        self._others: list[dict[str, tuple[float, float]]] = []

    def add(self, records: Sequence[PromptRecord]) -> None:
        """Add the records of a batch."""
        for record in records:
            if record.number is None:
                self._others.append(record.sums)
            else:
                # A sampler that fills up a rank repeats a prompt; the first record of it counts.
                self._known.setdefault(record.number, record.sums)

    def means(self) -> dict[str, float]:
        """Return the figures over all ranks, the same on each, and start anew; a prompt counts once."""
        local, self._known, self._others = (self._known, self._others), {}, []
        parts = gather_objects(local)
        known: dict[int, dict[str, tuple[float, float]]] = {}
        for first, _ in reversed(parts):  # of a prompt that two ranks have had, the first one's
            known |= first
        every = [*known.values(), *(sums for _, others in parts for sums in others)]
        names = {name: None for sums in every for name in sums}
        return {name: _ratio(name, [sums[name] for sums in every if name in sums]) for name in names}


def _ratio(name: str, sums: Sequence[tuple[float, float]]) -> float:
    # Rounded once, so that the order of the prompts, and with it the number of ranks, does not matter.
    top, bottom = (math.fsum(column) for column in zip(*sums, strict=True))
    ratio = top / max(1.0, bottom)
    if not name.endswith("perplexity"):
        return ratio
    return math.exp(ratio) if ratio < MAX_NATS else math.inf
