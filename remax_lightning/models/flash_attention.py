"""Flash attention within the texts of a packed row, on CUDA in 16 bits: the kernel of an installed package, or torch's.

A package's kernel is tried on random numbers first, and the log says which one is taken.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import cache, lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from remax_lightning.models.forward import output_gap, run_probe

log = logging.getLogger(__name__)

MAX_FLASH_HEAD = 256
"""The widest head that flash attention takes."""


class TextBounds(NamedTuple):
    """Where the texts of a packed row begin and end.

    Args:
        lengths: their tokens, `M` numbers above 0.
        ends: `[M + 1]` int32 on the row's device, 0 and the end of each text.
    """

    lengths: list[int]
    ends: Tensor


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: TextBounds,
    scaling: float | None,
    *,
    causal: bool,
    dropout: float,  # noqa: ARG001 - 0 here
) -> Tensor:
    """Return `[1, T, H, d']` of all texts in one kernel; arguments as of `attend_text_by_text`."""
    kernel = flash_kernel(query.device, query.dtype)
    query, key, value = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))  # [T, H, d]
    return kernel(query, key, value, bounds, scaling, causal)[None]


# ---- The kernel ----

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
    lengths = [5, 4]
    bounds = TextBounds(lengths, torch.tensor([0, 5, 9], dtype=torch.int32).to(device))
    # Each text alone, by torch's attention: [tokens, 4, 64]
    texts = zip(*(tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query, key, value)), strict=True)
    attend = partial(F.scaled_dot_product_attention, is_causal=True, scale=0.1, enable_gqa=True)
    expected = torch.cat([attend(q[None], k[None], v[None])[0].transpose(0, 1) for q, k, v in texts])

    def probe() -> str:
        gap = output_gap(kernel(query, key, value, bounds, 0.1, True), expected)
        return f"it computes something else ({gap})" if gap else ""

    return run_probe(probe, "it fails ({})".format)


@cache
def _takes_groups(attend: Callable[..., Any]) -> bool:
    return "enable_gqa" in inspect.signature(attend).parameters
