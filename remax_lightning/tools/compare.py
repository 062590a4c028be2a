"""`remax compare`: read the evaluations that `remax test` saves, and compare two of them prompt by prompt."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from remax_lightning.errors import UserError
from remax_lightning.evaluation.intervals import (
    CONFIDENCE,
    Figure,
    Method,
    RecordSums,
    collect_sums,
    difference_interval,
    figures,
    finite_or_none,
    format_interval,
    format_number,
    format_table,
    intervals_are,
    meaning_of,
    ratios_to_figures,
    two_values,
    with_interval,
)
from remax_lightning.evaluation.statistics import percentile_interval, resampled_ratios, win_rates
from remax_lightning.files import PromptRecord, check_output, load_json


class SavedEvaluation(NamedTuple):
    """An evaluation that `remax test` saved.

    Args:
        path: the JSON file.
        answer: its content.
        prompts: records of prompts, by text and number of earlier prompts with the same text.
        pieces: records of the pieces of a text file, by the same kind of key.
    """

    path: Path
    answer: dict[str, Any]
    prompts: dict[tuple[str, int], PromptRecord]
    pieces: dict[tuple[str, int], PromptRecord]


def read_evaluation(path: Path) -> SavedEvaluation:
    """Return the evaluation in a file or folder.

    Raises:
        UserError: if there is no evaluation, or more than one.
    """
    # ---- The file, or the only one in a folder ----
    if path.is_dir():
        files = sorted(path.glob("evaluation*.json"))
        if len(files) != 1:
            listing = (
                f"{', '.join(item.name for item in files)}: give one of them" if files else "none: run `remax test`"
            )
            raise UserError(f"{path} must hold one evaluation.json, got {listing}")
        (path,) = files
    lines = path.with_suffix(".jsonl")
    for file in (path, lines):
        if not file.is_file():
            raise UserError(f"there is no file {file}; `remax test` writes an evaluation.json and .jsonl side by side")
    try:
        # ---- Its figures and records ----
        answer = load_json(path.read_text(encoding="utf-8"))
        # Not `splitlines`, which also splits at characters that may be inside a text.
        records = [_parse_record(line) for line in lines.read_text(encoding="utf-8").split("\n") if line]
        answer["settings"]["reward"], answer["figures"]  # raises KeyError if it is another kind of file
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} (or {lines.name}) is not an evaluation of `remax test` ({error!r})") from error
    # Pieces of a text file have no responses.
    prompts = _index_by_text([item for item in records if item.responses])
    return SavedEvaluation(path, answer, prompts, _index_by_text([item for item in records if not item.responses]))


def _parse_record(line: str) -> PromptRecord:
    record = PromptRecord(**load_json(line))
    if record.responses:
        record.rewards["sampled"], record.rewards["greedy"]  # raises KeyError if it is another kind of record
    return record._replace(sums={name: (float(total), float(count)) for name, (total, count) in record.sums.items()})


def _index_by_text(records: Sequence[PromptRecord]) -> dict[tuple[str, int], PromptRecord]:
    # The same prompt twice: ("2 + 2 =", 0), ("2 + 2 =", 1).
    seen: Counter[str] = Counter()
    prompts = {}
    for record in records:
        prompts[record.prompt, seen[record.prompt]] = record
        seen[record.prompt] += 1
    return prompts


EXECUTION = {"batch_size", "placement", "concurrency", "timeout", "retries", "backoff", "max_bytes"}
"""Arguments of rewards that do not change scores."""
WIN_RATES = {"win_rate": "sampled", "greedy_win_rate": "greedy"}
"""Win rates of the second evaluation over the first, with the kind of response."""


class Pairs(NamedTuple):
    """Records of two evaluations; records at the same index have the same prompt.

    Args:
        first: records of the first evaluation.
        second: records of the second evaluation.
    """

    first: list[PromptRecord]
    second: list[PromptRecord]


def main(args: Sequence[str]) -> dict[str, Any]:
    """Print how the second policy differs from the first.

    Args:
        args: the arguments after `remax compare`.

    Returns:
        The content of `--json`.

    Raises:
        UserError: if a file is missing or is not an evaluation, or if prompts or rewards differ.
    """
    # ---- Refuse what would fail after the comparison ----
    options = make_parser().parse_args(args)
    if options.json is not None and options.json.exists():
        raise UserError(f"--json must be a file that does not exist yet, got {options.json}; move it away")
    check_output(options.json, "--json")
    if not 1 <= options.num_resamples <= 10**6:
        raise UserError(f"--num_resamples must be between 1 and a million, got {options.num_resamples}")
    # ---- Read, compare, print, write ----
    first, second = read_evaluation(options.first), read_evaluation(options.second)
    answer = compare(first, second, options.num_resamples, options.seed, common=options.common)
    print(format_comparison(answer))
    if options.json is not None:
        try:
            options.json.write_text(json.dumps(answer, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json: cannot write {options.json} ({error})") from error
    return answer


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments after `remax compare`."""
    parser = argparse.ArgumentParser(
        prog="remax compare",
        description=(
            "Compare two evaluations of `remax test`. The intervals are those of the differences, paired by prompt:"
            " exact for shares and rewards of two values, from a bootstrap otherwise."
        ),
        allow_abbrev=False,
    )
    parser.add_argument("first", type=Path, metavar="A", help="an evaluation.json, or the folder of one")
    parser.add_argument("second", type=Path, metavar="B", help="the other one; differences are B minus A")
    parser.add_argument("--common", action="store_true", help="compare on the prompts that both evaluations have")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the comparison to this file")
    parser.add_argument("--num_resamples", type=int, default=10_000, help="resamples of the bootstrap (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: 0)")
    return parser


