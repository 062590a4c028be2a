"""What the prompts hold: special tokens where they belong, and a text at all."""

from __future__ import annotations

from typing import Any

from remax_lightning.data.formatting import special_prefix
from remax_lightning.modules.policy import PolicyModule
from remax_lightning.tools.doctor.batches import unpadded_ids
from remax_lightning.tools.doctor.context import DoctorContext
from remax_lightning.tools.doctor.finding import Finding, NotApplicable
from remax_lightning.types import PreferenceBatch

MOSTLY_LEFT_OUT = 0.5
SOME_LEFT_OUT = 0.05
"""Shares of the rows from which the data that is trained on is another than the data that was given."""


def check_prompt_eos(context: DoctorContext) -> Finding:
    """Look for EOS in prompts: at their end it says that all is said."""
    batch: Any = context.batch
    if isinstance(batch, PreferenceBatch):
        raise NotApplicable("conversations end with EOS")
    assert isinstance(context.module, PolicyModule)
    eos_ids = set(context.module.eos_ids())
    rows = unpadded_ids(batch.prompt_ids, batch.prompt_mask)
    last = sum(row[-1:] != [] and row[-1] in eos_ids for row in rows)
    inside = sum(not eos_ids.isdisjoint(row[:-1]) for row in rows)
    values = {"at_the_end": float(last), "inside": float(inside)}
    if last:
        fix = (
            "the policy is asked to go on after an end: take EOS off the prompt column, data.template or the generation"
            " prompt of the chat template"
        )
        return Finding("fail", f"{last} of {len(rows)} prompts end with EOS", fix, values)
    if not inside:
        return Finding("pass", f"none of {len(rows)} prompts has an EOS", "", values)
    plain = sum(
        not _is_chat(context, row) and not eos_ids.isdisjoint(ids) for ids, row in zip(rows, batch.rows, strict=True)
    )
    measured = f"{inside} of {len(rows)} prompts have an EOS inside"
    if not plain:
        return Finding("pass", f"{measured}, where the chat template ends earlier turns", "", values)
    fix = (
        "text of the data reads as EOS; take it out if the policy was not trained with it between turns (masks and"
        " rollouts here do count what stands before it)"
    )
    return Finding("warn", f"{measured}, {plain} of them plain text", fix, values)


def _is_chat(context: DoctorContext, row: dict[str, Any]) -> bool:
    return isinstance(row.get(getattr(context.data, "prompt_column", "prompt")), list)


def check_bos(context: DoctorContext) -> Finding:
    """Look whether texts begin with one BOS, where the tokenizer has it put there, and not with two."""
    tokenizer, batch = context.tokenizer, context.batch
    named = ["prompt"] if not isinstance(batch, PreferenceBatch) else ["chosen", "rejected"]
    fields = batch._asdict()
    rows = [row for name in named for row in unpadded_ids(fields[f"{name}_ids"], fields[f"{name}_mask"])]
    return judge_bos(rows, tokenizer, "texts", "data")


def judge_bos(rows: list[list[int]], tokenizer: Any, what: str, where: str) -> Finding:
    """Judge how token ids begin.

    Args:
        rows: token ids of texts.
        tokenizer: that made them.
        what: what to call the texts.
        where: what makes them, for the fix.
    """
    bos_id = tokenizer.bos_token_id
    if bos_id is None:
        raise NotApplicable("the tokenizer has no BOS")
    doubled = sum(row[:2] == [bos_id, bos_id] for row in rows)
    values = {"doubled": float(doubled)}
    if doubled:
        fix = (
            f"a chat template writes BOS and the text or the tokenizer another: take one of them out of {where}, the"
            " template, or call the tokenizer with add_special_tokens=False on a templated text"
        )
        return Finding("fail", f"{doubled} of {len(rows)} {what} begin with two BOS", fix, values)
    puts_one = special_prefix(tokenizer)[:1] == [bos_id]
    lacking = sum(row[:1] != [bos_id] for row in rows) if puts_one else 0
    values["lacking"] = float(lacking)
    if lacking:
        fix = (
            "the tokenizer puts BOS before plain text, the chat template writes none: add {{ bos_token }} to it, unless"
            " the model was trained without"
        )
        return Finding("warn", f"{lacking} of {len(rows)} {what} begin without the tokenizer's BOS", fix, values)
    how = "begin with one BOS" if puts_one else "have no BOS in front, as the tokenizer puts none there, or one"
    return Finding("pass", f"all of {len(rows)} {what} {how}", "", values)


def check_prompts(context: DoctorContext) -> Finding:
    """Look for prompts that say nothing, and count the rows that were left out."""
    batch, special = context.batch, set(context.tokenizer.all_special_ids)
    empty = sum(not text.strip() for text in batch.prompts)
    if not isinstance(batch, PreferenceBatch):
        rows = unpadded_ids(batch.prompt_ids, batch.prompt_mask)
        empty = max(empty, sum(special.issuperset(row) for row in rows))
    total, left_out = getattr(context.data, "num_rows", 0), getattr(context.data, "num_left_out", 0)
    share = left_out / total if total else 0.0
    values = {"empty": float(empty), "left_out": float(left_out), "rows": float(total)}
    if empty:
        fix = "fill these rows or remove them: the policy would answer nothing, and its reward be noise"
        return Finding("fail", f"{empty} of {len(batch.prompts)} prompts are empty", fix, values)
    alike = len(batch.prompts) - len(set(batch.prompts))
    measured = f"none of {len(batch.prompts)} is empty; {left_out} of {total} rows were left out ({share:.1%})"
    if share > SOME_LEFT_OUT:
        fix = (
            "raise data.max_prompt_length (or max_length, max_response_length) or shorten the rows: what is left is not"
            " the data that was given; data.loading.long_prompts and bad_pairs: error name the first"
        )
        return Finding("fail" if share > MOSTLY_LEFT_OUT else "warn", measured, fix, values)
    if alike * 2 > len(batch.prompts):
        fix = "look for a template that leaves the row's own text out, and for rows that are there many times"
        return Finding("warn", f"{alike} of {len(batch.prompts)} prompts are repetitions of others", fix, values)
    return Finding("pass", measured, "", values)
