"""Measure a planned run: build its models from their configurations, and run its passes on fake tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from unittest import mock

import torch
from torch import nn

from remax_lightning.errors import UserError
from remax_lightning.models import ModelConfig, initial_adapter
from remax_lightning.models.sampling import NO_TOKENS, SuppressedTokens
from remax_lightning.rewards import ClassifierReward
from remax_lightning.rewards.formats import read_adapter
from remax_lightning.rewards.pooling import num_positions
from remax_lightning.rollout import VLLMEngine
from remax_lightning.rollout.vllm_process import memory_share
from remax_lightning.sharding import decoder_layers, language_model
from remax_lightning.tools.plan.activation_memory import StepPasses, shapes_only, update_bytes
from remax_lightning.tools.plan.planned_run import DTYPES, PlannedRun, reward_models
from remax_lightning.tools.plan.types import FrozenSize, ModelSize, RolloutBytes, ServerBytes, Step
from remax_lightning.training.config_checks import check_lengths
from remax_lightning.training.optimization import parameter_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOUR_BITS = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Bytes per weight under nf4: 4 bits, an 8-bit scale per 64 weights, and a float32 scale per 256 of these scales."""


WORKSPACES = 2 * 32 * 2**20
"""Bytes in which cuBLAS works: 32 MiB on recent GPUs, once for the stream of the run and once for that of captures."""


class Sizes(NamedTuple):
    """The sizes of a run's models and passes.

    Args:
        parameters: of the policy, its adapter among them.
        policy: the model that is trained.
        value: the value model that PPO would also train: the policy with one output in place of logits.
        frozen: reference and reward models.
        step: the passes of a step.
        ppo_step: the passes of PPO, which has no greedy responses and one more pass of the policy.
    """

    parameters: int
    policy: ModelSize
    value: ModelSize
    frozen: list[FrozenSize]
    step: Step
    ppo_step: Step


def measure(run: PlannedRun) -> Sizes:
    """Return the sizes of a run. Downloads configurations at most.

    Raises:
        UserError: if a model's configuration cannot be read, or its passes cannot be followed.
    """
    followed = _followed("model.policy.path", run.module.policy_source.path)
    with followed, shapes_only(run.default_dtype), _stubs_of_experts():
        return _measure(run)


