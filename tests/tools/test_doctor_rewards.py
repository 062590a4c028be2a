"""Checks of the reward and of memory by `remax doctor`: each fails on a fault that was planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from helpers.cli import changed, write_config
from helpers.doctor import PROMPTS, TURNS, ask, healthy, loaded, preferred, supervised, with_reward_model
from helpers.reward_models import CHAT
from helpers.training import write_rows

from remax_lightning.rewards import ClassifierReward, Reward, WeightedReward
from remax_lightning.tools.doctor import DoctorContext, load_context, memory
from remax_lightning.tools.doctor.command import run_checks

pytestmark = pytest.mark.slow  # every context loads a policy, a reference and a reward model

PLAIN = "{prompt}{response}{eos}"


@pytest.fixture(scope="module")
def well(tmp_path_factory: pytest.TempPathFactory) -> DoctorContext:
    folder = tmp_path_factory.mktemp("well")
    return loaded(folder, with_reward_model(healthy(folder), folder))


def with_template(folder: Path, **options: Any) -> DoctorContext:
    return loaded(folder, with_reward_model(healthy(folder), folder, **options))


def last_column(model: Any, input_ids: torch.Tensor, mask: torch.Tensor, types: Any = None) -> torch.Tensor:
    """Read the score in the last column, as if there were no padding."""
    hidden = model.base_model(input_ids, attention_mask=mask).last_hidden_state[:, -1]
    scores: torch.Tensor = model.score(hidden)[:, 0].float()
    return scores


def test_healthy(well: DoctorContext) -> None:
    for name in ("reward_template", "reward_truncation", "reward_padding", "reward_spread", "memory"):
        assert ask(well, name).status == "pass", ask(well, name)
    assert "reads '<s>user: 7+49=" in ask(well, "reward_template").measured


class Compares(Reward):
    """Compares tokens with the greedy response, as a judge compares texts."""

    compares = True

    def score(self, prompts: Any, responses: Any, rows: Any) -> Any:
        return [[float(response == response.baseline)] * len(response.token_ids) for response in responses]


def test_a_reward_reads_responses_with_tokens_and_greedy_response(
    well: DoctorContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(well, "reward", Compares())
    assert ask(well, "reward_padding").status == "pass"
    assert ask(well, "reward_spread").values["spread"] > 0


# What the reward model reads


def test_another_template_than_it_was_trained_with(tmp_path: Path) -> None:
    config = with_reward_model(healthy(tmp_path), tmp_path, template="{prompt} {response}{eos}")
    file = tmp_path / "reward" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"reward_template": PLAIN}))
    found = ask(loaded(tmp_path, config), "reward_template")
    assert found.status == "fail"
    assert f"it was trained with {PLAIN!r}" in found.measured
    right = loaded(tmp_path, config, model__init_args__reward__init_args__template=PLAIN)
    assert ask(right, "reward_template").status == "pass"


def test_a_chat_template_that_leaves_the_response_out(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template="<s>{{ messages[0]['content'] }}</s>")
    path = write_config(tmp_path / "run.yaml", with_reward_model(healthy(tmp_path), tmp_path, tokenizer=tokenizer))
    findings = {result.name: result for result in run_checks(load_context(["--config", path], num_prompts=4))}
    assert findings["reward"].status == "fail"
    assert "leaves out message 1 (role 'assistant')" in findings["reward"].measured


def test_a_text_without_the_response(well: DoctorContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(well.reward, "text", lambda prompt, response, row: f"<s>{prompt}</s>")
    found = ask(well, "reward_template")
    assert found.status == "fail"
    assert "do not contain their response" in found.measured


def in_other_place(prompt: str, response: str, row: dict[str, Any]) -> str:
    """The response as the answer to a later question of the row, after the right one."""
    return f"<s>user: {prompt}\nassistant: yes\nuser: {row.get('prompt', '')[::-1]}?\nassistant: {response}\n</s>"


def to_other_question(prompt: str, response: str, row: dict[str, Any]) -> str:
    """The row's column, whatever the policy has read."""
    return f"<s>user: what else?\nassistant: {response}\n</s>"


