"""The planned run: what the planner takes from a configuration. Needs no reader of configurations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

import torch

from remax_lightning.modules import ReMaxModule
from remax_lightning.rewards import ClassifierReward, Reward, WeightedReward
from remax_lightning.rollout import AutoEngine, PairedEngine, VLLMEngine
from remax_lightning.tools.plan.activation_memory import StepShape
from remax_lightning.tools.plan.types import Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {"64": torch.float64, "32": torch.float32, "16": torch.float16, "bf16": torch.bfloat16}
Device: TypeAlias = Literal["cpu", "gpu"]


class PlannedRun(NamedTuple):
    """The planned run, from its configuration.

    Args:
        module: the module, without loaded models.
        work: the work of a device in a step.
        micro_batches: per optimizer step.
        passes: training passes per rollout.
        scores_policy: whether scoring has a pass of the policy, too: for several updates per rollout, or in validation.
        strategy: the strategy, with its devices.
        precision: `trainer.precision`, under its current name in Lightning.
        device: the kind of device.
        tokenizer: the policy's tokenizer; None if it cannot be loaded.
        notes: assumptions about what the configuration leaves open.
    """

    module: ReMaxModule
    work: StepShape
    micro_batches: int
    passes: int
    scores_policy: bool
    strategy: Strategy
    precision: str
    device: Device
    tokenizer: PreTrainedTokenizerBase | None = None
    notes: tuple[str, ...] = ()

    @property
    def default_dtype(self) -> torch.dtype:
        """The dtype of models without a `dtype` of their own."""
        # "bf16-true" -> "bf16", "true"
        number, _, mode = self.precision.partition("-")
        return DTYPES[number] if mode == "true" else torch.float32

    @property
    def policy_dtype(self) -> torch.dtype:
        """The dtype in which the policy is trained; DeepSpeed casts it in mixed precision, too."""
        number = self.precision.partition("-")[0]
        if self.strategy.kind == "zero" and number in ("16", "bf16"):
            return DTYPES[number]
        name = self.module.policy_source.dtype
        return self.default_dtype if name is None else cast(torch.dtype, getattr(torch, name))

    @property
    def is_mixed(self) -> bool:
        """Whether autocast chooses the precision; DeepSpeed casts the weights instead."""
        return "mixed" in self.precision and self.strategy.kind != "zero"

    @property
    def autocast(self) -> Callable[[], AbstractContextManager[Any]]:
        """A function that returns the autocast context of a step."""
        if not self.is_mixed:
            return nullcontext
        number = self.precision.partition("-")[0]
        # Without the cache of cast weights, as Lightning opens it.
        return lambda: torch.autocast("cpu", DTYPES[number], cache_enabled=False)

    @property
    def captures_graphs(self) -> bool:
        """Whether the decoding step is captured as CUDA graphs."""
        engine = self.module.engine
        captures = isinstance(engine, AutoEngine) or (isinstance(engine, PairedEngine) and engine.cuda_graphs)
        return captures and self.device == "gpu"

    @property
    def decodes_elsewhere(self) -> bool:
        """Whether servers write the responses, so that rollouts take no memory of the trainer's devices."""
        return isinstance(self.module.engine, VLLMEngine)

    @property
    def keeps_cache(self) -> bool:
        """Whether the memory of keys and values is kept between rollouts, for the graphs that read it."""
        engine = self.module.engine
        keeps = not isinstance(engine, PairedEngine) or engine.keep_cache
        # Weights that are gathered lie elsewhere in every rollout, and so its graphs end with it.
        return keeps and self.captures_graphs and not self.strategy.shards_policy


def known_reward_models(reward: Reward) -> tuple[list[ClassifierReward], str]:
    """Return the reward models in a reward, and the names of rewards that may hold memory of their own."""
    if isinstance(reward, ClassifierReward):
        return [reward], ""
    if isinstance(reward, WeightedReward):
        parts = [known_reward_models(part) for part in reward.parts.values()]
        return [model for models, _ in parts for model in models], ", ".join(name for _, name in parts if name)
    is_ours = type(reward).__module__.startswith("remax_lightning.")
    return [], "" if is_ours else type(reward).__name__


def reward_models(reward: Reward) -> list[ClassifierReward]:
    """Return the reward models in a reward."""
    return known_reward_models(reward)[0]
