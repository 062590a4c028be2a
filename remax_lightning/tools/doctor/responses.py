"""Whether responses end, and whether their end is trained."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from remax_lightning.models.forward import eval_mode, language_model, model_inputs
from remax_lightning.models.sampling_mask import apply_temperature
from remax_lightning.rewards.pooling import pool_last_token
from remax_lightning.rollout.generation_config import ignored_settings
from remax_lightning.tools.doctor.batches import select_rows
from remax_lightning.tools.doctor.context import DoctorContext
from remax_lightning.tools.doctor.finding import LARGE_KL, Finding, NotApplicable, Status
from remax_lightning.types import PreferenceBatch, PromptBatch, Responses

MIN_PROBABILITY = 1e-30
"""Probability below which no run will ever see a token."""
LOW_PROBABILITY = 1e-4
"""Highest probability of EOS, where no response ended, below which ends will hardly be found by sampling."""
MAX_SHOWN_IDS = 4
"""End-of-sequence tokens that are named."""
ROWS_OF_GENERATE, TOKENS_OF_GENERATE = 4, 32
"""How much `model.generate` writes, for it keeps two numbers per token of the vocabulary at each of them."""
MOSTLY_TRUNCATED = 0.25
"""Share of truncated responses from which the length limit decides about the reward."""


def check_eos(context: DoctorContext) -> Finding:
    """Ask whether the tokens that end a response are the policy's, and have a chance to be written."""
    module: Any = context.module
    ids, tokenizer_eos = module.eos_ids(), int(module.tokenizer.eos_token_id)
    vocabulary = module.policy.config.get_text_config().vocab_size
    outside = [token for token in ids if not 0 <= token < vocabulary]
    if outside:
        fix = "correct eos_token_id in the policy's generation_config.json, or take the tokenizer that belongs to it"
        return Finding("fail", f"EOS {_join_ids(outside)} is not among the policy's {vocabulary} tokens", fix)
    shown = [f"{module.tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in ids[:MAX_SHOWN_IDS]]
    named = ", ".join(shown) + (f" and {len(ids) - MAX_SHOWN_IDS} more" if len(ids) > MAX_SHOWN_IDS else "")
    if isinstance(context.batch, PromptBatch):
        highest, ended = _highest_probability(context, ids), int((~context.rollout.sampled.truncated).sum())
        values = {"highest_probability": highest, "ended": float(ended)}
        measured = f"responses end at {named}; its probability reaches {highest:.2g}"
        status: Status = (
            "fail" if highest < MIN_PROBABILITY else "warn" if not ended and highest < LOW_PROBABILITY else "pass"
        )
        if status != "pass":
            fix = (
                "the policy does not write its EOS: fine-tune it on responses that end with it (SFTModule), or take the"
                " tokenizer, or the eos_token_id in generation_config.json, that it was trained with"
            )
            return Finding(status, measured, fix, values)
    else:
        values, measured = {}, f"responses end at {named}"
    if len(ids) > 1 and tokenizer_eos not in _configured_eos_ids(module.policy):
        fix = (
            "both end a response; if the policy has learned only one of them, make tokenizer.eos_token and"
            " eos_token_id of generation_config.json agree on it"
        )
        return Finding(
            "warn", f"{measured}; the tokenizer's own, {tokenizer_eos}, is not in generation_config", fix, values
        )
    return Finding("pass", measured, "", values)


def _configured_eos_ids(policy: Any) -> list[int]:
    configured = getattr(policy.generation_config, "eos_token_id", None)
    return [] if configured is None else [configured] if isinstance(configured, int) else list(configured)


def _join_ids(ids: list[int]) -> str:
    return ", ".join(map(str, ids))


def _highest_probability(context: DoctorContext, eos_ids: list[int]) -> float:
    """Return the highest probability of EOS anywhere in a sampled response to each prompt; a row at a time fits."""
    policy, sampled, prompt = context.module.policy, context.rollout.sampled, context.prompt
    num_samples, highest = context.rollout.num_samples, -math.inf
    for i in range(0, len(sampled.response_ids), num_samples):
        one = select_rows(prompt, [i // num_samples])
        length = int(sampled.response_mask[i].sum())
        ids = torch.cat([one.prompt_ids, sampled.response_ids[i : i + 1, :length]], dim=1)
        with eval_mode(policy):
            inputs = model_inputs(policy, ids, torch.ones_like(ids, dtype=torch.bool))
            logits: Tensor = policy(**inputs, use_cache=False).logits[0, one.prompt_ids.shape[1] - 1 : -1]
        ends = logits.float().log_softmax(-1)[:, eos_ids].logsumexp(-1)
        highest = max(highest, float(ends.max()))
    return math.exp(highest)


def check_eos_trained(context: DoctorContext) -> Finding:
    """Look where responses end: the engine has to stop there, and the loss to count the token that ends them."""
    batch: Any = context.batch
    if not isinstance(batch, PromptBatch):
        return _check_dataset_ends(context, batch.response_ids, batch.response_mask)
    module, rollout = context.module, context.rollout
    eos_ids = module.eos_ids()
    both = [rollout.sampled, cast(Responses, rollout.greedy)]
    ended = sum(int((~responses.truncated).sum()) for responses in both)
    stand_in = None if ended else _find_stand_in_token(both[1], eos_ids, module.sampling.min_response_length)
    if not ended and stand_in is None:
        raise NotApplicable("no response ended, and there is no token to end one with in place of EOS")
    if stand_in is not None:
        eos_ids = [stand_in]
        rollout = context.roll_out(context.prompt, eos_ids=eos_ids)
        both = [rollout.sampled, cast(Responses, rollout.greedy)]
        ended = sum(int((~responses.truncated).sum()) for responses in both)
    pad_id = int(module.tokenizer.pad_token_id)
    faults = [
        fault
        for responses in both
        if (fault := _find_end_fault(responses, eos_ids, pad_id, module.sampling.stop_strings))
    ]
    if stand_in is not None and not ended:
        faults.append(f"the engine does not stop at token {stand_in}, which stood in for EOS")
    total = sum(len(responses.response_ids) for responses in both)
    measured = f"{ended} of {total} responses ended at {'a token in place of EOS' if stand_in is not None else 'EOS'}"
    if faults:
        fix = (
            "model.rollout has to return responses through their EOS, that one included, and pad_id behind it:"
            " otherwise EOS is not trained and responses grow to the limit; correct the engine, or leave it out"
        )
        return Finding("fail", f"{measured}, but {faults[0]}", fix, {"ended": float(ended)})
    return Finding("pass", f"{measured}, which is counted, and nothing behind it", "", {"ended": float(ended)})


def _find_stand_in_token(greedy: Responses, eos_ids: list[int], least: int) -> int | None:
    """Return a token that a greedy response has after its first `least`, None if there is none."""
    for ids, mask in zip(greedy.response_ids, greedy.response_mask, strict=True):
        rest = [int(token) for token in ids[mask][least:] if int(token) not in eos_ids]
        if rest:
            return rest[0]
    return None


def _find_end_fault(responses: Responses, eos_ids: list[int], pad_id: int, stop_strings: tuple[str, ...]) -> str:
    """Return what is wrong with how responses end, nothing if it is right."""
    ids, mask = responses.response_ids, responses.response_mask
    ends = torch.isin(ids, torch.tensor(eos_ids, device=ids.device))
    lasts = ends.gather(1, (mask.sum(-1) - 1)[:, None])[:, 0]
    if not stop_strings and bool((~responses.truncated & ~lasts).any()):
        return "the end of one is not among the tokens that count"
    if bool((~mask & (ids != pad_id)).any()):
        return "one goes on behind its end"
    padded = (ids[:, -2:] == pad_id).all(-1) & mask[:, -1] & (ids.shape[1] > 1)
    if pad_id not in eos_ids and bool((padded & ~ends.any(-1)).any()):
        return "one is padded without an EOS before"
    return ""


def _check_dataset_ends(context: DoctorContext, ids: Tensor, mask: Tensor) -> Finding:
    eos_ids = torch.tensor(context.module.eos_ids(), device=ids.device)
    lasts = ids.gather(1, (mask.sum(-1) - 1).clamp_min(0)[:, None])[:, 0]
    ended = int((torch.isin(lasts, eos_ids) & mask.any(-1)).sum())
    measured = f"{ended} of {len(ids)} responses to imitate end with an EOS that is trained"
    if ended == len(ids):
        return Finding("pass", measured, "", {"ended": float(ended)})
    fix = (
        "a policy that sees no EOS never ends: append it to the responses and count it in response_mask, as"
        " SFTDataModule does, and let no mask go by the pad token"
    )
    return Finding("fail", measured, fix, {"ended": float(ended)})


def check_pad_token(context: DoctorContext) -> Finding:
    """Look whether masks say what is real, also where padding is made of EOS."""
    module, batch, tokenizer = context.module, context.batch, context.tokenizer
    pad_id, size = int(tokenizer.pad_token_id), module.trained_model.get_input_embeddings().num_embeddings
    if pad_id >= size:
        fix = "name a token of the model in data.loading.pad_token, or eos; a new token would need a larger embedding"
        return Finding("fail", f"the pad token {pad_id} is not among the model's {size} embeddings", fix)
    shared = pad_id == tokenizer.eos_token_id
    measured = f"padded with {tokenizer.pad_token!r} ({pad_id}), {'which is EOS' if shared else 'which is not EOS'}"
    holes = sum(
        _count_rows_with_holes(mask, left="prompt" in name)
        for name, mask in batch._asdict().items()
        if name.endswith("_mask")
    )
    values = {"pad_is_eos": float(shared), "rows_with_holes": float(holes)}
    if holes:
        fix = (
            "masks must be False on padding alone: make them of lengths, not of ids != pad_token_id, which hides an EOS"
            " inside a text where padding is made of it"
        )
        return Finding("fail", f"{measured}; {holes} masks have holes in their text, or padding inside", fix, values)
    if isinstance(batch, PreferenceBatch):
        if shared and module._pooling is pool_last_token:
            fix = "set data.loading.pad_token to a token that no text holds, if other tools shall read the reward model"
            measured += "; transformers' own classifier will score the token before a final EOS"
            return Finding("warn", measured, fix, values)
        return Finding("pass", f"{measured}; masks cover the texts", "", values)
    ids, mask = _response_ids_and_mask(context)
    twice = int(((torch.isin(ids, _eos_tensor(context)) & mask).sum(-1) > 1).sum())
    if twice:
        fix = "count a response through its first EOS and no further; take EOS out of the texts of responses to imitate"
        return Finding("fail", f"{measured}; {twice} responses count more than one EOS", fix, values)
    return Finding("pass", f"{measured}; masks cover the texts, and of each response one EOS at most", "", values)


def _eos_tensor(context: DoctorContext) -> Tensor:
    return torch.tensor(context.module.eos_ids(), device=context.trainer.strategy.root_device)


def _response_ids_and_mask(context: DoctorContext) -> tuple[Tensor, Tensor]:
    batch: Any = context.batch
    responses = context.rollout.sampled if isinstance(batch, PromptBatch) else batch
    return responses.response_ids, responses.response_mask


def _count_rows_with_holes(mask: Tensor, *, left: bool) -> int:
    """Return how many rows are not padding on one side and text on the other."""
    steps = mask.long().diff(dim=1) * (1 if left else -1)
    reaches = mask[:, -1] if left else mask[:, 0]
    return int(((steps < 0).any(1) | ~reaches).sum())


def check_truncation(context: DoctorContext) -> Finding:
    """Measure how many of the policy's own responses hit the length limit, and how long they are."""
    sampled, limit = context.rollout.sampled, context.module.sampling.max_response_length
    share, lengths = float(sampled.truncated.float().mean()), sampled.response_mask.sum(-1)
    mean, longest = float(lengths.float().mean()), int(lengths.max())
    measured = (
        f"{share:.0%} of {len(lengths)} responses hit the limit of {limit} tokens; they have {mean:.1f} on average,"
        f" {longest} at most"
    )
    values = {"truncation_rate": share, "mean_length": mean, "longest": float(longest)}
    if share < MOSTLY_TRUNCATED:
        return Finding("pass", measured, "", values)
    fix = (
        "a cut response is rewarded for what it did not get to say: raise model.sampling.max_response_length, start"
        " from a policy that was fine-tuned to end, or set model.advantage.overlong to mask or penalize"
    )
    return Finding("fail" if bool(sampled.truncated.all()) else "warn", measured, fix, values)


def check_generation_config(context: DoctorContext) -> Finding:
    """Say what the model's own generation settings would have changed in sampling; here they change nothing."""
    module: Any = context.module
    ignored = ignored_settings(module.policy, module.sampling)
    if module.policy.generation_config is not None and module.policy.generation_config.top_k is None:
        implicit = ignored.pop("top_k", None)  # transformers' default, no wish of the model's
    else:
        implicit = None
    measured = "model.generate would also take " if ignored or implicit else "model.generate would sample alike"
    if not ignored:
        return Finding("pass", measured + (f"top_k {implicit}, its default; rollouts do not" if implicit else ""))
    named = ", ".join(f"{name} {value}" for name, value in ignored.items())
    asked = [f"model.sampling.{name}" for name in ignored if hasattr(module.sampling, name)]
    fix = (
        "the policy's folder asks for these, rollouts ignore them: they train the policy as model.sampling says; "
        + (f"set {', '.join(asked)} if they shall count" if asked else "none of them can be set here")
        + ", and take what is left out of generation_config.json, or it will be evaluated as something else"
    )
    away = _kl_of_generate(context)
    measured += f"{named}, and so draw from {away:.2g} nats per token away"
    values = {"settings": float(len(ignored)), "kl": away}
    return Finding("warn" if away <= LARGE_KL else "fail", measured, fix, values)


def _kl_of_generate(context: DoctorContext) -> float:
    """Return the KL, in nats per token, of what `model.generate` draws from to the policy at the run's temperature."""
    policy, sampling = context.module.policy, context.module.sampling
    prompt = select_rows(context.prompt, range(min(ROWS_OF_GENERATE, len(context.prompt.prompts))))
    with eval_mode(policy), isolate_rng():
        torch.manual_seed(0)  # transformers draws from the global generator
        output = cast(Any, language_model(policy)).generate(
            prompt.prompt_ids,
            attention_mask=prompt.prompt_mask.long(),
            do_sample=True,
            num_beams=1,
            max_new_tokens=min(TOKENS_OF_GENERATE, sampling.max_response_length),
            pad_token_id=int(context.tokenizer.pad_token_id),
            eos_token_id=context.module.eos_ids(),
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
    drawn = torch.stack(output.scores, 1).double().log_softmax(-1)
    expected = apply_temperature(torch.stack(output.logits, 1), sampling.temperature).double().log_softmax(-1)
    kl = (drawn.exp() * (drawn - expected)).nan_to_num(0.0).sum(-1)  # 0 * inf of what is never drawn
    ids = output.sequences[:, prompt.prompt_ids.shape[1] :]
    ended = torch.isin(ids, _eos_tensor(context)).long().cumsum(-1)
    going_on = torch.nn.functional.pad(ended[:, :-1], (1, 0)) == 0
    return float(kl[going_on].mean())
