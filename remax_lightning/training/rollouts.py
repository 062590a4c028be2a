"""The rollouts of a run: which one comes next, with random numbers of its own, and the one that is trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy

from remax_lightning.distributed import broadcast, raise_on_all_ranks
from remax_lightning.errors import UserError
from remax_lightning.training.config_checks import engine_log_probs
from remax_lightning.training.experience import Experience
from remax_lightning.training.objective import Objective
from remax_lightning.training.prompt_selection import PromptSelector, make_selector
from remax_lightning.training.update_plan import UpdatePlan, has_next_rollout
from remax_lightning.training.worker import RolloutWorker
from remax_lightning.types import PromptBatch, Responses, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TRAINING, EVALUATION, REFERENCE = 0, 1, 2
"""What rollouts are made for. The reference's responses in an evaluation have random numbers of their own, because
responses that are compared have to be independent."""


def rollout_generator(seed: int, rank: int, stage: int, count: int, device: torch.device) -> torch.Generator:
    """Return a generator for one rollout, its seed made from run, rank, stage and number.

    A checkpoint needs the count alone, and an evaluation does not change the random numbers of training.

    Args:
        seed: that of the run.
        rank: of this process.
        stage: `TRAINING`, `EVALUATION` or `REFERENCE`.
        count: how many rollouts the stage has made before.
        device: where the numbers are drawn.
    """
    # SeedSequence mixes all four, so that neighboring seeds, ranks and counts share no stream.
    entropy = [seed, rank, stage, count]
    # 63 bits, so that the number is not negative where it is read as signed.
    rollout_seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(rollout_seed)


class Rollouts:
    """Makes the rollouts of a run. Call `prepare` before the first.

    Args:
        worker: generates responses and scores them.
        objective: says whether greedy responses are needed.
    """

    trainer: Trainer
    seed: int | None = None
    """Of the run: rank 0's, or that of the checkpoint."""
    selector: PromptSelector | None = None
    """Of `data.selection`; None where each rollout is trained on as it is."""
    count: int = 0
    """Rollouts made in training; with the seed it fixes the random numbers of the next one."""

    def __init__(self, worker: RolloutWorker, objective: Objective) -> None:
        self.worker, self.objective = worker, objective

    def prepare(self, trainer: Trainer) -> int:
        """Return the seed of the run; every rank calls this."""
        self.trainer = trainer
        self.selector = make_selector(trainer, self.objective, self.worker.reward)
        if self.seed is None:
            # The seed of rank 0, because a checkpoint holds that one.
            self.seed = int(broadcast(trainer.strategy, torch.initial_seed() % 2**63))
        return self.seed

    def make(
        self,
        policy: PreTrainedModel,
        batch: PromptBatch,
        plan: UpdatePlan | None,
        number: int = 0,
        num_samples: int | None = None,
        selects: bool = True,
    ) -> Rollout:
        """Sample, decode greedily and score: `y ~ pi(.|x)`, `y*`, `r = reward(x, y)`, `b = reward(x, y*)`.

        Args:
            policy: the model that responds.
            batch: the prompts.
            plan: of the updates on the rollout; None in an evaluation.
            number: of the batch, in an evaluation; training counts its rollouts.
            num_samples: responses per prompt, in an evaluation; None for those of training.
            selects: whether prompts without an advantage may make room for others, where `data.selection` asks for it.

        Raises:
            UserError: if the engine or the reward cannot be used; on every rank in a fit.
        """
        # An evaluation compares with y*, whatever the baseline is in training.
        always = plan is None or self.objective.baseline.greedy == "always"
        greedy = always or self.objective.needs_greedy_now(batch, self.trainer)
        stage, count = (EVALUATION, number) if plan is None else (TRAINING, self.count)
        # log pi_old(y_t) or log mu(y_t), where training reads the engine's
        log_probs = plan is not None and (plan.old_log_probs_from_rollout or plan.compares_engine)
        rank, device = self.trainer.global_rank, batch.prompt_ids.device
        generator = rollout_generator(cast(int, self.seed), rank, stage, count, device)
        # A reward that fails on one rank ends all ranks, with its message.
        with raise_on_all_ranks(self.trainer):
            responses = self.worker.generate_responses(
                policy, batch, generator, greedy=greedy, return_log_probs=log_probs, num_samples=num_samples
            )  # y [S, R], y* [B, R]
            if plan is not None and self.worker.ahead:
                self._begin_next(policy, batch, plan)
            rollout = self.worker.score_responses(batch._replace(following=None), responses)  # r [S], b [B]
        if plan is not None:
            self.count += 1
            if plan.compares_engine:  # log mu(y_t) [S, R]
                rollout = engine_log_probs(rollout, self.worker.engine, self.objective.loss_config.mismatch.kind)
            if selects and self.selector is not None:
                rollout = self.selector.select(rollout, lambda more: self.make(policy, more, plan, selects=False))
        return rollout

    def free_gradients(self) -> None:
        """Free the gradients of the last step, which Lightning would keep during a rollout."""
        if not isinstance(self.trainer.strategy, DeepSpeedStrategy):  # frees them itself
            for optimizer in self.trainer.optimizers:
                optimizer.zero_grad()

    def _begin_next(self, policy: PreTrainedModel, batch: PromptBatch, plan: UpdatePlan) -> None:
        """Let the engine write the responses of the next rollout while this one trains, unless the run ends before."""
        if batch.following is None or not has_next_rollout(self.trainer, plan):
            return
        rank, device = self.trainer.global_rank, batch.prompt_ids.device
        generator = rollout_generator(cast(int, self.seed), rank, TRAINING, self.count + 1, device)
        greedy = self.objective.baseline.greedy == "always"
        self.worker.begin_responses(policy, batch.following, generator, greedy=greedy)


