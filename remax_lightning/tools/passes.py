"""What the passes of a step hold beside weights and stored gradients, found by running them on shapes alone.

The model's own code runs, so no family needs a formula of its own. A test holds the bytes against real tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from remax_lightning.errors import UserError
from remax_lightning.functional import OutputHead, hidden_statistics, token_statistics
from remax_lightning.modules.head import SOFT_CAPS, hidden_states
from remax_lightning.rollout import SamplingConfig
from remax_lightning.rollout.auto import obstacle
from remax_lightning.rollout.forward import language_model, model_inputs, takes
from remax_lightning.rollout.sampling import draw, shape_logits
from remax_lightning.tools.allocations import LiveBytes
from remax_lightning.tools.quantities import Moment, RolloutBytes, TrainingBytes, UpdateBytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Work(NamedTuple):
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
    """The passes of one step over models made inside `shapes_only`, in the order of the step.

    Args:
        policy: the model that is trained, with gradient checkpointing as it will be.
        work: what it does.
        autocast: the context that a step runs in.
        whole_logits: the policy's output embedding cannot be read apart, so training makes all logits at once.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        work: Work,
        autocast: Callable[[], AbstractContextManager[Any]],
        *,
        whole_logits: bool,
    ) -> None:
        self.policy, self.work, self.autocast, self.whole_logits = policy, work, autocast, whole_logits

    def rollout(self, *, greedy: bool) -> RolloutBytes:
        """Count a rollout by `PairedEngine`: reading the prompts, then the last decoding step.

        Raises:
            UserError: if the policy needs another engine.
        """
        from transformers import DynamicCache, StaticCache

        model = language_model(self.policy)
        if reason := obstacle(model):
            raise UserError(f"model.policy.path: remax plan knows PairedEngine only; {type(model).__name__} {reason}")
        model.eval()
        prompts, sampling, length = self.work.prompts, self.work.sampling, self.work.length
        sampled = prompts * sampling.num_samples
        rows = sampled + prompts * greedy
        with self.autocast(), torch.no_grad(), LiveBytes([model]) as live:
            read = DynamicCache(config=model.config)
            logits = _logits(model, prompts, self.work.prompt_length, self.work.prompt_length, read)
            prefill = live.peak
            # While the last layer's states are repeated to all rows: its prompt's, and a copy of half of them per row.
            repeat = max(_layer_bytes(read)) * (1 + rows / prompts / 2) + logits.nbytes * (1 + rows / prompts)
            del read, logits
            live.reset()
            slots = StaticCache(config=model.config, max_cache_len=length)
            logits = _logits(model, rows, 1, length, slots)
            draw(shape_logits(logits[:sampled].clone(), sampling), torch.Generator())
        cache = sum(_layer_bytes(slots))
        return RolloutBytes(cache, max(prefill - cache, int(repeat), live.peak - cache))

    def policy_scoring(self) -> int:
        """Count a pass of the policy without gradients."""
        with LiveBytes([self.policy]) as live, self.autocast(), torch.no_grad():
            self._log_probs(self.policy.train(), self.work.scoring_rows, live, self.whole_logits)
        return live.peak

    def reference_scoring(self, reference: PreTrainedModel) -> int:
        """Count a pass of the reference."""
        with LiveBytes([reference]) as live, self.autocast(), torch.no_grad():
            self._log_probs(reference.eval(), self.work.reference_rows, live, False)
        return live.peak

    def reward_scoring(self, reward: PreTrainedModel) -> int:
        """Count a pass of the reward model."""
        reward.eval().config.use_cache = False
        ids, mask = _rows(self.work.reward_rows, self.work.reward_length or self.work.length)
        with LiveBytes([reward]) as live, self.autocast(), torch.no_grad():
            reward.base_model(ids, attention_mask=mask.long())
        return live.peak

    def hidden(self, reference: PreTrainedModel, rows: int) -> int:
        """Count the reference's hidden states of `rows` responses, where a KL over the vocabulary needs them."""
        head = self._required_head(reference)
        return rows * self.work.sampling.max_response_length * head.weight.shape[1] * head.weight.itemsize

    def training(self, reference: PreTrainedModel | None = None) -> TrainingBytes:
        """Count forward and backward pass; `reference` where the loss has a KL over the vocabulary."""
        moments: list[Moment] = []
        stored = 0

        def store(parameter: Tensor) -> None:
            nonlocal stored
            parameter.grad = None
            moments.append(Moment(live.peak, stored))
            stored += parameter.numel()
            live.reset()

        policy, rows = self.policy.train(), self.work.training_rows
        hooks = [each.register_post_accumulate_grad_hook(store) for each in policy.parameters() if each.requires_grad]
        with LiveBytes([policy] if reference is None else [policy, reference]) as live:
            with self.autocast():
                log_probs, activations = self._log_probs(policy, rows, live, self.whole_logits, reference)
            forward = live.peak
            live.reset()
            log_probs.sum().backward()
        for hook in hooks:
            hook.remove()
        return TrainingBytes(activations, forward, tuple(moments))

    def _log_probs(
        self,
        model: PreTrainedModel,
        rows: int,
        live: LiveBytes,
        whole_logits: bool,
        reference: PreTrainedModel | None = None,
    ) -> tuple[Tensor, int]:
        """Return log-probs, as `policy_statistics` makes them, and what is alive when the body is through."""
        ids, mask = _rows(rows, self.work.length)
        responses = ids[:, self.work.prompt_length :]
        predicting = slice(-responses.shape[1] - 1, -1)
        head = None if whole_logits else output_head(model)
        if head is None:
            inputs = model_inputs(model, ids, mask)
            if takes(model, "logits_to_keep"):
                inputs["logits_to_keep"] = responses.shape[1] + 1
            logits = model(**inputs, use_cache=False).logits
            body = live.live - logits.nbytes
            return token_statistics(logits[:, predicting], responses).log_probs, body
        hidden = hidden_states(model, ids, mask)[:, predicting].flatten(0, 1)
        body, compared = live.live, None
        if reference is not None:
            other = self._required_head(reference)
            compared = torch.empty(len(hidden), other.weight.shape[1], dtype=other.weight.dtype), other
        found = hidden_statistics(hidden, head, responses.flatten(), reference=compared)
        return found.log_probs if found.kl is None else found.log_probs + found.kl, body

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


def _rows(count: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(count, length, dtype=torch.long), torch.ones(count, length, dtype=torch.bool)


def _logits(model: PreTrainedModel, rows: int, tokens: int, length: int, cache: Any) -> Tensor:
    """Return the last token's logits, of `tokens` new ones that see `length` in all."""
    ids, mask = torch.zeros(rows, tokens, dtype=torch.long), torch.ones(rows, length, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if takes(model, "position_ids"):
        inputs["position_ids"] = torch.zeros_like(ids)
    if takes(model, "logits_to_keep"):
        inputs["logits_to_keep"] = 1
    return cast(Tensor, model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1])


def _layer_bytes(cache: Any) -> list[int]:
    return [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
