"""Base class of the stages that train a policy: loading it, its EOS tokens, its checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast, get_args, get_type_hints

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from remax_lightning.config import WeightDType, config_from_dict
from remax_lightning.data.collate import pad
from remax_lightning.data.formatting import PromptFormatter
from remax_lightning.distributed import broadcast
from remax_lightning.errors import UserError
from remax_lightning.models.checkpoint_reader import read_hyper_parameters, read_weights
from remax_lightning.models.loading import Float32Buffers, ModelSource, as_model_config
from remax_lightning.models.sampling import log_ignored_settings
from remax_lightning.modules.base import BaseModule
from remax_lightning.rewards.base import Reward
from remax_lightning.rewards.weighted import NoReward
from remax_lightning.rollout import RolloutEngine, SamplingConfig
from remax_lightning.strategies import shard_policy, sharded_init, unsharded_init
from remax_lightning.training.config_checks import check_policy, check_quantization, warn_of_turn_end
from remax_lightning.training.optimization import MaxSkippedSteps
from remax_lightning.training.resume import StallSeconds
from remax_lightning.training.worker import RolloutWorker
from remax_lightning.types import Batch, PromptBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PolicyModule(BaseModule):
    """Trains a causal language model, the policy.

    Args:
        policy: where the policy comes from.
        worker: generates responses with it and scores them.
        tokenizer: its tokenizer, a folder or a hub name; None takes the policy's path.
        optimizer: makes the optimizer from parameter groups.
        lr_scheduler: makes the schedule, stepped after each optimizer step; None keeps the learning rate.
        max_skipped_steps: the run ends after this many optimizer steps in a row whose gradient is not finite.
        stall_timeout: seconds without progress that end the run; None watches nothing.
        cudnn_attention: whether attention may run in cuDNN.
    """

    policy: PreTrainedModel
    batch_type: ClassVar[type[Batch]] = PromptBatch
    scores_training_rows: ClassVar[bool] = True
    """Whether the reward scores responses to the training rows, not only to those of validation."""
    constants: Float32Buffers
    """Constant buffers of the policy, restored after a strategy has cast it."""

    def __init__(
        self,
        policy: ModelSource,
        worker: RolloutWorker,
        tokenizer: str | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        max_skipped_steps: MaxSkippedSteps,
        stall_timeout: StallSeconds,
        cudnn_attention: bool,
    ) -> None:
        policy = as_model_config(policy, "policy")
        super().__init__(policy, tokenizer, optimizer, lr_scheduler, max_skipped_steps, stall_timeout, cudnn_attention)
        check_policy(policy)
        self.policy_source, self.worker = policy, worker
        if policy.lora is not None:
            self.strict_loading = False  # checkpoints omit the base; `load_state_dict` checks the adapter

    def setup(self, stage: str) -> None:
        """Let the reward check prompts and rows before any model is loaded."""
        super().setup(stage)
        # Loaders without a data module of ours are taken as they are.
        data: Any = getattr(self.trainer, "datamodule", None)
        if self.reward is not None and hasattr(data, "prompt_forms"):
            self.reward.check_prompts(data.prompt_forms())
        if self.reward is not None and hasattr(data, "check_scorable"):
            data.check_scorable(self.reward, train=self.scores_training_rows)

    @property
    def trained_model(self) -> PreTrainedModel:
        """The policy."""
        return self.policy

    @property
    def engine(self) -> RolloutEngine:
        """The engine that generates responses."""
        return self.worker.engine

    @property
    def sampling(self) -> SamplingConfig:
        """How responses are sampled."""
        return self.worker.sampling

    @property
    def reward(self) -> Reward | None:
        """The reward that scores responses; None without one."""
        return self.worker.reward

    def prepare_rollouts(self) -> None:
        """Prepare the worker: stop strings, EOS and unused tokens, and the reward on the device."""
        is_new = self.worker.device != self.device
        if is_new:
            log_ignored_settings(self.policy, self.sampling)
            warn_of_turn_end(self.tokenizer, self.eos_ids(), getattr(self.trainer, "datamodule", None))
        # Every validation comes here; a vocabulary of 150,000 tokens is compared once.
        unused_ids = self.unused_ids() if is_new else self.worker.unused_ids
        self.worker.prepare(self.tokenizer, self.eos_ids(), self.device, unused_ids)

    def configure_model(self) -> None:
        """Load policy and tokenizer; Lightning calls this in the context of the strategy."""
        if "policy" in self._modules:
            return
        self.policy = self._load_policy()
        # ---- What must stay float32, copied before a strategy casts it ----
        with unsharded_init(self.trainer.strategy):
            self.constants = Float32Buffers(self.policy)
        # Loaded models are in eval mode and Lightning leaves them there; gradient checkpointing then does nothing.
        self.policy.train()
        self.tokenizer = self._find_tokenizer()
        # ---- The tokenizer's ids must be rows of the embedding; the embedding may have more, as padding ----
        vocabulary = self.policy.config.get_text_config().vocab_size
        if len(self.tokenizer) > vocabulary:
            raise UserError(
                f"model.tokenizer {self.tokenizer_path!r} has {len(self.tokenizer)} tokens, the policy"
                f" {self.policy_source.path!r} only {vocabulary}; give the tokenizer that belongs to the policy"
            )

    def _load_policy(self) -> PreTrainedModel:
        source, strategy = self.policy_source, self.trainer.strategy
        check_quantization(source, strategy)
        with sharded_init(strategy, from_scratch=source.from_scratch):
            policy = source.load_base("model.policy")
        # ZeRO-3 would shard an adapter before it is initialized; the engine shards it later.
        with unsharded_init(strategy):
            policy = source.wrap_with_adapter(policy, "model.policy", broadcast(strategy, torch.initial_seed()))
        if isinstance(strategy, ModelParallelStrategy):
            shard_policy(policy, strategy.device_mesh)
        return policy

    def eos_ids(self) -> list[int]:
        """Return every token id that ends a response: those of the tokenizer and of the generation settings."""
        configured = self.policy.generation_config.eos_token_id if self.policy.generation_config is not None else None
        named = [] if configured is None else [configured] if isinstance(configured, int) else list(configured)
        # A negative number would stand for another token; one beyond the vocabulary is never drawn.
        if not all(isinstance(eos_id, int) and eos_id >= 0 for eos_id in named):
            raise UserError(
                "model.policy.path: eos_token_id in generation_config.json must be a token's number or a list of them,"
                f" got {configured!r}"
            )
        return sorted({int(cast(int, self.tokenizer.eos_token_id)), *named})

    def unused_ids(self) -> tuple[int, ...]:
        """Return the policy's ids that are no token of the tokenizer, and no EOS: embeddings are often padded."""
        used = {*self.tokenizer.get_vocab().values(), *self.eos_ids()}
        vocabulary: int = self.policy.config.get_text_config().vocab_size
        return tuple(index for index in range(vocabulary) if index not in used)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the weights; with an adapter only those of the adapter, because the base is loaded from its path."""
        state: dict[str, Any] = super().state_dict(*args, **options)
        if self.policy_source.lora is None:
            return state
        trained = self._trainable_names()
        return {name: value for name, value in state.items() if name in trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the result of `state_dict`. An adapter must be complete, whatever `strict` is.

        Raises:
            UserError: if the policy has another adapter, or only one of policy and checkpoint has one.
        """
        if self.policy_source.lora is None:
            if any(".lora_" in name for name in state_dict):
                raise UserError("ckpt_path: the checkpoint holds an adapter; set model.policy.lora as in its run")
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        # Not strict, because the base is not in the file; but every weight of the adapter has to be.
        other = sorted(state_dict.keys() ^ self._trainable_names())
        try:
            result = super().load_state_dict(state_dict, strict=False, assign=assign)
        except RuntimeError as error:  # another rank
            other = [str(error).splitlines()[-1].strip()]
        if other:
            raise UserError(
                "ckpt_path: the checkpoint does not hold the adapter that model.policy.lora describes; set it as in the"
                f" checkpoint's run. They differ in {len(other)} places: {', '.join(other[:2])}"
            )
        return result

    # ---- Without a trainer ----

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: torch.device | str = "cpu", **arguments: Any
    ) -> Self:
        """Return the module of a checkpoint with its trained policy and tokenizer, ready to `generate`.

        Reads checkpoints of every strategy without running code in them. The policy's folder or hub name must still
        exist: its configuration and tokenizer are there, and the base of an adapter.

        Args:
            checkpoint_path: a `.ckpt` file, or a checkpoint folder of DeepSpeed or FSDP2.
            map_location: the device of the policy.
            **arguments: arguments of the module, in place of the saved ones. Objects such as `reward`, `rollout` and
                `optimizer` are not saved; they are needed to train, not to generate.

        Raises:
            UserError: if the checkpoint cannot be read, would run code, or does not fit the policy.
        """
        path = Path(checkpoint_path)
        # ---- Arguments: saved ones, unless they are given ----
        saved = cls._arguments_of({} if "policy" in arguments else read_hyper_parameters(path))
        # Only where a reward is required: supervised fine-tuning without one scores nothing.
        reward = inspect.signature(cls).parameters.get("reward")
        required = reward is not None and reward.default is inspect.Parameter.empty
        module = cls(**({"reward": NoReward()} if required else {}) | saved | arguments)
        # ---- Weights, on the CPU first ----
        module._load_trained_policy(read_weights(path, ""))
        return module.to(map_location).eval()

    @classmethod
    def _arguments_of(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the module from those that `hyper_parameters` returned."""
        # `asdict` made dictionaries of dataclasses; the annotations say which ones.
        hints = get_type_hints(cls.__init__)
        arguments = {}
        for name, value in saved.items():
            hint = hints.get(name)
            kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind)]
            arguments[name] = config_from_dict(kinds[0], value) if kinds and isinstance(value, dict) else value
        return arguments

    def _load_trained_policy(self, weights: dict[str, Tensor]) -> None:
        """Make the policy and load its trained weights; with an adapter, those around the base from its path."""
        from transformers import GenerationConfig

        source = self.policy_source
        if source.lora is None:  # all weights are in the checkpoint: make a model without reading the old ones
            dtype = next(value.dtype for value in weights.values() if value.is_floating_point())
            name = cast("WeightDType", str(dtype).removeprefix("torch."))
            source = replace(source, from_scratch=True, dtype=name)
        self.policy = source.load("model.policy")
        with suppress(OSError):  # the model has no generation settings
            self.policy.generation_config = GenerationConfig.from_pretrained(
                source.path, revision=source.revision or "main"
            )
        self.constants = Float32Buffers(self.policy)
        self.load_state_dict(weights)
        self.tokenizer = self._find_tokenizer()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str | list[dict[str, Any]]],
        *,
        greedy: bool = True,
        batch_size: int = 16,
        seed: int = 0,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[str]:
        """Return the policy's response to each prompt, as in training: the same template, stop strings and lengths.

        Args:
            prompts: texts, which the policy continues, or lists of messages for the tokenizer's chat template.
            greedy: the most likely tokens; False samples as `sampling` says.
            batch_size: prompts that are decoded together.
            seed: fixes the sampled responses.
            chat_template_kwargs: variables of the chat template.

        Raises:
            RuntimeError: if there is no policy yet.
            DataError: if a prompt cannot be rendered.
        """
        if "policy" not in self._modules:
            raise RuntimeError("there is no policy yet: train first, or use load_from_checkpoint")
        sampling = replace(self.sampling, num_samples=1)
        if greedy:  # the only token of each distribution that is left
            sampling = replace(sampling, top_k=1, top_p=1.0, min_p=0.0, temperature=1.0)
        # ---- The same worker as in training, without a reward ----
        worker = RolloutWorker(self.engine, sampling)
        worker.prepare(self.tokenizer, self.eos_ids(), self.device, self.unused_ids())
        generator = torch.Generator(self.device).manual_seed(seed)
        # ---- Prompts as the data module renders and encodes them ----
        formatter = PromptFormatter(self.tokenizer, template_kwargs=chat_template_kwargs)
        texts = [formatter.text({"prompt": prompt}, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
        encoded = formatter.encode(texts)
        responses: list[str] = []
        # ---- Generate in batches; as sampled responses, of which there is one per prompt ----
        for start in range(0, len(texts), batch_size):
            rows = slice(start, start + batch_size)
            ids, mask = pad(encoded[rows], int(cast(int, self.tokenizer.pad_token_id)), "left")  # [B, P]
            batch = PromptBatch(ids.to(self.device), mask.to(self.device), list(texts[rows]), [{}] * len(ids))
            responses += worker.generate_responses(self.policy, batch, generator, greedy=False).sampled.texts
        return responses

    def _trainable_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}
