"""The reference: what the policy is kept close to, a model of its own or the policy as it was when training began."""

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
    """What gives log-probs to compare the policy's with.

    Args:
        model: what is run; not to be run but inside of `running`.
    """

    model: PreTrainedModel

    def prepare(self, device: torch.device, *, needs_head: bool) -> None:
        """Take the model to where it is kept. With `needs_head` its head is read outside of its passes too."""

    def running(self) -> Any:
        """Return a context in which the model is the reference; all ranks have to enter and leave."""

    def generating(self) -> Any:
        """Return one in which it can write responses, with as many passes as each rank needs."""


class SeparateReference:
    """A frozen model beside the policy. No part of the module tree: no optimizer, checkpoint or reduction meets it.

    Args:
        source: where it comes from.
        strategy: the trainer's; whatever it is, the model is loaded whole.
    """

    def __init__(self, source: ModelConfig, strategy: Any) -> None:
        self.source = source
        with unsharded_init(strategy):
            self.model = freeze(source.load("model.reference"))
        self._frozen: FrozenModel | None = None

    def prepare(self, device: torch.device, *, needs_head: bool) -> None:
        """Take the model to where `placement` keeps it."""
        if self._frozen is not None and self._frozen.device == device:
            return
        head = cast("nn.Module", self.model.get_output_embeddings()) if needs_head else None
        self._frozen = FrozenModel(
            cast("nn.Module", self.model), self.source.placement, device, "model.reference.placement", head
        )

    def running(self) -> Any:
        """Return a context in which the model can be run."""
        return self._require_frozen().running()

    def generating(self) -> Any:
        """Return a context in which the model is whole on every rank."""
        return self._require_frozen().unsharded()

    def _require_frozen(self) -> FrozenModel:
        if self._frozen is None:
            raise RuntimeError("prepare(device) must be called before the reference is run")
        return self._frozen


class SharedReference:
    """An adapted policy as it was when training began; base and memory are shared with the policy of now.

    Args:
        policy: with an adapter around it.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        self.model = policy

    def prepare(self, device: torch.device, *, needs_head: bool) -> None:
        """Do nothing: the policy is where its strategy has it."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Take the policy back to its start inside."""
        policy = cast("nn.Module", self.model)
        with self.generating():
            if forward_is_collective(policy):
                with equalize_passes(policy, next(policy.parameters()).device):
                    yield
            else:
                yield

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Take the policy back to its start inside; a rollout gathers it as one of the policy does."""
        with eval_mode(self.model), initial_adapter(cast("nn.Module", self.model)):
            yield


def make_reference(
    source: ModelConfig | None, policy: PreTrainedModel, policy_source: ModelConfig, strategy: Any
) -> Reference | None:
    """Return the reference of a run, or None where it has none.

    Args:
        source: `model.reference`.
        policy: the loaded policy.
        policy_source: `model.policy`; with `lora` it needs no other reference.
        strategy: the trainer's.
    """
    if source is None:
        return None if policy_source.lora is None else SharedReference(policy)
    reference = SeparateReference(source, strategy)
    checks.check_vocabularies(policy, reference.model, policy_source.path, source.path)
    return reference
