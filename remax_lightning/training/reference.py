"""The reference of the KL: a separate frozen model, or the policy at its start of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn

from remax_lightning.models import ModelConfig, freeze, initial_adapter
from remax_lightning.models.forward import eval_mode
from remax_lightning.models.frozen import FrozenModel, equalize_passes
from remax_lightning.strategies import forward_is_collective, unsharded_init
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


class SeparateReference:
    """A separate frozen model. It is not a submodule, so optimizer, checkpoints and strategies do not see it.

    Args:
        source: where the model comes from.
        strategy: the strategy of the trainer; under any strategy the model is loaded unsharded.
    """

    def __init__(self, source: ModelConfig, strategy: Any) -> None:
        self.source = source
        # Full on every rank: its placement is its own, whatever the strategy does to the policy.
        with unsharded_init(strategy):
            self.model = freeze(source.load("model.reference"))
        self._frozen: FrozenModel | None = None

    def prepare(self, device: torch.device, *, needs_head: bool) -> None:
        """Move the model to its `placement`."""
        # Every stage of a trainer comes here again.
        if self._frozen is not None and self._frozen.device == device:
            return
        # Read in training passes, for the KL over the vocabulary
        head = cast("nn.Module", self.model.get_output_embeddings()) if needs_head else None
        self._frozen = FrozenModel(
            cast("nn.Module", self.model), self.source.placement, device, "model.reference.placement", head
        )

    def running(self) -> Any:
        """Return a context for forward passes."""
        if self._frozen is None:
            raise RuntimeError("prepare(device) must be called before the reference is run")
        return self._frozen.running()

    def generating(self) -> Any:
        """Return a context in which the model is unsharded on every rank."""
        if self._frozen is None:
            raise RuntimeError("prepare(device) must be called before the reference generates")
        return self._frozen.unsharded()


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
