"""The nouns of the project: what a data loader yields, what a rollout makes of it, what a step hands to callbacks.

Letters used for shapes everywhere: `B` prompts, `n` sampled responses per prompt, `S = B * n` sampled responses
(those of one prompt stand next to each other), `N = B * (n + 1)` rows of a rollout, `P` prompt tokens,
`R` response tokens, `T = P + R`, `V` vocabulary.

NamedTuples, because Lightning moves those to the device and refuses frozen dataclasses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NotRequired, TypeAlias, TypedDict, TypeVar

import torch
from torch import Tensor

from remax_lightning.files import PromptRecord

T = TypeVar("T")
Selection: TypeAlias = slice | Tensor
"""Rows of a batch: from one to another, or `[b]` numbers."""


def _select(values: list[T], rows: Selection) -> list[T]:
    """Return part of a list, as indexing returns part of a tensor. One that a checkpoint has left out is empty."""
    if isinstance(rows, slice):
        return values[rows]
    return [values[row] for row in rows.tolist()] if values else []


class Conversation(NamedTuple):
    """The messages that a chat template makes a prompt of.

    Args:
        messages: in the words of the chat templates: `role`, `content`, and what else a template reads.
        tools: definitions of the tools that may be called; empty where there are none.
        template_kwargs: variables of the template that the row sets, such as `enable_thinking`.
        where: place of the row in its source, for messages; empty where it is not known.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] = []  # noqa: RUF012 - never written to
    template_kwargs: dict[str, Any] = {}  # noqa: RUF012
    where: str = ""


class Prompt(str):
    """A prompt as the policy reads it, together with the conversation that it was made of.

    It is text wherever text is expected. The conversation goes along to whatever renders the prompt once more, such as
    a reward model with a chat template of its own, so that policy and reward model read the same messages.

    Args:
        text: the text.
        conversation: the messages behind it, without the response; None for plain text.
    """

    conversation: Conversation | None

    def __new__(cls, text: str, conversation: Conversation | None = None) -> Prompt:
        """Make a string that knows its conversation."""
        # str is immutable, so its text is set in `__new__`.
        prompt = super().__new__(cls, text)
        prompt.conversation = conversation
        return prompt


class Response(str):
    """A response as a reward reads it, together with its tokens and the greedy response to the same prompt.

    It is text wherever text is expected. A reward that compares responses finds in each what it is compared with, so it
    may score any part of a batch, in any order and in another process.

    Args:
        text: the text.
        baseline: the policy's greedy response to the prompt, of the greedy response its own text; None where no greedy
            responses are generated.
        token_ids: the ids of its tokens, the one that ends it included; a reward may return a number for each. None
            where they are not known.
    """

    baseline: str | None
    token_ids: tuple[int, ...] | None

    def __new__(cls, text: str, baseline: str | None = None, token_ids: tuple[int, ...] | None = None) -> Response:
        """Make a string that knows its tokens and what it is compared with."""
        response = super().__new__(cls, text)
        response.baseline, response.token_ids = baseline, token_ids
        return response


class PromptBatch(NamedTuple):
    """Prompts as a data loader yields them.

    Args:
        prompt_ids: `[B, P]` token ids, padded on the left.
        prompt_mask: `[B, P]` bool, True on real tokens.
        prompts: the `B` prompts as text, as the policy reads them; a `Prompt` knows the messages that it was made of.
        rows: the `B` raw rows of the data set, for rewards that need more than the text.
        micro_batch_index: which micro-batch of the rollout batch is trained on now, from 0; the same prompts arrive
            `num_micro_batches` times.
        num_micro_batches: how many micro-batches the rollout batch is trained in.
        indices: the places of the `B` prompts in their data set; tell a prompt that is there twice, to fill up a rank,
            which an evaluation then counts once. None where they are not known.
        tokens_per_micro_batch: most tokens of a training pass; the rollout batch then arrives once, and is cut into
            passes when the lengths of its responses are known. None where micro-batches are counted in prompts.
        following: the next rollout batch, for an engine that writes ahead; None elsewhere.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    prompts: list[str]
    rows: list[dict[str, Any]]
    micro_batch_index: int = 0
    num_micro_batches: int = 1
    indices: list[int] | None = None
    tokens_per_micro_batch: int | None = None
    following: PromptBatch | None = None


class SupervisedBatch(NamedTuple):
    """Prompts with the responses to imitate.

    Args:
        prompt_ids: `[B, P]` token ids, padded on the left.
        prompt_mask: `[B, P]` bool, True on real tokens.
        response_ids: `[B, R]` token ids, padded on the right; the end-of-sequence token is part of them.
        response_mask: `[B, R]` bool, True on real tokens.
        prompts: the `B` prompts as text.
        rows: the `B` raw rows.
        step_batches: batches of this rank in the optimizer step that this one is part of; 0 where that is not known.
        step_tokens: their response tokens.
        indices: the places of the `B` examples in their data set, which tell one that is there twice, to fill up a
            rank; None where they are not known.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    prompts: list[str]
    rows: list[dict[str, Any]]
    step_batches: int = 0
    step_tokens: int = 0
    indices: list[int] | None = None


