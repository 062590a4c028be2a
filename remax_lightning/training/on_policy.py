"""Proof that the log-probs of drawn tokens are those that training computes, for any engine, model and precision.

Two prompts of random tokens, one of them padded, get a few response tokens. Four things could separate what is drawn
from what is trained, and each has a figure of its own: the engine, the mode of the model (dropout under another name,
noise in a router), padding (a recurrent state that reads it), and packing (texts of one row that see each other).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from remax_lightning.distributed import max_over_ranks, raise_on_all_ranks
from remax_lightning.errors import UserError
from remax_lightning.models import ModelConfig
from remax_lightning.models.forward import eval_mode
from remax_lightning.models.log_probs import policy_statistics
from remax_lightning.models.sampling import gather_log_probs, truncated_logits
from remax_lightning.sharding import language_model
from remax_lightning.training.worker import RolloutWorker
from remax_lightning.types import PromptBatch, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_LENGTHS = (6, 3)
"""Tokens of the two prompts; the second is padded on the left to the length of the first."""
RANDOM_PASSES = 8
"""Passes in train mode of a model that draws random numbers there. One would miss a layer that is left out of a tenth
of the passes; a model that draws none needs one."""
SAMPLES = 16
"""Responses per prompt from an engine without log-probs, which can only be judged by how likely they are."""
RESPONSE_LENGTH = 8
"""Tokens of a response: enough for cached steps to go wrong, and under 2 seconds for a policy that fits the device."""
LIMIT, LIMIT_16_BITS = 0.05, 1.0
"""Nats between two log-probs of one token beyond what rounding explains: decoding, training and a plain pass multiply
in other shapes and orders."""
LIKELIHOOD_LIMIT = 6.0
"""Standard errors by which the mean log-prob of sampled tokens may differ from what the policy itself would draw; by
chance it is more in one run of 500 million."""
MAX_IMPOSSIBLE = 0.02
"""Share of sampled tokens that the policy would not draw at all: rounding moves a token over the edge of top-k or top-p
now and then."""
MODE_LIMIT, MODE_LIMIT_16_BITS = 1e-3, 0.05
"""Nats between log-probs in train and in eval mode; below `LIMIT`, because both multiply in the same order."""


class OnPolicyGaps(NamedTuple):
    """The largest differences between log-probs of the same tokens, in nats; infinite where one is not a number.

    Args:
        decoding: the engine's log-probs of sampled tokens against a plain pass; 0 where the engine returns none.
        greedy: how far the greedy tokens are below the most likely ones in a plain pass.
        mode: train mode against eval mode; the largest of several passes where the model draws random numbers.
        padding: the batch with a padded prompt against each row alone, without padding.
        likelihood: for an engine without log-probs, by how many standard errors the mean log-prob of its sampled tokens
            differs from that of tokens which the policy draws, infinite where it could not draw them; else 0.
        packing: the pass of training, where it runs packed rows, against each row alone.
    """

    decoding: float
    greedy: float
    mode: float
    padding: float
    likelihood: float = 0.0
    packing: float = 0.0


@torch.no_grad()
def measure_gaps(policy: PreTrainedModel, worker: RolloutWorker) -> OnPolicyGaps:
    """Roll out two short responses, and compare their log-probs with those of the training pass and of plain passes.

    All ranks have to call this where the policy is sharded: each makes the same number of passes. The random numbers of
    the run are left as they are.

    Args:
        policy: the model that is trained, in train mode.
        worker: prepared to roll out with it; its engine and sampling are those of the run.
    """
    with isolate_rng():
        rollout, greedy_ids = _roll_out(policy, worker)
        # ---- The same tokens in train mode, in eval mode, and in eval mode without padding ----
        trained = _passes_in_train_mode(policy, rollout, worker)  # [passes, 2, R]
        with eval_mode(policy):
            in_eval = _log_probs(policy, rollout, worker)  # [2, R]
            padded = _log_probs(policy, rollout, worker, packed=False)  # [2, R]
            alone, greedy_gaps = zip(
                *(_plain_pass(policy, worker, rollout, greedy_ids, row) for row in range(len(PROMPT_LENGTHS))),
                strict=True,
            )
            likelihood = 0.0 if rollout.log_probs is not None else _unlikelihood(policy, worker)
    # ---- Compare: two passes of a pair differ in one thing only ----
    mask = rollout.sampled.response_mask
    plain = torch.zeros_like(padded).masked_scatter(mask, torch.cat(alone).to(padded))  # [2, R]
    drawn = plain if rollout.log_probs is None else rollout.log_probs
    return OnPolicyGaps(
        decoding=_largest(drawn - plain, mask),
        greedy=max(greedy_gaps),
        mode=_largest(trained - in_eval, mask.expand_as(trained)),
        padding=_largest(padded - plain, mask),
        likelihood=likelihood,
        packing=_largest(in_eval - plain, mask),
    )


def prove_on_policy(
    trainer: Trainer, policy: PreTrainedModel, worker: RolloutWorker, source: ModelConfig, *, is_16_bit: bool
) -> None:
    """Stop a run whose engine, model or precision separates what is drawn from what is trained.

    Args:
        trainer: of the run.
        policy: the model that is trained, in train mode.
        worker: prepared to roll out with it; its engine and sampling are those of the run.
        source: where the policy comes from; says whether it has dropout.
        is_16_bit: whether the policy computes in 16 bits.

    Raises:
        UserError: naming what is to blame: a layer, padding or the engine.
    """
    # Where the user asked for dropout, train mode differs from eval mode on purpose.
    asked = not source.disable_dropout or (source.lora is not None and source.lora.dropout > 0)
    # In the run's own precision, so that rounding is that of a training step.
    with trainer.precision_plugin.train_step_context():
        with raise_on_all_ranks(trainer):
            gaps = measure_gaps(policy, worker)
        # The largest gap of any rank, so that all ranks judge alike: looking for a layer to blame runs the policy.
        gaps = OnPolicyGaps(*max_over_ranks(trainer, gaps))
        judge_gaps(gaps, policy, worker, is_16_bit=is_16_bit, random_layers=asked)


def judge_gaps(
    gaps: OnPolicyGaps, policy: PreTrainedModel, worker: RolloutWorker, *, is_16_bit: bool, random_layers: bool
) -> None:
    """Stop a run whose gradient would be of another policy than the one that draws.

    All ranks have to call this with the same gaps: looking for the layer to blame runs the policy.

    Args:
        gaps: the largest over all ranks.
        policy: the model that is trained, in train mode.
        worker: prepared to roll out with it.
        is_16_bit: whether the policy computes in 16 bits.
        random_layers: whether the configuration asks for dropout, so that train mode may differ.

    Raises:
        UserError: naming what is to blame: a layer, padding or the engine.
    """
    limit, mode_limit = (LIMIT_16_BITS, MODE_LIMIT_16_BITS) if is_16_bit else (LIMIT, MODE_LIMIT)
    name = type(language_model(policy)).__name__
    if gaps.mode > mode_limit and not random_layers:
        raise UserError(
            f"model.policy: in train mode {name} gives tokens log-probs that differ by up to {gaps.mode:.2g} nats from"
            f" eval mode, in which responses are drawn; {_random_layer(policy)} depends on the mode. Set what makes it"
            " random to 0 in the config.json of the policy, or set model.check_on_policy to false to train like this"
        )
    if gaps.packing > limit >= gaps.padding:
        raise UserError(
            f"model.policy: {name} gives texts that are packed into one row log-probs that differ by up to"
            f" {gaps.packing:.2g} nats from the same texts alone; set model.policy.attn_implementation to eager, with"
            " which training passes run padded rows"
        )
    # Before the engine is blamed: what padding changes shows as a gap of decoding, too.
    if gaps.padding > limit:
        raise UserError(
            f"model.policy: {name} gives a prompt with padding log-probs that differ by up to {gaps.padding:.2g} nats"
            " from the same prompt without padding, so what it draws depends on the other prompts of the batch; take a"
            " model that reads attention_mask, or set model.check_on_policy to false to train like this"
        )
    if max(gaps.decoding, gaps.greedy) > limit:
        what = "sampled tokens" if gaps.decoding > limit else "greedy tokens"
        gap = gaps.decoding if gaps.decoding > limit else gaps.greedy
        raise UserError(
            f"model.rollout: {type(worker.engine).__name__} draws {what} whose log-probs differ by up to {gap:.2g} nats"
            f" from those of {name} itself, so the gradient would be of another policy than the one that draws; leave"
            " model.rollout out, set it to HuggingFaceEngine, or set model.check_on_policy to false where the engine"
            " is off-policy on purpose"
        )
    if gaps.likelihood > LIKELIHOOD_LIMIT:
        how = (
            f"whose mean log-prob is {gaps.likelihood:.2g} standard errors from that of tokens which {name} would draw"
            if math.isfinite(gaps.likelihood)
            else f"which {name} would not draw with model.sampling"
        )
        raise UserError(
            f"model.rollout: {type(worker.engine).__name__} draws sampled tokens {how}, so the gradient would be of"
            " another policy than the one that draws; leave model.rollout out, set it to HuggingFaceEngine, let it"
            " return log-probs, or set model.check_on_policy to false where the engine is off-policy on purpose"
        )


def _passes_in_train_mode(policy: PreTrainedModel, rollout: Rollout, worker: RolloutWorker) -> Tensor:
    """Return `[passes, 2, R]` log-probs in train mode: of one pass, and of more where it drew random numbers.

    All ranks draw or none does, since they have the same layers; so all make the same number of passes.
    """
    before = _random_state()
    passes = [_log_probs(policy, rollout, worker)]
    if any(not torch.equal(old, new) for old, new in zip(before, _random_state(), strict=True)):
        passes += [_log_probs(policy, rollout, worker) for _ in range(RANDOM_PASSES - 1)]
    return torch.stack(passes)


def _random_state() -> list[Tensor]:
    """Return the state of the generators that layers draw from: torch's, NumPy's and Python's."""
    states = [torch.get_rng_state(), torch.from_numpy(cast(Any, np.random.get_state())[1].astype(np.int64))]
    states.append(torch.tensor(random.getstate()[1], dtype=torch.int64))
    return states + (torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])


