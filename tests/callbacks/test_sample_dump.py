from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.fakes import (
    FakeModule,
    checkpoint_at,
    events,
    make_output,
    make_responses,
    make_trainer,
    two_steps_of_two_parts,
)
from conftest import make_tokenizer

from remax_lightning.callbacks import SampleDump
from remax_lightning.errors import UserError


def lines(folder: Path, stage: str = "train") -> list[dict[str, Any]]:
    path = folder / "logs" / "samples" / f"{stage}.jsonl"

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line, parse_constant=refuse) for line in text]


def test_a_line_holds_what_the_step_saw(tmp_path: Path) -> None:
    output = make_output(3)
    output["rollout"].sampled.truncated[4] = True
    make_trainer(tmp_path, [SampleDump(every_n_steps=1)]).fit(FakeModule([output]))
    written, rollout = lines(tmp_path), output["rollout"]
    assert len(written) == 6
    line, mask = written[4], rollout.sampled.response_mask[4]
    assert rollout.baseline_reward is not None
    assert output["kl"] is not None
    assert line == {
        "step": 1,
        "stage": "train",
        "prompt": "prompt 3.2",
        "response": "response 3.4",
        "greedy_response": "greedy 3.2",
        "reward": float(rollout.reward[4]),
        "baseline_reward": float(rollout.baseline_reward[2]),
        "advantage": pytest.approx(float(output["advantages"][4][mask].mean())),
        "kl": pytest.approx(float(output["kl"][4].sum())),
        "response_length": int(mask.sum()),
        "truncated": True,
        "parts": {"half": float(rollout.reward[4]) / 2},
        "tokens": None,  # this module has no tokenizer
        "token_kl": pytest.approx(output["kl"][4][mask].tolist(), rel=1e-5),
        "token_advantages": pytest.approx(output["advantages"][4][mask].tolist(), rel=1e-5),
    }


def test_the_parts_of_a_step_are_one_dump(tmp_path: Path) -> None:
    dump = SampleDump(every_n_steps=2, num_samples=8)
    make_trainer(tmp_path, [dump], accumulate_grad_batches=2).fit(FakeModule(two_steps_of_two_parts()))
    expected = [f"response 2.{i}" for i in range(6)] + ["response 3.0", "response 3.1"]
    assert [line["response"] for line in lines(tmp_path)] == expected
    assert {line["step"] for line in lines(tmp_path)} == {2}


def test_what_does_not_exist_is_null(tmp_path: Path) -> None:
    output = make_output(0, kl=False, greedy=False)
    output["advantages"][0, 0] = float("nan")
    make_trainer(tmp_path, [SampleDump(every_n_steps=1)]).fit(FakeModule([output]))
    line = lines(tmp_path)[0]
    for name in ("greedy_response", "baseline_reward", "kl", "advantage", "tokens", "token_kl"):
        assert line[name] is None, name
    assert line["token_advantages"][0] is None
    assert None not in line["token_advantages"][1:]


