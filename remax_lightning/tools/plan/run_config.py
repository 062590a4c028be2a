"""Read the run that `remax plan` computes from the arguments of `remax fit`, without devices or weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, StrategyRegistry

from remax_lightning.cli_run import RemaxCLI, run
from remax_lightning.errors import UserError
from remax_lightning.modules import ReMaxModule
from remax_lightning.rewards import ClassifierReward
from remax_lightning.rollout import VLLMEngine
from remax_lightning.rollout.vllm_process import memory_share
from remax_lightning.strategies import ReMaxDeepSpeedStrategy, strategy_of_name
from remax_lightning.strategies.deepspeed import sums_in
from remax_lightning.tools.plan.activation_memory import StepShape
from remax_lightning.tools.plan.planned_run import DTYPES, Device, PlannedRun, known_reward_models
from remax_lightning.tools.plan.types import Strategy
from remax_lightning.training.config_checks import check_quantization
from remax_lightning.training.experience import check_budget
from remax_lightning.training.rollouts import UpdatePlan, plan_update

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Lightning still takes these names of its versions before 2.0.
OLD_PRECISIONS = {"None": "32-true", "64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


class PlanCLI(RemaxCLI):
    """Reads a configuration as `remax fit` does; makes module and data, which load nothing yet, but no trainer."""

    def _set_seed(self) -> None:
        """Do nothing: the planner draws no random numbers."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:  # noqa: ARG002
        """Make no trainer: it would require the devices that are planned for."""
        return cast(Trainer, None)

    def _last_checkpoint(self) -> None:
        """Do nothing: no checkpoint is read."""

    def _requeued_checkpoint(self) -> None:
        """Return none: there is no trainer that a requeued job of SLURM could go on with."""

    def _choose_checkpointing(self) -> None:
        """Do nothing: the planner decides by the memory that it is told."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Do nothing: only the objects are needed."""


def read_run(args: Sequence[str]) -> PlannedRun:
    """Read the arguments of `remax fit`.

    Raises:
        UserError: if the run cannot be planned.
    """
    # ---- The objects of the run, without a trainer ----
    cli = run(["fit", *args], PlanCLI)
    return planned_run(cli.config_init["fit"]["trainer"], cli.model, cli.datamodule)


def planned_run(trainer: Mapping[str, Any], module: Any, data: Any) -> PlannedRun:
    """Return the run of a module and its data.

    Args:
        trainer: arguments of the trainer.
        module: without loaded models.
        data: of the run.

    Raises:
        UserError: if the run cannot be planned.
    """
    if not isinstance(module, ReMaxModule):
        raise UserError(f"model: remax plan is for ReMaxModule, got {type(module).__name__}")
    # ---- Devices and strategy ----
    device: Device = "cpu" if trainer["accelerator"] == "cpu" else "gpu"
    devices, note = _devices(trainer["devices"], device)
    made = strategy_of_name(trainer["strategy"]) or trainer["strategy"]
    strategy = read_strategy(made, devices * trainer["num_nodes"], touched=device == "cpu")
    check_quantization(module.policy_source, made)
    # ---- Passes, and rewards with memory of their own ----
    accumulate, splits = trainer["accumulate_grad_batches"], _passes(module, data)
    known, unknown = known_reward_models(module.reward)
    unknown_note = f"the memory of {unknown} is not known and counts as none" if unknown else ""
    server_note = _server_note(module.engine, device)
    return PlannedRun(
        module=module,
        work=_step_shape(module, data, known),
        micro_batches=splits if _token_budget(data) else accumulate,
        passes=splits,
        scores_policy=_update_plan(module, data, accumulate).runs_policy_before_training or _has_validation(data),
        strategy=strategy,
        precision=_precision(trainer["precision"]),
        device=device,
        tokenizer=_tokenizer(data),
        notes=tuple(text for text in (note, unknown_note, server_note) if text),
    )


def _server_note(engine: Any, device: Device) -> str:
    """Return how a vLLM server that shares the device is counted; empty without one."""
    if not (isinstance(engine, VLLMEngine) and engine.mode == "colocate"):
        return ""
    if device == "cpu":
        return (
            "the vLLM server counts as its weights and the keys and values of all responses, not VLLM_CPU_KVCACHE_SPACE"
        )
    return (
        f"the vLLM server counts as {memory_share(engine.server_args):g} of --memory in a rollout, without --memory as"
        " its weights and the keys and values of all responses; what stays while it sleeps is not known"
    )


def _token_budget(data: Any) -> int | None:
    return getattr(data, "tokens_per_micro_batch", None)


def _passes(module: ReMaxModule, data: Any) -> int:
    """Return the training passes of a rollout; with a budget of tokens as many as the longest rows need.

    Raises:
        UserError: if the longest prompt with its responses exceeds the budget.
    """
    if _token_budget(data) is None:
        return int(getattr(data, "num_micro_batches", 1))
    return math.ceil(int(data.batch_size) / _prompts_per_pass(module, data))


