"""The MLP of a model's last layer, run for the tokens alone whose output is read.

Behind the last attention everything works token by token: MLP, norm and head. Of a prompt, and in a reward model of all
tokens but the last, only keys and values of the last layer are needed. The MLP is most of a layer's products.

Whether a model's last layer is of this kind is found by running a few tokens in both ways.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from remax_lightning.models.forward import eval_mode, model_inputs, output_gap, run_probe
from remax_lightning.sharding import decoder_layers, unwrap_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

MLPS = (("mlp", "mlp"), ("feed_forward", "feed_forward"), ("fc1", "fc2"))
"""First and last part of a layer's MLP, as families name them: nearly all; Llama 4, Jamba and LFM2; OPT."""
PROBED, READ = (2, 6), (3, 5, 7, 10)
"""Rows and tokens of the probe, and which of them are read. Two rows, since tokens may come before rows in a model."""
TokenOutputs = Callable[["PreTrainedModel", dict[str, Any]], Tensor]


def all_logits(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Return `[M, T, V]` logits of all tokens."""
    return cast(Tensor, model(**inputs, use_cache=False).logits)


@contextmanager
def skip_unread_tokens(
    model: PreTrainedModel, read: Tensor, token_outputs: TokenOutputs = all_logits
) -> Iterator[None]:
    """Run the MLP of the last layer only for the tokens whose output is read; those of the others are wrong inside.

    All run where the model's last layer is of another kind, and where the backward pass recomputes it, outside of this
    context. The first call runs a few tokens, on all ranks where the model is sharded.

    Args:
        model: a language model, or another one with `token_outputs`.
        read: `[K]` which of the `M * T` tokens of a pass; each once.
        token_outputs: from a model and the arguments of a pass to what it returns of each token, `[M, T, C]`.
    """
    core = unwrap_peft(model)
    recomputes = torch.is_grad_enabled() and any(map(_recomputes, _path_to_last_layer(core)))
    if recomputes or last_mlp_obstacle(model, token_outputs):
        yield
        return
    with _selecting(core, read):
        yield


def _recomputes(module: nn.Module) -> bool:
    # Families keep the flag in each layer, or in what holds the layers; torch and FSDP put a wrapper around them.
    return bool(getattr(module, "gradient_checkpointing", False)) or type(module).__name__ == "CheckpointWrapper"


def last_mlp_obstacle(model: PreTrainedModel, token_outputs: TokenOutputs = all_logits) -> str:
    """Return why all tokens of a pass run through the last MLP; empty where only those do that are read.

    Args:
        model: as in `skip_unread_tokens`.
        token_outputs: likewise.
    """
    if model not in _obstacles:
        _obstacles[model] = reason = _find_obstacle(model, token_outputs)
        if reason:
            log.info("%s: every token runs through its last MLP, because %s", type(unwrap_peft(model)).__name__, reason)
    return _obstacles[model]


@torch.no_grad()
def _find_obstacle(model: PreTrainedModel, token_outputs: TokenOutputs) -> str:
    """Run a few tokens in both ways and compare what the model returns of those that are read."""
    core = unwrap_peft(model)
    if _last_mlp(core) is None:
        return "it has none by a known name"
    vocab_size = core.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab_size, PROBED, generator=torch.Generator().manual_seed(0))  # [M, T]
    device = next(cast("nn.Module", model).parameters()).device
    ids, read = ids.to(device), torch.tensor(READ, device=device)
    # With a mask, as passes have: with it a mixture of experts may compute a loss over what its router says.
    inputs = model_inputs(core, ids, torch.ones_like(ids, dtype=torch.bool))

    def probe() -> str:
        with eval_mode(model):
            with _selecting(core, read) as tokens:
                got = token_outputs(model, inputs)  # [M, T, C]
            if got.shape[:2] != PROBED:
                return f"it makes {tuple(got.shape[:2])} outputs of {PROBED} tokens"
            if tokens.calls != 1:
                return f"a pass goes through it {tokens.calls} times"
            if isinstance(got, FakeTensor):  # the plan has shapes alone
                return ""
            expected = token_outputs(model, inputs)
        gap = output_gap(*(outputs.flatten(0, 1)[read] for outputs in (got, expected)))  # of [K, C]
        return f"other tokens are read behind it ({gap})" if gap else ""

    return run_probe(probe, "a pass over some of the tokens fails ({})".format)


def _last_mlp(core: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Return the first and the last part of the MLP of the last layer; None where it has none by a known name."""
    path = _path_to_last_layer(core)
    parts = dict(path[-1].named_children()) if path else {}
    return next(((parts[first], parts[last]) for first, last in MLPS if {first, last} <= parts.keys()), None)


def _path_to_last_layer(core: nn.Module) -> list[nn.Module]:
    """Return the last layer behind the modules that it is in, the model first; nothing where it is not known."""
    if core not in _last_layers:  # once: a search through all modules takes milliseconds
        layers = decoder_layers(core)
        _last_layers[core] = next((name for name, module in core.named_modules() if module in layers[-1:]), "")
    names = _last_layers[core].split(".") if _last_layers[core] else []
    return list(accumulate(names, getattr, initial=core)) if names else []


@dataclass
class _ReadTokens:
    """The tokens of a pass that go through the MLP.

    Args:
        read: `[K]` which of the pass.
        shape: `[M, T]`, or `[M * T]`, of all tokens of the pass.
        calls: how many have entered the MLP.
    """

    read: Tensor
    shape: tuple[int, ...] = ()
    calls: int = 0

    def enter(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return `[1, K, D]` of `[M, T, D]`, the states that the MLP reads."""
        states = inputs[0]
        self.shape, self.calls = states.shape[:-1], self.calls + 1
        return states.flatten(0, -2)[self.read][None], *inputs[1:]

    def leave(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """Return `[M, T, D]` of `[1, K, D]`, with zeros for the others."""
        if isinstance(output, tuple):  # mixtures of experts may return what their router says beside
            return self.leave(_module, _inputs, output[0]), *output[1:]
        states = output.new_zeros(math.prod(self.shape), output.shape[-1])  # [M * T, D]
        return states.index_copy(0, self.read, output.flatten(0, -2)).view(*self.shape, output.shape[-1])


@contextmanager
def _selecting(core: nn.Module, read: Tensor) -> Iterator[_ReadTokens]:
    """Let only the tokens `read`, `[K]`, through the MLP of the last layer inside."""
    first, last = cast("tuple[nn.Module, nn.Module]", _last_mlp(core))
    tokens = _ReadTokens(read)
    with ExitStack() as hooks:
        # Hooks, and no call of its own: a strategy that shards the weights gathers them in hooks, too.
        hooks.callback(first.register_forward_pre_hook(tokens.enter).remove)
        hooks.callback(last.register_forward_hook(tokens.leave).remove)
        yield tokens


_obstacles: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_last_layers: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""By model: the name of its last layer, as in `model.layers.31`; empty where it is not known."""
