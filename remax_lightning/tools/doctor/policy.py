"""Whether the policy gives the same log-probs everywhere: at the start, in decoding, in training, with padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from remax_lightning.functional import kl_estimate
from remax_lightning.models.forward import eval_mode, model_inputs
from remax_lightning.models.log_probs import policy_statistics, response_statistics
from remax_lightning.models.packing import packing_obstacle
from remax_lightning.models.sampling import SuppressedTokens
from remax_lightning.rollout import SamplingConfig
from remax_lightning.tools.doctor.context import (
    LARGE_KL,
    DoctorContext,
    Finding,
    NotApplicable,
    Tolerance,
    select_rows,
    worst,
)
from remax_lightning.training.on_policy import measure_gaps
from remax_lightning.types import PromptBatch, Responses, Rollout

KL, KL_16_BITS = Tolerance(1e-6, 1e-4), Tolerance(2e-3, 2e-2)
"""Nats per token. Equal weights give 0 up to rounding: in 16 bits a log-prob is off by a few hundredths of a nat, and
the KL is half the square of that."""
MEAN, MEAN_16_BITS = Tolerance(1e-4, 1e-2), Tolerance(0.05, 0.2)
LARGEST, LARGEST_16_BITS = Tolerance(1e-2, 0.1), Tolerance(1.0, 3.0)
"""Nats between two log-probs of the same token: decoding and training multiply in different shapes and orders."""
TIE, TIE_16_BITS = 1e-3, 0.1
"""Nats between the two most likely tokens below which rounding decides which one is chosen."""
ALONE = 4
"""Number of prompts that are also run alone."""


def check_kl_at_start(context: DoctorContext) -> Finding:
    """Compare the policy in training mode with the reference, on responses of the policy."""
    module: Any = context.module
    if module.reference is None:
        raise NotApplicable("the run has no reference")
    rollout = module.with_reference(context.rollout)._replace(reference_hidden=None)
    sampling = replace(module.sampling, processed_log_probs=False)  # the reference has no sampling mask either
    # ---- In train mode, as training runs it, and in eval mode to find dropout ----
    kl, largest = _kl_to_reference(module.policy, rollout, sampling, module.worker.suppressed)
    with eval_mode(module.policy):
        in_eval, _ = _kl_to_reference(module.policy, rollout, sampling, module.worker.suppressed)
    # ---- Judge by the coarser dtype; a reference from another path may differ on purpose ----
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


def _kl_to_reference(
    policy: Any, rollout: Rollout, sampling: SamplingConfig, suppressed: SuppressedTokens
) -> tuple[float, float]:
    """Return the KL to the reference in nats per token (k3, never negative), and the largest log-ratio."""
    mask = rollout.sampled.response_mask
    log_probs = policy_statistics(policy, rollout, sampling, suppressed=suppressed).log_probs  # [S, R]
    log_ratio = (log_probs - cast(Tensor, rollout.reference_log_probs))[mask].double()  # [tokens]
    return float(kl_estimate(log_ratio, "k3").mean()), float(log_ratio.abs().max())


def _source_key(source: Any) -> tuple[Any, ...]:
    return source.path, source.revision, source.lora.path if source.lora is not None else None


def _explain_kl(module: Any, dtypes: set[str], *, in_train_mode_only: bool, same: bool) -> str:
    if in_train_mode_only:
        return (
            "in eval mode the difference is gone, so dropout or another layer that depends on the mode causes it; set"
            " model.policy.disable_dropout: true and, with an adapter, model.policy.lora.dropout: 0"
        )
    if len(dtypes) > 1:
        return (
            f"policy and reference have different dtypes, {' and '.join(sorted(dtypes))}; set the same dtype for both"
        )
    if module.reference_source is None:
        return (
            "the adapter changes the policy before training; start without one, or set model.policy.lora.path to a"
            " saved adapter"
        )
    if same and (other := _describe_differing_tensors(module.policy, module.reference)):
        return (
            f"both come from the same path but differ in {other} after loading: find the code that casts or changes"
            " them"
        )
    if same:
        return (
            "both come from the same path, so one of them was changed after loading, or has random weights; save a"
            " model with from_scratch first, and look for code that changes weights"
        )
    return (
        f"model.reference.path {module.reference_source.path!r} is not the checkpoint of model.policy.path; set it to"
        " the policy's path, unless the run continues a policy that was trained away from its reference"
    )


def _describe_differing_tensors(policy: Any, reference: Any) -> str:
    """Describe the weights and buffers that two models share by name but not by value; empty if there are none."""
    first, second = ({**dict(model.named_parameters()), **dict(model.named_buffers())} for model in (policy, reference))
    differing = [name for name in first.keys() & second.keys() if not _are_equal(first[name], second[name])]
    return f"{len(differing)} tensors, such as {min(differing)}" if differing else ""


def _are_equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first.to(second), second)


def check_log_probs(context: DoctorContext) -> Finding:
    """Compare the log-probs of decoding with those of the training pass."""
    module, rollout = context.module, context.rollout
    if rollout.log_probs is None:
        raise NotApplicable(f"{type(module.engine).__name__} returns no log-probs although they were requested")
    mask = rollout.sampled.response_mask  # [S, R]

    def difference() -> tuple[float, float]:
        trained = policy_statistics(
            module.policy, rollout, module.sampling, suppressed=module.worker.suppressed
        ).log_probs  # [S, R]
        return _mean_and_max_difference(cast(Tensor, rollout.log_probs)[mask], trained[mask])

    finding = _judge_log_probs(context, "decoding and training differ by", *difference())
    # ---- The figures of the check before the first step ----
    gaps = measure_gaps(module.policy, module.worker)._asdict()
    measured = f"{finding.measured}; before the first step: " + ", ".join(f"{k} {v:.2g}" for k, v in gaps.items())
    finding = finding._replace(measured=measured, values=finding.values | gaps)
    if finding.status == "pass":
        return finding
    with eval_mode(module.policy):
        in_eval = _judge_log_probs(context, "", *difference())
    if in_eval.status == "pass":
        return finding._replace(fix="in eval mode both agree: set model.policy.disable_dropout: true")
    return finding._replace(
        fix=(
            "decoding does not compute what training computes: set model.rollout to HuggingFaceEngine and check again;"
            " the cache, the attention kernel (model.policy.attn_implementation) or the engine's log-probs may be wrong"
        )
    )


def _mean_and_max_difference(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Return the mean and the largest absolute difference."""
    difference = (first.double() - second.double()).abs()
    return float(difference.mean()), float(difference.max())


