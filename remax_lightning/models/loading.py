"""Load a causal language model as policy or as frozen reference, and keep its constant buffers in float32."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from remax_lightning.config import WeightDType
from remax_lightning.errors import RankError, UserError
from remax_lightning.files import home_path
from remax_lightning.models.checkpoint_reader import refused_pickle
from remax_lightning.models.checksums import check_exported
from remax_lightning.models.frozen import Placement, check_placement
from remax_lightning.models.lora import LoRAConfig, add_adapter
from remax_lightning.models.packing import recompute_contexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


HALVES = (torch.bfloat16, torch.float16)


class Float32Buffers:
    """Copies of the non-persistent floating-point buffers of a model, in float32.

    transformers creates them in float32 whatever the dtype of the weights. Lightning and DeepSpeed cast them with the
    weights, and rotary frequencies in bfloat16 change the angle of every position: the policy would differ from its
    reference before the first update, and from itself after an export.

    Args:
        model: the model after loading, before a strategy casts it.
    """

    def __init__(self, model: nn.Module) -> None:
        _recompute_rounded(model)
        self._float32_copies = [
            (module, name, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set and buffer.is_floating_point() and not buffer.is_meta
        ]

    def restore(self) -> None:
        """Replace buffers that were cast by the float32 copies, on the current device of the model."""
        for module, name, buffer in self._float32_copies:
            current = module._buffers[name]
            if current is not None and current.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(current.device)


def _recompute_rounded(model: nn.Module) -> None:
    """Let transformers recompute in float32 what it created in 16 bits, as it does under ZeRO-3."""
    make: Any = getattr(model, "_init_weights", None)
    for module in model.modules() if make is not None else ():
        names = module._non_persistent_buffers_set
        rounded = [name for name in names if getattr(module._buffers[name], "dtype", None) in HALVES]
        if rounded and not list(module.parameters(recurse=False)):  # or it would initialize the weights, too
            for name in rounded:
                # `_init_weights` fills the buffer in place, in the dtype that it has.
                module._buffers[name] = cast(Tensor, module._buffers[name]).float()
            make(module)


@dataclass(frozen=True)
class ModelConfig:
    """Where a language model comes from and how it is loaded.

    Args:
        path: a folder or a hub name.
        dtype: dtype of the weights; None follows `trainer.precision` (bfloat16 under bf16-true, otherwise float32).
        gradient_checkpointing: recompute activations in the backward pass: about a third slower, much less memory.
            `auto` leaves it off in `remax fit` with ReMax where `remax plan` says that the run fits into the GPU
            without it, or where there is no GPU; elsewhere, as from Python, it is on.
        disable_dropout: set every dropout of the model, and other noise such as a router's jitter, to 0, in its
            configuration and in its layers. With dropout, training would compute log-probs of another distribution than
            the sampled one, and the KL to the reference would start above 0.
        from_scratch: use random weights with the configuration at `path`, for supervised training of a new model.
        attn_implementation: attention kernel by transformers' name (`sdpa`, `eager`, `flash_attention_2`); None lets
            transformers choose.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code from the model repository. Off, because that code can do anything.
        allow_pickle: also read weights from `.bin` files, with `torch.load(weights_only=True)`; otherwise only
            safetensors.
        lora: train an adapter instead of the weights. Without `model.reference`, the policy with its initial adapter is
            the reference. A `reference` accepts only the `path` of a saved adapter.
        quantization: `nf4` stores the weights in 4 bits (QLoRA, arXiv 2305.14314), which needs bitsandbytes. A policy
            also needs `lora`, and a strategy that does not shard weights: one process, DDP, ZeRO-1 or 2.
        placement: where a reference is stored between its passes: `replicate`, full on every device; `shard`, layers
            sharded over all devices and gathered one at a time; `cpu`, in host memory and copied to the device for its
            passes. For the policy, `trainer.strategy` decides.
    """

    path: str
    dtype: WeightDType | None = None
    gradient_checkpointing: bool | Literal["auto"] = False
    disable_dropout: bool = True
    from_scratch: bool = False
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    lora: LoRAConfig | None = None
    quantization: Literal["nf4"] | None = None
    placement: Placement = "replicate"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", home_path(self.path))

    def load(self, key: str) -> PreTrainedModel:
        """Load the model, with its adapter if it has one.

        Args:
            key: the configuration key of this source, for messages (`model.policy`).

        Raises:
            UserError: if the model or adapter does not exist, or its weights are not in a permitted format.
        """
        return self.wrap_with_adapter(self.load_base(key), key, torch.initial_seed())

    def wrap_with_adapter(self, model: PreTrainedModel, key: str, seed: int) -> PreTrainedModel:
        """Return the result of `load_base`, frozen and wrapped with the adapter if `lora` is set."""
        return model if self.lora is None else add_adapter(model, self.lora, f"{key}.lora", seed)

    def load_base(self, key: str) -> PreTrainedModel:
        """Load the model without its adapter: a strategy may shard the base while it loads, but not the adapter."""
        from transformers import AutoModelForCausalLM

        # ---- What can be said before anything is loaded ----
        self._check(key)
        config = self._config(key)
        if not self.from_scratch:
            check_exported(Path(self.path), f"{key}.path")
        dtype = torch.get_default_dtype() if self.dtype is None else getattr(torch, self.dtype)
        # ---- Arguments of both ways to create the model; transformers must not see None ----
        common: dict[str, Any] = {
            "trust_remote_code": self.trust_remote_code,
            "attn_implementation": self.attn_implementation,
            "quantization_config": _nf4_config(dtype) if self.quantization == "nf4" else None,
        }
        common = {name: value for name, value in common.items() if value is not None}
        try:
            if self.from_scratch:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, **common)
            else:
                result: Any = AutoModelForCausalLM.from_pretrained(
                    self.path,
                    output_loading_info=True,
                    config=config,
                    dtype=dtype,
                    revision=self.revision,
                    use_safetensors=None if self.allow_pickle else True,
                    **common,
                )
                model, loaded = result
        except Exception as error:
            raise load_failure(error, f"{key}.path", self.path) from error
        if not self.from_scratch and (missing := sorted(loaded["missing_keys"])):
            # Such as the output embedding of a reward model; transformers only warns.
            raise UserError(
                f"{key}.path: {self.path!r} lacks {len(missing)} weights of {type(model).__name__} ({missing[0]}),"
                " which would be random; give a causal language model, not a reward model or a part of one"
            )
        if self.disable_dropout:
            # Beyond the configuration: some layers read another key, or none.
            silence_random_layers(model)
        if self.quantization is not None:
            _avoid_inference_kernel(model)
        if self.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        return cast("PreTrainedModel", model)

    def _check(self, key: str) -> None:
        check_placement(self.placement, f"{key}.placement")
        if self.from_scratch and (self.lora is not None or self.quantization is not None):
            other = "lora" if self.lora is not None else "quantization"
            raise UserError(
                f"{key}.from_scratch must be false with {key}.{other}, got true: no checkpoint saves the frozen base,"
                " so its random weights would be lost"
            )
        if self.quantization is not None and find_spec("bitsandbytes") is None:
            raise UserError(
                f"{key}.quantization is {self.quantization}, which needs bitsandbytes: pip install bitsandbytes, or"
                f" leave {key}.quantization out"
            )

    def empty_model(self, key: str, dtype: torch.dtype) -> PreTrainedModel:
        """Return the model without weights, on the meta device, with configuration and generation settings.

        Args:
            key: the configuration key of this source, for messages.
            dtype: dtype of the parameters.

        Raises:
            UserError: if the model does not exist.
        """
        from transformers import AutoModelForCausalLM, GenerationConfig

        config = self._config(key)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=self.trust_remote_code)
        except Exception as error:
            raise load_failure(error, f"{key}.path", self.path) from error
        with suppress(OSError):  # the model has no generation settings
            model.generation_config = GenerationConfig.from_pretrained(self.path, revision=self.revision or "main")
        return cast("PreTrainedModel", model)

    def _config(self, key: str) -> Any:
        from transformers import AutoConfig

        if looks_local(self.path) and not Path(self.path).is_dir():
            raise UserError(f"{key}.path: there is no folder {self.path!r}; give a folder or a hub name")
        if (Path(self.path) / "adapter_config.json").is_file() and not (Path(self.path) / "config.json").is_file():
            raise UserError(
                f"{key}.path: {self.path!r} is an adapter, not a model; to go on with it, set {key}.path to its base"
                f" and {key}.lora.path to this folder, or export it merged (export.merge_adapter: true, or remax export"
                " --merge)"
            )
        try:
            config = AutoConfig.from_pretrained(
                self.path, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        except Exception as error:
            raise load_failure(error, f"{key}.path", self.path) from error
        if self.disable_dropout:
            zero_dropout(config)
        return config


if TYPE_CHECKING:
    ModelSource: TypeAlias = ModelConfig | str
else:  # the command line reads the annotation: for it, a path alone is written out before it looks
    ModelSource = ModelConfig
"""A model as the modules accept it: a `ModelConfig`, or its `path` alone."""


def as_model_config(source: ModelSource, argument: str) -> ModelConfig:
    """Return the source of a model that may be given by its folder or hub name alone.

    Args:
        source: a `ModelConfig`, or its `path`.
        argument: the name of the argument, for the message.

    Raises:
        TypeError: if it is something else, such as a loaded model or the keys of a configuration.
    """
    if isinstance(source, Mapping):
        given = ", ".join(f"{name}=..." for name in source)
        raise TypeError(
            f"{argument} must be a folder, a hub name or a ModelConfig, got {type(source).__name__}: write"
            f" ModelConfig({given})"
        )
    if isinstance(source, ModelConfig):
        return source
    if isinstance(source, str | Path):
        return ModelConfig(str(source))
    raise TypeError(
        f"{argument} must be a folder, a hub name or a ModelConfig, got {type(source).__name__}: the model is loaded"
        " when training starts, so that a strategy can shard it"
    )


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Put `model` in eval mode and turn gradients of its parameters off."""
    model.requires_grad_(False)
    model.eval()
    return model