def _unlikelihood(policy: PreTrainedModel, worker: RolloutWorker) -> float:
    """Return by how many standard errors the mean log-prob of an engine's samples is off; see `OnPolicyGaps`.

    Of a token that is drawn from p the log-prob has the mean `sum p log p` and the variance `sum p (log p)^2 - mean^2`.
    Tokens of one response are drawn one after the other, so that the sum of the differences from these means has the
    sum of the variances as its own.
    """
    rollout, _ = _roll_out(policy, worker, num_samples=SAMPLES)
    responses, prompt = rollout.sampled, rollout.prompt
    difference = variance = impossible = count = 0.0
    for row, (ids, mask) in enumerate(zip(responses.response_ids, responses.response_mask, strict=True)):
        index = row // SAMPLES  # the prompt of this response
        tokens = ids[mask]
        # What the engine should have drawn from: logits without padding, then suppression, temperature and truncation.
        logits = _logits_behind(policy, worker, prompt.prompt_ids[index][prompt.prompt_mask[index]], tokens)
        logits = truncated_logits(logits, worker.sampling)
        log_probs = logits.log_softmax(-1)  # [tokens, V]
        # Clamped, because 0 * -inf is NaN; a token of probability 0 adds 0.
        surprise = (log_probs.exp() * log_probs.clamp_min(-1e4)).sum(-1)  # [tokens], minus the entropy
        square = (log_probs.exp() * log_probs.clamp_min(-1e4).square()).sum(-1)
        drawn = log_probs.gather(-1, tokens[:, None]).squeeze(-1)
        # A token that cannot be drawn has the log-prob -inf; those are counted instead of summed.
        possible = drawn.isfinite()
        count += len(tokens)
        impossible += float((~possible).sum())
        difference += float((drawn - surprise)[possible].sum())
        variance += float((square - surprise.square())[possible].sum())
    if impossible > MAX_IMPOSSIBLE * count:
        return math.inf
    # Where the policy is certain nothing varies: a difference is rounding, or shows above as impossible.
    return abs(difference) / math.sqrt(variance) if variance > 1e-6 else 0.0


