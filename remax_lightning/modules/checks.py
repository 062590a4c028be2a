"""What is checked before a run starts, across keys that each are right alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from remax_lightning.errors import UserError
from remax_lightning.models import PretrainedModel
from remax_lightning.modules.head import required_head
from remax_lightning.modules.options import KLConfig
from remax_lightning.strategies import ReMaxDeepSpeedStrategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from remax_lightning.modules.reference import Reference


def check_policy(policy: PretrainedModel) -> None:
    """Refuse what only a frozen model can be."""
    if policy.placement != "replicate":
        raise UserError(
            f"model.policy.placement must be replicate, got {policy.placement}: where the policy is kept,"
            " trainer.strategy decides (ZeRO-3 or FSDP2 for shares, offload_parameters for the host's memory)"
        )
    if policy.quantization is not None and policy.lora is None:
        raise UserError(
            f"model.policy.quantization is {policy.quantization}, but weights of 4 bits cannot be trained; set"
            " model.policy.lora (QLoRA), or leave model.policy.quantization out"
        )


def check_quantization(policy: PretrainedModel, strategy: Any) -> None:
    """Refuse a quantised policy where its weights would be cut into shares."""
    if policy.quantization is None:
        return
    zero_3 = isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
    if zero_3 or isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        raise UserError(
            f"model.policy.quantization is {policy.quantization}, which trainer.strategy {type(strategy).__name__}"
            f"{' of stage 3' if zero_3 else ''} cannot cut into shares; take one process, ddp, or"
            " ReMaxDeepSpeedStrategy of stage 1 or 2"
        )


def check_reference(reference: PretrainedModel | None) -> None:
    """Refuse a reference with an adapter that was never trained."""
    if reference is not None and reference.lora is not None and reference.lora.path is None:
        raise UserError(
            "model.reference.lora needs the path of a trained adapter: a new one changes nothing; leave it out"
        )


def check_kl(kl_coef: float, kl: KLConfig, policy: PretrainedModel, reference: PretrainedModel | None) -> None:
    """Refuse a KL coefficient without a reference to measure the KL to."""
    if kl_coef < 0:
        raise UserError(f"model.kl_coef must be 0 or more, got {kl_coef}")
    if reference is None and policy.lora is None and (kl_coef > 0 or kl.loss_coef > 0):
        key, value = ("kl_coef", kl_coef) if kl_coef > 0 else ("kl.loss_coef", kl.loss_coef)
        raise UserError(
            f"model.{key} is {value}, but there is no model.reference to measure the KL to; set"
            f" model.reference.path (usually {policy.path!r}, where the policy starts) or model.{key} to 0"
        )


def check_full_kl(kl: KLConfig, policy: PreTrainedModel, reference: Reference) -> None:
    """Refuse a KL over the vocabulary to or from a model whose output head cannot be read."""
    if kl.full:
        required_head(policy, "model.policy")
        with reference.running():
            required_head(reference.model, "model.reference")


def check_vocabularies(
    policy: PreTrainedModel, reference: PreTrainedModel, policy_path: str, reference_path: str
) -> None:
    """Refuse a reference whose tokens are not the policy's."""
    own, other = (model.config.get_text_config().vocab_size for model in (policy, reference))
    if own != other:
        raise UserError(
            f"model.reference {reference_path!r} has a vocabulary of {other}, the policy {policy_path!r} one of"
            f" {own}; their log-probs cannot be compared"
        )


def check_lengths(policy: PreTrainedModel, max_prompt_length: int | None, max_response_length: int) -> None:
    """Refuse prompts and responses that together are longer than the policy can hold."""
    room = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    if max_prompt_length is None or room is None or max_prompt_length + max_response_length <= room:
        return
    raise UserError(
        f"data.max_prompt_length {max_prompt_length} + model.sampling.max_response_length {max_response_length} is more"
        f" than the {room} positions that the policy has; lower one of them"
    )


def check_deepspeed(strategy: DeepSpeedStrategy, accumulate: int) -> None:
    """Refuse Lightning's own DeepSpeed strategy where it would make the gradient `accumulate` times too small."""
    if accumulate > 1 and not isinstance(strategy, ReMaxDeepSpeedStrategy):
        raise UserError(
            f"trainer.strategy is {type(strategy).__name__}, which with trainer.accumulate_grad_batches {accumulate}"
            " divides the loss twice; take remax_lightning.strategies.ReMaxDeepSpeedStrategy, which has its arguments"
        )


def updates_per_rollout(num_splits: int, accumulate: int, loss_kind: str, num_batches: int | float = math.inf) -> int:
    """Return how many optimizer steps one rollout batch is used for.

    Args:
        num_splits: micro-batches per rollout batch.
        accumulate: micro-batches per optimizer step.
        loss_kind: `reinforce` or `clipped`.
        num_batches: micro-batches per epoch, as far as they are known.

    Raises:
        UserError: if an optimizer step would reach into the next rollout, an epoch would end within one, or the loss is
            not made for several updates.
    """
    if num_splits % accumulate:
        raise UserError(
            f"trainer.accumulate_grad_batches is {accumulate}, but a rollout batch comes in {num_splits} micro-batches"
            " (data.batch_size / data.micro_batch_size) and an optimizer step cannot reach into the next one; set"
            f" trainer.accumulate_grad_batches to {num_splits}, or to a divisor of it for several updates per rollout"
        )
    if math.isfinite(num_batches) and num_batches % num_splits:
        raise UserError(
            f"trainer.limit_train_batches ends the epoch after {num_batches} micro-batches, in the middle of a rollout"
            f" batch, which comes in {num_splits}; set it to a multiple of {num_splits}"
        )
    updates = num_splits // accumulate
    if updates > 1 and loss_kind == "reinforce":
        raise UserError(
            f"trainer.accumulate_grad_batches {accumulate} with {num_splits} micro-batches per rollout makes {updates}"
            " updates per rollout; model.loss.kind reinforce is right for one only. Set"
            f" trainer.accumulate_grad_batches to {num_splits}, or model.loss.kind to clipped"
        )
    return updates