class RolloutBuffer:
    """Holds the rollout that is trained on."""

    experience: Experience | None = None
    """The rollout; None between two."""

    def micro_batch(self, index: int) -> Experience:
        """Return micro-batch `index` of the rollout; the last one empties the buffer.

        Raises:
            UserError: if a loader starts in the middle of a rollout batch.
        """
        experience = self.experience
        if experience is None:
            raise UserError(f"data: part {index} of a rollout batch came first; a loader starts with part 0")
        num_micro_batches = experience.rollout.prompt.num_micro_batches
        # The rollout is done with its last part: a checkpoint between two rollouts holds none.
        if index + 1 == num_micro_batches:
            self.experience = None
        return experience if num_micro_batches == 1 else experience.micro_batch(index, num_micro_batches)

    # ---- Checkpoints ----

    def state_dict(self) -> dict[str, Any] | None:
        """Return the rollout as nested dictionaries of tensors, numbers and text, which `weights_only=True` reads.

        None where the buffer is empty. The rows of the data set and the messages of the prompts stay out: they may
        hold anything, and once a rollout is scored nothing reads them.
        """
        if self.experience is None:
            return None
        rollout = self.experience.rollout
        # `Prompt` is a subclass of str, which `weights_only=True` would refuse.
        prompt = rollout.prompt._replace(rows=[], prompts=[str(text) for text in rollout.prompt.prompts])
        state = self.experience._asdict()
        state["rollout"] = rollout._asdict() | {
            "prompt": prompt._asdict(),
            "sampled": rollout.sampled._asdict(),
            "greedy": None if rollout.greedy is None else rollout.greedy._asdict(),
        }
        return state

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore the rollout of a checkpoint, also of version 0.1."""
        if state is None:
            self.experience = None
            return
        # A copy, since the checkpoint belongs to Lightning.
        rollout = dict(state["rollout"])
        rollout["prompt"] = PromptBatch(**_rename_old_keys(rollout["prompt"]))
        rollout["sampled"] = Responses(**rollout["sampled"])
        rollout["greedy"] = None if rollout["greedy"] is None else Responses(**rollout["greedy"])
        self.experience = Experience(**{**_rename_old_keys(state), "rollout": Rollout(**rollout)})


_OLD_NAMES = {"normalisers": "normalizers", "split": "micro_batch_index", "num_splits": "num_micro_batches"}
"""Names of version 0.1 and their new names."""


def _rename_old_keys(state: dict[str, Any]) -> dict[str, Any]:
    return {_OLD_NAMES.get(name, name): value for name, value in state.items()}
