"""Checks before a run starts: combinations of keys that are valid one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn

from remax_lightning.baselines import Baseline, baseline_name
from remax_lightning.config import AdvantageConfig, KLConfig
from remax_lightning.errors import UserError
from remax_lightning.functional import BaselineKind
from remax_lightning.models import ModelConfig
from remax_lightning.models.forward import required_head
from remax_lightning.models.loading import ModelSource, as_model_config
from remax_lightning.rewards.base import Reward
from remax_lightning.rewards.pooling import Pooling, num_positions, pool_last_token
from remax_lightning.strategies import ReMaxDeepSpeedStrategy
from remax_lightning.training.experience import check_budget

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from remax_lightning.rollout import RolloutEngine
    from remax_lightning.training.reference import Reference
    from remax_lightning.training.worker import RolloutWorker
    from remax_lightning.types import Rollout


def check_policy(policy: ModelConfig) -> None:
    """Refuse settings of a policy that only frozen models support."""
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


def check_quantization(policy: ModelConfig, strategy: Any) -> None:
    """Refuse a quantized policy under a strategy that shards weights."""
    if policy.quantization is None:
        return
    # Stages 1 and 2 shard gradients and optimizer states, of which only the adapter has any; weights stay whole.
    zero_3 = isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
    if zero_3 or isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        raise UserError(
            f"model.policy.quantization is {policy.quantization}, which trainer.strategy {type(strategy).__name__}"
            f"{' of stage 3' if zero_3 else ''} cannot shard; use one process, ddp, or"
            " ReMaxDeepSpeedStrategy of stage 1 or 2"
        )


def check_reference(reference: ModelConfig | None) -> None:
    """Refuse a reference with an adapter that was never trained."""
    if reference is not None and reference.lora is not None and reference.lora.path is None:
        raise UserError(
            "model.reference.lora needs the path of a trained adapter: a new one changes nothing; leave it out"
        )


def check_compares(reward: Reward, baseline: Baseline, advantage: AdvantageConfig) -> None:
    """Refuse a reward that compares responses with the greedy one where training does not always generate it."""
    if reward.compares and baseline.greedy != "always":
        raise UserError(
            f"model.reward {reward!r} compares responses with the greedy one, which not every baseline has generated;"
            f" it needs model.advantage.baseline greedy, got {baseline_name(advantage.baseline)}"
        )


def check_normalized(reward: Reward, advantage: AdvantageConfig) -> None:
    """Refuse to normalize the parts of a reward where that has no meaning."""
    if reward.normalized_weights is None:
        return
    key = "model.reward.init_args.normalize std"
    if advantage.baseline != "greedy":
        raise UserError(
            f"{key} subtracts each part's greedy value, and needs model.advantage.baseline greedy, got"
            f" {baseline_name(advantage.baseline)}"
        )
    if advantage.reward_clip is not None and advantage.reward_clip_at == "before_baseline":
        raise UserError(
            f"{key} knows the parts only above their greedy values; set model.advantage.reward_clip_at to"
            " after_baseline, which bounds their normalized sum, or model.advantage.reward_clip to null"
        )


AHEAD = "model.rollout.init_args.ahead"


def check_ahead(ahead: int, baseline: Baseline, mismatch: str) -> None:
    """Refuse an engine that writes ahead where its responses could not be corrected, or not be asked for.

    Args:
        ahead: rollouts that are written ahead.
        baseline: of the run.
        mismatch: `model.loss.mismatch.kind`.
    """
    if not ahead:
        return
    if mismatch == "none":
        raise UserError(
            f"{AHEAD} {ahead} writes responses with the weights from before an update, whose gradient is another one;"
            f" set model.loss.mismatch.kind to tis or mis, which correct it, or {AHEAD} to 0"
        )
    if baseline.greedy == "sometimes":
        raise UserError(
            f"{AHEAD} must be 0 with model.advantage.baseline {baseline_name(baseline)}, got {ahead}: which prompts"
            " need a greedy response is known only after the rollout before"
        )


def refuse_ahead(engine: Any) -> None:
    """Refuse an engine that writes rollouts ahead where none are trained on."""
    if ahead := getattr(engine, "ahead", 0):
        raise UserError(f"{AHEAD} must be 0 where responses are only evaluated, got {ahead}")


def look_ahead(data: Any, ahead: int) -> None:
    """Let training batches hold the next one, too, where an engine writes ahead; refuse data that cannot."""
    if not hasattr(data, "looks_ahead"):
        what = "loaders without a data module" if data is None else type(data).__name__
        raise UserError(
            f"{AHEAD} {ahead} needs the next prompts, which {what} does not tell; give the rows to a PromptDataModule,"
            f" or set {AHEAD} to 0"
        )
    data.looks_ahead = True


def reference_source(
    reference: ModelSource | None, policy: ModelConfig, kl_coef: float, kl: KLConfig
) -> ModelConfig | None:
    """Return where the reference comes from: where the policy starts, if there is a KL and nothing else is said.

    None without a KL, and with an adapter, whose start is the policy itself.

    Raises:
        UserError: if the reference has settings of a policy, or the policy starts from random
            weights, of which there is no second copy.
    """
    if reference is not None:
        source = as_model_config(reference, "reference")
        check_reference(source)
        return source
    if policy.lora is not None or not (kl_coef > 0 or kl.loss_coef > 0):
        return None
    if policy.from_scratch:
        raise UserError(
            "model.reference.path: the KL needs a reference, and model.policy.from_scratch has random weights; set"
            " model.reference, or model.kl_coef and model.kl.loss_coef to 0"
        )
    return replace(policy, gradient_checkpointing=False)


def check_full_kl(kl: KLConfig, policy: PreTrainedModel, reference: Reference) -> None:
    """Refuse a KL over the vocabulary if an output head cannot be read."""
    if kl.full:
        required_head(policy, "model.policy")
        with reference.running():
            required_head(reference.model, "model.reference")


def check_vocabularies(
    policy: PreTrainedModel, reference: PreTrainedModel, policy_path: str, reference_path: str
) -> None:
    """Refuse a reference with another vocabulary than the policy."""
    policy_size, reference_size = (model.config.get_text_config().vocab_size for model in (policy, reference))
    if policy_size != reference_size:
        raise UserError(
            f"model.reference {reference_path!r} has a vocabulary of {reference_size}, the policy {policy_path!r}"
            f" one of {policy_size}; their log-probs cannot be compared"
        )


def check_run(policy: PreTrainedModel, worker: RolloutWorker, data: Any) -> None:
    """Refuse lengths that the policy or a budget of tokens has no room for.

    Args:
        policy: the loaded policy.
        worker: rolls out with it.
        data: the data module of the run, if it has one that knows its lengths.
    """
    sampling, longest = worker.sampling, getattr(data, "max_prompt_length", None)
    budget = getattr(data, "tokens_per_micro_batch", None)
    check_budget(budget, longest, sampling.max_response_length, sampling.num_samples)
    check_lengths(policy, longest, sampling.max_response_length)
    check_rope(policy, longest, sampling.max_response_length)


def check_lengths(policy: PreTrainedModel, max_prompt_length: int | None, max_response_length: int) -> None:
    """Refuse prompts and responses that need more positions than the policy has."""
    # Some models name no limit, such as BLOOM with its ALiBi.
    max_positions = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    if max_prompt_length is None or max_positions is None or max_prompt_length + max_response_length <= max_positions:
        return
    raise UserError(
        f"data.max_prompt_length {max_prompt_length} + model.sampling.max_response_length {max_response_length} is more"
        f" than the {max_positions} positions that the policy has; lower one of them"
    )


def check_rope(policy: PreTrainedModel, max_prompt_length: int | None, max_response_length: int) -> None:
    """Refuse texts that cross the length at which the rotary embeddings of the policy change.

    With longrope and dynamic NTK the frequencies depend on the length so far: keys that decoding stored before that
    length are not those that a training pass over the whole text computes.
    """
    config = policy.config.get_text_config()
    limit = rope_change(config)
    longest = (max_prompt_length or 0) + max_response_length
    if limit is not None and longest > limit:
        raise UserError(
            f"data.max_prompt_length {max_prompt_length} + model.sampling.max_response_length {max_response_length} is"
            f" more than {limit} tokens, where the rotary embeddings of the policy change, so that drawn and trained"
            f" log-probs would differ by nats; keep the sum at {limit} or below"
        )


def rope_change(config: Any) -> int | None:
    """Return the length beyond which a configuration's rotary frequencies depend on the length; None without one."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # One set of parameters, or one for each kind of layer, as in Gemma 3.
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    limits = []
    for kind in kinds:
        if kind.get("rope_type", kind.get("type")) in ("longrope", "su", "dynamic"):
            # The length that the model was trained at before it was extended; Phi-3 has it beside the parameters.
            limit = kind.get("original_max_position_embeddings")
            limit = limit or getattr(config, "original_max_position_embeddings", None)
            limits.append(int(limit or config.max_position_embeddings))
    return min(limits, default=None)


