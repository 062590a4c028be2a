"""Loading a causal language model, as policy or as frozen reference."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from remax_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainedModel:
    """Where a language model comes from and how it is loaded.

    Args:
        path: a folder or a hub name.
        dtype: type of the weights; None follows `trainer.precision` (bfloat16 under bf16-true, otherwise float32).
        gradient_checkpointing: recompute activations in the backward pass; about a third slower, far less memory.
        disable_dropout: set every dropout of the model to 0. With dropout the training pass would not see the
            distribution that was sampled from, and the KL to the reference would start above 0.
        from_scratch: random weights from the configuration at `path`; for a first supervised stage on a new model.
        attn_implementation: attention kernel by transformers' name (`sdpa`, `eager`, `flash_attention_2`); None lets
            transformers choose.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model. Off, because that code can do anything.
        allow_pickle: also take weights in `.bin` files, read by `torch.load(weights_only=True)`; otherwise safetensors
            only.
    """

    path: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    gradient_checkpointing: bool = False
    disable_dropout: bool = True
    from_scratch: bool = False
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def load(self, key: str) -> PreTrainedModel:
        """Load the model.

        Args:
            key: the configuration key of this source, for messages (`model.policy`).

        Raises:
            UserError: if there is no such model, or its weights are not in a permitted format.
        """
        from transformers import AutoModelForCausalLM

        config = self._config(key)
        dtype = torch.get_default_dtype() if self.dtype is None else getattr(torch, self.dtype)
        common: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.attn_implementation is not None:
            common["attn_implementation"] = self.attn_implementation
        try:
            if self.from_scratch:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, **common)
            else:
                model = AutoModelForCausalLM.from_pretrained(
                    self.path,
                    config=config,
                    dtype=dtype,
                    revision=self.revision,
                    use_safetensors=None if self.allow_pickle else True,
                    **common,
                )
        except (OSError, ValueError) as error:
            raise UserError(f"{key}.path: cannot load {self.path!r}: {_first_line(error)}") from error
        if self.gradient_checkpointing:
            # Renamed in 5.23; the old name goes in 6.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        return cast("PreTrainedModel", model)

    def empty(self, key: str, dtype: torch.dtype) -> PreTrainedModel:
        """Return the model without weights: its class, configuration and generation settings, on the meta device.

        Args:
            key: the configuration key of this source, for messages.
            dtype: of the weights that it would have.

        Raises:
            UserError: if there is no such model.
        """
        from transformers import AutoModelForCausalLM, GenerationConfig

        config = self._config(key)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError) as error:
            raise UserError(f"{key}.path: cannot make a model of {self.path!r}: {_first_line(error)}") from error
        with suppress(OSError):  # it has no settings of its own
            model.generation_config = GenerationConfig.from_pretrained(self.path, revision=self.revision or "main")
        return cast("PreTrainedModel", model)

    def _config(self, key: str) -> Any:
        from transformers import AutoConfig

        if looks_local(self.path) and not Path(self.path).is_dir():
            raise UserError(f"{key}.path: there is no folder {self.path!r}; give a folder or a hub name")
        try:
            config = AutoConfig.from_pretrained(
                self.path, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{key}.path: cannot load {self.path!r}: {_first_line(error)}") from error
        if self.disable_dropout:
            _zero_dropout(config)
        return config


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Put `model` in eval mode for good and let no gradient into it."""
    model.requires_grad_(False)
    model.eval()
    return model


def looks_local(path: str) -> bool:
    """Whether `path` can only mean a folder on this machine: hub names are `name` or `owner/name`."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).exists()


def _zero_dropout(config: Any) -> None:
    """Set every dropout probability of a configuration to 0; families call them `dropout`, `attn_pdrop` and so on."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and (name.endswith("pdrop") or "dropout" in name):
            setattr(config, name, 0.0)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
