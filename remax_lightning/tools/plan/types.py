"""Input and output types of the planner: strategy, model sizes, and bytes of the passes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from remax_lightning.models.frozen import Placement
from remax_lightning.strategies.gather_mode import Gather


@dataclass(frozen=True)
class Strategy:
    """The strategy of a run.

    Args:
        kind: `single` or `ddp` with the full policy on every device, DeepSpeed's `zero`, or `fsdp2`.
        devices: number of devices on all nodes.
        stage: stage of ZeRO.
        offload_optimizer: ZeRO stores optimizer and master weights in host memory.
        offload_parameters: ZeRO-3 stores its shards of the weights in host memory, too.
        bucket: elements in a reduction bucket of ZeRO.
        buckets: number of such buckets under ZeRO-1 and 2.
        max_live: elements that ZeRO-3 keeps gathered if it will reuse them.
        prefetch: elements that ZeRO-3 prefetches at once.
        bucket_views: gradients of DDP are views of its buckets.
        sum_itemsize: bytes of a number in which ZeRO sums the gradients of several micro-batches; 0 for that of the
            weights.
        gather: how rollouts gather a sharded policy, once or layer by layer.
        touched: memory counts when it is written, as resident memory of a CPU process does; otherwise when it is
            allocated, as on CUDA.
    """

    kind: Literal["single", "ddp", "zero", "fsdp2"] = "single"  # `ddp` also for `auto` on several devices
    devices: int = 1
    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = 200_000_000
    buckets: int = 2
    max_live: int = 1_000_000_000
    prefetch: int = 50_000_000
    bucket_views: bool = False
    sum_itemsize: int = 0
    gather: Gather = "auto"
    touched: bool = False

    @property
    def shards_policy(self) -> bool:
        """Whether the policy is sharded."""
        return self.kind == "fsdp2" or (self.kind == "zero" and self.stage == 3)

    def share(self, count: int) -> int:
        """Return the share of one device of `count`, rounded up."""
        return -(-count // self.devices)  # 7 on 4 devices -> 2


# ---- Models ----


class ModelSize(NamedTuple):
    """Sizes of a trained model.

    Args:
        weights: bytes of all weights.
        trainable: number of trainable elements.
        itemsize: bytes of a trainable element and of its gradient.
        largest: bytes of the largest tensor.
        layer: bytes of the largest layer.
        outside: bytes of the weights outside the layers.
        cast_copy: bytes of the 16-bit copy of the linear layers' weights that rollouts read in mixed precision.
    """

    weights: int
    trainable: int
    itemsize: int
    largest: int
    layer: int
    outside: int
    cast_copy: int = 0


class FrozenSize(NamedTuple):
    """Sizes of a frozen model.

    Args:
        name: `reference` or `reward model`.
        weights: bytes of all weights.
        working: peak bytes of its forward pass.
        layers: bytes of all layers.
        layer: bytes of the largest layer.
        placement: where it is stored between its passes, see `remax_lightning.models.frozen`.
        stays: bytes that stay on the device under `cpu`.
    """

    name: Literal["reference", "reward model"]
    weights: int
    working: int
    layers: int = 0
    layer: int = 0
    placement: Placement = "replicate"
    stays: int = 0


# ---- Passes of a step ----


class RolloutBytes(NamedTuple):
    """Bytes of a rollout.

    Args:
        cache: keys and values of all rows at full length.
        working: peak of everything else, including logits.
        graphs: the memory that CUDA graphs of the decoding step keep for themselves.
    """

    cache: int
    working: int
    graphs: int = 0


class ServerBytes(NamedTuple):
    """Bytes of a vLLM server that shares the device of the trainer.

    Args:
        weights: of its copy of the policy.
        cache: keys and values of all responses at full length.
        response: keys and values of one response, the least that it needs.
        share: of the device's memory that it takes while it is awake; None on a CPU, where it does not sleep.
    """

    weights: int
    cache: int
    response: int
    share: float | None

    def taken(self, memory: float | None) -> int:
        """Return what it takes of a device's memory; of one that is not known, what a whole rollout needs at once."""
        if memory is None or self.share is None:
            return self.weights + self.cache
        return int(self.share * memory)


class BackwardPeak(NamedTuple):
    """The peak of a backward pass between two stored gradients.

    Args:
        live: peak bytes since the last one, without stored gradients.
        stored: number of elements whose gradients are stored so far.
    """

    live: int
    stored: int


class TrainingBytes(NamedTuple):
    """Bytes of a forward and backward pass over a micro-batch.

    Args:
        activations: activations that the body of the model keeps for its backward pass.
        forward: peak of the forward pass, including logits.
        backward: peaks of the backward pass in order; no gradient is stored at the first.
    """

    activations: int
    forward: int
    backward: tuple[BackwardPeak, ...]


class UpdateBytes(NamedTuple):
    """Bytes of an optimizer: its state, and the temporary memory of an update."""

    state: int
    working: int


@dataclass(frozen=True)
class Step:
    """Bytes of the passes of a step.

    Args:
        rollout: generation of the responses.
        scoring: bytes of the policy's passes without gradients; 0 without such a pass.
        training: the pass with gradients.
        update: the optimizer over full parameters.
        flat_update: the optimizer over one flat float32 tensor per parameter group, as under ZeRO.
        micro_batches: micro-batches per optimizer step.
        passes: training passes per rollout.
        hidden: bytes of the reference's hidden states that a rollout keeps.
        keeps_cache: the key-value cache, copies of weights and graphs are kept between rollouts.
        captures_graphs: the decoding step is captured as CUDA graphs.
        workspaces: bytes that the libraries of a GPU work in.
        server: a vLLM server that shares the device; None without one.
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
    captures_graphs: bool = False
    workspaces: int = 0
    server: ServerBytes | None = None

    @property
    def graphs(self) -> int:
        """Bytes of CUDA graphs; 0 where none are captured."""
        return self.rollout.graphs if self.captures_graphs else 0

    def scaled(self, factor: float) -> Step:
        """Return the step with the optimizer of a model that is `factor` times as large."""

        def scale(update: UpdateBytes) -> UpdateBytes:
            # moments and temporary tensors grow with the parameters
            return UpdateBytes(int(factor * update.state), int(factor * update.working))

        return replace(self, update=scale(self.update), flat_update=scale(self.flat_update))
