"""Forward passes of any causal language model over left-padded rows, and the output head that computes its logits.

Models differ around their output embedding: some scale the logits, some cap them. So each model is probed once with a
few tokens. If its logits cannot be reproduced from hidden states and head, the model computes all logits itself.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from remax_lightning.errors import UserError
from remax_lightning.functional import OutputHead
from remax_lightning.sharding import is_zero3_sharded, language_model, unwrap_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
T = TypeVar("T")


@lru_cache(maxsize=64)
def _forward_parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def accepts_argument(model: PreTrainedModel, argument: str) -> bool:
    """Return whether the model's `forward` has a parameter of that name; BLOOM, for example, has no `position_ids`."""
    return argument in _forward_parameters(type(language_model(model)).forward)


def choose_attention_kernels(device: torch.device, cudnn: bool) -> None:
    """Keep torch's attention from cuDNN in this process, unless `cudnn` asks for it; on CUDA only, and logged.

    torch prefers cuDNN on recent GPUs. With the masks of padded rows it has returned NaN gradients where the length
    modulo 128 is 64 (pytorch#196678) and wrong greedy tokens (pytorch#193893), and takes a second to plan a new shape,
    of which a run has hundreds.

    Args:
        device: where the run computes.
        cudnn: leave the choice to torch.
    """
    if device.type != "cuda" or not torch.backends.cuda.cudnn_sdp_enabled():
        return
    if cudnn:
        log.info("attention may run in cuDNN (model.cudnn_attention)")
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    log.info(
        "attention does not run in cuDNN, which has returned NaN gradients for padded rows and plans every new shape;"
        " model.cudnn_attention: true turns it on"
    )


def prompt_index_per_row(prompt_ids: Tensor, num_samples: int, greedy: bool) -> Tensor:
    """Return `[N]` the index of each row's prompt: sampled rows first, prompt by prompt, then one greedy row each."""
    prompts = torch.arange(len(prompt_ids), device=prompt_ids.device)  # [B]
    return torch.cat([prompts.repeat_interleave(num_samples), prompts if greedy else prompts[:0]])