def _roll_out(policy: PreTrainedModel, worker: RolloutWorker, num_samples: int = 1) -> tuple[Rollout, Tensor]:
    """Return unscored responses to two prompts with the engine's log-probs `[S, R]`, and the greedy ids `[2, R]`."""
    device = next(policy.parameters()).device
    prompt = _prompts(policy, worker, device)
    generator = torch.Generator(device).manual_seed(0)
    length = min(RESPONSE_LENGTH, worker.sampling.max_response_length)
    shortest = min(length, worker.sampling.min_response_length)
    # A short rollout with the run's own settings, which are put back whatever happens.
    sampling = worker.sampling
    worker.sampling = replace(sampling, max_response_length=length, min_response_length=shortest)
    worker.sampling = replace(worker.sampling, num_samples=num_samples)
    try:
        responses = worker.generate_responses(policy, prompt, generator, greedy=True, return_log_probs=True)
    finally:
        worker.sampling = sampling
        worker.timer.pop()  # not part of the first step
    reward = torch.zeros(len(PROMPT_LENGTHS) * num_samples, device=device)
    sampled, greedy, log_probs = responses
    rollout = Rollout(prompt, sampled, greedy, reward, None, {}, None, log_probs)
    return rollout, cast(Any, greedy).response_ids


def _prompts(policy: PreTrainedModel, worker: RolloutWorker, device: torch.device) -> PromptBatch:
    """Return two prompts of random tokens, the second padded on the left."""
    vocabulary: int = policy.config.get_text_config().vocab_size
    special = {*worker.tokenizer.all_special_ids, *worker.eos_ids, *worker.unused_ids}
    # Special tokens could end a prompt or switch a template, so prompts are made of ordinary ones.
    usable = torch.tensor([index for index in range(vocabulary) if index not in special] or [0])
    longest = max(PROMPT_LENGTHS)
    draw = torch.randint(0, len(usable), (len(PROMPT_LENGTHS), longest), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(longest) >= longest - torch.tensor(PROMPT_LENGTHS)[:, None]  # [2, P]
    pad_id = int(cast(int, worker.tokenizer.pad_token_id))
    ids = usable[draw].where(mask, torch.tensor(pad_id))
    texts = worker.tokenizer.batch_decode([row[row_mask].tolist() for row, row_mask in zip(ids, mask, strict=True)])
    return PromptBatch(ids.to(device), mask.to(device), list(texts), [{} for _ in texts])


def _log_probs(policy: PreTrainedModel, rollout: Rollout, worker: RolloutWorker, *, packed: bool = True) -> Tensor:
    """Return `[2, R]` log-probs as a training pass computes them, or from padded rows."""
    suppressed = worker.suppressed
    return policy_statistics(policy, rollout, worker.sampling, suppressed=suppressed, packed=packed).log_probs


def _plain_pass(
    policy: PreTrainedModel, worker: RolloutWorker, rollout: Rollout, greedy_ids: Tensor, row: int
) -> tuple[Tensor, float]:
    """Run one prompt with its sampled and with its greedy response, without padding, mask and positions.

    Returns:
        The log-probs `[tokens]` of the sampled tokens, and how far the greedy ones are below the most likely.
    """
    prompt = rollout.prompt.prompt_ids[row][rollout.prompt.prompt_mask[row]]  # [P of the row]
    responses = cast(Any, rollout.greedy)
    results = []
    for ids, mask in (
        (rollout.sampled.response_ids[row], rollout.sampled.response_mask[row]),
        (greedy_ids[row], responses.response_mask[row]),
    ):
        tokens = ids[mask]
        results.append((_logits_behind(policy, worker, prompt, tokens), tokens))
    (sampled_logits, sampled), (greedy_logits, greedy) = results
    below = greedy_logits.max(-1).values - greedy_logits.gather(-1, greedy[:, None]).squeeze(-1)
    return gather_log_probs(sampled_logits, sampled, worker.sampling), _largest(
        below, torch.ones_like(below, dtype=torch.bool)
    )


def _logits_behind(policy: PreTrainedModel, worker: RolloutWorker, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Return the logits `[tokens, V]` that predict tokens behind a prompt, minus infinity on suppressed ones."""
    # [P + tokens, V]; no mask and no positions, because nothing is padded
    logits = cast(Tensor, policy(torch.cat([prompt, tokens])[None], use_cache=False).logits)[0]
    predicting = logits[len(prompt) - 1 : -1].float()  # [tokens, V]
    positions = torch.arange(len(tokens), device=tokens.device)
    return worker.suppressed.apply(predicting, positions, worker.suppressed.ids_by_phase(tokens.device))


def _largest(difference: Tensor, mask: Tensor) -> float:
    """Return the largest absolute value under a mask; NaN counts as infinite."""
    return float(difference[mask].abs().nan_to_num(torch.inf).max()) if mask.any() else 0.0


def _random_layer(policy: PreTrainedModel) -> str:
    """Return the name of the first layer that gives the same inputs other outputs in train mode than in eval mode."""
    ids = torch.arange(1, 7, device=next(policy.parameters()).device)[None]
    outputs: list[dict[str, Tensor]] = []
    training = policy.training  # restored at the end
    with isolate_rng(), torch.no_grad():
        for train in (True, False):
            policy.train(train)
            with _recorded_outputs(policy) as recorded:
                policy(ids, use_cache=False)
            outputs.append(recorded)
    policy.train(training)
    # Children report before their parents: the first difference is the layer itself.
    for layer, output in outputs[0].items():
        other = outputs[1].get(layer)
        if other is not None and (output.shape != other.shape or not torch.equal(output, other)):
            return f"the layer {layer}"
    return "a layer"


@contextmanager
def _recorded_outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the output of every layer, by name and in the order in which they finish."""
    recorded: dict[str, Tensor] = {}

    def recorder(name: str) -> Any:
        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output  # decoder layers may return a tuple
            if isinstance(first, Tensor) and name not in recorded:
                recorded[name] = first.detach().clone()

        return record

    hooks = [module.register_forward_hook(recorder(name)) for name, module in model.named_modules() if name]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()
