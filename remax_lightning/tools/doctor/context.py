"""What the checks read, module, data and models as `remax fit` loads them, and what they return: a finding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, StrategyRegistry
from torch import Tensor

from remax_lightning.cli_run import RemaxCLI, run
from remax_lightning.errors import UserError
from remax_lightning.modules.base import BaseModule
from remax_lightning.modules.policy import PolicyModule
from remax_lightning.rewards import Reward
from remax_lightning.training.worker import RolloutWorker
from remax_lightning.types import PreferenceBatch, PromptBatch, Rollout, SupervisedBatch

Status = Literal["pass", "warn", "fail", "skip"]
"""`skip` if a check does not apply, or needs something that could not be loaded."""


LARGE_KL = 0.5
"""KL in nats per token above which two distributions belong to different policies. Training seldom moves a policy
further."""


class Finding(NamedTuple):
    """What a check found.

    Args:
        status: `pass`, `warn`, `fail` or `skip`.
        measured: what was measured, with its figures.
        fix: what to do; empty if nothing has to be done.
        values: the figures by name, for `--json`.
    """

    status: Status
    measured: str
    fix: str = ""
    values: dict[str, float] = {}  # noqa: RUF012 (never written to)


class NotApplicable(Exception):  # noqa: N818 (nothing went wrong)
    """Raised by a check that does not apply to this run; the message says why."""


class Tolerance(NamedTuple):
    """Limits of a difference: below `rounding` a check passes, above `fault` it fails, in between it warns.

    Args:
        rounding: the largest difference that passes.
        fault: the largest that does not fail.
    """

    rounding: float
    fault: float

    def status(self, difference: float) -> Status:
        """Return the status for a difference; NaN fails."""
        if difference <= self.rounding:
            return "pass"
        return "warn" if difference <= self.fault else "fail"


def worst(findings: list[Finding]) -> Finding:
    """Combine the findings of one check: the worst status, with the texts of the findings that have it."""
    # the worst first
    order: tuple[Status, ...] = ("fail", "warn", "pass", "skip")
    status = min((finding.status for finding in findings), key=order.index)
    worst_findings = [finding for finding in findings if finding.status == status]
    return Finding(
        status,
        "; ".join(dict.fromkeys(finding.measured for finding in worst_findings)),
        "; ".join(dict.fromkeys(finding.fix for finding in worst_findings if finding.fix)),
        {name: value for finding in findings for name, value in finding.values.items()},
    )


def first_rows(loader: Iterable[Any], count: int, pad_id: int) -> PromptBatch | SupervisedBatch | PreferenceBatch:
    """Return the first `count` rows of a loader as one batch; all rows if there are fewer.

    Args:
        loader: yields batches. A rollout batch that arrives in several micro-batches counts once.
        count: number of rows.
        pad_id: token id of the padding.

    Raises:
        UserError: if the loader yields nothing, or something other than a batch of this package.
    """
    batches: list[Any] = []
    for batch in loader:
        if not isinstance(batch, PromptBatch | SupervisedBatch | PreferenceBatch):
            raise UserError(
                f"data: its loader yields a {type(batch).__name__}; expected PromptBatch, SupervisedBatch or"
                " PreferenceBatch of remax_lightning.types"
            )
        # later micro-batches repeat the prompts of the first
        if getattr(batch, "micro_batch_index", 0) == 0:
            batches.append(batch)
        if sum(len(item.prompts) for item in batches) >= count:
            break
    if not batches:
        raise UserError("data: its training loader yields no batch; give more rows, or lower data.batch_size")
    return cast(PromptBatch, _first_n(_concatenate(batches, pad_id), count))


def _concatenate(batches: Sequence[Any], pad_id: int) -> Any:
    """Return batches of one type as a single batch."""
    first = batches[0]
    fields: dict[str, Any] = {}
    for name in first._fields:
        values = [getattr(batch, name) for batch in batches]
        if isinstance(values[0], Tensor) and values[0].dim() == 2:
            # Prompts are padded on the left, responses on the right.
            fields[name] = _pad_and_concatenate(values, 0 if name.endswith("mask") else pad_id, left="prompt" in name)
        elif isinstance(values[0], Tensor):
            # [B_i] each, such as margins
            fields[name] = torch.cat(values)
        elif isinstance(values[0], list):
            fields[name] = [item for value in values for item in value]
    return type(first)(**fields)  # the fields about micro-batches keep their defaults


def _pad_and_concatenate(values: Sequence[Tensor], fill: int, *, left: bool) -> Tensor:
    # [B_i, L_i] each -> [sum of B_i, largest L_i]
    width = max(value.shape[1] for value in values)
    missing = [width - value.shape[1] for value in values]
    padded = [
        torch.nn.functional.pad(value, (lacks, 0) if left else (0, lacks), value=fill)
        for value, lacks in zip(values, missing, strict=True)
    ]
    return torch.cat(padded)


def _first_n(batch: Any, count: int) -> Any:
    fields = {name: value[:count] for name, value in batch._asdict().items() if isinstance(value, Tensor | list)}
    return batch._replace(**fields)


def select_rows(batch: PromptBatch, indices: Sequence[int]) -> PromptBatch:
    """Return the prompts at `indices`, without columns that are padding in all of them."""
    chosen = list(indices)
    mask = batch.prompt_mask[chosen]  # [b, P]
    first = int(mask.any(0).long().argmax())  # the first column with a real token
    return PromptBatch(
        batch.prompt_ids[chosen, first:],
        mask[:, first:],
        [batch.prompts[i] for i in chosen],
        [batch.rows[i] for i in chosen],
    )


def unpadded_ids(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Return the token ids of `[B, T]` rows as `B` lists without padding."""
    return [row[real].tolist() for row, real in zip(ids.cpu(), mask.cpu(), strict=True)]


