"""The memory of a run by phase and part, in bytes per device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from remax_lightning.strategies.gather_mode import MAX_MEMORY_SHARE
from remax_lightning.tools.plan.strategy_memory import Parts, StrategyMemory, make_strategy_memory
from remax_lightning.tools.plan.types import FrozenSize, ModelSize, Step, Strategy

PHASES = ("rollout", "scoring", "training", "update")
"""Generation; rewards and log-probs without gradients; the pass with gradients; clipping and optimizer."""

PARTS = (
    *("policy weights", "gradients", "gradient buffers", "master weights", "optimizer", "value model"),
    *("reference", "reward model", "frozen model at work", "gathered weights", "16-bit copy"),
    *("KV cache", "reference hidden states", "activations", "logits and temporary"),
)
"""All parts, in the order of the table."""

COUNTS = (*range(1, 65), *range(72, 1025, 8))
"""Numbers of devices to try. At the largest, only replicated memory matters."""


def phases(
    size: ModelSize, step: Step, frozen: Sequence[FrozenSize], strategy: Strategy, value: ModelSize | None = None
) -> dict[str, Parts]:
    """Return the parts of the peak of each phase, in bytes per device.

    Args:
        size: size of the policy.
        step: its passes.
        frozen: reference and reward models.
        strategy: the strategy; `gather: auto` counts as once, see `resolve_gather_mode`.
        value: size of a value model, which PPO trains beside the policy, with its passes after those of the policy.
    """
    policy = make_strategy_memory(size, step, strategy)
    always = _resident_parts(policy, frozen, value)
    hidden = {"reference hidden states": step.hidden}
    copies = {} if step.keeps_cache else {"KV cache": step.rollout.cache, "16-bit copy": size.cast_copy}
    rollout = copies | {"logits and temporary": step.rollout.working}
    body, forward = step.training.activations, step.training.forward
    moments_by_phase: dict[str, list[Counter[str]]] = {
        "rollout": [always + Counter(policy.rollout() | rollout)],
        "scoring": [always + Counter(scored) for scored in _scoring_parts(policy, frozen)],
        "training": [
            always + Counter(parts | hidden | _activation_parts(body, live))
            for parts, live in ((policy.body(), body), (policy.forward(), forward))
        ],
        "update": [always + Counter(policy.update())],
    }
    moments_by_phase["training"] += [
        always + Counter(policy.backward(moment)) + Counter(hidden | _activation_parts(body, moment.live))
        for moment in step.training.backward
    ]
    highest = {phase: max(moments, key=Counter.total) for phase, moments in moments_by_phase.items()}
    return {phase: dict(parts) for phase, parts in highest.items()}


def resolve_gather_mode(
    size: ModelSize, step: Step, frozen: Sequence[FrozenSize], strategy: Strategy, memory: float | None
) -> Strategy:
    """Return the strategy with the gather mode that `auto` chooses for this memory; None for unlimited memory."""
    if strategy.gather != "auto":
        return strategy
    resident = _resident_parts(make_strategy_memory(size, step, strategy), frozen).total()
    fits = memory is None or size.weights <= MAX_MEMORY_SHARE * (memory - resident)
    return replace(strategy, gather="once" if fits else "layerwise")


def peak_bytes(phase_parts: Mapping[str, Parts]) -> int:
    """Return the peak of all phases."""
    return max(sum(parts.values()) for parts in phase_parts.values())


def offloaded_bytes(size: ModelSize, step: Step, frozen: Sequence[FrozenSize], strategy: Strategy) -> int:
    """Return the bytes per device that are offloaded to host memory."""
    parked = sum(model.weights - model.stays for model in frozen if model.placement == "cpu")
    return make_strategy_memory(size, step, strategy).host() + parked


def least_devices(needed: Callable[[int], int], memory: float) -> int | None:
    """Return the smallest number of devices on which a run fits; None if it fits on none of `COUNTS`.

    Args:
        needed: bytes per device for a number of devices. It may grow with the number, when `auto` starts to gather
            once.
        memory: memory of each device.
    """
    return next((count for count in COUNTS if needed(count) <= memory), None)


def _resident_parts(
    policy: StrategyMemory, frozen: Sequence[FrozenSize], value: ModelSize | None = None
) -> Counter[str]:
    """Return the parts that exist in every phase."""
    step, parts = policy.step, Counter(policy.resident())
    for model in frozen:
        parts[model.name] += _resident_frozen_bytes(model, policy.strategy)
    if step.keeps_cache:
        parts.update({"KV cache": step.rollout.cache, "16-bit copy": policy.size.cast_copy})
    if value is not None:
        other = make_strategy_memory(value, step.scaled(value.trainable / policy.size.trainable), policy.strategy)
        # Its gradients too, because both models are trained at the same time.
        parts["value model"] = sum(other.resident().values()) + other.update().get("gradients", 0)
    return parts


def _activation_parts(body: int, live: int) -> Parts:
    return {"activations": min(body, live), "logits and temporary": max(0, live - body)}


def _is_sharded(model: FrozenSize, strategy: Strategy) -> bool:
    return model.placement == "shard" and strategy.devices > 1


def _resident_frozen_bytes(model: FrozenSize, strategy: Strategy) -> int:
    """Return the bytes of a frozen model on a device between its passes."""
    if model.placement == "cpu":
        return model.stays
    return (
        model.weights - model.layers + strategy.share(model.layers) if _is_sharded(model, strategy) else model.weights
    )


def _scoring_parts(policy: StrategyMemory, frozen: Sequence[FrozenSize]) -> Iterator[Parts]:
    """Yield the parts that each scoring pass adds."""
    step = policy.step
    hidden = {"reference hidden states": step.hidden}
    if step.scoring:
        yield policy.scoring() | hidden | {"logits and temporary": step.scoring}
    yield {"reference hidden states": 4 * step.hidden}  # while parts are concatenated and scattered
    for model in frozen:
        brought = model.weights - model.stays if model.placement == "cpu" else 0
        if _is_sharded(model, policy.strategy):
            brought = 2 * model.layer  # one runs, the next is prefetched
        parts = {"frozen model at work": brought, "logits and temporary": model.working}
        yield parts | (hidden if model.name == "reference" else {})
