"""What `remax report` reads of a run and puts into its page; tests/tools/test_report_browser.py looks at the page."""

from __future__ import annotations

import json
import os
import re
import statistics
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import changed, remax, small_config, write_config
from helpers.training import save_policy
from tools.report_run import HOSTILE, planted_curves, sample, write_events, write_run, write_samples

from remax_lightning.baselines import KINDS
from remax_lightning.errors import UserError
from remax_lightning.tools.report import main
from remax_lightning.tools.report.charts import (
    BASELINES,
    baseline_text,
    build_sections,
    kl_against_reward,
    smooth,
    thin_indices,
)
from remax_lightning.tools.report.page import format_duration, format_number
from remax_lightning.tools.report.run import Curve, read_run


def written(folder: Path, *arguments: str) -> str:
    """The page of a run."""
    return main([str(folder), *arguments]).read_text()


def data_of(page: str) -> dict[str, Any]:
    """What the page's script reads."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def notes_of(page: str) -> list[str]:
    return [unescape(note) for note in re.findall(r"<li>(.*?)</li>", page.split("<main>")[0])]


def test_curves_of_earlier_versions_stand_at_the_same_steps(tmp_path: Path) -> None:
    """Lightning alone numbers a step by those before it; a later version may have resumed a run in its folder."""
    write_events(tmp_path / "old", {"train/reward": [(0, 1.0), (1, 2.0)], "val/reward": [(1, 5.0)]})
    new = {"train/reward": [(3, 3.0)], "train/grad_norm": [(3, 0.5)], "val/reward": [(0, 4.0), (3, 6.0)]}
    write_events(tmp_path / "new", new)
    both = tmp_path / "both"
    both.mkdir()
    for number, name in enumerate(("old", "new")):
        (file,) = (tmp_path / name).iterdir()
        (both / f"events.out.tfevents.{number}").write_bytes(file.read_bytes())
    assert read_run(tmp_path / "old").curves == {"train/reward": ([1, 2], [1.0, 2.0]), "val/reward": ([2], [5.0])}
    assert read_run(tmp_path / "new").curves["val/reward"] == ([0, 3], [4.0, 6.0])
    assert read_run(both).curves["train/reward"] == ([1, 2, 3], [1.0, 2.0, 3.0])
    assert read_run(both).curves["val/reward"] == ([0, 2, 3], [4.0, 5.0, 6.0])


def test_curves_are_read_as_they_were_logged(tmp_path: Path) -> None:
    nan = float("nan")
    write_events(tmp_path, {"train/reward": [(0, 1.0), (1, nan), (2, 3.0)], "val/reward": [(2, 2.0)]})
    write_events(tmp_path, {"train/reward": [(2, 4.0), (3, 5.0)]})  # what a resumed run repeats counts
    curves = read_run(tmp_path).curves
    assert curves["train/reward"] == Curve([1, 3, 4], [1.0, 4.0, 5.0])
    assert curves["val/reward"] == Curve([3], [2.0])


def test_the_tenth_file_of_a_second_follows_the_ninth(tmp_path: Path) -> None:
    for number in (9, 10):
        write_events(tmp_path / str(number), {"val/reward": [(0, float(number))]})
        (file,) = (tmp_path / str(number)).iterdir()
        file.rename(tmp_path / f"events.out.tfevents.1795.host.1.{number}")
    assert read_run(tmp_path).curves["val/reward"].values == [10.0]


def test_what_did_not_train_is_at_step_0(tmp_path: Path) -> None:
    write_events(tmp_path, {"val/reward": [(0, 2.0)]})
    assert read_run(tmp_path).curves["val/reward"].steps == [0]


def test_the_curves_of_csv_are_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(
        "epoch,step,train/reward,val/reward\n0,0,,1.5\n0,1,2.0,\n0,2,nan,\n1,3,4.0,\n1,3,,2.5\n1,"
    )
    run = read_run(tmp_path)
    assert run.curves == {"train/reward": Curve([1, 3], [2.0, 4.0]), "val/reward": Curve([0, 3], [1.5, 2.5])}
    assert "Held-out reward" in written(tmp_path)


@pytest.mark.parametrize("content", [b"", b"junk", b":W&B\xe1\xbe\x00\x01"])
def test_a_damaged_file_of_wandb_is_a_note(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    write_samples(tmp_path, [sample(0)])
    (tmp_path / "run-a.wandb").write_bytes(content)
    assert read_run(tmp_path).curves == {}


@pytest.mark.parametrize(("width", "half"), [(None, 2), (1, 0), (4, 1), (5, 2), (1000, 499)])
def test_a_band_is_the_windows_own_deviation(width: int | None, half: int) -> None:
    values = [value for _, value in planted_curves(130)["train/reward"]]
    steps, means, deviations = smooth(Curve(list(range(130)), values), width)
    assert steps == list(range(130))
    for i in (0, 1, 64, 129):
        window = [values[j] for j in range(130) if abs(i - j) <= half]
        assert means[i] == pytest.approx(statistics.fmean(window))
        assert deviations[i] == pytest.approx(statistics.pstdev(window))


@pytest.mark.parametrize(("length", "points"), [(0, 3), (2, 3), (3, 3), (10, 3), (1001, 300)])
def test_thinning_keeps_both_ends_and_repeats_nothing(length: int, points: int) -> None:
    kept = thin_indices(length, points)
    assert len(kept) == min(length, points)
    assert kept == sorted(set(kept))
    if length:
        assert (kept[0], kept[-1]) == (0, length - 1)


def test_one_sample_of_many_can_be_asked_for(tmp_path: Path) -> None:
    write_samples(tmp_path, [sample(i) for i in range(9)])
    page = written(tmp_path, "--max_samples", "1")
    assert [each["response"] for each in data_of(page)["samples"]] == ["answer 0"]
    assert "1 of 9 samples are shown, spread evenly over the run." in notes_of(page)


@pytest.mark.slow(0.3)
def test_a_line_of_a_chart_has_the_curves_numbers() -> None:
    curves = {key: Curve([step for step, _ in c], [y for _, y in c]) for key, c in planted_curves(1000).items()}
    sections, missing = build_sections(curves)
    assert missing == []
    assert [section["title"] for section in sections][-1] == "Further curves"
    assert [chart["title"] for chart in sections[-1]["charts"]] == ["train/loss"]
    line = sections[0]["charts"][0]["lines"][0]
    steps, means, deviations = smooth(curves["train/reward"])
    assert len(line["x"]) == 300
    for at in (0, 150, 299):
        i = steps.index(line["x"][at])
        assert line["y"][at] == pytest.approx(means[i], rel=1e-4)
        assert line["high"][at] - line["low"][at] == pytest.approx(2 * deviations[i], rel=1e-2)
    points = sections[0]["charts"][0]["lines"][2]
    assert points["y"] == pytest.approx(curves["val/reward"].values, rel=1e-4)


def test_baselines_are_compared_with_their_intervals() -> None:
    curves = {key: Curve([step for step, _ in c], [y for _, y in c]) for key, c in planted_curves(200).items()}
    section = next(section for section in build_sections(curves)[0] if section["title"] == "Baseline")
    cost, variance, *_ = section["charts"]
    assert [line["label"] for line in cost["lines"]] == ["batch_mean 0.57", "tracker 0.63", "greedy 1.00", "none 3.65"]
    assert [line["color"] for line in cost["lines"]] == [line["color"] for line in variance["lines"]] == [0, 1, 2, 3]
    assert cost["top"] == 2.0
    line = cost["lines"][0]
    for value, low, high in zip(line["y"], line["low"], line["high"], strict=True):
        assert (value - low, high - value) == pytest.approx((0.2, 0.2), abs=1e-4)
    assert section["text"].startswith("On this run batch_mean needs 0.57 of the seconds of greedy for a gradient of")
    assert "0.37 to 0.77)" in section["text"]
    # An interval that holds 1
    curves["train/variance_seconds_high/batch_mean"].values[-1] = 1.1
    assert baseline_text(curves) == "On this run no baseline is clearly cheaper than the one in use."


def test_the_baselines_that_auto_took_are_told() -> None:
    curves = {"train/baseline": Curve([1, 2, 3, 4, 5], [0.0, 0.0, 2.0, 2.0, 0.0])}
    expected = (
        "The baseline is chosen by the run (auto): greedy from step 1, batch_mean from step 3, greedy from step 5."
    )
    assert baseline_text(curves) == expected
    assert tuple(KINDS) == BASELINES


def test_the_parts_of_a_reward_stand_beside_each_other() -> None:
    curves = {f"{stage}/reward_part/{name}": Curve([1, 2], [0.0, 1.0]) for stage in ("train", "val") for name in "ab"}
    (section,), _ = build_sections(curves)
    (chart,) = section["charts"]
    labels = [(line["label"], line["color"], line["points"]) for line in chart["lines"]]
    assert labels == [
        (f"{n}, {s}", i, p) for i, n in enumerate("ab") for s, p in (("training", False), ("validation", True))
    ]


def test_kl_against_reward_pairs_the_steps_that_both_have() -> None:
    curves = {"val/kl": Curve([1, 2, 3], [0.1, 0.2, 0.3]), "val/reward": Curve([2, 3, 4], [5.0, 6.0, 7.0])}
    path = kl_against_reward(curves)
    assert path is not None
    assert [(line["step"], line["x"], line["y"]) for line in path["lines"]] == [([2, 3], [0.2, 0.3], [5.0, 6.0])]
    assert kl_against_reward({"train/kl": Curve([1], [0.1]), "train/reward": Curve([2], [1.0])}) is None


@pytest.mark.slow
def test_a_whole_run_misses_nothing(tmp_path: Path) -> None:
    page = written(write_run(tmp_path / "version_0"))
    assert notes_of(page) == []
    assert "policy runs/demo/sft/last" in page
    assert re.search(r"<dt>Optimizer steps</dt><dd>200</dd>", page)
    assert re.search(r"<th scope=row>reward</th><td>0.87</td><td>0.85 to 0.89</td><td>512</td>", page)
    assert len(data_of(page)["samples"]) == 69
    assert not re.search(r"(src|href)=[\"']?(?!data:)\w", page.split('id="data"')[0])


@pytest.mark.slow
def test_nothing_in_a_sample_or_a_configuration_ends_its_element(tmp_path: Path) -> None:
    page = written(write_run(tmp_path / "version_0"))
    assert page.count("</script>") == 2  # the data's and the script's
    assert "<img" not in page
    assert "<i>not markup" not in page
    assert data_of(page)["samples"][7]["response"] == HOSTILE


def test_half_a_character_is_written(tmp_path: Path) -> None:
    write_samples(tmp_path, [sample(0, prompt="\ud800", tokens=None)])
    assert data_of(written(tmp_path))["samples"][0]["prompt"] == "\ud800"


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(
    ("left_out", "note"),
    [
        ("kl", "There is no KL: the run had no reference."),
        ("val/", "The run had no validation."),
        ("time/", None),
        ("train/reward_variance_ratio", None),
    ],
)
def test_a_missing_part_is_named_and_left_out(left_out: str, note: str | None, tmp_path: Path) -> None:
    write_events(tmp_path, {key: curve for key, curve in planted_curves(20).items() if left_out not in key})
    page = written(tmp_path)
    assert note is None or note in notes_of(page)
    assert {
        "There are no sample dumps (samples/train.jsonl, samples/validation.jsonl).",
        "There is no config.yaml.",
    } <= {*notes_of(page)}
    lines = [line for section in data_of(page)["sections"] for chart in section["charts"] for line in chart["lines"]]
    assert lines
    assert ("KL to the reference" in [section["title"] for section in data_of(page)["sections"]]) == (left_out != "kl")


def test_a_guard_that_was_crossed_is_told(tmp_path: Path) -> None:
    write_events(tmp_path, {"train/collapse_alarms": [(step, float(step >= 7)) for step in range(10)]})
    note = "A guard against collapse was crossed at 3 optimizer steps, first 8: see Signs of collapse."
    assert notes_of(written(tmp_path))[0] == note


def test_a_section_without_a_curve_is_named(tmp_path: Path) -> None:
    write_events(tmp_path, {"train/loss": [(0, 1.0)]})
    named = "Reward, KL to the reference, Responses, Baseline, Signs of collapse, Optimizer, Time"
    assert f"Nothing was logged for: {named}." in notes_of(written(tmp_path))


def test_broken_lines_are_counted_and_old_ones_read(tmp_path: Path) -> None:
    old = {"step": 3, "response": "yes", "reward": float("nan")}
    write_samples(tmp_path, [old, sample(1)])
    with (tmp_path / "samples" / "train.jsonl").open("a") as file:
        file.write('[1]\n{"step": null, "response": ""}\n{"step": 1e400, "response": ""}\n')
        file.write(f'{{"step": 1, "response": {"[" * 2000}{"]" * 2000}}}\n{{"step": 2, "respo')
    page = written(tmp_path)
    assert "5 lines of train.jsonl could not be read and are left out." in notes_of(page)
    first, second = data_of(page)["samples"]
    assert first == {"step": 3, "stage": "train", "response": "yes", "parts": {}, "truncated": False}
    assert second["tokens"] == [*"answer 1", ""]


@pytest.mark.parametrize("tokens", [["answer", "1"], None, "answer 1", []])
def test_tokens_that_are_not_the_texts_are_not_shown(tokens: Any, tmp_path: Path) -> None:
    write_samples(tmp_path, [sample(1, tokens=tokens)])
    page = written(tmp_path)
    assert "tokens" not in data_of(page)["samples"][0]


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ('{"figures": {"kl": {"value": 1, "low": null}}, "more": 1}', "<td>1</td><td>–</td><td>–</td>"),  # noqa: RUF001
        ('{"figures": {"kl": 0.25}}', "<td>0.25</td>"),
        ('{"figures": {}}', None),
    ],
)
def test_an_evaluation_may_lack_parts(text: str, row: str | None, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    page = written(tmp_path)
    assert (row or "<h1>") in page
    assert ("Evaluation" in page) == (row is not None)


DEEP = "[" * 2000 + "]" * 2000
HUGE = '{"figures": {"kl": 1%s}}' % ("0" * 400)


@pytest.mark.parametrize("text", ["", "[]", DEEP, HUGE, '{"figures": [1]}', '{"figures": {"kl": {"value": "much"}}}'])
def test_an_evaluation_that_is_none_is_said(text: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    assert any(note.startswith("evaluation.json could not be read") for note in notes_of(written(tmp_path)))


def test_the_evaluation_may_lie_elsewhere(tmp_path: Path) -> None:
    write_samples(tmp_path, [sample(0)])
    elsewhere = tmp_path / "tested.json"
    elsewhere.write_text('{"figures": {"kl": {"value": 0.5}, "perplexity": {"value": null, "low": null}}}')
    page = written(tmp_path, "--evaluation", str(elsewhere))
    assert "<th scope=row>kl</th><td>0.5</td>" in page
    assert "<th scope=row>perplexity</th><td>–</td>" in page  # noqa: RUF001
    with pytest.raises(UserError, match=r"--evaluation: there is no file .*nowhere\.json"):
        main([str(tmp_path), "--evaluation", str(tmp_path / "nowhere.json")])


def test_of_several_evaluations_the_newest_is_shown(tmp_path: Path) -> None:
    for age, (name, value) in enumerate({"evaluation_1": 0.75, "evaluation": 0.5, "evaluation_2": 0.25}.items()):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"figures": {"kl": {"value": value}}}))
        os.utime(file, (1e9 - age, 1e9 - age))
    page = written(tmp_path)
    assert "<th scope=row>kl</th><td>0.75</td>" in page
    [note] = [note for note in notes_of(page) if "latest evaluation" in note]
    assert "evaluation_1.json; --evaluation selects another one (evaluation_2.json, evaluation.json)" in note


def test_a_configuration_that_is_no_yaml_is_shown_as_it_is(tmp_path: Path) -> None:
    write_samples(tmp_path, [sample(0)])
    (tmp_path / "config.yaml").write_text("model: [<b>")
    page = written(tmp_path)
    [note] = [note for note in notes_of(page) if "shown as text" in note]
    assert "config.yaml, line 1, column " in note
    assert "model: [&lt;b&gt;" in page


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    expected = r"expected the folder of a run.*events\.out\.tfevents.*such as runs/remax/version_0"
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=f"RUN: .*{path}.*{expected}"):
            main([str(path)])
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=f"file is a file; {expected}"):
        main([str(file)])
    assert not (tmp_path / "report.html").exists()


def test_the_folder_above_runs_names_the_youngest(tmp_path: Path) -> None:

    for version, age in ((0, 10), (1, 20)):
        write_samples(tmp_path / "remax" / f"version_{version}", [sample(0)])
        os.utime(tmp_path / "remax" / f"version_{version}", (age, age))
    with pytest.raises(UserError, match=r"give one of them, such as the latest, .*version_1"):
        main([str(tmp_path)])


def test_a_bad_option_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_samples(tmp_path, [sample(0)])
    outcome = remax(capsys, "report", str(tmp_path), "--out", str(tmp_path / "samples"))
    assert outcome.code == 2
    assert "--out must be a file" in outcome.err
    outcome = remax(capsys, "report", str(tmp_path), "--out", str(tmp_path / "samples" / "train.jsonl" / "x.html"))
    assert outcome.code == 2
    assert "--out: cannot write" in outcome.err
    outcome = remax(capsys, "report", str(tmp_path), "--max_samples", "0")
    assert outcome.code == 2
    assert "--max_samples must be at least 1" in outcome.err


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.4, "5 s"), (61, "1 min 1 s"), (3599.9, "60 min 0 s"), (7260, "2 h 1 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0.123456, "0.1235"), (1234.5, "1,234"), (12, "12"), (1e-9, "1e-09")])
def test_numbers(value: float, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.slow
def test_the_report_of_a_real_run_has_its_samples_and_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(tmp_path, save_policy(tmp_path / "policy"))
    config = changed(config, samples={"every_n_steps": 1}, trainer__val_check_interval=2)
    assert remax(capsys, "fit", "--config", write_config(tmp_path / "run.yaml", config)).code == 0
    folder = next((tmp_path / "runs").glob("*/version_0"))
    outcome = remax(capsys, "report", str(folder), "--out", str(tmp_path / "new" / "page.html"))
    assert outcome.code == 0, outcome.err
    page = (tmp_path / "new" / "page.html").read_text()
    assert notes_of(page) == []
    data = data_of(page)
    assert [(each["stage"], each["step"]) for each in data["samples"]] == [
        *[("validation", 0)] * 4,
        *[("train", 1)] * 4,
        *[("train", 2)] * 4,
        *[("validation", 2)] * 4,
    ]
    for each in data["samples"]:
        assert len(each["tokens"]) == each["response_length"]
        assert sum(each["token_kl"]) == pytest.approx(each["kl"], rel=1e-3, abs=1e-5)
        assert each["advantage"] == pytest.approx(statistics.fmean(each["token_advantages"]), rel=1e-2, abs=1e-5)
    reward = data["sections"][0]["charts"][0]["lines"]
    assert [(line["label"], line["x"]) for line in reward][::2] == [
        ("sampled, training", [1, 2]),
        ("sampled, validation", [0, 2]),
    ]


def test_an_evaluation_alone_is_a_table_and_no_charts_of_one_point(tmp_path: Path) -> None:
    write_events(tmp_path, {"test/reward": [(0, 0.5)], "test/kl": [(0, 0.125)], "epoch": [(0, 0.0)]})
    page = written(tmp_path)
    assert data_of(page)["sections"] == []
    assert re.findall(r"<th scope=row>(.*?)</th><td>(.*?)</td>", page) == [("test/kl", "0.125"), ("test/reward", "0.5")]
    assert notes_of(page)[0] == "Nothing was trained in this run: it has evaluations alone."
    assert not any("KL" in note or "no validation" in note for note in notes_of(page))
    (tmp_path / "evaluation.json").write_text(
        json.dumps({"figures": {"reward": {"value": 0.5}, "kl": {"value": 0.125}}})
    )
    assert "logged once" not in written(tmp_path)  # the evaluation has them


def test_a_curve_of_one_point_in_a_section_of_its_own_stays_a_chart(tmp_path: Path) -> None:
    write_events(tmp_path, {"val/reward": [(0, 2.0)]})
    assert [section["title"] for section in data_of(written(tmp_path))["sections"]] == ["Reward"]


def test_a_file_that_is_no_page_is_not_replaced(tmp_path: Path) -> None:
    write_samples(tmp_path, [sample(0)])
    mine = tmp_path / "rewards.py"
    mine.write_text("def reward(): ...")
    with pytest.raises(UserError, match=r"--out: .*rewards\.py is there and is no page; name another file"):
        main([str(tmp_path), "--out", str(mine)])
    assert mine.read_text() == "def reward(): ..."
    page = main([str(tmp_path)])
    assert main([str(tmp_path)]) == page, "an earlier page is replaced"


def test_an_evaluation_that_is_named_has_to_be_one(tmp_path: Path) -> None:
    write_samples(tmp_path, [sample(0)])
    (tmp_path / "a.yaml").write_text("model: {}")
    with pytest.raises(UserError, match=r"--evaluation: .*a\.yaml holds no figures; give the evaluation\.json"):
        main([str(tmp_path), "--evaluation", str(tmp_path / "a.yaml")])
