"""Rows are rendered and tokenized once: what later runs find, when they make it anew, and what is held in memory."""

from __future__ import annotations

import datetime
import importlib
import json
import logging
import pickle
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer

from remax_lightning.data import (
    LoadingConfig,
    PreferenceDataModule,
    PromptDataModule,
    SFTDataModule,
    preparation,
    records,
)
from remax_lightning.data.formatting import PromptFormatter
from remax_lightning.errors import DataError

CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ROWS = [
    {"prompt": f"{n}+{n}=", "response": str(2 * n), "chosen": str(2 * n), "rejected": "no", "n": n} for n in range(6)
]
KINDS = [PromptDataModule, SFTDataModule, PreferenceDataModule]


class Suffixed(PromptDataModule):
    """A data module of a user's own, with an attribute that no base class knows."""

    suffix: Any = ""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._suffix = type(self).__dict__["suffix"]

    def _make_example(self, row: Any, where: str) -> Any:
        suffix = self._suffix(row["prompt"]) if callable(self._suffix) else self._suffix
        return super()._make_example({**row, "prompt": row["prompt"] + suffix}, where)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "remax_lightning"


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places of all rows that are rendered."""
    places: list[str] = []
    text = PromptFormatter.text

    def counted(self: Any, row: Any, where: str) -> Any:
        places.append(where)
        return text(self, row, where)

    monkeypatch.setattr(PromptFormatter, "text", counted)
    return places


def write(tmp_path: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / name)


def batches(kind: Any, path: str, tokenizer: Path, **options: Any) -> list[Any]:
    data = kind(path, str(tokenizer), val_path=path, **({"batch_size": 2} | options))
    data.setup("validate")
    return list(data.val_dataloader())


def same(batch: Any, other: Any) -> bool:
    return all(bool((a == b).all()) if hasattr(a, "shape") else a == b for a, b in zip(batch, other, strict=True)) and [
        getattr(prompt, "conversation", None) for prompt in batch.prompts
    ] == [getattr(prompt, "conversation", None) for prompt in other.prompts]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_chat", [False, True])
def test_a_second_run_renders_nothing_and_gets_the_same(
    kind: Any, is_chat: bool, tmp_path: Path, policy_path: Path, rendered: list[str]
) -> None:
    rows, tokenizer = ROWS, policy_path
    if is_chat:
        tokenizer = tmp_path / "chat"
        make_tokenizer(chat_template=CHAT).save_pretrained(tokenizer)
        rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    path = write(tmp_path, rows)
    first = batches(kind, path, tokenizer)
    assert len(rendered) == 6
    assert all(map(same, batches(kind, path, tokenizer), first))
    assert len(rendered) == 6
    uncached = batches(kind, path, tokenizer, loading=LoadingConfig(cache=False))
    assert len(rendered) == 12
    assert all(map(same, uncached, first))


def test_what_is_known_of_all_examples_is_known_of_cached_ones(tmp_path: Path) -> None:
    make_tokenizer(chat_template=CHAT).save_pretrained(tmp_path / "chat")
    path = write(tmp_path, [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS])
    for _ in range(2):
        pairs = PreferenceDataModule(path, str(tmp_path / "chat"), batch_size=2)
        pairs.setup()
        assert pairs.reward_template is None
        supervised = SFTDataModule(path, str(tmp_path / "chat"), batch_size=2)
        supervised.setup()
        assert supervised.response_ends == {2}
    plain = write(tmp_path, ROWS, "plain.jsonl")
    for first, second in ((path, plain), (plain, path)):
        PreferenceDataModule(first, str(tmp_path / "chat"), batch_size=2).setup()
        with pytest.raises(DataError, match="some prompts are text and some are messages"):
            PreferenceDataModule(first, str(tmp_path / "chat"), second, batch_size=2).setup()


@pytest.mark.parametrize(
    "change",
    ["content", "template", "column", "tokenizer", "option", "code", "subclass", "attribute", "function"],
)
def test_whatever_changes_a_row_makes_it_anew(
    change: str, tmp_path: Path, policy_path: Path, rendered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tokenizer, kind = write(tmp_path, ROWS), policy_path, PromptDataModule
    options: dict[str, Any] = {}
    batches(kind, path, tokenizer)
    if change == "content":
        stat = Path(path).stat()
        write(tmp_path, [{**ROWS[0], "n": 9}, *ROWS[1:]])
        import os

        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # of the same length and time
    elif change == "template":
        options["template"] = "Q {prompt}"
    elif change == "column":
        options["prompt_column"] = "chosen"
    elif change == "tokenizer":
        tokenizer = tmp_path / "other"
        make_tokenizer(bos=False).save_pretrained(tokenizer)
    elif change == "option":
        options["loading"] = LoadingConfig(response_marker="Answer:")
    elif change in ("attribute", "function"):
        kind = Suffixed
        monkeypatch.setattr(Suffixed, "suffix", "1" if change == "attribute" else lambda prompt: "1")
        batches(kind, path, tokenizer)
        rendered[:] = rendered[:6]
        monkeypatch.setattr(Suffixed, "suffix", "2" if change == "attribute" else lambda prompt: "2")
    elif change == "code":
        monkeypatch.setattr(preparation, "version", lambda name: "another")
    else:

        class Shouted(PromptDataModule):
            def _make_example(self, row: Any, where: str) -> Any:
                return super()._make_example({**row, "prompt": row["prompt"].upper()}, where)

        kind = Shouted
    found = batches(kind, path, tokenizer, **options)
    assert len(rendered) == 12
    if kind is Suffixed:
        assert found[0].prompts == ["0+0=2", "1+1=2"]


def test_two_classes_of_one_file_do_not_share_their_rows(
    tmp_path: Path, policy_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from remax_lightning.data import PromptDataModule\n\n\n" + "\n\n\n".join(
        f"class Module{number}(PromptDataModule):\n    def _make_example(self, row, where):\n"
        f"        return super()._make_example({{**row, 'prompt': '{number}' + row['prompt']}}, where)"
        for number in (1, 2)
    )
    (tmp_path / "own_data_modules.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    own, path = importlib.import_module("own_data_modules"), write(tmp_path, ROWS)
    assert batches(own.Module1, path, policy_path)[0].prompts == ["10+0=", "11+1="]
    assert batches(own.Module2, path, policy_path)[0].prompts == ["20+0=", "21+1="]


def test_a_class_that_a_function_makes_is_not_cached(tmp_path: Path, policy_path: Path, cache: Path) -> None:
    """It may read variables of the function, which no file tells."""

    def made(prefix: str) -> Any:
        class Prefixed(PromptDataModule):
            def _make_example(self, row: Any, where: str) -> Any:
                return super()._make_example({**row, "prompt": prefix + row["prompt"]}, where)

        return Prefixed

    for prefix in "12":
        assert batches(made(prefix), write(tmp_path, ROWS), policy_path)[0].prompts[0] == f"{prefix}0+0="
    assert not cache.exists()


def test_what_changes_no_row_does_not(tmp_path: Path, policy_path: Path, rendered: list[str]) -> None:
    path = write(tmp_path, ROWS)
    batches(PromptDataModule, path, policy_path)
    moved = tmp_path / "elsewhere.json"
    Path(path).rename(moved)
    loading = LoadingConfig(long_prompts="error", on_bad_row="drop")
    options = {"batch_size": 3, "max_prompt_length": 7, "seed": 1, "loading": loading}
    found = batches(PromptDataModule, str(moved), policy_path, **options)
    assert len(rendered) == 6
    assert [row["n"] for batch in found for row in batch.rows] == list(range(6))
    with pytest.raises(DataError, match=r"elsewhere\.json, line 1: 5 tokens, over data\.max_prompt_length=4"):
        batches(PromptDataModule, str(moved), policy_path, max_prompt_length=4, loading=loading)


def test_a_template_that_writes_the_date_is_asked_again_the_next_day(
    tmp_path: Path, rendered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ strftime_now('%d') }}" + CHAT
    make_tokenizer(chat_template=template).save_pretrained(tmp_path / "chat")
    path = write(tmp_path, [{"prompt": [{"role": "user", "content": "1"}]}] * 2)

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) + datetime.timedelta(days=1)

    batches(PromptDataModule, path, tmp_path / "chat")
    batches(PromptDataModule, path, tmp_path / "chat")
    assert len(rendered) == 2
    monkeypatch.setattr(preparation, "datetime", Tomorrow)
    batches(PromptDataModule, path, tmp_path / "chat")
    assert len(rendered) == 4


def test_a_file_that_is_cut_off_is_made_anew(tmp_path: Path, policy_path: Path, cache: Path) -> None:
    path = write(tmp_path, ROWS)
    first = batches(PromptDataModule, path, policy_path)
    [file] = cache.iterdir()
    data = file.read_bytes()
    for broken in (data[: len(data) // 2], b"", data[:-1]):
        file.unlink()
        file.write_bytes(broken)
        assert all(map(same, batches(PromptDataModule, path, policy_path), first))
        assert file.read_bytes() == data


def test_a_folder_that_cannot_be_written_costs_the_cache_alone(tmp_path: Path, policy_path: Path, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file in the place of the folder")
    with pytest.warns(UserWarning, match=r"prepared rows are not kept for the next run: .*HF_DATASETS_CACHE"):
        found = batches(PromptDataModule, write(tmp_path, ROWS), policy_path)
    assert [row for batch in found for row in batch.rows] == ROWS


def test_rows_in_many_batches_keep_their_places(
    tmp_path: Path, policy_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (preparation, records):
        monkeypatch.setattr(module, "BATCH_SIZE", 4)
    rows: list[Any] = [{"prompt": "1" * (1 + n % 3), "n": n} for n in range(11)]
    rows[5] = {"other": "x"}
    rows[9] = {"prompt": 3}
    path = write(tmp_path, rows)
    with pytest.raises(DataError, match=r"line 6: there is no column 'prompt'"):
        batches(PromptDataModule, path, policy_path)
    for _ in range(2):  # made, and taken from the cache
        with pytest.warns(
            UserWarning,
            match=r"rows\.jsonl: dropped 2 of 11 rows \(data\.loading\.on_bad_row\): 1 there is no column 'prompt', 1"
            " column 'prompt' must be text or messages",
        ):
            found = batches(PromptDataModule, path, policy_path, loading=LoadingConfig(on_bad_row="drop"))
        numbers = [row["n"] for batch in found for row in batch.rows]
        assert numbers == [0, 1, 2, 3, 4, 6, 7, 8, 10]
        assert [index for batch in found for index in batch.indices] == numbers
        assert [prompt for batch in found for prompt in batch.prompts] == [rows[n]["prompt"] for n in numbers]
    with pytest.raises(DataError, match=r"^.*rows\.jsonl, line 6: there is no column 'prompt'"):
        batches(PromptDataModule, path, policy_path)


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"images": ["a.png"]}, "'images'"),
        ({"image": "a.png", "documents": [{"text": "b"}]}, "'image' and 'documents'"),
        ({"system": "Answer in Latin."}, "'system'"),
        ({"tools": '[{"name": "weather"}]', "chat_template_kwargs": {"a": 1}}, "'tools' and 'chat_template_kwargs'"),
    ],
)
def test_a_part_of_the_question_that_the_policy_is_not_shown_is_told(
    columns: dict[str, Any], named: str, tmp_path: Path, policy_path: Path
) -> None:
    path = write(tmp_path, [ROWS[0], {**ROWS[1], **columns}])
    with pytest.warns(UserWarning, match=f"rows.jsonl: the policy is not shown what column {named} holds"):
        batches(PromptDataModule, path, policy_path)
    empty = write(tmp_path, [{**row, **dict.fromkeys(columns)} for row in ROWS[:2]], "empty.jsonl")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is not shown")
        batches(PromptDataModule, empty, policy_path)


def test_one_line_counts_what_cannot_be_read_or_used(tmp_path: Path, policy_path: Path) -> None:
    path = write(tmp_path, [ROWS[0], {"prompt": " "}, {"prompt": ""}, ROWS[1]])
    with Path(path).open("a") as file:
        file.write("{\n")
    data = PromptDataModule(path, str(policy_path), batch_size=1, loading=LoadingConfig(on_bad_row="drop"))
    said = r"dropped 3 of 5 rows .*: 2 the prompt in column 'prompt' is empty, 1 not valid JSON$"
    with pytest.warns(UserWarning, match=said):
        data.setup()
    assert (data.num_rows, data.num_left_out) == (5, 3)
    bad = write(tmp_path, [{"prompt": ""}] * 3, "bad.jsonl")
    with pytest.raises(DataError, match=r"not one of 3 rows can be used: 3 the prompt .*The first is .*line 1: the"):
        PromptDataModule(bad, str(policy_path), loading=LoadingConfig(on_bad_row="drop")).setup()


@pytest.mark.parametrize("cached", [True, False])
def test_what_json_cannot_hold_reaches_the_reward_as_it_is(cached: bool, tmp_path: Path) -> None:
    """Dates, tuples and objects of a user's own come from the data set; the rest of the row does, too."""
    make_tokenizer(chat_template=CHAT).save_pretrained(tmp_path / "chat")
    thing = object()
    extra = [datetime.date(2026, 1, 2), (1, 2), {1: 2, "a": 3}, thing, b"x", "text"]
    rows = [{"prompt": [{"role": "user", "content": f"{n}"}], "extra": value} for n, value in enumerate(extra)]
    data = PromptDataModule(
        data=rows, val_data=rows, tokenizer=str(tmp_path / "chat"), loading=LoadingConfig(cache=cached)
    )
    data.setup("validate")
    (batch,) = data.val_dataloader()
    assert [row["extra"] for row in batch.rows] == extra
    assert batch.rows[3]["extra"] is thing
    assert [prompt.conversation.messages[0]["content"] for prompt in batch.prompts] == list("012345")