def model_inputs(model: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """Return the arguments of a forward pass over rows padded on either side.

    Args:
        model: whose `forward` will be called.
        input_ids: `[M, T]` token ids.
        mask: `[M, T]` bool, True on real tokens.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask.long()}
    if accepts_argument(model, "position_ids"):
        # [M, T] positions that count real tokens only, from 0, so that left padding shifts nothing.
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
    return inputs


@contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into eval mode inside.

    Needed for decoding: in train mode with gradient checkpointing a model drops its cache and generates wrong tokens.
    """
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# ---- Probes: is another way to compute the same right for this model, or this device? ----

TOLERANCE, TOLERANCE_16_BITS = 1e-3, 0.1
"""Share of the spread of outputs by which the two ways may differ, in float32 and in 16 bits. There, the shape of a
batch alone changes the third digit; a token that sees what it must not see differs by about the spread."""


def run_probe(probe: Callable[[], T], failed: Callable[[str], T]) -> T:
    """Return what a probe finds, or where it raises, what `failed` makes of the error.

    The code of a model or of a package may raise anything at what it does not know. Errors for the user are raised, and
    so is a lack of memory: it says nothing about the model, and the run would not get far.
    """
    try:
        return probe()
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        return failed(f"{type(error).__name__}: {error}")


def output_gap(outputs: Tensor, expected: Tensor) -> str:
    """Return how far outputs are from what was expected, in words; empty where only rounding separates them.

    Args:
        outputs: `[T, ...]` of `T` tokens or rows, the worst of which counts by its root mean square.
        expected: of the same shape; its dtype, float32 or 16 bits, decides what rounding is.
    """
    tolerance = TOLERANCE_16_BITS if expected.dtype.itemsize == 2 else TOLERANCE
    expected = expected.float()
    difference = (outputs.float() - expected).flatten(1)  # [T, C]
    gap = float(torch.linalg.vector_norm(difference, dim=-1).max()) / math.sqrt(difference.shape[1])
    # Written so that NaN is a gap, too.
    return "" if gap <= tolerance * float(expected.std()) else f"they differ by {gap:.2g}"


# ---- The output head ----

PROBED_TOKENS, PROBE_SCALE = 8, 50.0
FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Configuration keys of a factor or divisor of the logits (Cohere, Granite and HyperCLOVA X, Falcon-H1, Muse). The
probe tells which of the two it is."""
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Configuration keys of the soft cap of the logits (Gemma 2 and later, RecurrentGemma, xLSTM)."""


class HeadSearch(NamedTuple):
    """The head of a model, or the reason why it cannot be used.

    Args:
        head: computes logits from `hidden_states`; None if the model has to compute them itself.
        reason: why there is no head; empty if there is one.
    """

    head: OutputHead | None
    reason: str = ""


class _LogitRecipe(NamedTuple):
    """The result of a probe: scale and soft cap of the logits, or the reason why the head cannot be used."""

    scale: float = 1.0
    soft_cap: float | None = None
    reason: str = ""


_recipes: WeakKeyDictionary[nn.Module, _LogitRecipe] = WeakKeyDictionary()
_logged_reasons: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def find_head(model: PreTrainedModel) -> HeadSearch:
    """Return the model's output head with its current weights. The first call runs a few tokens through the model.

    Only a plain linear layer with full weights is used (no adapter, quantization, ZeRO-3, FSDP, tensor parallelism or
    hook), and only if it reproduces the logits of the model. The result is logged once.
    """
    # Asked at every call: hooks come and go, and a strategy may shard the model later. The probe runs once.
    reason = _why_unreadable(model)
    if not reason and model not in _recipes:
        _recipes[model] = run_probe(
            partial(_probe_logits, model), lambda error: _LogitRecipe(reason=f"the probe of its head failed ({error})")
        )
    recipe = _LogitRecipe(reason=reason) if reason else _recipes[model]
    if _logged_reasons.get(model) != recipe.reason:
        _logged_reasons[model] = recipe.reason
        log.info(
            "%s: %s",
            type(model).__name__,
            f"every training pass computes all logits at once, because {recipe.reason}"
            if recipe.reason
            else "logits are computed a few tokens at a time",
        )
    if recipe.reason:
        return HeadSearch(None, recipe.reason)
    # Only the recipe is stored. The weight is read where it is now.
    layer = unwrap_peft(model).get_output_embeddings()
    return HeadSearch(OutputHead(layer.weight, layer.bias, recipe.scale, recipe.soft_cap))


def required_head(model: PreTrainedModel, key: str) -> OutputHead:
    """Return the model's output head for a KL over the vocabulary.

    Raises:
        UserError: if it cannot be used; `key` is the configuration key of the model, for the message.
    """
    head, reason = find_head(model)
    if head is None:
        raise UserError(
            f"model.kl.estimator (or loss_estimator) full needs the output head of {key}, which cannot be read:"
            f" {reason}; choose k1, k2 or k3"
        )
    return head


def hidden_states(model: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Return `[M, T, D]` final hidden states, the input of the model's head.

    Args:
        model: a model for which `find_head` returns a head.
        input_ids: `[M, T]` token ids.
        mask: `[M, T]` bool, True on real tokens.
    """
    core = unwrap_peft(model)
    return cast(Tensor, core.base_model(**model_inputs(core, input_ids, mask), use_cache=False).last_hidden_state)


def _why_unreadable(model: PreTrainedModel) -> str:
    """Return why the head cannot be read, as far as that is visible without running the model; empty if it can."""
    core = unwrap_peft(model)
    layer = core.get_output_embeddings()
    # transformers returns the model itself as `base_model` where it has no separate body.
    if core.base_model is core or layer is None:
        return "it has no separate body and output embedding"
    if type(layer) is not nn.Linear:
        return f"its output embedding is a {type(layer).__module__}.{type(layer).__qualname__}"
    for module in (model, core, layer):
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return f"its {type(module).__name__} has hooks, which reading the weights would skip"
    for parameter in (layer.weight, layer.bias):
        # A subclass of Parameter is a DTensor or quantized; FSDP1 replaces parameters by plain tensors.
        if parameter is not None and (type(parameter) is not nn.Parameter or is_zero3_sharded(parameter)):
            return "its output embedding is sharded or quantized"
    if layer.weight.shape != (layer.out_features, layer.in_features) or layer.weight.is_meta:
        return "its output embedding is sharded or on the meta device"
    return ""


@torch.no_grad()
def _probe_logits(model: PreTrainedModel) -> _LogitRecipe:
    """Run two rows of random tokens, one padded on the left, and compare the input and the output of the head.

    The output of the head is replaced by large random numbers, so that a soft cap has a visible effect on the logits.
    """
    core = unwrap_peft(model)
    layer, config = core.get_output_embeddings(), core.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, layer.out_features, (2, PROBED_TOKENS), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, : PROBED_TOKENS // 2] = False  # left padding
    head_output = PROBE_SCALE * torch.randn(*ids.shape, layer.out_features, generator=generator)
    # ---- Run the model with the output of its head replaced, and record the input of the head ----
    head_inputs: list[Tensor] = []

    def replace_output(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        head_inputs.append(inputs[0])
        return head_output.to(output)

    ids, mask = ids.to(layer.weight.device), mask.to(layer.weight.device)
    handle = layer.register_forward_hook(replace_output)
    try:
        with eval_mode(model):
            logits = model(**model_inputs(core, ids, mask), use_cache=False).logits  # [2, T, V]
            hidden = hidden_states(model, ids, mask)  # [2, T, D]
    finally:
        handle.remove()
    # ---- Does the head read the last hidden states, and how do the logits follow from its output? ----
    reads_hidden = len(head_inputs) == 1 and head_inputs[0].shape == hidden.shape
    if not reads_hidden or not _is_close(hidden[mask], head_inputs[0][mask]):
        return _LogitRecipe(reason="its output embedding does not read its last hidden states")
    # The first pair that reproduces the logits is taken; 1 and no cap, which most models have, comes first.
    for scale, cap in _candidate_recipes(config):
        scaled = scale * head_output
        expected = scaled if cap is None else cap * torch.tanh(scaled / cap)
        if logits.shape == expected.shape and _is_close(expected.to(logits), logits):
            return _LogitRecipe(scale, cap)
    return _LogitRecipe(reason="it changes its logits in an unknown way")


def _is_close(logits: Tensor, expected: Tensor) -> bool:
    """Whether two tensors differ only by the rounding of the coarser dtype."""
    tolerance = max(1e-4, *(2 * torch.finfo(tensor.dtype).eps for tensor in (logits, expected)))
    return bool((logits.double() - expected.double()).norm() <= tolerance * expected.double().norm())


def _candidate_recipes(config: Any) -> Iterator[tuple[float, float | None]]:
    """Yield the pairs of scale and soft cap that the configuration allows."""
    factors, caps = (_positive_values(config, names) for names in (FACTORS, SOFT_CAPS))
    yield from itertools.product([1.0, *factors, *(1 / factor for factor in factors)], [None, *caps])


def _positive_values(config: Any, names: tuple[str, ...]) -> list[float]:
    """Return the numbers above 0 that the configuration or its text part has under `names`."""
    values = [getattr(part, name, None) for part in (config.get_text_config(), config) for name in names]
    return [float(value) for value in dict.fromkeys(values) if isinstance(value, int | float) and value > 0]
