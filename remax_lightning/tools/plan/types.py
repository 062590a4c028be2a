"""The numbers that the memory of a run is made of: how it is spread, how large its models are, what its passes hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple


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
    gather: Literal["auto", "once", "layerwise"] = "auto"
    touched: bool = False

    @property
    def shards_policy(self) -> bool:
        """Whether a device keeps a part of the policy only."""
        return self.kind == "fsdp2" or (self.kind == "zero" and self.stage == 3)

    def share(self, count: int) -> int:
        """Return a device's part of `count`."""
        return -(-count // self.devices)


class ModelSize(NamedTuple):
    """A model that is trained.

    Args:
        weights: bytes.
        trainable: numbers among them that are trained.
        itemsize: bytes of such a number, and of its gradient.
        largest: bytes of the largest tensor.
        layer: bytes of the largest layer.
        outside: bytes of what belongs to no layer.
        packed: bytes of a second copy of weights that a rollout makes in mixed precision.
    """

    weights: int
    trainable: int
    itemsize: int
    largest: int
    layer: int
    outside: int
    packed: int = 0


class FrozenSize(NamedTuple):
    """A model that only scores.

    Args:
        name: `reference` or `reward model`.
        weights: bytes.
        working: bytes of its pass.
        layers: bytes of all of its layers.
        layer: bytes of the largest.
        placement: where it is between its passes, see `remax_lightning.models.frozen`.
        stays: bytes of what stays on the device under `cpu`.
    """

    name: Literal["reference", "reward model"]
    weights: int
    working: int
    layers: int = 0
    layer: int = 0
    placement: Literal["replicate", "shard", "cpu"] = "replicate"
    stays: int = 0


class RolloutBytes(NamedTuple):
    """A rollout.

    Args:
        cache: keys and values of all rows at full length.
        working: the most that anything else takes, logits among it.
    """

    cache: int
    working: int


class BackwardPeak(NamedTuple):
    """A moment of a backward pass.

    Args:
        live: most bytes since the moment before, without gradients that are stored.
        stored: numbers whose gradients are stored by then.
    """

    live: int
    stored: int


class TrainingBytes(NamedTuple):
    """A forward and backward pass over a micro-batch.

    Args:
        activations: what the body of the model keeps for its backward pass.
        forward: most bytes of the forward pass, logits among them.
        backward: the moments of the backward pass, from first to last; no gradient is stored at the first.
    """

    activations: int
    forward: int
    backward: tuple[BackwardPeak, ...]


class UpdateBytes(NamedTuple):
    """An optimizer: its state, and what an update holds beside it."""

    state: int
    working: int


@dataclass(frozen=True)
class Step:
    """What the passes of a step hold.

    Args:
        rollout: making the responses.
        scoring: bytes of the policy's passes without gradients; 0 where there is none.
        training: the pass with gradients.
        update: the optimizer over whole parameters.
        flat_update: the optimizer over one flat float32 tensor per parameter group, as ZeRO steps it.
        micro_batches: per optimizer step.
        passes: training passes per rollout.
        hidden: bytes of the reference's hidden states that a rollout keeps.
        keeps_cache: the memory of keys and values, and of copies of weights, is kept between rollouts.
    """

    rollout: RolloutBytes
    scoring: int
    training: TrainingBytes
    update: UpdateBytes
    flat_update: UpdateBytes
    micro_batches: int = 1
    passes: int = 1
    hidden: int = 0
    keeps_cache: bool = False

    def scaled(self, factor: float) -> Step:
        """Return it with the optimizer of a model `factor` times as large."""

        def scale(update: UpdateBytes) -> UpdateBytes:
            return UpdateBytes(int(factor * update.state), int(factor * update.working))

        return replace(self, update=scale(self.update), flat_update=scale(self.flat_update))
