"""Packed rows: texts one behind the other in a single row without padding, each attending to itself alone.

transformers takes an attention function by name. The one of this file attends within each text: on CUDA in 16 bits by
flash attention over texts of any length (`flash_kernel`), otherwise by one call for each text, which is exact and on a
CPU the cheapest (`benchmarks/packing.py`). All other layers of a language model work token by token: they see one row.

Whether a model can be packed is found by running a few tokens packed and apart. What cannot be (recurrent layers,
attention of a model's own, soft caps, texts longer than a sliding window) runs padded rows.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remax_lightning.models.forward import accepts_argument, eval_mode
from remax_lightning.sharding import is_peft_wrapper, language_model, unwrap_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

NAME = "remax_packed"
"""What transformers knows the attention function by. It makes no mask for a name that has no mask function."""
PROBED_LENGTHS = (5, 3, 4)
TOLERANCE, TOLERANCE_16_BITS = 1e-3, 0.1
"""Share of the spread of the logits by which packed and separate ones may differ in the probe. In half precision the
shape of a batch alone changes the third digit; texts that see each other differ by about the spread."""
MAX_FLASH_HEAD = 256
"""The widest head that flash attention takes."""
CHANGES_LOGITS = ("softcap", "s_aux", "position_bias", "head_mask")
"""Arguments of attention functions that change more than the mask; the probe's logits may be too small to show them."""


class NotPackableError(ValueError):
    """An attention layer needs what packed rows do not have."""


# ---- The attention function ----


class TextBounds(NamedTuple):
    """Where the texts of a packed row begin and end.

    Args:
        lengths: their tokens, `M` numbers above 0.
        ends: `[M + 1]` int32 on the row's device, 0 and the end of each text.
    """

    lengths: list[int]
    ends: Tensor


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
    attend = _flash_attention if takes_flash else attend_text_by_text
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


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: TextBounds,
    scaling: float | None,
    *,
    causal: bool,
    dropout: float,  # noqa: ARG001 - 0 here
) -> Tensor:
    """Return `[1, T, H, d']` of all texts in one kernel."""
    kernel = flash_kernel(query.device, query.dtype)
    query, key, value = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))  # [T, H, d]
    return kernel(query, key, value, bounds, scaling, causal)[None]


# ---- The kernel of flash attention ----

FlashKernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, TextBounds, float | None, bool], Tensor]
"""Attends within texts: from `[T, H, d]` queries, `[T, H', d]` keys and values, bounds, scaling and whether it is
causal, to `[T, H, d]`."""
HUB_KERNEL = "kernels-community/flash-attn2"
"""The kernel that the package `kernels` loads; only from its cache, so that no run downloads code unasked."""


@lru_cache(maxsize=8)
def flash_kernel(device: torch.device, dtype: torch.dtype) -> FlashKernel:
    """Return the kernel for packed rows: of flash-attn or `kernels` where one is installed and right, else torch's.

    The first call tries it on random numbers; the log says which one it is, and what is wrong with the others.
    """
    for name, load in _INSTALLED.items():
        try:
            kernel = partial(_by_package, load())
        except ImportError:
            continue
        except Exception as error:  # a package that was built for another torch or device may raise anything
            log.info("packed rows do not attend by %s: it cannot be loaded (%s: %s)", name, type(error).__name__, error)
            continue
        if reason := _kernel_fault(kernel, device, dtype):
            log.info("packed rows do not attend by %s: %s", name, reason)
            continue
        log.info("packed rows attend by %s", name)
        return kernel
    return _by_torch


def _flash_attn_3() -> Any:
    return import_module("flash_attn_interface").flash_attn_varlen_func


def _flash_attn_2() -> Any:
    return import_module("flash_attn").flash_attn_varlen_func


def _hub_kernel() -> Any:
    kernels, constants = import_module("kernels"), import_module("huggingface_hub.constants")
    if not any(Path(constants.HF_HUB_CACHE).glob(f"*--{HUB_KERNEL.replace('/', '--')}")):
        raise ImportError(f"{HUB_KERNEL} is not in the cache")
    return kernels.get_kernel(HUB_KERNEL).flash_attn_varlen_func


_INSTALLED: dict[str, Callable[[], Any]] = {
    "flash-attn 3": _flash_attn_3,
    "flash-attn": _flash_attn_2,
    "kernels": _hub_kernel,
}


