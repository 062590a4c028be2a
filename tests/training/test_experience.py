"""The rollout buffer: micro-batches in turn, and what its checkpoints hold, those of version 0.1 included."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from remax_lightning.errors import UserError
from remax_lightning.functional import TokenStatistics
from remax_lightning.training.experience import Experience, TrainingPass, join_passes
from remax_lightning.training.rollouts import RolloutBuffer
from remax_lightning.types import Conversation, Prompt, PromptBatch, Responses, Rollout


def experience(num_micro_batches: int = 2) -> Experience:
    ids, mask = torch.arange(8).view(4, 2), torch.ones(4, 2, dtype=torch.bool)
    prompt = PromptBatch(ids, mask, list("abcd"), [{} for _ in range(4)], 0, num_micro_batches, [0, 1, 2, 3])
    responses = Responses(ids + 10, mask, torch.zeros(4, dtype=torch.bool), list("wxyz"))
    reward = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rollout = Rollout(prompt, responses, responses, reward, reward - 1, {"part": reward}, None, None)
    rollout = rollout._replace(baseline_parts={"part": reward - 1}, normalized_reward=reward / 2)
    rollout = rollout._replace(token_rewards=mask * reward[:, None], baseline_token_rewards=mask * reward[:, None] - 1)
    return Experience(rollout, torch.tensor([8.0]), advantages=reward[:, None].expand(4, 2))


def filled(num_micro_batches: int = 2) -> RolloutBuffer:
    buffer = RolloutBuffer()
    buffer.experience = experience(num_micro_batches)
    return buffer


def test_micro_batches_come_in_turn_and_the_last_empties_the_buffer() -> None:
    buffer = filled()
    first = buffer.micro_batch(0)
    assert first.rollout.reward.tolist() == [1.0, 2.0]
    assert first.rollout.prompt.indices == [0, 1]
    assert buffer.state_dict() is not None
    second = buffer.micro_batch(1)
    assert second.rollout.sampled.texts == ["y", "z"]
    assert second.advantages is not None
    assert second.advantages[:, 0].tolist() == [3.0, 4.0]
    assert buffer.state_dict() is None
    with pytest.raises(UserError, match="part 1 of a rollout batch came first"):
        buffer.micro_batch(1)


def test_the_clipped_share_of_joined_passes_is_one_of_trained_tokens() -> None:
    whole = experience(1)._replace(parts=[[3], [0, 1], [2]])
    trained = torch.tensor([[True, True], [True, False], [False, False], [False, True]])  # of a, b, c, d
    clipped = torch.tensor([[False, True], [False, True], [True, True], [False, True]])

    def loss_mask(rollout: Rollout) -> torch.Tensor:
        return trained[["abcd".index(text) for text in rollout.prompt.prompts]]

    passes = []
    for part, prompts in zip(whole.split(), whole.parts or [], strict=True):
        mask, active = trained[prompts], torch.ones(len(prompts), dtype=torch.bool)
        share = (clipped[prompts] & mask).sum() / mask.sum().clamp_min(1)
        passes.append(TrainingPass(torch.tensor(1.0), part, TokenStatistics(mask.float()), active, share))
    assert float(join_passes(passes, whole, loss_mask).clip_fraction) == pytest.approx(2 / 4)
    nothing = join_passes(passes, whole, lambda rollout: torch.zeros_like(rollout.sampled.response_mask))
    assert float(nothing.clip_fraction) == 0


def test_a_checkpoint_holds_the_text_of_prompts_that_know_their_messages(tmp_path: Path) -> None:
    """`weights_only=True` reads no class of ours, and messages may hold anything."""
    made = experience()
    conversation = Conversation([{"role": "user", "content": "hi", "date": date(2026, 1, 1)}])
    batch = made.rollout.prompt._replace(prompts=[Prompt(text, conversation) for text in made.rollout.prompt.prompts])
    buffer = RolloutBuffer()
    buffer.experience = made._replace(rollout=made.rollout._replace(prompt=batch))
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    resumed = RolloutBuffer()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.micro_batch(1).rollout.prompt.prompts == ["c", "d"]


def of_0_1(state: dict[str, Any]) -> dict[str, Any]:
    """The same state as version 0.1 named its parts."""
    prompt = dict(state["rollout"]["prompt"])
    prompt["split"], prompt["num_splits"] = prompt.pop("micro_batch_index"), prompt.pop("num_micro_batches")
    old = {**state, "rollout": {**state["rollout"], "prompt": prompt}}
    old["normalisers"] = old.pop("normalizers")
    return old


@pytest.mark.parametrize("convert", [dict, of_0_1], ids=["now", "0.1"])
def test_a_half_used_rollout_is_resumed(convert: Any) -> None:
    state = convert(filled().state_dict())
    buffer = RolloutBuffer()
    buffer.load_state_dict(state)
    resumed, expected = buffer.micro_batch(1), experience().micro_batch(1, 2)
    assert torch.equal(resumed.rollout.reward, expected.rollout.reward)
    assert torch.equal(resumed.normalizers, expected.normalizers)
    assert torch.equal(resumed.rollout.normalized_reward, expected.rollout.normalized_reward)
    assert torch.equal(resumed.rollout.baseline_parts["part"], expected.rollout.baseline_parts["part"])
    assert resumed.rollout.normalized_reward.tolist() == [1.5, 2.0]
    assert resumed.rollout.token_rewards.tolist() == [[3.0, 3.0], [4.0, 4.0]]
    assert torch.equal(resumed.rollout.baseline_token_rewards, expected.rollout.baseline_token_rewards)
    assert torch.equal(resumed.rollout.prompt.prompt_ids, expected.rollout.prompt.prompt_ids)
    assert resumed.rollout.sampled.texts == expected.rollout.sampled.texts


def test_an_empty_state_empties_the_buffer() -> None:
    buffer = filled()
    buffer.load_state_dict(None)
    assert buffer.state_dict() is None
