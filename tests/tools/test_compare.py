"""`remax compare` on evaluations that are written here, and on those of real runs of the command."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import changed, in_folder, remax, small_config, write_config
from helpers.training import write_rows

from remax_lightning.cli_run import run
from remax_lightning.errors import UserError
from remax_lightning.tools import compare as tool

SETTINGS: dict[str, Any] = {
    "policy": "policy",
    "reference": "reference",
    "reward": {"class_path": "ClassifierReward", "init_args": {"path": "judge", "batch_size": 16}},
    "truncation_penalty": 0.0,
    "sampling": {"num_samples": 2, "temperature": 1.0},
    "kl": {"estimator": "k1", "clamp": None, "credit": "to_go"},
}
Change = Callable[[dict[str, Any], list[dict[str, Any]]], None]


def records(seed: int, gain: float, count: int = 30) -> list[dict[str, Any]]:
    """Prompts that differ much in their rewards, which `gain` raises by about as much in each."""
    draw, own = random.Random(1), random.Random(seed)
    found = []
    for i in range(count):
        level = draw.gauss(0, 3) + gain
        sampled = [level + own.gauss(0, 0.1) for _ in range(2)]
        length = float(own.randrange(5, 15))
        found.append({
            "number": i,
            "prompt": f"prompt {i // 2}",  # each of them twice
            "responses": {"sampled": ["x", "y"], "greedy": ["z"], "chosen": ["good"]},
            "rewards": {"sampled": sampled, "greedy": [level], "chosen": [1.0]},
            "sums": {
                "reward": [sum(sampled), 2.0],
                "kl": [length * (own.uniform(0.0, 0.1) + gain), length],
                "chosen_reward": [1.0, 1.0],
                "perplexity": [own.uniform(10, 20), 7.0],
            },
        })  # fmt: skip
    return found


def write(folder: Path, name: str, lines: list[dict[str, Any]], change: Change | None = None) -> str:
    answer = {"checkpoint": f"{name}.ckpt", "figures": {}, "settings": copy.deepcopy(SETTINGS)}
    if change is not None:
        change(answer, lines)
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "evaluation.json").write_text(json.dumps(answer))
    # As the callback writes it, so that what ends a line elsewhere stands there as it is.
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / name / "evaluation.jsonl").write_text(text, encoding="utf-8")
    return str(folder / name / "evaluation.json")


def both(folder: Path, change: Change | None = None) -> list[str]:
    return [write(folder, "a", records(5, 0.0)), write(folder, "b", records(6, 0.2), change)]


def ratio(lines: list[dict[str, Any]], name: str) -> float:
    return sum(line["sums"][name][0] for line in lines) / sum(line["sums"][name][1] for line in lines)


# What is said


def test_figures_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = tool.main([*both(tmp_path), "--num_resamples", "2000"])
    assert list(answer["figures"]) == ["reward", "chosen_reward", "kl", "perplexity"]
    for name in ("reward", "kl"):
        one, two = (ratio(records(seed, gain), name) for seed, gain in ((5, 0.0), (6, 0.2)))
        figure = answer["figures"][name]
        assert (figure["first"], figure["second"]) == pytest.approx((one, two))
        assert figure["difference"] == pytest.approx(two - one)
        assert figure["low"] < two - one < figure["high"]
        assert figure["n"] == 30
    assert answer["figures"]["chosen_reward"]["difference"] == 0.0
    out = capsys.readouterr().out
    assert "B - A" in out
    assert "a.ckpt" in out
    for name in answer["figures"]:
        assert any(line.split(" ")[0] == name for line in out.splitlines())


def test_differences_are_paired(tmp_path: Path) -> None:
    """Prompts differ by 3, the policies by 0.2: only prompt by prompt that can be told from chance."""
    figure = tool.main(both(tmp_path))["figures"]["reward"]
    assert figure["low"] > 0.1
    assert figure["high"] < 0.3
    by_prompt = [sum(two["sums"]["reward"][:1]) / 2 - sum(one["sums"]["reward"][:1]) / 2
                 for one, two in zip(records(5, 0.0), records(6, 0.2), strict=True)]  # fmt: skip
    mean = sum(by_prompt) / 30
    error = (sum((value - mean) ** 2 for value in by_prompt) / 30 / 30) ** 0.5
    assert figure["low"] == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert figure["high"] == pytest.approx(mean + 1.96 * error, abs=0.2 * error)


def test_the_order_of_the_prompts_does_not_matter(tmp_path: Path) -> None:
    """Where a prompt comes twice, the first goes with the first."""

    def shuffle(answer: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        pairs = [lines[i : i + 2] for i in range(0, 30, 2)]
        random.Random(0).shuffle(pairs)
        lines[:] = [line for pair in pairs for line in pair]

    expected = tool.main(both(tmp_path / "plain"))
    found = tool.main(both(tmp_path / "shuffled", shuffle))
    assert found["figures"] == expected["figures"]
    assert found["win_rate"] == expected["win_rate"]


def test_the_win_rate_is_the_seconds_over_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rewards(sampled: list[list[float]], greedy: list[float]) -> Change:
        def change(answer: dict[str, Any], lines: list[dict[str, Any]]) -> None:
            for line, own, likeliest in zip(lines, sampled, greedy, strict=True):
                line["rewards"] |= {"sampled": own, "greedy": [likeliest]}

        return change

    first = write(tmp_path, "a", records(5, 0, 3), rewards([[1, 2], [0, 0], [5, 5]], [0, 0, 1]))
    second = write(tmp_path, "b", records(6, 0, 3), rewards([[2, 3], [0, -1], [6, 4]], [1, 1, 1]))
    answer = tool.main([first, second])
    # 2 and 3 against 1 and 2: three and a half of four; two ties and two lost; two won and two lost.
    assert answer["win_rate"]["value"] == pytest.approx((3.5 / 4 + 1 / 4 + 2 / 4) / 3)
    assert answer["greedy_win_rate"]["value"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert "sampled responses under the reward: 0.5417" in capsys.readouterr().out
    turned = tool.main([second, first])
    assert turned["win_rate"]["value"] == pytest.approx(1 - answer["win_rate"]["value"])


def test_other_responses_or_references_are_not_compared(tmp_path: Path) -> None:
    def other_data(answer: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        lines[3]["responses"]["chosen"] = ["better"]
        lines[3]["sums"]["perplexity"] = [9.0, 8.0]

    def other_reference(answer: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        answer["settings"]["reference"] = "another"
        answer["settings"]["sampling"]["temperature"] = 0.5

    found = tool.main(both(tmp_path / "data", other_data))
    assert list(found["figures"]) == ["reward", "kl"]
    assert any("chosen_reward, because the data set's responses differ" in note for note in found["notes"])
    assert any("perplexity, because held-out tokens differ" in note for note in found["notes"])
    found = tool.main(both(tmp_path / "reference", other_reference))
    assert list(found["figures"]) == ["reward", "chosen_reward", "perplexity"]
    assert "Note: model.sampling differs in temperature." in found["notes"]


def test_pieces_of_a_text_are_units_of_their_own(tmp_path: Path) -> None:
    def text(nats: list[float], tokens: list[float]) -> Change:
        def change(answer: dict[str, Any], lines: list[dict[str, Any]]) -> None:
            for line in lines:
                del line["sums"]["perplexity"]
            for i, sums in enumerate(zip(nats, tokens, strict=True)):
                lines.append({"number": i, "prompt": "", "responses": {}, "rewards": {}, "sums": {"perplexity": sums}})

        return change

    first = write(tmp_path, "a", records(5, 0), text([10.0, 20.0, 6.0], [5.0, 5.0, 2.0]))
    second = write(tmp_path, "b", records(6, 0), text([8.0, 18.0, 4.0], [5.0, 5.0, 2.0]))
    figure = tool.main([first, second])["figures"]["perplexity"]
    assert figure["n"] == 3
    assert (figure["first"], figure["second"]) == pytest.approx((20.0855, 12.1825), abs=1e-3)  # e^3 and e^2.5
    longer = write(tmp_path, "c", records(6, 0), text([8.0, 18.0], [5.0, 5.0]))
    for other in (longer, write(tmp_path, "d", records(6, 0))):
        found = tool.main([first, other])
        assert "perplexity" not in found["figures"]
        assert any("perplexity, because" in note for note in found["notes"])


def test_the_answer_is_written_too(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    answer = tool.main([*both(tmp_path), "--json", str(out), "--num_resamples", "10"])
    assert json.loads(out.read_text()) == answer
    with pytest.raises(UserError, match=r"--json must be a file that does not exist yet, got .*out\.json"):
        tool.main([*both(tmp_path), "--json", str(out)])


def test_text_that_ends_lines_elsewhere_is_read(tmp_path: Path) -> None:
    def rename(answer: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            line["prompt"] = f"{line['number']} a\u2028b\x85c\nd"

    paths = [write(tmp_path, name, records(5, 0), rename) for name in "ab"]
    assert tool.main(paths)["num_prompts"] == 30


# What is refused


def test_other_prompts_are_refused_or_left_out(tmp_path: Path) -> None:
    def fewer(answer: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        del lines[:3]
        lines[0]["prompt"] = "another"

    def strange(answer: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            line["prompt"] += "!"

    paths = both(tmp_path, fewer)
    with pytest.raises(UserError, match=r"prompts differ: 4 are in .*, 1 in .*, 26 in both; --common compares"):
        tool.main(paths)
    found = tool.main([*paths, "--common"])
    assert found["num_prompts"] == 26
    assert found["notes"] == ["Left out: 4 prompts that only A has, and 1 that only B has."]
    with pytest.raises(UserError, match=r"prompts differ: 30 are in .*, 30 in .*, 0 in both; evaluate"):
        tool.main([*both(tmp_path, strange), "--common"])


def test_other_rewards_are_refused(tmp_path: Path) -> None:
    def judge(answer: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        answer["settings"]["reward"]["init_args"]["path"] = "another judge"

    def penalty(answer: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        answer["settings"]["truncation_penalty"] = 1.0

    def faster(answer: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        answer["settings"]["reward"]["init_args"] |= {"batch_size": 64, "placement": "cpu"}

    with pytest.raises(
        UserError, match=r"were scored by different rewards: reward\.init_args\.path 'judge' and 'another judge'"
    ):
        tool.main(both(tmp_path, judge))
    with pytest.raises(UserError, match=r"were scored by different rewards: truncation_penalty 0\.0 and 1\.0"):
        tool.main(both(tmp_path, penalty))
    tool.main(both(tmp_path, faster))


def test_what_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    (good,) = [write(tmp_path, "a", records(5, 0))]
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("evaluation.json", "evaluation_1.json"):
        (tmp_path / "two" / name).write_text("{}")
    (tmp_path / "alone.json").write_text("{}")
    (tmp_path / "other.json").write_text('{"loss": 1}')
    (tmp_path / "other.jsonl").write_text("{}\n")
    (tmp_path / "cut.json").write_text('{"figures": {')
    (tmp_path / "cut.jsonl").write_text("")
    for name, message in (
        ("missing.json", r"there is no file .*missing\.json"),
        ("empty", r"must hold one evaluation\.json, got none: run `remax test`"),
        ("two", r"got evaluation\.json, evaluation_1\.json: give one of them"),
        ("alone.json", r"there is no file .*alone\.jsonl"),
        ("other.json", r"other\.json \(or other\.jsonl\) is not an evaluation of `remax test`"),
        ("cut.json", r"cut\.json \(or cut\.jsonl\) is not an evaluation"),
    ):
        for paths in ([good, str(tmp_path / name)], [str(tmp_path / name), good]):
            with pytest.raises(UserError, match=message):
                tool.main(paths)
    with pytest.raises(UserError, match="--num_resamples must be between 1 and a million, got 0"):
        tool.main([good, good, "--num_resamples", "0"])


# The whole way


@pytest.mark.slow
def test_two_checkpoints_of_the_command(policy_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"{n}+{n}=", "response": str(2 * n), "chosen": str(2 * n)} for n in range(16)]
    config = changed(
        small_config(tmp_path, policy_path),
        data__path=write_rows(tmp_path / "pairs.jsonl", rows),
        model__optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-2}},
        evaluation={"num_resamples": 100},
    )
    path = write_config(tmp_path / "run.yaml", config)
    with in_folder(tmp_path):
        run(["fit", "--config", path])
        [checkpoint] = tmp_path.rglob("*.ckpt")
        start = remax(capsys, "test", "--config", path)
        trained = remax(capsys, "test", "--config", path, "--ckpt_path", str(checkpoint))
        assert (start.code, trained.code) == (0, 0)
        assert f"Evaluation of {checkpoint} on 4 prompts" in trained.out
        assert "win_rate_chosen" in trained.out
        folders = [str(tmp_path / "runs" / "remax" / f"version_{n}") for n in (1, 2)]
        compared = remax(capsys, "compare", *folders, "--json", "out.json")
        assert compared.code == 0
        wrong = remax(capsys, "compare", folders[0], str(tmp_path))
    answer = json.loads((tmp_path / "out.json").read_text())
    assert answer["checkpoints"] == [None, str(checkpoint)]
    assert answer["figures"]["kl"]["first"] == 0.0
    assert answer["figures"]["kl"]["second"] > 0.0
    settings = json.loads((Path(folders[1]) / "evaluation.json").read_text())["settings"]
    assert settings["reward"]["init_args"]["function"] == "remax_lightning.rewards.verifiers.exact_match"
    assert settings["data"]["init_args"]["val_size"] == 4
    assert wrong.code == 2
    assert "must hold one evaluation.json, got none" in wrong.err
    assert "Traceback" not in wrong.err