def _judge_log_probs(context: DoctorContext, what: str, mean: float, largest: float) -> Finding:
    tolerances = (MEAN_16_BITS, LARGEST_16_BITS) if context.is_16_bit else (MEAN, LARGEST)
    measured = f"{what} {mean:.2g} nats per token on average, by {largest:.2g} at most"
    values = {"mean": mean, "largest": largest}
    statuses = [tolerance.status(value) for tolerance, value in zip(tolerances, (mean, largest), strict=True)]
    return worst([Finding(status, measured, "", values) for status in statuses])


def check_packing(context: DoctorContext) -> Finding:
    """Compare the log-probs of packed rows, which training runs, with those of padded rows."""
    module, rollout = context.module, context.rollout
    mask = rollout.sampled.response_mask  # [S, R]
    lengths = rollout.prompt.prompt_mask.sum(1).repeat_interleave(rollout.num_samples) + mask.sum(1)  # [S]
    if reason := packing_obstacle(module.policy, int(lengths.max())):
        raise NotApplicable(f"the policy runs padded rows, because {reason}")
    with eval_mode(module.policy):
        packed, padded = (
            policy_statistics(
                module.policy, rollout, module.sampling, suppressed=module.worker.suppressed, packed=packed
            ).log_probs[mask]  # [tokens]
            for packed in (True, False)
        )
    finding = _judge_log_probs(context, "packed and padded rows differ by", *_mean_and_max_difference(packed, padded))
    if finding.status == "pass":
        return finding
    return finding._replace(
        fix="set model.policy.attn_implementation: eager, with which passes run padded rows, and report the model"
    )


def check_on_policy(context: DoctorContext) -> Finding:
    """Check that responses are sampled from the distribution whose log-probs are trained."""
    module, rollout = context.module, context.rollout
    sampling: SamplingConfig = module.sampling
    # The log-prob options under which training sees exactly the sampled distribution.
    on_policy = replace(sampling, scale_log_probs=True, processed_log_probs=sampling.truncates)
    if sampling.temperature == 1:
        on_policy = replace(on_policy, scale_log_probs=sampling.scale_log_probs)
    options = ("scale_log_probs", "processed_log_probs")
    keys = [name for name in options if getattr(on_policy, name) != getattr(sampling, name)]
    if not keys:
        return Finding("pass", "responses are sampled from the distribution that is trained")
    mask = rollout.sampled.response_mask
    with eval_mode(module.policy):
        sampled = policy_statistics(module.policy, rollout, on_policy, suppressed=module.worker.suppressed).log_probs[
            mask
        ]  # [tokens]
        trained = policy_statistics(module.policy, rollout, sampling, suppressed=module.worker.suppressed).log_probs[
            mask
        ]  # [tokens]
    finite = sampled.isfinite()  # rounding may drop a token that sampling kept
    difference = float((sampled - trained)[finite].double().mean()) if finite.any() else 0.0
    fixes = {
        "scale_log_probs": "model.sampling.scale_log_probs: true trains the tempered policy",
        "processed_log_probs": "model.sampling.processed_log_probs: true trains the truncated policy",
    }
    measured = f"sampled tokens are {difference:.2g} nats more likely in sampling than in training"
    fix = "; ".join(fixes[key] for key in keys) + "; until then the gradient is off-policy"
    return Finding("warn" if difference <= LARGE_KL else "fail", measured, fix, {"difference": difference})