@pytest.mark.parametrize("text", [in_other_place, to_other_question])
def test_a_response_that_answers_something_else(well: DoctorContext, monkeypatch: Any, text: Any) -> None:
    monkeypatch.setattr(well.reward, "text", text)
    found = ask(well, "reward_template")
    assert found.status == "fail"
    assert "do not have the last message of the prompt just before the response" in found.measured


@pytest.mark.parametrize("column", ["prompt", "conversation"])
def test_messages_in_any_column_reach_the_reward_model(tmp_path: Path, column: str) -> None:
    config = with_reward_model(healthy(tmp_path), tmp_path)
    make_tokenizer(chat_template=TURNS).save_pretrained(tmp_path / "policy")
    start, other = [{"role": "system", "content": "be brief"}], [{"role": "user", "content": "what else?"}]
    rows = ({column: [*start, {"role": "user", "content": prompt}], "messages": other} for prompt in PROMPTS)
    write_rows(tmp_path / "rows.jsonl", rows)
    found = ask(loaded(tmp_path, config, data__init_args__prompt_column=column), "reward_template")
    assert found.status == "pass", found
    assert "reads '<s>system: be brief\\nuser: " in found.measured


@pytest.mark.parametrize(
    ("template", "status", "measured"),
    [
        (PLAIN, "pass", "reads '7+49="),
        ("<s><s>" + PLAIN, "fail", "begin with two BOS"),
        ("{prompt}{response}", "warn", "it ends without a special token"),
    ],
)
def test_how_the_text_begins_and_ends(tmp_path: Path, template: str, status: str, measured: str) -> None:
    found = ask(with_template(tmp_path, template=template), "reward_template")
    assert found.status == status
    assert measured in found.measured


def test_a_chat_template_without_bos(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=CHAT.removeprefix("<s>"))
    found = ask(with_template(tmp_path, tokenizer=tokenizer), "reward_template")
    assert found.status == "warn"
    assert "begin without the tokenizer's BOS" in found.measured


def test_the_policys_template_inside_of_the_reward_models(tmp_path: Path) -> None:
    config = changed(with_reward_model(healthy(tmp_path), tmp_path), data__init_args__template="Q: {prompt}")
    found = ask(loaded(tmp_path, config), "reward_template")
    assert found.status == "warn"
    assert "it contains data.template inside its own template" in found.measured


