"""The table and the files of an evaluation, from real runs: what is in them is what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.fakes import FakeModule
from callbacks.fakes import make_trainer as fake_trainer
from conftest import make_tokenizer, tiny_model
from helpers.chat_templates import THINKING, user
from helpers.training import PROMPTS, Recorder, make_trainer, remax_module, save_policy, write_rows
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from remax_lightning.callbacks import Evaluation
from remax_lightning.data import PromptDataModule, SFTDataModule
from remax_lightning.errors import UserError
from remax_lightning.evaluation.evaluator import response_messages, shown_texts, tokenize_responses
from remax_lightning.evaluation.intervals import MEANINGS, figures, format_number, format_table
from remax_lightning.files import PromptRecord
from remax_lightning.rollout import SamplingConfig
from remax_lightning.types import PromptBatch

ALL = {*MEANINGS, "reward_part/letters", "reward_part/lengths"}
ROWS = [{"prompt": prompt, "chosen": prompt[::-1]} for prompt in PROMPTS[:6]] + [
    {"prompt": each} for each in PROMPTS[6:]
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return save_policy(folder / "policy"), save_policy(folder / "reference", noise=0.02)


def run(
    folders: Sequence[str],
    folder: Path,
    *callbacks: Any,
    rows: Sequence[dict[str, Any]] = ROWS,
    validates: bool = False,
    **options: Any,
) -> dict[str, float]:
    path = write_rows(folder / "rows.jsonl", rows)
    data = PromptDataModule(path, folders[0], val_path=path, batch_size=3, max_prompt_length=64)
    module = remax_module(*folders, sampling=SamplingConfig(max_response_length=6, num_samples=2))
    torch.manual_seed(0)
    logger = CSVLogger(folder, name="", version="")  # so that `folder` is that of the run
    trainer = make_trainer(folder, callbacks, **{"limit_val_batches": 1.0, "logger": logger, **options})
    (metrics,) = trainer.validate(module, data, verbose=False) if validates else trainer.test(module, data)
    return metrics


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(folders: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float], str]:
    """The folder of a test with everything on, what was logged, and what stood on the terminal."""
    import contextlib
    import io

    folder, out = tmp_path_factory.mktemp("evaluated"), io.StringIO()
    with contextlib.redirect_stdout(out):
        metrics = run(folders, folder, Evaluation(num_resamples=500, seed=4))
    return folder, metrics, out.getvalue()


# What is written


def by_hand(records: list[dict[str, Any]], name: str) -> tuple[float, int]:
    known = [record["sums"][name] for record in records if name in record["sums"]]
    ratio = sum(top for top, _ in known) / sum(bottom for _, bottom in known)
    return (math.exp(ratio) if "perplexity" in name else ratio), len(known)


@pytest.mark.slow
def test_the_figures_are_those_of_the_records(evaluated: tuple[Path, dict[str, float], str]) -> None:
    folder, metrics, _ = evaluated
    answer, records = json.loads((folder / "evaluation.json").read_text()), lines(folder / "evaluation.jsonl")
    assert set(answer["figures"]) == ALL
    assert answer["num_prompts"] == len(records) == 8
    for name, figure in answer["figures"].items():
        value, count = by_hand(records, name)
        assert figure["value"] == pytest.approx(value, rel=1e-9)
        assert figure["n"] == count == (6 if "chosen" in name or "perplexity" in name else 8)
        assert metrics[f"test/{name}"] == pytest.approx(value, rel=1e-5)
        assert figure["low"] <= value <= figure["high"]
        assert figure["low"] < figure["high"]
    assert answer["left_out"] == {}
    assert answer["checkpoint"] is None


def test_records_hold_responses_and_rewards(evaluated: tuple[Path, dict[str, float], str]) -> None:
    for record, row in zip(lines(evaluated[0] / "evaluation.jsonl"), ROWS, strict=True):
        assert record["prompt"] == row["prompt"]
        assert record["responses"].get("chosen", [None])[0] == row.get("chosen")
        counts = {name: len(texts) for name, texts in record["responses"].items()}
        assert counts == {"sampled": 2, "greedy": 1, "reference": 2} | ({"chosen": 1} if "chosen" in row else {})
        assert counts == {name: len(rewards) for name, rewards in record["rewards"].items()}
        assert record["sums"]["reward"] == [sum(record["rewards"]["sampled"]), 2.0]


def test_the_settings_are_there(evaluated: tuple[Path, dict[str, float], str], folders: tuple[str, str]) -> None:
    settings = json.loads((evaluated[0] / "evaluation.json").read_text())["settings"]
    assert (settings["policy"], settings["reference"]) == folders
    assert settings["reward"] == {"class_path": "helpers.training.CharacterReward"}
    assert settings["sampling"]["num_samples"] == 2
    own = {"response_column": "chosen", "text": None, "max_length": 1024, "num_samples": None, "pass_threshold": 1.0}
    own |= {"pass_at_k": [], "maj_at_k": [], "best_of_k": [], "answer": None}
    assert settings["evaluation"] == {**own, "num_resamples": 500, "seed": 4, "confidence": 0.95}


def test_the_table_has_every_figure_and_is_alone(evaluated: tuple[Path, dict[str, float], str]) -> None:
    folder, _, out = evaluated
    figures = json.loads((folder / "evaluation.json").read_text())["figures"]
    for name, figure in figures.items():
        (line,) = [line for line in out.splitlines() if line.split(" ")[0] == name]
        assert format_number(figure["value"]) in line
        assert f"{format_number(figure['low'])} to {format_number(figure['high'])}" in line
    assert "Test metric" not in out  # Lightning's


@pytest.mark.slow
def test_a_test_measures_several_responses_and_validation_draws_those_of_training(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several: dict[str, Any] = {"num_samples": 5, "pass_at_k": (1, 4), "maj_at_k": (2,), "best_of_k": (3,)}
    callback = Evaluation(test=(), num_resamples=50, pass_threshold=0.0, **several)
    metrics = run(folders, tmp_path, callback)
    records = lines(tmp_path / "evaluation.jsonl")
    rewards = [record["rewards"]["sampled"] for record in records]
    assert [len(row) for row in rewards] == [5] * 8
    # Of 5 responses a subset of 4 leaves one out: none passes where all fail, or all but the one that is left out.
    passed = [sum(reward >= 0 for reward in row) for row in rewards]
    expected = sum({0: 0.0, 1: 4 / 5}.get(count, 1.0) for count in passed) / 8
    assert metrics["test/pass_at_4"] == pytest.approx(expected)
    assert metrics["test/pass_at_1"] == pytest.approx(sum(passed) / 40)
    largest = [sum(max(subset) for subset in combinations(row, 3)) / 10 for row in rewards]
    assert metrics["test/best_of_3"] == pytest.approx(sum(largest) / 8, rel=1e-5)
    assert 0 < metrics["test/pass_at_1"] < metrics["test/pass_at_4"] <= 1
    answer = json.loads((tmp_path / "evaluation.json").read_text())
    assert answer["figures"]["pass_at_4"]["method"] == "exact"
    assert answer["settings"]["evaluation"]["pass_at_k"] == [1, 4]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("maj_at_2 ")]
    assert line.endswith("2 sampled responses, whose most frequent answer passes")
    recorder = Recorder()
    metrics = run(folders, tmp_path, Evaluation(**several), recorder, validates=True)
    assert len(recorder.validations[0]["records"][0].rewards["sampled"]) == 2
    assert not [name for name in metrics if "pass_at" in name]


@pytest.mark.slow(0.3)
def test_a_figure_of_more_responses_than_there_are_is_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"evaluation\.maj_at_k: 3 responses .* got 2; set evaluation\.num_samples to 3 or more"
    ):
        run(folders, tmp_path, Evaluation(maj_at_k=(3,)))
    with pytest.raises(UserError, match=r"evaluation\.pass_at_k must be numbers of at least 1, got \(0,\)"):
        Evaluation(pass_at_k=(0,))


def test_intervals_shrink_with_the_prompts_and_follow_the_seed() -> None:
    def records(count: int) -> list[PromptRecord]:
        return [PromptRecord(i, "", {}, {}, {"reward": (float(i % 5), 1.0)}) for i in range(count)]

    few, many = (figures(records(count), 2000, 0)["reward"] for count in (20, 500))
    assert few.value == many.value == 2.0
    spread = math.sqrt(2 / 500)
    assert many.low == pytest.approx(2 - 1.96 * spread, abs=0.02)
    assert many.high == pytest.approx(2 + 1.96 * spread, abs=0.02)
    assert few.high - few.low > 3 * (many.high - many.low)
    assert figures(records(20), 2000, 0) == figures(records(20), 2000, 0) != figures(records(20), 2000, 1)


def test_figures_stand_in_the_order_of_the_table() -> None:
    parts = [f"reward_part/{letter}" for letter in "hgfedcba"]
    record = PromptRecord(0, "", {}, {}, dict.fromkeys((*parts, "kl", "reward"), (1.0, 1.0)))
    assert list(figures([record], 10, 0)) == ["reward", "kl", *parts]


def test_what_cannot_be_said_is_left_empty() -> None:
    one = [PromptRecord(0, "", {}, {}, {"reward": (1.0, 1.0), "perplexity": (1e6, 1.0), "advantage": (1.0, 1.0)})]
    found = figures(one, 10, 0)
    assert found["reward"] == (1.0, None, None, 1, None)
    assert found["perplexity"] == (None, None, None, 1, None)
    assert "advantage" not in found
    assert figures([], 10, 0) == {}
    json.dumps([figure._asdict() for figure in found.values()], allow_nan=False)


def test_a_table_lines_up() -> None:
    assert format_table([("", "v", "x"), ("long", "1", "a b"), ("s", "10", "")]) == (
        "       v  x\n-----------\nlong   1  a b\ns     10".replace("-----------", "-" * 13)
    )
    assert [format_number(value) for value in (None, 0.0, 0.5, -12.345, 123456.0, 1e-5)] == [
        "-", "0.0000", "0.5000", "-12.35", "1.23e+05", "1.00e-05"]  # fmt: skip


# Where it is written


@pytest.mark.slow
def test_nothing_is_written_over(folders: tuple[str, str], tmp_path: Path) -> None:
    for _ in range(2):
        run(folders, tmp_path, Evaluation(num_resamples=10, test=()))
    names = {path.name for path in tmp_path.glob("evaluation*")}
    assert names == {"evaluation.json", "evaluation.jsonl", "evaluation_1.json", "evaluation_1.jsonl"}
    for suffix in (".json", ".jsonl"):
        mine = tmp_path / f"mine{suffix}"
        mine.write_text("precious")
        with pytest.raises(
            UserError, match=r"evaluation\.path must be a file that does not exist yet, got .*mine\.json"
        ):
            run(folders, tmp_path, Evaluation(path=str(tmp_path / "mine.json")))
        assert mine.read_text() == "precious"
        mine.unlink()
    run(folders, tmp_path, Evaluation(path=str(tmp_path / "new" / "mine.json"), num_resamples=10))
    assert len(lines(tmp_path / "new" / "mine.jsonl")) == 8


@pytest.mark.slow
def test_the_file_may_be_in_the_home_folder(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run(folders, tmp_path, Evaluation(path="~/mine.json", num_resamples=10, test=()))
    assert (tmp_path / "home" / "mine.json").is_file()
    assert not (tmp_path / "~").exists()


@pytest.mark.slow
def test_a_dry_run_and_validation_leave_no_files(folders: tuple[str, str], tmp_path: Path) -> None:
    run(folders, tmp_path, Evaluation(num_resamples=10), fast_dev_run=True)
    run(folders, tmp_path, Evaluation(), validates=True)
    assert not list(tmp_path.glob("evaluation*"))


@pytest.mark.slow(0.3)
def test_surrogates_and_half_written_files_do_no_harm(folders: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / ".evaluation.jsonl.new").write_text("cut sho")
    run(folders, tmp_path, Evaluation(num_resamples=10), rows=[{"prompt": "a", "chosen": "half"}])
    (record,) = lines(tmp_path / "evaluation.jsonl")
    assert record["responses"]["chosen"] == ["half"]
    # No file gets that far with half a surrogate pair; a data module of the user's own may.
    (message,) = response_messages([{"chosen": "\ud83d half"}], "chosen")
    assert message is not None
    assert message["content"] == "? half"
    assert not list(tmp_path.glob(".evaluation*"))


# What is measured


COSTLY = {"win_rate_reference", "reference_reward", "win_rate_chosen", "chosen_reward", "perplexity"}


def logged(metrics: dict[str, float], stage: str) -> set[str]:
    return {name for name in COSTLY if f"{stage}/{name}" in metrics}


@pytest.mark.slow
def test_validation_measures_what_it_is_asked_for(folders: tuple[str, str], tmp_path: Path) -> None:
    recorder = Recorder()
    plain = run(folders, tmp_path, Evaluation(), recorder, validates=True)
    assert logged(plain, "val") == set()
    asked = run(folders, tmp_path, Evaluation(validation=("win_rate_reference", "perplexity")), validates=True)
    assert logged(asked, "val") == {"win_rate_reference", "reference_reward", "perplexity"}
    assert {name: asked[name] for name in plain} == plain
    assert run(folders, tmp_path, validates=True) == plain


@pytest.mark.slow
def test_an_interrupted_evaluation_is_forgotten(folders: tuple[str, str], tmp_path: Path) -> None:
    class Once(Callback):
        def on_validation_batch_end(self, *arguments: Any) -> None:
            if not hasattr(self, "raised"):
                self.raised = True
                raise RuntimeError("once")

    def data(rows: Sequence[dict[str, Any]]) -> PromptDataModule:
        path = write_rows(tmp_path / "rows.jsonl", rows)
        return PromptDataModule(path, folders[0], val_path=path, batch_size=4, max_prompt_length=64)

    module, recorder = remax_module(*folders), Recorder()
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="once"):
        make_trainer(tmp_path, [Once()], limit_val_batches=1.0).validate(module, data(ROWS[::-1]), verbose=False)
    (metrics,) = make_trainer(tmp_path, [recorder], limit_val_batches=1.0).validate(module, data(ROWS), verbose=False)
    rewards = [value for output in recorder.validations for value in output["rollout"].reward.tolist()]
    assert len(rewards) == 8
    assert metrics["val/reward"] == pytest.approx(sum(rewards) / 8)


@pytest.mark.slow
def test_a_test_measures_what_it_is_asked_for(folders: tuple[str, str], tmp_path: Path) -> None:
    assert logged(run(folders, tmp_path, Evaluation(test=(), num_resamples=10)), "test") == set()
    found = run(folders, tmp_path, Evaluation(test=("win_rate_chosen",), num_resamples=10))
    assert logged(found, "test") == {"win_rate_chosen", "chosen_reward"}


@pytest.mark.slow(0.3)
def test_what_is_not_there_is_left_out_and_told(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run(folders[:1], tmp_path, Evaluation(num_resamples=10), rows=[{"prompt": "a"}])
    assert logged(metrics, "test") == set()
    why = json.loads((tmp_path / "evaluation.json").read_text())["left_out"]
    assert why["win_rate_reference"] == "there is no model.reference"
    assert why["win_rate_chosen"] == why["perplexity"]
    assert "no row has a response in column 'chosen'" in why["perplexity"]
    assert "Left out: perplexity, because no row" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_asked_for_by_name_has_to_be_there(folders: tuple[str, str], tmp_path: Path) -> None:
    plain = [{"prompt": "a", "note": 1}]
    with pytest.raises(UserError, match=r"evaluation\.test has win_rate_reference, but there is no model\.ref"):
        run(folders[:1], tmp_path, Evaluation(test=("win_rate_reference",)))
    for options in ({"test": ("win_rate_chosen",)}, {"test": ("perplexity",)}, {"response_column": "chosn"}):
        with pytest.raises(UserError, match=r"evaluation\.response_column: no row .*the columns are 'prompt', 'note'"):
            run(folders, tmp_path, Evaluation(**options), rows=plain)
    with pytest.raises(UserError, match=r"evaluation\.response_column: no row"):
        run(folders, tmp_path, Evaluation(validation=("win_rate_chosen",)), rows=plain, validates=True)


@pytest.mark.slow
def test_what_is_not_asked_for_need_not_be_there(folders: tuple[str, str], tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    asked = Evaluation(test=("win_rate_reference",), response_column="reply", num_resamples=10)
    assert logged(run(folders, tmp_path, asked, rows=rows), "test") == {"win_rate_reference", "reference_reward"}


@pytest.mark.slow
def test_another_column_is_read(folders: tuple[str, str], tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "reply": "yes"} for prompt in PROMPTS]
    run(folders, tmp_path, Evaluation(response_column="reply", num_resamples=10), rows=rows)
    assert {line["responses"]["chosen"][0] for line in lines(tmp_path / "evaluation.jsonl")} == {"yes"}


# A text


@pytest.mark.slow
def test_the_perplexity_of_a_text(folders: tuple[str, str], tmp_path: Path) -> None:
    from conftest import make_tokenizer
    from transformers import AutoModelForCausalLM

    text = "The quick brown fox\njumps over the lazy dog, 12 times."
    (tmp_path / "held_out.txt").write_text(text)
    callback = Evaluation(text=str(tmp_path / "held_out.txt"), max_length=10, num_resamples=200)
    metrics = run(folders, tmp_path, callback, rows=[{"prompt": "a"}, {"prompt": "b"}])
    model = AutoModelForCausalLM.from_pretrained(folders[0]).double()
    ids = make_tokenizer()(text, add_special_tokens=False).input_ids
    nats = 0.0
    for start in range(0, len(ids), 10):
        piece = torch.tensor([[1, *ids[start : start + 10]]])
        with torch.no_grad():
            log_probs = model(piece).logits[0].log_softmax(-1)
        nats -= sum(float(log_probs[i, token]) for i, token in enumerate(piece[0, 1:].tolist()))
    expected = math.exp(nats / len(ids))
    figure = json.loads((tmp_path / "evaluation.json").read_text())["figures"]["perplexity"]
    assert figure["value"] == pytest.approx(expected, rel=1e-5)
    assert figure["n"] == math.ceil(len(ids) / 10)
    assert metrics["test/perplexity"] == pytest.approx(expected, rel=1e-5)
    assert metrics["test/reference_perplexity"] != metrics["test/perplexity"]
    asked = Evaluation(text=str(tmp_path / "held_out.txt"), max_length=10, validation=("perplexity",))
    assert run(folders, tmp_path, asked, validates=True)["val/perplexity"] == metrics["test/perplexity"]


# Bad input


@pytest.mark.parametrize(("options", "message"), [
    ({"path": "evaluation.txt"}, r"evaluation\.path must be null or a name that ends in \.json, got 'evaluation.txt'"),
    ({"test": ("kl",)}, r"evaluation\.test must be null or some of win_rate_reference, .*got \('kl',\)"),
    ({"validation": ("reward",)}, r"evaluation\.validation must be some of"),
    ({"max_length": 0}, r"evaluation\.max_length must be at least 1, got 0"),
    ({"num_resamples": 0}, r"evaluation\.num_resamples must be between 1 and 1,000,000, got 0"),
])  # fmt: skip
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Evaluation(**options)


@pytest.mark.slow(0.3)
def test_a_text_has_to_be_one(folders: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for name in ("empty.txt", "bytes.txt", "missing.txt"):
        with pytest.raises(UserError, match=rf"evaluation\.text.*{name}"):
            run(folders, tmp_path, Evaluation(text=str(tmp_path / name)))
    assert not list(tmp_path.glob("evaluation*"))


def test_a_folder_that_cannot_be_is_told_at_once(folders: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"evaluation\.path: cannot create the folder"):
        run(folders, tmp_path, Evaluation(path=str(tmp_path / "file" / "evaluation.json")))


def test_other_modules_are_left_alone(tmp_path: Path) -> None:
    class Other(FakeModule):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test/x", 1.0, batch_size=1)

        test_dataloader = FakeModule.val_dataloader

    fake_trainer(tmp_path, [Evaluation()]).test(Other([], [1]), verbose=False)
    assert not list(tmp_path.rglob("evaluation*"))


def test_the_data_sets_response_is_what_the_supervised_stage_trains(tmp_path: Path) -> None:
    """After messages: the thought that the generation prompt opens is closed, and the template's end stands once."""
    make_tokenizer(chat_template=THINKING).save_pretrained(tmp_path)
    thought = {"role": "assistant", "content": "2", "reasoning_content": "1 and 1"}
    call = {"type": "function", "function": {"name": "sum", "arguments": {}}}
    rows = [
        {"prompt": [user("1+1")], "response": "2"},
        {"prompt": "2+2=", "response": "4"},
        {"prompt": [user("1+1")], "response": [thought]},
        {"prompt": [user("1+1")], "response": [{"role": "assistant", "content": None, "tool_calls": [call]}]},
    ]
    data = SFTDataModule(write_rows(tmp_path / "rows.jsonl", rows), str(tmp_path), batch_size=4)
    data.setup("fit")
    (batch,) = list(data.train_dataloader())
    prompt = PromptBatch(batch.prompt_ids, batch.prompt_mask, batch.prompts, batch.rows)
    messages = response_messages(batch.rows, "response")
    responses = tokenize_responses(data.tokenizer, tiny_model(), prompt, messages, 100)
    # A reward reads them as it reads the policy's: with the thought, which begins in the prompt.
    texts = set(shown_texts(data.tokenizer, batch.prompts, messages, {2, 3}))
    called = "\n</think>\n\n<call>sum <unk><unk></call>"  # the tokenizer has no braces
    assert texts == {"2", "4", "1 and 1\n</think>\n\n2", called}
    assert torch.equal(responses.response_mask, batch.response_mask)
    assert torch.equal(responses.response_ids[responses.response_mask], batch.response_ids[batch.response_mask])
