"""Whether the policy is the same wherever a step meets it: beside the reference, in decoding, in training, padded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from remax_lightning.functional import kl_estimate
from remax_lightning.models.forward import eval_mode, model_inputs
from remax_lightning.models.log_probs import policy_statistics, response_statistics
from remax_lightning.rollout import SamplingConfig
from remax_lightning.tools.doctor.batches import select_rows
from remax_lightning.tools.doctor.context import DoctorContext
from remax_lightning.tools.doctor.finding import LARGE_KL, Finding, NotApplicable, Tolerance, worst
from remax_lightning.types import PromptBatch, Responses, Rollout

KL, KL_16_BITS = Tolerance(1e-6, 1e-4), Tolerance(2e-3, 2e-2)
"""Nats per token. The same weights give 0, but for rounding: in 16 bits a log-prob is off by a few hundredths of a nat,
and half the square of that is the KL."""
MEAN, MEAN_16_BITS = Tolerance(1e-4, 1e-2), Tolerance(0.05, 0.2)
LARGEST, LARGEST_16_BITS = Tolerance(1e-2, 0.1), Tolerance(1.0, 3.0)
"""Nats between two log-probs of the same token: decoding and training multiply in other shapes and orders."""
TIE, TIE_16_BITS = 1e-3, 0.1
"""Nats between the two likeliest tokens below which rounding decides between them."""
ALONE = 4
"""Prompts that are also run alone."""


def check_kl_at_start(context: DoctorContext) -> Finding:
    """Compare the policy, as training runs it, with the reference, on the policy's own responses."""
    module: Any = context.module
    if module.reference is None:
        raise NotApplicable("there is no reference")
    rollout = module.with_reference(context.rollout)._replace(reference_hidden=None)
    sampling = replace(module.sampling, processed_log_probs=False)  # the reference keeps all tokens, too
    kl, largest = _kl_to_reference(module.policy, rollout, sampling)
    with eval_mode(module.policy):
        in_eval, _ = _kl_to_reference(module.policy, rollout, sampling)
    dtypes = {str(model.dtype).removeprefix("torch.") for model in (module.policy, module.reference)}
    rounds = context.is_16_bit or bool(dtypes & {"float16", "bfloat16"})
    tolerance = KL_16_BITS if rounds else KL
    status, fix = tolerance.status(kl), ""
    if status != "pass":
        same = _source_key(module.policy_source) == _source_key(module.reference_source or module.policy_source)
        status = status if same else "warn" if kl <= LARGE_KL else "fail"
        fix = _explain_kl(module, dtypes, in_train_mode_only=tolerance.status(in_eval) == "pass", same=same)
    measured = f"{kl:.2g} nats per token, at most {largest:.2g} at one (rounding explains {tolerance.rounding:g})"
    return Finding(status, measured, fix, {"kl": kl, "kl_in_eval_mode": in_eval, "largest": largest})


def _kl_to_reference(policy: Any, rollout: Rollout, sampling: SamplingConfig) -> tuple[float, float]:
    """Return the KL to the reference in nats per token, never negative, and the largest log-ratio."""
    mask = rollout.sampled.response_mask
    now = policy_statistics(policy, rollout, sampling).log_probs
    log_ratio = (now - cast(Tensor, rollout.reference_log_probs))[mask].double()
    return float(kl_estimate(log_ratio, "k3").mean()), float(log_ratio.abs().max())


def _source_key(source: Any) -> tuple[Any, ...]:
    return source.path, source.revision, source.lora.path if source.lora is not None else None


def _explain_kl(module: Any, dtypes: set[str], *, in_train_mode_only: bool, same: bool) -> str:
    if in_train_mode_only:
        return (
            "in eval mode it is gone: dropout, or another layer that trains differently; set"
            " model.policy.disable_dropout: true, and model.policy.lora.dropout: 0 where there is an adapter"
        )
    if len(dtypes) > 1:
        return f"policy and reference are in {' and '.join(sorted(dtypes))}; give both the same dtype"
    if module.reference_source is None:
        return (
            "the adapter changes the policy before training; start from the base, or from a saved adapter by its path"
        )
    if same and (other := _describe_differing_tensors(module.policy, module.reference)):
        return f"both come from the same path and differ in {other} as loaded: see what casts or changes it"
    if same:
        return (
            "both come from the same path, so one was changed or drawn anew after it was read; save a model that"
            " is from_scratch first, and look for code that changes weights"
        )
    return (
        f"model.reference.path {module.reference_source.path!r} is another checkpoint than model.policy.path; name the"
        " policy's, unless the run goes on from a policy that is already away from its reference"
    )


