"""A rollout with everything that training needs, and a buffer that returns it one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional as F

from remax_lightning.baselines import BaselineInputs
from remax_lightning.distributed import gather_over_ranks, max_over_ranks
from remax_lightning.errors import UserError
from remax_lightning.training.micro_batches import MicroBatches, response_numbers
from remax_lightning.types import PromptBatch, Responses, Rollout


class Experience(NamedTuple):
    """A rollout with everything that the training passes need.

    Args:
        rollout: `B` prompts with their responses and scores.
        normalizers: `[U]` divisor of the loss of each of the `U` updates on this rollout, over all ranks.
        advantages: `[S, R]`; None if the training pass computes them (one update per rollout, with a KL).
        kl: `[S, R]` KL estimate in the advantages; None before they are computed, and without a KL.
        parts: the prompts of each training pass where a budget of tokens cuts the rollout; None without one.
        baseline: `[S]`, or `[S, R]` of tokens, what the rewards are compared with, where that takes more than the
            samples of one prompt.
        squared_norm: `[S, R]` of the gradients of the log-probs at their logits, of responses that training does not
            run; None where nobody asks for them.
    """

    rollout: Rollout
    normalizers: Tensor
    advantages: Tensor | None = None
    kl: Tensor | None = None
    parts: MicroBatches | None = None
    baseline: Tensor | None = None
    squared_norm: Tensor | None = None

    def micro_batch(self, index: int, num_micro_batches: int) -> Experience:
        """Return micro-batch `index` of `num_micro_batches` equal ones."""
        if num_micro_batches == 1:
            return self
        rollout = self.rollout.micro_batch(index, num_micro_batches)
        size = len(rollout.reward)  # responses of one micro-batch
        rows = slice(index * size, (index + 1) * size)
        return self._replace(rollout=rollout, **self._rows(rows))

    def split(self) -> list[Experience]:
        """Return the part of each training pass: all in one, unless a budget of tokens has cut it."""
        if self.parts is None or len(self.parts) == 1:
            return [self]
        device = self.rollout.reward.device
        return [self._select(torch.tensor(prompts, device=device)) for prompts in self.parts]

    def _select(self, prompts: Tensor) -> Experience:
        """Return the experience of the prompts with these numbers, `[b]`."""
        responses = self.rollout.responses_of(prompts)  # [b * n]
        return self._replace(rollout=self.rollout.select(prompts), parts=None, **self._rows(responses))

    def _rows(self, responses: slice | Tensor) -> dict[str, Any]:
        """Return the tensors that have a row for each response, of these responses."""
        columns = {name: getattr(self, name) for name in ("advantages", "kl", "baseline", "squared_norm")}
        return {name: None if column is None else column[responses] for name, column in columns.items()}

    def passes(self, num_micro_batches: int = 1) -> Sequence[Tensor]:
        """Return the numbers of the responses of each training pass: of `num_micro_batches`, or as the budget cuts."""
        if self.parts is not None:
            return response_numbers(self.rollout, self.parts)
        numbers = torch.arange(len(self.rollout.reward), device=self.rollout.reward.device)  # [S]
        parts: Sequence[Tensor] = numbers.split(len(numbers) // num_micro_batches)
        return parts

    def active_responses(self, num_micro_batches: int = 1) -> Tensor:
        """Return `[S]` bool, True on the responses that training has to run.

        Without a KL, a response whose advantages are all 0 has no gradient. At least one response of each training pass
        is active, because the backward pass reduces gradients over ranks.
        """
        # A KL gives every token a gradient, whatever its reward. Advantages that are not computed yet rule nothing out.
        if self.advantages is None or self.rollout.reference_log_probs is not None:
            return torch.ones_like(self.rollout.reward, dtype=torch.bool)
        active = (self.advantages != 0).any(-1)  # [S]
        # Where r = b for a whole micro-batch, its first response stands in.
        for numbers in self.passes(num_micro_batches):
            active[numbers[0]] |= ~active[numbers].any()
        return active


class TrainingPass(NamedTuple):
    """What a pass with gradients returns.

    Args:
        loss: scalar, scaled for the gradient.
        experience: what was trained on, with its advantages.
        log_probs: `[S, R]` of the policy, detached; 0 where it was not run.
        entropy: `[S, R]` in nats, detached; 0 where the policy was not run.
        squared_norm: `[S, R]` of the gradients of the log-probs at their logits; 0 where the policy was not run, unless
            the experience has those.
        active: `[S]` bool, the responses that were run.
        clip_fraction: scalar, share of the trained tokens whose ratio was clipped.
    """

    loss: Tensor
    experience: Experience
    log_probs: Tensor
    entropy: Tensor
    squared_norm: Tensor
    active: Tensor
    clip_fraction: Tensor


def join_passes(passes: Sequence[TrainingPass], whole: Experience) -> TrainingPass:
    """Return passes over the parts of an experience as one pass over the whole.

    Its loss has the value of the sum, and the gradient of the last pass; the others have had their backward pass.
    """
    if len(passes) == 1:
        return passes[0]
    # Back to the order of the rollout: row i of the whole is row `order[i]` of the joined parts.
    order = torch.cat(list(whole.passes())).argsort()  # [S]

    def joined(values: Sequence[Tensor | None]) -> Tensor | None:
        parts = [value for value in values if value is not None]
        return torch.cat(parts)[order] if len(parts) == len(values) else None

    advantages, kl = ([getattr(part.experience, name) for part in passes] for name in ("advantages", "kl"))
    tokens = torch.stack([part.experience.rollout.sampled.response_mask.sum() for part in passes]).float()  # [passes]
    return TrainingPass(
        loss=passes[-1].loss + sum(part.loss.detach() for part in passes[:-1]),
        experience=whole._replace(advantages=joined(advantages), kl=joined(kl)),
        log_probs=cast(Tensor, joined([part.log_probs for part in passes])),
        entropy=cast(Tensor, joined([part.entropy for part in passes])),
        squared_norm=cast(Tensor, joined([part.squared_norm for part in passes])),
        active=cast(Tensor, joined([part.active for part in passes])),
        clip_fraction=torch.stack([part.clip_fraction for part in passes]) @ tokens / tokens.sum(),
    )


def baseline_inputs(
    rollout: Rollout, trainer: Trainer, bound: float, squared_norm: Tensor | None = None
) -> BaselineInputs:
    """Return the scores of the rollouts of all ranks, for a baseline that reads them; every rank has as many.

    Args:
        rollout: of this rank.
        trainer: knows the ranks.
        bound: of the absolute rewards.
        squared_norm: `[S, R]` of the gradients of the tokens, for a baseline that reads them.
    """
    # One row per response, so that one collective moves all columns.
    n = rollout.num_samples
    columns = [rollout.reward.clamp(-bound, bound), rollout.sampled.response_mask.sum(1)]  # [S] each
    if rollout.baseline_reward is not None:
        columns.append(rollout.baseline_reward.clamp(-bound, bound).repeat_interleave(n))
    rows = torch.stack([column.double().cpu() for column in columns], dim=1)  # [S, columns]
    gathered = gather_over_ranks(trainer, rows.flatten()).view(-1, len(columns))  # [ranks * S, columns]
    return BaselineInputs(
        reward=gathered[:, 0],
        num_samples=n,
        greedy_reward=gathered[::n, 2] if len(columns) > 2 else None,
        lengths=gathered[:, 1],
        prompts=places_over_ranks(rollout.prompt, trainer),
        squared_norms=None if squared_norm is None else _rows_over_ranks(squared_norm, trainer),
    )


def _rows_over_ranks(values: Tensor, trainer: Trainer) -> Tensor:
    """Return `[ranks * S, R]` the rows of all ranks, as wide as the widest, with 0 where a rank has fewer columns."""
    width = int(max_over_ranks(trainer, [values.shape[1]])[0])
    rows = F.pad(values.double().cpu(), (0, width - values.shape[1]))
    return gather_over_ranks(trainer, rows.flatten()).view(-1, width)


def places_over_ranks(batch: PromptBatch, trainer: Trainer) -> list[int] | None:
    """Return the places in the data set of the prompts of all ranks, None where the loader does not tell them."""
    if batch.indices is None:
        return None
    places = gather_over_ranks(trainer, torch.tensor(batch.indices, dtype=torch.float64))
    return [int(place) for place in places]


class RolloutBuffer:
    """Holds the rollout that is trained on; empty between two rollouts."""

    def __init__(self) -> None:
        self._experience: Experience | None = None

    def fill(self, experience: Experience) -> None:
        """Replace the content by a new rollout."""
        self._experience = experience

    def micro_batch(self, index: int) -> Experience:
        """Return micro-batch `index` of the rollout; the last one empties the buffer.

        Raises:
            UserError: if a loader starts in the middle of a rollout batch.
        """
        if self._experience is None:
            raise UserError(f"data: part {index} of a rollout batch came first; a loader starts with part 0")
        experience, num_micro_batches = self._experience, self._experience.rollout.prompt.num_micro_batches
        # The rollout is done with its last part: a checkpoint between two rollouts holds none.
        if index + 1 == num_micro_batches:
            self._experience = None
        return experience.micro_batch(index, num_micro_batches)

    # ---- Checkpoints ----

    def state_dict(self) -> dict[str, Any] | None:
        """Return the rollout as nested dictionaries of tensors, numbers and text, which `weights_only=True` reads.

        None where the buffer is empty. The rows of the data set and the messages of the prompts stay out: they may
        hold anything, and once a rollout is scored nothing reads them.
        """
        if self._experience is None:
            return None
        rollout = self._experience.rollout
        # `Prompt` is a subclass of str, which `weights_only=True` would refuse.
        prompt = rollout.prompt._replace(rows=[], prompts=[str(text) for text in rollout.prompt.prompts])
        state = self._experience._asdict()
        state["rollout"] = rollout._asdict() | {
            "prompt": prompt._asdict(),
            "sampled": rollout.sampled._asdict(),
            "greedy": None if rollout.greedy is None else rollout.greedy._asdict(),
        }
        return state

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore the rollout of a checkpoint, also of version 0.1."""
        if state is None:
            self._experience = None
            return
        # A copy, since the checkpoint belongs to Lightning.
        rollout = dict(state["rollout"])
        rollout["prompt"] = PromptBatch(**_rename_old_keys(rollout["prompt"]))
        rollout["sampled"] = Responses(**rollout["sampled"])
        rollout["greedy"] = None if rollout["greedy"] is None else Responses(**rollout["greedy"])
        self._experience = Experience(**{**_rename_old_keys(state), "rollout": Rollout(**rollout)})


_OLD_NAMES = {"normalisers": "normalizers", "split": "micro_batch_index", "num_splits": "num_micro_batches"}
"""Names of version 0.1 and their new names."""


def _rename_old_keys(state: dict[str, Any]) -> dict[str, Any]:
    return {_OLD_NAMES.get(name, name): value for name, value in state.items()}
