"""The memory of a run by phase and part, in bytes per device.

The rules of each strategy give the share of weights, gradients and optimizer state of a device, what it gathers and
when, and which buffers it communicates through.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from remax_lightning.strategies.gather_mode import MAX_MEMORY_SHARE
from remax_lightning.tools.plan.types import BackwardPeak, FrozenSize, ModelSize, Step, Strategy

if TYPE_CHECKING:
    from remax_lightning.tools.plan.model_sizes import Sizes

MASTER = 4
"""Bytes of a float32 number, in which DeepSpeed keeps a copy of the weights, of any dtype."""

Parts = dict[str, int]
"""Bytes by part."""


# ---- The strategies: what a device keeps, gathers and communicates through ----


class StrategyMemory(ABC):
    """The memory that a device needs for a trained model under one of the strategies, without activations."""

    def __init__(self, size: ModelSize, step: Step, strategy: Strategy) -> None:
        self.size, self.step, self.strategy = size, step, strategy
        self.gradients = size.trainable * size.itemsize  # bytes of all gradients
        self.accumulates = step.micro_batches > 1
        self.passes_follow = step.passes > 1  # so that a forward pass finds gradients of the one before it

    @abstractmethod
    def resident(self) -> Parts:
        """Return the parts that exist in every phase."""

    def rollout(self) -> Parts:
        """Return the parts that a rollout adds."""
        return {}

    def scoring(self) -> Parts:
        """Return the parts that a pass without gradients adds."""
        return {}

    def body(self) -> Parts:
        """Return the parts that the forward pass adds before it computes logits."""
        return self.forward()

    def forward(self) -> Parts:
        """Return the parts that the forward pass adds when it computes logits."""
        return self.scoring()

    @abstractmethod
    def backward(self, moment: BackwardPeak) -> Parts:
        """Return the parts that the backward pass adds at a moment."""

    @abstractmethod
    def update(self) -> Parts:
        """Return the parts that the update adds."""

    def host(self) -> int:
        """Return the bytes in the host's memory, per device."""
        return 0


class Replicated(StrategyMemory):
    """One process, or DDP."""

    def resident(self) -> Parts:
        """Weights, optimizer, and DDP's buckets, a second copy of the gradients unless these are views of them."""
        parts = {"policy weights": self.size.weights, "optimizer": self.step.update.state}
        return parts | ({"gradient buffers": self.gradients} if self.strategy.kind == "ddp" else {})

    def forward(self) -> Parts:
        """The gradients of the pass before; none in a rollout's first one, see `ReMaxModule`."""
        return {"gradients": self._stored(self.size.trainable)} if self.passes_follow else {}

    def backward(self, moment: BackwardPeak) -> Parts:
        """The gradients so far; all of them where an earlier micro-batch has left them."""
        return {"gradients": self._stored(self.size.trainable if self.accumulates else moment.stored)}

    def update(self) -> Parts:
        """Gradients, and what the optimizer needs."""
        return {"gradients": self._stored(self.size.trainable), "logits and temporary": self.step.update.working}

    def _stored(self, count: int) -> int:
        return 0 if self.strategy.kind == "ddp" and self.strategy.bucket_views else count * self.size.itemsize


class FullySharded(StrategyMemory):
    """FSDP2: every layer is a group, and what belongs to no layer is one."""

    def resident(self) -> Parts:
        """A share of weights and optimizer."""
        share = self.strategy.share
        return {"policy weights": share(self.size.weights), "optimizer": share(self.step.update.state)}

    def rollout(self) -> Parts:
        """All weights, or those of a layer, the next one and the rest."""
        # A layer runs while the next one is gathered.
        layers = self.size.outside + 2 * self.size.layer
        return {"gathered weights": layers if self.strategy.gather == "layerwise" else self.size.weights}

    def scoring(self) -> Parts:
        """When the logits are made, what belongs to no layer."""
        return {"gathered weights": self.size.outside}

    def forward(self) -> Parts:
        """As much, and a share of the gradients of the pass before."""
        return self.scoring() | ({"gradients": self.strategy.share(self.gradients)} if self.passes_follow else {})

    def backward(self, moment: BackwardPeak) -> Parts:
        """A layer, the next one and the rest; a share of the gradients, and a layer's own on their way."""
        # Gradients of an earlier micro-batch are whole from the start.
        stored = self.size.trainable if self.accumulates else moment.stored
        begun = moment.stored > 0  # before the first gradient, the head and the loss run
        return {
            "gathered weights": self.size.outside + 2 * self.size.layer * begun,
            "gradients": self.strategy.share(stored * self.size.itemsize),
            "gradient buffers": min(self.size.layer, self.gradients) * begun,
        }

    def update(self) -> Parts:
        """A share of the gradients and of what the optimizer needs."""
        share = self.strategy.share
        return {"gradients": share(self.gradients), "logits and temporary": share(self.step.update.working)}