def _nf4_config(dtype: torch.dtype) -> Any:
    """Return the settings of the QLoRA paper: NormalFloat 4, with scales in 8 bits."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _avoid_inference_kernel(model: Any) -> None:
    """Turn off a CPU kernel of bitsandbytes that, once used in eval mode, gives earlier layers a gradient of 0."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Let `model` recompute its activations in the backward pass."""
    # Renamed in 5.23; the old name goes in 6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # The reentrant kind needs inputs with a gradient, which frozen embeddings lack. A packed pass is recomputed packed.
    enable({"use_reentrant": False, "context_fn": recompute_contexts})


def looks_local(path: str) -> bool:
    """Whether `path` is a local folder: hub names are `name` or `owner/name`."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).exists()


_RANDOM = re.compile(r"drop(?!s?_?tokens|ped)|jitter|noise|stochastic_depth", re.IGNORECASE)
"""Parts of the names that families give to the probability or the strength of what is random in train mode."""


def zero_dropout(config: Any) -> None:
    """Set all that is random in train mode to 0: families call it `dropout`, `attn_pdrop`, `router_jitter_noise`, ...

    Configurations and dictionaries inside a configuration, such as that of a text model, count too.

    Args:
        config: a configuration of transformers, or a dictionary in one; changed in place.
    """
    values = config if isinstance(config, dict) else vars(config)
    for name, value in list(values.items()):
        # Floats only: an integer or a flag of such a name, as `num_dropped_tokens`, is no probability.
        if isinstance(value, float) and _RANDOM.search(str(name)):
            values[name] = 0.0
        elif isinstance(value, dict) or (hasattr(value, "to_dict") and hasattr(value, "model_type")):
            zero_dropout(value)


def silence_random_layers(model: nn.Module) -> None:
    """Set the probability of every layer that is random in train mode to 0, whatever its configuration calls it.

    Such a layer is of one of torch's dropout types, or has a float whose name says so, for `F.dropout` in its forward
    pass: `drop_prob` of a stochastic depth, `attention_dropout`, `dropout` of torch's recurrent and attention layers.

    Args:
        model: changed in place.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        # In a layer of this kind every float is its probability, whatever its name.
        if re.search("drop_?path|stochastic_?depth", type(module).__name__, re.IGNORECASE):
            names = [name for name, value in vars(module).items() if isinstance(value, float)]
        else:
            names = [name for name, value in vars(module).items() if isinstance(value, float) and _RANDOM.search(name)]
        for name in names:
            # `keep_prob` and its like are 1 where nothing is dropped.
            setattr(module, name, 1.0 if "keep" in name else 0.0)


