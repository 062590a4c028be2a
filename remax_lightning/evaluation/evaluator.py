"""Measures a policy on held-out prompts: its own responses, those of the data set, win rates and perplexities."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from remax_lightning.config import EvalConfig
from remax_lightning.data.chat_templates import ChatRenderer
from remax_lightning.data.conversations import Message, content_text, is_empty, is_plain
from remax_lightning.data.tokenizers import encode_batch, hidden_ids, response_texts
from remax_lightning.distributed import raise_on_all_ranks
from remax_lightning.errors import UserError
from remax_lightning.evaluation.prompt_metrics import (
    PromptSums,
    add_comparison,
    add_repeated,
    group_by_prompt,
    prompt_records,
    sums_by_prompt,
)
from remax_lightning.files import PromptRecord
from remax_lightning.functional import TokenStatistics
from remax_lightning.models.log_probs import response_statistics
from remax_lightning.rewards.answers import voted_answer
from remax_lightning.rewards.base import Reward, checked_scores, shorten
from remax_lightning.rewards.user_functions import import_function
from remax_lightning.rollout import clone_engine
from remax_lightning.strategies.stall_watchdog import report_progress
from remax_lightning.training.experience import Experience
from remax_lightning.training.objective import Objective
from remax_lightning.training.reference import Reference
from remax_lightning.training.rollouts import REFERENCE, rollout_generator
from remax_lightning.training.worker import RolloutWorker
from remax_lightning.types import Prompt, PromptBatch, Response, Responses, Rollout, StepOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def response_messages(rows: Sequence[dict[str, Any]], column: str) -> list[Message | None]:
    """Return each row's response as a message, with thoughts and calls of tools; None where there is none.

    Args:
        rows: of the data set.
        column: holds text, or messages that end with the response.
    """
    return [_response_message(row.get(column)) for row in rows]


def _response_message(value: Any) -> Message | None:
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    message = value[-1] if isinstance(value, list) and value else None
    if not isinstance(message, dict) or message.get("role") != "assistant":
        return None
    message = {"content": None, **message}
    if is_empty(message):
        return None
    # Half an emoji stops tokenizers.
    return {
        name: item.encode(errors="replace").decode() if isinstance(item, str) else item
        for name, item in message.items()
    }


def shown_texts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    messages: Sequence[Message | None],
    hidden: Collection[int],
) -> list[str | None]:
    """Return each response of the data set as text, as a reward would read it from the policy; None for a missing one.

    The text is the content of the message. If the message has a thought or calls a tool, it is what the chat template
    writes.

    Args:
        tokenizer: the policy's.
        prompts: `B` prompts.
        messages: `B` responses.
        hidden: ids that are left out of texts, see `hidden_ids`.
    """
    renderer = ChatRenderer(tokenizer)
    texts: list[str | None] = []
    for prompt, message in zip(prompts, messages, strict=True):
        conversation = getattr(prompt, "conversation", None)
        # Plain text is read as it is; the template decides how thoughts and calls of tools read.
        if message is None or is_plain(message) or conversation is None:
            texts.append(None if message is None else content_text(message) or None)
            continue
        start = Prompt(prompt, conversation)
        (ids,) = renderer.response_ids([start], [renderer.response(start, message)])
        texts += response_texts(tokenizer, encode_batch(tokenizer, [prompt]), [ids], hidden)
    return texts


def tokenize_responses(
    tokenizer: PreTrainedTokenizerBase,
    policy: PreTrainedModel,
    prompt: PromptBatch,
    messages: Sequence[Message | None],
    max_length: int,
) -> Responses:
    """Return messages as responses to the prompts, an empty one for None.

    They are tokenized as in the supervised stage: separately from the prompt, and behind messages as the chat template
    writes them, with thoughts, tool calls and the token that ends the turn.

    Args:
        tokenizer: the policy's.
        policy: whose positions have to be enough for prompt and response.
        prompt: `B` prompts.
        messages: `B` responses.
        max_length: tokens that are kept of each, from its beginning.
    """
    renderer = ChatRenderer(tokenizer)
    # ---- Tokenize all responses at once ----
    known: list[tuple[Prompt, str]] = []
    for prompt_text, message in zip(prompt.prompts, messages, strict=True):
        if message is not None:
            start = prompt_text if isinstance(prompt_text, Prompt) else Prompt(prompt_text)
            known.append((start, renderer.response(start, message)))
    encoded = iter(renderer.response_ids([start for start, _ in known], [text for _, text in known]))
    # ---- Cut them to the maximum length, and to the positions that the prompt leaves ----
    rows: list[list[int]] = []
    for message, length in zip(messages, prompt.prompt_mask.sum(1).tolist(), strict=True):
        ids = [] if message is None else next(encoded)
        rows.append(ids[: min(max_length, _max_positions(policy) - length)])
    # ---- Pad on the right, [B, R] ----
    width, device = max(1, *map(len, rows)), prompt.prompt_ids.device
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[place < len(row) for place in range(width)] for row in rows], device=device)  # [B, R]
    return Responses(
        padded, mask, ~mask.any(1), ["" if message is None else content_text(message) for message in messages]
    )


def split_text(
    tokenizer: PreTrainedTokenizerBase, policy: PreTrainedModel, text: str, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """Split a text into pieces; return for each piece the token ids in front of it, and its own.

    In front stands the beginning-of-sequence token. If the tokenizer has none, it is the last token of the previous
    piece, so that every token but the first of the text is predicted once.

    Args:
        tokenizer: the policy's.
        policy: whose positions have to be enough for a piece.
        text: the text.
        max_length: tokens of a piece.
    """
    # The whole text at once: pieces of it, tokenized alone, would split words at their ends.
    (ids,) = encode_batch(tokenizer, [text])
    before = tokenizer.bos_token_id
    if before is not None:
        ids = [int(before), *ids]
    # One position is for the token in front.
    length = min(max_length, _max_positions(policy) - 1)
    starts = range(0, len(ids) - 1, length)
    return [([ids[start] if before is None else int(before)], ids[start + 1 : start + 1 + length]) for start in starts]


def piece_to_batch(piece: tuple[list[int], list[int]], device: torch.device) -> tuple[PromptBatch, Responses]:
    """Return a piece as a prompt and its response."""
    prompt, response = (torch.tensor([ids], device=device) for ids in piece)
    masks = [torch.ones_like(ids, dtype=torch.bool) for ids in (prompt, response)]
    return PromptBatch(prompt, masks[0], [""], [{}]), Responses(response, masks[1], ~masks[1].any(1), [""])


def _max_positions(policy: PreTrainedModel) -> int:
    return int(getattr(policy.config.get_text_config(), "max_position_embeddings", None) or 2**31)


def answer_function(path: str | None) -> Callable[[str], Hashable]:
    """Return the function that says which answer a response votes for.

    Args:
        path: dotted path of a function of a text; None takes `voted_answer`.

    Raises:
        UserError: if there is no such function. The returned function raises one if it fails on a response.
    """
    if path is None:
        return voted_answer
    function = import_function(path, "evaluation.answer")

    def answer_of(text: str) -> Hashable:
        try:
            answer = function(text)
            hash(answer)
        except Exception as error:
            raise UserError(
                f"evaluation.answer: {path} must return a text, a number or None for every response, and raised"
                f" {type(error).__name__}: {error} on the response {shorten(text)}"
            ) from error
        return cast("Hashable", answer)

    return answer_of


class Evaluator:
    """Evaluates rollouts of a policy, prompt by prompt. Call `prepare` before the first batch.

    Args:
        worker: scores responses; its engine's kind also generates the reference's.
        objective: says what a KL and an advantage are.
    """

    trainer: Trainer
    policy: PreTrainedModel
    reference: Reference | None
    seed: int

    def __init__(self, worker: RolloutWorker, objective: Objective) -> None:
        self.config = EvalConfig()
        self.worker, self.objective = worker, objective
        # An engine of its own: one engine for two models would drop its captured graphs at each change.
        self._reference_worker = RolloutWorker(clone_engine(worker.engine), worker.sampling, timer=worker.timer)
        self._sums = PromptSums()

    def prepare(self, trainer: Trainer, policy: PreTrainedModel, reference: Reference | None, seed: int) -> None:
        """Set what exists only once a run has started, and discard an interrupted evaluation.

        Args:
            trainer: of the run.
            policy: the model that is evaluated.
            reference: what it is compared with; None without one.
            seed: of the run; the reference's responses are drawn from it.
        """
        self.trainer, self.policy, self.reference, self.seed = trainer, policy, reference, seed
        device = trainer.strategy.root_device
        self._reference_worker.prepare(self.worker.tokenizer, self.worker.eos_ids, device, self.worker.unused_ids)
        self._sums = PromptSums()

    def evaluate(self, rollout: Rollout, stats: TokenStatistics, kl_coef: float, batch_idx: int) -> StepOutput:
        """Return what is measured of a batch, and add it to the means of this evaluation.

        Args:
            rollout: sampled and greedy responses of the policy, with the reference's log-probs where there is one.
            stats: of the sampled tokens under the policy.
            kl_coef: weight of the KL in the advantages.
            batch_idx: number of the batch; the reference's random numbers depend on it.
        """
        # ---- What is known of the policy's own responses ----
        # No update, and no reduction over ranks: each evaluates its own prompts, and sums follow at the end.
        experience = Experience(rollout, normalizers=rollout.reward.new_empty(0))
        experience = self.objective.with_advantages(experience, stats, kl_coef, lambda values: values)
        output = StepOutput(
            rollout=rollout._replace(reference_hidden=None),
            advantages=cast(Tensor, experience.advantages),
            kl=experience.kl,
            entropy=cast(Tensor, stats.entropy),
            entropy_mask=rollout.sampled.response_mask,
            times={},
            closes_step=True,
        )
        # ---- Prompt by prompt; comparisons add their sums to the records ----
        records = prompt_records(output)
        if self.config.pass_at_k or self.config.maj_at_k or self.config.best_of_k:
            with raise_on_all_ranks(self.trainer):
                answer_of = answer_function(self.config.answer)
                records = [add_repeated(record, self.config, answer_of) for record in records]
        if self.config.win_rate_reference:
            records = self._compare_with_reference(rollout.prompt, batch_idx, records)
        if self.config.win_rate_chosen:
            records = self._compare_with_dataset(rollout.prompt, records)
        if self.config.perplexity:
            records = self._add_perplexity(rollout.prompt, records)
        self._sums.add(records)
        output["records"], output["times"] = records, self.worker.timer.pop()
        return output

    def settings(self, policy: str, reference: str | None) -> dict[str, Any]:
        """Return the JSON-ready settings that an evaluation depends on.

        Args:
            policy: folder or hub name of the policy.
            reference: that of the reference; None where it has no weights of its own.
        """
        reward = type(self.worker.reward)
        return {
            "policy": policy,
            "reference": "the policy's start" if reference is None and self.reference is not None else reference,
            "reward": {"class_path": f"{reward.__module__}.{reward.__qualname__}"},
            "truncation_penalty": self.objective.truncation_penalty,
            "overlong_cache": self.worker.overlong_cache,
            "sampling": asdict(self.worker.sampling),
            "kl": asdict(self.objective.kl_config),
        }

    def means(self) -> dict[str, float]:
        """Return the figures over all ranks, the same on each, and start the next evaluation."""
        return self._sums.means()

    # ---- Responses that are not the policy's ----

    def _compare_with_reference(
        self, prompt: PromptBatch, batch_idx: int, records: list[PromptRecord]
    ) -> list[PromptRecord]:
        """Let the reference respond to the same prompts, and compare the rewards."""
        if self.reference is None:
            return records
        device = self.trainer.strategy.root_device
        generator = rollout_generator(self.seed, self.trainer.global_rank, REFERENCE, batch_idx, device)
        with raise_on_all_ranks(self.trainer), self.reference.generating():
            responses = self._reference_worker.generate_responses(self.reference.model, prompt, generator, greedy=False)
        with raise_on_all_ranks(self.trainer):
            # An engine may decode greedily whether or not it is asked to; only samples are compared.
            rollout = self.worker.score_responses(
                prompt, responses._replace(greedy=None), [record.responses["greedy"][0] for record in records]
            )
        # ---- Compare every sample with every one of the reference ----
        num_prompts = len(records)
        texts, rewards = (
            group_by_prompt(rollout.sampled.texts, num_prompts),
            rollout.reward.view(num_prompts, -1).tolist(),
        )
        return [add_comparison(record, "reference", texts[i], rewards[i]) for i, record in enumerate(records)]

    def _compare_with_dataset(self, prompt: PromptBatch, records: list[PromptRecord]) -> list[PromptRecord]:
        """Score the data set's responses, and compare the rewards."""
        messages = response_messages(prompt.rows, self.config.response_column)
        if self._all_missing(messages):
            return records
        tokenizer, skips = self.worker.tokenizer, self.worker.sampling.skip_special_tokens
        hidden = hidden_ids(tokenizer, self.worker.eos_ids, skip_special_tokens=skips)
        with raise_on_all_ranks(self.trainer):
            texts = shown_texts(tokenizer, prompt.prompts, messages, hidden)
        # Where there is none, the policy's own stands in: it has been scored before, so it can be scored.
        pairs = [
            (record.responses["sampled"][0] if text is None else text, record.responses["greedy"][0])
            for text, record in zip(texts, records, strict=True)
        ]
        tokens = encode_batch(tokenizer, [text for text, _ in pairs])
        chosen = [Response(*pair, tuple(ids)) for pair, ids in zip(pairs, tokens, strict=True)]
        report_progress(f"scoring {len(chosen)} responses of the data set with {self.worker.reward!r}")
        measure = self.worker.timer.measure("reward", prompt.prompt_ids.device)
        with raise_on_all_ranks(self.trainer), measure, torch.no_grad():
            assert isinstance(self.worker.reward, Reward)
            rewards = checked_scores(self.worker.reward, prompt.prompts, chosen, prompt.rows).total.tolist()
        return [
            record if text is None else add_comparison(record, "chosen", [text], [reward])
            for record, text, reward in zip(records, texts, rewards, strict=True)
        ]

    # ---- Perplexities ----

    def _add_perplexity(self, prompt: PromptBatch, records: list[PromptRecord]) -> list[PromptRecord]:
        """Compute the log-probs of the data set's responses under policy and reference."""
        messages = response_messages(prompt.rows, self.config.response_column)
        if self._all_missing(messages):
            return records
        tokenizer, max_length = self.worker.tokenizer, self.config.max_length
        responses = tokenize_responses(tokenizer, self.policy, prompt, messages, max_length)
        return [
            record if message is None else record._replace(sums=record.sums | sums)
            for record, message, sums in zip(records, messages, self._log_likelihoods(prompt, responses), strict=True)
        ]

    @torch.no_grad()
    def text_records(self, text: str) -> list[PromptRecord]:
        """Return the perplexities of policy and reference on this rank's share of a text, a record for each piece.

        Pieces are `max_length` tokens long. Every rank takes equally many: one of them may come twice.
        """
        rank, num_ranks = self.trainer.global_rank, self.trainer.world_size
        pieces = split_text(self.worker.tokenizer, self.policy, text, self.config.max_length)
        # ---- This rank's pieces; a repeated one counts once, by its index ----
        indices = list(range(rank, len(pieces), num_ranks))
        indices += [0] * (len(range(0, len(pieces), num_ranks)) - len(indices))
        records = []
        for index in indices:
            with self.trainer.precision_plugin.forward_context():
                (sums,) = self._log_likelihoods(*piece_to_batch(pieces[index], self.trainer.strategy.root_device))
            records.append(PromptRecord(index, "", {}, {}, sums))
        return records

    def _log_likelihoods(self, prompt: PromptBatch, responses: Responses) -> list[dict[str, tuple[float, float]]]:
        """Return for each response the nats that it costs policy and reference, and its number of tokens."""
        statistics = response_statistics(self.policy, prompt, responses, entropy=False)
        log_probs = {"perplexity": statistics.log_probs}  # [M, R]
        if self.reference is not None:
            with self.reference.running():
                statistics = response_statistics(self.reference.model, prompt, responses, entropy=False)
                log_probs["reference_perplexity"] = statistics.log_probs
        count, mask = len(responses.response_ids), responses.response_mask
        # A perplexity is exp(sum of nats / number of tokens), so both sums are kept apart until the end.
        columns = {name: sums_by_prompt(-values, mask, count) for name, values in log_probs.items()}
        return [{name: column[i] for name, column in columns.items()} for i in range(count)]

    def _all_missing(self, messages: Sequence[Message | None]) -> bool:
        """Whether no row has a response. Of several ranks all go on: a sharded model runs on each or on none."""
        return self.trainer.world_size == 1 and not any(messages)
