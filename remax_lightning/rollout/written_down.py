"""A step's operators, written down once and called again without the Python of the model around them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Step: TypeAlias = Callable[..., Tensor]
"""A function of tensors that gives one tensor."""


def write_down(step: Step, inputs: tuple[Tensor, ...]) -> Step:
    """Return a replay of `step` as its bare operators, which see what `inputs` hold then, and the weights as they are.

    Args:
        step: runs the same operators on all inputs of such shapes. It runs two or three times meanwhile.
        inputs: examples.

    Raises:
        RuntimeError: if the replay gives other numbers than `step`, bit for bit, or `step` looks at its own values.
    """
    expected = step(*inputs)
    # Tensors without memory are traced a third quicker, but some operators do not tell of them what they would give.
    with suppress(Exception), _silent("torch._subclasses.fake_tensor"):
        replay = _traced(step, inputs, "fake")
        if _same(replay(*inputs), expected):
            return replay
    replay = _traced(step, inputs, "real")
    if not _same(replay(*inputs), expected):
        raise RuntimeError("its operators give other numbers when they are called again")
    return replay


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Keep a logger quiet inside."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _same(replayed: Tensor, expected: Tensor) -> bool:
    return torch.allclose(replayed, expected, rtol=0, atol=0, equal_nan=True)


def _traced(step: Step, inputs: tuple[Tensor, ...], mode: Literal["fake", "real"]) -> Step:
    """Return a replay of the operators that `step` runs on tensors like `inputs`, or on these themselves."""
    from torch.fx.experimental.proxy_tensor import make_fx

    traced: Any = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs)
    traced.graph.eliminate_dead_code()
    known = _known_beforehand(traced)
    read = [node for node in known if not known.keys() >= set(node.users)]
    values = [known[node] for node in read]
    # Casts of mixed precision are among the operators.
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        run = _interpreted(_compiled(traced.graph, known, read), (*inputs, *values))

    def replay(*inputs: Tensor) -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            return run(*inputs, *values)

    return replay


def _interpreted(replay: Step, inputs: tuple[Tensor, ...]) -> Step:
    """Return a replay that calls its operators without Python; the same one if they cannot be called so.

    TorchScript is deprecated, but nothing else calls operators from a list without compiling them: `torch.compile`
    would take seconds for a shape, and round otherwise. Optimization is off, so the operators are the ones written
    down. Those of oneDNN have arguments that TorchScript cannot trace; the layers that it multiplies are so large that
    Python does not matter beside them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            script: Any = torch.jit.trace(replay, inputs, check_trace=False, _store_inputs=False)
    except Exception as error:  # whatever operator it does not know
        log.debug("decoding steps are replayed by Python (%s)", str(error).splitlines()[0][:200])
        return replay

    without_changes: Any = torch.jit.optimized_execution  # type: ignore[attr-defined]

    def interpret(*inputs: Tensor) -> Tensor:
        with without_changes(False):
            output: Tensor = script(*inputs)
            return output

    return interpret


def _compiled(graph: Any, known: Container[Any], read: list[Any]) -> Step:
    """Return a traced graph as one Python function, its operators bound to names.

    `GraphModule` would do the same at about twice the overhead per operator: it looks each one up at every call.

    Args:
        graph: of `make_fx`.
        known: nodes that need not be computed.
        read: those of them that others read: arguments behind the graph's own. Not constants of the function, which
            TorchScript would never give back.
    """
    names: dict[str, Any] = {"device": torch.device, "torch": torch, "inf": float("inf"), "nan": float("nan")}
    names["__name__"] = __name__
    lines: list[str] = []
    last_uses = _last_uses(graph)
    for node in graph.nodes:
        if node.op == "call_function" and node not in known:
            names[f"run_{node.name}"] = getattr(node.target, "_op", node.target)
            arguments = [*map(repr, node.args), *(f"{name}={value!r}" for name, value in node.kwargs.items())]
            lines.append(f"{node.name} = run_{node.name}({', '.join(arguments)})")
            done = [each.name for each in last_uses.get(node, ()) if each not in known]
            lines += [f"del {', '.join(done)}"] if done else []
        elif node.op == "output":
            lines.append(f"return {node.args[0]!r}")
    parameters = [node.name for node in (*graph.find_nodes(op="placeholder"), *read)]
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
            value = getattr(traced, node.target)
            weights[node] = value.detach() if isinstance(value, Tensor) else value  # in the same memory
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
