"""Making a rollout: responses, their text, and their rewards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from remax_lightning.batch import PromptBatch, Responses, Rollout
from remax_lightning.functional import response_mask
from remax_lightning.rewards.base import Reward, checked_scores
from remax_lightning.rollout import Ended, RolloutEngine, SamplingConfig
from remax_lightning.strategies import rollout_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Stopping(NamedTuple):
    """What ends a response, and what stands after its end.

    Args:
        eos_ids: token ids that end a response.
        pad_id: what stands after the end.
        ended: what else ends it; None without stop strings.
    """

    eos_ids: list[int]
    pad_id: int
    ended: Ended | None = None


def collect(
    model: PreTrainedModel,
    prompt: PromptBatch,
    *,
    engine: RolloutEngine,
    sampling: SamplingConfig,
    stopping: Stopping,
    generator: torch.Generator,
    tokenizer: PreTrainedTokenizerBase,
    reward: Reward,
    greedy: bool,
    truncation_penalty: float,
    times: dict[str, float],
    log_probs: bool = False,
) -> Rollout:
    """Let the policy answer the prompts, and score sampled and greedy responses in one pass of the reward.

    Args:
        model: the policy.
        prompt: `B` prompts.
        engine: makes the responses.
        sampling: how they are sampled.
        stopping: what ends them.
        generator: source of randomness.
        tokenizer: turns them into text.
        reward: scores them.
        greedy: whether greedy responses are made too.
        truncation_penalty: taken off the reward of every truncated response.
        times: where the seconds are added, under `rollout` and `reward`.
        log_probs: whether the engine is asked for the log-probs of what it samples.

    Raises:
        RewardError: if the reward fails or returns what must not be trained on.
    """
    rolling_out = timed(times, "rollout", prompt.prompt_ids.device)
    asked: dict[str, Any] = {} if stopping.ended is None else {"ended": stopping.ended}
    if log_probs:
        asked["log_probs"] = True
    with rolling_out, torch.no_grad(), evaluating(model), rollout_parameters(model):
        generated = engine.generate(
            model,
            prompt.prompt_ids,
            prompt.prompt_mask,
            sampling=sampling,
            eos_ids=stopping.eos_ids,
            pad_id=stopping.pad_id,
            generator=generator,
            greedy=greedy,
            **asked,
        )
        count, stopped_at = len(generated.sampled_ids), generated.stopped_at
        at = (None, None) if stopped_at is None else (stopped_at[:count], stopped_at[count:])
        sampled = _responses(generated.sampled_ids, stopping.eos_ids, at[0], tokenizer)
        likeliest = None
        if generated.greedy_ids is not None:
            likeliest = _responses(generated.greedy_ids, stopping.eos_ids, at[1], tokenizer)
    with timed(times, "reward", prompt.prompt_ids.device), torch.no_grad():
        rollout = _scored(prompt, sampled, likeliest, reward, sampling.num_samples, truncation_penalty)
    return rollout._replace(log_probs=generated.log_probs)


def _responses(
    ids: Tensor, eos_ids: list[int], stopped_at: Tensor | None, tokenizer: PreTrainedTokenizerBase
) -> Responses:
    mask = response_mask(ids, eos_ids, stopped_at)
    ends = torch.isin(ids, torch.tensor(eos_ids, device=ids.device)).any(-1)
    if stopped_at is not None:
        ends |= stopped_at > 0
    tokens = [row[kept].tolist() for row, kept in zip(ids.cpu(), mask.cpu(), strict=True)]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return Responses(ids, mask, ~ends, list(texts))


def _scored(
    prompt: PromptBatch,
    sampled: Responses,
    greedy: Responses | None,
    reward: Reward,
    num_samples: int,
    truncation_penalty: float,
) -> Rollout:
    repeated = [i for i in range(len(prompt.prompts)) for _ in range(num_samples)]
    order = repeated + (list(range(len(prompt.prompts))) if greedy is not None else [])
    scores = checked_scores(
        reward,
        [prompt.prompts[i] for i in order],
        sampled.texts + (greedy.texts if greedy is not None else []),
        [prompt.rows[i] for i in order],
    )
    device, count = prompt.prompt_ids.device, len(repeated)
    total = scores.reward.to(device)
    truncated = sampled.truncated if greedy is None else torch.cat([sampled.truncated, greedy.truncated])
    total = total - truncation_penalty * truncated
    return Rollout(
        prompt=prompt,
        sampled=sampled,
        greedy=greedy,
        reward=total[:count],
        baseline_reward=None if greedy is None else total[count:],
        reward_parts={name: part[:count].to(device) for name, part in scores.parts.items()},
        reference_log_probs=None,
        log_probs=None,
    )


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode inside: in train mode with gradient checkpointing a model drops its cache and writes wrong tokens."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def timed(times: dict[str, float], phase: str, device: torch.device) -> Iterator[None]:
    """Add the seconds spent inside to `times[phase]`, the device's own work included."""
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    times[phase] = times.get(phase, 0.0) + time.perf_counter() - start
