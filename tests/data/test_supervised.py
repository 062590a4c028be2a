from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer
from helpers.chat_templates import AS_TEXT, user

from remax_lightning.data import SFTDataModule
from remax_lightning.data.options import LoadingConfig
from remax_lightning.errors import DataError, UserError

EOS = 2


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def train(tmp_path: Path) -> str:
    return write(tmp_path / "sums.jsonl", [{"prompt": f"{n}+{n}=", "response": f"{2 * n}"} for n in range(12)])


def test_batches(train: str, policy_path: Path) -> None:
    data = SFTDataModule(train, str(policy_path), batch_size=5, val_size=2, template="Q {prompt}")
    data.setup("fit")
    tokenizer = make_tokenizer()
    batches = list(data.train_dataloader())
    assert len(batches) == 2
    for batch in batches:
        for i, row in enumerate(batch.rows):
            assert batch.prompts[i] == f"Q {row['prompt']}"
            assert batch.prompt_ids[i][batch.prompt_mask[i]].tolist() == tokenizer(batch.prompts[i]).input_ids
            response = tokenizer(row["response"], add_special_tokens=False).input_ids
            assert batch.response_ids[i][batch.response_mask[i]].tolist() == [*response, EOS]
        assert batch.prompt_mask[:, -1].all()
        assert batch.response_mask[:, 0].all()
        assert set(batch.response_ids[~batch.response_mask].tolist()) <= {tokenizer.pad_token_id}
    assert [len(batch.rows) for batch in data.val_dataloader()] == [2]


def test_eos_that_the_response_spells_out_is_not_doubled(tmp_path: Path, policy_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "1", "response": "2</s>"}])
    data = SFTDataModule(path, str(policy_path), batch_size=1)
    data.setup()
    ids = next(iter(data.train_dataloader())).response_ids[0].tolist()
    assert ids.count(EOS) == 1
    assert len(ids) == 2


@pytest.mark.parametrize("prompt", ["1", [user("1")]])
def test_a_response_that_goes_on_behind_its_end_is_refused(prompt: Any, tmp_path: Path) -> None:
    """As in text that a language model wrote beyond its answer: nobody draws what follows the end."""
    tokenizer = make_tokenizer(chat_template=AS_TEXT)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": prompt, "response": "2"}, {"prompt": prompt, "response": "2</s>Q 3"}]
    path = write(tmp_path / "a.jsonl", rows)
    options = {"tokenizer": str(tmp_path / "tokenizer"), "batch_size": 1, "val_size": 0}
    with pytest.raises(DataError, match=r"line 2: the response in column 'response' goes on behind '</s>', which ends"):
        SFTDataModule(path, **options).setup("fit")
    data = SFTDataModule(path, loading=LoadingConfig(on_bad_row="drop"), **options)
    with pytest.warns(UserWarning, match="dropped 1 of 2 rows"):
        data.setup("fit")
    assert [batch.response_ids[0].tolist().count(EOS) for batch in data.train_dataloader()] == [1]


def test_long_responses_are_left_out_and_counted(
    train: str, policy_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = SFTDataModule(train, str(policy_path), batch_size=1, max_response_length=2)
    with pytest.warns(UserWarning, match=r"sums\.jsonl: dropped 7 of 12 rows, longer than data\.max_response_length=2"):
        data.setup("fit")
    assert sorted(row["response"] for batch in data.train_dataloader() for row in batch.rows) == list("02468")


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "1"}, {}, r"a\.jsonl, line 2: there is no column 'response' \(data\.response_column\)"),
        ({"prompt": "1", "response": 2}, {}, r"a\.jsonl, line 2: column 'response' must be text or messages, got int"),
        ({"prompt": "1", "response": ""}, {}, r"a\.jsonl, line 2: the response in column 'response' is empty"),
        ({"prompt": "", "response": "2"}, {}, r"a\.jsonl, line 2: the prompt in column 'prompt' is empty"),
        (
            {"prompt": "1", "response": [{"role": "assistant", "content": "2", "weight": 0}]},
            {},
            r"a\.jsonl, line 2: the response in column 'response' has weight 0, so it is not to be trained",
        ),
        ({"prompt": "1", "response": "2"}, {"max_response_length": 1}, r"2 of 2.*none is left, the shortest has 2"),
    ],
)  # fmt: skip
def test_bad_rows(
    tmp_path: Path, policy_path: Path, row: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "1", "response": "2"}, row])
    with pytest.raises(DataError, match=message):
        SFTDataModule(path, str(policy_path), batch_size=1, **options).setup("fit")


def test_response_limit_is_checked(train: str, policy_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.max_response_length must be at least 1, got 0"):
        SFTDataModule(train, str(policy_path), max_response_length=0)


@pytest.mark.slow
def test_gsm8k_columns(gsm8k: Path, policy_path: Path) -> None:
    data = SFTDataModule(
        "unused.jsonl",
        str(policy_path),
        val_path=str(gsm8k / "test.jsonl"),
        prompt_column="question",
        response_column="answer",
        batch_size=8,
        max_response_length=1000,
    )
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    assert (batch.response_ids * batch.response_mask == EOS).sum(1).tolist() == [1] * 8


def test_messages_end_with_the_response(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ '>' if m.role == 'assistant' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    make_tokenizer(chat_template=template).save_pretrained(tmp_path / "chat")
    messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    path = write(tmp_path / "a.jsonl", [{"messages": messages}])
    data = SFTDataModule(path, str(tmp_path / "chat"), prompt_column="messages", batch_size=1)
    data.setup("fit")
    (batch,) = list(data.train_dataloader())
    assert batch.prompts == ["1+1>"]
    assert batch.rows[0]["response"] == "2"
    write(tmp_path / "a.jsonl", [{"messages": messages[:1]}])
    with pytest.raises(DataError, match=r"there is no column 'response' \(data\.response_column\)"):
        SFTDataModule(path, str(tmp_path / "chat"), prompt_column="messages", batch_size=1).setup("fit")


def test_a_pair_of_message_lists_gives_the_chosen_response(tmp_path: Path) -> None:
    make_tokenizer(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}").save_pretrained(
        tmp_path / "chat"
    )
    user = {"role": "user", "content": "1+1"}
    pair = {side: [user, {"role": "assistant", "content": text}] for side, text in (("chosen", "2"), ("rejected", "3"))}
    path = write(tmp_path / "a.jsonl", [{"prompt": "1+1", **pair}])
    data = SFTDataModule(path, str(tmp_path / "chat"), response_column="chosen", batch_size=1)
    data.setup("fit")
    (batch,) = list(data.train_dataloader())
    assert (batch.prompts, batch.rows[0]["chosen"]) == (["1+1"], "2")


@pytest.mark.parametrize(
    "fields",
    [
        {"content": "4", "reasoning_content": "Two and two."},
        {"content": "", "tool_calls": [{"type": "function", "function": {"name": "sum", "arguments": {}}}]},
    ],
)
def test_what_plain_text_has_no_place_for_is_not_left_out(
    fields: dict[str, Any], tmp_path: Path, policy_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "2+2?", "response": [{"role": "assistant", **fields}]}])
    with pytest.raises(DataError, match=r"line 1: the response has '\w+', for which there is no place behind a prompt"):
        SFTDataModule(path, str(policy_path), batch_size=1, val_size=0).setup("fit")