Batch = PromptBatch | SupervisedBatch | PreferenceBatch


class DoctorCLI(RemaxCLI):
    """Reads a configuration as `remax fit` does. Its trainer uses one process, writes nothing and does not train."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:  # noqa: ARG002
        """Make a trainer for one process, in the precision of the run."""
        trainer = self.config_init["fit"]["trainer"]
        accelerator = trainer["accelerator"]
        # A configuration for GPUs can be checked on a machine without one.
        if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            accelerator = "cpu"
        return Trainer(
            accelerator=accelerator,
            devices=1,
            precision=trainer["precision"],
            accumulate_grad_batches=trainer["accumulate_grad_batches"],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )

    def _parse_ckpt_path(self) -> None:
        """Ignore checkpoints: the checks look at the start of a run."""

    def _last_checkpoint(self) -> None:
        """Do nothing: no checkpoint is read."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Do nothing: only the objects are needed."""


class ZeroReward(Reward):
    """Scores every response with 0, for rollouts whose rewards are checked separately."""

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> Tensor:  # noqa: ARG002
        """Return `[M]` zeros."""
        return torch.zeros(len(responses))


class DoctorContext:
    """A run before its first step.

    Args:
        args: the arguments that `remax fit` would get.
        module: the LightningModule.
        data: the data module.
        trainer: a trainer with one process.
        num_prompts: number of prompts that the checks use.
    """

    def __init__(self, args: Sequence[str], module: Any, data: Any, trainer: Trainer, num_prompts: int) -> None:
        self.args, self.num_prompts = list(args), num_prompts
        self.module, self.data, self.trainer = module, data, trainer
        self.reward: Reward | None = getattr(module, "reward", None)
        self.note = ""
        """How the checks differ from the run, in words; empty if they do not."""
        self.is_spread = False
        """Whether the strategy of the run spreads the optimizer, at least, over the devices."""

    # ---- Loading, in the order of `Trainer.fit`, in parts: if one fails, the others can still be checked ----

    def load_data(self) -> None:
        """Read and tokenize the data."""
        # Lightning's `fit` sets these two; its type hints do not know them.
        cast(Any, self.trainer).datamodule, self.data.trainer = self.data, self.trainer
        self.data.prepare_data()
        self.data.setup("fit")

    def load_models(self) -> None:
        """Load the trained model and the reference, and run the module's own checks. The reward is not loaded."""
        module, strategy, precision = self.module, self.trainer.strategy, self.trainer.precision_plugin
        # ---- As `Trainer.fit` does it, up to the first step ----
        strategy.connect(module)
        module.trainer = self.trainer
        strategy.setup_environment()
        with self._without_reward():
            module.setup("fit")
        with strategy.tensor_init_context(), strategy.model_sharded_context(), precision.module_init_context():
            module.configure_model()
        precision.convert_module(module)
        strategy.model_to_device()
        with self._without_reward(), precision.forward_context():
            module.on_fit_start()

    @contextmanager
    def _without_reward(self) -> Iterator[None]:
        """Replace the reward inside, because the module's hooks would load it."""
        if self.reward is None:
            yield
            return
        self.module.worker.reward = ZeroReward()
        try:
            yield
        finally:
            self.module.worker.reward = self.reward

    def load_reward(self) -> None:
        """Load the reward."""
        assert self.reward is not None
        if hasattr(self.data, "prompt_forms"):
            self.reward.check_prompts(self.data.prompt_forms())
        if hasattr(self.data, "check_scorable"):
            self.data.check_scorable(self.reward, train=self.module.scores_training_rows)
        self.reward.load(self.module.device)

    # ---- What the checks read ----

    @cached_property
    def batch(self) -> Batch:
        """The first `num_prompts` training rows, on the device."""
        batch = first_rows(self.data.train_dataloader(), self.num_prompts, int(self.tokenizer.pad_token_id))
        return cast(Batch, move_data_to_device(batch, self.trainer.strategy.root_device))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that data and module share."""
        tokenizer = getattr(self.data, "tokenizer", None)
        return self.module.tokenizer if tokenizer is None else tokenizer

    @cached_property
    def prompt(self) -> PromptBatch:
        """The prompts of `batch`."""
        batch = cast("PromptBatch | SupervisedBatch", self.batch)
        return PromptBatch(batch.prompt_ids, batch.prompt_mask, batch.prompts, batch.rows)

    @cached_property
    def rollout(self) -> Rollout:
        """Sampled and greedy responses to `prompt`, with the log-probs of decoding and rewards of 0."""
        return self.roll_out(self.prompt, log_probs=True)

    def roll_out(
        self, prompt: PromptBatch, *, seed: int = 0, eos_ids: list[int] | None = None, log_probs: bool = False
    ) -> Rollout:
        """Generate responses with the engine of the run.

        Args:
            prompt: `B` prompts.
            seed: seed of the sampling.
            eos_ids: token ids that end a response; None for those of the run.
            log_probs: whether the engine returns log-probs.
        """
        module = cast(PolicyModule, self.module)
        # A worker of its own leaves the run's worker with its reward and its EOS tokens.
        worker = RolloutWorker(module.worker.engine, module.worker.sampling, ZeroReward())
        eos_ids = module.eos_ids() if eos_ids is None else eos_ids
        worker.prepare(module.tokenizer, eos_ids, module.device, module.unused_ids())
        generator = torch.Generator(module.device).manual_seed(seed)
        return worker.roll_out(module.policy, prompt, generator, greedy=True, return_log_probs=log_probs)

    @property
    def is_16_bit(self) -> bool:
        """Whether the policy computes in 16 bits; its rounding shows in every log-prob."""
        return bool(self.module.is_16_bit)


def load_context(args: Sequence[str], num_prompts: int) -> DoctorContext:
    """Read the arguments of `remax fit`. Nothing is loaded yet.

    Raises:
        UserError: if the configuration is wrong, or its module has no checks.
    """
    # ---- The objects that `remax fit` would make ----
    cli = run(["fit", *args], DoctorCLI)
    if not isinstance(cli.model, BaseModule):
        raise UserError(
            "model: remax doctor checks ReMaxModule, SFTModule, RewardModelModule and their subclasses, got"
            f" {type(cli.model).__name__}"
        )
    context = DoctorContext(args, cli.model, cli.datamodule, cli.trainer, num_prompts)
    # ---- What the trainer of the checks does in another way ----
    trainer = cli.config_init["fit"]["trainer"]
    if trainer["accelerator"] in ("gpu", "cuda") and cli.trainer.strategy.root_device.type != "cuda":
        context.note = " (checked on the CPU: this machine has no GPU)"
    strategy = trainer["strategy"]
    # By its class: this machine may lack DeepSpeed, which one of that name needs.
    is_name = isinstance(strategy, str) and strategy in StrategyRegistry
    kind = StrategyRegistry[strategy]["strategy"] if is_name else type(strategy)
    context.is_spread = issubclass(kind, DeepSpeedStrategy | ModelParallelStrategy)
    return context
