"""Which prompts of a rollout have an advantage: told to `data.selection`, and replaced where it asks for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from remax_lightning.baselines import baseline_name
from remax_lightning.distributed import gather_over_ranks, max_over_ranks
from remax_lightning.errors import UserError
from remax_lightning.rewards.base import Reward
from remax_lightning.training.config_checks import AHEAD
from remax_lightning.training.objective import Objective
from remax_lightning.types import PromptBatch, Responses, Rollout

KEY = "data.selection"


class PromptSelector:
    """Tells the data module of a run what its rollouts gave, and draws more prompts where a step lacks advantages.

    Args:
        data: with `selection`, `observe`, `more_prompts` and `selection_metrics`, as `PromptDataModule` has them.
        objective: says what an advantage is.
        trainer: knows the ranks.
    """

    def __init__(self, data: Any, objective: Objective, trainer: Trainer) -> None:
        self.data, self.objective, self.trainer = data, objective, trainer
        self.share, self.batches = 0.0, 1  # of the last step: prompts with an advantage, rollout batches

    def select(self, rollout: Rollout, roll_out: Callable[[PromptBatch], Rollout]) -> Rollout:
        """Return what is trained on: this rollout, or as many prompts of several, those with an advantage first.

        Every rank makes as many rollouts.

        Args:
            rollout: of the batch that the loader yielded, not changed by its baseline yet.
            roll_out: makes the next one, of other prompts.
        """
        batch, size = rollout.prompt, len(rollout.prompt.prompts)
        informative = self._observe(rollout)  # [B] bool
        self.batches = 1
        while self.batches < self.data.selection.oversample:
            # The rank that lacks most decides: generating may be a collective.
            if max_over_ranks(self.trainer, [size - int(informative.sum())])[0] <= 0:
                break
            more = roll_out(cast(PromptBatch, self.trainer.strategy.batch_to_device(self.data.more_prompts())))
            informative = torch.cat([informative, self._observe(more)])
            rollout = join_rollouts([rollout, more], int(self.data.tokenizer.pad_token_id))
            self.batches += 1
        cast(Any, self.trainer.lightning_module).log_dict(self.metrics(), batch_size=1)
        if self.batches == 1:
            return rollout
        # ---- Those with an advantage, filled up with others, in the order in which they were drawn ----
        order = torch.cat([informative.nonzero().flatten(), (~informative).nonzero().flatten()])
        chosen = rollout.select(order[:size].sort().values)
        prompt = chosen.prompt._replace(
            micro_batch_index=batch.micro_batch_index,
            num_micro_batches=batch.num_micro_batches,
            tokens_per_micro_batch=batch.tokens_per_micro_batch,
        )
        return chosen._replace(prompt=prompt)

    def _observe(self, rollout: Rollout) -> Tensor:
        """Return `[B]` bool, which prompts have an advantage; tell the data module of those of all ranks."""
        n = rollout.num_samples
        informative = torch.ones(len(rollout.reward) // n, dtype=torch.bool, device=rollout.reward.device)
        if self.data.selection.needs_advantages:
            # r - b, before a KL, which differs from 0 for every prompt
            advantages = self.objective.advantages(rollout, None, 0.0, lambda values: values)  # [S, R]
            informative = (advantages != 0).any(-1).view(-1, n).any(-1)
        rates = rollout.reward.view(-1, n).mean(1)  # [B]
        if rollout.prompt.indices is None:
            raise UserError(f"{KEY} needs the places of prompts in their data set, and the data loader tells none")
        places = torch.tensor(rollout.prompt.indices, dtype=torch.float64)
        table = torch.stack([places, informative.double().cpu(), rates.double().cpu()], 1)  # [B, 3]
        # Every rank observes the prompts of all, so that all draw the same next.
        everywhere = gather_over_ranks(self.trainer, table.flatten()).view(-1, 3)
        numbers, gives, means = everywhere.unbind(1)
        self.data.observe([int(place) for place in numbers], [value > 0 for value in gives], means.tolist(), n)
        self.share = float(gives.mean())
        return informative

    def metrics(self) -> dict[str, float]:
        """Return what is logged of a step."""
        figures: dict[str, float] = self.data.selection_metrics()
        if self.data.selection.needs_advantages:
            figures["data/informative_share"] = self.share
        if self.data.selection.oversample > 1:
            figures["data/rollout_batches"] = float(self.batches)
        return figures


def make_selector(trainer: Trainer, objective: Objective, reward: Reward | None) -> PromptSelector | None:
    """Return the selector of a run, None where its data module selects nothing.

    Raises:
        UserError: if the selection has no meaning in this run.
    """
    data: Any = getattr(trainer, "datamodule", None)
    selection = getattr(data, "selection", None)
    if selection is None or not selection.is_on or trainer.state.fn != TrainerFn.FITTING:
        return None
    name = "oversample" if selection.oversample > 1 else "skip_uninformative"
    if selection.needs_advantages:
        if objective.reads_whole_batch:
            raise UserError(
                f"{KEY}.{name} asks which prompts have no advantage, and with model.advantage.baseline"
                f" {baseline_name(objective.advantage_config.baseline)} hardly one has exactly none; take greedy,"
                " leave_one_out, group_mean or none, or leave the key out"
            )
        if objective.advantage_config.whiten:
            raise UserError(f"{KEY}.{name} needs model.advantage.whiten false: whitened, every prompt has an advantage")
        if reward is not None and reward.normalized_weights is not None:
            raise UserError(
                f"{KEY}.{name} needs one reward per response, and model.reward.init_args.normalize std compares its"
                " parts; set it to none, or leave the key out"
            )
    if getattr(data, "looks_ahead", False):
        raise UserError(
            f"{KEY} needs {AHEAD} 0: the next rollout is written before the rewards of this one are known, which decide"
            " on its prompts"
        )
    if getattr(trainer, "overfit_batches", 0) or getattr(trainer, "reload_dataloaders_every_n_epochs", 0):
        raise UserError(
            f"{KEY} needs trainer.overfit_batches 0 and trainer.reload_dataloaders_every_n_epochs 0: Lightning would"
            " take its sampler away"
        )
    return PromptSelector(data, objective, trainer)


# ---- Joining rollouts ----


def join_rollouts(parts: Sequence[Rollout], pad_id: int) -> Rollout:
    """Return rollouts of different prompts as one, padded to the longest prompt and the longest response.

    Args:
        parts: as the worker scores them: without what a reference or a baseline adds.
        pad_id: fills up ids.
    """

    def joined(name: str, fill: float = 0) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else _cat(values, fill)

    prompts = [part.prompt for part in parts]
    return parts[0]._replace(
        prompt=prompts[0]._replace(
            prompt_ids=_cat([prompt.prompt_ids for prompt in prompts], pad_id, left=True),
            prompt_mask=_cat([prompt.prompt_mask for prompt in prompts], 0, left=True),
            prompts=[text for prompt in prompts for text in prompt.prompts],
            rows=[row for prompt in prompts for row in prompt.rows],
            indices=[place for prompt in prompts for place in prompt.indices or ()],
        ),
        sampled=_join_responses([part.sampled for part in parts], pad_id),
        greedy=None if parts[0].greedy is None else _join_responses([cast(Responses, p.greedy) for p in parts], pad_id),
        reward=cast(Tensor, joined("reward")),
        baseline_reward=joined("baseline_reward"),
        reward_parts=_join_named([part.reward_parts for part in parts]),
        log_probs=joined("log_probs"),
        engine_log_probs=joined("engine_log_probs"),
        baseline_parts=None
        if parts[0].baseline_parts is None
        else _join_named([cast("dict[str, Tensor]", part.baseline_parts) for part in parts]),
        token_rewards=joined("token_rewards"),
        baseline_token_rewards=joined("baseline_token_rewards"),
    )


def _join_responses(parts: Sequence[Responses], pad_id: int) -> Responses:
    return Responses(
        _cat([part.response_ids for part in parts], pad_id),
        _cat([part.response_mask for part in parts], 0),
        torch.cat([part.truncated for part in parts]),
        [text for part in parts for text in part.texts],
    )


def _join_named(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _cat(tensors: Sequence[Tensor], fill: float, left: bool = False) -> Tensor:
    """Return tensors `[M]` or `[M, L]` one below the other, filled up to the widest."""
    if tensors[0].dim() == 1:
        return torch.cat(list(tensors))
    width = max(tensor.shape[1] for tensor in tensors)
    padded = []
    for tensor in tensors:
        room = width - tensor.shape[1]
        padded.append(torch.nn.functional.pad(tensor, (room, 0) if left else (0, room), value=fill))
    return torch.cat(padded)
