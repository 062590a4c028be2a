"""YAML within bounds: what a text stands for, how deep it is, and keys that stand twice, wherever YAML is read."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.cli import changed, in_folder, misread, remax_parser, small_config, write_config

from remax_lightning.errors import UserError
from remax_lightning.tools.export import read_run
from remax_lightning.yaml_files import MAX_CHARACTERS, MAX_DEPTH, load_yaml, read_yaml

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)
)
"""A text of 500 characters that stands for 10^10 values."""
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{', '.join(['*' + chr(97 + i)] * 10)}]}}\n" for i in range(9)
)
REFUSED = {
    "a key that stands twice": ("a: 1\nb: 2\na: 3\n", "the key 'a' stands twice, in lines 1 and 3; remove one"),
    "one within": ("a:\n  b:\n    c: 1\n    c: 2\n", "the key 'c' stands twice, in lines 3 and 4"),
    "one in a list": ("- {c: 1, d: 2, c: 3}\n", "the key 'c' stands twice, in line 1"),
    "one with quotes": ("a: 1\n'a': 3\n", "the key 'a' stands twice, in lines 1 and 2"),
    "one of JSON": ('{"a": 1,\n "a": 2}', "the key 'a' stands twice, in lines 1 and 2"),
    "several": ("a: 1\nb: 1\na: 1\nb: 1\n", "in lines 1 and 3; the key 'b' stands twice, in lines 2 and 4"),
    "aliases of aliases": (LAUGHS, "it stands for more than 100,000 values"),
    "aliases as keys that are merged": (MERGED, "stands for more than 100,000 values"),
    "an alias that holds itself": ("a: &a [1, *a]\n", "line 1: the alias *a holds itself"),
    "many values": (f"a: [{'1, ' * 100_001}]", "stands for more than 100,000 values"),
    "depth": ("[" * 100_000, f"line 1: nested too deeply, more than {MAX_DEPTH}"),
    "depth in blocks": ("\n".join(f"{' ' * i}a:" for i in range(100)), "line 65: nested too deeply"),
    "size": ("a: " + "x" * MAX_CHARACTERS, "characters are too many"),
    "a number of 5000 digits": ("a: " + "1" * 5000, "4300 digits"),
    "a tag that calls": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "no YAML": ("a: [1\nb: 2", "run.yaml, line 2, column 2: not valid YAML"),
}


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("case", REFUSED)
def test_a_text_beyond_the_bounds_is_refused_at_once(case: str) -> None:
    text, expected = REFUSED[case]
    started = time.monotonic()
    with pytest.raises(yaml.YAMLError) as error:
        load_yaml(text, "run.yaml")
    assert expected in str(error.value)
    assert str(error.value).startswith("run.yaml")
    assert time.monotonic() - started < 60  # a busy machine; unbounded, they take hours or all memory


def test_the_parsers_own_limit_of_depth_is_told_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of libyaml since PyYAML 6.0.4: it is met while the text is scanned, before the first event."""
    mark = yaml.Mark("run.yaml", 0, 2, 0, None, None)
    error = yaml.scanner.ScannerError("while increasing flow level", mark, "exceeded maximum nesting depth", mark)

    def parse(*_: Any, **__: Any) -> Any:
        raise error
        yield

    monkeypatch.setattr(yaml, "parse", parse)
    with pytest.raises(yaml.YAMLError, match=r"^run.yaml, line 3: nested too deeply, more than 64 lists and groups"):
        load_yaml("a: 1\nb: 2\nc: " + "[" * 3000, "run.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n",
        "a: {x: 1}\nb: {x: 1}\n",
        "[{x: 1}, {x: 1}]",
        "a: &a [1]\nb: *a\n",
        "a: b\n",
        "5",
        "",
        "a: 'x: 1\n  x: 2'\n",
        "? [a, b]\n: 1\n? [a, c]\n: a\n",
    ],
)
def test_what_is_within_them_is_read_as_before(text: str) -> None:
    try:
        expected = yaml.safe_load(text)
    except yaml.YAMLError:
        with pytest.raises(yaml.YAMLError):
            load_yaml(text)
    else:
        assert load_yaml(text) == expected


def test_a_file_is_measured_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    with file.open("wb") as stream:
        stream.truncate(10**12)  # a sparse file: reading it would take all memory
    with pytest.raises(yaml.YAMLError, match=r"1,000,000,000,000 bytes are too many"):
        read_yaml(file)


