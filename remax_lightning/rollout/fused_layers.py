"""Norms, rotary embeddings and gates of a decoding step in fewer operators than transformers', which compute the same.

On a CPU, linear layers of few rows are multiplied the other way around.

On a GPU each operator reads and writes what the one before has written; on a CPU it takes some microseconds of Python
and dispatch. What is replaced is compared with the family's own on random numbers first, and left alone where they
differ.
"""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from remax_lightning.models.forward import run_probe

log = logging.getLogger(__name__)

ROTARY = "apply_rotary_pos_emb"
"""What families call the function that rotates queries and keys by their positions."""


# ---- Norms ----


@contextmanager
def fused_norms(model: nn.Module, checked: dict[Hashable, bool]) -> Iterator[int]:
    """Run the RMS norms of the model in fewer operators inside, where transformers has eight.

    On CUDA that is one kernel. In 16 bits the result is rounded once and not twice, in float32 it is the same.
    Families write their norms in many ways, some with 1 + weight; so one norm of each kind is compared with torch's on
    random numbers first, and left alone where they differ.

    Args:
        model: with the weights of a rollout.
        checked: what earlier calls have found, by kind of norm; the host waits for the device at a new one.

    Yields:
        The number of norms that are fused.
    """
    fused: list[Any] = []
    norms: list[Any] = list(model.modules())
    for norm in norms:
        epsilon = _rms_norm_epsilon(norm)
        if epsilon is None:
            continue
        kind = type(norm), norm.weight.shape, norm.weight.dtype, norm.weight.device, epsilon
        if kind not in checked:
            checked[kind] = _is_fusible(norm, epsilon)
        if checked[kind]:
            # An attribute of the instance hides the method of its class, until it is deleted below.
            norm.forward = partial(_fused_rms_norm, norm, epsilon, norm.forward)
            fused.append(norm)
    try:
        yield len(fused)
    finally:
        for norm in fused:
            del norm.forward


def _rms_norm_epsilon(module: nn.Module) -> float | None:
    """Return the epsilon of an RMS norm with a weight of its own; None for other modules."""
    weight = getattr(module, "weight", None)
    is_norm = (
        type(module).__name__.endswith("RMSNorm")
        and type(weight) is nn.Parameter  # the shard of a weight is no plain parameter, or an empty one
        and weight.dim() == 1
        and weight.numel() > 0
        and len(list(module.parameters())) == 1
        and "forward" not in vars(module)
    )
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return epsilon if is_norm and isinstance(epsilon, float) else None


