"""The second stage: a reward model that learns from pairs of chosen and rejected responses."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from remax_lightning.distributed import sum_tensor_over_ranks
from remax_lightning.errors import at_least, check_ranges
from remax_lightning.functional import bradley_terry_loss
from remax_lightning.models.forward import eval_mode
from remax_lightning.models.loading import Float32Buffers, ModelSource, as_model_config
from remax_lightning.modules.base import BaseModule
from remax_lightning.rewards.loading import load_reward_model
from remax_lightning.rewards.pooling import (
    Normalization,
    Pooling,
    ScoreLayers,
    choose_pooling,
    fold_into_weights,
    score_head,
    score_layers,
)
from remax_lightning.strategies import shard_policy, sharded_init, unsharded_init
from remax_lightning.training import config_checks as checks
from remax_lightning.training.metrics import MeanMetrics, PairScores, PairScoreSums
from remax_lightning.training.optimization import MaxSkippedSteps
from remax_lightning.training.resume import StallSeconds
from remax_lightning.types import ExportSpec, PreferenceBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RewardModelModule(BaseModule):
    """Trains a reward model on pairs of responses with the likelihood of Bradley and Terry.

    It starts from any model with a sequence classifier in transformers; a language model gets a new score head. The
    score is read at the last real token. Validation measures mean and standard deviation of the scores, and the
    exported classifier normalizes scores to mean 0 and variance 1 on the validation pairs.

    Args:
        reward_model: the start: a language model, such as that of the supervised stage, or a reward model in a format
            that `ClassifierReward` reads.
        tokenizer: folder or hub name; None takes the reward model's.
        margin: required difference of the scores of a pair, added to that of the row
            (`data.pair_columns.margin`).
        centering_coef: weight of the mean square of a pair's summed scores in the loss, which keeps scores around 0.
            0.01 as in its paper; 0 turns it off.
        normalize: whether the exported model scores with mean 0 and variance 1 on the validation pairs.
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

    Raises:
        UserError: if a number is out of its range.
    """

    reward_model: PreTrainedModel
    batch_type = PreferenceBatch

    def __init__(
        self,
        reward_model: ModelSource,
        tokenizer: str | None = None,
        margin: Annotated[float, at_least(0)] = 0.0,
        centering_coef: Annotated[float, at_least(0)] = 0.01,
        normalize: bool = True,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-5),
        lr_scheduler: LRSchedulerCallable | None = None,
        max_skipped_steps: MaxSkippedSteps = 5,
        stall_timeout: StallSeconds = 1800.0,
        cudnn_attention: bool = False,
    ) -> None:
        reward_model = as_model_config(reward_model, "reward_model")
        super().__init__(
            reward_model, tokenizer, optimizer, lr_scheduler, max_skipped_steps, stall_timeout, cudnn_attention
        )
        check_ranges(RewardModelModule.__init__, locals(), "model")
        self.reward_model_source = reward_model
        self.margin, self.centering_coef, self.normalize = margin, centering_coef, normalize
        self._normalized_at: int | None = None  # the optimizer step of the last normalization
        self._normalization = Normalization()
        self._pooling: Pooling | None = None
        self._layers = ScoreLayers(None, None)
        self._training, self._held_out = MeanMetrics(), PairScoreSums()

    def hyper_parameters(self) -> dict[str, Any]:
        """Return the arguments that are text, numbers or made of them, for its checkpoints."""
        return {
            "reward_model": asdict(self.reward_model_source),
            "tokenizer": self.tokenizer_path,
            "margin": self.margin,
            "centering_coef": self.centering_coef,
            "normalize": self.normalize,
            "max_skipped_steps": self.skipped_steps.maximum,
            "stall_timeout": self.stall_timeout,
            "cudnn_attention": self.cudnn_attention,
        }

    # ---- Loading ----

    @property
    def trained_model(self) -> PreTrainedModel:
        """The reward model."""
        return self.reward_model

    def configure_model(self) -> None:
        """Load reward model and tokenizer; Lightning calls this where each strategy wants its models built."""
        if "reward_model" in self._modules:
            return
        # ---- The model, as its strategy shards it ----
        strategy, source = self.trainer.strategy, self.reward_model_source
        with sharded_init(strategy, from_scratch=source.from_scratch, key="model.reward_model"):
            model = load_reward_model(source)
        if isinstance(strategy, ModelParallelStrategy):
            shard_policy(model, strategy.device_mesh)
        self.reward_model = model
        with unsharded_init(strategy):
            self.constants = Float32Buffers(model)
        self.reward_model.train()  # loaded models are in eval mode, in which gradient checkpointing does nothing
        # ---- Its tokenizer; no EOS is needed, because nothing is generated ----
        self.tokenizer = self._find_tokenizer(needs_eos=False)
        checks.check_tokenizer(
            self.tokenizer, source, cast("nn.Embedding", model.get_input_embeddings()).num_embeddings
        )
        # transformers' own classifiers look for padding by this id.
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id

    def on_fit_start(self) -> None:
        """Choose where the score is read, and check settings that need the loaded model."""
        longest = getattr(getattr(self.trainer, "datamodule", None), "max_length", None)
        checks.check_text_length(self.reward_model, longest)
        self.constants.restore()
        # Every validation comes here again.
        if self._pooling is not None:
            return
        with eval_mode(self.reward_model):
            self._pooling = choose_pooling(self.reward_model, self.tokenizer.all_special_ids)
            ids = torch.tensor([[0, 1, 2]], device=self.device)
            self._layers = score_layers(self.reward_model, ids)
        checks.warn_of_shared_pad_token(self.tokenizer, self._pooling)

    on_validation_start = on_fit_start
    on_test_start = on_fit_start
    on_predict_start = on_fit_start

    # ---- Training ----

    def scores(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Return the `[B]` float32 scores of chosen and rejected responses, from one forward pass."""
        assert self._pooling is not None
        pad_id = int(self.tokenizer.pad_token_id or 0)
        input_ids, mask = _join_pairs(batch, pad_id)
        # [2B] scores in one pass: under sharding strategies every pass gathers the model.
        chosen, rejected = self._pooling(self.reward_model, input_ids, mask.long()).chunk(2)
        return chosen, rejected

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return the negative log-likelihood of the preferences, a mean over pairs."""
        chosen, rejected = self.scores(batch)
        margin = batch.margin + self.margin
        # ---- Minus log sigmoid(r(chosen) - r(rejected) - margin), a mean over the B pairs of this batch ----
        loss = bradley_terry_loss(chosen, rejected, len(chosen), margin, self.centering_coef)
        difference = (chosen - rejected).detach()  # [B]
        self._training.add(
            {"loss": (loss, None), "accuracy": ((difference > 0).float(), None), "margin": (difference, None)}
        )
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch:
            reduce = partial(sum_tensor_over_ranks, self.trainer)
            for name, mean in self._training.means(reduce).items():
                self.log(f"train/{name}", mean, prog_bar=name != "margin", batch_size=1)
        return {"loss": loss}

    # ---- Evaluation ----

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Score held-out pairs."""
        self._held_out.add(batch, *self.scores(batch), batch.margin + self.margin)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the pairs of all ranks, and keep the normalization of their scores."""
        self._log_pair_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Measure as in validation, logged under `test/`."""
        self._log_pair_metrics("test")

    def _log_pair_metrics(self, stage: str) -> None:
        scores_of_pairs = self._held_out.gather()
        if scores_of_pairs is None:
            return
        for name, value in scores_of_pairs.figures(self.centering_coef).items():  # the same on every rank already
            self.log(f"{stage}/{name}", value, prog_bar=name in ("loss", "accuracy"))
        # Sanity checking scores a few pairs only, and a test is of other pairs.
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._set_normalization(scores_of_pairs)

    def _set_normalization(self, scores_of_pairs: PairScores) -> None:
        mean, std = scores_of_pairs.moments()
        if std == 0:
            rank_zero_warn("All scores on the validation pairs are equal, so they cannot be normalized.")
        self._normalization, self._normalized_at = Normalization(mean, std or 1.0), self.global_step

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return every pair with its scores, normalized by the last validation."""
        predictions = []
        for i, (chosen, rejected) in enumerate(zip(*(scores.tolist() for scores in self.scores(batch)), strict=True)):
            scores = {"chosen_reward": chosen, "rejected_reward": rejected}
            mean, std = self._normalization if self.normalize else Normalization()
            normalized = {name: (score - mean) / std for name, score in scores.items()}
            predictions.append({"prompt": batch.prompts[i], **normalized, "row": batch.rows[i]})
        return predictions

    # ---- Saving ----

    def exported(self) -> ExportSpec:
        """Return the reward model to export; every rank has to call this.

        If the weights have changed since the last validation, the validation pairs are scored again.
        """
        # The last validation may be of earlier weights.
        if self.normalize and self._normalized_at != self.global_step:
            self._score_validation_pairs()
        data = getattr(self.trainer, "datamodule", None)
        return ExportSpec(
            self.reward_model,
            partial(
                fold_into_weights,
                layers=self._layers,
                head=score_head(self.reward_model),
                normalization=self._normalization if self.normalize else Normalization(),
            ),
            {
                "pad_token_id": self.tokenizer.pad_token_id,
                "reward_template": getattr(data, "reward_template", None),
                "reward_chat_template_kwargs": getattr(data, "reward_chat_template_kwargs", None),
                "score_normalization": self._normalization._asdict() if self.normalize else None,
            },
        )

    def _score_validation_pairs(self) -> None:
        loader, count = self.trainer.val_dataloaders, self.trainer.num_val_batches
        if not loader or not count:
            return
        strategy = self.trainer.strategy
        # Outside of Lightning's validation loop, so its contexts are entered here.
        with eval_mode(self.reward_model), torch.no_grad(), strategy.precision_plugin.val_step_context():
            limit = count[0] if count[0] != float("inf") else None
            for batch in islice(iter(loader), None if limit is None else int(limit)):
                self.validation_step(strategy.batch_to_device(batch), 0)
        scores_of_pairs = self._held_out.gather()
        if scores_of_pairs is not None:
            self._set_normalization(scores_of_pairs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also save the normalization of the scores."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["score_normalization"] = {**self._normalization._asdict(), "step": self._normalized_at}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the normalization of the scores."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("score_normalization")
        if state is not None:
            self._normalization = Normalization(state["mean"], state["std"])
            self._normalized_at = state["step"]


def _join_pairs(batch: PreferenceBatch, pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask `[2B, T]` of the chosen and then the rejected conversations, padded on the right.

    Existing padding on either side is moved to the right. Positions then start at 0 in every architecture, and a score
    does not depend on the batch.
    """
    # ---- One batch of chosen, then rejected, as wide as the wider of both ----
    rows, masks = (batch.chosen_ids, batch.rejected_ids), (batch.chosen_mask, batch.rejected_mask)
    width = max(tensor.shape[1] for tensor in rows)
    ids = torch.cat([F.pad(tensor, (0, width - tensor.shape[1]), value=pad_id) for tensor in rows])
    mask = torch.cat([F.pad(tensor, (0, width - tensor.shape[1]), value=False) for tensor in masks])
    # ---- Move padding to the right: a stable sort by mask keeps the order of the tokens ----
    order = (~mask).long().argsort(dim=1, stable=True)
    length = int(mask.sum(1).max())
    ids, mask = ids.gather(1, order)[:, :length], mask.gather(1, order)[:, :length]
    return ids.masked_fill(~mask, pad_id), mask
