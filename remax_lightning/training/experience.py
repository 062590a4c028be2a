"""A rollout with everything that training needs, cut into the parts that training passes run.

With a budget of tokens these are planned here alone. The lengths of a rollout are known only once it is made, and
differ by rank: each rank fills its micro-batches up to the budget; then all ranks take the largest number of any,
because under ZeRO and FSDP2 every pass is a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from remax_lightning.baselines import BaselineInputs
from remax_lightning.distributed import gather_over_ranks, max_over_ranks, rows_over_ranks
from remax_lightning.errors import UserError
from remax_lightning.functional import TokenStatistics
from remax_lightning.models.packing import packing_obstacle
from remax_lightning.types import PromptBatch, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# ---- Which responses a pass runs under a budget of tokens ----


MicroBatches = list[list[int]]
"""The numbers of the prompts in each micro-batch; every prompt is in one."""


def check_budget(budget: int | None, longest_prompt: int | None, longest_response: int, num_samples: int) -> None:
    """Refuse a budget of tokens that the longest prompt with its `num_samples` responses would exceed.

    Raises:
        UserError: if it does.
    """
    if budget is None or longest_prompt is None:
        return
    needed = num_samples * (longest_prompt + longest_response)
    if budget < needed:
        samples = "" if num_samples == 1 else f"{num_samples} samples of "
        raise UserError(
            f"data.tokens_per_micro_batch must be at least {needed}, got {budget}: a micro-batch holds a prompt with"
            f" all of its responses, {samples}data.max_prompt_length {longest_prompt} +"
            f" model.sampling.max_response_length {longest_response}; raise it, or shorten prompts or responses"
        )


def row_lengths(rollout: Rollout, active: Tensor | None = None) -> list[list[int]]:
    """Return the tokens of each prompt's responses, the prompt included: `B` lists of `n` numbers, 0 if not `active`.

    Args:
        rollout: the responses.
        active: `[S]` bool, the responses that are run; None for all.
    """
    prompts = rollout.prompt.prompt_mask.sum(-1).repeat_interleave(rollout.num_samples)  # [S]
    lengths = prompts + rollout.sampled.response_mask.sum(-1)  # [S]
    if active is not None:
        lengths = lengths * active
    rows: list[list[int]] = lengths.view(-1, rollout.num_samples).tolist()
    return rows


def plan_micro_batches(
    lengths: Sequence[Sequence[int]], budget: int, *, packed: bool, agree: Callable[[int], int] = int
) -> MicroBatches:
    """Return micro-batches of at most `budget` tokens each, the padding included, and as few as that allows.

    The largest come first, so that ranks whose passes wait for each other run passes of like size.

    Args:
        lengths: tokens of the rows of each prompt; rows of 0 tokens are not run.
        budget: most tokens of a micro-batch. A prompt with more is alone.
        packed: whether rows are packed; otherwise they are padded to the longest of their micro-batch.
        agree: from the number of micro-batches that this rank needs to the number that all ranks have.
    """
    tokens = [sum(row) for row in lengths]
    batches = _packed_batches(tokens, budget) if packed else _padded_batches(lengths, budget)
    return _with_number(batches, agree(len(batches)), tokens)


def _packed_batches(tokens: Sequence[int], budget: int) -> MicroBatches:
    """Return micro-batches of like size: the longest prompt that is left goes into the emptiest one."""
    order = sorted(range(len(tokens)), key=lambda prompt: -tokens[prompt])
    # As few as the sum needs, and one more until the fullest fits.
    fewest = min(max(1, -(-sum(tokens) // budget)), len(tokens))  # a prompt beyond the budget is alone
    for number in range(fewest, len(tokens) + 1):
        batches: MicroBatches = [[] for _ in range(number)]
        sizes = [0] * number
        for prompt in order:
            # Of equally full ones the one with fewer prompts, so that none stays empty.
            emptiest = min(range(number), key=lambda i: (sizes[i], len(batches[i])))
            batches[emptiest].append(prompt)
            sizes[emptiest] += tokens[prompt]
        if max(sizes) <= budget or number == len(tokens):
            break
    return [batches[i] for i in sorted(range(number), key=lambda i: -sizes[i])]


def _padded_batches(lengths: Sequence[Sequence[int]], budget: int) -> MicroBatches:
    """Return micro-batches of rows of like length, the longest first, so that padding is least."""
    order = sorted(range(len(lengths)), key=lambda prompt: -max(lengths[prompt]))
    batches: MicroBatches = []
    rows, width = 0, 0  # of the last micro-batch, which is `rows * width` tokens with its padding
    for prompt in order:
        added = sum(length > 0 for length in lengths[prompt])
        if not batches or (rows + added) * width > budget:
            batches.append([])
            rows, width = 0, max(lengths[prompt])
        batches[-1].append(prompt)
        rows += added
    return batches


def _with_number(batches: MicroBatches, number: int, tokens: Sequence[int]) -> MicroBatches:
    """Halve the largest micro-batches until there are `number`; what is halved still fits the budget."""
    while len(batches) < number:
        # Every rank has as many prompts, so there is one left to halve.
        largest = max(
            (i for i, batch in enumerate(batches) if len(batch) > 1),
            key=lambda i: sum(tokens[prompt] for prompt in batches[i]),
        )
        batch = batches[largest]
        batches[largest : largest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return batches


def plan_passes(
    rollout: Rollout, budget: int, model: PreTrainedModel, trainer: Trainer, active: Tensor | None = None
) -> MicroBatches:
    """Return the prompts of each pass of `model` over a rollout, of at most `budget` tokens.

    Args:
        rollout: the responses.
        budget: as in `plan_micro_batches`.
        model: whose rows are packed or padded.
        trainer: of the run.
        active: `[S]` bool, the responses that are run; None for all.
    """

    def most_of_ranks(number: int) -> int:
        return int(max_over_ranks(trainer, [number])[0])

    # In training every rank makes a rollout, so all can agree on a number of passes. What a rank would repeat for
    # another that has more would run without packing. Batches of an evaluation differ in number.
    agree = most_of_ranks if trainer.training else int
    lengths = row_lengths(rollout, active)  # B lists of n
    packed = not packing_obstacle(model, max(map(max, lengths)))
    return plan_micro_batches(lengths, budget, packed=packed, agree=agree)


def reference_passes(rollout: Rollout, budget: int, model: PreTrainedModel, trainer: Trainer) -> list[Tensor]:
    """Return the numbers of the responses in each pass of a reference, all of which it runs; as in `plan_passes`."""
    return response_numbers(rollout, plan_passes(rollout, budget, model, trainer))


def response_numbers(rollout: Rollout, batches: MicroBatches) -> list[Tensor]:
    """Return the numbers of the sampled responses in each micro-batch."""
    device = rollout.reward.device
    return [rollout.responses_of(torch.tensor(batch, device=device)) for batch in batches]


# ---- Experience ----


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
            run, 0 of the others; None where nobody asks for norms.
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
        rollout = self.rollout.micro_batch(index, num_micro_batches)
        size = len(rollout.reward)  # responses of one micro-batch
        rows = slice(index * size, (index + 1) * size)
        return self._replace(rollout=rollout, **self._rows(rows))

    def within_budget(self, budget: int, model: PreTrainedModel, trainer: Trainer) -> Experience:
        """Return the experience with the parts that a budget of tokens cuts it into, as many on every rank.

        Args:
            budget: most tokens of a pass.
            model: whose rows are packed or padded.
            trainer: of the run.
        """
        return self._replace(parts=plan_passes(self.rollout, budget, model, trainer, self.active_responses()))

    def split(self) -> list[Experience]:
        """Return the part of each training pass, as a budget of tokens has cut it."""
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

    def idle_responses(self, num_micro_batches: int = 1) -> Tensor:
        """Return `[S]` bool, True on the responses that training leaves out, and on at least one of each pass."""
        idle = ~self.active_responses(num_micro_batches)  # [S]
        for numbers in self.passes(num_micro_batches):  # as many passes on every rank, each of at least one response
            idle[numbers[0]] |= ~idle[numbers].any()
        return idle


class TrainingPass(NamedTuple):
    """What a pass with gradients returns.

    Args:
        loss: scalar, scaled for the gradient.
        experience: what was trained on, with its advantages.
        statistics: of the policy, each `[S, R]`; 0 where it was not run.
        active: `[S]` bool, the responses that were run.
        clip_fraction: scalar, share of the trained tokens whose ratio was clipped.
    """

    loss: Tensor
    experience: Experience
    statistics: TokenStatistics
    active: Tensor
    clip_fraction: Tensor

    @property
    def squared_norm(self) -> Tensor | None:
        """`[S, R]` of the gradients of the log-probs at their logits, of all responses; None where nobody asks."""
        of_idle = self.experience.squared_norm
        if of_idle is None:
            return None
        return torch.where(self.active[:, None], cast(Tensor, self.statistics.squared_norm), of_idle)


def join_passes(
    passes: Sequence[TrainingPass], whole: Experience, loss_mask: Callable[[Rollout], Tensor]
) -> TrainingPass:
    """Return passes over the parts of an experience as one pass over the whole.

    Its loss has the value of the sum, and the gradient of the last pass; the others have had their backward pass.

    Args:
        passes: over the parts.
        whole: what they are parts of.
        loss_mask: returns the trained tokens of a rollout.
    """
    # Back to the order of the rollout: row i of the whole is row `order[i]` of the joined parts.
    order = torch.cat(list(whole.passes())).argsort()  # [S]

    def joined(values: Sequence[Tensor | None]) -> Tensor | None:
        parts = [value for value in values if value is not None]
        return torch.cat(parts)[order] if len(parts) == len(values) else None

    advantages, kl = ([getattr(part.experience, name) for part in passes] for name in ("advantages", "kl"))
    # Detached, since the graphs of earlier passes are gone.
    statistics = [
        [None if value is None else value.detach() for value in column]
        for column in zip(*(part.statistics for part in passes), strict=True)
    ]
    tokens = torch.stack([loss_mask(part.experience.rollout).sum() for part in passes]).float()  # [passes]
    return TrainingPass(
        loss=passes[-1].loss + sum(part.loss.detach() for part in passes[:-1]),
        experience=whole._replace(advantages=joined(advantages), kl=joined(kl)),
        statistics=TokenStatistics(*(cast(Tensor, joined(column)) for column in statistics)),
        active=cast(Tensor, joined([part.active for part in passes])),
        clip_fraction=torch.stack([part.clip_fraction for part in passes]) @ tokens / tokens.sum().clamp_min(1),
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
    if squared_norm is not None:  # a pass that overflows tells nothing; its optimizer step is skipped
        squared_norm = squared_norm.nan_to_num(nan=0.0, posinf=0.0)
    gathered = gather_over_ranks(trainer, rows.flatten()).view(-1, len(columns))  # [ranks * S, columns]
    return BaselineInputs(
        reward=gathered[:, 0],
        num_samples=n,
        greedy_reward=gathered[::n, 2] if len(columns) > 2 else None,
        lengths=gathered[:, 1],
        prompts=places_over_ranks(rollout.prompt, trainer),
        squared_norms=None if squared_norm is None else rows_over_ranks(trainer, squared_norm),
    )


def places_over_ranks(batch: PromptBatch, trainer: Trainer) -> list[int] | None:
    """Return the places in the data set of the prompts of all ranks, None where the loader does not tell them."""
    if batch.indices is None:
        return None
    places = gather_over_ranks(trainer, torch.tensor(batch.indices, dtype=torch.float64))
    return [int(place) for place in places]
