"""The sizes of a planned run: its models built from their configurations, its passes run on shapes alone."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from remax_lightning.errors import UserError
from remax_lightning.models import PretrainedModel
from remax_lightning.modules.checks import check_lengths
from remax_lightning.modules.optimization import parameter_groups
from remax_lightning.rewards import ClassifierReward
from remax_lightning.rollout.forward import language_model
from remax_lightning.rollout.packed import MOST_BYTES
from remax_lightning.tools.allocations import shapes_only
from remax_lightning.tools.passes import StepPasses, update_bytes
from remax_lightning.tools.planned_run import PlannedRun, reward_models
from remax_lightning.tools.quantities import FrozenModel, ModelSize, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Sizes(NamedTuple):
    """What a run consists of, in bytes and parameters.

    Args:
        policy: the model that is trained.
        value: the value model that PPO would train beside it: a policy with one number in place of logits.
        frozen: reference and reward model by name.
        step: the passes of a step.
        ppo_step: those of PPO, which makes no greedy responses and has a pass of the policy more.
    """

    policy: ModelSize
    value: ModelSize
    frozen: dict[str, FrozenModel]
    step: Step
    ppo_step: Step


def measure(run: PlannedRun) -> Sizes:
    """Return the sizes of a run. Downloads configurations at most.

    Raises:
        UserError: if a model's configuration cannot be read, or its passes cannot be followed.
    """
    try:
        with shapes_only(run.default_dtype):
            return _measure(run)
    except RuntimeError as error:  # of an operator that asks for values
        raise UserError(
            f"model.policy.path: the passes of {run.module.policy_source.path!r} cannot be followed without running"
            f" them ({str(error).splitlines()[0]}); in trainer.precision bf16-true more models can"
        ) from error


def _measure(run: PlannedRun) -> Sizes:
    module, work = run.module, run.work
    policy = outline(dataclasses.replace(module.policy_source, dtype=_name(run.policy_dtype)), "model.policy")
    check_lengths(policy, work.prompt_length, work.sampling.max_response_length)
    passes = StepPasses(policy, work, run.autocast, whole_logits=run.strategy.shards_policy)
    kl = module.objective.kl_config
    reference = None if module.reference_source is None else outline(module.reference_source, "model.reference")
    frozen, hidden = {}, 0
    if reference is not None:
        reference.requires_grad_(False)
        frozen["reference"] = FrozenModel(_bytes(reference), passes.reference_scoring(reference), _layer(reference)[0])
        hidden = passes.hidden(reference, work.prompts * work.sampling.num_samples) if kl.full else 0
    frozen |= _reward(run, passes)
    scoring = passes.policy_scoring()
    groups = parameter_groups(policy)
    step = Step(
        rollout=passes.rollout(greedy=module.objective.needs_greedy),
        scoring=scoring if run.scores_policy else 0,
        training=passes.training(reference if kl.full else None),
        update=update_bytes(module.optimizer, groups, foreach=run.device == "gpu"),
        flat_update=update_bytes(module.optimizer, _flat(groups), foreach=run.device == "gpu"),
        micro_batches=run.micro_batches,
        passes=run.passes,
        hidden=hidden,
    )
    ppo = dataclasses.replace(step, rollout=passes.rollout(greedy=False), scoring=scoring)
    return Sizes(_size(policy, run), _value_size(policy, run), frozen, step, ppo)


def outline(source: PretrainedModel, key: str) -> PreTrainedModel:
    """Return a model as `source` would load it, without its weights; call it inside `shapes_only`."""
    # Its memory is that of PyTorch's own kernel, which needs no package and no GPU.
    attention = None if (source.attn_implementation or "").startswith("flash") else source.attn_implementation
    return dataclasses.replace(source, from_scratch=True, attn_implementation=attention).load(key)


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")


def _reward(run: PlannedRun, passes: StepPasses) -> dict[str, FrozenModel]:
    models = [_classifier(each) for each in reward_models(run.module.reward)]
    if not models:
        return {}
    working = max(passes.reward_scoring(model) for model in models)
    weights, layer = sum(map(_bytes, models)), max(_layer(model)[0] for model in models)
    return {"reward model": FrozenModel(weights, working, layer)}


def _classifier(reward: ClassifierReward) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    key = "model.reward.init_args.path"
    try:
        config = AutoConfig.from_pretrained(
            reward.path, revision=reward.revision, trust_remote_code=reward.trust_remote_code
        )
        dtype = config.dtype if reward.dtype is None else getattr(torch, reward.dtype)
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=dtype or torch.float32, trust_remote_code=reward.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{key}: the configuration of {reward.path!r} cannot be read: {reason}") from error
    return cast("PreTrainedModel", model.requires_grad_(False))


def _flat(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        group | {"params": [nn.Parameter(torch.empty(_count(group["params"]), dtype=torch.float32))]}
        for group in groups
    ]


def _size(policy: PreTrainedModel, run: PlannedRun) -> ModelSize:
    parameters = list(policy.parameters())
    itemsize = parameters[0].itemsize
    layer, outside = (size // itemsize for size in _layer(policy))
    linears = sum(module.weight.nbytes for module in policy.modules() if type(module) is nn.Linear)
    packs = run.device == "cpu" and run.policy_dtype == torch.float32 and "mixed" not in run.precision
    return ModelSize(
        parameters=_count(parameters),
        trainable=_count([each for each in parameters if each.requires_grad]),
        itemsize=itemsize,
        largest=max(each.numel() for each in parameters),
        layer=layer,
        outside=outside,
        packed=linears if packs and linears <= MOST_BYTES else 0,
    )


def _value_size(policy: PreTrainedModel, run: PlannedRun) -> ModelSize:
    size = _size(policy, run)
    body = _count(list(language_model(policy).base_model.parameters()))
    head = size.parameters - body
    trainable = size.trainable - head if size.trainable == size.parameters else size.trainable
    return size._replace(parameters=body, trainable=trainable, outside=max(0, size.outside - head))


def _layer(model: PreTrainedModel) -> tuple[int, int]:
    """Return the bytes of a model's largest layer, and of what belongs to no layer."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [_bytes(module) for module in model.modules() if type(module).__name__ in names]
    return max(layers, default=0), _bytes(model) - sum(layers)


def _bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
