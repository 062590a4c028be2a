"""Save a policy in training as a Hugging Face model folder, without changing the policy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from remax_lightning.errors import UserError
from remax_lightning.sharding import gathered, is_peft_wrapper, is_zero3_sharded, nonfinite_name, unwrap_peft
from remax_lightning.types import ExportSpec

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def policy_weights(policy: PreTrainedModel, *, keep: bool, merge_adapter: bool = True) -> dict[str, Tensor] | None:
    """Return the full weights on the CPU if a strategy has sharded them, else None.

    Args:
        policy: the model; every rank has to call this.
        keep: whether this rank needs the weights; other ranks get an empty dictionary.
        merge_adapter: false omits the frozen base of an adapted policy, which `save_policy` then does not need.
    """
    from torch.distributed.tensor import DTensor

    # ---- FSDP2 gathers by itself; under ZeRO-3 we gather one parameter after the other; others have full weights ----
    only_adapter = not merge_adapter and hasattr(policy, "peft_config")
    values = policy.state_dict(keep_vars=True)
    if any(isinstance(value, DTensor) for value in values.values()):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=only_adapter)
        weights: dict[str, Any] = get_model_state_dict(policy, options=options)
        return deduplicate_tied(policy, weights) if keep else {}
    if only_adapter:
        values = {name: value for name, value in values.items() if value.requires_grad}
    if any(is_zero3_sharded(value) for value in values.values()):  # DeepSpeed ZeRO stage 3
        return _gather_zero3(values, keep)
    return None


def _gather_zero3(values: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    copies: dict[int, Tensor | None] = {}  # by identity, so that tied weights stay tied
    for value in values.values():
        if id(value) in copies:  # the same on every rank, because gathering is a collective
            continue
        # One parameter at a time, so that the device never holds the whole model.
        with gathered([value]):
            copies[id(value)] = value.detach().cpu().clone() if keep else None
    return {name: cast(Tensor, copies[id(value)]) for name, value in values.items()} if keep else {}


def deduplicate_tied(model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `weights` with one tensor per parameter; names of tied parameters share it."""
    first: dict[int, str] = {}
    return {
        name: weights[first.setdefault(id(value), name)]
        for name, value in model.state_dict(keep_vars=True).items()
        if name in weights
    }


class NotFiniteError(UserError):
    """Weights that were to be written are not finite; what is on the disk stays."""


def save_policy(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor] | None,
    folder: Path,
    *,
    merge_adapter: bool = False,
    max_shard_size: str = "5GB",
) -> None:
    """Save model, generation settings and tokenizer so that `from_pretrained` reads them.

    Args:
        policy: the model, with or without LoRA adapters.
        tokenizer: its tokenizer.
        weights: full weights on the CPU; None takes those of the model.
        folder: an existing folder.
        merge_adapter: merge the adapter into the base; false saves the adapter alone, as PEFT reads it.
        max_shard_size: maximum size of a weight file.
    """
    tokenizer.save_pretrained(folder)
    if hasattr(policy, "peft_config"):
        if not merge_adapter:
            _save_adapter(policy, weights, folder)
            return
        policy, weights = _merge_adapter(policy, weights), None
    shell = _shallow_copy(policy)
    shell.generation_config = export_generation_config(policy, tokenizer)
    shell.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)


def save_exported(
    exported: ExportSpec, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor] | None, folder: Path
) -> None:
    """Save a model with changed weights, so that `from_pretrained` reads it.

    Args:
        exported: the model, and how to change its weights and configuration.
        tokenizer: its tokenizer.
        weights: full weights on the CPU; None takes those of the model.
        folder: an existing folder.

    Raises:
        NotFiniteError: if the change has made a trained weight infinite or NaN.
    """
    shell = _shallow_copy(exported.model)
    changed, config = exported.change(exported.model.state_dict() if weights is None else weights)
    # Frozen weights may hold -inf on purpose, as masks do.
    trained = [name for name, parameter in exported.model.named_parameters() if parameter.requires_grad]
    if name := nonfinite_name((name, changed[name]) for name in trained if name in changed):
        raise NotFiniteError(name)
    for name, value in {**exported.config, **config}.items():
        if value is not None:
            setattr(shell.config, name, value)
        elif hasattr(shell.config, name):
            delattr(shell.config, name)
    shell.save_pretrained(folder, state_dict=changed)
    tokenizer.save_pretrained(folder)


def _shallow_copy(model: PreTrainedModel) -> Any:
    """Return a copy of the model object that shares the weights, because saving sets attributes.

    `copy.copy` would rebuild a model that FSDP has wrapped.
    """
    shell: Any = object.__new__(type(model))
    shell.__dict__.update(model.__dict__)
    shell.config = copy.deepcopy(model.config)
    if (
        getattr(shell.config, "use_cache", None) is False
    ):  # training with checkpointing turned it off; decoding needs it
        shell.config.use_cache = True
    return shell


