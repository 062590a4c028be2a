"""Each guard fires on the series planted for it, once, and no other does; none fires on a healthy run."""

from __future__ import annotations

import inspect
import math
import random
import re
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.fakes import (
    FakeModule,
    checkpoint_at,
    make_output,
    make_prompt,
    make_responses,
    make_trainer,
    scalars,
    two_steps_of_two_parts,
)

from remax_lightning.callbacks import CollapseDetector
from remax_lightning.callbacks.collapse_detector import ADVICE
from remax_lightning.errors import UserError
from remax_lightning.types import Rollout, StepOutput

RESPONSES = 20
WINDOW = 4


def planted(
    seed: int,
    *,
    ended: float = 1.0,
    entropy: float = 0.5,
    kl: float | None = 0.2,
    longer: float = 1.0,
    paid: float = 0.0,
    distinct: float = 1.0,
) -> StepOutput:
    """The output of a step with `RESPONSES` responses.

    Args:
        ended: share that ended by themselves.
        entropy: nats per token.
        kl: nats per response.
        longer: factor on the lengths, which are 4 to 8 otherwise.
        paid: reward of a token; the rest of the reward is chance.
        distinct: share of distinct responses.
    """
    chance = random.Random(seed)
    lengths = [round(longer * chance.randint(4, 8)) for _ in range(RESPONSES)]
    texts = [f"{seed}.{i % max(1, round(distinct * RESPONSES))}" for i in range(RESPONSES)]
    sampled = make_responses(texts, lengths, [i >= ended * RESPONSES for i in range(RESPONSES)])
    mask = sampled.response_mask
    reward = torch.tensor([paid * length + chance.gauss(0, 1) for length in lengths])
    rollout = Rollout(make_prompt(["p"] * RESPONSES), sampled, None, reward, None, {}, None, None)
    return StepOutput(
        rollout=rollout,
        advantages=mask.float(),
        kl=None if kl is None else kl * mask / torch.tensor(lengths)[:, None],
        entropy=entropy * mask,
        entropy_mask=mask,
        times={"rollout": 0.0, "reward": 0.0},
        closes_step=True,
    )


def series(*phases: tuple[int, dict[str, float]]) -> list[StepOutput]:
    """As many steps of each phase as it says, with its figures."""
    figures = [figures for count, figures in phases for _ in range(count)]
    return [planted(seed, **each) for seed, each in enumerate(figures)]


def run(
    folder: Path, outputs: Sequence[Any], fit: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, list[str]]:
    """Train on the outputs; returns the trainer and the detector's warnings."""
    detector = CollapseDetector(**{"window": WINDOW, **options})
    trainer = make_trainer(folder, [detector])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(FakeModule(list(outputs)), **(fit or {}))
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return trainer, [str(each.message) for each in caught if "collapse." in str(each.message)]


def guards(messages: Sequence[str]) -> list[str]:
    return [re.findall(r"collapse\.(\w+) =", message)[0] for message in messages]


HEALTHY: dict[str, float] = {}
SICK: dict[str, dict[str, Any]] = {
    # Half of the responses are cut from the start, so the EOS rate does not fall.
    "max_truncation_rate": {"before": {"ended": 0.45}, "after": {"ended": 0.4}},
    "min_eos_share": {"after": {"ended": 0.6}},
    "min_entropy": {"before": {"entropy": 0.0012}, "after": {"entropy": 0.0008}},
    "min_entropy_share": {"after": {"entropy": 0.009}},
    "max_kl": {"before": {"kl": 99.5}, "after": {"kl": 100.5}},
    "max_length_correlation": {"before": {"paid": 2.0}, "after": {"paid": 2.0, "longer": 1.4}},
    "min_distinct_share": {"after": {"distinct": 0.15}},
}


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("name", SICK)
def test_a_guard_fires_once_on_its_series_and_alone(name: str, tmp_path: Path) -> None:
    before, after = SICK[name].get("before", HEALTHY), SICK[name]["after"]
    outputs = series((WINDOW, before), (3 * WINDOW, after))
    _, messages = run(tmp_path, outputs)
    assert guards(messages) == [name]
    assert ADVICE[name] in messages[0]
    assert scalars(tmp_path, "train/collapse_alarms")[-1] == 1
    _, messages = run(tmp_path / "off", outputs, **{name: None})
    assert messages == []