class Zero(StrategyMemory):
    """DeepSpeed's ZeRO-1 and 2, which differ here in the gradients of several micro-batches only."""

    def __init__(self, size: ModelSize, step: Step, strategy: Strategy) -> None:
        super().__init__(size, step, strategy)
        # ---- Shares of one device, in bytes ----
        self.master = strategy.share(MASTER * size.trainable)
        self.state = strategy.share(step.flat_update.state)
        in_float32 = self.accumulates and strategy.sum_itemsize == MASTER
        self.gradient_share = self.master if in_float32 else strategy.share(self.gradients)
        # In float32, stage 2 adds each micro-batch to one flat buffer, from which the optimizer reads.
        self.sums_in_place = in_float32 and strategy.stage == 2
        # What the optimizer needs, and otherwise a float32 copy of the gradients.
        copied = 0 if self.sums_in_place else self.master
        self.working = copied + strategy.share(step.flat_update.working)
        self.on_device = 0 if strategy.offload_optimizer else 1  # 0 if they are in the host's memory

    def resident(self) -> Parts:
        """Weights and a share of optimizer and master weights."""
        parts = {"policy weights": self.size.weights}
        return parts | {"master weights": self.master * self.on_device, "optimizer": self.state * self.on_device}

    def forward(self) -> Parts:
        """The gradients of earlier micro-batches: ZeRO-1 leaves them whole until the last."""
        if not self.accumulates:
            return {}
        return {"gradients": self.gradients if self.strategy.stage == 1 else self.gradient_share * self.on_device}

    def backward(self, moment: BackwardPeak) -> Parts:
        """Buckets; from the first full one on a copy of the one that is reduced, and a share of the gradients."""
        # ---- Gradients of earlier micro-batches ----
        accumulated = 0
        if self.accumulates:  # ZeRO-1 reduces with the last micro-batch only
            whole = self.gradients - moment.stored * self.size.itemsize
            accumulated = whole if self.strategy.stage == 1 else self.gradient_share * self.on_device
        if not moment.stored:
            return {"gradients": accumulated}
        # ---- Buckets, and a copy of the one that is reduced ----
        buffers = self.strategy.buckets * self.strategy.bucket
        buffers = min(buffers, self.size.trainable) if self.strategy.touched else buffers
        copied = self._reduced(moment)
        gradients = accumulated + (self.gradient_share * self.on_device if copied and not self.sums_in_place else 0)
        return {"gradients": gradients, "gradient buffers": (buffers + copied) * self.size.itemsize}

    def _reduced(self, moment: BackwardPeak) -> int:
        """Return the numbers in a bucket that is being reduced; 0 before the first is full."""
        bucket = min(self.strategy.bucket, self.size.trainable)  # elements
        return bucket if moment.stored >= bucket else 0

    def update(self) -> Parts:
        """The share of the gradients, kept until the last parameter group, with what works on it."""
        return {"gradients": self.gradient_share, "logits and temporary": self.working} if self.on_device else {}

    def host(self) -> int:
        """Master weights, optimizer, gradients and what works on them."""
        return 0 if self.on_device else self.master + self.state + self.working + self.gradient_share