def test_special_tokens_of_the_policy_that_mean_nothing_to_the_reward_model(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<pad>"
    config = with_reward_model(healthy(tmp_path), tmp_path, tokenizer=tokenizer, template=PLAIN)
    make_tokenizer(chat_template=TURNS).save_pretrained(tmp_path / "policy")
    write_rows(tmp_path / "rows.jsonl", ({"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS))
    found = ask(loaded(tmp_path, config), "reward_template")
    assert found.status == "warn"
    assert "'</s>' are special tokens of the policy but plain text to it" in found.measured


@pytest.mark.parametrize(("length", "status"), [(256, "pass"), (33, "warn"), (8, "fail")])
def test_conversations_that_are_cut(tmp_path: Path, length: int, status: str) -> None:
    context = with_template(tmp_path, max_length=length)
    found = ask(context, "reward_truncation")
    assert found.status == status, found
    assert isinstance(context.reward, ClassifierReward)
    assert context.reward.num_truncated == 0  # what a run counts is its own


def test_the_models_in_a_weighted_sum_are_looked_at(well: DoctorContext, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(well.reward, ClassifierReward)
    context = DoctorContext(well.args, well.module, well.data, well.trainer, 12)
    context.reward = WeightedReward({"model": well.reward})
    monkeypatch.setattr(well.module.worker, "reward", context.reward)
    monkeypatch.setattr(well.reward, "max_length", 8)
    assert ask(context, "reward_truncation").status == "fail"


# Its scores


def test_a_score_that_is_read_in_the_padding(well: DoctorContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(well.reward, "_pooling", last_column)
    found = ask(well, "reward_padding")
    assert found.status == "fail"
    assert found.measured.startswith("alone, scores change by")


def test_a_reward_model_in_training_that_is_read_in_the_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = loaded(tmp_path, preferred(tmp_path))
    assert ask(context, "reward_padding").status == "pass"
    monkeypatch.setattr(context.module, "_pooling", last_column)
    assert ask(context, "reward_padding").status == "fail"


COMPANY = {"Dice": "again", "Places": "alone", "Ranks": "alone", "Turns": "in another order"}


@pytest.mark.parametrize(("kind", "company"), COMPANY.items())
def test_a_reward_that_depends_on_more_than_its_response(tmp_path: Path, kind: str, company: str) -> None:
    reward = {"class_path": f"helpers.doctor.{kind}"}
    found = ask(loaded(tmp_path, changed(healthy(tmp_path), model__init_args__reward=reward)), "reward_padding")
    assert found.status == "fail"
    assert company in found.measured


class Constant(Reward):
    def __init__(self, *values: float) -> None:
        self.values = values

    def score(self, prompts: Any, responses: Any, rows: Any) -> list[float]:
        return [self.values[index % len(self.values)] for index in range(len(responses))]


def test_a_constant_reward(well: DoctorContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(well.module.worker, "reward", Constant(0.5))
    found = ask(well, "reward_spread")
    assert found.status == "fail"
    assert found.values == {"spread": 0, "mean": 0.5, "as_the_baseline": 1}


def test_rewards_that_are_those_of_the_greedy_responses(well: DoctorContext, monkeypatch: pytest.MonkeyPatch) -> None:
    class OfPrompts(Reward):
        def score(self, prompts: Any, responses: Any, rows: Any) -> list[float]:
            return [float(len(prompt)) for prompt in prompts]

    monkeypatch.setattr(well.module.worker, "reward", OfPrompts())
    found = ask(well, "reward_spread")
    assert found.status == "warn"
    assert found.values["as_the_baseline"] == 1


def test_a_reward_that_is_not_finite(well: DoctorContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(well.module.worker, "reward", Constant(float("nan"), 1.0))
    for name in ("reward_padding", "reward_spread"):
        found = ask(well, name)
        assert found.status == "fail"
        assert "nan at index 0" in found.measured


# Memory


@pytest.mark.parametrize("stage", [healthy, supervised, preferred])
def test_memory_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Any) -> None:
    context = loaded(tmp_path, stage(tmp_path))
    monkeypatch.setattr(memory, "host_memory", lambda: None)
    assert ask(context, "memory").status == "skip"
    monkeypatch.setattr(memory, "host_memory", lambda: 1e5)
    found = ask(context, "memory")
    assert found.status == "fail"
    assert "configs/strategies" in found.fix
    if stage is not healthy:  # weights, gradients and AdamW's two moments in 32 bits
        count = sum(each.numel() for each in context.module.trained_model.parameters())
        assert found.values["least"] == 16 * count


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"trainer__accelerator": "gpu"}, "and this machine has no GPU to compare with"),
        (
            {"trainer__strategy": {"class_path": "remax_lightning.strategies.ReMaxFSDP2Strategy"}},
            "in one process, and trainer.strategy spreads them over the devices",
        ),
        ({"trainer__strategy": "deepspeed_stage_2"}, "and trainer.strategy spreads them over the devices"),
    ],
)
def test_memory_of_another_machine_is_not_judged_by_that_of_this_one(
    options: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr("lightning.pytorch.strategies.deepspeed._DEEPSPEED_AVAILABLE", False)
    context = loaded(tmp_path, supervised(tmp_path), **options)
    monkeypatch.setattr(memory, "host_memory", lambda: 1e5)
    found = ask(context, "memory")
    assert (found.status, found.fix) == ("skip", "")
    assert found.measured.endswith(reason)


def test_processes_share_the_memory_of_their_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = loaded(tmp_path, healthy(tmp_path))
    peak = ask(context, "memory").values["peak"]
    monkeypatch.setattr(memory, "host_memory", lambda: 1.5 * peak / 0.9)
    assert ask(context, "memory").status == "pass"
    assert ask(loaded(tmp_path, healthy(tmp_path), trainer__devices=2), "memory").status == "fail"


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CONTROL_GROUP", limit)
    whole = memory.host_memory()
    assert whole is not None
    limit.write_text("max\n")
    assert memory.host_memory() == whole
    limit.write_text("1000000\n")
    assert memory.host_memory() == 1e6