def check_text_length(model: PreTrainedModel, max_length: int | None) -> None:
    """Refuse conversations that need more positions than the reward model has."""
    max_positions = num_positions(model, model.config.get_text_config())
    if max_length is not None and max_positions is not None and max_length > max_positions:
        raise UserError(
            f"data.max_length {max_length} is more than the {max_positions} positions that the reward model has;"
            " lower it"
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, source: ModelConfig, vocabulary: int) -> None:
    """Refuse a tokenizer that does not belong to the reward model.

    Raises:
        UserError: if it has more tokens than the model, or other token ids than the tokenizer of the model.
    """
    path, tokenizer_path = source.path, tokenizer.name_or_path
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"model.tokenizer {tokenizer_path!r} has {len(tokenizer)} tokens, the reward model {path!r} only"
            f" {vocabulary}; give the tokenizer that belongs to the reward model"
        )
    if tokenizer_path == path:
        return
    from transformers import AutoTokenizer

    try:
        model_vocabulary = AutoTokenizer.from_pretrained(
            path, revision=source.revision, trust_remote_code=source.trust_remote_code
        ).get_vocab()
    except Exception:  # the model has no tokenizer, so there is nothing to compare
        return
    mixed = [token for token, number in tokenizer.get_vocab().items() if model_vocabulary.get(token, number) != number]
    if mixed and len(model_vocabulary) > 0:
        token = mixed[0]
        raise UserError(
            f"model.tokenizer {tokenizer_path!r} is not the one of model.reward_model {path!r}: {len(mixed)} tokens"
            f" have other numbers, such as {token!r}, {tokenizer.get_vocab()[token]} instead of"
            f" {model_vocabulary[token]}; leave model.tokenizer out"
        )


