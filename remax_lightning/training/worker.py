"""Making a rollout: responses, their text, and their rewards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from remax_lightning.functional import response_mask
from remax_lightning.rewards.base import Reward, checked_scores
from remax_lightning.rollout import GenerationRequest, RolloutEngine, SamplingConfig, StopCheck
from remax_lightning.strategies import rollout_parameters
from remax_lightning.types import PromptBatch, Responses, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class StoppingCriteria(NamedTuple):
    """What ends a response, and what stands after its end.

    Args:
        eos_ids: token ids that end a response.
        pad_id: what stands after the end.
        ended: what else ends it; None without stop strings.
    """

    eos_ids: list[int]
    pad_id: int
    ended: StopCheck | None = None


class Written(NamedTuple):
    """Responses before they are scored.

    Args:
        sampled: `S = B * n` sampled responses.
        greedy: `B` greedy ones; None where they were not asked for.
        log_probs: `[S, R]` log-probs of the sampled tokens; None where they were not asked for.
    """

    sampled: Responses
    greedy: Responses | None
    log_probs: Tensor | None


def write(
    model: PreTrainedModel,
    prompt: PromptBatch,
    *,
    engine: RolloutEngine,
    sampling: SamplingConfig,
    stopping: StoppingCriteria,
    generator: torch.Generator,
    tokenizer: PreTrainedTokenizerBase,
    greedy: bool,
    times: dict[str, float],
    log_probs: bool = False,
) -> Written:
    """Let a model answer the prompts.

    Args:
        model: the policy, or whatever else answers.
        prompt: `B` prompts.
        engine: makes the responses.
        sampling: how they are sampled.
        stopping: what ends them.
        generator: source of randomness.
        tokenizer: turns them into text.
        greedy: whether greedy responses are made too.
        times: where the seconds are added, under `rollout`.
        log_probs: whether the engine is asked for the log-probs of what it samples.
    """
    rolling_out = timed(times, "rollout", prompt.prompt_ids.device)
    request = GenerationRequest(
        prompt_ids=prompt.prompt_ids,
        prompt_mask=prompt.prompt_mask,
        sampling=sampling,
        eos_ids=stopping.eos_ids,
        pad_id=stopping.pad_id,
        generator=generator,
        greedy=greedy,
        return_log_probs=log_probs,
        stop_check=stopping.ended,
    )
    with rolling_out, torch.no_grad(), evaluating(model), rollout_parameters(model):
        generated = engine.generate(model, request)
        count, stopped_at = len(generated.sampled_ids), generated.stopped_at
        at = (None, None) if stopped_at is None else (stopped_at[:count], stopped_at[count:])
        sampled = _responses(generated.sampled_ids, stopping.eos_ids, at[0], tokenizer)
        likeliest = None
        if generated.greedy_ids is not None:
            likeliest = _responses(generated.greedy_ids, stopping.eos_ids, at[1], tokenizer)
    return Written(sampled, likeliest, generated.log_probs)


def scored(
    prompt: PromptBatch, written: Written, reward: Reward, truncation_penalty: float, times: dict[str, float]
) -> Rollout:
    """Score sampled and greedy responses in one pass of the reward.

    Args:
        prompt: `B` prompts.
        written: the responses.
        reward: scores them.
        truncation_penalty: taken off the reward of every truncated response.
        times: where the seconds are added, under `reward`.

    Raises:
        RewardError: if the reward fails or returns what must not be trained on.
    """
    sampled, greedy = written.sampled, written.greedy
    count, num_prompts = len(sampled.texts), len(prompt.prompts)
    order = [i for i in range(num_prompts) for _ in range(count // num_prompts)]
    order += list(range(num_prompts)) if greedy is not None else []
    with timed(times, "reward", prompt.prompt_ids.device), torch.no_grad():
        scores = checked_scores(
            reward,
            [prompt.prompts[i] for i in order],
            sampled.texts + (greedy.texts if greedy is not None else []),
            [prompt.rows[i] for i in order],
        )
        device = prompt.prompt_ids.device
        truncated = sampled.truncated if greedy is None else torch.cat([sampled.truncated, greedy.truncated])
        total = scores.reward.to(device) - truncation_penalty * truncated
    return Rollout(
        prompt=prompt,
        sampled=sampled,
        greedy=greedy,
        reward=total[:count],
        baseline_reward=None if greedy is None else total[count:],
        reward_parts={name: part[:count].to(device) for name, part in scores.parts.items()},
        reference_log_probs=None,
        log_probs=written.log_probs,
    )


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
