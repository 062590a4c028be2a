"""Packed rows: texts one behind the other in a single row without padding, each attending to itself alone.

transformers takes an attention function by name. The one of this file attends within each text: on CUDA in 16 bits by
one kernel for texts of any length (`flash_attention.py`), otherwise by one call for each text, which is exact and on a
CPU the cheapest (`benchmarks/packing.py`). All other layers of a language model work token by token: they see one row.

Whether a model can be packed is found by running a few tokens packed and apart. What cannot be (recurrent layers,
attention of a model's own, soft caps, texts longer than a sliding window) runs padded rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remax_lightning.models.flash_attention import MAX_FLASH_HEAD, TextBounds, flash_attention
from remax_lightning.models.forward import accepts_argument, eval_mode, output_gap, run_probe
from remax_lightning.sharding import is_peft_wrapper, language_model, unwrap_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
T = TypeVar("T")

NAME = "remax_packed"
"""What transformers knows the attention function by. It makes no mask for a name that has no mask function."""
PROBED_LENGTHS = (5, 3, 4)
CHANGES_LOGITS = ("softcap", "s_aux", "position_bias", "head_mask")
"""Arguments of attention functions that change more than the mask; the probe's logits may be too small to show them."""


class NotPackableError(ValueError):
    """An attention layer needs what packed rows do not have."""


# ---- The attention function ----


@dataclass
class PackedTexts:
    """A pass over a packed row.

    Args:
        model: whose layers keep the texts apart.
        bounds: of the texts.
        inputs: arguments of the forward pass.
        calls: how many attention layers have asked for the bounds.
    """

    model: PreTrainedModel
    bounds: TextBounds
    inputs: dict[str, Any]
    calls: int = 0


_active: list[PackedTexts] = []
"""The pass that runs now, last. No context variable: on CUDA a backward pass recomputes in another thread."""


@contextmanager
def packed_texts(model: PreTrainedModel, lengths: Sequence[int], input_ids: Tensor) -> Iterator[PackedTexts]:
    """Let the attention layers of a model keep the texts of a packed row apart inside.

    Args:
        model: one whose `packing_obstacle` is empty.
        lengths: tokens of the texts, `M` numbers above 0.
        input_ids: `[1, T]` the texts, one behind the other.
    """
    sizes = torch.tensor(lengths, device=input_ids.device)  # [M]
    ends = sizes.cumsum(0)
    # ---- Positions restart at 0 with each text ----
    starts = (ends - sizes).repeat_interleave(sizes, output_size=input_ids.shape[1])  # [T]
    positions = torch.arange(input_ids.shape[1], device=input_ids.device) - starts  # [T]
    inputs = {"input_ids": input_ids, "position_ids": positions[None]}
    bounds = TextBounds(list(lengths), F.pad(ends, (1, 0)).int())  # [M + 1]
    texts = PackedTexts(model, bounds, inputs)
    with attention_by_name(model, NAME, packed_attention, _active, texts):
        yield texts


