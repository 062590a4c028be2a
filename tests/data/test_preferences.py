"""Pairs as batches: what the reward model reads, and which pairs are refused."""

from __future__ import annotations

import json
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import make_tokenizer, tiny_config
from helpers.reward_models import loaded, save_classifier

from remax_lightning.data import LoadingConfig, PairColumns, PreferenceDataModule, PromptDataModule, SFTDataModule
from remax_lightning.errors import DataError, UserError
from remax_lightning.types import PreferenceBatch

BOS, EOS, PAD = 1, 2, 3
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
START = "\n\nHuman: what is {n}+{n}?\n\nAssistant:"
DROP = LoadingConfig(on_bad_row="drop")


def write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text_rows(count: int = 6) -> list[dict[str, Any]]:
    return [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": f"{n} or so"} for n in range(count)]


@pytest.fixture
def chat_path(tmp_path: Path) -> str:
    make_tokenizer(chat_template=CHAT).save_pretrained(tmp_path / "chat")
    return str(tmp_path / "chat")


def batches(path: str, tokenizer: str | Path, **options: Any) -> list[PreferenceBatch]:
    data = PreferenceDataModule(path, str(tokenizer), **({"batch_size": 2} | options))
    data.setup("fit")
    return sorted(data.train_dataloader(), key=lambda batch: batch.indices)


def sides(batch: PreferenceBatch) -> list[tuple[list[int], list[int]]]:
    """The real tokens of every pair."""
    return [
        (chosen[first].tolist(), rejected[second].tolist())
        for chosen, first, rejected, second in zip(*batch[:4], strict=True)
    ]


def test_a_pair_is_prompt_response_and_end_as_one_text(tmp_path: Path, policy_path: Path) -> None:
    rows = text_rows()
    found = batches(write(tmp_path / "a.jsonl", rows), policy_path, template="Q {prompt}")
    tokenizer = make_tokenizer()
    assert len(found) == 3
    for batch in found:
        assert batch.margin.tolist() == [0.0, 0.0]
        assert batch.margin.dtype == torch.float32
        for mask, ids in ((batch.chosen_mask, batch.chosen_ids), (batch.rejected_mask, batch.rejected_ids)):
            assert mask[:, 0].all()  # padded on the right
            assert set(ids[~mask].tolist()) <= {PAD}
        for row, prompt, pair in zip(batch.rows, batch.prompts, sides(batch), strict=True):
            assert prompt == f"Q {row['prompt']}"
            for ids, name in zip(pair, ("chosen", "rejected"), strict=True):
                assert ids == [*tokenizer(prompt + row[name])["input_ids"], EOS]
    assert sorted(index for batch in found for index in batch.indices) == list(range(6))


def test_an_end_that_is_there_already_stands_once(tmp_path: Path) -> None:
    """The text may spell it out, and some tokenizers add it."""
    from tokenizers.processors import TemplateProcessing

    rows = [{"prompt": "1", "chosen": "2</s>", "rejected": "3"}]
    path = write(tmp_path / "a.jsonl", rows)
    for name, single in (("plain", "<s> $A"), ("ending", "<s> $A </s>")):
        tokenizer = make_tokenizer()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
        tokenizer.save_pretrained(tmp_path / name)
        for pair in sides(batches(path, tmp_path / name, batch_size=1)[0]):
            for ids in pair:
                assert (ids.count(BOS), ids.count(EOS), ids[0], ids[-1]) == (1, 1, BOS, EOS)


def test_a_tokenizer_without_an_end_will_do(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "bare")
    pair = sides(batches(write(tmp_path / "a.jsonl", text_rows(2)), tmp_path / "bare")[0])[0]
    assert EOS not in pair[0]


def test_messages_go_through_the_chat_template(tmp_path: Path, chat_path: str) -> None:
    user = {"role": "user", "content": "1+1?"}
    two, three = ({"role": "assistant", "content": text} for text in "23")
    rows = [{"prompt": [user], "chosen": "2", "rejected": "3"}, {"chosen": [user, two], "rejected": [user, three]}]
    path = write(tmp_path / "a.jsonl", rows)
    data = PreferenceDataModule(path, chat_path, batch_size=2)
    data.setup("fit")
    (batch,) = list(data.train_dataloader())
    tokenizer = make_tokenizer()
    expected = [tokenizer(f"user: 1+1?\nassistant: {answer}\n")["input_ids"] for answer in (2, 3)]
    assert sides(batch) == [(expected[0], expected[1])] * 2
    assert data.reward_template is None


def test_transcripts_in_all_three_stages(tmp_path: Path, policy_path: Path) -> None:
    """The form of hh-rlhf: the same file for supervised fine-tuning, reward model and ReMax."""
    rows = [{"chosen": START.format(n=n) + f" {2 * n}", "rejected": START.format(n=n) + " no"} for n in range(4)]
    path = write(tmp_path / "hh.jsonl", rows)
    prompts = {START.format(n=n) for n in range(4)}
    found = batches(path, policy_path)
    assert {prompt for batch in found for prompt in batch.prompts} == prompts
    assert {row["chosen"] for batch in found for row in batch.rows} == {" 0", " 2", " 4", " 6"}
    supervised = SFTDataModule(path, str(policy_path), response_column="chosen", batch_size=4)
    supervised.setup("fit")
    (examples,) = list(supervised.train_dataloader())
    assert set(examples.prompts) == prompts
    decoded = make_tokenizer().batch_decode(examples.response_ids, skip_special_tokens=True)
    assert sorted(decoded) == [" 0", " 2", " 4", " 6"]
    remax = PromptDataModule(path, str(policy_path), batch_size=4)
    remax.setup("fit")
    (batch,) = list(remax.train_dataloader())
    assert set(batch.prompts) == prompts


def test_another_marker(tmp_path: Path, policy_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"chosen": "Q: x A: y", "rejected": "Q: x A: z"}])
    loading = LoadingConfig(response_marker="A:")
    (batch,) = batches(path, policy_path, batch_size=1, loading=loading)
    assert batch.prompts == ["Q: x A:"]


