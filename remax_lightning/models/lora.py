"""LoRA (Hu et al. 2021, arXiv 2106.09685): train low-rank updates of a frozen model, the adapter.

Also reads the adapter of a checkpoint into the model that it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from torch import Tensor, nn

from remax_lightning.errors import UserError, above, at_least, check_ranges
from remax_lightning.files import home_path
from remax_lightning.models.checkpoint_reader import refused_pickle
from remax_lightning.models.checksums import check_exported
from remax_lightning.sharding import is_peft_wrapper

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""PEFT's `init_lora_weights` that do not change the weights of the base."""
TRAINED, INITIAL = "default", "start"
"""PEFT names of the trained adapter, and of the frozen copy of a saved adapter that training starts from."""


@dataclass(frozen=True)
class LoRAConfig:
    """The adapter that is trained instead of the weights of the model.

    Args:
        r: rank of the update of each layer.
        alpha: the update is scaled by `alpha / r`.
        dropout: dropout of the adapter's inputs. 0, because otherwise training would compute log-probs of another
            distribution than the sampled one.
        target_modules: the layers to adapt, by the last part of their names (`q_proj`); None adapts every linear layer
            except the output embedding.
        path: folder or hub name of a saved adapter to continue from. The other keys must then be left out: the saved
            ones count.
    """

    r: Annotated[int, at_least(1)] = 16
    alpha: Annotated[int, above(0)] = 32
    dropout: Annotated[float, at_least(0, below=1)] = 0.0
    target_modules: list[str] | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self), "model.policy.lora")
        if self.path is not None:
            object.__setattr__(self, "path", home_path(self.path))
        if self.target_modules == []:
            raise UserError("model.policy.lora.target_modules must be null or at least one name, got none")
        if self.path is not None and replace(self, path=None) != LoRAConfig():
            raise UserError(
                "model.policy.lora: r, alpha, dropout and target_modules come from the adapter at"
                f" path {self.path!r}; remove them"
            )


def add_adapter(model: PreTrainedModel, lora: LoRAConfig, key: str, seed: int) -> PreTrainedModel:
    """Return `model` frozen and wrapped with a trainable adapter.

    The output of a new adapter is 0. A saved adapter is loaded twice, once to train and once frozen, so that
    `initial_adapter` can switch to the frozen one.

    Args:
        model: the base.
        lora: the adapter.
        key: the configuration key of `lora`, for messages.
        seed: seed of a new adapter, the same on all ranks and under every strategy.

    Raises:
        UserError: if the adapter cannot be created or loaded.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    adapted: Any
    if lora.path is not None:
        _checked_adapter(lora.path, key)
        check_exported(Path(lora.path), f"{key}.path")
    try:
        # ---- Create it: the random numbers of the run stay where they are ----
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if lora.path is not None:
                # A saved adapter, once to train and once frozen as the initial one.
                adapted = PeftModel.from_pretrained(model, lora.path, is_trainable=True)
                missing = adapted.load_adapter(lora.path, INITIAL).missing_keys
                if missing:  # PEFT would initialize them randomly
                    raise ValueError(f"it has no {', '.join(missing[:2])}")
            else:
                settings = LoraConfig(
                    r=lora.r,
                    lora_alpha=lora.alpha,
                    lora_dropout=lora.dropout,
                    target_modules=lora.target_modules or "all-linear",
                    task_type="CAUSAL_LM",
                )
                adapted = get_peft_model(model, settings)
    except (OSError, RuntimeError, ValueError, UnpicklingError) as error:
        problem = "cannot adapt" if lora.path is None else f"cannot load the adapter {lora.path!r} into"
        reason = refused_pickle(error) or " ".join(str(error).split())
        raise UserError(f"{key}: {problem} {type(model).__name__}: {reason[:500]}") from error
    # The adapter has the dtype of training, also if the base has fewer bits.
    for name, parameter in adapted.named_parameters():
        if not {TRAINED, INITIAL}.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(torch.get_default_dtype())
    return cast("PreTrainedModel", adapted)


def has_adapter(model: nn.Module) -> bool:
    """Whether `model` was made by `add_adapter`."""
    return hasattr(model, "peft_config") and is_peft_wrapper(model)


@contextmanager
def initial_adapter(policy: Any) -> Iterator[None]:
    """Switch an adapted policy to its start of training inside: no adapter, or the saved one that it started from.

    This needs no second copy of the base. Do not train inside.
    """
    # A new adapter adds 0, so without it the policy is what training started from.
    if INITIAL not in policy.peft_config:
        with policy.disable_adapter():
            yield
        return
    policy.set_adapter(INITIAL, inference_mode=True)
    try:
        yield
    finally:
        policy.set_adapter(TRAINED)


def _checked_adapter(path: str, key: str) -> Any:
    """Return the configuration of a LoRA adapter, and refuse what is none, before anything is loaded."""
    from peft import PeftConfig

    if path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise UserError(f"{key}.path: there is no folder {path!r}; give the folder or hub name of an adapter")
    try:
        config: Any = PeftConfig.from_pretrained(path)
    except Exception as error:
        raise UserError(
            f"{key}.path: {path!r} is not an adapter (adapter_config.json is missing or unreadable); set a full model"
            " in model.policy.path"
        ) from error
    if config.peft_type != "LORA":
        raise UserError(f"{key}.path: expected a LoRA adapter, got {config.peft_type.value} in {path!r}")
    # Trained biases change the base itself, so switching the adapter off would not give the start of training.
    if config.bias != "none":
        raise UserError(
            f"{key}.path: expected an adapter without trained biases, got bias {config.bias!r} in {path!r};"
            " merge it into the base and set the result in model.policy.path"
        )
    # Others take their start out of the base (PiSSA, OLoRA, CorDA, LoftQ, ...), once for each time they are loaded: it
    # is loaded twice here, and what reads it elsewhere, such as vLLM, adds it to the base as it is.
    if config.init_lora_weights not in _KEEPS_BASE:
        raise UserError(
            f"{key}.path: expected an adapter that leaves its base as it is, got init_lora_weights"
            f" {config.init_lora_weights!r} in {path!r}, which changes it; merge it into the base and set the result in"
            " model.policy.path, or save it with PEFT's path_initial_model_for_weight_conversion"
        )
    return config


def check_mergeable(model: nn.Module, key: str) -> None:
    """Refuse an adapter that cannot be merged into its base.

    Args:
        model: the adapted model.
        key: what asks for the merge, for messages.

    Raises:
        UserError: naming a layer that has no bias, but an adapter with one (`lora_bias` of PEFT).
    """
    for name, layer in model.named_modules():
        base: Any = getattr(layer, "base_layer", None)
        if base is not None and any(getattr(layer, "lora_bias", {}).values()) and getattr(base, "bias", None) is None:
            raise UserError(
                f"{key}: the adapter has lora_bias, and {name.removeprefix('base_model.model.')} of its base has no"
                " bias to add it to; leave the option out, and the adapter is exported alone"
            )


def contains_adapter(weights: Mapping[str, Tensor]) -> bool:
    """Whether the weights include a LoRA adapter of PEFT."""
    return any(".lora_" in name for name in weights)


def adapter_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype of the adapter among `weights`, the default dtype of its run."""
    return next(value.dtype for name, value in weights.items() if ".lora_" in name)