def compare(
    first: SavedEvaluation, second: SavedEvaluation, num_resamples: int = 10_000, seed: int = 0, *, common: bool = False
) -> dict[str, Any]:
    """Return the figures of both with their differences, and the second one's win rate over the first.

    Args:
        first: the evaluation to compare with.
        second: the evaluation to compare.
        num_resamples: resamples of the bootstrap.
        seed: seed of the bootstrap.
        common: leave out prompts that only one evaluation has; otherwise they are refused.

    Raises:
        UserError: if prompts or rewards differ.
    """
    # ---- Figures of the prompts that both have ----
    check_rewards(first, second)
    pairs, notes = pair_records(first, second, common=common)
    left_out = find_incomparable(first, second, pairs)
    figures_by_name = compare_figures(pairs, left_out, num_resamples, seed)
    # ---- Perplexities of a text file, if it is the same in both ----
    texts = Pairs(list(first.pieces.values()), list(second.pieces.values()))
    if first.pieces.keys() != second.pieces.keys() or _token_mismatch(texts):
        left_out |= dict.fromkeys(("perplexity", "reference_perplexity"), "they are of different texts")
    elif first.pieces:
        figures_by_name |= compare_figures(texts, left_out, num_resamples, seed)
    # ---- Win rate of the second policy over the first, prompt by prompt ----
    won = [
        PromptRecord(None, "", {}, {}, {name: _win_rate(one, two, whose) for name, whose in WIN_RATES.items()})
        for one, two in zip(*pairs, strict=True)
    ]
    # ---- What was left out, and what else differs ----
    notes += [f"Left out: {name}, because {why}." for name, why in left_out.items()]
    notes += _sampling_notes(first, second)
    return {
        "first": str(first.path),
        "second": str(second.path),
        "checkpoints": [evaluation.answer.get("checkpoint") for evaluation in (first, second)],
        "num_prompts": len(won),
        "confidence": CONFIDENCE,
        "num_resamples": num_resamples,
        "figures": figures_by_name,
        **{name: figure._asdict() for name, figure in figures(won, num_resamples, seed).items()},
        "notes": notes,
    }