def test_tokens_are_those_of_the_modules_tokenizer(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    ids = torch.full((6, 5), int(tokenizer.pad_token_id))
    ids[:, :4] = torch.tensor([*tokenizer.encode("4+2", add_special_tokens=False), tokenizer.eos_token_id])
    output = make_output(0, kl=False)
    output["advantages"] = torch.arange(30.0).reshape(6, 5)
    sampled = make_responses(["4+2"] * 6, [4, 4, 4, 4, 4, 5])._replace(response_ids=ids)
    output["rollout"] = output["rollout"]._replace(sampled=sampled)
    module = FakeModule([output], [output])
    module.tokenizer = tokenizer
    make_trainer(tmp_path, [SampleDump(every_n_steps=1)]).fit(module)
    for stage in ("train", "validation"):
        line = lines(tmp_path, stage)[1]
        assert line["tokens"] == ["4", "+", "2", ""]
        assert line["token_advantages"] == [5, 6, 7, 8]


def test_validation_is_dumped_once_each_but_not_the_sanity_check(tmp_path: Path) -> None:
    module = FakeModule([make_output(0), make_output(1)], [make_output(8), make_output(9)])
    dump = SampleDump(every_n_steps=0, num_samples=7)
    make_trainer(tmp_path, [dump], num_sanity_val_steps=2, max_epochs=2).fit(module)
    assert lines(tmp_path) == []
    written = lines(tmp_path, "validation")
    one = [f"response 8.{i}" for i in range(6)] + ["response 9.0"]
    assert [line["response"] for line in written] == one * 2
    assert [line["step"] for line in written] == [2] * 7 + [4] * 7
    assert {line["stage"] for line in written} == {"validation"}


@pytest.mark.slow(0.3)
def test_a_resumed_run_repeats_no_line(tmp_path: Path) -> None:
    def run(**arguments: Any) -> None:
        module = FakeModule([make_output(i) for i in range(6)], [make_output(9)])
        callbacks = [SampleDump(every_n_steps=1, num_samples=1), checkpoint_at(3, tmp_path)]
        trainer = make_trainer(tmp_path, callbacks, val_check_interval=3)
        trainer.fit(module, **arguments)

    run()
    train, validation = lines(tmp_path), lines(tmp_path, "validation")
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in validation] == [3, 6]
    with (tmp_path / "logs" / "samples" / "train.jsonl").open("a") as file:
        file.write('{"step": 2, "respo')  # cut short by a crash
    run(ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    assert lines(tmp_path) == train
    assert lines(tmp_path, "validation") == validation


def test_the_folder_can_be_chosen(tmp_path: Path) -> None:
    dump = SampleDump(every_n_steps=1, folder=str(tmp_path / "mine"))
    make_trainer(tmp_path, [dump], logger=False).fit(FakeModule([make_output(0)]))
    assert (tmp_path / "mine" / "train.jsonl").read_text().count("\n") == 6


def test_the_folder_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    dump = SampleDump(every_n_steps=1, folder="~/mine")
    make_trainer(tmp_path, [dump], logger=False).fit(FakeModule([make_output(0)]))
    assert (tmp_path / "home" / "mine" / "train.jsonl").is_file()
    assert not (tmp_path / "~").exists()


AWKWARD = "a | b\n<script>x</script> **bold** _it_ `c` [l](u) # \\ & &lt; é 数 \ud800"


@pytest.mark.slow(0.3)
def test_text_is_shown_as_it_is(tmp_path: Path) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    output = make_output(0)
    output["rollout"] = output["rollout"]._replace(sampled=make_responses([AWKWARD] * 6, [2] * 6))
    output["kl"], output["advantages"] = None, torch.zeros(6, 2)
    make_trainer(tmp_path, [SampleDump(every_n_steps=1, num_samples=2)]).fit(FakeModule([output]))
    assert lines(tmp_path)[0]["response"] == AWKWARD
    reader = events(tmp_path)
    assert [tag for tag in reader.Tags()["tensors"] if "samples" in tag] == [
        f"samples/train/{number}/text_summary" for number in (1, 2)
    ]
    event = reader.Tensors("samples/train/1/text_summary")[0]
    assert event.step == 1
    html = markdown_to_safe_html(event.tensor_proto.string_val[0])
    cells = re.findall(r"<td>(.*?)</td>", html, flags=re.DOTALL)
    assert len(cells) == 8 * 2  # a row per field; no bar in the text made another column
    assert not re.search(r"<(?!/?(table|thead|tbody|tr|th|td)\b)", html)
    assert cells[2] == "response"
    assert unescape(cells[3]) == AWKWARD.replace("\n", "⏎").replace("\ud800", "\\ud800")


@pytest.mark.parametrize("arguments", [{"every_n_steps": -1}, {"num_samples": 0}])
def test_bad_arguments_name_their_key(arguments: dict[str, int]) -> None:
    with pytest.raises(UserError, match=rf"samples\.{next(iter(arguments))}"):
        SampleDump(**arguments)  # type: ignore[arg-type]