def load_adapter(model: PreTrainedModel, weights: dict[str, Tensor], lora: Mapping[str, Any]) -> Any:
    """Return `model` in a PEFT wrapper with the adapter of a checkpoint.

    Args:
        model: the base; on the meta device if only the adapter is needed.
        weights: weights by their names in the adapted model; may include those of the base.
        lora: the keys of `model.policy.lora`.

    Raises:
        UserError: if the weights do not fit such an adapter.
    """
    from peft import get_peft_model

    empty = next(model.parameters()).is_meta  # only the adapter is wanted
    path = lora.get("path")
    config = _checked_adapter(path, "model.policy.lora") if path else _infer_lora_config(weights, lora)
    config.inference_mode = False
    # Keep the dtype of the run, so that a merge rounds as it would have there.
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=empty)
    # ---- Every weight of the checkpoint must have a place, and every adapter weight a value ----
    # Besides matrices that are modules trained whole (`modules_to_save`) and trained tokens.
    wanted = {name for name, value in adapted.state_dict(keep_vars=True).items() if value.requires_grad}
    shapes = {name: value.shape for name, value in adapted.state_dict().items()}
    unknown = sorted(name for name in weights if shapes.get(name) != weights[name].shape)
    unknown += sorted(wanted - weights.keys())
    if unknown:
        raise UserError(
            f"checkpoint: its adapter does not match model.policy.lora; {len(unknown)} weights differ:"
            f" {', '.join(unknown[:3])}; give the configuration of its run with --config"
        )
    adapted.load_state_dict(weights, strict=False, assign=True)
    return adapted


def _infer_lora_config(weights: Mapping[str, Tensor], lora: Mapping[str, Any]) -> Any:
    from peft import LoraConfig

    # A is [r, in], so the rank can be read off. Alpha cannot.
    [rank, *others] = {len(value) for name, value in weights.items() if ".lora_A." in name}
    if others or "alpha" not in lora:
        raise UserError(
            "the checkpoint holds an adapter, so the configuration of the run must have model.policy.lora with its"
            f" alpha, got {dict(lora) or 'nothing'}; give the configuration with --config"
        )
    return LoraConfig(
        r=rank,
        lora_alpha=lora["alpha"],
        lora_dropout=lora.get("dropout", 0.0),
        target_modules=lora.get("target_modules") or "all-linear",
        task_type="CAUSAL_LM",
    )