class Zero3(Zero):
    """ZeRO-3."""

    def resident(self) -> Parts:
        """A share of everything, the gradients included, and the bucket that they are reduced through."""
        strategy = self.strategy
        bucket = min(strategy.bucket, self.size.trainable) if strategy.touched else strategy.bucket
        return {
            "policy weights": 0 if strategy.offload_parameters else strategy.share(self.size.weights),
            "gradients": self.gradient_share * self.on_device,
            "gradient buffers": bucket * self.size.itemsize,
            "master weights": self.master * self.on_device,
            "optimizer": self.state * self.on_device,
        }

    def rollout(self) -> Parts:
        """All weights; or what belongs to no layer, and a layer with the buffer that it comes in."""
        layers = self.size.outside + 2 * self.size.layer
        return {"gathered weights": layers if self.strategy.gather == "layerwise" else self.size.weights}

    def scoring(self) -> Parts:
        """One tensor at a time."""
        return {"gathered weights": self.size.largest}

    def body(self) -> Parts:
        """What the forward pass has gathered, and the buffer that it came in."""
        buffered = min(self.strategy.prefetch * self.size.itemsize, self.size.weights) if self._knows_order else 0
        return {"gathered weights": self._gathered + buffered}

    def forward(self) -> Parts:
        """What the forward pass has gathered."""
        return {"gathered weights": self._gathered}

    def backward(self, moment: BackwardPeak) -> Parts:
        """What is still gathered, and a copy of the bucket that is reduced."""
        # What has passed is released again; the tensor in use stays.
        gathered = max(self.size.largest, self._gathered - moment.stored * self.size.itemsize)
        return {"gathered weights": gathered, "gradient buffers": self._reduced(moment) * self.size.itemsize}

    @property
    def _knows_order(self) -> bool:
        """Whether weights are fetched ahead: a rollout makes DeepSpeed forget in which order, two passes teach it."""
        return self.step.passes > 2

    @property
    def _gathered(self) -> int:
        most = self.strategy.max_live * self.size.itemsize
        return min(most, self.size.weights) if self._knows_order else self.size.largest

    def update(self) -> Parts:
        """What works on the gradients, which stay where they are."""
        return {"logits and temporary": self.working} if self.on_device else {}

    def host(self) -> int:
        """As ZeRO-2, with the weights where they are offloaded."""
        return super().host() + (self.strategy.share(self.size.weights) if self.strategy.offload_parameters else 0)


KINDS = {"single": Replicated, "ddp": Replicated, "fsdp2": FullySharded}


def make_strategy_memory(size: ModelSize, step: Step, strategy: Strategy) -> StrategyMemory:
    """Return what a device holds of a model that is trained under `strategy`."""
    kind = KINDS.get(strategy.kind, Zero3 if strategy.stage == 3 else Zero)
    return kind(size, step, strategy)


# ---- The phases of a step ----
PHASES = ("rollout", "scoring", "training", "update")
"""Generation; rewards and log-probs without gradients; the pass with gradients; clipping and optimizer."""

PARTS = (
    *("policy weights", "gradients", "gradient buffers", "master weights", "optimizer", "value model"),
    *("reference", "reward model", "frozen model at work", "gathered weights", "16-bit copy"),
    *(
        "vLLM server",
        "KV cache",
        "CUDA graphs",
        "CUDA workspaces",
        "reference hidden states",
        "activations",
        "logits and temporary",
    ),
)
"""All parts, in the order of the table."""

HEADROOM = 0.1
"""Share of a GPU's memory that is left free for CUDA, the communication library and fragmentation."""

COUNTS = (*range(1, 65), *range(72, 1025, 8))
"""Numbers of devices to try. At the largest, only replicated memory matters."""