class PreferenceBatch(NamedTuple):
    """Pairs of responses, one preferred over the other, each with its prompt in front of it.

    Args:
        chosen_ids: `[B, T]` token ids of the conversations with the preferred responses.
        chosen_mask: `[B, T]` bool, True on real tokens.
        rejected_ids: `[B, T']` token ids of those with the other ones.
        rejected_mask: `[B, T']` bool, True on real tokens.
        margin: `[B]` float32, what the score of the chosen response has to be ahead by.
        prompts: the `B` prompts as text.
        rows: the `B` rows, prompt and responses apart.
        indices: the places of the `B` pairs in their data set; tell a pair that is there twice, to fill up a rank.
    """

    chosen_ids: Tensor
    chosen_mask: Tensor
    rejected_ids: Tensor
    rejected_mask: Tensor
    margin: Tensor
    prompts: list[str]
    rows: list[dict[str, Any]]
    indices: list[int]


class Responses(NamedTuple):
    """What the policy wrote, `M` responses of it (`M` is `S` for the sampled ones, `B` for the greedy ones).

    Args:
        response_ids: `[M, R]` token ids, padded on the right.
        response_mask: `[M, R]` bool, True through the first end-of-sequence token, that one included.
        truncated: `[M]` bool, True where the length limit came before the end of the sequence.
        texts: the `M` responses as text, decoded behind their prompts; without special tokens unless
            `sampling.skip_special_tokens` is false.
    """

    response_ids: Tensor
    response_mask: Tensor
    truncated: Tensor
    texts: list[str]

    def to_score(self, baselines: Sequence[str] | None) -> list[Response]:
        """Return the texts as a reward reads them, with their tokens.

        Args:
            baselines: the `M` greedy responses to the same prompts; None where there are none.
        """
        rows = zip(self.response_ids.cpu(), self.response_mask.cpu(), strict=True)
        tokens = [tuple(ids[mask].tolist()) for ids, mask in rows]
        others = [None] * len(tokens) if baselines is None else baselines
        return [Response(*columns) for columns in zip(self.texts, others, tokens, strict=True)]

    def rows(self, start: int, stop: int) -> Responses:
        """Return responses `start` to `stop` (exclusive)."""
        return self.select(slice(start, stop))

    def select(self, rows: Selection) -> Responses:
        """Return the responses `rows`, in their order."""
        return Responses(
            self.response_ids[rows],
            self.response_mask[rows],
            self.truncated[rows],
            _select(self.texts, rows),
        )


