"""Whether responses end with EOS, and whether EOS is trained."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from remax_lightning.data.tokenizers import hidden_ids, special_ids
from remax_lightning.models.forward import eval_mode, model_inputs
from remax_lightning.models.sampling import apply_temperature, ignored_settings
from remax_lightning.rewards.pooling import pool_last_token
from remax_lightning.sharding import language_model
from remax_lightning.tools.doctor.context import LARGE_KL, DoctorContext, Finding, NotApplicable, Status, select_rows
from remax_lightning.types import PreferenceBatch, PromptBatch, Responses

MIN_PROBABILITY = 1e-30
"""Probability below which a token never appears in a run."""
LOW_PROBABILITY = 1e-4
"""If no response ended: highest probability of EOS below which sampling hardly ever finds it."""
MAX_SHOWN_IDS = 4
"""Number of EOS tokens that a message names."""
ROWS_OF_GENERATE, TOKENS_OF_GENERATE = 4, 32
"""Limits for `model.generate`, which keeps two tensors of the size of the vocabulary per generated token."""
MOSTLY_TRUNCATED = 0.25
"""Share of truncated responses above which the length limit decides the reward."""


def check_eos(context: DoctorContext) -> Finding:
    """Check that the EOS tokens are in the policy's vocabulary, and that the policy can sample them."""
    module: Any = context.module
    ids, tokenizer_eos = module.eos_ids(), int(module.tokenizer.eos_token_id)
    vocabulary = module.policy.config.get_text_config().vocab_size
    # ---- The ids exist ----
    outside = [token for token in ids if not 0 <= token < vocabulary]
    if outside:
        fix = "correct eos_token_id in the policy's generation_config.json, or use the policy's tokenizer"
        return Finding("fail", f"EOS {_join_ids(outside)} is not among the policy's {vocabulary} tokens", fix)
    if (other := _foreign_turn_end(context, ids)) is not None:
        name = module.tokenizer.convert_ids_to_tokens(other)
        fix = (
            f"save the tokenizer with eos_token {name!r}, or add {other} to eos_token_id in generation_config.json:"
            " rollouts go on after a token that ends a turn, up to the length limit"
        )
        return Finding("fail", f"the chat template ends a turn with {name!r} ({other}), which ends no response", fix)
    # ---- The policy can sample them ----
    names = [f"{module.tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in ids[:MAX_SHOWN_IDS]]
    listing = ", ".join(names) + (f" and {len(ids) - MAX_SHOWN_IDS} more" if len(ids) > MAX_SHOWN_IDS else "")
    if isinstance(context.batch, PromptBatch):
        highest, ended = _highest_probability(context, ids), int((~context.rollout.sampled.truncated).sum())
        values = {"highest_probability": highest, "ended": float(ended)}
        measured = f"responses end at {listing}; its probability reaches {highest:.2g}"
        status: Status = (
            "fail" if highest < MIN_PROBABILITY else "warn" if not ended and highest < LOW_PROBABILITY else "pass"
        )
        if status != "pass":
            fix = (
                "the policy does not generate its EOS: fine-tune it on responses that end with EOS (SFTModule), or use"
                " the tokenizer or the eos_token_id of generation_config.json that it was trained with"
            )
            return Finding(status, measured, fix, values)
    else:
        values, measured = {}, f"responses end at {listing}"
    # ---- Tokenizer and generation settings agree ----
    if len(ids) > 1 and tokenizer_eos not in _configured_eos_ids(module.policy):
        fix = (
            "both end a response; if the policy has learned only one of them, set tokenizer.eos_token and eos_token_id"
            " of generation_config.json to that one"
        )
        return Finding("warn", f"{measured}; the tokenizer's {tokenizer_eos} is not in generation_config", fix, values)
    return Finding("pass", measured, "", values)


def _foreign_turn_end(context: DoctorContext, eos_ids: list[int]) -> int | None:
    """Return the token that the chat template of the prompts ends a turn with, if it is not among `eos_ids`."""
    find = getattr(context.data, "turn_end_id", None)
    token: int | None = None if find is None else find()
    return None if token in eos_ids else token


def _configured_eos_ids(policy: Any) -> list[int]:
    configured = getattr(policy.generation_config, "eos_token_id", None)
    return [] if configured is None else [configured] if isinstance(configured, int) else list(configured)


def _join_ids(ids: list[int]) -> str:
    return ", ".join(map(str, ids))


def _highest_probability(context: DoctorContext, eos_ids: list[int]) -> float:
    """Return the highest probability of EOS in one sampled response per prompt; row by row, to save memory."""
    policy, sampled, prompt = context.module.policy, context.rollout.sampled, context.prompt
    num_samples, highest = context.rollout.num_samples, -math.inf
    for i in range(0, len(sampled.response_ids), num_samples):
        row = select_rows(prompt, [i // num_samples])
        length = int(sampled.response_mask[i].sum())
        ids = torch.cat([row.prompt_ids, sampled.response_ids[i : i + 1, :length]], dim=1)
        with eval_mode(policy):
            inputs = model_inputs(policy, ids, torch.ones_like(ids, dtype=torch.bool))
            # [length, V]: the last token of the prompt predicts the first of the response
            logits: Tensor = policy(**inputs, use_cache=False).logits[0, row.prompt_ids.shape[1] - 1 : -1]
        eos_log_probs = logits.float().log_softmax(-1)[:, eos_ids].logsumexp(-1)  # [length]
        highest = max(highest, float(eos_log_probs.max()))
    return math.exp(highest)


def check_eos_trained(context: DoctorContext) -> Finding:
    """Check that the engine stops at EOS and that the loss counts the EOS token."""
    batch: Any = context.batch
    if not isinstance(batch, PromptBatch):
        return _check_dataset_ends(context, batch.response_ids, batch.response_mask)
    module, rollout = context.module, context.rollout
    eos_ids = module.eos_ids()
    both = [rollout.sampled, cast(Responses, rollout.greedy)]
    ended = sum(int((~responses.truncated).sum()) for responses in both)
    # If no response ended, another token that the policy does generate stands in for EOS.
    stand_in = None if ended else _find_stand_in_token(both[1], eos_ids, module.sampling.min_response_length)
    if not ended and stand_in is None:
        raise NotApplicable("no response ended, and no other token can stand in for EOS")
    if stand_in is not None:
        eos_ids = [stand_in]
        rollout = context.roll_out(context.prompt, eos_ids=eos_ids)
        both = [rollout.sampled, cast(Responses, rollout.greedy)]
        ended = sum(int((~responses.truncated).sum()) for responses in both)
    # ---- Ends of sampled and greedy responses ----
    pad_id = int(module.tokenizer.pad_token_id)
    faults = [
        fault
        for responses in both
        if (fault := _find_end_fault(responses, eos_ids, pad_id, module.sampling.stop_strings))
    ]
    if stand_in is not None and not ended:
        faults.append(f"the engine does not stop at token {stand_in}, which stands in for EOS")
    total = sum(len(responses.response_ids) for responses in both)
    measured = (
        f"{ended} of {total} responses ended at {'a token that stands in for EOS' if stand_in is not None else 'EOS'}"
    )
    if faults:
        fix = (
            "model.rollout has to return each response including its EOS, followed by pad_id: otherwise EOS is not"
            " trained and responses grow to the limit; correct the engine, or remove model.rollout"
        )
        return Finding("fail", f"{measured}, but {faults[0]}", fix, {"ended": float(ended)})
    return Finding("pass", f"{measured}; it is counted, and nothing after it", "", {"ended": float(ended)})


def _find_stand_in_token(greedy: Responses, eos_ids: list[int], min_length: int) -> int | None:
    """Return a token of a greedy response after its first `min_length` tokens; None if there is none."""
    for ids, mask in zip(greedy.response_ids, greedy.response_mask, strict=True):
        rest = [int(token) for token in ids[mask][min_length:] if int(token) not in eos_ids]
        if rest:
            return rest[0]
    return None


def _find_end_fault(responses: Responses, eos_ids: list[int], pad_id: int, stop_strings: tuple[str, ...]) -> str:
    """Return what is wrong with the ends of the responses; empty if nothing is."""
    ids, mask = responses.response_ids, responses.response_mask
    ends = torch.isin(ids, torch.tensor(eos_ids, device=ids.device))  # [M, R]
    last_is_end = ends.gather(1, (mask.sum(-1) - 1)[:, None])[:, 0]  # [M]
    if not stop_strings and bool((~responses.truncated & ~last_is_end).any()):
        return "the mask of one leaves its EOS out"
    if bool((~mask & (ids != pad_id)).any()):
        return "one continues after its EOS"
    # two pad tokens at the end that the mask counts
    padded = (ids[:, -2:] == pad_id).all(-1) & mask[:, -1] & (ids.shape[1] > 1)
    if pad_id not in eos_ids and bool((padded & ~ends.any(-1)).any()):
        return "one is padded without an EOS"
    return ""


def _check_dataset_ends(context: DoctorContext, ids: Tensor, mask: Tensor) -> Finding:
    eos_ids = torch.tensor(context.module.eos_ids(), device=ids.device)
    last_ids = ids.gather(1, (mask.sum(-1) - 1).clamp_min(0)[:, None])[:, 0]  # [B]
    ended = int((torch.isin(last_ids, eos_ids) & mask.any(-1)).sum())
    measured = f"{ended} of {len(ids)} responses of the data set end with an EOS that is trained"
    if ended == len(ids):
        return Finding("pass", measured, "", {"ended": float(ended)})
    fix = (
        "a policy that is trained without EOS never stops: append EOS to the responses and count it in response_mask,"
        " as SFTDataModule does, and do not derive masks from the pad token"
    )
    return Finding("fail", measured, fix, {"ended": float(ended)})


def check_pad_token(context: DoctorContext) -> Finding:
    """Check that masks mark exactly the real tokens, also if the pad token is EOS."""
    module, batch, tokenizer = context.module, context.batch, context.tokenizer
    pad_id, size = int(tokenizer.pad_token_id), module.trained_model.get_input_embeddings().num_embeddings
    if pad_id >= size:
        fix = "set data.loading.pad_token to a token of the model, or to eos; a new token needs a larger embedding"
        return Finding("fail", f"the pad token {pad_id} is not among the model's {size} embeddings", fix)
    # ---- Masks have no gaps ----
    shared = pad_id == tokenizer.eos_token_id
    measured = (
        f"the pad token is {tokenizer.pad_token!r} ({pad_id}), {'which is EOS' if shared else 'which is not EOS'}"
    )
    holes = sum(
        _count_rows_with_holes(mask, left="prompt" in name)
        for name, mask in batch._asdict().items()
        if name.endswith("_mask")
    )
    values = {"pad_is_eos": float(shared), "rows_with_holes": float(holes)}
    if holes:
        fix = (
            "masks must be False on padding only: build them from lengths, not from ids != pad_token_id, which drops a"
            " real EOS if the pad token is EOS"
        )
        return Finding("fail", f"{measured}; {holes} masks have gaps inside the text", fix, values)
    if isinstance(batch, PreferenceBatch):
        if shared and module._pooling is pool_last_token:
            fix = (
                "set data.loading.pad_token to a token that no text contains, if other tools will read the reward model"
            )
            measured += "; transformers' classifier will score the token before a final EOS"
            return Finding("warn", measured, fix, values)
        return Finding("pass", f"{measured}; masks cover the texts", "", values)
    ids, mask = _response_ids_and_mask(context)
    # ---- At most one EOS per response ----
    twice = int(((torch.isin(ids, _eos_tensor(context)) & mask).sum(-1) > 1).sum())
    if twice:
        fix = "end response_mask at the first EOS; remove EOS from the response texts of the data set"
        return Finding("fail", f"{measured}; {twice} responses count more than one EOS", fix, values)
    return Finding("pass", f"{measured}; masks cover the texts, and at most one EOS per response", "", values)


def check_special_tokens(context: DoctorContext) -> Finding:
    """Look whether responses hold special tokens, which the reward reads only where it is told to."""
    module, tokenizer = context.module, context.tokenizer
    roles = {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
    ends = hidden_ids(tokenizer, module.eos_ids(), skip_special_tokens=False)
    ids, mask = _response_ids_and_mask(context)
    counts = {token: int(((ids == token) & mask).any(-1).sum()) for token in special_ids(tokenizer) - ends - roles}
    written = sorted((token for token, count in counts.items() if count), key=lambda token: -counts[token])
    values = {"responses": float(max(counts.values(), default=0))}
    if not written:
        return Finding("pass", f"no special token but its end in {len(ids)} responses", "", values)
    named = ", ".join(
        f"{tokenizer.convert_ids_to_tokens(token)!r} ({counts[token]})" for token in written[:MAX_SHOWN_IDS]
    )
    measured = f"of {len(ids)} responses some hold the special tokens {named}"
    if not module.sampling.skip_special_tokens:
        return Finding("pass", f"{measured}, which the reward reads", "", values)
    fix = (
        "set model.sampling.skip_special_tokens: false where the reward has to read them, as a reward for a format does"
    )
    return Finding("warn", f"{measured}, which the reward does not see", fix, values)


def _eos_tensor(context: DoctorContext) -> Tensor:
    return torch.tensor(context.module.eos_ids(), device=context.trainer.strategy.root_device)


def _response_ids_and_mask(context: DoctorContext) -> tuple[Tensor, Tensor]:
    batch: Any = context.batch
    responses = context.rollout.sampled if isinstance(batch, PromptBatch) else batch
    return responses.response_ids, responses.response_mask


def _count_rows_with_holes(mask: Tensor, *, left: bool) -> int:
    """Return the number of rows whose mask is not padding on one side and text on the other."""
    # Padding on the left: F F T T T only rises, and its last entry is True.
    steps = mask.long().diff(dim=1) * (1 if left else -1)
    touches_edge = mask[:, -1] if left else mask[:, 0]
    return int(((steps < 0).any(1) | ~touches_edge).sum())


def check_truncation(context: DoctorContext) -> Finding:
    """Measure how many sampled responses hit the length limit, and how long responses are."""
    sampled, limit = context.rollout.sampled, context.module.sampling.max_response_length
    share, lengths = float(sampled.truncated.float().mean()), sampled.response_mask.sum(-1)  # lengths: [S]
    mean, longest = float(lengths.float().mean()), int(lengths.max())
    measured = (
        f"{share:.0%} of {len(lengths)} responses hit the limit of {limit} tokens; they have {mean:.1f} on average,"
        f" {longest} at most"
    )
    values = {"truncation_rate": share, "mean_length": mean, "longest": float(longest)}
    if share < MOSTLY_TRUNCATED:
        return Finding("pass", measured, "", values)
    fix = (
        "a truncated response is scored without its end: raise model.sampling.max_response_length, start from a policy"
        " that was fine-tuned to stop, or set model.advantage.overlong to mask or penalize"
    )
    return Finding("fail" if bool(sampled.truncated.all()) else "warn", measured, fix, values)


def check_generation_config(context: DoctorContext) -> Finding:
    """Report the generation settings of the model that rollouts ignore."""
    module: Any = context.module
    ignored = ignored_settings(module.policy, module.sampling)
    if module.policy.generation_config is not None and module.policy.generation_config.top_k is None:
        implicit = ignored.pop("top_k", None)  # the default of transformers, not a choice of the model
    else:
        implicit = None
    measured = "model.generate also applies " if ignored or implicit else "model.generate samples the same way"
    if not ignored:
        return Finding("pass", measured + (f"top_k {implicit}, its default; rollouts do not" if implicit else ""))
    named = ", ".join(f"{name} {value}" for name, value in ignored.items())
    keys = [f"model.sampling.{name}" for name in ignored if hasattr(module.sampling, name)]
    fix = (
        "rollouts ignore the settings in the policy's folder and follow model.sampling; "
        + (f"set {', '.join(keys)} to apply them" if keys else "none of them can be set here")
        + ", and remove the others from generation_config.json, or the policy is evaluated with other settings"
    )
    kl = _kl_of_generate(context)
    measured += f"{named}, a KL of {kl:.2g} nats per token to what rollouts sample from"
    values = {"settings": float(len(ignored)), "kl": kl}
    return Finding("warn" if kl <= LARGE_KL else "fail", measured, fix, values)


def _kl_of_generate(context: DoctorContext) -> float:
    """Return KL(distribution of `model.generate` || policy at the run's temperature), in nats per token."""
    policy, sampling = context.module.policy, context.module.sampling
    prompt = select_rows(context.prompt, range(min(ROWS_OF_GENERATE, len(context.prompt.prompts))))
    with eval_mode(policy), isolate_rng():
        torch.manual_seed(0)  # transformers uses the global generator
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
    generated = torch.stack(output.scores, 1).double().log_softmax(-1)  # [B, R, V], after the settings
    expected = apply_temperature(torch.stack(output.logits, 1), sampling.temperature).double().log_softmax(-1)
    kl = (generated.exp() * (generated - expected)).nan_to_num(0.0).sum(-1)  # [B, R]; 0 * inf for impossible tokens
    ids = output.sequences[:, prompt.prompt_ids.shape[1] :]
    ended = torch.isin(ids, _eos_tensor(context)).long().cumsum(-1)
    # up to the first EOS, which is still drawn from the distribution
    unfinished = torch.nn.functional.pad(ended[:, :-1], (1, 0)) == 0
    return float(kl[unfinished].mean())