def export_generation_config(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return generation settings that transformers can save, with the EOS tokens of training."""
    from transformers import GenerationConfig

    config = copy.deepcopy(policy.generation_config) or GenerationConfig()
    # Training with checkpointing turns it off; decoding needs it.
    config.use_cache = True
    eos = config.eos_token_id if config.eos_token_id is not None else []
    ends = list(eos) if isinstance(eos, list | tuple) else [eos]
    # ---- All EOS tokens that ended responses in training ----
    end: Any = tokenizer.eos_token_id
    if end is not None and end not in ends:
        ends.append(end)
    config.eos_token_id = (ends[0] if len(ends) == 1 else ends) if ends else None
    if config.pad_token_id is None or config.pad_token_id < 0:
        config.pad_token_id = tokenizer.pad_token_id
    if _is_valid(config):
        return config
    # ---- transformers saves only settings that it considers valid ----
    # Published settings may have a temperature without do_sample, which transformers loads but refuses to save.
    config.do_sample = True
    if _is_valid(config):
        return config
    plain = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    plain.bos_token_id = config.bos_token_id
    return plain


def _is_valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def save_weights(
    policy: PreTrainedModel, weights: dict[str, Tensor] | None, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Save weights alone, under the names of published checkpoints: an adapter as PEFT reads it, or the whole model.

    Args:
        policy: the model, with or without LoRA adapters.
        weights: full weights on the CPU; None takes those of the model.
        folder: an existing folder.
        dtype: of the saved weights of a model without adapters; None saves them as they are.
    """
    if hasattr(policy, "peft_config"):
        _save_adapter(policy, weights, folder)
        return
    from transformers import GenerationConfig

    shell = _shallow_copy(policy)
    shell.generation_config = GenerationConfig()  # published settings may be such that transformers refuses to save
    if dtype is not None:
        values = policy.state_dict(keep_vars=True) if weights is None else weights
        casts: dict[int, Tensor] = {}  # by identity, so that tied weights stay tied
        for value in values.values():
            if id(value) not in casts:
                casts[id(value)] = value.detach().to(dtype) if value.is_floating_point() else value.detach()
        weights = {name: casts[id(value)] for name, value in values.items()}
    shell.save_pretrained(folder, state_dict=weights)


def published_weights(policy: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights of a whole policy under the names of published checkpoints, tied ones once.

    They are the policy's own, but for layers that are stored otherwise than they are run, such as experts.
    """
    from transformers.core_model_loading import revert_weight_conversion

    weights: dict[int, tuple[str, Tensor]] = {}
    for name, value in policy.state_dict(keep_vars=True).items():
        weights.setdefault(id(value), (name, value.detach()))
    published: dict[str, Tensor] = revert_weight_conversion(policy, dict(weights.values()))
    return published


def _save_adapter(policy: Any, weights: dict[str, Tensor] | None, folder: Path) -> None:
    # A PEFT wrapper may hold a second, frozen adapter: the initial one.
    chosen = {"selected_adapters": [policy.active_adapter]} if is_peft_wrapper(policy) else {}
    policy.save_pretrained(folder, state_dict=weights, **chosen)


def _merge_adapter(policy: Any, weights: dict[str, Tensor] | None) -> PreTrainedModel:
    """Return a new model on the CPU with the trained adapter merged into the weights.

    Merging in place would round the weights in training. The policy may also hold only a shard of the weights, or
    weights in 4 bits, which are dequantized here.
    """
    from peft import get_peft_model

    # ---- An empty model of the same class with the adapter's layers ----
    wrapped = is_peft_wrapper(policy)
    core, names = unwrap_peft(policy), [policy.active_adapter] if wrapped else policy.active_adapters()
    config = copy.deepcopy(core.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):  # without memory: the weights are assigned below
        adapters = [copy.deepcopy(policy.peft_config[name]) for name in names]  # PEFT notes the base in them
        empty: Any = get_peft_model(type(core)(config), adapters[0], names[0], autocast_adapter_dtype=False)
        for name, adapter in zip(names[1:], adapters[1:], strict=True):
            empty.add_adapter(name, adapter)
        if len(names) > 1:
            empty.base_model.set_adapter(names)
    # ---- The trained weights, then the merge ----
    weights = _weights_on_cpu(policy) if weights is None else weights
    prefix = "" if wrapped else "base_model.model."
    empty.load_state_dict({name: weights[name.removeprefix(prefix)] for name in empty.state_dict()}, assign=True)
    # PEFT also puts modules that were trained whole (`modules_to_save`) and trained tokens in their places, and unties
    # embeddings that are no longer the same. It checks that the result is finite.
    merged: Any = empty.merge_and_unload(safe_merge=True)
    merged.tie_weights()
    # No adapter is left in it, so transformers must not save it as one.
    merged._hf_peft_config_loaded = False
    merged.generation_config = core.generation_config
    return merged  # type: ignore[no-any-return]


def _weights_on_cpu(policy: Any) -> dict[str, Tensor]:
    """Return the weights of the model on the CPU; 4-bit weights are dequantized."""
    return {name: _dequantized(value).detach().cpu() for name, value in policy.state_dict(keep_vars=True).items()}


def _dequantized(value: Any) -> Tensor:
    if getattr(value, "quant_state", None) is None:
        return value  # type: ignore[no-any-return]
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(value.data, value.quant_state)  # type: ignore[no-any-return]