class _Recomputation:
    """Runs the recomputation of a layer in the backward pass as the layer was run; may be entered again."""

    def __init__(self, texts: PackedTexts) -> None:
        self.texts, self.open = texts, list[AbstractContextManager[None]]()

    def __enter__(self) -> None:
        self.open.append(attention_by_name(self.texts.model, NAME, packed_attention, _active, self.texts))
        self.open[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self.open.pop().__exit__(*error)


def recompute_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return contexts for a layer and for its recomputation in the backward pass, which is packed if the layer was.

    Gradient checkpointing takes this function as `context_fn`.
    """
    return nullcontext(), _Recomputation(_active[-1]) if _active else nullcontext()


@contextmanager
def attention_by_name(
    model: PreTrainedModel, name: str, function: Callable[..., Any], running: list[T], state: T
) -> Iterator[None]:
    """Let the attention layers of a model call a function inside.

    Args:
        model: of transformers, or a wrapper of PEFT around one.
        name: what transformers knows the function by.
        function: see transformers' `AttentionInterface`.
        running: where the function finds its state: last, as long as the context lasts.
        state: what the function needs to know of this pass.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(name, function)  # a second time changes nothing
    if model not in _configs:  # in which layers read the name of their attention function
        configs = [getattr(module, "config", None) for module in unwrap_peft(model).modules()]
        _configs[model] = [*{id(config): config for config in configs if hasattr(config, _IMPLEMENTATION)}.values()]
    before = [config._attn_implementation_internal for config in _configs[model]]
    for config in _configs[model]:
        config._attn_implementation_internal = name
    running.append(state)
    try:
        yield
    finally:
        running.pop()
        for config, implementation in zip(_configs[model], before, strict=True):
            config._attn_implementation_internal = implementation


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within each text of a packed row; an attention function of transformers.

    Args:
        module: the attention layer.
        query: `[1, H, T, d]`.
        key: `[1, H', T, d]`; each of its heads serves `H / H'` of the query.
        value: `[1, H', T, d']`.
        attention_mask: None; the bounds of the texts say all.
        dropout: probability.
        scaling: of the products; None for `1 / sqrt(d)`.
        is_causal: None for what the layer says of itself.
        **options: what the layer gives beside.

    Returns:
        `[1, T, H, d']`, and no attention weights.

    Raises:
        NotPackableError: if the layer has a mask of its own, a cache, or changes its logits.
    """
    changes = [name for name in CHANGES_LOGITS if options.get(name) is not None]
    if not _active or attention_mask is not None or changes or len(query) > 1 or key.shape[2] != query.shape[2]:
        raise NotPackableError(f"{type(module).__name__} needs {', '.join(changes) or 'a mask or a cache of its own'}")
    bounds = _active[-1].bounds
    _active[-1].calls += 1
    device = query.device.type
    if (dtype := _autocast_dtype(device)) is not None:
        # As torch's own attention does: rotary embeddings leave queries and keys in the float32 of the weights.
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    # torch's flash attention over texts of any length: CUDA, 16 bits, heads that it takes, no dropout
    is_16_bit = query.dtype in (torch.float16, torch.bfloat16)
    same_width = query.shape[-1] == value.shape[-1] <= MAX_FLASH_HEAD
    takes_flash = device == "cuda" and is_16_bit and same_width and dropout == 0
    attend = flash_attention if takes_flash else attend_text_by_text
    return attend(query, key, value, bounds, scaling, causal=causal, dropout=dropout), None


def attend_text_by_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: TextBounds,
    scaling: float | None,
    *,
    causal: bool,
    dropout: float,
) -> Tensor:
    """Return `[1, T, H, d']`, by one call for each text: on any device and in any dtype."""
    # `split` and not slices: its backward pass joins the gradients once, in place of adding up whole rows of zeros.
    texts = zip(*(tensor.split(bounds.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    grouped = query.shape[1] != key.shape[1]
    outputs = [
        F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=causal and q.shape[2] > 1, scale=scaling, enable_gqa=grouped
        ).transpose(1, 2)  # [1, tokens, H, d']
        for q, k, v in texts
    ]
    return torch.cat(outputs, dim=1)


# ---- Which models can be packed ----


def token_logits(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Return `[T, V]` logits of all tokens of a row, asked for by their places as in passes, if the model can."""
    if accepts_argument(model, "logits_to_keep"):
        inputs = inputs | {"logits_to_keep": torch.arange(inputs["input_ids"].shape[1], device=model.device)}
    return cast(Tensor, model(**inputs, use_cache=False).logits)[0]


def packing_obstacle(
    model: PreTrainedModel,
    longest: int = 0,
    token_outputs: Callable[[PreTrainedModel, dict[str, Any]], Tensor] = token_logits,
) -> str:
    """Return why passes of a model have to run padded rows; empty where they run packed ones.

    The first call in each precision runs a few tokens, on all ranks where the model is sharded. What it finds is logged
    once.

    Args:
        model: a language model, or another one with `token_outputs`.
        longest: tokens of the longest text.
        token_outputs: from a model and the arguments of a pass over one row to what it returns of each token, `[T, C]`.
    """
    # ---- Autocast has kernels of its own, which a device may lack: flash attention asks for Ampere or newer ----
    obstacles = _obstacles.setdefault(model, {})
    precision = _autocast_dtype(next(cast("nn.Module", model).parameters()).device.type)
    if precision not in obstacles:
        reason = _find_obstacle(model, token_outputs)
        if reason not in obstacles.values():
            rows = f"padded rows, because {reason}" if reason else "packed rows, without padding"
            log.info("%s: passes over whole texts run %s", type(unwrap_peft(model)).__name__, rows)
        obstacles[precision] = reason
    window = smallest_window(model)
    if obstacles[precision] or window is None or longest <= window:
        return obstacles[precision]
    # ---- Longer than what every layer sees ----
    if model not in _said_windows:
        _said_windows.add(model)
        log.info(
            "%s: passes over texts of more than %d tokens, its attention window, run padded rows",
            type(unwrap_peft(model)).__name__,
            window,
        )
    return f"a text is longer than its attention window of {window} tokens"


def _autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype of autocast on a type of device; None outside of it, and where there is none, as on `meta`."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def smallest_window(model: PreTrainedModel) -> int | None:
    """Return the tokens that every attention layer sees at least; None where all see the whole text."""
    config = model.config.get_text_config()
    sizes = [getattr(config, name, None) for name in _WINDOWS]
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)