def _describe_differing_tensors(policy: Any, reference: Any) -> str:
    """Return what of two models' weights and buffers is not the same, where they have the same names."""
    first, second = ({**dict(model.named_parameters()), **dict(model.named_buffers())} for model in (policy, reference))
    differ = [name for name in first.keys() & second.keys() if not _are_equal(first[name], second[name])]
    return f"{len(differ)} tensors, such as {min(differ)}" if differ else ""


def _are_equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first.to(second), second)


def check_log_probs(context: DoctorContext) -> Finding:
    """Compare the log-probs that decoding made with those of the training pass."""
    module, rollout = context.module, context.rollout
    if rollout.log_probs is None:
        raise NotApplicable(f"{type(module.engine).__name__} returns no log-probs though it is asked for them")
    counted = _unbarred_mask(rollout, module.sampling)
    if not counted.any():
        raise NotApplicable("all tokens come before model.sampling.min_response_length, where EOS is barred")

    def apart() -> tuple[float, float]:
        now = policy_statistics(module.policy, rollout, module.sampling).log_probs
        return _mean_and_max_difference(cast(Tensor, rollout.log_probs)[counted], now[counted])

    finding = _judge_log_probs(context, "decoding and training differ by", *apart())
    if finding.status == "pass":
        return finding
    with eval_mode(module.policy):
        in_eval = _judge_log_probs(context, "", *apart())
    if in_eval.status == "pass":
        return finding._replace(fix="in eval mode they agree: set model.policy.disable_dropout: true")
    return finding._replace(
        fix="decoding runs another model than training: set model.rollout to HuggingFaceEngine and see whether it goes;"
        " a cache, an attention kernel (model.policy.attn_implementation) or the engine's own log-probs may be wrong"
    )


def _unbarred_mask(rollout: Rollout, sampling: SamplingConfig) -> Tensor:
    """Return `[S, R]` the counted tokens before which nothing was barred."""
    place = torch.arange(rollout.sampled.response_mask.shape[1], device=rollout.sampled.response_mask.device)
    return rollout.sampled.response_mask & (place >= sampling.min_response_length)


