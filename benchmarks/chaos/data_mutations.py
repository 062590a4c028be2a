"""Random mutations of valid data files of every stage, as editors, converters and strangers make them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.chaos.config_mutations import VALUES, begin, nodes
from benchmarks.chaos.runs import PROMPTS, Fixtures, configuration, write
from benchmarks.chaos.warm import Outcome, Trial


def trials(fixtures: Fixtures, seed: int, count: int) -> Iterator[Trial]:
    """Yield trials of mutated data."""
    for index in range(count):
        yield Trial("jsonl", index, seed, partial(mutate_data, fixtures))


STAGES = ("prompts", "chats", "supervised", "pairs", "predict")


def mutate_data(fixtures: Fixtures, folder: Path, rng: random.Random) -> Outcome:
    """Mutate a data file of one of the stages, and begin a run with it."""
    stage = rng.choice(STAGES)
    rows = _rows(stage)
    content = b"".join(json.dumps(row, ensure_ascii=rng.random() < 0.5).encode() + b"\n" for row in rows)
    names = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutation = rng.choice(DATA_MUTATIONS)
        content = mutation(content, rng)
        names.append(mutation.__name__.strip("_"))
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    arguments = ["predict" if stage == "predict" else "fit", "--config", _stage_config(fixtures, stage, folder, path)]
    if rng.random() < 0.3 and stage != "predict":
        arguments += ["--data.init_args.loading.on_bad_row", "drop"]
    return begin(folder, arguments, f"{stage}: {', '.join(names)}")


def _rows(stage: str) -> list[dict[str, Any]]:
    if stage == "chats":
        return [
            {"prompt": [{"role": "system", "content": "be short"}, {"role": "user", "content": f"{n}+{n}="}],
             "response": str(2 * n), "tools": None, "chat_template_kwargs": {"enable_thinking": False}}
            for n in range(PROMPTS)
        ]  # fmt: skip
    if stage == "pairs":
        return [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": "no", "margin": 0.5} for n in range(PROMPTS)]
    return [{"prompt": f"{n}+{n}=", "response": str(2 * n), "id": n, "meta": {"a": [1, 2]}} for n in range(PROMPTS)]


def _stage_config(fixtures: Fixtures, stage: str, folder: Path, path: Path) -> str:
    """Write the configuration of a stage."""
    config = configuration(fixtures, folder / "unused")
    policy = str(fixtures.chat_policy if stage == "chats" else fixtures.policy)
    model, data = config["model"], config["data"] | {"path": str(path)}
    model["policy"]["path"] = model["reference"]["path"] = policy
    kinds = {"supervised": ("SFTModule", "SFTDataModule"), "pairs": ("RewardModelModule", "PreferenceDataModule")}
    module, kind = kinds.get(stage, ("ReMaxModule", "PromptDataModule"))
    if stage == "supervised":
        model = {"policy": {"path": policy}}
        data |= {"max_response_length": 16}
        config["export"] |= {"monitor": "val/perplexity"}
    if stage == "pairs":
        model = {"reward_model": {"path": policy}}
        data |= {"max_length": 48, "pair_columns": {"margin": "margin"}}
        config["export"] |= {"monitor": "val/accuracy"}
    if stage == "chats":
        data |= {"max_prompt_length": 64}
    if stage == "predict":
        data |= {"val_path": str(path), "val_size": 0}
    del config["trainer"]["callbacks"], config["samples"]
    config |= {"model": {"class_path": module, "init_args": model}, "data": {"class_path": kind, "init_args": data}}
    return write(folder / "run.yaml", config)


CELLS: tuple[Any, ...] = (
    *VALUES, "<s></s><pad>", "é" * 30, "\U0001f600", "a\nb\r\nc", "{{ 1/0 }}", [{"role": "user"}], [{"content": "x"}],
    [{"role": "user", "content": None}], [{"role": 3, "content": "x"}], [{"role": "human", "content": "x"}],
    [{"role": "user", "content": [{"type": "image", "url": "file:///etc/passwd"}]}], [["user", "x"]],
    [{"role": "user", "content": "x", "tool_calls": 5}], [{"role": "assistant", "content": ""}], {"role": "user"},
    [{"role": "user", "content": "\ud800"}], [{"from": "human", "value": "x"}], "x" * 100_000, {"text": "x"}, [[]],
)  # fmt: skip


def cell(content: bytes, rng: random.Random) -> bytes:
    """Replace a value of a row."""

    def change(row: Any) -> Any:
        places = list(nodes(row))
        if places:
            parent, key = rng.choice(places)
            parent[key] = rng.choice(CELLS)
        return row

    return _row_changed(content, rng, change)


def column(content: bytes, rng: random.Random) -> bytes:
    """Remove, rename or double a column, in one row or in all."""
    name = rng.choice(("prompt", "response", "chosen", "rejected", "margin"))
    new = rng.choice(("", "Prompt", "prompt ", "text", "messages", "\x00", "a.b", "__index__", "1"))

    def change(row: Any) -> Any:
        if isinstance(row, dict) and name in row:
            moved = row.pop(name)
            if new:
                row[new] = moved
        return row

    if rng.random() < 0.5:
        return _row_changed(content, rng, change)
    try:
        rows = [change(json.loads(text)) for text in content.splitlines()]
    except (ValueError, RecursionError):
        return content
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def row_kind(content: bytes, rng: random.Random) -> bytes:
    """Replace a row by something that is none."""
    texts = (b"", b"null", b"[]", b"{}", b"3", b'"text"', b"nan", b"NaN", b"-Infinity", b"{", b"}", b"[[[[", b"{]",
             b"[" * 100_000, b'{"a":' * 50_000, b'{"prompt": 1e400}', b'{"prompt": ' + b"9" * 5000 + b"}", b"#", b"//",
             b'{"prompt": "a", "prompt": "b", "response": "c"}', b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\x00",
             b"prompt,response", b"<html>", b"version https://git-lfs.github.com/spec/v1", b"\x1f\x8b\x08", b"PK\x03",
             b'{"prompt": "\\ud800"}', b"{'prompt': 'a'}", b'{"prompt": "a",}', b'{"prompt": "\t"}', b" " * 10_000,
             b'\xef\xbb\xbf{"prompt": "a"}', b'{"prompt": "a"} {"prompt": "b"}')  # fmt: skip
    lines = content.split(b"\n")
    lines[rng.randrange(len(lines))] = rng.choice(texts)
    return b"\n".join(lines)


def some_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, remove or insert some bytes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 5, 50))):
        i = rng.randrange(len(data)) if data else 0
        action = rng.randrange(3)
        if action == 0 and data:
            data[i] = rng.randrange(256)
        elif action == 1 and data:
            del data[i]
        else:
            data.insert(i, rng.randrange(256))
    return bytes(data)


def end(content: bytes, rng: random.Random) -> bytes:
    """End the file early."""
    return content[: rng.randrange(len(content) + 1)]


def form(content: bytes, rng: random.Random) -> bytes:
    """Write the whole file in another form."""
    text = content.decode("utf-8", "replace")
    forms: tuple[Callable[[], bytes], ...] = (
        lambda: b"\xef\xbb\xbf" + content,
        lambda: text.encode("utf-16"),
        lambda: text.encode("utf-32"),
        lambda: text.encode("latin-1", "replace"),
        lambda: content.replace(b"\n", b"\r\n"),
        lambda: content.replace(b"\n", b"\r"),
        lambda: content.replace(b"\n", b"\n\n"),
        lambda: content.replace(b"\n", b" "),
        lambda: b"[" + content.strip().replace(b"\n", b",\n") + b"]",
        lambda: b"",
        lambda: b"\n" * 1000,
        lambda: content * 50,
        lambda: content.replace(b'"', b"'"),
        lambda: content.replace(b"\n", "\u2028".encode()),
    )
    return rng.choice(forms)()


def _row_changed(content: bytes, rng: random.Random, change: Callable[[Any], Any]) -> bytes:
    lines = content.split(b"\n")
    i = rng.randrange(len(lines))
    try:
        row = change(json.loads(lines[i]))
        lines[i] = json.dumps(row, ensure_ascii=True, default=str).encode()
    except (ValueError, RecursionError):
        return content
    return b"\n".join(lines)


DATA_MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    cell, cell, cell, cell, column, row_kind, row_kind, some_bytes, some_bytes, end, form,
)  # fmt: skip
