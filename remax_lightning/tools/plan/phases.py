"""The memory of a run, part by part and phase by phase: numbers in, bytes per device out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from remax_lightning.strategies.gather_mode import MAX_MEMORY_SHARE
from remax_lightning.tools.plan.strategy_memory import Parts, StrategyMemory, trained
from remax_lightning.tools.plan.types import FrozenSize, ModelSize, Step, Strategy

PHASES = ("rollout", "scoring", "training", "update")
"""Making responses; rewards and log-probs without gradients; the pass with gradients; clipping and the optimizer."""

PARTS = (
    *("policy weights", "gradients", "gradient buffers", "master weights", "optimizer", "value model"),
    *("reference", "reward model", "frozen model at work", "gathered weights", "packed weights"),
    *("KV cache", "reference hidden states", "activations", "logits and temporary"),
)
"""All there are, in the order of a table."""

COUNTS = (*range(1, 65), *range(72, 1025, 8))
"""Numbers of devices that are tried. By the last of them only what every device holds whole is left."""


def phases(
    size: ModelSize, step: Step, frozen: Sequence[FrozenSize], strategy: Strategy, value: ModelSize | None = None
) -> dict[str, Parts]:
    """Return the parts of each phase's peak, in bytes per device.

    Args:
        size: of the policy.
        step: its passes.
        frozen: reference and reward models.
        strategy: how they are spread; `gather: auto` counts as once, see `settled`.
        value: of a value model, as PPO trains one beside the policy, its passes after the policy's.
    """
    policy = trained(size, step, strategy)
    always = _always(policy, frozen, value)
    hidden = {"reference hidden states": step.hidden}
    copies = {} if step.keeps_cache else {"KV cache": step.rollout.cache, "packed weights": size.packed}
    rollout = copies | {"logits and temporary": step.rollout.working}
    body, forward = step.training.activations, step.training.forward
    moments_by_phase: dict[str, list[Counter[str]]] = {
        "rollout": [always + Counter(policy.rollout() | rollout)],
        "scoring": [always + Counter(scored) for scored in _scoring(policy, frozen)],
        "training": [
            always + Counter(parts | hidden | _training(body, live))
            for parts, live in ((policy.body(), body), (policy.forward(), forward))
        ],
        "update": [always + Counter(policy.update())],
    }
    moments_by_phase["training"] += [
        always + Counter(policy.backward(moment)) + Counter(hidden | _training(body, moment.live))
        for moment in step.training.backward
    ]
    highest = {phase: max(moments, key=Counter.total) for phase, moments in moments_by_phase.items()}
    return {phase: dict(parts) for phase, parts in highest.items()}


def settled(
    size: ModelSize, step: Step, frozen: Sequence[FrozenSize], strategy: Strategy, memory: float | None
) -> Strategy:
    """Return the strategy with the way of gathering that `auto` chooses on devices of so much memory; None for much."""
    if strategy.gather != "auto":
        return strategy
    resident = _always(trained(size, step, strategy), frozen).total()
    fits = memory is None or size.weights <= MAX_MEMORY_SHARE * (memory - resident)
    return replace(strategy, gather="once" if fits else "layerwise")


def peak(phase_parts: Mapping[str, Parts]) -> int:
    """Return the most bytes of any phase."""
    return max(sum(parts.values()) for parts in phase_parts.values())


def host(size: ModelSize, step: Step, frozen: Sequence[FrozenSize], strategy: Strategy) -> int:
    """Return what is offloaded to the host's memory, in bytes per device."""
    parked = sum(model.weights - model.stays for model in frozen if model.placement == "cpu")
    return trained(size, step, strategy).host() + parked


def least_devices(needed: Callable[[int], int], memory: float) -> int | None:
    """Return the fewest devices on which a run fits, None if it fits on none of `COUNTS`.

    Args:
        needed: bytes per device for a number of devices. One more may need more: where there is room at last to gather
            once.
        memory: that each has.
    """
    return next((count for count in COUNTS if needed(count) <= memory), None)


def _always(policy: StrategyMemory, frozen: Sequence[FrozenSize], value: ModelSize | None = None) -> Counter[str]:
    """Return what is there in every phase."""
    step, parts = policy.step, Counter(policy.resident())
    for model in frozen:
        parts[model.name] += _parked(model, policy.strategy)
    if step.keeps_cache:
        parts.update({"KV cache": step.rollout.cache, "packed weights": policy.size.packed})
    if value is not None:
        other = trained(value, step.scaled(value.trainable / policy.size.trainable), policy.strategy)
        # Its gradients too: both models are trained together.
        parts["value model"] = sum(other.resident().values()) + other.update().get("gradients", 0)
    return parts


def _training(body: int, live: int) -> Parts:
    return {"activations": min(body, live), "logits and temporary": max(0, live - body)}


def _shards(model: FrozenSize, strategy: Strategy) -> bool:
    return model.placement == "shard" and strategy.devices > 1


def _parked(model: FrozenSize, strategy: Strategy) -> int:
    """Return what is on a device of a frozen model between its passes."""
    if model.placement == "cpu":
        return model.stays
    return model.weights - model.layers + strategy.share(model.layers) if _shards(model, strategy) else model.weights


def _scoring(policy: StrategyMemory, frozen: Sequence[FrozenSize]) -> Iterator[Parts]:
    """Yield what each pass of the scoring adds, one after the other."""
    step = policy.step
    hidden = {"reference hidden states": step.hidden}
    if step.scoring:
        yield policy.scoring() | hidden | {"logits and temporary": step.scoring}
    yield {"reference hidden states": 4 * step.hidden}  # while parts, put together, are written to their places
    for model in frozen:
        brought = model.weights - model.stays if model.placement == "cpu" else 0
        if _shards(model, policy.strategy):
            brought = 2 * model.layer  # one runs, the next is fetched
        parts = {"frozen model at work": brought, "logits and temporary": model.working}
        yield parts | (hidden if model.name == "reference" else {})