def _mean_and_max_difference(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Return the mean and the largest difference."""
    difference = (first.double() - second.double()).abs()
    return float(difference.mean()), float(difference.max())


def _judge_log_probs(context: DoctorContext, what: str, mean: float, largest: float) -> Finding:
    tolerances = (MEAN_16_BITS, LARGEST_16_BITS) if context.is_16_bit else (MEAN, LARGEST)
    measured = f"{what} {mean:.2g} nats per token on average, by {largest:.2g} at most"
    values = {"mean": mean, "largest": largest}
    judged = zip(tolerances, (mean, largest), strict=True)
    return worst([Finding(tolerance.status(value), measured, "", values) for tolerance, value in judged])


def check_on_policy(context: DoctorContext) -> Finding:
    """Ask whether responses are drawn from the distribution whose log-probs are trained."""
    module, rollout = context.module, context.rollout
    sampling: SamplingConfig = module.sampling
    drawn = replace(sampling, scale_log_probs=True, processed_log_probs=sampling.truncates)
    if sampling.temperature == 1:
        drawn = replace(drawn, scale_log_probs=sampling.scale_log_probs)
    options = ("scale_log_probs", "processed_log_probs")
    keys = [name for name in options if getattr(drawn, name) != getattr(sampling, name)]
    if sampling.min_response_length > 0:
        keys.append("min_response_length")
    if not keys:
        return Finding("pass", "responses are drawn from the distribution that is trained")
    mask = rollout.sampled.response_mask
    with eval_mode(module.policy):
        as_drawn = policy_statistics(module.policy, rollout, drawn).log_probs[mask]
        trained = policy_statistics(module.policy, rollout, sampling).log_probs[mask]
    finite = as_drawn.isfinite()  # rounding may leave a token out that was just kept
    apart = float((as_drawn - trained)[finite].double().mean()) if finite.any() else 0.0
    fixes = {
        "scale_log_probs": "model.sampling.scale_log_probs: true trains the tempered policy",
        "processed_log_probs": "model.sampling.processed_log_probs: true trains the truncated policy",
        "min_response_length": "model.sampling.min_response_length bars EOS from tokens that are trained without a bar;"
        " 0 leaves it free",
    }
    measured = f"sampled tokens are {apart:.2g} nats likelier where they are drawn than where they are trained"
    if keys == ["min_response_length"]:
        measured = f"EOS is barred from the first {sampling.min_response_length} tokens, and not in training"
    fix = "; ".join(fixes[key] for key in keys) + "; as it is, the gradient is off-policy"
    return Finding("warn" if apart <= LARGE_KL else "fail", measured, fix, {"difference": apart})


def check_greedy(context: DoctorContext) -> Finding:
    """Decode greedily again, and some prompts alone: the baseline may depend on the prompt only."""
    first = cast(Responses, context.rollout.greedy).response_ids
    second = cast(Responses, context.roll_out(context.prompt, seed=1).greedy).response_ids
    changed = [i for i in range(len(first)) if not torch.equal(first[i], second[i])]
    if changed:
        measured = f"{len(changed)} of {len(first)} greedy responses differ when they are made again"
        fix = (
            "the policy or the engine draws something: look for dropout in eval mode, for kernels without"
            " determinism (trainer.deterministic: true), and for sampling in model.rollout"
        )
        return Finding("fail", measured, fix, {"changed": len(changed)})
    alone = range(min(ALONE, len(first)))
    gaps = [gap for i in alone if (gap := _gap_at_first_difference(context, i, first[i])) is not None]
    values = {"changed": 0.0, "changed_alone": float(len(gaps)), "largest_gap": max(gaps, default=0.0)}
    measured = f"{len(first)} responses are the same again, {len(alone) - len(gaps)} of {len(alone)} also alone"
    if not gaps:
        return Finding("pass", measured, "", values)
    measured += f"; where they part, {values['largest_gap']:.2g} nats lie between the two tokens"
    if values["largest_gap"] <= (TIE_16_BITS if context.is_16_bit else TIE):
        return Finding("pass", f"{measured}, which is rounding", "", values)
    fix = (
        "a greedy response depends on the batch: the model looks at padding (its attention mask or positions), or mixes"
        " rows, as some mixtures of experts do; see the check prompt_padding"
    )
    return Finding("fail", measured, fix, values)


def _gap_at_first_difference(context: DoctorContext, index: int, ids: Tensor) -> float | None:
    """Decode prompt `index` alone; return how far apart in log-prob the first two tokens are that differ."""
    prompt = select_rows(context.prompt, [index])
    other = cast(Responses, context.roll_out(prompt).greedy).response_ids[0]
    differ = (ids != other).nonzero()
    if len(differ) == 0:
        return None
    at, policy = int(differ[0]), context.module.policy
    input_ids = torch.cat([prompt.prompt_ids, ids[None, :at]], dim=1)
    with eval_mode(policy):
        inputs = model_inputs(policy, input_ids, torch.ones_like(input_ids, dtype=torch.bool))
        logits = policy(**inputs, use_cache=False).logits[0, -1]
    return abs(float(logits[ids[at]] - logits[other[at]]))


def check_prompt_padding(context: DoctorContext) -> Finding:
    """Compare the log-probs of responses to prompts alone with those beside longer ones, padded on the left."""
    prompt, model = context.prompt, context.module.policy
    responses = _one_response_per_prompt(context)
    gaps = []
    for i in range(min(ALONE, len(prompt.prompts))):
        pair = _pair_with_padded_copy(prompt, i)
        if pair is None:
            continue
        ids, mask = responses.response_ids[[i, i]], responses.response_mask[[i, i]]
        answer = Responses(ids, mask, responses.truncated[[i, i]], [])
        with eval_mode(model):
            together = response_statistics(model, pair, answer).log_probs[1]
            alone = response_statistics(model, select_rows(pair, [1]), answer.rows(1, 2)).log_probs[0]
        gaps.append(_mean_and_max_difference(alone[mask[1]], together[mask[1]]))
    if not gaps:
        raise NotApplicable("all prompts are one token long, so none can be padded")
    result = _judge_log_probs(
        context, "padding moves log-probs by", max(gap[0] for gap in gaps), max(gap[1] for gap in gaps)
    )
    if result.status == "pass":
        return result
    return result._replace(
        fix="the model looks at padding: its forward ignores attention_mask or position_ids; take its implementation in"
        " transformers (trust_remote_code: false), or another model.policy.attn_implementation"
    )


def _one_response_per_prompt(context: DoctorContext) -> Responses:
    """Return one response to each prompt: the data set's to imitate, or the policy's greedy one."""
    batch: Any = context.batch
    if not hasattr(batch, "response_ids"):
        return cast(Responses, context.rollout.greedy)
    return Responses(batch.response_ids, batch.response_mask, ~batch.response_mask.any(-1), [])


def _pair_with_padded_copy(prompt: PromptBatch, index: int) -> PromptBatch | None:
    """Return prompt `index` and, under it, its second half, which the first one makes the batch pad."""
    whole = select_rows(prompt, [index])
    length = whole.prompt_ids.shape[1]
    if length < 2:
        return None
    pair = select_rows(prompt, [index, index])
    mask = pair.prompt_mask.clone()
    mask[1, : length // 2] = False
    # What fills up is another token here, so that a model that reads it says something else.
    ids = torch.where(mask, pair.prompt_ids, pair.prompt_ids.flip(1))
    return pair._replace(prompt_ids=ids, prompt_mask=mask)