TWICE = "{top_k: 1, top_k: 2}"
PLACES: dict[str, Callable[[Path], list[str]]] = {
    "a file": lambda folder: ["--config", text_file(folder, f"model:\n  sampling: {TWICE}\n")],
    "a text in place of a file": lambda _: ["--config", f"{{model: {{sampling: {TWICE}}}}}"],
    "a value": lambda _: ["--model.sampling", TWICE],
    "a value behind a sign": lambda _: [f"--model.sampling={TWICE}"],
    "a file of a group": lambda folder: ["--model.sampling", text_file(folder, "top_k: 1\ntop_k: 2\n")],
    "a file of the trainer": lambda folder: ["--trainer", text_file(folder, "top_k: 1\ntop_k: 2\n")],
    "a file that a file names": lambda folder: [
        "--config",
        write_config(folder / "outer.yaml", {"model": {"sampling": text_file(folder, "top_k: 1\ntop_k: 2\n")}}),
    ],
    "a file of JSON": lambda folder: ["--config", text_file(folder, '{"model": {"top_k": 1, "top_k": 2}}', "a.json")],
}


def text_file(folder: Path, text: str, name: str = "more.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_so_it_is_wherever_the_command_reads_yaml(
    place: str, tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "run.yaml", small_config(tmp_path, policy_path))
    with in_folder(tmp_path), pytest.raises(SystemExit) as end:
        remax_parser().parse_args(["fit", "--config", path, *PLACES[place](tmp_path)])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert "the key 'top_k' stands twice" in said
    assert said.count("\n") == 1


def test_a_large_file_and_a_binary_one_are_no_configurations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_CHARACTERS + 1))
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    for name, expected in (("large", "bytes are too many for a configuration"), ("binary", "no text in UTF-8")):
        with pytest.raises(SystemExit):
            remax_parser().parse_args(["fit", "--config", str(tmp_path / f"{name}.yaml")])
        said = capsys.readouterr().err
        assert f"{name}.yaml: " in said
        assert expected in said


@pytest.mark.slow
@pytest.mark.parametrize("key", ["model", "model.sampling", "model.reward", "samples", "trainer.logger"])
@pytest.mark.parametrize("in_yaml", [False, True])
def test_a_file_of_a_group_is_measured_before_it_is_read(
    key: str, in_yaml: bool, tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "group.yaml").open("wb") as stream:
        stream.truncate(10**12)
    config = small_config(tmp_path, policy_path)
    arguments = [] if in_yaml else [f"--{key}", "group.yaml"]
    if in_yaml:
        config = changed(config, **{key.replace(".", "__"): "group.yaml"})
    path = write_config(tmp_path / "run.yaml", config)
    with in_folder(tmp_path), pytest.raises(SystemExit):
        remax_parser().parse_args(["fit", "--config", path, *arguments])
    assert f"{key}: group.yaml: 1,000,000,000,000 bytes are too many" in capsys.readouterr().err


@pytest.mark.slow
def test_control_characters_of_a_value_are_written_out(tmp_path: Path, policy_path: Path, capsys: Any) -> None:
    config = small_config(tmp_path, policy_path)
    path = write_config(tmp_path / "run.yaml", changed(config, model__kl_coef="\x1b]0;title\x07\x1b[2J"))
    with in_folder(tmp_path), pytest.raises(SystemExit):
        remax_parser().parse_args(["fit", "--config", path])
    said = capsys.readouterr().err
    assert "model.kl_coef: expected a number" in said
    assert "\x1b" not in said
    assert "\\x1b]0;title" in said


