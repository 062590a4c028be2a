"""Whether the reward reads the right text, and gives a response the same score in every batch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from remax_lightning.data.conversations import content_text
from remax_lightning.models.forward import eval_mode
from remax_lightning.rewards import ClassifierReward, checked_scores
from remax_lightning.rewards.loading import ClassifierSource, saved_template
from remax_lightning.tools.doctor.context import DoctorContext, Finding, NotApplicable, Tolerance, worst
from remax_lightning.tools.doctor.prompts import judge_bos
from remax_lightning.tools.plan.planned_run import reward_models
from remax_lightning.types import PreferenceBatch, Prompt, Responses, Rollout

MOVED, MOVED_16_BITS = Tolerance(1e-3, 1e-2), Tolerance(0.1, 0.25)
"""How far a score may change with the batch, as a share of the spread of the scores. In 16 bits the shape of a batch
alone changes the third digit."""
MOSTLY_CUT = 0.5
"""Share of truncated texts above which the reward model does not judge the real conversations."""


class ResponsesToScore(NamedTuple):
    """`M` responses to score: the sampled ones, then the greedy ones."""

    prompts: list[str]
    responses: Sequence[str]
    rows: list[dict[str, Any]]

    def select(self, indices: list[int]) -> ResponsesToScore:
        """Return the responses at `indices`."""
        prompts, responses, rows = self
        return ResponsesToScore(
            [prompts[i] for i in indices], [responses[i] for i in indices], [rows[i] for i in indices]
        )


def policy_responses(context: DoctorContext) -> ResponsesToScore:
    """Return the responses of the policy, with their prompts."""
    rollout: Rollout = context.rollout
    # 2 prompts with 2 samples each: 0 0 1 1, then 0 1 for the greedy responses
    prompt_index = [i for i in range(len(rollout.prompt.prompts)) for _ in range(rollout.num_samples)]
    prompt_index += range(len(rollout.prompt.prompts))
    # With their tokens and greedy responses, as in training.
    greedy = cast(Responses, rollout.greedy)
    baselines = [greedy.texts[i] for i in prompt_index]
    count = len(rollout.sampled.texts)
    texts = rollout.sampled.to_score(baselines[:count]) + greedy.to_score(baselines[count:])
    return ResponsesToScore(
        [rollout.prompt.prompts[i] for i in prompt_index], texts, [rollout.prompt.rows[i] for i in prompt_index]
    )


def _classifier_rewards(context: DoctorContext) -> list[ClassifierReward]:
    models = reward_models(cast(Any, context.reward))
    if not models:
        raise NotApplicable("the reward has no ClassifierReward")
    return models


def check_reward_template(context: DoctorContext) -> Finding:
    """Check the text that the reward model reads: prompt, response, end and special tokens."""
    return worst([_judge_template(context, model, policy_responses(context)) for model in _classifier_rewards(context)])


def _judge_template(context: DoctorContext, model: ClassifierReward, scored: ResponsesToScore) -> Finding:
    # ---- The text has the response, just behind the end of the prompt ----
    tokenizer: Any = model.tokenizer
    texts = [model.text(*row) for row in zip(*scored, strict=True)]
    shown = f"{model.path} reads {_shorten(texts[0])}"
    without_response = sum(response.strip() not in text for text, response in zip(texts, scored.responses, strict=True))
    if without_response:
        fix = "the chat template omits the response; set model.reward.init_args.template, or correct the template"
        return Finding("fail", f"{shown}; {without_response} of {len(texts)} texts do not contain their response", fix)
    elsewhere = sum(not _answers_prompt(model, *row) for row in zip(*scored, strict=True))
    if elsewhere:
        fix = (
            "the reward model judges the response as the answer to something that the policy did not read: let the"
            " template write the whole prompt before the response, and give prompts (`Prompt`) the messages that they"
            " were made of"
        )
        what = "do not have the last message of the prompt just before the response"
        return Finding("fail", f"{shown}; {elsewhere} of {len(texts)} texts {what}", fix)
    # ---- The template that the model was trained with ----
    trained_with = saved_template(ClassifierSource(model.path, "model.reward.init_args", revision=model.revision))
    if model.template is not None and trained_with is not None and model.template != trained_with:
        fix = "remove model.reward.init_args.template: the template of the model is the default"
        return Finding("fail", f"{shown}; it was trained with {trained_with!r}", fix)
    # ---- Special tokens at the start, inside, and at the end ----
    ids, _ = _token_ids(model, texts)
    if tokenizer.bos_token_id is not None:
        begins = judge_bos(ids, tokenizer, "texts of the reward model", "the data")
        if begins.status != "pass":
            return begins._replace(measured=f"{shown}; {begins.measured}")
    wrong, fix = _find_foreign_text(context, model, scored, texts) or _find_missing_end(model, ids) or ("", "")
    return Finding("warn", f"{shown}; {wrong}", fix) if wrong else Finding("pass", shown)


_PROBE, _PROBE_RESPONSE = "a probe of the prompt", "a probe of the response"


def _answers_prompt(model: ClassifierReward, prompt: str, response: str, row: dict[str, Any]) -> bool:
    """Return whether the last message that the policy reads stands just before the response in the model's text.

    Probes in the places of both show what the template writes between them.
    """
    # ---- A probe in place of the last message ----
    conversation = getattr(prompt, "conversation", None)
    if conversation is None or model._text_template is not None:  # the prompt is used as the text that it is
        last, probe = str(prompt), Prompt(_PROBE)
    else:
        last = content_text(conversation.messages[-1])
        messages = [*conversation.messages[:-1], {**conversation.messages[-1], "content": _PROBE}]
        probe = Prompt(_PROBE, conversation._replace(messages=messages))
    try:  # without the row, so that nothing of it passes for a part of the template
        probed = model.text(probe, _PROBE_RESPONSE, {})
    except Exception:  # a reward of the user's own may need its columns
        probed = model.text(probe, _PROBE_RESPONSE, row)
    # ---- What the template writes between the two must be in the real text, too ----
    _, has_probe, rest = probed.rpartition(_PROBE)
    between, has_response, _ = rest.partition(_PROBE_RESPONSE)
    # Templates trim what they write: white space does not count.
    last, between, response, text, prompt = (
        "".join(part.split()) for part in (last, between, response, model.text(prompt, response, row), prompt)
    )
    return bool(has_probe and has_response) and f"{last}{between}{response}" in text and last in prompt


def _find_foreign_text(
    context: DoctorContext, model: ClassifierReward, scored: ResponsesToScore, texts: list[str]
) -> tuple[str, str] | None:
    """Look for special tokens and templates of the policy that mean nothing to the reward model."""
    known = set(cast(Any, model.tokenizer).all_special_tokens)
    foreign = [token for token in context.tokenizer.all_special_tokens if token not in known and token in texts[0]]
    fix = "give prompts as messages, so that the reward model's chat template is used, or set its template"
    if foreign:
        return f"{', '.join(map(repr, foreign))} are special tokens of the policy but plain text to it", fix
    prompt = scored.rows[0].get(getattr(context.data, "prompt_column", "prompt"))
    templated = isinstance(prompt, str) and prompt != scored.prompts[0]
    is_chat = getattr(scored.prompts[0], "conversation", None) is not None
    if templated and model._text_template is None and not is_chat:
        return "it contains data.template inside its own template", fix
    return None


def _find_missing_end(model: ClassifierReward, ids: list[list[int]]) -> tuple[str, str] | None:
    """Look for a special token at the end; a template may add a line break after it."""
    special = set(cast(Any, model.tokenizer).all_special_ids)
    # DeepSpeed-Chat reads the score at another position, see `PadCutoff`.
    if model._cutoff is not None or not special or any(not special.isdisjoint(row[-3:]) for row in ids):
        return None
    return (
        "it ends without a special token",
        (
            "end model.reward.init_args.template with {eos}, as RewardModelModule does, unless the model was trained on"
            " texts without it: the score is read at the last token"
        ),
    )


def _token_ids(model: ClassifierReward, texts: list[str]) -> tuple[list[list[int]], int]:
    """Return the token ids that the model reads, and how many texts it truncates; its counter does not change."""
    num_before = model.num_truncated
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = [model._token_ids(text) for text in texts]
    num_truncated, model.num_truncated = model.num_truncated - num_before, num_before
    return ids, num_truncated


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:60]} ... {text[-60:]}")


def check_reward_truncation(context: DoctorContext) -> Finding:
    """Count the texts that are longer than the reward model reads; they lose their beginning."""
    findings = []
    for model in _classifier_rewards(context):
        texts = [model.text(*row) for row in zip(*policy_responses(context), strict=True)]
        cut, total = _token_ids(model, texts)[1], len(texts)
        measured = f"{cut} of {total} texts are longer than the {model.max_length} tokens that {model.path} reads"
        fix = "raise model.reward.init_args.max_length if the model has more positions, or shorten prompts or responses"
        status = "fail" if cut > MOSTLY_CUT * total else "warn" if cut else "pass"
        findings.append(Finding(cast(Any, status), measured, fix if cut else "", {"truncated": cut / total}))
    return worst(findings)


def check_reward_padding(context: DoctorContext) -> Finding:
    """Score all responses at once, in another order, and one by one: a score must depend on its response only."""
    if isinstance(context.batch, PreferenceBatch):
        together, orders = _pair_scores(context, context.batch)  # [2, B]
        in_16_bits = context.is_16_bit
    else:
        together, orders = _reward_scores(context, policy_responses(context))  # [M]
        loaded = [cast(Any, model.model).dtype for model in reward_models(cast(Any, context.reward))]
        in_16_bits = any(dtype != torch.float32 for dtype in loaded)
    # ---- The first comparison that fails names the cause ----
    tolerance = MOVED_16_BITS if in_16_bits else MOVED
    findings = [_judge_moved_scores(name, other, together, tolerance) for name, other in orders.items()]
    faults = [finding for finding in findings if finding.status != "pass"]
    if not faults:
        furthest = max(findings, key=lambda finding: finding.values["moved"])
        return furthest._replace(measured=f"again, alone and in another order, {furthest.measured.partition(', ')[2]}")
    return faults[0]


MOVED_BY = {
    "again": "the reward is random or has state: make it a function of prompt and response",
    "alone": "the reward depends on the rest of the batch, for example on padding (attention mask, pad token)",
    "in another order": "the reward mixes the responses of a batch: score each response independently",
}
"""Cause of a changed score, by the comparison that shows it; the first that fails is reported."""


def _judge_moved_scores(name: str, other: Tensor, together: Tensor, tolerance: Tolerance) -> Finding:
    """Compare scores with those of one batch of all responses."""
    spread, moved = float(together.max() - together.min()), float((other - together).abs().max())
    share = moved / spread if spread > 0 else float(moved > 0)
    status = tolerance.status(share)
    measured = f"{name}, scores change by {moved:.2g} at most, {share:.1%} of their spread"
    return Finding(status, measured, "" if status == "pass" else MOVED_BY[name], {"moved": moved, "spread": spread})


def _reward_scores(context: DoctorContext, scored: ResponsesToScore) -> tuple[Tensor, dict[str, Tensor]]:
    def score(responses: ResponsesToScore) -> Tensor:
        return checked_scores(cast(Any, context.reward), *responses).total.double().cpu()

    count = len(scored.responses)
    # scored from the last to the first, and put back in order
    backwards = list(range(count))[::-1]
    alone = torch.cat([score(scored.select([i])) for i in range(count)])
    return score(scored), {
        "again": score(scored),
        "alone": alone,
        "in another order": score(scored.select(backwards)).flip(0),
    }


def _pair_scores(context: DoctorContext, batch: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Score pairs with the reward model as training does; returns `[2, B]` scores."""
    module: Any = context.module

    def score(indices: list[int]) -> Tensor:
        fields: dict[str, Any] = {}
        for name in ("chosen", "rejected"):
            mask = getattr(batch, f"{name}_mask")[indices]
            width = int(mask.sum(-1).max())  # without columns that are padding in all of `indices`
            fields |= {f"{name}_ids": getattr(batch, f"{name}_ids")[indices, :width], f"{name}_mask": mask[:, :width]}
        with eval_mode(module.reward_model):
            return torch.stack(module.scores(batch._replace(**fields, margin=batch.margin[indices]))).double().cpu()

    everything = list(range(len(batch.prompts)))
    alone = torch.cat([score([i]) for i in everything], dim=1)
    return score(everything), {
        "again": score(everything),
        "alone": alone,
        "in another order": score(everything[::-1]).flip(1),
    }


