"""Steps of a fixed shape, recorded once and replayed without the Python of the model behind them.

A decoding step runs the same operators on the same shapes token after token. On CUDA they are captured as a graph,
which the device then runs without waiting for Python; on a CPU they are written down as a plain function of operators.
Either way the weights are read where they are, so a replay sees every update of them, and its result is that of the
model's own forward pass, bit for bit.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

MOST_SHAPES = 128
"""Recordings that are kept; the one that was not used for longest goes first."""
RUNS_BEFORE = 32
"""How often a shape comes on a CPU before it is recorded: that costs about as much as forty runs of the model, and
saves a quarter of each. On CUDA it costs three runs and saves nearly all of each, so a graph is captured at once."""
Step: TypeAlias = Callable[..., Tensor]
"""A function of tensors that gives one tensor."""


class Recorder:
    """Runs steps, and records those whose shape comes again.

    What cannot be recorded (a model that looks at its own values, that calls hooks, whose weights lie elsewhere in
    every rollout) runs as it is; the log says why.
    """

    def __init__(self) -> None:
        self.obstacle = ""
        self._replays: OrderedDict[Hashable, Step] = OrderedDict()
        self._runs: Counter[Hashable] = Counter()
        self._moves = 0
        self._weights: Hashable = None

    def begin(self, model: nn.Module) -> None:
        """Begin a rollout: forget recordings of other weights, or of weights that lie elsewhere now."""
        weights = _whereabouts(model)
        if weights != self._weights:
            self._moves = self._moves + 1 if self._replays else 0
            self.forget()
            self._weights = weights
        if _has_hooks(model):
            self._give_up(model, "it has hooks, which a recording would pass by")
        elif self._moves > 1:
            self._give_up(model, "its weights lie elsewhere in every rollout")

    def forget(self) -> None:
        """Drop all recordings."""
        self._replays.clear()
        self._runs.clear()

    def run(self, key: Hashable, step: Step, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return `step(*inputs)`, replayed where it is recorded.

        Args:
            key: stands for shapes, dtypes and everything else that the step's operators depend on.
            step: what to run.
            inputs: everything that may change between two runs. On CUDA the same memory in each of them.
        """
        replay = self._replays.get(key)
        if replay is not None:
            self._replays.move_to_end(key)
            with torch.inference_mode():
                return replay(*inputs)
        on_cuda = inputs[0].device.type == "cuda"
        if not self.obstacle and (on_cuda or self._runs[key] >= RUNS_BEFORE):
            self._record(key, step, inputs, _capture if on_cuda else _write_down)
        self._runs[key] += 1
        return step(*inputs)

    def _record(self, key: Hashable, step: Step, inputs: tuple[Tensor, ...], how: Callable[..., Step]) -> None:
        try:
            self._replays[key] = how(step, inputs)
        except Exception as error:  # whatever a model does that cannot be recorded
            self._give_up(None, f"recording failed ({type(error).__name__}: {str(error).splitlines()[0][:200]})")
        if len(self._replays) > MOST_SHAPES:
            self._replays.popitem(last=False)

    def _give_up(self, model: nn.Module | None, reason: str) -> None:
        if not self.obstacle:
            name = "the policy" if model is None else type(model).__name__
            log.info("decoding steps of %s are not recorded, since %s", name, reason)
        self.obstacle = reason
        self.forget()


def _whereabouts(model: nn.Module) -> Hashable:
    """Return what tells whether a recording still reads the model's weights, and runs its adapters as they are set."""
    tensors = tuple(tensor.data_ptr() for each in (model.parameters(), model.buffers()) for tensor in each)
    adapters = tuple(
        (str(module.active_adapters), module.disable_adapters, str(module.merged_adapters))
        for module in model.modules()
        if hasattr(module, "merged_adapters")
    )
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return id(model), tensors, adapters, autocast