@contextmanager
def _followed(key: str, path: str) -> Iterator[None]:
    """Raise what the code of a model raises without values as a UserError: it may be anything, as it is any code."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{key}: the passes of {path!r} cannot be followed without running them ({reason})") from error


@contextmanager
def _stubs_of_experts() -> Iterator[None]:
    """Let transformers multiply grouped experts by its own operator inside.

    That has shapes for weights of any dtype. torch's, which a run takes, has them for bfloat16 alone.
    """
    moe: Any = None
    with suppress(ImportError):  # of another version
        moe = import_module("transformers.integrations.moe")
    if not hasattr(moe, "_can_use_grouped_mm"):
        yield
        return
    with mock.patch.object(moe, "_can_use_grouped_mm", return_value=False):
        yield


def _measure(run: PlannedRun) -> Sizes:
    # ---- The policy, with its adapter ----
    module, work, kl = run.module, run.work, run.module.objective.kl_config
    policy = empty_model(dataclasses.replace(module.policy_source, dtype=_dtype_name(run.policy_dtype)), "model.policy")
    check_lengths(policy, work.prompt_length, work.sampling.max_response_length)
    work = work._replace(suppressed=_suppressed_tokens(run, policy))
    passes = StepPasses(policy, work, run.autocast, whole_logits=run.strategy.shards_policy, device=run.device)
    # ---- Frozen models: rewards, and the reference, which may be the policy without its adapter ----
    source, shared = module.reference_source, 0
    reference = None if source is None else empty_model(source, "model.reference").requires_grad_(False)
    frozen = _reward_sizes(run, passes)
    if reference is not None and source is not None:
        stays = _parameter_bytes(reference.get_output_embeddings()) if kl.full else 0
        frozen.append(
            _frozen_size("reference", reference, passes.reference_scoring(reference), source.placement, stays)
        )
    elif module.policy_source.lora is not None:
        reference = policy
        with initial_adapter(policy):
            shared = passes.reference_scoring(policy)
    scoring = passes.policy_scoring()
    # ---- The passes of a step, and its update ----
    groups, device = parameter_groups(policy), torch.device("cuda" if run.device == "gpu" else "cpu")
    compared = reference if kl.full else None
    greedy = module.objective.needs_greedy
    step = Step(
        rollout=_rollout(run, passes, greedy=greedy),
        scoring=max(shared, scoring if run.scores_policy else 0),
        training=passes.training(compared),
        update=_optimizer_bytes(run, groups, device),
        flat_update=_optimizer_bytes(run, _flatten_groups(groups), device),
        micro_batches=run.micro_batches,
        passes=run.passes,
        hidden=0 if compared is None else passes.hidden_state_bytes(compared, work.prompts * work.sampling.num_samples),
        keeps_cache=run.keeps_cache,
        captures_graphs=run.captures_graphs,
        workspaces=WORKSPACES if run.device == "gpu" else 0,
        server=_server(run, policy, passes, greedy=greedy),
    )
    # ---- PPO: no greedy responses, and the policy always scores ----
    ppo = dataclasses.replace(
        step,
        rollout=_rollout(run, passes, greedy=False),
        scoring=max(shared, scoring),
        server=_server(run, policy, passes, greedy=False),
    )
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    size = _policy_size(policy, run)
    return Sizes(parameters, size, _value_size(policy, size), frozen, step, ppo)


def _rollout(run: PlannedRun, passes: StepPasses, *, greedy: bool) -> RolloutBytes:
    # On vLLM's servers: keys, values and logits are theirs.
    return RolloutBytes(0, 0) if run.decodes_elsewhere else passes.rollout(greedy=greedy)


def _server(run: PlannedRun, policy: PreTrainedModel, passes: StepPasses, *, greedy: bool) -> ServerBytes | None:
    """Return the bytes of a server that shares the device; None without one."""
    engine, work = run.module.engine, run.work
    if not (isinstance(engine, VLLMEngine) and engine.mode == "colocate"):
        return None
    # Whole and in the dtype of the passes, be the policy sharded or in 4 bits.
    itemsize = DTYPES[run.precision.partition("-")[0]].itemsize if run.is_mixed else run.policy_dtype.itemsize
    weights = itemsize * sum(parameter.numel() for parameter in policy.parameters())
    cache = passes.rollout(greedy=greedy).cache
    share = memory_share(engine.server_args) if run.device == "gpu" else None
    return ServerBytes(weights, cache, cache // (work.prompts * (work.sampling.num_samples + greedy)), share)


def _suppressed_tokens(run: PlannedRun, policy: PreTrainedModel) -> SuppressedTokens:
    """Return the tokens that a run does not draw: EOS at first, and rows of the embedding without a token."""
    if run.tokenizer is None:
        return NO_TOKENS
    eos_id = run.tokenizer.eos_token_id
    # Embeddings are often padded to a round number of rows: those behind the tokenizer's last id have no token.
    num_used = len(set(run.tokenizer.get_vocab().values()))
    return SuppressedTokens(
        tuple(range(num_used, policy.config.get_text_config().vocab_size)),
        () if eos_id is None else (int(cast(int, eos_id)),),
        run.work.sampling.min_response_length,
    )


def empty_model(source: ModelConfig, key: str) -> PreTrainedModel:
    """Return a model as `source` would load it, without its weights; call it inside `shapes_only`."""
    # Its memory is that of PyTorch's own kernel, which needs no package and no GPU.
    attention = None if (source.attn_implementation or "").startswith("flash") else source.attn_implementation
    # ---- The base, without weights ----
    plain = dataclasses.replace(
        source, from_scratch=True, lora=None, quantization=None, attn_implementation=attention
    ).load_base(key)
    # ---- The adapter: of the configuration, or with the shape of a saved one ----
    lora = source.lora
    if lora is not None and lora.path is not None:
        from peft import PeftConfig

        saved: Any = PeftConfig.from_pretrained(lora.path)
        lora = type(lora)(r=saved.r, alpha=saved.lora_alpha, target_modules=list(saved.target_modules))
    # PEFT moves what it makes to where the base is, which is where everything is here, and fake tensors refuse it.
    with mock.patch.object(nn.Module, "to", lambda module, *_, **__: module):
        return dataclasses.replace(source, lora=lora).wrap_with_adapter(plain, key, seed=0)


def _reward_sizes(run: PlannedRun, passes: StepPasses) -> list[FrozenSize]:
    sizes = []
    for reward in reward_models(run.module.reward):
        model = _empty_classifier(reward)
        limit = num_positions(model, model.config)  # where the run cuts texts, too
        with _followed("model.reward.init_args.path", reward.path):
            working = passes.reward_scoring(model, limit)
        sizes.append(_frozen_size("reward model", model, working, reward.placement))
    return sizes


def _empty_classifier(reward: ClassifierReward) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    key = "model.reward.init_args"
    adapter = read_adapter(reward.path, reward.revision, reward.allow_pickle, key)
    path, revision = reward.path, reward.revision
    if adapter is not None:  # merged when it is loaded
        path, revision = adapter.base_path, adapter.base_revision
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=reward.trust_remote_code)
        config.num_labels = 1
        dtype = config.dtype if reward.dtype is None else getattr(torch, reward.dtype)
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=dtype or torch.float32, trust_remote_code=reward.trust_remote_code
        )
    except Exception as error:  # whatever the libraries raise is about the files at the path
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{key}.path: the configuration of {path!r} cannot be read: {reason}") from error
    return cast("PreTrainedModel", model.requires_grad_(False))


def _frozen_size(name: Any, model: PreTrainedModel, working: int, placement: Any, stays: int = 0) -> FrozenSize:
    layers = [_parameter_bytes(layer) for layer in decoder_layers(cast(nn.Module, model))]
    return FrozenSize(name, _parameter_bytes(model), working, sum(layers), max(layers, default=0), placement, stays)


def _optimizer_bytes(run: PlannedRun, groups: list[dict[str, Any]], device: torch.device) -> Any:
    try:
        return update_bytes(run.module.optimizer, groups, device)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise UserError(
            f"model.optimizer: it cannot be tried without weights ({reason}); plan with torch.optim.AdamW in its place,"
            " or with what else has as many numbers per weight"
        ) from error


def _flatten_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # ZeRO updates one flat float32 tensor per parameter group.
    sizes = [sum(parameter.numel() for parameter in group["params"]) for group in groups]
    return [
        group | {"params": [nn.Parameter(torch.empty(size, dtype=torch.float32))]}
        for group, size in zip(groups, sizes, strict=True)
    ]


def _policy_size(policy: PreTrainedModel, run: PlannedRun) -> ModelSize:
    parameters, core = list(policy.parameters()), language_model(policy)
    weights, layers = (
        _parameter_bytes(policy),
        [_parameter_bytes(layer) for layer in decoder_layers(cast(nn.Module, core))],
    )
    linears = [module.weight for module in core.modules() if type(module) is nn.Linear]
    cast_copy = 0
    if run.is_mixed and not run.decodes_elsewhere:  # every device casts the float32 weights of a rollout once
        # halved: 4 bytes become 2
        cast_copy = sum(weight.nbytes for weight in linears if weight.dtype == torch.float32) // 2
    if run.module.policy_source.quantization is not None:
        head = core.get_output_embeddings()
        # In 4 bits are the linear layers of the base; the output head and what is trained are not.
        cut = [weight for weight in linears if head is None or weight is not head.weight]
        weights -= sum(weight.nbytes - int(FOUR_BITS * weight.numel()) for weight in cut if not weight.requires_grad)
    return ModelSize(
        weights=weights,
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        itemsize=next(parameter.itemsize for parameter in parameters if parameter.requires_grad),
        largest=max(parameter.nbytes for parameter in parameters),
        layer=max(layers, default=0),
        outside=_parameter_bytes(policy) - sum(layers),
        cast_copy=cast_copy,
    )


def _value_size(policy: PreTrainedModel, size: ModelSize) -> ModelSize:
    core = language_model(policy)
    # A value model has one number in place of the logits, so its output head counts as nothing.
    body = {id(parameter) for parameter in core.base_model.parameters()}
    head = [parameter for parameter in core.parameters() if id(parameter) not in body]
    weights = sum(parameter.nbytes for parameter in head)
    trainable = size.trainable - sum(parameter.numel() for parameter in head if parameter.requires_grad)
    return size._replace(weights=size.weights - weights, trainable=trainable, outside=max(0, size.outside - weights))


def _dtype_name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")


def _parameter_bytes(model: Any) -> int:
    parameters: Iterable[nn.Parameter] = model.parameters()
    return sum(parameter.nbytes for parameter in parameters)