@pytest.mark.slow(0.3)
def test_the_reward_reads_what_the_reward_model_was_trained_on(tmp_path: Path, chat_path: str) -> None:
    """Token for token, of text and of messages."""
    make_tokenizer(chat_template=CHAT).save_pretrained(tmp_path / "tokenizer")
    reward_path = save_classifier(tmp_path / "reward", tiny_config("llama"), make_tokenizer(chat_template=CHAT))
    data = PreferenceDataModule(
        write(tmp_path / "a.jsonl", text_rows()), reward_path, batch_size=6, template="Q {prompt}"
    )
    data.setup("fit")
    (batch,) = list(data.train_dataloader())
    reward = loaded(reward_path, template=data.reward_template)
    for prompt, row, (chosen, _) in zip(batch.prompts, batch.rows, sides(batch), strict=True):
        assert reward._token_ids(reward.text(prompt, row["chosen"], row)) == chosen
    user = {"role": "user", "content": "1+1?"}
    path = write(tmp_path / "b.jsonl", [{"prompt": [user], "chosen": "2", "rejected": "3"}])
    (batch,) = batches(path, reward_path, batch_size=1)
    reward = loaded(reward_path)
    assert reward._token_ids(reward.text(batch.prompts[0], "2", {})) == sides(batch)[0][0]