def compare_figures(pairs: Pairs, left_out: Mapping[str, str], num_resamples: int, seed: int) -> dict[str, Any]:
    """Return each figure of both, and the second minus the first with its interval.

    Args:
        pairs: at least one pair of records.
        left_out: figures that are not compared.
        num_resamples: resamples; each has the same prompts for both evaluations.
        seed: seed of the bootstrap.
    """
    in_second = set(collect_sums(pairs.second).names)
    names = [name for name in collect_sums(pairs.first).names if name in in_second and name not in left_out]
    if not names:
        return {}
    # ---- Sums [P, F] of the prompts on which both evaluations have the figure ----
    one, two = (collect_sums(records, names) for records in pairs)
    shared = (one.denominators > 0) & (two.denominators > 0)  # [P, F]
    one, two = (RecordSums(names, side.numerators * shared, side.denominators * shared) for side in (one, two))
    tops = np.concatenate([one.numerators, two.numerators], 1)  # [P, 2F]
    bottoms = np.concatenate([one.denominators, two.denominators], 1)  # [P, 2F]
    # ---- One bootstrap over both, so that the intervals are those of paired differences ----
    resampled = resampled_ratios(tops, bottoms, num_resamples, seed)
    before, after = (ratios_to_figures(names, part) for part in np.split(resampled, 2, axis=1))  # [K, F]
    ends = percentile_interval(after - before, CONFIDENCE).tolist()
    # ---- One entry per figure, as `--json` writes it ----
    differences_by_name = {}
    for i, (name, first_value, other) in enumerate(zip(names, one.values().tolist(), two.values().tolist(),
                                                       strict=True)):  # fmt: skip
        if count := int(shared[:, i].sum()):
            limits, method = _difference_ends(name, pairs, one, two, i) or (ends[i], "bootstrap")
            changed = with_interval(other - first_value, limits, count, method)._asdict()
            values_of = {"first": finite_or_none(first_value), "second": finite_or_none(other)}
            differences_by_name[name] = {**values_of, "difference": changed.pop("value"), **changed}
    return differences_by_name


def _difference_ends(
    name: str, pairs: Pairs, one: RecordSums, two: RecordSums, column: int
) -> tuple[tuple[float, float], Method] | None:
    """Return the exact interval of a difference of shares; None if a response can have more than two values."""
    sides = [(side.numerators[:, column], side.denominators[:, column]) for side in (one, two)]
    tops, bottoms = (np.concatenate(parts) for parts in zip(*sides, strict=True))
    support = two_values(name, [*pairs.first, *pairs.second], tops, bottoms)
    if support is None or name == "chosen_reward":  # both have scored the same responses of the data set
        return None
    return difference_interval(sides[0], sides[1], support), "exact"


_SCORING = {"reward": None, "truncation_penalty": None, "overlong_cache": 0}
"""Settings that rewards depend on, and their values in evaluations that are older than the setting."""


def check_rewards(first: SavedEvaluation, second: SavedEvaluation) -> None:
    """Refuse two evaluations with different rewards.

    Raises:
        UserError: naming the settings that differ.
    """
    one, two = (
        _flatten({name: evaluation.answer["settings"].get(name, default) for name, default in _SCORING.items()})
        for evaluation in (first, second)
    )
    differing = [name for name in {**one, **two} if one.get(name) != two.get(name)]
    if differing:
        shown = ", ".join(f"{name} {one.get(name)!r} and {two.get(name)!r}" for name in differing[:3])
        raise UserError(
            f"{first.path} and {second.path} were scored by different rewards: {shown}; evaluate both with the same"
            " model.reward"
        )


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    flat: dict[str, Any] = {}  # {"reward": {"path": "a"}} -> {"reward.path": "a"}
    for name, value in node.items():
        if name not in EXECUTION:
            flat |= _flatten(value, f"{prefix}.{name}" if prefix else name)
    return flat


def pair_records(first: SavedEvaluation, second: SavedEvaluation, *, common: bool) -> tuple[Pairs, list[str]]:
    """Return the records of the common prompts, and notes about the other prompts.

    Raises:
        UserError: if there are no common prompts, or if some prompts are not common and `common` is false.
    """
    # By text, so that the two files may have the prompts in another order.
    keys = [key for key in first.prompts if key in second.prompts]
    only = [len(evaluation.prompts) - len(keys) for evaluation in (first, second)]
    if not keys or (any(only) and not common):
        hint = "; --common compares the common prompts" if keys else ""
        raise UserError(
            f"prompts differ: {only[0]} are in {first.path} only, {only[1]} in {second.path} only, {len(keys)} in"
            f" both{hint}; evaluate both on the same data.val_path"
        )
    notes = [f"Left out: {only[0]} prompts that only A has, and {only[1]} that only B has."] if any(only) else []
    return Pairs([first.prompts[key] for key in keys], [second.prompts[key] for key in keys]), notes


