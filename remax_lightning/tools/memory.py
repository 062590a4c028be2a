"""The memory of a run, part by part and phase by phase: numbers in, bytes per device out.

Sizes of models and of passes come from `passes.py`. What a strategy adds to them stands here: which share of weights,
gradients and optimizer a device keeps, what it gathers, and which buffers it communicates through.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from remax_lightning.tools.passes import Moment, RolloutBytes, TrainingBytes, UpdateBytes

PHASES = ("rollout", "scoring", "training", "update")
"""Making responses; reward and reference; the pass with gradients; clipping and the optimizer."""

MASTER = 4
"""Bytes of a float32 number, in which DeepSpeed keeps a copy of the weights, of any dtype."""


@dataclass(frozen=True)
class Strategy:
    """How a run is spread over devices.

    Args:
        kind: every device a whole policy (`ddp` averages gradients), DeepSpeed's `zero`, or `fsdp2`.
        devices: in all, over all nodes.
        stage: of ZeRO.
        offload_optimizer: ZeRO keeps optimizer and master weights in the host's memory.
        offload_parameters: ZeRO-3 keeps its parts of the weights there, too.
        bucket: numbers that ZeRO reduces at once.
        buckets: how many such buffers ZeRO-1 and 2 have.
        max_live: numbers that ZeRO-3 keeps gathered where it knows that they are used again.
        prefetch: numbers that ZeRO-3 fetches ahead at once.
        bucket_views: DDP's gradients are views of its buckets.
        gather: whether a policy in parts is whole on every device for a rollout, or layer by layer.
        frozen: whether reference and reward model are whole on every device, in parts, or in the host's memory until
            their pass.
        touched: memory counts when it is written to, as resident memory of a CPU process does; otherwise when it is
            asked for, as on CUDA.
    """

    kind: Literal["single", "ddp", "zero", "fsdp2"] = "single"
    devices: int = 1
    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = 200_000_000
    buckets: int = 2
    max_live: int = 1_000_000_000
    prefetch: int = 50_000_000
    bucket_views: bool = False
    gather: Literal["once", "layerwise"] = "once"
    frozen: Literal["replicate", "shard", "cpu"] = "replicate"
    touched: bool = False

    @property
    def shards_policy(self) -> bool:
        """Whether a device keeps a part of the policy only."""
        return self.kind == "fsdp2" or (self.kind == "zero" and self.stage == 3)

    def share(self, count: int) -> int:
        """Return a device's part of `count`."""
        return -(-count // self.devices)


class ModelSize(NamedTuple):
    """A model that is trained, in numbers, not bytes.

    Args:
        parameters: of it.
        trainable: those of them that are trained.
        itemsize: bytes of a weight and of its gradient.
        largest: its largest tensor.
        layer: its largest layer.
        outside: parameters that belong to no layer.
        packed: weights of which a rollout makes a second copy (on a CPU, in float32).
    """

    parameters: int
    trainable: int
    itemsize: int
    largest: int
    layer: int
    outside: int
    packed: int = 0


class FrozenModel(NamedTuple):
    """A model that only scores.

    Args:
        weights: bytes.
        working: bytes of its pass.
        layer: bytes of its largest layer.
    """

    weights: int
    working: int
    layer: int = 0


@dataclass(frozen=True)
class Step:
    """What the passes of a step hold.

    Args:
        rollout: making the responses.
        scoring: bytes of a pass of the policy without gradients; 0 where there is none.
        training: the pass with gradients.
        update: the optimizer over whole parameters.
        flat_update: the optimizer over one flat float32 tensor per parameter group, as ZeRO steps it.
        micro_batches: per optimizer step.
        passes: training passes per rollout.
        hidden: bytes of the reference's hidden states that a rollout keeps.
    """

    rollout: RolloutBytes
    scoring: int
    training: TrainingBytes
    update: UpdateBytes
    flat_update: UpdateBytes
    micro_batches: int = 1
    passes: int = 1
    hidden: int = 0


Parts = dict[str, int]
"""Bytes by part."""


class Trained(ABC):
    """A model that is trained under one of the strategies: what a device holds of it beside activations."""

    def __init__(self, size: ModelSize, step: Step, strategy: Strategy) -> None:
        self.size, self.step, self.strategy = size, step, strategy
        self.weights = size.parameters * size.itemsize
        self.gradients = size.trainable * size.itemsize

    @abstractmethod
    def resident(self) -> Parts:
        """Return what is there in every phase."""

    def between(self) -> Parts:
        """Return what else is left of the step before, until the backward pass begins."""
        return {}

    def rollout(self) -> Parts:
        """Return what else a rollout needs."""
        return {}

    def body(self) -> Parts:
        """Return what else the forward pass needs before it makes logits."""
        return self.forward()

    def forward(self) -> Parts:
        """Return what else the forward pass needs when it makes logits."""
        return {}

    @abstractmethod
    def backward(self, moment: Moment, first: bool) -> Parts:
        """Return what else is there at a moment of the backward pass; `first`: no gradient has been stored yet."""

    @abstractmethod
    def update(self) -> Parts:
        """Return what else the update needs."""

    def host(self) -> int:
        """Return the bytes in the host's memory, per device."""
        return 0


class Replicated(Trained):
    """One process, or DDP."""

    def resident(self) -> Parts:
        """Weights, optimizer, and DDP's buckets, a second copy of the gradients unless these are views of them."""
        found = {"policy weights": self.weights, "optimizer": self.step.update.state}
        return found | ({"gradient buffers": self.gradients} if self.strategy.kind == "ddp" else {})

    def between(self) -> Parts:
        """The gradients of the step before: Lightning drops them after the next forward pass, rollout included."""
        return {"gradients": self._stored(self.size.trainable)}

    def backward(self, moment: Moment, first: bool) -> Parts:
        """The gradients so far; all of them where an earlier micro-batch has left them."""
        return {"gradients": self._stored(self.size.trainable if self.step.micro_batches > 1 else moment.stored)}

    def update(self) -> Parts:
        """Gradients, and what the optimizer needs."""
        return {"gradients": self._stored(self.size.trainable), "temporary": self.step.update.working}

    def _stored(self, count: int) -> int:
        return 0 if self.strategy.kind == "ddp" and self.strategy.bucket_views else count * self.size.itemsize


class FullySharded(Trained):
    """FSDP2: every layer is a group, and what belongs to no layer is one."""

    def resident(self) -> Parts:
        """A share of weights and optimizer."""
        share = self.strategy.share
        return {"policy weights": share(self.weights), "optimizer": share(self.step.update.state)}

    def between(self) -> Parts:
        """A share of the gradients of the step before."""
        return {"gradients": self.strategy.share(self.gradients)}

    def rollout(self) -> Parts:
        """All weights, or those of a layer, the next one and the rest."""
        if self.strategy.gather == "once":
            return {"gathered weights": self.weights}
        return {"gathered weights": (self.size.outside + 2 * self.size.layer) * self.size.itemsize}

    def forward(self) -> Parts:
        """When the logits are made, what belongs to no layer."""
        return {"gathered weights": self.size.outside * self.size.itemsize}

    def backward(self, moment: Moment, first: bool) -> Parts:
        """A layer, the next one and the rest; a share of the gradients, and a layer's own on their way."""
        gathered = self.size.outside + (0 if first else 2 * self.size.layer)
        stored = self.size.trainable if self.step.micro_batches > 1 else moment.stored
        passing = 0 if first else self.size.layer
        return {
            "gathered weights": gathered * self.size.itemsize,
            "gradients": self.strategy.share(stored * self.size.itemsize),
            "gradient buffers": passing * self.size.itemsize,
        }

    def update(self) -> Parts:
        """A share of the gradients and of what the optimizer needs."""
        share = self.strategy.share
        return {"gradients": share(self.gradients), "temporary": share(self.step.update.working)}


class Zero(Trained):
    """DeepSpeed's ZeRO-1 and 2, which differ here in the gradients of several micro-batches only."""

    def __init__(self, size: ModelSize, step: Step, strategy: Strategy) -> None:
        super().__init__(size, step, strategy)
        share = strategy.share
        self.master, self.state = share(MASTER * size.trainable), share(step.flat_update.state)
        self.working = share(MASTER * size.trainable) + share(step.flat_update.working)
        """A float32 copy of the gradients, and what the optimizer needs."""
        self.on_device = 0 if strategy.offload_optimizer else 1

    def resident(self) -> Parts:
        """Weights and a share of optimizer and master weights."""
        found = {"policy weights": self.weights}
        return found | {"master weights": self.master * self.on_device, "optimizer": self.state * self.on_device}

    def forward(self) -> Parts:
        """The gradients of earlier micro-batches: ZeRO-1 leaves them whole until the last."""
        if self.step.micro_batches == 1:
            return {}
        return {"gradients": self.gradients if self.strategy.stage == 1 else self.strategy.share(self.gradients)}

    def backward(self, moment: Moment, first: bool) -> Parts:
        """Buckets; from the first full one on a copy of the one that is reduced, and a share of the gradients."""
        share, accumulated = self.strategy.share(self.gradients), 0
        if self.step.micro_batches > 1:  # ZeRO-1 reduces with the last micro-batch only
            whole = self.gradients - moment.stored * self.size.itemsize
            accumulated = whole if self.strategy.stage == 1 else share
        if first:
            return {"gradients": accumulated}
        bucket, numbers = self.strategy.bucket, self.size.trainable
        buffers = self.strategy.buckets * bucket
        buffers = min(buffers, numbers) if self.strategy.touched else buffers
        reduces = moment.stored >= min(bucket, numbers)
        copied = min(bucket, numbers) if reduces else 0
        gradients = accumulated + (share if reduces else 0)
        return {"gradients": gradients, "gradient buffers": (buffers + copied) * self.size.itemsize}

    def update(self) -> Parts:
        """The share of the gradients, kept until the last parameter group, with what works on it."""
        share = self.strategy.share(self.gradients)
        return {"gradients": share, "temporary": self.working} if self.on_device else {}

    def host(self) -> int:
        """Master weights, optimizer, gradients and what works on them."""
        return 0 if self.on_device else self.master + self.state + self.working + self.strategy.share(self.gradients)


class Zero3(Zero):
    """ZeRO-3."""

    def resident(self) -> Parts:
        """A share of everything, the gradients included, and the bucket that they are reduced through."""
        share, strategy = self.strategy.share, self.strategy
        bucket = min(strategy.bucket, self.size.trainable) if strategy.touched else strategy.bucket
        return {
            "policy weights": 0 if strategy.offload_parameters else share(self.weights),
            "gradients": share(self.gradients) * self.on_device,
            "gradient buffers": bucket * self.size.itemsize,
            "master weights": self.master * self.on_device,
            "optimizer": self.state * self.on_device,
        }

    def rollout(self) -> Parts:
        """All weights, or a layer's."""
        gathered = self.size.parameters if self.strategy.gather == "once" else self.size.layer
        return {"gathered weights": gathered * self.size.itemsize}

    def body(self) -> Parts:
        """What the forward pass has gathered, and the buffer that it came in."""
        buffered = min(self.strategy.prefetch, self.size.parameters) if self._knows_order else 0
        return {"gathered weights": (self._gathered + buffered) * self.size.itemsize}

    def forward(self) -> Parts:
        """What the forward pass has gathered."""
        return {"gathered weights": self._gathered * self.size.itemsize}

    def backward(self, moment: Moment, first: bool) -> Parts:
        """What is still gathered, and a copy of the bucket that is reduced."""
        gathered = max(self.size.largest, self._gathered - moment.stored)
        reduces = moment.stored >= min(self.strategy.bucket, self.size.trainable)
        copied = min(self.strategy.bucket, self.size.trainable) if reduces else 0
        weights, copy = gathered * self.size.itemsize, copied * self.size.itemsize
        return {"gathered weights": weights, "reduced gradients": copy}

    @property
    def _knows_order(self) -> bool:
        """Whether weights are fetched ahead: a rollout makes DeepSpeed forget in which order, two passes teach it."""
        return self.step.passes > 2

    @property
    def _gathered(self) -> int:
        return min(self.strategy.max_live, self.size.parameters) if self._knows_order else self.size.largest

    def update(self) -> Parts:
        """What works on the gradients, which stay where they are."""
        return {"temporary": self.working} if self.on_device else {}

    def host(self) -> int:
        """As ZeRO-2, with the weights where they are offloaded."""
        return super().host() + (self.strategy.share(self.weights) if self.strategy.offload_parameters else 0)


TRAINED = {"single": Replicated, "ddp": Replicated, "fsdp2": FullySharded}


def trained(size: ModelSize, step: Step, strategy: Strategy) -> Trained:
    """Return what a device holds of a model that is trained under `strategy`."""
    kind = TRAINED.get(strategy.kind, Zero3 if strategy.stage == 3 else Zero)
    return kind(size, step, strategy)


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
        other = trained(value, step, strategy)
        always["value model"] = sum((other.resident() | other.between()).values())
    kept = {"reference hidden states": step.hidden}
    between = always + Counter(policy.between())
    rollout = {"KV cache": step.rollout.cache, "logits and temporary": step.rollout.working}
    body, forward = step.training.activations, step.training.forward
    found = {
        "rollout": [between + Counter(policy.rollout() | rollout | {"packed weights": size.packed})],
        "scoring": [between + Counter(each) for each in _scoring(step, frozen, strategy)],
        "training": [
            between + Counter(parts | kept | _training(body, live))
            for parts, live in ((policy.body(), body), (policy.forward(), forward))
        ],
        "update": [always + Counter(policy.update())],
    }
    for index, moment in enumerate(step.training.backward):
        parts = policy.backward(moment, index == 0)
        found["training"].append(always + Counter(parts) + Counter(kept | _training(body, moment.live)))
    return {phase: dict(max(moments, key=Counter.total)) for phase, moments in found.items()}


def peak(found: Mapping[str, Parts]) -> int:
    """Return the most bytes of any phase."""
    return max(sum(parts.values()) for parts in found.values())


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
    for name, model in frozen.items():
        brought = {"replicate": 0, "shard": model.layer, "cpu": model.weights}[strategy.frozen]
        hidden = step.hidden if name == "reference" else 0
        yield {
            "frozen model at work": brought,
            "logits and temporary": model.working,
            "reference hidden states": hidden,
        }