def _fused_rms_norm(norm: Any, epsilon: float, plain: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    # Under autocast, inputs and weights may differ; the result then has a dtype of the family's choice.
    if inputs.dtype != norm.weight.dtype:
        return plain(inputs)
    if inputs.device.type != "cpu" or inputs.dtype != torch.float32:
        return nn.functional.rms_norm(inputs, norm.weight.shape, norm.weight, epsilon)
    # On a CPU torch's is no kernel, but these operators and more around them: twice the time for few rows, which is 3 %
    # of a rollout of a model of 256 features. Every bit is the same.
    scale = (inputs * inputs).sum(-1, keepdim=True).div_(inputs.shape[-1]).add_(epsilon).rsqrt_()  # [..., 1]
    return (inputs * scale).mul_(norm.weight)


def _is_fusible(norm: Any, epsilon: float) -> bool:
    """Whether torch's RMS norm computes what the layer does, on random numbers."""
    weight = norm.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    inputs = torch.randn(4, weight.numel(), generator=generator, device=weight.device).to(weight.dtype)
    expected, got = norm(inputs), _fused_rms_norm(norm, epsilon, norm.forward, inputs)
    if expected.dtype != got.dtype:
        return False
    tolerance = 4 * torch.finfo(weight.dtype).eps  # of two roundings
    return bool(((got - expected).abs() <= tolerance * expected.abs() + tolerance * expected.abs().mean()).all())


# ---- Linear layers on a CPU ----

CPUINFO = Path("/proc/cpuinfo")
"""Where Linux says whose the processor is; elsewhere Python knows it on Windows alone."""
FEW_ROWS, FEW_TO_WIDER = 4, 8
"""Rows up to which `(W x^T)^T` beats `x W^T` on AMD's processors, in layers of fewer outputs than inputs and in others:
0.25 to 0.9 of its time with MKL, AVX2 or AVX-512, one thread or two."""
ROW_BLOCK, MOST_ROWS = 16, 64
"""With several threads it is also quicker at multiples of `ROW_BLOCK` up to `MOST_ROWS`, by up to 20 %; at the numbers
between it is slower."""
FEWEST_FEATURES, MOST_ROWS_OF_INTEL, MOST_WIDENING = 512, 48, 16
"""On Intel's, MKL has kernels of its own for few rows and for narrow layers: the other order takes up to 8.3 times as
long for 2 to 8 rows. It is quicker at multiples of `ROW_BLOCK` up to `MOST_ROWS_OF_INTEL` in layers of at least
`FEWEST_FEATURES` inputs and outputs and at most `MOST_WIDENING` times as many outputs as inputs: 0.58 to
1.01 of the time, 0.81 in the middle (`benchmarks/products.py`). With fewer outputs, as keys and values of grouped heads
have, it took up to 1.36 times as long on two threads."""


@contextmanager
def transposed_products(model: nn.Module) -> Iterator[int]:
    """Multiply few rows by the weights as `(W x^T)^T` inside, where the processor does this order quicker.

    The products are the same up to rounding. See `is_quicker_transposed`.

    Args:
        model: with the weights of a rollout, in float32.

    Yields:
        The number of linear layers.
    """
    layers: list[Any] = [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter  # a shard is no plain parameter, or an empty one
        and layer.weight.numel() > 0
        and layer.weight.device.type == "cpu"
        and "forward" not in vars(layer)
    ]
    for layer in layers:
        # An attribute of the instance hides the method of its class, until it is deleted below.
        layer.forward = partial(_quicker_product, layer, layer.forward)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward


@cache
def multiplies_as_intel() -> bool:
    """Whether this is a processor of Intel's, as far as the system tells."""
    with suppress(OSError):
        return "GenuineIntel" in CPUINFO.read_text(encoding="utf-8", errors="replace")
    return "GenuineIntel" in platform.processor()


def is_quicker_transposed(rows: int, layer: nn.Linear) -> bool:
    """Whether `rows` are multiplied the other way around: by shapes and machine, not a clock, so that a run repeats."""
    is_in_blocks = rows % ROW_BLOCK == 0
    if multiplies_as_intel():
        is_wide = min(layer.in_features, layer.out_features) >= FEWEST_FEATURES
        is_wide = is_wide and layer.out_features <= MOST_WIDENING * layer.in_features
        return is_in_blocks and rows <= MOST_ROWS_OF_INTEL and is_wide
    few = FEW_ROWS if layer.out_features < layer.in_features else FEW_TO_WIDER
    return 1 < rows <= few or (is_in_blocks and rows <= MOST_ROWS and torch.get_num_threads() > 1)


def transposed_product(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """Return what the layer computes of `[..., in]` inputs, as `(W x^T)^T`."""
    columns = inputs.reshape(-1, layer.in_features).t()  # [in, M]
    if layer.bias is None:
        product = layer.weight @ columns  # [out, M]
    else:
        product = torch.addmm(layer.bias.unsqueeze(1), layer.weight, columns)
    # In the usual order again, since families reshape what they get.
    return product.t().contiguous().view(*inputs.shape[:-1], -1)


def _quicker_product(layer: nn.Linear, plain: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    rows = inputs.numel() // layer.in_features
    return transposed_product(layer, inputs) if is_quicker_transposed(rows, layer) else plain(inputs)


# ---- Rotary embeddings ----


@contextmanager
def fused_rotary(model: nn.Module, checked: dict[Hashable, bool]) -> Iterator[int]:
    """Rotate queries and keys of a decoded token together inside: in four operators, where transformers has ten.

    Under autocast there is a fifth: queries and keys have its dtype, and angles that of the weights, as the result has.
    Without it, liger-kernel does all in one on CUDA, where it is installed. A family's attention calls a function of
    its module, so that is replaced, for all models of the family; prefill and training passes, which have more than
    one token, still get the family's own.

    Args:
        model: with the weights of a rollout.
        checked: what earlier calls have found, by function.

    Yields:
        The number of functions that are replaced.
    """
    names = dict.fromkeys(type(module).__module__ for module in model.modules())
    modules = [sys.modules[name] for name in names if hasattr(sys.modules.get(name), ROTARY)]
    weight = next(model.parameters(), torch.empty(0))
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    liger = _liger(weight, "transformers.rope", "liger_rotary_pos_emb") if dtype == weight.dtype else None
    kernels = [None] if liger is None else [liger, None]
    replaced: list[tuple[ModuleType, Callable[..., Any]]] = []
    for module in modules:
        plain = getattr(module, ROTARY)
        for fused in (_FusedRotary(plain, kernel) for kernel in kernels):
            kind = plain, fused.kernel, weight.dtype, dtype
            if kind not in checked:
                checked[kind] = _rotates_by_halves(fused, weight, dtype)
            if checked[kind]:
                setattr(module, ROTARY, fused)
                replaced.append((module, plain))
                break
    try:
        yield len(replaced)
    finally:
        for module, plain in replaced:
            setattr(module, ROTARY, plain)


class _FusedRotary:
    """Rotates `[M, H, 1, d]` queries and `[M, H', 1, d]` keys by `[M, 1, d]` cosines and sines.

    Args:
        plain: the function of the family, for everything else.
        kernel: liger-kernel's; None for operators of torch.
    """

    def __init__(self, plain: Callable[..., Any], kernel: Callable[..., Any] | None) -> None:
        self.plain, self.kernel = plain, kernel
        self._of_step: tuple[Tensor | None, Tensor | None] = None, None

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **options: Any) -> Any:
        is_one_token = q.dim() == k.dim() == 4 and q.shape[2] == k.shape[2] == 1
        # A product of two dtypes has the wider one: that of the angles, or the family's own has to do it.
        has_dtype = q.dtype == k.dtype and torch.promote_types(q.dtype, cos.dtype) == cos.dtype
        has_dtype = has_dtype and (self.kernel is None or q.dtype == cos.dtype)
        is_whole = q.shape[-1] == k.shape[-1] == cos.shape[-1] and has_dtype
        if others or options or cos.dim() != 3 or not (is_one_token and is_whole):
            return self.plain(q, k, cos, sin, *others, **options)
        if self.kernel is not None:
            return self.kernel(q, k, cos, sin)
        both = torch.cat([q, k], 1).to(cos.dtype)  # [M, H + H', 1, d]
        # Halves change places, and the first is subtracted.
        source, signed = self._of_step
        if signed is None or source is not sin:  # the first layer of a step computes it for all
            first, second = sin.chunk(2, -1)
            signed = torch.cat([-first, second], -1).unsqueeze(1)  # [M, 1, 1, d], the first half negative
            self._of_step = sin, signed
        rotated = torch.addcmul(both * cos.unsqueeze(1), both.roll(both.shape[-1] // 2, -1), signed)
        return rotated.split((q.shape[1], k.shape[1]), 1)


@torch.no_grad()
def _rotates_by_halves(fused: _FusedRotary, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a family's function rotates halves: of random queries and keys of a dtype, by angles like a weight."""
    generator = torch.Generator().manual_seed(0)
    q, k, angles = (torch.randn(2, heads, 1, 16, generator=generator) for heads in (4, 2, 1))
    inputs = [tensor.to(dtype).to(weight.device) for tensor in (q, k)]
    inputs += [tensor.to(weight.dtype).to(weight.device) for tensor in (angles[:, 0].cos(), angles[:, 0].sin())]

    def probe() -> str:  # it may fail: a function of another kind by the same name, or a kernel that cannot be compiled
        expected = fused.plain(*(tensor.clone() for tensor in inputs))
        return _fault(fused(*(tensor.clone() for tensor in inputs)), expected)

    return _is_right(fused.kernel, run_probe(probe, "it fails ({})".format))


def _fault(got: Any, expected: Any) -> str:
    """Return what is wrong with tensors that may differ from the expected ones by a few roundings; empty if nothing."""
    tolerance = 8 * torch.finfo(expected[0].dtype).eps
    pairs = list(zip(got, expected, strict=True))
    if any(one.dtype != other.dtype for one, other in pairs):
        return "it rounds to another dtype"
    is_close = all(bool((one - other).abs().max() <= tolerance * other.abs().max()) for one, other in pairs)
    return "" if is_close else "it computes something else"


# ---- Activations, and liger-kernel ----


@contextmanager
def fused_activations(model: nn.Module, checked: dict[Hashable, bool]) -> Iterator[int]:
    """Multiply gates by their activations in one kernel inside: on CUDA, where liger-kernel is installed.

    Args:
        model: with the weights of a rollout.
        checked: what earlier calls have found, by kind of layer.

    Yields:
        The number of layers whose activation is fused.
    """
    weight = next(model.parameters(), torch.empty(0))
    kernel = _liger(weight, "transformers.swiglu", "_swiglu_dispatch")
    if kernel is None:
        yield 0
        return
    fused: list[Any] = []
    layers: list[Any] = [layer for layer in model.modules() if _is_gated(layer)]
    for layer in layers:
        kind = type(layer), kernel, weight.dtype, layer.gate_proj.weight.shape
        if kind not in checked:
            checked[kind] = _is_silu_gate(layer, kernel)
        if checked[kind]:
            # An attribute of the instance hides the method of its class, until it is deleted below.
            layer.forward = partial(_gated, layer, kernel)
            fused.append(layer)
    try:
        yield len(fused)
    finally:
        for layer in fused:
            del layer.forward


def _is_gated(layer: Any) -> bool:
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return set(dict(layer.named_children())) == set(names) and "forward" not in vars(layer)


def _gated(layer: Any, kernel: Callable[..., Any], inputs: Tensor) -> Any:
    return layer.down_proj(kernel(layer.gate_proj(inputs), layer.up_proj(inputs)))


@torch.no_grad()
def _is_silu_gate(layer: Any, kernel: Callable[..., Any]) -> bool:
    """Whether the layer multiplies its second projection by the SiLU of the first, on random numbers."""
    weight = layer.gate_proj.weight
    inputs = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0))
    inputs = inputs.to(weight.dtype).to(weight.device)

    def probe() -> str:
        return _fault([_gated(layer, kernel, inputs)], [layer(inputs)])

    return _is_right(kernel, run_probe(probe, "it fails ({})".format))


def _liger(weight: Tensor, module: str, name: str) -> Callable[..., Any] | None:
    """Return a function of liger-kernel for the device of a weight; None without CUDA or where it is not installed."""
    if weight.device.type != "cuda":
        return None
    try:
        return cast("Callable[..., Any]", getattr(import_module(f"liger_kernel.{module}"), name))
    except (ImportError, AttributeError):  # not installed, or of another version
        return None


def _is_right(kernel: Callable[..., Any] | None, fault: str) -> bool:
    """Return whether there is no fault; the log says whether rollouts take a kernel of liger-kernel."""
    if kernel is not None:
        name = getattr(kernel, "__name__", "").strip("_")
        verb, reason = ("do not take", f": {fault}") if fault else ("take", "")
        log.info("rollouts %s liger-kernel's %s%s", verb, name, reason)
    return not fault