def warn_of_shared_pad_token(tokenizer: PreTrainedTokenizerBase, pooling: Pooling) -> None:
    """Warn if other tools will read the score one token early, because the pad token is EOS."""
    if pooling is pool_last_token and tokenizer.pad_token_id == tokenizer.eos_token_id:
        rank_zero_warn(
            f"The reward model pads with its end-of-sequence token {tokenizer.eos_token!r}. ClassifierReward goes by"
            " the mask, but transformers' own classifier takes the end of a text for padding and scores the token"
            " before. If other tools shall use the model, set data.loading.pad_token to a token that no text holds."
        )


def warn_of_no_training(trainer: Trainer) -> None:
    """Tell of a run without a step, which Lightning ends without a word."""
    if trainer.limit_train_batches == 0:
        rank_zero_warn("trainer.limit_train_batches is 0: nothing is trained, and no checkpoint or policy is written.")


def check_deepspeed(strategy: DeepSpeedStrategy, accumulate: int) -> None:
    """Refuse Lightning's DeepSpeed strategy if it would make the gradient `accumulate` times too small."""
    if accumulate > 1 and not isinstance(strategy, ReMaxDeepSpeedStrategy):
        raise UserError(
            f"trainer.strategy is {type(strategy).__name__}, which with trainer.accumulate_grad_batches {accumulate}"
            " divides the loss twice; take remax_lightning.strategies.ReMaxDeepSpeedStrategy, which has its arguments"
        )


