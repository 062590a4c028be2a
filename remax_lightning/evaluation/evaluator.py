"""The part of ReMax that evaluates: a policy with a reward and, mostly, a reference to compare it with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from remax_lightning.distributed import broadcast, raise_on_all_ranks, sum_tensor_over_ranks
from remax_lightning.evaluation.dataset_texts import as_batch, held_out_responses, response_texts, text_pieces
from remax_lightning.evaluation.prompt_metrics import RecordSums, by_prompt, compared, prompt_records, sums_by_prompt
from remax_lightning.functional import PolicyStatistics
from remax_lightning.models import ModelConfig
from remax_lightning.models.log_probs import policy_statistics, response_statistics, with_reference
from remax_lightning.modules.policy import PolicyModule
from remax_lightning.rewards.base import Reward, checked_scores
from remax_lightning.rollout import AutoEngine, RolloutEngine, SamplingConfig, StopCheck, clone_engine
from remax_lightning.rollout.generation_config import log_ignored_settings
from remax_lightning.rollout.stop_strings import stop_string_check
from remax_lightning.training import config_checks as checks
from remax_lightning.training.objective import Objective
from remax_lightning.training.reference import Reference, make_reference
from remax_lightning.training.seeding import EVALUATION, REFERENCE, rollout_generator
from remax_lightning.training.step_metrics import predictions
from remax_lightning.training.worker import StoppingCriteria, Written, scored, timed, write
from remax_lightning.types import EvalConfig, PromptBatch, PromptRecord, Responses, Rollout, StepOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EvaluatedModule(PolicyModule):
    """Makes rollouts with a policy, and measures them. `ReMaxModule`, which trains on them, describes the arguments."""

    def __init__(
        self,
        policy: ModelConfig,
        reward: Reward,
        reference: ModelConfig | None,
        tokenizer: str | None,
        rollout: RolloutEngine | None,
        sampling: SamplingConfig,
        kl_coef: float,
        objective: Objective,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__(policy, tokenizer, optimizer, lr_scheduler)
        checks.check_reference(reference)
        self.reward, self.reference_source = reward, reference
        self.engine: RolloutEngine = rollout if rollout is not None else AutoEngine()
        self.sampling, self.kl_coef, self.objective = sampling, kl_coef, objective
        self.measures = EvalConfig()
        self.stop_check: StopCheck | None = None
        self._reference: Reference | None = None
        # One engine for two models would drop its CUDA graphs at each change.
        self._reference_engine = clone_engine(self.engine)
        self._evaluated = RecordSums()
        self._seed: int | None = None
        self._reward_device: torch.device | None = None

    # Loading

    @property
    def reference(self) -> PreTrainedModel | None:
        """The reference's model; the policy's own where they share their weights."""
        return None if self._reference is None else self._reference.model

    def configure_model(self) -> None:
        """Load policy, tokenizer and reference."""
        super().configure_model()
        if self._reference is None:
            strategy = self.trainer.strategy
            self._reference = make_reference(self.reference_source, self.policy, self.policy_source, strategy)

    def on_validation_start(self) -> None:
        """Bring the frozen models to the device, and forget an evaluation that was interrupted."""
        self._prepare()
        self._evaluated = RecordSums()

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def _prepare(self) -> None:
        self.constants.restore()
        if self._reference is not None:
            self._reference.prepare(self.device, needs_head=self.objective.kl_config.full)
            checks.check_full_kl(self.objective.kl_config, self.policy, self._reference)
        if self._reward_device != self.device:
            log_ignored_settings(self.policy, self.sampling)
            self.stop_check = stop_string_check(self.tokenizer, self.sampling.stop_strings)
            self.reward.load(self.device)
            self._reward_device = self.device
        if self._seed is None:
            # Rank 0's, for it is what a checkpoint holds.
            self._seed = broadcast(self.trainer.strategy, torch.initial_seed() % 2**63)
        longest = getattr(getattr(self.trainer, "datamodule", None), "max_prompt_length", None)
        checks.check_lengths(self.policy, longest, self.sampling.max_response_length)

    # Rollouts

    def _roll_out(
        self, batch: PromptBatch, stage: int, count: int, times: dict[str, float], log_probs: bool = False
    ) -> Rollout:
        """Sample and decode greedily, and score; `count` rollouts of the stage were made before."""
        greedy = stage == EVALUATION or self.objective.needs_greedy
        with raise_on_all_ranks(self.trainer):
            written = self._write(self.policy, batch, self.engine, stage, count, times, greedy, log_probs)
            return scored(batch, written, self.reward, self.objective.truncation_penalty, times)

    def _write(
        self,
        model: PreTrainedModel,
        batch: PromptBatch,
        engine: RolloutEngine,
        stage: int,
        count: int,
        times: dict[str, float],
        greedy: bool,
        log_probs: bool = False,
    ) -> Written:
        return write(
            model,
            batch,
            engine=engine,
            sampling=self.sampling,
            stopping=StoppingCriteria(self.eos_ids(), cast(int, self.tokenizer.pad_token_id), self.stop_check),
            generator=rollout_generator(cast(int, self._seed), self.global_rank, stage, count, self.device),
            tokenizer=self.tokenizer,
            greedy=greedy,
            times=times,
            log_probs=log_probs,
        )

    def _with_reference(self, rollout: Rollout, times: dict[str, float]) -> Rollout:
        """Look the sampled tokens up in the reference, where there is one."""
        if self._reference is None:
            return rollout
        kl = self.objective.kl_config
        with timed(times, "reward", self.device), torch.no_grad(), self._reference.running():
            return with_reference(rollout, self._reference.model, self.sampling, kl.full, kl.reference_batch_size)

    def _statistics(
        self, rollout: Rollout, trained: Tensor | None = None, batch_size: int | None = None
    ) -> PolicyStatistics:
        return policy_statistics(self.policy, rollout, self.sampling, self.reference, trained, batch_size)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return sum_tensor_over_ranks(self.trainer, values)

    # Evaluation

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> StepOutput:
        """Evaluate sampled and greedy responses, and what `measures` says; the same random numbers every time."""
        times = {"rollout": 0.0, "reward": 0.0}
        rollout = self._with_reference(self._roll_out(batch, EVALUATION, batch_idx, times), times)
        now = self._statistics(rollout)
        kl = self.objective.kl(now.log_probs, rollout, now.kl)
        output = StepOutput(
            rollout=rollout._replace(reference_hidden=None),
            advantages=self.objective.advantages(rollout, kl, self.kl_coef, lambda values: values),
            kl=kl,
            entropy=now.entropy,
            entropy_mask=rollout.sampled.response_mask,
            times=times,
            closes_step=True,
        )
        records = self._with_responses(batch, batch_idx, prompt_records(output), times)
        output["records"] = self._with_perplexity(batch, records)
        self._evaluated.add(output["records"])
        return output

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the figures of all ranks."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log as in validation, under `test/`."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        for name, mean in self._evaluated.means().items():  # the same on every rank already
            self.log(f"{stage}/{name}", mean, prog_bar=name in ("reward", "baseline_reward"))

    def _with_responses(
        self, batch: PromptBatch, batch_idx: int, records: list[PromptRecord], times: dict[str, float]
    ) -> list[PromptRecord]:
        """Compare with the reference's and the data set's responses, as far as `measures` asks for it."""
        if self.measures.win_rate_reference and self._reference is not None:
            with raise_on_all_ranks(self.trainer), self._reference.writing():
                model, engine = self._reference.model, self._reference_engine
                written = self._write(model, batch, engine, REFERENCE, batch_idx, times, greedy=False)
            with raise_on_all_ranks(self.trainer):
                # An engine may decode greedily, whether it is asked to or not.
                written, penalty = written._replace(greedy=None), self.objective.truncation_penalty
                rollout = scored(batch, written, self.reward, penalty, times)
            count = len(records)
            texts, rewards = by_prompt(rollout.sampled.texts, count), rollout.reward.view(count, -1).tolist()
            records = [compared(each, "reference", texts[i], rewards[i]) for i, each in enumerate(records)]
        if self.measures.win_rate_chosen:
            records = self._with_chosen(batch, records, times)
        return records

    def _with_chosen(
        self, batch: PromptBatch, records: list[PromptRecord], times: dict[str, float]
    ) -> list[PromptRecord]:
        texts = response_texts(batch.rows, self.measures.response_column)
        if self._nowhere(texts):
            return records
        # Where there is none, the policy's own stands in: it has been scored before, so it can be.
        pairs = zip(texts, records, strict=True)
        chosen = [record.responses["sampled"][0] if text is None else text for text, record in pairs]
        with raise_on_all_ranks(self.trainer), timed(times, "reward", self.device), torch.no_grad():
            rewards = checked_scores(self.reward, batch.prompts, chosen, batch.rows).reward.tolist()
        return [
            record if text is None else compared(record, "chosen", [text], [reward])
            for record, text, reward in zip(records, texts, rewards, strict=True)
        ]

    def _with_perplexity(self, batch: PromptBatch, records: list[PromptRecord]) -> list[PromptRecord]:
        """Ask policy and reference for the log-probs of the data set's responses."""
        if not self.measures.perplexity:
            return records
        texts = response_texts(batch.rows, self.measures.response_column)
        if self._nowhere(texts):
            return records
        responses = held_out_responses(self.tokenizer, self.policy, batch, texts, self.measures.max_length)
        return [
            record if text is None else record._replace(sums=record.sums | sums)
            for record, text, sums in zip(records, texts, self._log_likelihoods(batch, responses), strict=True)
        ]

    def _nowhere(self, texts: Sequence[str | None]) -> bool:
        """Whether no row has a response. Of several ranks all go on: models in shares run on each or on none."""
        return self.trainer.world_size == 1 and not any(texts)

    @torch.no_grad()
    def text_records(self, text: str) -> list[PromptRecord]:
        """Return the perplexities of policy and reference on this rank's share of a text, a record for each piece.

        Pieces are `measures.max_length` tokens long. Every rank takes equally many: one of them may come twice.
        """
        rank, ranks = self.global_rank, self.trainer.world_size
        pieces = text_pieces(self.tokenizer, self.policy, text, self.measures.max_length)
        own = list(range(rank, len(pieces), ranks))
        own += [0] * (len(range(0, len(pieces), ranks)) - len(own))
        found = []
        for index in own:
            with self.trainer.precision_plugin.forward_context():
                (sums,) = self._log_likelihoods(*as_batch(pieces[index], self.device))
            found.append(PromptRecord(index, "", {}, {}, sums))
        return found

    def _log_likelihoods(self, prompt: PromptBatch, responses: Responses) -> list[dict[str, tuple[float, float]]]:
        """Return for each response the nats that it costs policy and reference, and its tokens."""
        found = {"perplexity": response_statistics(self.policy, prompt, responses).log_probs}
        if self._reference is not None:
            with self._reference.running():
                model = self._reference.model
                found["reference_perplexity"] = response_statistics(model, prompt, responses).log_probs
        count = len(responses.response_ids)
        columns = {name: sums_by_prompt(-each, responses.response_mask, count) for name, each in found.items()}
        return [{name: column[i] for name, column in columns.items()} for i in range(count)]

    def settings(self) -> dict[str, Any]:
        """Return what an evaluation depends on, ready for JSON."""
        reference = None if self.reference_source is None else self.reference_source.path
        return {
            "policy": self.policy_source.path,
            "reference": "the policy's start" if reference is None and self._reference is not None else reference,
            "reward": {"class_path": f"{type(self.reward).__module__}.{type(self.reward).__qualname__}"},
            "truncation_penalty": self.objective.truncation_penalty,
            "sampling": asdict(self.sampling),
            "kl": asdict(self.objective.kl_config),
        }

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return prompt, sampled and greedy response and their rewards, one dictionary per sampled response."""
        return predictions(self._roll_out(batch, EVALUATION, batch_idx, {}))