def find_incomparable(first: SavedEvaluation, second: SavedEvaluation, pairs: Pairs) -> dict[str, str]:
    """Return the figures that have a different meaning in the two evaluations, with the reason."""
    one, two = (evaluation.answer["settings"] for evaluation in (first, second))
    reasons: dict[str, str] = {}
    if one.get("reference") != two.get("reference"):
        names = ("kl", "kl_per_response", "reference_reward", "win_rate_reference", "reference_perplexity")
        reasons |= dict.fromkeys(names, "the references differ")
    elif any(one.get("kl", {}).get(name) != two.get("kl", {}).get(name) for name in ("estimator", "clamp")):
        reasons |= dict.fromkeys(("kl", "kl_per_response"), "model.kl.estimator or model.kl.clamp differs")
    both = list(zip(*pairs, strict=True))
    if any(first_record.responses.get("chosen") != other.responses.get("chosen") for first_record, other in both):
        reasons |= dict.fromkeys(("chosen_reward", "win_rate_chosen"), "the data set's responses differ")
    evaluations = [settings.get("evaluation", {}) for settings in (one, two)]
    for key, starts in (("pass_threshold", ("pass_at_", "maj_at_")), ("answer", ("maj_at_",))):
        if evaluations[0].get(key) != evaluations[1].get(key):
            of_key = {name for record in pairs.first for name in record.sums if name.startswith(starts)}
            reasons |= dict.fromkeys(of_key, f"evaluation.{key} differs")
    if reason := _token_mismatch(pairs):
        reasons |= dict.fromkeys(("perplexity", "reference_perplexity"), reason)
    measured = {name for records in pairs for record in records for name in record.sums}
    return {name: why for name, why in reasons.items() if name in measured}


def _token_mismatch(pairs: Pairs) -> str:
    # sums: (total over tokens, number of tokens)
    counts = [[record.sums.get("perplexity", (0.0, 0.0))[1] for record in records] for records in pairs]
    return "" if counts[0] == counts[1] else "held-out tokens differ (tokenizer, response_column or max_length)"


def _win_rate(first: PromptRecord, second: PromptRecord, whose: str) -> tuple[float, float]:
    one, two = (record.rewards[whose] for record in (first, second))
    # every response of one policy with every response of the other
    comparisons = float(len(one) * len(two))
    return float(win_rates([two], [one])[0]) * comparisons, comparisons


def _sampling_notes(first: SavedEvaluation, second: SavedEvaluation) -> list[str]:
    one, two = (evaluation.answer["settings"].get("sampling") or {} for evaluation in (first, second))
    names = [name for name in {**one, **two} if one.get(name) != two.get(name)]
    return [f"Note: model.sampling differs in {', '.join(names)}."] if names else []


def format_comparison(answer: Mapping[str, Any]) -> str:
    """Return the comparison as text."""
    rows = [("", "A", "B", "B - A", f"{CONFIDENCE:.0%} interval", "n", "")]
    for name, figure in answer["figures"].items():
        changed = Figure(figure["difference"], figure["low"], figure["high"], figure["n"])
        cells = (
            format_number(figure["first"]),
            format_number(figure["second"]),
            format_number(changed.value),
            format_interval(changed),
        )
        rows.append((name, *cells, str(changed.n), meaning_of(name)))
    lines = [f"{letter}: {path} ({checkpoint or 'the loaded policy'})"
             for letter, path, checkpoint in zip("AB", (answer["first"], answer["second"]), answer["checkpoints"],
                                                 strict=True)]  # fmt: skip
    lines += ["", f"On {answer['num_prompts']} prompts; {intervals_are(answer['num_resamples'])}.", ""]
    lines += [format_table(rows), ""]
    for name, whose in WIN_RATES.items():
        if name in answer:
            won = Figure(**answer[name])
            lines.append(f"Win rate of B over A, {whose} responses under the reward: {format_number(won.value)}"
                         f" ({format_interval(won)}), ties one half.")  # fmt: skip
    return "\n".join([*lines, *answer["notes"]])
