"""What the passes of a step hold beside weights and stored gradients, found by running them on shapes alone.

The model's own code runs, so no family needs a formula of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from remax_lightning.errors import UserError
from remax_lightning.functional import OutputHead, hidden_statistics, token_statistics
from remax_lightning.models.forward import accepts_argument, language_model, model_inputs, prompt_index_per_row
from remax_lightning.models.lm_head import SOFT_CAPS, hidden_states
from remax_lightning.models.sampling_mask import NO_TOKENS, make_sampling_mask
from remax_lightning.rollout import SamplingConfig
from remax_lightning.rollout.sampling import next_tokens
from remax_lightning.rollout.static_cache import bucketed_length, cache_of_slots, fill_slots, layout_of, make_slots
from remax_lightning.tools.plan.memory_tracker import LiveBytes
from remax_lightning.tools.plan.types import BackwardPeak, RolloutBytes, TrainingBytes, UpdateBytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StepShape(NamedTuple):
    """What a device does in a step.

    Args:
        prompts: `B`, of a rollout.
        sampling: with `n` samples per prompt and `R` tokens per response.
        prompt_length: tokens of a prompt, `P`; all are taken for the longest.
        training_rows: responses per training pass.
        scoring_rows: responses per pass of the policy without gradients.
        reference_rows: responses per pass of the reference.
        reward_rows: texts per pass of the reward model.
        reward_length: most tokens of a text; None for those of prompt and response.
    """

    prompts: int
    sampling: SamplingConfig
    prompt_length: int
    training_rows: int
    scoring_rows: int
    reference_rows: int
    reward_rows: int = 0
    reward_length: int | None = None

    @property
    def length(self) -> int:
        """Tokens of a prompt with its response, `T`."""
        return self.prompt_length + self.sampling.max_response_length


class StepPasses:
    """The passes of one step over models made inside `shapes_only`, each on its own.

    Args:
        policy: the model that is trained, with gradient checkpointing as it will be.
        work: what it does.
        autocast: makes the context that a step runs in.
        whole_logits: the policy's output embedding cannot be read apart, so its passes make all logits at once.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        work: StepShape,
        autocast: Callable[[], AbstractContextManager[Any]],
        *,
        whole_logits: bool,
    ) -> None:
        self.policy, self.work, self.autocast, self.whole_logits = policy, work, autocast, whole_logits

    @torch.no_grad()
    def rollout(self, *, greedy: bool) -> RolloutBytes:
        """Count a rollout by `PairedEngine`: reading the prompts, then the longest decoding step.

        Raises:
            UserError: if the policy needs another engine.
        """
        from transformers import DynamicCache

        model, sampling = language_model(self.policy), self.work.sampling
        if getattr(model, "_is_stateful", False) or not accepts_argument(model, "past_key_values"):
            raise _unsupported_engine_error(model)
        model.eval()
        ids, mask = _dummy_rows(self.work.prompts, self.work.prompt_length)
        rows = prompt_index_per_row(ids, sampling.num_samples, greedy)
        with self.autocast(), LiveBytes([model]) as live:
            cache = DynamicCache(config=model.config)
            inputs = model_inputs(model, ids, mask)
            if accepts_argument(model, "logits_to_keep"):
                inputs["logits_to_keep"] = 1
            logits = model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1][rows]
            layout = layout_of(cache)
            if layout is None:
                raise _unsupported_engine_error(model)
            length = bucketed_length(self.work.length)
            slots = make_slots(cache, len(rows), length)
            fill_slots(slots, cache, rows, self.work.prompt_length)
            del cache
            token, position = torch.zeros(len(rows), 1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
            step = {"input_ids": token, "attention_mask": torch.ones(len(rows), length, dtype=torch.long)}
            if accepts_argument(model, "position_ids"):
                step["position_ids"] = token
            filled = cache_of_slots(layout, slots, position, length)
            logits = model(**step, past_key_values=filled, use_cache=True).logits[:, -1]
            next_tokens(logits, self.work.prompts * sampling.num_samples, sampling, torch.Generator())
        states = sum(slot.nbytes for slot in slots)
        return RolloutBytes(states, live.peak - states)

    @torch.no_grad()
    def policy_scoring(self) -> int:
        """Count a pass of the policy without gradients."""
        with LiveBytes([self.policy]) as live, self.autocast():
            self._log_probs(self.policy.train(), self.work.scoring_rows, live, self.whole_logits)
        return live.peak

    @torch.no_grad()
    def reference_scoring(self, reference: PreTrainedModel) -> int:
        """Count a pass of the reference, which may be the policy itself."""
        whole_logits = self.whole_logits and reference is self.policy
        with LiveBytes([reference]) as live, self.autocast():
            self._log_probs(reference.eval(), self.work.reference_rows, live, whole_logits)
        return live.peak

    @torch.no_grad()
    def reward_scoring(self, reward: PreTrainedModel) -> int:
        """Count a pass of a reward model."""
        reward.eval().config.use_cache = False
        ids, mask = _dummy_rows(self.work.reward_rows, self.work.reward_length or self.work.length)
        with LiveBytes([reward]) as live, self.autocast():
            reward.base_model(ids, attention_mask=mask.long())
        return live.peak

    def hidden_state_bytes(self, reference: PreTrainedModel, rows: int) -> int:
        """Count the reference's hidden states of `rows` responses, which a KL over the vocabulary needs."""
        weight = self._required_head(reference).weight
        return rows * self.work.sampling.max_response_length * weight.shape[1] * weight.itemsize

    def training(self, reference: PreTrainedModel | None = None) -> TrainingBytes:
        """Count forward and backward pass; `reference` where there is a KL over the vocabulary to it."""
        moments: list[BackwardPeak] = []
        stored = 0

        def store(parameter: Tensor) -> None:
            nonlocal stored
            parameter.grad = None
            moments.append(BackwardPeak(live.peak, stored))
            stored += parameter.numel()
            live.reset()

        policy = self.policy.train()
        hooks = [
            weight.register_post_accumulate_grad_hook(store) for weight in policy.parameters() if weight.requires_grad
        ]
        with LiveBytes([policy] if reference is None else [policy, reference]) as live:
            with self.autocast():
                log_probs, body = self._log_probs(policy, self.work.training_rows, live, self.whole_logits, reference)
            forward = live.peak
            live.reset()
            log_probs.sum().backward()
            moments.append(BackwardPeak(live.peak, stored))
        for hook in hooks:
            hook.remove()
        return TrainingBytes(body, forward, tuple(moments))

    def _log_probs(
        self,
        model: PreTrainedModel,
        rows: int,
        live: LiveBytes,
        whole_logits: bool,
        reference: PreTrainedModel | None = None,
    ) -> tuple[Tensor, int]:
        """Return log-probs, as `policy_statistics` makes them, and what is alive when the body is through."""
        ids, mask = _dummy_rows(rows, self.work.length)
        responses, token_mask = ids[:, self.work.prompt_length :], None
        if model is self.policy:
            token_mask = make_sampling_mask(self.work.sampling, NO_TOKENS, responses.flatten())
        predicting = slice(-responses.shape[1] - 1, -1)
        head = None if whole_logits else output_head(model)
        if head is None:
            inputs = model_inputs(model, ids, mask)
            if accepts_argument(model, "logits_to_keep"):
                inputs["logits_to_keep"] = responses.shape[1] + 1
            logits = model(**inputs, use_cache=False).logits
            body = live.live - logits.nbytes
            return token_statistics(logits[:, predicting], responses, sampling_mask=token_mask).log_probs, body
        hidden = hidden_states(model, ids, mask)[:, predicting].flatten(0, 1)
        body, compared = live.live, None
        if reference is not None:
            other = self._required_head(reference)
            compared = torch.empty(len(hidden), other.weight.shape[1], dtype=other.weight.dtype), other
        statistics = hidden_statistics(hidden, head, responses.flatten(), reference=compared, sampling_mask=token_mask)
        return statistics.log_probs if statistics.kl is None else statistics.log_probs + statistics.kl, body

    def _required_head(self, reference: PreTrainedModel) -> OutputHead:
        head = output_head(reference)
        if head is None or self.whole_logits or output_head(self.policy) is None:
            raise UserError(
                "model.kl.estimator (or loss_estimator) full needs output heads that can be read: not under a strategy"
                " that spreads the policy over the devices, and only linear ones; choose k1, k2 or k3"
            )
        return head


def update_bytes(
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], groups: Sequence[dict[str, Any]], *, foreach: bool
) -> UpdateBytes:
    """Count an optimizer; call it inside `shapes_only`.

    Args:
        make: makes the optimizer of parameter groups.
        groups: the parameter groups.
        foreach: update all parameters at once, as PyTorch chooses on CUDA unless it is told otherwise.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = make([dict(group) for group in groups])
    for group in optimizer.param_groups:
        if foreach and not group.get("fused") and group.get("foreach", False) is None:
            group["foreach"] = True
    with LiveBytes([*parameters, *(parameter.grad for parameter in parameters)]) as live:
        optimizer.step()
        state = live.live
        live.reset()
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    return UpdateBytes(state, live.peak - state)


def output_head(model: PreTrainedModel) -> OutputHead | None:
    """Return the head as `find_head` would, which needs numbers to look at; None where it is no linear layer."""
    layer = language_model(model).get_output_embeddings()
    if type(layer) is not nn.Linear:
        return None
    config = cast(Any, model).config.get_text_config()
    caps = [getattr(config, name, None) for name in SOFT_CAPS]
    return OutputHead(layer.weight, layer.bias, soft_cap=next((cap for cap in caps if cap), None))


def _unsupported_engine_error(model: PreTrainedModel) -> UserError:
    return UserError(
        f"model.policy.path: remax plan knows the memory of PairedEngine only, which cannot decode with a"
        f" {type(model).__name__}: it keeps more than keys and values"
    )


def _dummy_rows(count: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(count, length, dtype=torch.long), torch.ones(count, length, dtype=torch.bool)