def check_reward_spread(context: DoctorContext) -> Finding:
    """Check that rewards differ between responses, and from those of the greedy responses."""
    scored = policy_responses(context)
    rewards = checked_scores(cast(Any, context.reward), *scored).total.double().cpu()
    rollout = context.rollout
    # ---- Rewards of sampled responses [S], and of the greedy response to the same prompt [S] ----
    count = len(rollout.sampled.texts)
    sampled, greedy = rewards[:count], rewards[count:].repeat_interleave(rollout.num_samples)
    spread, equal_share = float(rewards.max() - rewards.min()), float((sampled == greedy).double().mean())
    measured = (
        f"rewards from {float(rewards.min()):.3g} to {float(rewards.max()):.3g}, on average"
        f" {float(sampled.mean()):.3g}; {equal_share:.0%} of sampled responses have exactly the reward of the greedy"
        " response"
    )
    values = {"spread": spread, "mean": float(sampled.mean()), "as_the_baseline": equal_share}
    if spread == 0:
        fix = (
            "a constant reward gives no gradient: read the responses (remax predict) and their rewards; if the task is"
            " too hard or too easy for the policy, choose other prompts; --num_prompts checks more of them"
        )
        return Finding("fail", measured, fix, values)
    if equal_share == 1 and context.module.objective.needs_greedy:
        fix = (
            "every advantage is 0: sample at a higher temperature, choose prompts whose reward varies, or a finer"
            " reward"
        )
        return Finding("warn", measured, fix, values)
    return Finding("pass", measured, "", values)
