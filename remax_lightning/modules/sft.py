"""The first stage: supervised fine-tuning of the policy on the responses of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from remax_lightning.distributed import raise_on_all_ranks, sum_tensor_over_ranks
from remax_lightning.errors import UserError
from remax_lightning.evaluation.prompt_metrics import PromptSums, sums_by_prompt
from remax_lightning.files import PromptRecord
from remax_lightning.models.loading import ModelSource
from remax_lightning.models.log_probs import response_statistics
from remax_lightning.models.packing import packing_obstacle
from remax_lightning.modules.policy import PolicyModule
from remax_lightning.rewards.weighted import RewardSource, as_reward
from remax_lightning.rollout import AutoEngine, RolloutEngine, SamplingConfig
from remax_lightning.sharding import language_model
from remax_lightning.training.config_checks import check_response_ends, refuse_ahead
from remax_lightning.training.metrics import MeanMetrics
from remax_lightning.training.optimization import MaxSkippedSteps
from remax_lightning.training.resume import StallSeconds
from remax_lightning.training.worker import RolloutWorker
from remax_lightning.types import PromptBatch, Responses, SupervisedBatch


class SFTModule(PolicyModule):
    """Fine-tunes a policy on the responses of a data set; the loss is over response tokens only.

    It is a mean over the response tokens of the whole optimizer step on all ranks, so the gradient does not depend on
    micro-batches.

    Args:
        policy: the language model that is trained; a folder or hub name alone is its `path`.
        reward: if set, validation also generates responses and scores them.
        tokenizer: folder or hub name; None takes the policy's.
        packing: run the examples of a training pass in one row without padding, each attending to itself alone. The
            loss is the same and training is faster.
        rollout: engine that generates responses in validation; None chooses one for the architecture of the policy.
        sampling: how responses are sampled in validation.
        optimizer: AdamW with a learning rate of 1e-5 by default, usual for all weights of a model; an adapter (`lora`)
            gets ten times that.
        lr_scheduler: stepped after each optimizer step.
        max_skipped_steps: an optimizer step whose gradient is not finite is skipped; the run ends after this many in a
            row. One may be due to a single batch; 5 in a row mean that training has diverged.
        stall_timeout: seconds without a batch, a rollout, a score or a checkpoint, after which the stacks of all ranks
            are written to the folder of the run and the run ends. Half an hour, as torch's collectives wait by default:
            a single rollout or checkpoint rarely takes as long. Null watches nothing, as for a debugger.
        cudnn_attention: whether attention may run in cuDNN on CUDA. Off, because it has returned NaN gradients for
            padded rows (pytorch#196678) and takes about a second to plan each new shape.
    """

    batch_type = SupervisedBatch
    scores_training_rows = False

    def __init__(
        self,
        policy: ModelSource,
        reward: RewardSource | None = None,
        tokenizer: str | None = None,
        packing: bool = False,
        rollout: RolloutEngine | None = None,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-5),
        lr_scheduler: LRSchedulerCallable | None = None,
        max_skipped_steps: MaxSkippedSteps = 5,
        stall_timeout: StallSeconds = 1800.0,
        cudnn_attention: bool = False,
    ) -> None:
        refuse_ahead(rollout)
        worker = RolloutWorker(rollout or AutoEngine(), sampling, None if reward is None else as_reward(reward))
        super().__init__(
            policy, worker, tokenizer, optimizer, lr_scheduler, max_skipped_steps, stall_timeout, cudnn_attention
        )
        self.packing = packing
        self._training, self._held_out = MeanMetrics(), PromptSums()

    def hyper_parameters(self) -> dict[str, Any]:
        """Return the arguments that are text, numbers or made of them, for its checkpoints."""
        return {
            "policy": asdict(self.policy_source),
            "tokenizer": self.tokenizer_path,
            "packing": self.packing,
            "sampling": asdict(self.sampling),
            "max_skipped_steps": self.skipped_steps.maximum,
            "stall_timeout": self.stall_timeout,
            "cudnn_attention": self.cudnn_attention,
        }

    def on_fit_start(self) -> None:
        """Prepare rollouts, and check that examples can be packed, and the ends of responses.

        Raises:
            UserError: if this policy cannot be packed, or the responses of the data end with a token that ends no
                response of it.
        """
        self.on_validation_start()
        check_response_ends(self.tokenizer, self.eos_ids(), getattr(self.trainer, "datamodule", None))
        if self.packing and (reason := packing_obstacle(self.policy)):
            raise UserError(
                f"model.packing must be false for {type(language_model(self.policy)).__name__}, got true: {reason}"
            )

    def on_validation_start(self) -> None:
        """Prepare rollouts, and discard the figures of an interrupted evaluation."""
        self._held_out = PromptSums()
        self.constants.restore()
        self.prepare_rollouts()

    on_test_start = on_validation_start

    def _log_probs(self, batch: SupervisedBatch, packing: bool) -> Tensor:
        """Return `[B, R]` log-probs of the responses, of which those under the mask count."""
        mask = batch.response_mask
        prompt = PromptBatch(batch.prompt_ids, batch.prompt_mask, batch.prompts, batch.rows)
        responses = Responses(batch.response_ids, mask, mask.new_zeros(len(mask)), [])
        return response_statistics(self.policy, prompt, responses, packed=packing, entropy=False).log_probs

    def training_step(self, batch: SupervisedBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return the negative log-likelihood of the responses."""
        # ---- Minus log pi(y_t) of every response token in this batch, [M] ----
        nll = -self._log_probs(batch, self.packing)[batch.response_mask]
        accumulate = self.trainer.accumulate_grad_batches
        reduce = partial(sum_tensor_over_ranks, self.trainer)
        # ---- N: response tokens of the whole optimizer step, over all ranks ----
        local_tokens = batch.step_tokens if batch.step_batches == accumulate else len(nll) * accumulate
        tokens = reduce(torch.tensor(float(local_tokens), dtype=torch.float32, device=self.device))
        # ---- The loss. Lightning and the strategy divide every gradient by micro-batches and ranks: undo it ----
        loss = nll.sum() * (accumulate * self.trainer.world_size / tokens)
        # ---- Log the mean over all tokens of the step ----
        self._training.add({"loss": (nll, None)})
        if (batch_idx + 1) % accumulate == 0 or self.trainer.is_last_batch:
            self.log("train/loss", self._training.means(reduce)["loss"], prog_bar=True, batch_size=1)
        return {"loss": loss}

    def validation_step(self, batch: SupervisedBatch, batch_idx: int) -> None:
        """Measure the loss on held-out responses and, with a reward, the responses of the policy."""
        self._evaluate(batch, batch_idx)

    def test_step(self, batch: SupervisedBatch, batch_idx: int) -> None:
        """Evaluate as in validation, logged under `test/`."""
        self._evaluate(batch, batch_idx)

    def _evaluate(self, batch: SupervisedBatch, batch_idx: int) -> None:
        """Add what is measured of each example to the figures of this evaluation."""
        count, mask = len(batch.prompts), batch.response_mask
        # Without packing, so that the held-out loss does not depend on how training batches its rows.
        nll = sums_by_prompt(-self._log_probs(batch, packing=False), mask, count)
        columns = {"loss": nll, "perplexity": nll}
        if self.reward is not None:
            prompt = PromptBatch(batch.prompt_ids, batch.prompt_mask, batch.prompts, batch.rows)
            # The same random numbers in every validation, so that only the policy changes; other ones on each rank.
            number = batch_idx * self.trainer.world_size + self.trainer.global_rank
            generator = torch.Generator(self.device).manual_seed(number)
            with raise_on_all_ranks(self.trainer):
                responses = self.worker.generate_responses(self.policy, prompt, generator, greedy=True)
            with raise_on_all_ranks(self.trainer):  # a reward model in shares waits for every rank
                rollout = self.worker.score_responses(prompt, responses)
            columns["reward"] = sums_by_prompt(rollout.reward, None, count)
            columns["baseline_reward"] = sums_by_prompt(cast(Tensor, rollout.baseline_reward), None, count)
        # By index, because a sampler that fills up a rank repeats examples.
        indices: Sequence[int | None] = batch.indices or [None] * count
        rows = [{name: column[i] for name, column in columns.items()} for i in range(count)]
        self._held_out.add([PromptRecord(index, "", {}, {}, sums) for index, sums in zip(indices, rows, strict=True)])

    def on_validation_epoch_end(self) -> None:
        """Log the loss per response token, the perplexity, which is its exponential, and the rewards."""
        self._log_figures("val")

    def on_test_epoch_end(self) -> None:
        """Log as in validation, under `test/`."""
        self._log_figures("test")

    def _log_figures(self, stage: str) -> None:
        for name, value in self._held_out.means().items():  # the same on every rank already
            self.log(f"{stage}/{name}", value, prog_bar=name.endswith("reward"))