def test_rows_that_stand_in_their_records_are_let_go(tmp_path: Path, policy_path: Path) -> None:
    data = PromptDataModule(write(tmp_path, ROWS), str(policy_path), batch_size=2)
    data.setup()
    assert data._train is not None
    assert not data._train.examples.rows.values  # type: ignore[attr-defined]


def test_many_rows_have_one_line_off_a_terminal(
    tmp_path: Path, policy_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, capsys: Any
) -> None:
    monkeypatch.setattr(preparation, "LONG_ENOUGH", 5)
    path = write(tmp_path, ROWS)
    for said in (r"rows.jsonl: prepared 6 rows in 0 s", "rows.jsonl: took 6 prepared rows from "):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
            batches(PromptDataModule, path, policy_path)
        lines = [record.message for record in caplog.records if "prepared" in record.message]
        assert len(lines) == 1
        assert said in lines[0]
    assert "it/s" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    batches(PromptDataModule, path, policy_path, loading=LoadingConfig(cache=False))
    assert "Preparing rows: " in capsys.readouterr().err


def test_the_fingerprint_says_which_rows_are_trained_on(tmp_path: Path, policy_path: Path) -> None:
    def fingerprint(rows: list[Any], name: str = "rows.jsonl", **options: Any) -> str:
        data = PromptDataModule(write(tmp_path, rows, name), str(policy_path), **({"batch_size": 1} | options))
        data.setup()
        return data.fingerprint()

    assert fingerprint(ROWS) == fingerprint(ROWS, "other.json", template="Q {prompt}", batch_size=2)
    assert fingerprint(ROWS) != fingerprint([{**ROWS[0], "n": 9}, *ROWS[1:]])
    assert fingerprint(ROWS) != fingerprint(ROWS[::-1])
    assert fingerprint(ROWS, val_size=2) != fingerprint(ROWS, val_size=2, seed=1)
    longer = [*ROWS, {"prompt": "1" * 30}]
    assert fingerprint(longer, max_prompt_length=20) != fingerprint(longer)
    with pytest.raises(RuntimeError, match="setup must run"):
        PromptDataModule("x", "y").fingerprint()


