"""The reference of the KL: a separate frozen model, or the policy at its start of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from remax_lightning.errors import UserError
from remax_lightning.models import ModelConfig, freeze, initial_adapter
from remax_lightning.models.forward import eval_mode
from remax_lightning.models.frozen import FrozenModel, equalize_passes
from remax_lightning.sharding import full_shape, full_tensor, local_shard, shard_like
from remax_lightning.strategies import forward_is_collective, full_values, unsharded_init
from remax_lightning.training import config_checks as checks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reference(Protocol):
    """The model that the KL compares the policy with.

    Args:
        model: the model; run it inside of `running` only.
    """

    model: PreTrainedModel

    def prepare(self, device: torch.device, *, needs_head: bool) -> None:
        """Move the model to its placement. With `needs_head` its head is also read outside of its passes."""

    def running(self) -> Any:
        """Return a context for forward passes of the reference; all ranks have to enter and leave."""

    def generating(self) -> Any:
        """Return a context for generating responses; ranks may run different numbers of passes."""


class SeparateReference(FrozenModel):
    """A separate frozen model. It is not a submodule, so optimizer, checkpoints and strategies do not see it.

    Args:
        source: where the model comes from.
        strategy: the strategy of the trainer; under any strategy the model is loaded unsharded.
    """

    def __init__(self, source: ModelConfig, strategy: Any) -> None:
        # Full on every rank: its placement is its own, whatever the strategy does to the policy.
        with unsharded_init(strategy):
            model = freeze(source.load("model.reference"))
        super().__init__(model, source.placement, "model.reference.placement")

    def prepare(self, device: torch.device, *, needs_head: bool) -> None:
        """Move the model to its `placement`."""
        # The head is read in training passes, too, for the KL over the vocabulary.
        self.place(device, self.model.get_output_embeddings() if needs_head else None)

    def generating(self) -> Any:
        """Return a context in which the model is unsharded on every rank."""
        return self.unsharded()


class MovingReference:
    """Moves a separate reference to the policy now and then, and knows how often it has.

    Args:
        sync_steps: optimizer steps between two moves.
        alpha: share of the policy in the moved reference; 1.0 copies it.
    """

    def __init__(self, sync_steps: int, alpha: float) -> None:
        self.sync_steps, self.alpha = sync_steps, alpha
        self._num_syncs = 0
        self._loaded: dict[str, Tensor] | None = None  # of a checkpoint, until there is a model

    def check(self, reference: Reference | None, policy: PreTrainedModel) -> None:
        """Refuse what cannot be moved.

        Raises:
            UserError: if the reference shares weights with the policy, is quantized or built otherwise, or if a moving
                average would be rounded away.
        """
        key = "model.kl.reference_sync_steps"
        if not isinstance(reference, SeparateReference):
            raise UserError(
                f"{key} needs a reference with weights of its own: set model.reference beside model.policy.lora"
            )
        targets = dict(cast("nn.Module", reference.model).named_parameters())
        sources = cast("nn.Module", policy).named_parameters()
        if {name: full_shape(value) for name, value in targets.items()} != {
            name: full_shape(value) for name, value in sources
        }:
            raise UserError(
                f"{key} needs a reference with the parameters of the policy, without quantization and adapters:"
                " model.reference and model.policy differ"
            )
        if self.alpha < 1 and {value.dtype for value in targets.values()} != {torch.float32}:
            raise UserError(
                f"model.kl.reference_mixup_alpha {self.alpha} needs model.reference.dtype float32: 16 bits round small"
                " moves away"
            )

    def restore(self, reference: Reference | None) -> None:
        """Put the weights of a checkpoint into the reference, if one was loaded that holds some."""
        if self._loaded is not None:
            targets = dict(cast(Any, reference).model.named_parameters())
            for name, value in self._loaded.items():
                _write(targets[name], value, 1.0)
            self._loaded = None

    def move(self, reference: Reference | None, policy: PreTrainedModel, global_step: int) -> None:
        """Move the reference if it is due after `global_step` optimizer steps; all ranks have to call this."""
        due = global_step // self.sync_steps
        if due <= self._num_syncs:
            return
        self._num_syncs = due
        # One parameter at a time, full on every rank wherever the strategy shards the policy.
        targets = dict(cast(Any, reference).model.named_parameters())
        for name, value in full_values(cast("nn.Module", policy)):
            _write(targets[name], value, self.alpha)

    def state_dict(self, reference: Reference | None) -> dict[str, Any] | None:
        """Return what a checkpoint keeps; None as long as the reference is where it started. All ranks call this."""
        if self._num_syncs == 0 or reference is None:
            return None
        named = cast("nn.Module", reference.model).named_parameters()
        return {"syncs": self._num_syncs, "weights": {name: full_tensor(value.detach()).cpu() for name, value in named}}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Resume with the reference of a checkpoint; `restore` puts it into the model."""
        self._num_syncs, self._loaded = (0, None) if state is None else (state["syncs"], state["weights"])


@torch.no_grad()
def _write(target: Tensor, value: Tensor, alpha: float) -> None:
    """Move a parameter of the reference, or this rank's shard of it, to a full value: (1 - alpha) ref + alpha value."""
    local = local_shard(target)
    value = shard_like(value.to(local.device, local.dtype), target)
    local.copy_(value if alpha == 1 else torch.lerp(local, value, alpha))


class SharedReference:
    """The start of a policy with an adapter; it shares the base weights with the policy.

    Args:
        policy: the policy with its adapter.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        self.model = policy

    def prepare(self, device: torch.device, *, needs_head: bool) -> None:
        """Do nothing: the strategy places the policy."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Switch the policy to its initial adapter inside."""
        policy = cast("nn.Module", self.model)
        with self.generating():
            # Ranks may have different numbers of responses to run, and a pass of a sharded policy is a collective.
            if forward_is_collective(policy):
                with equalize_passes(policy, next(policy.parameters()).device):
                    yield
            else:
                yield

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Switch the policy to its initial adapter inside; rollouts gather it like the policy."""
        with eval_mode(self.model), initial_adapter(cast("nn.Module", self.model)):
            yield


def make_reference(
    source: ModelConfig | None, policy: PreTrainedModel, policy_source: ModelConfig, strategy: Any
) -> Reference | None:
    """Return the reference of a run; None if it has none.

    Args:
        source: `model.reference`.
        policy: the loaded policy.
        policy_source: `model.policy`; with `lora` the reference can be the start of the policy.
        strategy: the strategy of the trainer.
    """
    # With an adapter the base is frozen: switched off, the policy is its own reference, without a second copy.
    if source is None:
        return None if policy_source.lora is None else SharedReference(policy)
    reference = SeparateReference(source, strategy)
    checks.check_vocabularies(policy, reference.model, policy_source.path, source.path)
    return reference