def load_failure(error: Exception, key: str, path: str) -> Exception:
    """Return a `UserError` that explains what transformers raised about the files at `path`.

    An error that says so already, and one of memory, are returned as they are.

    Args:
        error: what loading raised.
        key: the configuration key of the path.
        path: a folder or a hub name.
    """
    # These say already what is wrong.
    if isinstance(error, UserError | RankError | torch.OutOfMemoryError):
        return error
    if isinstance(error, RecursionError):
        return UserError(f"{key}: cannot load {path!r}: a JSON file in it is nested too deeply; save the model again")
    # ---- What transformers reports in words of its own: find out what is behind it ----
    if refused := refused_pickle(error):
        return UserError(f"{key}: cannot load {path!r}: {refused}")
    if damaged := damaged_weights(Path(path)):
        return UserError(f"{key}: {damaged} is damaged or cut short; copy or download it again")
    mismatch = re.search(r"^.*(?:size mismatch for|ckpt: torch.Size|MISMATCH).*$", str(error), re.MULTILINE)
    if mismatch or "ignore_mismatched_sizes" in str(error):
        what = f" ({mismatch[0].strip()[:200]})" if mismatch else ""
        return UserError(
            f"{key}: config.json in {path!r} does not fit the weights beside it{what}; take both from one model"
        )
    # Messages of OSError and ValueError are written for users; others need their type to be understood.
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return UserError(f"{key}: cannot load {path!r}: {kind}{_first_line(error)}")


def damaged_weights(folder: Path) -> Path | None:
    """Return the first safetensors file of a folder that cannot be opened; None if all can."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError):
            return file
    return None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