def test_one_process_of_several_prepares_for_all(tmp_path: Path, policy_path: Path, rendered: list[str]) -> None:
    class Trainer:
        world_size, global_rank = 2, 0

        class state:  # noqa: N801
            fn = "fit"

    path = write(tmp_path, ROWS)
    for rank in range(2):
        data = PromptDataModule(path, str(policy_path), val_size=2, batch_size=1)
        data.trainer = Trainer()  # type: ignore[assignment]
        if rank == 0:
            data.prepare_data()
            assert len(rendered) == 6
        data.setup("fit")
    assert len(rendered) == 6
    bad = PromptDataModule(write(tmp_path, [{"prompt": ""}], "bad.jsonl"), str(policy_path))
    bad.trainer = Trainer()  # type: ignore[assignment]
    bad.prepare_data()
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1: the prompt in column 'prompt' is empty"):
        bad.setup("fit")


def test_examples_of_a_file_are_pickled_without_their_records(tmp_path: Path, policy_path: Path) -> None:
    """Worker processes that are not forked get the data set pickled."""
    path = write(tmp_path, [{**row, "prompt": row["prompt"] + "1" * 400} for row in ROWS])
    sizes = {}
    for cached in (True, False):
        loading = LoadingConfig(cache=cached)
        data = PromptDataModule(path, str(policy_path), batch_size=2, loading=loading)
        data.setup()
        assert data._train is not None
        text = pickle.dumps(data._train)
        assert list(pickle.loads(text).examples) == list(data._train.examples)
        sizes[cached] = len(text)
    assert sizes[True] < sizes[False] / 2


def test_a_class_of_a_notebook_is_not_cached(
    tmp_path: Path, policy_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its source is in no file, so that nobody could tell whether it has changed."""
    cell: dict[str, Any] = {"__name__": "cell", "PromptDataModule": PromptDataModule}
    monkeypatch.setitem(sys.modules, "cell", types.ModuleType("cell"))
    exec("class Cell(PromptDataModule): ...", cell)
    assert [row for batch in batches(cell["Cell"], write(tmp_path, ROWS), policy_path) for row in batch.rows] == ROWS
    assert not cache.exists()