def _has_hooks(model: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _capture(step: Step, inputs: tuple[Tensor, ...]) -> Step:
    """Return a replay of `step` as a CUDA graph that reads `inputs` where they are."""
    cached = torch.is_autocast_cache_enabled()
    # Autocast's copies of the weights end with the training step; a graph must not read them then.
    torch.set_autocast_cache_enabled(False)
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up on first calls
            for _ in range(2):
                step(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that pins batches, may go on meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = step(*inputs)
    finally:
        torch.set_autocast_cache_enabled(cached)

    def replay(*_: Tensor) -> Tensor:
        graph.replay()
        return output

    return replay


def _write_down(step: Step, inputs: tuple[Tensor, ...]) -> Step:
    """Return a replay of `step` as a function of its operators."""
    from torch.fx.experimental.proxy_tensor import make_fx

    # Of tensors without memory, which is quicker; a model that looks at its own values fails on them.
    traced: Any = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    traced.graph.eliminate_dead_code()
    return _compiled(traced)


def _compiled(traced: Any) -> Step:
    """Return a traced graph as one Python function, its constants and operators bound to names.

    `GraphModule` would do the same at about twice the overhead per operator: it looks each one up at every call.
    """
    names: dict[str, Any] = {"device": torch.device, "torch": torch, "inf": float("inf"), "nan": float("nan")}
    lines: list[str] = []
    last_uses = _last_uses(traced.graph)
    known = _known_beforehand(traced)
    for node in traced.graph.nodes:
        if node in known:
            names[node.name] = known[node]
        elif node.op == "call_function":
            names[f"run_{node.name}"] = getattr(node.target, "_op", node.target)
            arguments = [*map(repr, node.args), *(f"{name}={value!r}" for name, value in node.kwargs.items())]
            lines.append(f"{node.name} = run_{node.name}({', '.join(arguments)})")
            done = [each.name for each in last_uses.get(node, ()) if each not in known]
            lines += [f"del {', '.join(done)}"] if done else []
        elif node.op == "output":
            lines.append(f"return {node.args[0]!r}")
    parameters = [node.name for node in traced.graph.nodes if node.op == "placeholder"]
    body = "".join(f"    {line}\n" for line in lines)
    exec(f"def replay({', '.join(parameters)}):\n{body}", names)
    replay: Step = names["replay"]
    return replay


def _last_uses(graph: Any) -> dict[Any, list[Any]]:
    """Return for each node the nodes that nothing reads after it, so that their memory is free for the next."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    found: dict[Any, list[Any]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            last = max(node.users, key=order.__getitem__, default=node)
            found.setdefault(last, []).append(node)
    return found


def _known_beforehand(traced: Any) -> dict[Any, Any]:
    """Return what need not be computed anew: constants, weights, what is made of constants alone, views of weights."""
    written = _written_to(traced.graph)
    weights: dict[Any, Any] = {}
    constants: dict[Any, Any] = {}
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            weights[node] = getattr(traced, node.target)
        elif _is_pure(node) and node not in written:
            inputs = node.all_input_nodes
            of_constants = all(each in constants for each in inputs)
            if of_constants or (_is_view(node.target) and all(each in weights for each in inputs)):
                values = constants if of_constants else weights
                arguments = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*arguments[0], **arguments[1])
    return weights | constants


def _is_pure(node: Any) -> bool:
    """Return whether a node is an operator whose result depends on its inputs alone, and which writes into none."""
    if node.op != "call_function" or not hasattr(node.target, "_schema"):
        return False
    return not _is_mutable(node) and torch.Tag.nondeterministic_seeded not in node.target.tags


def _is_mutable(node: Any) -> bool:
    return node.op == "call_function" and hasattr(node.target, "_schema") and node.target._schema.is_mutable


def _is_view(operator: Any) -> bool:
    return any(each.alias_info is not None for each in operator._schema.returns)


def _written_to(graph: Any) -> set[Any]:
    """Return the nodes that are written into, and all that they may be views of."""
    found: set[Any] = set()
    for node in reversed(graph.nodes):
        if _is_mutable(node):
            schema = node.target._schema.arguments
            given = {each.name: value for each, value in zip(schema, node.args, strict=False)} | node.kwargs
            for each in schema:
                if each.alias_info is not None and each.alias_info.is_write:
                    found.update(_nodes(given.get(each.name)))
        elif node in found:
            found.update(node.all_input_nodes)
    return found


def _nodes(argument: Any) -> list[Any]:
    """Return the nodes of an argument, which may be a list of them."""
    return [each for each in torch.utils._pytree.tree_leaves(argument) if isinstance(each, torch.fx.Node)]