def engine_log_probs(rollout: Rollout, engine: RolloutEngine, kind: str) -> Rollout:
    """Return `rollout` with the log-probs of decoding where they are compared with the trainer's.

    Args:
        rollout: as the worker returns it.
        engine: that made it.
        kind: of the comparison, for the message.

    Raises:
        UserError: if the engine returned none.
    """
    if rollout.log_probs is None:
        raise UserError(
            f"model.loss.mismatch.kind is {kind}, which needs the log-probs of drawn tokens, and model.rollout"
            f" {type(engine).__name__} returns none; set it to none, or take an engine that returns them"
        )
    return rollout._replace(engine_log_probs=rollout.log_probs, log_probs=None)


def check_token_rewards(kl: KLConfig, advantage: AdvantageConfig) -> None:
    """Refuse what has no meaning for a reward per token; that a reward is one shows in its first scores."""
    if kl.in_baseline:
        raise UserError(
            "model.kl.in_baseline needs a reward that is one number per response, and model.reward returns one per"
            " token; set it to false, and model.kl.credit to to_go"
        )
    if advantage.reward_clip is not None and advantage.reward_clip_at == "before_baseline":
        raise UserError(
            "model.advantage.reward_clip_at must be after_baseline where model.reward returns a number per token,"
            " got before_baseline: it bounds what is left of the reward to go"
        )
    if advantage.baseline not in get_args(BaselineKind):
        raise UserError(
            f"model.advantage.baseline {baseline_name(advantage.baseline)} needs one reward per response, and"
            " model.reward returns one per token; take greedy, leave_one_out, group_mean or none"
        )


def check_response_ends(tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], data: Any) -> None:
    """Check that the policy learns to end its responses with a token that rollouts end at.

    A chat template may end a turn with another token than the tokenizer's end-of-sequence token: that is what the
    responses of the data end with then.

    Args:
        tokenizer: the policy's.
        eos_ids: the tokens that end a response in rollouts.
        data: the data module; one without `response_ends` is not looked at.

    Raises:
        UserError: if not.
    """
    # Ends that the data teaches and rollouts do not know.
    others = sorted(getattr(data, "response_ends", set()) - set(eos_ids))
    if others:
        token = tokenizer.convert_ids_to_tokens(others[0])
        ends = ", ".join(repr(tokenizer.convert_ids_to_tokens(eos_id)) for eos_id in eos_ids)
        raise UserError(
            f"data.tokenizer: the chat template ends a turn with {token!r} ({others[0]}), and responses of the policy"
            f" end at {ends}: it would learn to write a token that ends nothing. Save the tokenizer with eos_token"
            f" {token!r}, or add {others[0]} to eos_token_id in the policy's generation_config.json"
        )


def warn_of_turn_end(tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], data: Any) -> None:
    """Warn where the chat template of the prompts ends a turn with a token that rollouts do not end at.

    Args:
        tokenizer: the policy's.
        eos_ids: the tokens that end a response in rollouts.
        data: the data module; one without `turn_end_id` is not looked at.
    """
    find = getattr(data, "turn_end_id", None)
    token = None if find is None else find()
    if token is not None and token not in eos_ids:
        rank_zero_warn(
            f"The chat template ends a turn with {tokenizer.convert_ids_to_tokens(token)!r} ({token}), which ends no"
            " response of the policy: one that was trained with it goes on writing up to the length limit. Save the"
            f" tokenizer with it as eos_token, or add {token} to eos_token_id in the policy's generation_config.json."
        )
