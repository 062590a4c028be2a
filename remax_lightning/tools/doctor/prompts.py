"""Whether the prompts have text, and special tokens in the right places."""

from __future__ import annotations

from typing import Any

from remax_lightning.data.formatting import special_prefix
from remax_lightning.modules.policy import PolicyModule
from remax_lightning.tools.doctor.context import DoctorContext, Finding, NotApplicable, unpadded_ids
from remax_lightning.types import PreferenceBatch

MOSTLY_LEFT_OUT = 0.5
SOME_LEFT_OUT = 0.05
"""Shares of dropped rows above which training sees other data than the data set: `fail` and `warn`."""


def check_prompt_eos(context: DoctorContext) -> Finding:
    """Look for EOS in prompts. At the end of a prompt it tells the policy that the text is complete."""
    batch: Any = context.batch
    if isinstance(batch, PreferenceBatch):
        raise NotApplicable("conversations end with EOS")
    assert isinstance(context.module, PolicyModule)
    eos_ids = set(context.module.eos_ids())
    rows = unpadded_ids(batch.prompt_ids, batch.prompt_mask)
    # ---- EOS at the end, or before it ----
    last = sum(row[-1:] != [] and row[-1] in eos_ids for row in rows)
    inside = sum(not eos_ids.isdisjoint(row[:-1]) for row in rows)
    values = {"at_the_end": float(last), "inside": float(inside)}
    if last:
        fix = (
            "the policy has to continue after an end of text: remove EOS from the prompt column, data.template or the"
            " generation prompt of the chat template"
        )
        return Finding("fail", f"{last} of {len(rows)} prompts end with EOS", fix, values)
    if not inside:
        return Finding("pass", f"none of {len(rows)} prompts contains EOS", "", values)
    # ---- EOS inside a chat is the end of an earlier turn; in plain text it is a mistake ----
    plain = sum(
        getattr(prompt, "conversation", None) is None and not eos_ids.isdisjoint(ids)
        for ids, prompt in zip(rows, batch.prompts, strict=True)
    )
    measured = f"{inside} of {len(rows)} prompts contain EOS before their end"
    if not plain:
        return Finding("pass", f"{measured}, at the ends of earlier chat turns", "", values)
    fix = (
        "text of the data set is tokenized as EOS; remove it if the policy was not trained with EOS between turns"
        " (masks and rollouts still use the text before it)"
    )
    return Finding("warn", f"{measured}, {plain} of them plain text", fix, values)


def check_bos(context: DoctorContext) -> Finding:
    """Check that texts begin with one BOS if the tokenizer adds one, and never with two."""
    tokenizer, batch = context.tokenizer, context.batch
    named = ["prompt"] if not isinstance(batch, PreferenceBatch) else ["chosen", "rejected"]
    fields = batch._asdict()
    rows = [row for name in named for row in unpadded_ids(fields[f"{name}_ids"], fields[f"{name}_mask"])]
    return judge_bos(rows, tokenizer, "texts", "data")


def judge_bos(rows: list[list[int]], tokenizer: Any, what: str, where: str) -> Finding:
    """Check how texts begin.

    Args:
        rows: token ids of the texts.
        tokenizer: the tokenizer that made them.
        what: name of the texts, for the message.
        where: what produces the texts, for the fix.
    """
    bos_id = tokenizer.bos_token_id
    if bos_id is None:
        raise NotApplicable("the tokenizer has no BOS")
    # ---- Two BOS, or none although the tokenizer adds one ----
    doubled = sum(row[:2] == [bos_id, bos_id] for row in rows)
    values = {"doubled": float(doubled)}
    if doubled:
        fix = (
            f"the chat template writes BOS, and the text or the tokenizer adds another: remove one of them from {where}"
            " or the template, or call the tokenizer with add_special_tokens=False on a templated text"
        )
        return Finding("fail", f"{doubled} of {len(rows)} {what} begin with two BOS", fix, values)
    adds_bos = special_prefix(tokenizer)[:1] == [bos_id]
    missing = sum(row[:1] != [bos_id] for row in rows) if adds_bos else 0
    values["lacking"] = float(missing)
    if missing:
        fix = (
            "the tokenizer adds BOS to plain text, but the chat template writes none: add {{ bos_token }} to the"
            " template, unless the model was trained without BOS"
        )
        return Finding("warn", f"{missing} of {len(rows)} {what} begin without the tokenizer's BOS", fix, values)
    how = "begin with one BOS" if adds_bos else "begin with at most one BOS (the tokenizer adds none)"
    return Finding("pass", f"all of {len(rows)} {what} {how}", "", values)


def check_prompts(context: DoctorContext) -> Finding:
    """Look for empty prompts, and count the rows that were dropped."""
    batch, special = context.batch, set(context.tokenizer.all_special_ids)
    # ---- Empty: no text, or special tokens only ----
    empty = sum(not text.strip() for text in batch.prompts)
    if not isinstance(batch, PreferenceBatch):
        rows = unpadded_ids(batch.prompt_ids, batch.prompt_mask)
        empty = max(empty, sum(special.issuperset(row) for row in rows))
    # ---- Rows that were dropped ----
    total, left_out = getattr(context.data, "num_rows", 0), getattr(context.data, "num_left_out", 0)
    share = left_out / total if total else 0.0
    values = {"empty": float(empty), "left_out": float(left_out), "rows": float(total)}
    if empty:
        fix = "fill these rows or remove them: a response to an empty prompt has a meaningless reward"
        return Finding("fail", f"{empty} of {len(batch.prompts)} prompts are empty", fix, values)
    # ---- Repeated prompts: more than half point to a wrong template ----
    repeated = len(batch.prompts) - len(set(batch.prompts))
    measured = f"none of {len(batch.prompts)} is empty; {left_out} of {total} rows were dropped ({share:.1%})"
    if share > SOME_LEFT_OUT:
        fix = (
            "raise data.max_prompt_length (or max_length, max_response_length) or shorten the rows, because training"
            " sees only the rest; data.loading.long_prompts: error and on_bad_row: error name the first such row"
        )
        return Finding("fail" if share > MOSTLY_LEFT_OUT else "warn", measured, fix, values)
    if repeated * 2 > len(batch.prompts):
        fix = "look for a template that omits the text of the row, and for duplicate rows"
        return Finding("warn", f"{repeated} of {len(batch.prompts)} prompts repeat another one", fix, values)
    return Finding("pass", measured, "", values)