class Rollout(NamedTuple):
    """Responses to a batch of prompts and their scores.

    Args:
        prompt: the `B` prompts.
        sampled: the `S = B * n` sampled responses, prompt by prompt.
        greedy: the `B` greedy responses; None where the baseline does not need them.
        reward: `[S]` reward of the sampled responses.
        baseline_reward: `[B]` reward of the greedy responses, or None.
        reward_parts: the named parts of the reward of the sampled responses, each `[S]`.
        reference_log_probs: `[S, R]` log-probs of the sampled tokens under the reference, or None without one.
        log_probs: `[S, R]` log-probs under the policy that sampled them, or None where the training pass gives them.
        reference_hidden: `[S, R, D]` final hidden states of the reference that predict the sampled tokens, 0 outside
            the response mask; None unless the KL is over the vocabulary. Of `[S, R, V]` logits they are a share D / V:
            64 MiB instead of 2 GiB in bfloat16 for 8,192 tokens, D = 4,096 and V = 131,072.
        engine_log_probs: `[S, R]` log-probs that the engine itself had for the tokens that it drew; None unless
            `loss.mismatch` compares them with the trainer's.
        baseline_parts: the named parts of the reward of the greedy responses, each `[B]`, or None.
        normalized_reward: `[S]` weighted sum of the parts above their greedy values, each on its own scale, which is
            trained on in place of `reward - baseline_reward`; None unless the reward normalizes its parts.
        token_rewards: `[S, R]` reward of each token of the sampled responses, 0 outside the response mask, `reward`
            being their sum; None where a response has one number.
        baseline_token_rewards: `[B, R']` those of the greedy responses, over the width of their ids, or None.
    """

    prompt: PromptBatch
    sampled: Responses
    greedy: Responses | None
    reward: Tensor
    baseline_reward: Tensor | None
    reward_parts: dict[str, Tensor]
    reference_log_probs: Tensor | None
    log_probs: Tensor | None
    reference_hidden: Tensor | None = None
    engine_log_probs: Tensor | None = None
    baseline_parts: dict[str, Tensor] | None = None
    normalized_reward: Tensor | None = None
    token_rewards: Tensor | None = None
    baseline_token_rewards: Tensor | None = None

    @property
    def num_samples(self) -> int:
        """Sampled responses per prompt, `n`."""
        return self.reward.shape[0] // self.prompt.prompt_ids.shape[0]

    def micro_batch(self, index: int, num_micro_batches: int) -> Rollout:
        """Return micro-batch `index` of `num_micro_batches` equal ones; the responses of a prompt stay together."""
        # Cut by prompts, so that the n samples of a prompt and its baseline stay together.
        size = self.prompt.prompt_ids.shape[0] // num_micro_batches
        start, stop = index * size, (index + 1) * size
        first, last = start * self.num_samples, stop * self.num_samples  # of the `S` sampled responses
        return self._select(slice(start, stop), slice(first, last))

    def select(self, prompts: Tensor) -> Rollout:
        """Return the rollout of the prompts with these numbers, `[b]`, in their order."""
        return self._select(prompts, self.responses_of(prompts))

    def responses_of(self, prompts: Tensor) -> Tensor:
        """Return the numbers `[b * n]` of the sampled responses to the prompts with the numbers `[b]`."""
        samples = torch.arange(self.num_samples, device=prompts.device)
        return (prompts[:, None] * self.num_samples + samples).flatten()

    def _select(self, prompts: Selection, responses: Selection) -> Rollout:
        def part(values: Tensor | None, rows: Selection) -> Tensor | None:
            return None if values is None else values[rows]

        batch, baseline_parts = self.prompt, self.baseline_parts
        return Rollout(
            prompt=PromptBatch(
                batch.prompt_ids[prompts],
                batch.prompt_mask[prompts],
                _select(batch.prompts, prompts),
                _select(batch.rows, prompts),
                indices=None if batch.indices is None else _select(batch.indices, prompts),
            ),
            sampled=self.sampled.select(responses),
            greedy=None if self.greedy is None else self.greedy.select(prompts),
            reward=self.reward[responses],
            baseline_reward=part(self.baseline_reward, prompts),
            reward_parts={name: value[responses] for name, value in self.reward_parts.items()},
            reference_log_probs=part(self.reference_log_probs, responses),
            log_probs=part(self.log_probs, responses),
            reference_hidden=part(self.reference_hidden, responses),
            engine_log_probs=part(self.engine_log_probs, responses),
            baseline_parts=baseline_parts and {name: value[prompts] for name, value in baseline_parts.items()},
            normalized_reward=part(self.normalized_reward, responses),
            token_rewards=part(self.token_rewards, responses),
            baseline_token_rewards=part(self.baseline_token_rewards, prompts),
        )


class StepOutput(TypedDict):
    """What `training_step` and `validation_step` of `ReMaxModule` return, and so what a callback receives as `outputs`.

    Every tensor but `loss` is detached. A training step sees one part of a rollout batch at a time; `closes_step` says
    that the optimizer stepped after this part, which is when a callback logs what it has gathered.
    """

    loss: NotRequired[Tensor]
    """Scalar, scaled for the gradient; absent in validation."""
    rollout: Rollout
    """The part of the rollout that this step trained on (the whole batch in validation)."""
    advantages: Tensor
    """`[S, R]` advantages, 0 outside the response mask."""
    kl: Tensor | None
    """`[S, R]` unscaled KL estimate per token in nats, 0 outside the response mask; None without a reference, and in
    training where the KL enters neither reward nor loss."""
    entropy: Tensor
    """`[S, R]` entropy of the policy per token in nats, 0 outside `entropy_mask`."""
    entropy_mask: Tensor
    """`[S, R]` bool, True on the response tokens that the policy was run over: in training without a KL, responses that
    have no advantage are left out."""
    squared_norm: NotRequired[Tensor]
    """`[S, R]` squared norm of the gradient of each log-prob at its logits, 0 where tokens are not trained on, also of
    responses that were not run; absent where nobody asks for it (`ReMaxModule.norm_askers`)."""
    times: dict[str, float]
    """Seconds spent in this step by phase: `rollout`, `reward`; 0.0 where the phase did not run."""
    closes_step: bool
    """True where an optimizer step ends with this part; always True in validation."""
    records: NotRequired[list[PromptRecord]]
    """What was measured on each prompt; absent in training."""


Batch: TypeAlias = PromptBatch | SupervisedBatch | PreferenceBatch
"""What a data loader yields, by the stage."""


class ExportSpec(NamedTuple):
    """How to export a model that is changed when it is saved; the result of `exported` of a module.

    Args:
        model: the model in training.
        change: maps the full weights to the weights that are saved, and to further entries of the configuration.
        config: what is set in the saved configuration; None takes a name out.
    """

    model: Any
    change: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Any]]]
    config: dict[str, Any]
