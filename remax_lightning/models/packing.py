"""Packed rows: texts one behind the other in a single row without padding, each attending to itself alone.

transformers takes an attention function by name. The one of this file attends within each text: on CUDA in 16 bits by
one kernel for texts of any length (`flash_attention.py`), otherwise by one call for each text, which is exact and on a
CPU the cheapest (`benchmarks/packing.py`). All other layers of a language model work token by token: they see one row.

Whether a model can be packed is found by running a few tokens packed and apart. What cannot be (recurrent layers,
attention of a model's own, soft caps, texts longer than a sliding window) runs padded rows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remax_lightning.models.flash_attention import MAX_FLASH_HEAD, TextBounds, flash_attention
from remax_lightning.models.forward import accepts_argument, eval_mode, output_gap, run_probe
from remax_lightning.sharding import is_peft_wrapper, language_model, unwrap_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

NAME = "remax_packed"
"""What transformers knows the attention function by. It makes no mask for a name that has no mask function."""
PROBED_LENGTHS = (5, 3, 4)
CHANGES_LOGITS = ("softcap", "s_aux", "position_bias", "head_mask")
"""Arguments of attention functions that change more than the mask; the probe's logits may be too small to show them."""


class NotPackableError(ValueError):
    """An attention layer needs what packed rows do not have."""


# ---- The attention function ----


class PackedAttention:
    """Lets the attention layers of a model keep the texts of a packed row apart inside; may be entered again.

    Args:
        model: one whose `packing_obstacle` is empty.
        lengths: tokens of the texts, `M` numbers above 0.
    """

    def __init__(self, model: PreTrainedModel, lengths: Sequence[int]) -> None:
        device = next(cast("nn.Module", model).parameters()).device
        ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)  # [M + 1]
        self.configs, self.bounds = attention_configs(model), TextBounds(list(lengths), ends)
        self.calls = 0
        """How many attention layers have asked for the bounds."""
        self._switches: list[AbstractContextManager[None]] = []

    def __enter__(self) -> Self:
        self._switches.append(attention_by_name(self.configs, NAME, packed_attention))
        self._switches[-1].__enter__()
        _active.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _active.pop()
        self._switches.pop().__exit__(*error)


_active: list[PackedAttention] = []
"""The pass that runs now, last. No context variable: on CUDA a backward pass recomputes in another thread."""


def recompute_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return contexts for a layer and for its recomputation in the backward pass, which is packed if the layer was.

    Gradient checkpointing takes this function as `context_fn`.
    """
    return nullcontext(), _active[-1] if _active else nullcontext()


@contextmanager
def attention_by_name(configs: Sequence[Any], name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let layers call an attention function inside.

    Args:
        configs: of the layers, see `attention_configs`.
        name: what transformers knows the function by.
        function: see transformers' `AttentionInterface`.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(name, function)  # a second time changes nothing
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """Return the configurations in which the layers of a model read the name of their attention function."""
    if model not in _configs:
        configs = [getattr(module, "config", None) for module in unwrap_peft(model).modules()]
        _configs[model] = [*{id(config): config for config in configs if hasattr(config, _IMPLEMENTATION)}.values()]
    return _configs[model]


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
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    # torch's flash attention over texts of any length: CUDA, 16 bits, heads that it takes, no dropout
    is_16_bit = query.dtype in (torch.float16, torch.bfloat16)
    same_width = query.shape[-1] == value.shape[-1] <= MAX_FLASH_HEAD
    takes_flash = query.device.type == "cuda" and is_16_bit and same_width and dropout == 0
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


# ---- A pass over a packed row ----


def packed_inputs(lengths: Sequence[int], input_ids: Tensor) -> dict[str, Any]:
    """Return the arguments of a forward pass over a packed row `[1, T]`: positions restart at 0 with each text."""
    sizes = torch.tensor(lengths, device=input_ids.device)  # [M]
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes, output_size=input_ids.shape[1])  # [T]
    positions = torch.arange(input_ids.shape[1], device=input_ids.device) - starts  # [T]
    return {"input_ids": input_ids, "position_ids": positions[None]}


# ---- Which models can be packed ----


class Packability(NamedTuple):
    """Whether a model can be packed.

    Args:
        obstacle: why not; empty if it can.
        window: tokens that every attention layer sees at least; infinite where all see the whole text.
    """

    obstacle: str
    window: float


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

    The first call runs a few tokens, on all ranks where the model is sharded; its result is logged once.

    Args:
        model: a language model, or another one with `token_outputs`.
        longest: tokens of the longest text.
        token_outputs: from a model and the arguments of a pass over one row to what it returns of each token, `[T, C]`.
    """
    if model not in _findings:
        reason = _find_obstacle(model, token_outputs)
        rows = f"padded rows, because {reason}" if reason else "packed rows, without padding"
        log.info("%s: passes over whole texts run %s", type(unwrap_peft(model)).__name__, rows)
        window = smallest_window(model)
        _findings[model] = Packability(reason, math.inf if window is None else window)
    obstacle, limit = _findings[model]
    if obstacle or longest <= limit:
        return obstacle
    # ---- Longer than what every layer sees ----
    if model not in _said_windows:
        _said_windows[model] = limit
        log.info(
            "%s: passes over texts of more than %d tokens, its attention window, run padded rows",
            type(unwrap_peft(model)).__name__,
            limit,
        )
    return f"a text is longer than its attention window of {limit} tokens"


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
            with PackedAttention(model, PROBED_LENGTHS) as attention:
                packed = token_outputs(model, packed_inputs(PROBED_LENGTHS, ids))
        # A layer that mixes tokens otherwise, as a convolution or a recurrent state does; it may do little here.
        if attention.calls < getattr(config, "num_hidden_layers", 1):
            return f"only {attention.calls} of its layers have attention that can be replaced"
        gap = output_gap(packed, torch.cat(separate))  # of [T, C]
        return f"packed texts would see each other ({gap})" if gap else ""

    return run_probe(probe, "a packed pass fails ({})".format)


_IMPLEMENTATION = "_attn_implementation_internal"
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")
"""Keys of configurations for the tokens that a layer sees: Mistral, Llama 4, GPT-Neo and others."""
_configs: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()
_findings: WeakKeyDictionary[Any, Packability] = WeakKeyDictionary()
_said_windows: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