def _prompts_per_pass(module: ReMaxModule, data: Any) -> int:
    """Return the prompts of a training pass; with a budget of tokens as many of the longest as fit."""
    budget, sampling = _token_budget(data), module.sampling
    if budget is None:
        return int(data.batch_size // getattr(data, "num_micro_batches", 1))
    check_budget(budget, data.max_prompt_length, sampling.max_response_length, sampling.num_samples)
    longest = sampling.num_samples * (data.max_prompt_length + sampling.max_response_length)
    return min(int(data.batch_size), budget // int(longest))


def _update_plan(module: ReMaxModule, data: Any, accumulate: int) -> UpdatePlan:
    """Return the plan of an update that the run itself makes when it starts."""
    has_reference = module.reference_source is not None or module.policy_source.lora is not None
    return plan_update(
        module.objective,
        getattr(data, "num_micro_batches", 1),
        accumulate,
        kl_coef=module.kl_coef,
        has_reference=has_reference,
        has_token_budget=_token_budget(data) is not None,
    )


def _step_shape(module: ReMaxModule, data: Any, rewards: list[ClassifierReward]) -> StepShape:
    for name in ("batch_size", "max_prompt_length"):
        if not isinstance(getattr(data, name, None), int):
            raise UserError(
                f"data: remax plan needs {name} of the DataModule, and {type(data).__name__} has none; give it an"
                " attribute of that name"
            )
    sampling, kl = module.sampling, module.objective.kl_config
    responses = data.batch_size * sampling.num_samples  # S
    trained = _prompts_per_pass(module, data) * sampling.num_samples  # responses per training pass
    scored = responses if _has_validation(data) else trained  # validation takes a batch in one pass
    texts = responses + (data.batch_size if module.objective.needs_greedy else 0)  # a greedy response per prompt
    # Only if every reward model has a limit, the longest text is known.
    limits = [reward.max_length for reward in rewards if reward.max_length is not None]
    return StepShape(
        prompts=data.batch_size,
        sampling=sampling,
        prompt_length=data.max_prompt_length,
        training_rows=trained,
        scoring_rows=scored,
        reference_rows=kl.reference_batch_size or (trained if _token_budget(data) else scored),
        reward_rows=min(texts, max((reward.batch_size for reward in rewards), default=0)),
        reward_length=max(limits) if rewards and len(limits) == len(rewards) else None,
    )


def _tokenizer(data: Any) -> PreTrainedTokenizerBase | None:
    try:
        return cast("PreTrainedTokenizerBase | None", getattr(data, "tokenizer", None))
    except UserError:  # a plan needs it for the masks of tokens that are not drawn only
        return None


def _has_validation(data: Any) -> bool:
    return getattr(data, "val_path", None) is not None or getattr(data, "val_size", 0) != 0


def _devices(value: Any, device: str) -> tuple[int, str]:
    """Return how many devices a node has, and a note where the configuration does not say."""
    # [0, 1], 2, "2", "0,1" say how many; "auto" and -1 do not
    if isinstance(value, list):
        return len(value), ""
    text = str(value)
    if re.fullmatch(r"[1-9]\d*", text):
        return int(text), ""
    if "," in text:
        return len([part for part in text.split(",") if part.strip()]), ""
    count = max(1, torch.cuda.device_count()) if device == "gpu" else 1
    return count, f"trainer.devices is {text}: planned for {count}, as this machine has; set it for others"


def _precision(value: Any) -> str:
    precision = OLD_PRECISIONS.get(str(value), str(value))
    number, _, mode = precision.partition("-")
    if number not in DTYPES or mode not in ("true", "mixed"):
        raise UserError(
            f"trainer.precision: remax plan knows 32-true, bf16-true, bf16-mixed and the like, got {precision}"
        )
    return precision


def read_strategy(strategy_class: Any, devices: int, *, touched: bool) -> Strategy:
    """Return the planner's description of a strategy.

    Args:
        strategy_class: `trainer.strategy`: a name or an object.
        devices: in all.
        touched: see `Strategy`.

    Raises:
        UserError: if the strategy is not supported.
    """
    # ---- A name, such as "ddp", stands for a strategy ----
    if isinstance(strategy_class, str) and strategy_class in StrategyRegistry.available_strategies():
        strategy_class = StrategyRegistry.get(strategy_class)
    # ---- By its class ----
    if type(strategy_class) is DDPStrategy:
        views = bool(strategy_class._ddp_kwargs.get("gradient_as_bucket_view"))
        return Strategy("ddp", devices, bucket_views=views, touched=touched)
    if isinstance(strategy_class, DeepSpeedStrategy):
        return _zero_strategy(strategy_class, devices, touched)
    if isinstance(strategy_class, ModelParallelStrategy):
        return Strategy("fsdp2", devices, gather=getattr(strategy_class, "gather", "auto"), touched=touched)
    if strategy_class == "auto" or type(strategy_class).__name__ == "SingleDeviceStrategy":
        return Strategy("single" if devices == 1 else "ddp", devices, touched=touched)
    name = strategy_class if isinstance(strategy_class, str) else type(strategy_class).__name__
    raise UserError(
        f"trainer.strategy: remax plan knows auto, ddp, ReMaxDeepSpeedStrategy and ReMaxFSDP2Strategy, got {name!r}"
    )


def _zero_strategy(value: DeepSpeedStrategy, devices: int, touched: bool) -> Strategy:
    # ---- DeepSpeed's configuration, and its defaults where that says nothing ----
    config = cast("dict[str, Any]", value.config)
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(f"trainer.strategy.init_args.stage: remax plan knows stages 1, 2 and 3 of ZeRO, got {stage}")

    def offloads(key: str) -> bool:
        return bool(zero.get(key, {}).get("device", "none") != "none")

    return Strategy(
        "zero",
        devices,
        stage=stage,
        offload_optimizer=offloads("offload_optimizer"),
        offload_parameters=offloads("offload_param"),
        bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
        max_live=int(zero.get("stage3_max_live_parameters", 1_000_000_000)),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
        buckets=2 if zero.get("overlap_comm", stage == 3) else 1,
        gather=getattr(value, "gather", "auto"),
        sum_itemsize=4 if isinstance(value, ReMaxDeepSpeedStrategy) and sums_in(config) == "fp32" else 0,
        touched=touched,
    )
