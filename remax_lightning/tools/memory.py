"""The memory of a run, part by part and phase by phase: numbers in, bytes per device out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from remax_lightning.tools.quantities import FrozenModel, ModelSize, Step, Strategy
from remax_lightning.tools.trained import Parts, trained

PHASES = ("rollout", "scoring", "training", "update")
"""Making responses; rewards and log-probs without gradients; the pass with gradients; clipping and the optimizer."""

PARTS = (
    *("policy weights", "gradients", "gradient buffers", "master weights", "optimizer", "value model"),
    *("reference", "reward model", "frozen model at work", "gathered weights", "packed weights"),
    *("KV cache", "reference hidden states", "activations", "logits and temporary"),
)
"""All there are, in the order of a table."""

MOST_DEVICES = 1024
"""More are not tried: by then only what every device holds whole is left."""


def phases(
    size: ModelSize, step: Step, frozen: Mapping[str, FrozenModel], strategy: Strategy, value: ModelSize | None = None
) -> dict[str, Parts]:
    """Return the parts of each phase's peak, in bytes per device.

    Args:
        size: of the policy.
        step: its passes.
        frozen: reference and reward model by name.
        strategy: how they are spread.
        value: of a value model, as PPO trains one beside the policy, its passes after the policy's.
    """
    policy = trained(size, step, strategy)
    always = Counter(policy.resident()) + Counter(_parked(frozen, strategy))
    if value is not None:
        other = trained(value, step.scaled(value.trainable / size.trainable), strategy)
        always["value model"] = sum((other.resident() | other.between()).values())
    kept = {"reference hidden states": step.hidden}
    between = always + Counter(policy.between())
    rollout = {"KV cache": step.rollout.cache, "logits and temporary": step.rollout.working}
    body, forward = step.training.activations, step.training.forward
    found: dict[str, list[Counter[str]]] = {
        "rollout": [between + Counter(policy.rollout() | rollout | {"packed weights": size.packed})],
        "scoring": [between + Counter(each) for each in _scoring(step, frozen, strategy)],
        "training": [
            between + Counter(parts | kept | _training(body, live))
            for parts, live in ((policy.body(), body), (policy.forward(), forward))
        ],
        "update": [always + Counter(policy.update())],
    }
    found["training"] += [
        always + Counter(policy.backward(moment)) + Counter(kept | _training(body, moment.live))
        for moment in step.training.backward
    ]
    highest = {phase: max(moments, key=Counter.total) for phase, moments in found.items()}
    return {phase: dict(parts) for phase, parts in highest.items()}


def peak(found: Mapping[str, Parts]) -> int:
    """Return the most bytes of any phase."""
    return max(sum(parts.values()) for parts in found.values())


def host(size: ModelSize, step: Step, frozen: Mapping[str, FrozenModel], strategy: Strategy) -> int:
    """Return what is offloaded to the host's memory, in bytes per device."""
    parked = sum(model.weights for model in frozen.values()) if strategy.frozen == "cpu" else 0
    return trained(size, step, strategy).host() + parked


def least_devices(needed: Callable[[int], int], memory: float) -> int | None:
    """Return the fewest devices on which a run fits, or None.

    Args:
        needed: bytes per device for a number of devices; not more with more of them.
        memory: that each has.
    """
    if needed(MOST_DEVICES) > memory:
        return None
    low, high = 0, MOST_DEVICES  # it fits on `high`, not on `low`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if needed(middle) <= memory else (middle, high)
    return high


def _training(body: int, live: int) -> Parts:
    return {"activations": min(body, live), "logits and temporary": max(0, live - body)}


def _parked(frozen: Mapping[str, FrozenModel], strategy: Strategy) -> Parts:
    """Return what is on a device of the frozen models between their passes."""
    if strategy.frozen == "cpu":
        return {}
    share = strategy.share if strategy.frozen == "shard" else int
    return {name: share(model.weights) for name, model in frozen.items()}


def _scoring(step: Step, frozen: Mapping[str, FrozenModel], strategy: Strategy) -> Iterator[Parts]:
    """Yield what each pass of the scoring adds, one after the other."""
    yield {"logits and temporary": step.scoring, "reference hidden states": step.hidden}
    yield {"reference hidden states": 4 * step.hidden}  # while parts, put together, are written to their places
    for name, model in frozen.items():
        brought = {"replicate": 0, "shard": model.layer, "cpu": model.weights}[strategy.frozen]
        hidden = step.hidden if name == "reference" else 0
        yield {
            "frozen model at work": brought,
            "logits and temporary": model.working,
            "reference hidden states": hidden,
        }