def test_margins_are_read(tmp_path: Path, policy_path: Path) -> None:
    rows = [{**row, "gap": n / 2} for n, row in enumerate(text_rows(2))]
    (batch,) = batches(write(tmp_path / "a.jsonl", rows), policy_path, pair_columns=PairColumns(margin="gap"))
    assert sorted(batch.margin.tolist()) == [0.0, 0.5]
    margins = [Decimal("0.5"), numpy.float32(0.5), numpy.int64(2), 0, "0.25"]  # of Parquet, of data frames, of CSV
    memory = PreferenceDataModule(
        tokenizer=str(policy_path),
        data=[{**text_rows(1)[0], "gap": margin} for margin in margins],
        val_size=0,
        batch_size=5,
        pair_columns=PairColumns(margin="gap"),
    )
    memory.setup("fit")
    assert sorted(next(iter(memory.train_dataloader())).margin.tolist()) == [0.0, 0.25, 0.5, 0.5, 2.0]
    for value in ("much", None, True, float("inf")):
        path = write(tmp_path / "b.jsonl", [*rows, {**rows[0], "gap": value}])
        with pytest.raises(DataError, match=r"b\.jsonl, line 3: column 'gap' must be a number, the margin of the pair"):
            batches(path, policy_path, pair_columns=PairColumns(margin="gap"))
    with pytest.raises(DataError, match=r"there is no column 'gap' \(data\.pair_columns\.margin\)"):
        batches(write(tmp_path / "c.jsonl", text_rows()), policy_path, pair_columns=PairColumns(margin="gap"))


GOOD = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "rejected": "2"}, "'chosen' and 'rejected' are equal, so neither is preferred"),
        ({**GOOD, "chosen": "\u00e9", "rejected": "\u00e8"}, "'chosen' and 'rejected' are the same tokens"),
        ({**GOOD, "chosen": "\u00e9", "rejected": "\u00e8</s>"}, "'chosen' and 'rejected' are the same tokens"),
        ({**GOOD, "chosen": " "}, "the chosen response in column 'chosen' is empty"),
        ({"chosen": "a", "rejected": "b"}, "do not share a prompt"),
    ],
)
def test_pairs_that_teach_nothing_stop_or_are_dropped(
    tmp_path: Path, policy_path: Path, row: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD, row])
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{message}"):
        batches(path, policy_path, batch_size=1)
    with pytest.warns(UserWarning, match=r"a\.jsonl: dropped 1 of 2 rows \(data\.loading\.on_bad_row\): 1 "):
        (batch,) = batches(path, policy_path, batch_size=1, loading=DROP)
    assert batch.rows == [GOOD]
    with pytest.raises(DataError, match=r"b\.jsonl: not one of 1 rows can be used: 1 .*The first is .*line 1: "):
        batches(write(tmp_path / "b.jsonl", [row]), policy_path, batch_size=1, loading=DROP)


def test_a_rejected_response_may_be_empty(tmp_path: Path, policy_path: Path) -> None:
    (batch,) = batches(write(tmp_path / "a.jsonl", [{**GOOD, "rejected": ""}]), policy_path, batch_size=1)
    assert sides(batch)[0][1] == make_tokenizer()("1+1=</s>")["input_ids"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "prompt": " "}, "the prompt in column 'prompt' is empty"),
        ({"prompt": "1", "chosen": "2"}, r"there is no column 'rejected' \(data\.pair_columns\.rejected\)"),
        ({**GOOD, "prompt": 3}, "column 'prompt' must be text or messages, got int"),
    ],
)
def test_rows_that_cannot_be_read_stop_or_are_dropped(
    tmp_path: Path, policy_path: Path, row: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD, row])
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{message}"):
        batches(path, policy_path, batch_size=1)
    with pytest.warns(UserWarning, match=r"a\.jsonl: dropped 1 of 2 rows \(data\.loading\.on_bad_row\): 1 "):
        (batch,) = batches(path, policy_path, batch_size=1, loading=DROP)
    assert batch.rows == [GOOD]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "prompt,chosen,rejected,margin\n1,2,3,0.5\n1,2,3, -2 \n1,2,3,1e-1\n"),
        ("a.tsv", "prompt\tchosen\trejected\tmargin\n1\t2\t3\t.5\n1\t2\t3\t-2.\n1\t2\t3\t+0.1\n"),
        ("a.jsonl", "".join(json.dumps({**GOOD, "margin": margin}) + "\n" for margin in (0.5, -2, "0.1"))),
    ],
)
def test_margins_are_numbers_wherever_they_come_from(tmp_path: Path, policy_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    options = {"batch_size": 3, "pair_columns": PairColumns(margin="margin")}
    data = PreferenceDataModule(str(tmp_path / name), str(policy_path), val_path=str(tmp_path / name), **options)
    data.setup()
    (batch,) = data.val_dataloader()
    assert batch.margin.tolist() == pytest.approx([0.5, -2.0, 0.1])
    assert [row["margin"] for row in batch.rows] == [0.5, -2.0, 0.1]


@pytest.mark.parametrize("margin", ["", "high", "1_000", "nan", "1e999", True, None, float("inf"), 10**400, [1]])
def test_margins_that_are_no_finite_number_are_refused(tmp_path: Path, policy_path: Path, margin: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{**GOOD, "margin": 1}, {**GOOD, "margin": margin}])
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: column 'margin' must be a number, the margin of the pair"):
        batches(path, policy_path, batch_size=1, pair_columns=PairColumns(margin="margin"))


