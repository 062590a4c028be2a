"""What is examined: the modules, data and models of a configuration, loaded as `remax fit` loads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from torch import Tensor

from remax_lightning.cli import RemaxCLI, run
from remax_lightning.errors import UserError
from remax_lightning.modules.base import BaseModule
from remax_lightning.modules.policy import PolicyModule
from remax_lightning.rewards import Reward
from remax_lightning.tools.doctor.batches import first_rows
from remax_lightning.training.worker import RolloutWorker
from remax_lightning.types import PreferenceBatch, PromptBatch, Rollout, SupervisedBatch

Batch = PromptBatch | SupervisedBatch | PreferenceBatch


class DoctorCLI(RemaxCLI):
    """Reads a configuration as `remax fit` does; its trainer has one process, and neither writes nor trains."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:  # noqa: ARG002
        """Make a trainer for one process, in the precision of the run."""
        trainer = self.config_init["fit"]["trainer"]
        accelerator = trainer["accelerator"]
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
        """Look at no checkpoint: what is examined is the start."""

    def _last_checkpoint(self) -> None:
        """None is read."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


class ZeroReward(Reward):
    """Gives every response 0: for rollouts whose rewards are looked at apart."""

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> Tensor:  # noqa: ARG002
        """Return `[M]` zeros."""
        return torch.zeros(len(responses))


class DoctorContext:
    """A run before its first step.

    Args:
        args: what would stand after `remax fit`.
        module: its module.
        data: its data module.
        trainer: of one process.
        num_prompts: how many prompts of the data are looked at.
    """

    def __init__(self, args: Sequence[str], module: Any, data: Any, trainer: Trainer, num_prompts: int) -> None:
        self.args, self.num_prompts = list(args), num_prompts
        self.module, self.data, self.trainer = module, data, trainer
        self.reward: Reward | None = getattr(module, "reward", None)
        self.note = ""
        """How the run is examined otherwise than it would go."""

    # Loading: in the order of `Trainer.fit`, a part at a time, so that one that fails leaves the others

    def load_data(self) -> None:
        """Read and tokenize the data."""
        # Set as Lightning sets them, whose types do not know the instance's own attributes.
        cast(Any, self.trainer).datamodule, self.data.trainer = self.data, self.trainer
        self.data.prepare_data()
        self.data.setup("fit")

    def load_models(self) -> None:
        """Load what is trained and the reference, and let the module check itself; the reward is left out."""
        module, strategy, precision = self.module, self.trainer.strategy, self.trainer.precision_plugin
        strategy.connect(module)
        module.trainer = self.trainer
        strategy.setup_environment()
        module.setup("fit")
        with strategy.tensor_init_context(), strategy.model_sharded_context(), precision.module_init_context():
            module.configure_model()
        precision.convert_module(module)
        strategy.model_to_device()
        with self._without_reward(), precision.forward_context():
            module.on_fit_start()

    @contextmanager
    def _without_reward(self) -> Iterator[None]:
        """Keep the reward out of the module's hooks, which would load it."""
        if self.reward is None:
            yield
            return
        self.module.worker.reward = ZeroReward()
        try:
            yield
        finally:
            self.module.worker.reward = self.reward

    def load_reward(self) -> None:
        """Load what the reward needs."""
        assert self.reward is not None
        self.reward.load(self.module.device)

    # What checks look at

    @cached_property
    def batch(self) -> Batch:
        """The first `num_prompts` rows that training would see, on the device."""
        batch = first_rows(self.data.train_dataloader(), self.num_prompts, int(self.tokenizer.pad_token_id))
        return cast(Batch, move_data_to_device(batch, self.trainer.strategy.root_device))

    @property
    def tokenizer(self) -> Any:
        """The one that data and module share."""
        tokenizer = getattr(self.data, "tokenizer", None)
        return self.module.tokenizer if tokenizer is None else tokenizer

    @cached_property
    def prompt(self) -> PromptBatch:
        """The prompts alone."""
        batch = cast("PromptBatch | SupervisedBatch", self.batch)
        return PromptBatch(batch.prompt_ids, batch.prompt_mask, batch.prompts, batch.rows)

    @cached_property
    def rollout(self) -> Rollout:
        """Sampled and greedy responses to them, with the log-probs that decoding made and rewards of 0."""
        return self.roll_out(self.prompt, log_probs=True)

    def roll_out(
        self, prompt: PromptBatch, *, seed: int = 0, eos_ids: list[int] | None = None, log_probs: bool = False
    ) -> Rollout:
        """Make responses with the run's own engine.

        Args:
            prompt: `B` prompts.
            seed: of what is sampled.
            eos_ids: what ends a response, in place of the run's own.
            log_probs: whether the engine is asked for them.
        """
        module = cast(PolicyModule, self.module)
        worker = RolloutWorker(module.worker.engine, module.worker.sampling, ZeroReward())
        worker.prepare(module.tokenizer, module.eos_ids() if eos_ids is None else eos_ids, module.device)
        generator = torch.Generator(module.device).manual_seed(seed)
        return worker.roll_out(module.policy, prompt, generator, greedy=True, return_log_probs=log_probs)

    @property
    def is_16_bit(self) -> bool:
        """Whether the policy's passes are in 16 bits, whose rounding shows in every log-prob."""
        model = self.module.trained_model
        return "16" in str(self.trainer.precision) or model.dtype in (torch.float16, torch.bfloat16)


def load_context(args: Sequence[str], num_prompts: int) -> DoctorContext:
    """Read what would stand after `remax fit`; nothing is loaded yet.

    Raises:
        UserError: if the configuration is wrong, or is for a module that there are no checks for.
    """
    cli = run(["fit", *args], DoctorCLI)
    if not isinstance(cli.model, BaseModule):
        raise UserError(
            "model: remax doctor is for ReMaxModule, SFTModule and RewardModelModule, and what is made of them; got"
            f" {type(cli.model).__name__}"
        )
    context = DoctorContext(args, cli.model, cli.datamodule, cli.trainer, num_prompts)
    trainer = cli.config_init["fit"]["trainer"]
    if trainer["accelerator"] in ("gpu", "cuda") and cli.trainer.strategy.root_device.type != "cuda":
        context.note = " (there is no GPU here)"
    return context
