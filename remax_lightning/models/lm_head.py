"""Final hidden states of a causal language model, and the output head that makes logits of them.

What a model does around its output embedding is its own business: some scale, some cap, some shift. So nothing is
believed: once per model a few tokens are run through it to see what it does, and a model that does something unknown
keeps making its logits itself.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from remax_lightning.errors import UserError
from remax_lightning.functional import OutputHead
from remax_lightning.models.forward import eval_mode, model_inputs
from remax_lightning.sharding import is_zero3_sharded, unwrap_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

PROBED_TOKENS, PROBE_SCALE = 8, 50.0
FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Where configurations say what their logits are multiplied with, or divided by: Cohere; Granite divides, HyperCLOVA X
multiplies; Falcon-H1; Muse. Which of the two it is, the probe tells."""
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Where configurations name the bound of their logits: Gemma 2 and later; RecurrentGemma; xLSTM."""


class HeadSearch(NamedTuple):
    """The head of a model, or why it cannot be used.

    Args:
        head: what makes logits of `hidden_states`; None where the model has to make them itself.
        reason: why, in words; empty where there is a head.
    """

    head: OutputHead | None
    reason: str = ""


class _LogitRecipe(NamedTuple):
    """What a probe found out about a model: what it does to its logits, or why its parts cannot be used."""

    scale: float = 1.0
    soft_cap: float | None = None
    reason: str = ""


_recipes: WeakKeyDictionary[nn.Module, _LogitRecipe] = WeakKeyDictionary()
_logged_reasons: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def find_head(model: PreTrainedModel) -> HeadSearch:
    """Return the model's output head with its weights of now; the first call runs a few tokens through the model.

    A head that is more than a plain linear layer with whole weights (an adapter, quantization, ZeRO-3, FSDP, tensor
    parallelism, a hook) is not used, and neither is one whose logits are not the model's own. The log says so once.
    """
    reason = _why_unreadable(model)
    recipe = _LogitRecipe(reason=reason) if reason else _cached_recipe(model)
    if _logged_reasons.get(model) != recipe.reason:
        _logged_reasons[model] = recipe.reason
        log.info(
            "%s: %s",
            type(model).__name__,
            f"every training pass makes all logits at once, because {recipe.reason}"
            if recipe.reason
            else "logits are made a few tokens at a time",
        )
    if recipe.reason:
        return HeadSearch(None, recipe.reason)
    layer = _unwrapped(model).get_output_embeddings()
    return HeadSearch(OutputHead(layer.weight, layer.bias, recipe.scale, recipe.soft_cap))


def required_head(model: PreTrainedModel, key: str) -> OutputHead:
    """Return the model's output head for a KL over the vocabulary.

    Raises:
        UserError: if it cannot be used; `key` is where the configuration has the model.
    """
    head, reason = find_head(model)
    if head is None:
        raise UserError(
            f"model.kl.estimator (or loss_estimator) full needs the output head of {key}, which cannot be read:"
            f" {reason}; choose k1, k2 or k3"
        )
    return head


def hidden_states(model: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Return `[M, T, D]` final hidden states, of which the model's head makes logits.

    Args:
        model: one that `find_head` found a head of.
        input_ids: `[M, T]` token ids.
        mask: `[M, T]` bool, True on real tokens.
    """
    core = _unwrapped(model)
    return cast(Tensor, core.base_model(**model_inputs(core, input_ids, mask), use_cache=False).last_hidden_state)


def _unwrapped(model: PreTrainedModel) -> Any:
    """Return the language model inside of a PEFT wrapper; its adapters are part of its layers."""
    return unwrap_peft(model)


def _why_unreadable(model: PreTrainedModel) -> str:
    """Return what keeps the head from being read, as far as that shows without running the model; may change."""
    core = _unwrapped(model)
    layer = core.get_output_embeddings()
    if core.base_model is core or layer is None:
        return "it has no separate body and output embedding"
    if type(layer) is not nn.Linear:
        return f"its output embedding is a {type(layer).__module__}.{type(layer).__qualname__}"
    for module in (model, core, layer):
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return f"its {type(module).__name__} has hooks, which reading the weights would pass by"
    for parameter in (layer.weight, layer.bias):
        # A subclass of Parameter is a DTensor or quantized; FSDP puts plain tensors and flat pieces in their place.
        if parameter is not None and (type(parameter) is not nn.Parameter or is_zero3_sharded(parameter)):
            return "its output embedding is sharded or quantized"
    if layer.weight.shape != (layer.out_features, layer.in_features) or layer.weight.is_meta:
        return "its output embedding is not all here"
    return ""


def _cached_recipe(model: PreTrainedModel) -> _LogitRecipe:
    if model not in _recipes:
        try:
            _recipes[model] = _probe_logits(model)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            _recipes[model] = _LogitRecipe(reason=f"trying its parts failed ({type(error).__name__}: {error})")
    return _recipes[model]


@torch.no_grad()
def _probe_logits(model: PreTrainedModel) -> _LogitRecipe:
    """Run two rows of random tokens, one padded on the left, and look at what goes into the head and comes out behind.

    The head's own output is replaced by large random numbers: what the model then makes of them is seen far from 0,
    where a soft cap differs from none.
    """
    core = _unwrapped(model)
    layer, config = core.get_output_embeddings(), core.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, layer.out_features, (2, PROBED_TOKENS), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, : PROBED_TOKENS // 2] = False
    numbers = PROBE_SCALE * torch.randn(*ids.shape, layer.out_features, generator=generator)
    seen: list[Tensor] = []

    def replace(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(inputs[0])
        return numbers.to(output)

    ids, mask = ids.to(layer.weight.device), mask.to(layer.weight.device)
    handle = layer.register_forward_hook(replace)
    try:
        with eval_mode(model):
            logits = model(**model_inputs(core, ids, mask), use_cache=False).logits
            hidden = hidden_states(model, ids, mask)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].shape != hidden.shape or not _is_close(hidden[mask], seen[0][mask]):
        return _LogitRecipe(reason="its output embedding does not read its last hidden states")
    for scale, cap in _candidate_recipes(config):
        expected = scale * numbers if cap is None else cap * torch.tanh(scale * numbers / cap)
        if logits.shape == numbers.shape and _is_close(expected.to(logits), logits):
            return _LogitRecipe(scale, cap)
    return _LogitRecipe(reason="it changes its logits in a way that is not known here")


def _is_close(logits: Tensor, expected: Tensor) -> bool:
    """Whether two tensors differ by rounding only, in the coarser of their dtypes."""
    tolerance = max(1e-4, *(2 * torch.finfo(tensor.dtype).eps for tensor in (logits, expected)))
    return bool((logits.double() - expected.double()).norm() <= tolerance * expected.double().norm())


def _candidate_recipes(config: Any) -> Iterator[tuple[float, float | None]]:
    """Yield scales with soft caps that the configuration may mean."""
    factors, caps = (_positive_values(config, names) for names in (FACTORS, SOFT_CAPS))
    yield from itertools.product([1.0, *factors, *(1 / factor for factor in factors)], [None, *caps])


def _positive_values(config: Any, names: tuple[str, ...]) -> list[float]:
    """Return what numbers above 0 the configuration, or that of its text part, has under `names`."""
    values = [getattr(part, name, None) for part in (config.get_text_config(), config) for name in names]
    return [float(value) for value in dict.fromkeys(values) if isinstance(value, int | float) and value > 0]