def test_long_pairs_are_left_out_and_counted(tmp_path: Path, policy_path: Path, caplog: Any) -> None:
    rows = [GOOD, GOOD, {**GOOD, "rejected": "3" * 40}, {**GOOD, "prompt": "1" * 30}]
    path = write(tmp_path / "a.jsonl", rows)
    found = batches(path, policy_path, batch_size=1, max_prompt_length=20, max_length=30)
    assert [batch.rows for batch in found] == [[GOOD], [GOOD]]
    said = [record.message for record in caplog.records]
    assert any("dropped 1 of 4 rows, longer than data.max_prompt_length=20" in each for each in said)
    assert any("dropped 1 of 3 rows, longer than data.max_length=30" in each for each in said)
    with pytest.raises(DataError, match=r"line 4: 31 tokens, over data\.max_prompt_length=20"):
        batches(path, policy_path, max_prompt_length=20, loading=LoadingConfig(long_prompts="error"))
    with pytest.raises(DataError, match=r"line 3: 46 tokens, over data\.max_length=40"):
        batches(path, policy_path, max_length=40, loading=LoadingConfig(long_prompts="error"))


def test_text_and_messages_do_not_mix(tmp_path: Path, chat_path: str) -> None:
    rows = [GOOD, {**GOOD, "prompt": [{"role": "user", "content": "1"}]}]
    with pytest.raises(DataError, match=r"some prompts are text and some are messages"):
        batches(write(tmp_path / "a.jsonl", rows), chat_path)


def test_values_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.max_length must be at least 2, got 1"):
        PreferenceDataModule("a", "b", max_length=1)


def test_parquet(tmp_path: Path, policy_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    user = {"role": "user", "content": "1+1?"}
    pair = {side: [user, {"role": "assistant", "content": text}] for side, text in (("chosen", "2"), ("rejected", "3"))}
    parquet.write_table(pyarrow.Table.from_pylist([pair]), tmp_path / "a.parquet")
    make_tokenizer(chat_template=CHAT).save_pretrained(tmp_path / "chat")
    (batch,) = batches(str(tmp_path / "a.parquet"), tmp_path / "chat", batch_size=1)
    assert batch.rows[0]["chosen"] == "2"


def test_gsm8k_pairs_of_a_right_and_a_wrong_solution(gsm8k: Path, tmp_path: Path, policy_path: Path) -> None:
    rows = []
    for line in (gsm8k / "example_model_solutions.jsonl").read_text().splitlines()[:40]:
        row = json.loads(line)
        solutions = [each for each in row.values() if isinstance(each, dict)]
        right = [each["solution"] for each in solutions if each["is_correct"]]
        wrong = [each["solution"] for each in solutions if not each["is_correct"]]
        if right and wrong:
            rows.append({"prompt": row["question"], "chosen": right[0], "rejected": wrong[0]})
    assert len(rows) > 10
    path = write(tmp_path / "gsm8k.jsonl", rows)
    found = batches(path, policy_path, max_prompt_length=1000, max_length=2000)
    assert len(found) == len(rows) // 2