def phases(
    size: ModelSize,
    step: Step,
    frozen: Sequence[FrozenSize],
    strategy: Strategy,
    value: ModelSize | None = None,
    *,
    memory: float | None = None,
) -> dict[str, Parts]:
    """Return the parts of the peak of each phase, in bytes per device.

    Args:
        size: size of the policy.
        step: its passes.
        frozen: reference and reward models.
        strategy: the strategy; `gather: auto` counts as once, see `resolve_gather_mode`.
        value: size of a value model, which PPO trains beside the policy, with its passes after those of the policy.
        memory: bytes of a device that count, of which a server that shares it takes its part; None where not known.
    """
    # ---- Parts of every phase, and those that several phases share ----
    policy = make_strategy_memory(size, step, strategy)
    always = _resident_parts(policy, frozen, value)
    hidden = {"reference hidden states": step.hidden}
    # Layer by layer, only what is outside the layers is gathered for the whole rollout, and cast once.
    layerwise = strategy.shards_policy and strategy.gather == "layerwise"
    cast_copy = min(size.cast_copy, size.outside // 2) if layerwise else size.cast_copy
    kept = {"KV cache": step.rollout.cache, "16-bit copy": cast_copy}
    # Layers that are gathered one by one are gathered in hooks, which no graph can hold.
    kept |= {} if layerwise or not step.graphs else {"CUDA graphs": step.graphs}
    copies = {} if step.keeps_cache else kept
    rollout = copies | {"logits and temporary": step.rollout.working}
    # ---- A server that shares the device: on a GPU it sleeps but for rollouts, and its weights are on the host ----
    if step.server is not None:
        taken = {"vLLM server": step.server.taken(None if memory is None else memory / (1 - HEADROOM))}
        always += Counter(taken) if step.server.share is None else Counter()
        rollout |= taken if step.server.share is not None else {}
    body, forward = step.training.activations, step.training.forward
    # ---- The moments of each phase that may be its peak ----
    moments_by_phase: dict[str, list[Counter[str]]] = {
        "rollout": [always + Counter(policy.rollout() | rollout)],
        "scoring": [always + Counter(scored) for scored in _scoring_parts(policy, frozen)],
        "training": [
            always + Counter(parts | hidden | _activation_parts(body, live))
            for parts, live in ((policy.body(), body), (policy.forward(), forward))
        ],
        "update": [always + Counter(policy.update())],
    }
    # The backward pass has a moment per gradient that is stored.
    moments_by_phase["training"] += [
        always + Counter(policy.backward(moment)) + Counter(hidden | _activation_parts(body, moment.live))
        for moment in step.training.backward
    ]
    # ---- The highest moment of each ----
    highest = {phase: max(moments, key=Counter.total) for phase, moments in moments_by_phase.items()}
    return {phase: dict(parts) for phase, parts in highest.items()}


def resolve_gather_mode(
    size: ModelSize, step: Step, frozen: Sequence[FrozenSize], strategy: Strategy, memory: float | None
) -> Strategy:
    """Return the strategy with the gather mode that `auto` chooses for this memory; None for unlimited memory."""
    if strategy.gather != "auto":
        return strategy
    resident = _resident_parts(make_strategy_memory(size, step, strategy), frozen).total()
    # As the strategy itself decides: the whole weights beside what is always there.
    fits = memory is None or size.weights + size.cast_copy <= MAX_MEMORY_SHARE * (memory - resident)
    return replace(strategy, gather="once" if fits else "layerwise")


def remax_phases(sizes: Sizes, strategy: Strategy, memory: float | None = None) -> dict[str, Parts]:
    """Return the parts of the peak of each phase; `memory` decides how `gather: auto` gathers."""
    sized = (sizes.policy, sizes.step, sizes.frozen)  # what both calls need
    return phases(*sized, resolve_gather_mode(*sized, strategy, memory), memory=memory)


def ppo_phases(sizes: Sizes, strategy: Strategy, memory: float | None = None) -> dict[str, Parts]:
    """Return the same for PPO with as many prompts and sampled responses and the same strategy."""
    sized = (sizes.policy, sizes.ppo_step, sizes.frozen)
    return phases(*sized, resolve_gather_mode(*sized, strategy, memory), sizes.value, memory=memory)


def peak_bytes(phase_parts: Mapping[str, Parts]) -> int:
    """Return the peak of all phases."""
    return max(sum(parts.values()) for parts in phase_parts.values())


def offloaded_bytes(size: ModelSize, step: Step, frozen: Sequence[FrozenSize], strategy: Strategy) -> int:
    """Return the bytes per device that are offloaded to host memory."""
    parked = sum(model.weights - model.stays for model in frozen if model.placement == "cpu")
    asleep = step.server.weights if step.server is not None and step.server.share is not None else 0
    return make_strategy_memory(size, step, strategy).host() + parked + asleep


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
    if step.workspaces:
        parts["CUDA workspaces"] = step.workspaces
    if step.keeps_cache:
        parts.update({"KV cache": step.rollout.cache, "16-bit copy": policy.size.cast_copy})
        parts.update({"CUDA graphs": step.graphs} if step.graphs else {})
    if value is not None:
        other = make_strategy_memory(value, step.scaled(value.trainable / policy.size.trainable), policy.strategy)
        # Its gradients too, because both models are trained at the same time.
        parts["value model"] = sum(other.resident().values()) + other.update().get("gradients", 0)
    return parts


def _activation_parts(body: int, live: int) -> Parts:
    # What the body keeps are activations; what comes on top are logits and temporary tensors.
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