@pytest.mark.slow(0.3)
def test_the_slope_of_the_kl_fires_before_the_kl_is_large(tmp_path: Path) -> None:
    outputs = series(*[(1, {"kl": 0.2})] * 6, *[(1, {"kl": 0.2 + 1.5 * i}) for i in range(10)])
    _, messages = run(tmp_path, outputs)
    assert guards(messages) == ["max_kl_slope"]
    assert re.search(r"Optimizer step (9|10): the growth of the KL", messages[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "phases",
    [
        [(60, HEALTHY)],
        [(20, {"kl": 0.1 * i, "entropy": 0.5 / (1 + i)}) for i in range(8)],  # learns
        [(20, {"ended": 0.55}), (20, {"ended": 0.95})],
        [(20, {"longer": 1 + 0.1 * i}) for i in range(8)],  # grows, but is not paid for it
        [(20, {"paid": 2.0}), (20, {"paid": 2.0, "longer": 0.7})],  # shrinks
        [(40, {"distinct": 0.05})],  # few right responses from the start
        [(40, {"kl": None})],
        [(1, {"ended": 0.0, "entropy": 0.0, "kl": 500.0, "distinct": 0.05}), (WINDOW - 2, HEALTHY)],  # too short
    ],
)
def test_nothing_fires_where_nothing_is_wrong(phases: list[tuple[int, dict[str, float]]], tmp_path: Path) -> None:
    _, messages = run(tmp_path, series(*phases))
    assert messages == []
    assert set(scalars(tmp_path, "train/collapse_alarms")) == {0.0}


@pytest.mark.slow
def test_nothing_fires_on_noise(tmp_path: Path) -> None:
    assert run(tmp_path, [make_output(seed, n=4) for seed in range(60)])[1] == []


@pytest.mark.slow(0.3)
def test_one_step_out_of_line_is_no_alarm(tmp_path: Path) -> None:
    outputs = series((10, HEALTHY), (1, {"ended": 0.0, "kl": 30.0, "distinct": 0.05}), (10, HEALTHY))
    assert run(tmp_path, outputs, window=10, max_kl_slope=None)[1] == []


@pytest.mark.slow
def test_an_episode_is_told_once_and_a_new_one_again(tmp_path: Path) -> None:
    bad = {"ended": 0.2}
    wavering = [(2, bad), (2, HEALTHY)] * 6  # the mean crosses the threshold time and again
    outputs = series((WINDOW, HEALTHY), (6, bad), *wavering, (3 * WINDOW, HEALTHY), (6, bad))
    options: dict[str, Any] = {"min_eos_share": None}
    assert guards(run(tmp_path, outputs, **options)[1]) == ["max_truncation_rate"] * 2


@pytest.mark.slow
def test_stop_ends_the_run_after_that_step(tmp_path: Path) -> None:
    outputs = series((2 * WINDOW, HEALTHY), (40, {"distinct": 0.05}))
    trainer, messages = run(tmp_path, outputs, action="stop")
    assert guards(messages) == ["min_distinct_share"]
    assert trainer.should_stop
    assert trainer.state.finished
    assert trainer.global_step == int(re.findall(r"Optimizer step (\d+)", messages[0])[0]) == 3 * WINDOW
    assert run(tmp_path / "warn", outputs)[0].global_step == len(outputs)


def test_figures_are_those_of_the_whole_step(tmp_path: Path) -> None:
    outputs = two_steps_of_two_parts()
    outputs[0]["rollout"].sampled.truncated[:2] = True
    outputs[1]["rollout"].sampled.texts[0] = outputs[0]["rollout"].sampled.texts[0]
    make_trainer(tmp_path, [CollapseDetector(window=2)], accumulate_grad_batches=2).fit(FakeModule(outputs))
    for number, parts in enumerate((outputs[:2], outputs[2:])):
        rewards = [value for part in parts for value in part["rollout"].reward.tolist()]
        lengths = [int(row.sum()) for part in parts for row in part["rollout"].sampled.response_mask]
        expected = {
            "train/eos_rate": (10 if number == 0 else 12) / 12,
            "train/distinct_share": (11 if number == 0 else 12) / 12,
            "train/length_correlation": statistics.correlation(rewards, lengths),
        }
        for key, value in expected.items():
            assert scalars(tmp_path, key)[number] == pytest.approx(value), key


def test_the_slope_is_least_squares(tmp_path: Path) -> None:
    kls = [0.1, 0.9, 0.3, 1.1, 0.2, 0.8]
    run(tmp_path, series(*[(1, {"kl": kl}) for kl in kls]))
    logged = scalars(tmp_path, "train/kl_slope")
    assert all(math.isnan(value) for value in logged[: WINDOW - 1])
    for end in range(WINDOW, len(kls) + 1):
        slope = statistics.linear_regression(range(WINDOW), kls[end - WINDOW : end]).slope
        assert logged[end - 1] == pytest.approx(slope, rel=1e-4)


def test_a_step_without_a_figure_is_nan_in_the_log_and_no_alarm(tmp_path: Path) -> None:
    outputs = series((6, {"kl": None}))
    for output in outputs:
        output["rollout"].reward.zero_()
        output["entropy_mask"] = torch.zeros_like(output["entropy_mask"])
    assert run(tmp_path, outputs)[1] == []
    assert all(math.isnan(value) for value in scalars(tmp_path, "train/length_correlation"))
    assert all(math.isnan(value) for value in scalars(tmp_path, "train/kl_slope"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("figure", ["reward", "entropy", "kl"])
def test_a_figure_that_is_not_finite_is_an_alarm_at_once(figure: str, value: float, tmp_path: Path) -> None:
    outputs = series((3, HEALTHY))
    broken = outputs[1]["rollout"].reward if figure == "reward" else outputs[1][figure]
    broken.view(-1)[0] = value
    with pytest.warns(UserWarning, match=rf"Optimizer step 2: not finite: {figure}\. What to do"):
        trainer, _ = run(tmp_path, outputs, action="stop")
    assert trainer.global_step == 2
    assert scalars(tmp_path, "train/collapse_alarms") == [0.0, 1.0]


def test_a_resumed_run_goes_on_from_what_it_had_seen(tmp_path: Path) -> None:
    outputs = series((WINDOW, HEALTHY), (WINDOW, {"ended": 0.2}), (2, HEALTHY), (WINDOW, {"ended": 0.2}))
    at = WINDOW + 4  # within the episode: the window before it is in the checkpoint alone

    def fit(folder: Path, **arguments: Any) -> list[str]:
        callbacks = [CollapseDetector(window=WINDOW), checkpoint_at(at, folder)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(folder, callbacks).fit(FakeModule(outputs), **arguments)
        return guards([str(each.message) for each in caught if "collapse." in str(each.message)])

    assert sorted(fit(tmp_path)) == ["max_truncation_rate", "min_eos_share"]
    whole = scalars(tmp_path, "train/collapse_alarms")
    assert fit(tmp_path / "again", ckpt_path=tmp_path / f"step={at}.ckpt", weights_only=True) == []
    assert scalars(tmp_path / "again", "train/collapse_alarms") == whole[at:]
    assert max(whole[at:]) == 2


def test_another_fit_begins_anew(tmp_path: Path) -> None:
    detector = CollapseDetector(window=WINDOW)
    make_trainer(tmp_path, [detector]).fit(FakeModule(series((WINDOW, HEALTHY))))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*collapse")
        make_trainer(tmp_path / "2", [detector]).fit(FakeModule(series((WINDOW, {"distinct": 0.05}))))


def test_other_modules_are_left_alone(tmp_path: Path) -> None:
    run(tmp_path, [{}, {}])
    assert scalars(tmp_path, "train/collapse_alarms") == []


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"action": "shout"},
        {"max_kl": 0.0},
        {"max_kl": math.inf},
        {"max_kl_slope": -1.0},
        {"min_entropy": math.nan},
        {"max_truncation_rate": 1.1},
        {"min_eos_share": 0.0},
    ],
)
def test_bad_arguments_name_their_key(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"collapse\.{next(iter(options))} must be"):
        CollapseDetector(**options)


def test_the_table_in_the_docs_has_the_guards_and_their_defaults() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guards.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    parameters = inspect.signature(CollapseDetector).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name not in ("window", "action")}
    assert {row[0].strip("`"): float(row[2]) for row in rows} == defaults
    for name, *_, advice in rows:
        plain = advice.replace("`", "")
        assert plain[0].lower() + plain[1:] == ADVICE[name.strip("`")]