def attention_obstacle(model: PreTrainedModel) -> str:
    """Return why the attention of a model cannot be replaced, as far as that is visible without running it."""
    if is_peft_wrapper(cast("nn.Module", model)) and language_model(model) is model:
        return "its adapter writes tokens of its own in front of each row"
    if not accepts_argument(model, "position_ids"):
        return "it takes no positions"
    implementation = getattr(unwrap_peft(model).config, "_attn_implementation", None)
    return "" if implementation == "sdpa" else f"its attention is {implementation} and not sdpa"


@torch.no_grad()
def _find_obstacle(model: PreTrainedModel, token_outputs: Callable[[PreTrainedModel, dict[str, Any]], Tensor]) -> str:
    """Run a few texts packed and apart, and compare what the model returns of their tokens."""
    core = unwrap_peft(model)
    if reason := attention_obstacle(model):
        return reason
    generator = torch.Generator().manual_seed(0)
    config = core.config.get_text_config()
    ids = torch.randint(0, config.vocab_size, (1, sum(PROBED_LENGTHS)), generator=generator)
    ids = ids.to(next(cast("nn.Module", model).parameters()).device)  # [1, T]

    def probe() -> str:
        with eval_mode(model):
            separate = [token_outputs(model, {"input_ids": text}) for text in ids.split(PROBED_LENGTHS, dim=1)]
            with packed_texts(model, PROBED_LENGTHS, ids) as texts:
                packed = token_outputs(model, texts.inputs)
        # A layer that mixes tokens otherwise, as a convolution or a recurrent state does; it may do little here.
        if texts.calls < getattr(config, "num_hidden_layers", 1):
            return f"only {texts.calls} of its layers have attention that can be replaced"
        gap = output_gap(packed, torch.cat(separate))  # of [T, C]
        return f"packed texts would see each other ({gap})" if gap else ""

    return run_probe(probe, "a packed pass fails ({})".format)


_IMPLEMENTATION = "_attn_implementation_internal"
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")
"""Keys of configurations for the tokens that a layer sees: Mistral, Llama 4, GPT-Neo and others."""
_configs: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()
_obstacles: WeakKeyDictionary[Any, dict[torch.dtype | None, str]] = WeakKeyDictionary()
"""By model: by the dtype of autocast, None without it, what keeps it from being packed."""
_said_windows: WeakSet[Any] = WeakSet()