def check_greedy(context: DoctorContext) -> Finding:
    """Decode greedily a second time, and some prompts alone: the baseline must depend on the prompt only."""
    first = cast(Responses, context.rollout.greedy).response_ids
    second = cast(Responses, context.roll_out(context.prompt, seed=1).greedy).response_ids
    # ---- The same batch again ----
    changed = [i for i in range(len(first)) if not torch.equal(first[i], second[i])]
    if changed:
        measured = f"{len(changed)} of {len(first)} greedy responses differ when they are generated again"
        fix = (
            "the policy or the engine is random: look for dropout in eval mode, for nondeterministic kernels"
            " (trainer.deterministic: true), and for sampling in model.rollout"
        )
        return Finding("fail", measured, fix, {"changed": len(changed)})
    # ---- Each prompt alone ----
    alone = range(min(ALONE, len(first)))
    gaps = [gap for i in alone if (gap := _gap_at_first_difference(context, i, first[i])) is not None]
    values = {"changed": 0.0, "changed_alone": float(len(gaps)), "largest_gap": max(gaps, default=0.0)}
    measured = f"{len(first)} responses are the same again; decoded alone, {len(alone) - len(gaps)} of {len(alone)}"
    if not gaps:
        return Finding("pass", measured, "", values)
    measured += f"; at the first difference the two tokens are {values['largest_gap']:.2g} nats apart"
    if values["largest_gap"] <= (TIE_16_BITS if context.is_16_bit else TIE):
        return Finding("pass", f"{measured}, which is rounding", "", values)
    fix = (
        "a greedy response depends on the batch: the model reads padding (attention mask or positions), or mixes rows,"
        " as some mixtures of experts do; see the check prompt_padding"
    )
    return Finding("fail", measured, fix, values)


def _gap_at_first_difference(context: DoctorContext, index: int, ids: Tensor) -> float | None:
    """Decode prompt `index` alone; return the log-prob gap of the first two tokens that differ, None if none does."""
    prompt = select_rows(context.prompt, [index])
    other = cast(Responses, context.roll_out(prompt).greedy).response_ids[0]
    differences = (ids != other).nonzero()
    if len(differences) == 0:
        return None
    position, policy = int(differences[0]), context.module.policy
    input_ids = torch.cat([prompt.prompt_ids, ids[None, :position]], dim=1)  # [1, P + position]
    with eval_mode(policy):
        inputs = model_inputs(policy, input_ids, torch.ones_like(input_ids, dtype=torch.bool))
        logits = policy(**inputs, use_cache=False).logits[0, -1]  # [V]
    return abs(float(logits[ids[position]] - logits[other[position]]))


def check_prompt_padding(context: DoctorContext) -> Finding:
    """Compare the log-probs of responses to a prompt alone and in a batch that pads it on the left."""
    prompt, model = context.prompt, context.module.policy
    responses = _one_response_per_prompt(context)
    gaps = []
    for i in range(min(ALONE, len(prompt.prompts))):
        pair = _pair_with_padded_copy(prompt, i)
        if pair is None:
            continue
        # The same response to both rows; only the second prompt is padded.
        ids, mask = responses.response_ids[[i, i]], responses.response_mask[[i, i]]
        answer = Responses(ids, mask, responses.truncated[[i, i]], [])
        with eval_mode(model):
            padded = response_statistics(model, pair, answer).log_probs[1]  # [R]
            alone = response_statistics(model, select_rows(pair, [1]), answer.rows(1, 2)).log_probs[0]  # [R]
        gaps.append(_mean_and_max_difference(alone[mask[1]], padded[mask[1]]))
    if not gaps:
        raise NotApplicable("all prompts have one token, so none can be padded")
    result = _judge_log_probs(
        context, "padding changes log-probs by", max(gap[0] for gap in gaps), max(gap[1] for gap in gaps)
    )
    if result.status == "pass":
        return result
    return result._replace(
        fix=(
            "the model reads padding: its forward ignores attention_mask or position_ids; use the implementation of"
            " transformers (trust_remote_code: false), or another model.policy.attn_implementation"
        )
    )


def _one_response_per_prompt(context: DoctorContext) -> Responses:
    """Return one response per prompt: the response of the data set, or the greedy response of the policy."""
    batch: Any = context.batch
    if not hasattr(batch, "response_ids"):
        return cast(Responses, context.rollout.greedy)
    return Responses(batch.response_ids, batch.response_mask, ~batch.response_mask.any(-1), [])


def _pair_with_padded_copy(prompt: PromptBatch, index: int) -> PromptBatch | None:
    """Return prompt `index` and, as a second row, its second half, padded on the left; None if it has one token."""
    length = select_rows(prompt, [index]).prompt_ids.shape[1]
    if length < 2:
        return None
    pair = select_rows(prompt, [index, index])
    mask = pair.prompt_mask.clone()
    mask[1, : length // 2] = False
    # The padding holds other tokens, so that a model that reads it gives other log-probs.
    ids = torch.where(mask, pair.prompt_ids, pair.prompt_ids.flip(1))
    return pair._replace(prompt_ids=ids, prompt_mask=mask)