def _by_package(
    function: Any, query: Tensor, key: Tensor, value: Tensor, bounds: TextBounds, scaling: float | None, causal: bool
) -> Tensor:
    longest = max(bounds.lengths)
    ends = bounds.ends
    output = function(query, key, value, ends, ends, longest, longest, softmax_scale=scaling, causal=causal)
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)  # some also return the log of the sum


def _by_torch(
    query: Tensor, key: Tensor, value: Tensor, bounds: TextBounds, scaling: float | None, causal: bool
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if _takes_groups(varlen_attn):
            options["enable_gqa"] = True
        else:  # torch 2.11: every head of the query gets keys and values of its own
            key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    longest = max(bounds.lengths)
    output = varlen_attn(
        query,
        key,
        value,
        bounds.ends,
        bounds.ends,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0) if causal else (-1, -1),
        **options,
    )
    return cast(Tensor, output)


@torch.no_grad()
def _kernel_fault(kernel: FlashKernel, device: torch.device, dtype: torch.dtype) -> str:
    """Return what is wrong with a kernel on random numbers: two texts, four heads of queries and two of keys."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(9, heads, 64, generator=generator) for heads in (4, 2, 2))
    query, key, value = (tensor.to(dtype).to(device) for tensor in (query, key, value))
    bounds = TextBounds([5, 4], torch.tensor([0, 5, 9], dtype=torch.int32).to(device))
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    expected = attend_text_by_text(q, k, v, bounds, 0.1, causal=True, dropout=0.0)[0].float()
    try:
        gap = float((kernel(query, key, value, bounds, 0.1, True).float() - expected).abs().max())
    except Exception as error:
        return f"it fails ({type(error).__name__}: {error})"
    return "" if gap < TOLERANCE_16_BITS else f"it computes something else (by {gap:.2g})"


@cache
def _takes_groups(attend: Callable[..., Any]) -> bool:
    return "enable_gqa" in inspect.signature(attend).parameters


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


def _find_obstacle(model: PreTrainedModel, token_outputs: Callable[[PreTrainedModel, dict[str, Any]], Tensor]) -> str:
    core = unwrap_peft(model)
    if reason := attention_obstacle(model):
        return reason
    try:
        gap, spread, layers = _probe(model, token_outputs)
    except Exception as error:  # a model's own code may raise anything at rows that it does not know
        return f"a packed pass fails ({type(error).__name__}: {error})"
    # A layer that mixes tokens otherwise, as a convolution or a recurrent state does; it may do little in the probe.
    if layers < getattr(core.config.get_text_config(), "num_hidden_layers", 1):
        return f"only {layers} of its layers have attention that can be replaced"
    # Written so that NaN is an obstacle, too.
    if not gap <= (TOLERANCE if core.dtype == torch.float32 else TOLERANCE_16_BITS) * spread:
        return f"packed texts would see each other (outputs differ by {gap:.2g})"
    return ""


@torch.no_grad()
def _probe(
    model: PreTrainedModel, token_outputs: Callable[[PreTrainedModel, dict[str, Any]], Tensor]
) -> tuple[float, float, int]:
    """Return how far the outputs of packed and of separate texts differ, their spread, and the layers that packed."""
    size = unwrap_peft(model).config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, size, (1, sum(PROBED_LENGTHS)), generator=generator)
    ids = ids.to(next(cast("nn.Module", model).parameters()).device)  # [1, T]
    with eval_mode(model):
        separate = [token_outputs(model, {"input_ids": text}) for text in ids.split(PROBED_LENGTHS, dim=1)]
        with PackedAttention(model, PROBED_LENGTHS) as attention:
            packed = token_outputs(model, packed_inputs(PROBED_LENGTHS, ids)).float()
    expected = torch.cat(separate).float()  # [T, C]
    return float((packed - expected).abs().max()), float(expected.std()), attention.calls


_IMPLEMENTATION = "_attn_implementation_internal"
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")
"""Keys of configurations for the tokens that a layer sees: Mistral, Llama 4, GPT-Neo and others."""
_configs: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()
_findings: WeakKeyDictionary[Any, Packability] = WeakKeyDictionary()
_said_windows: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
