"""A policy in training as the files of a Hugging Face model folder; the policy itself is left as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def policy_weights(policy: PreTrainedModel, *, keep: bool) -> dict[str, Tensor] | None:
    """Return the whole weights on the CPU where a strategy has spread them over ranks, else None.

    Args:
        policy: the model; every rank has to call this.
        keep: whether this rank needs the weights; the others get an empty dictionary.
    """
    from torch.distributed.tensor import DTensor

    values = policy.state_dict(keep_vars=True)
    if any(isinstance(value, DTensor) for value in values.values()):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole: dict[str, Any] = get_model_state_dict(policy, options=options)
        return share_tied(policy, whole) if keep else {}
    if any(hasattr(value, "ds_id") for value in values.values()):  # DeepSpeed ZeRO stage 3
        return _gather_zero_3(values, keep)
    return None


def _gather_zero_3(values: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    import deepspeed

    gathered: dict[int, Tensor | None] = {}  # by identity, so that tied weights stay tied
    for value in values.values():
        if id(value) in gathered:  # on every rank alike, for to gather is to meet
            continue
        # One at a time: the accelerator need not hold the whole model.
        with deepspeed.zero.GatheredParameters([value] if hasattr(value, "ds_id") else []):
            gathered[id(value)] = value.detach().cpu().clone() if keep else None
    return {name: cast(Tensor, gathered[id(value)]) for name, value in values.items()} if keep else {}


def share_tied(model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `weights` with one tensor for each parameter, also where the model has it under several names."""
    first: dict[int, str] = {}
    return {
        name: weights[first.setdefault(id(value), name)]
        for name, value in model.state_dict(keep_vars=True).items()
        if name in weights
    }


def save_policy(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor] | None,
    folder: Path,
    *,
    max_shard_size: str = "5GB",
) -> None:
    """Save model, generation settings and tokenizer so that `from_pretrained` reads them.

    Args:
        policy: the model, with or without LoRA adapters.
        tokenizer: its tokenizer.
        weights: whole weights on the CPU, or None to take the model's own.
        folder: an existing folder.
        max_shard_size: most bytes of a file of weights.
    """
    model = _without_adapters(policy)
    # A second shell around the same weights: saving sets attributes, and training must not notice. Not
    # `copy.copy`, because a model that FSDP has taken over builds itself anew.
    shell: Any = object.__new__(type(model))
    shell.__dict__.update(model.__dict__)
    shell.config = copy.deepcopy(model.config)
    shell.generation_config = export_generation_config(model, tokenizer)
    if getattr(shell.config, "use_cache", None) is False:  # off for activation checkpointing; slow ever after
        shell.config.use_cache = True
    shell.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)


def export_generation_config(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return generation settings that transformers saves, and that end a response where training ended it."""
    from transformers import GenerationConfig

    config = copy.deepcopy(policy.generation_config) or GenerationConfig()
    config.use_cache = True
    eos = config.eos_token_id if config.eos_token_id is not None else []
    ends = list(eos) if isinstance(eos, list | tuple) else [eos]
    end: Any = tokenizer.eos_token_id
    if end is not None and end not in ends:
        ends.append(end)
    config.eos_token_id = (ends[0] if len(ends) == 1 else ends) if ends else None
    if config.pad_token_id is None or config.pad_token_id < 0:
        config.pad_token_id = tokenizer.pad_token_id
    if _valid(config):
        return config
    # Published settings may hold a temperature without do_sample, which transformers loads but does not save.
    config.do_sample = True
    if _valid(config):
        return config
    plain = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    plain.bos_token_id = config.bos_token_id
    return plain


def _valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def _without_adapters(policy: PreTrainedModel) -> PreTrainedModel:
    """Return `policy`, or a copy of it with its LoRA adapters merged into the weights."""
    if not hasattr(policy, "peft_config"):
        return policy
    from peft.tuners.tuners_utils import BaseTunerLayer

    # A copy, because merging and unmerging would round the weights in training.
    merged: Any = copy.deepcopy(policy)
    if hasattr(merged, "get_base_model"):  # wrapped by peft rather than adapted in place
        merged = merged.get_base_model()
    for name, layer in list(merged.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            merged.set_submodule(name, layer.get_base_layer())
    merged._hf_peft_config_loaded = False
    return merged  # type: ignore[no-any-return]