TOGETHER: dict[str, tuple[dict[str, Any], list[str]]] = {
    "the module and a group of it": (
        {"model__kl_coef": -1, "model__sampling__temperature": 0, "model__loss": {"clip_range": 2}},
        ["model.kl_coef: must be 0", "model.sampling.temperature: must be", "model.loss.clip_range: must be"],
    ),
    "the data, a callback and a key": (
        {"data__batch_size": 0, "samples": {"num_samples": 0}, "model__kl_coeff": 1},
        ["data.batch_size: must be at least 1", "samples.num_samples: must be", "model.kl_coeff: there is no such key"],
    ),
    "the trainer and the module": (
        {"trainer__accelerator": "gppu", "model__stall_timeout": -1},
        ["trainer: You selected an invalid accelerator name: `accelerator='gppu'`", "model.stall_timeout: must be"],
    ),
    "the strategy and the module": (
        {"trainer__strategy": "ddpp", "model__stall_timeout": -1},
        ["trainer.strategy: there is no strategy 'ddpp'; did you mean ddp?", "model.stall_timeout: must be null"],
    ),
    "a reward and the data": (
        {"model__reward__init_args__function": "json.nothing", "data__max_prompt_length": 0},
        ["model.reward.init_args.function", "data.max_prompt_length: must be at least 1"],
    ),
    "an adapter and what depends on it": (
        {"model__policy__lora": {"r": 0}, "model__advantage": {"baseline": "leave_one_out", "gamma": 0}},
        [
            "model.policy.lora.r: must be",
            "model.advantage.gamma: must be",
            "model.advantage.baseline leave_one_out needs",
        ],
    ),
    "a batch, and its parts that would not divide the default": (
        {"data__batch_size": 0, "data__micro_batch_size": 6},
        ["data.batch_size: must be at least 1, got 0"],
    ),
    "parts that do not divide a batch": (
        {"data__micro_batch_size": 3},
        ["data.micro_batch_size: must divide data.batch_size 4, got 3; choose a divisor"],
    ),
    "a part of a reward": (
        {"model__reward": {"class_path": "WeightedReward", "init_args": {"parts": {"web": {
            "class_path": "HTTPReward", "init_args": {"url": "http://localhost", "retries": -1}}}}}},
        ["model.reward.init_args.parts.web.init_args.retries: must be 0 or more, got -1"],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", TOGETHER)
def test_what_constructors_refuse_is_told_together(
    case: str, tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values, expected = TOGETHER[case]
    said = misread(changed(small_config(tmp_path, policy_path), **values), tmp_path, capsys)
    lines = [line.strip() for line in said.splitlines()]
    assert [text for text in expected if not any(line.startswith(text) for line in lines)] == []
    assert len(lines) == len(expected)


@pytest.mark.slow
def test_a_group_that_is_refused_counts_with_its_values_around_it(
    tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two samples are enough for leave-one-out, though the group that says so has a mistake."""
    values = {"model__sampling": {"num_samples": 2, "temperature": 0}, "model__advantage__baseline": "leave_one_out"}
    said = misread(changed(small_config(tmp_path, policy_path), **values), tmp_path, capsys)
    assert said.startswith("model.sampling.temperature: must be above 0")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_what_is_missing_in_a_group_that_was_left_out_is_no_mistake(
    tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": 3}}
    said = misread(changed(small_config(tmp_path, policy_path), model__lr_scheduler=schedule), tmp_path, capsys)
    assert "model.lr_scheduler.lr_lambda: " in said
    assert "missing" not in said


@pytest.mark.parametrize("text", [LAUGHS, "model: {}\nmodel: {}\n"])
def test_the_configuration_of_a_run_is_read_within_them(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"stands for more than|stands twice"):
        read_run(tmp_path / "config.yaml")


def told(arguments: Any, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of the message about these arguments."""
    with pytest.raises(SystemExit) as end:
        remax_parser().parse_args(["fit", *arguments])
    assert end.value.code == 2
    return capsys.readouterr().err.removeprefix("remax: error: ").splitlines()


@pytest.mark.slow
def test_mistakes_of_all_kinds_are_told_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "model": {
            "policy": {"pth": "x"},
            "klcoef": 3,
            "sampling": {"temperature": 0},
            "advantage": {"baseline": "gredy"},
        },
        "trainer": {"devices": 0, "logger": {"init_args": {"save_dir": __file__}}},
        "samples": {"every_n_steps": -1},
        "seed_everything": -1,
    }
    lines = told(["--config", write_config(tmp_path / "run.yaml", config), "--trainer.max_stepz", "3"], capsys)
    for expected in (
        "model.policy.pth: there is no such key; did you mean path?",
        "model.klcoef: there is no such key; did you mean kl_coef?",
        "model.reward: missing",
        "model.advantage.baseline: expected one of",
        "trainer.max_stepz: there is no such key; did you mean max_steps?",
        "trainer.devices: expected auto",
        "trainer.logger.init_args.save_dir: cannot write",
        "seed_everything: expected a whole number",
        "model.sampling.temperature: must be above 0",
    ):
        assert sum(line.strip().startswith(expected) for line in lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--modle.lr=3", "did you mean model?"),
        ("--trainr.max_steps=3", "did you mean trainer?"),
        ("--trainer.loger.class_path=x", "did you mean logger?"),
        ("--model.optimzer.lr=3", "did you mean optimizer?"),
        ("--data.laoding.on_bad_row=drop", "did you mean loading?"),
        ("--samplse.every_n_steps=3", "did you mean samples?"),
        ("--max_steps=3", "did you mean trainer.max_steps?"),
        ("--lr=3", "did you mean model.optimizer.init_args.lr?"),
        ("--model.lr=3", "did you mean model.optimizer.init_args.lr?"),
        ("--model.temperature=3", "did you mean model.sampling.temperature?"),
        ("--batch_size=3", "did you mean data.batch_size?"),
    ],
)
def test_a_key_in_a_wrong_group_is_named_with_the_right_one(
    argument: str, expected: str, tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "run.yaml", small_config(tmp_path, policy_path))
    [line] = told(["--config", path, argument], capsys)
    assert line.endswith(expected)
