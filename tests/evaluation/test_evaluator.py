"""Validation, test and prediction: the same figures every time, and the means that they are said to be."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import PROMPTS, Recorder, fit, make_trainer, prompt_data, remax_module, save_policy

from remax_lightning.config import EvalConfig
from remax_lightning.errors import UserError
from remax_lightning.evaluation.evaluator import answer_function
from remax_lightning.evaluation.prompt_metrics import add_repeated
from remax_lightning.files import PromptRecord
from remax_lightning.modules import AdvantageConfig
from remax_lightning.rollout import SamplingConfig

PER_TOKEN = {"advantage": "advantages", "kl": "kl", "entropy": "entropy"}
"""Figures that are means over tokens, and what they are called in the output of a step."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return save_policy(folder / "policy"), save_policy(folder / "reference", noise=0.02)


def evaluate(folders: tuple[str, str], folder: Path, batch_size: int = 8, **options: Any) -> tuple[dict, Recorder]:
    recorder = Recorder()
    torch.manual_seed(0)
    trainer = make_trainer(folder, [recorder], limit_val_batches=1.0)
    module = remax_module(*folders, **options)
    (metrics,) = trainer.validate(module, prompt_data(folder, folders[0], batch_size=batch_size), verbose=False)
    return metrics, recorder


@pytest.mark.slow
def test_the_same_weights_give_the_same_figures(folders: tuple[str, str], tmp_path: Path) -> None:
    first, _ = evaluate(folders, tmp_path)
    second, _ = evaluate(folders, tmp_path)
    assert first == second
    torch.manual_seed(0)
    module, data = remax_module(*folders), prompt_data(tmp_path, folders[0])
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    again = [trainer.validate(module, data, verbose=False)[0] for _ in range(2)]
    assert again == [first, first]


@pytest.mark.slow
def test_steps_in_between_do_not_change_the_random_numbers(folders: tuple[str, str], tmp_path: Path) -> None:
    module = remax_module(*folders, optimizer=partial(torch.optim.SGD, lr=0.0))
    data = prompt_data(tmp_path, folders[0], batch_size=4)
    options = {"max_steps": 3, "max_epochs": 2, "limit_val_batches": 1.0, "val_check_interval": 1}
    recorder = fit(module, data, tmp_path, **options)
    texts = [output["rollout"].sampled.texts for output in recorder.validations]
    assert len(texts) == 6
    assert texts[:2] == texts[2:4] == texts[4:]
    trained = [output["rollout"].sampled.texts for output in recorder.outputs]
    assert sorted(trained[0] + trained[1]) != sorted(texts[0] + texts[1])


@pytest.mark.slow
def test_greedy_figures_do_not_depend_on_the_batches(folders: tuple[str, str], tmp_path: Path) -> None:
    whole, recorder = evaluate(folders, tmp_path)
    expected = recorder.validations[0]["rollout"].greedy.texts
    for size in (3, 1):
        split, parts = evaluate(folders, tmp_path, size)
        assert split["val/baseline_reward"] == pytest.approx(whole["val/baseline_reward"], abs=1e-6)
        assert split["val/reward"] != whole["val/reward"]  # other random numbers for each batch
        assert [text for output in parts.validations for text in output["rollout"].greedy.texts] == expected


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("options", [
    {"sampling": SamplingConfig(max_response_length=3)},
    {"sampling": SamplingConfig(max_response_length=3, num_samples=3)},
    {"sampling": SamplingConfig(max_response_length=3, num_samples=2),
     "advantage": AdvantageConfig(baseline="leave_one_out", overlong="penalize")},
])  # fmt: skip
def test_figures_are_means_over_responses_or_tokens(
    options: dict[str, Any], folders: tuple[str, str], tmp_path: Path
) -> None:
    metrics, recorder = evaluate(folders, tmp_path, 3, **options)  # batches of 3, 3 and 2 prompts
    per_response: dict[str, list[float]] = {}
    per_token: dict[str, list[float]] = {name: [] for name in PER_TOKEN}

    def add(name: str, values: Any) -> None:
        per_response.setdefault(name, []).extend(values.tolist())

    for output in recorder.validations:
        rollout = output["rollout"]
        assert "loss" not in output
        add("reward", rollout.reward)
        add("baseline_reward", rollout.baseline_reward)
        add("truncation_rate", rollout.sampled.truncated.float())
        add("response_length", rollout.sampled.response_mask.sum(-1))
        add("kl_per_response", output["kl"].sum(-1))
        for name, values in rollout.reward_parts.items():
            add(f"reward_part/{name}", values)
        for name, key in PER_TOKEN.items():
            for row, mask in zip(output[key].tolist(), rollout.sampled.response_mask.tolist(), strict=True):
                per_token[name] += [value for value, counted in zip(row, mask, strict=True) if counted]
    expected = {f"val/{name}": sum(v) / len(v) for name, v in {**per_response, **per_token}.items()}
    assert set(metrics) == set(expected)
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert len(per_response["baseline_reward"]) == 8
    assert 0 < expected["val/truncation_rate"] < 1


@pytest.mark.slow
def test_validation_leaves_training_alone(folders: tuple[str, str], tmp_path: Path) -> None:
    def weights(**options: Any) -> dict[str, torch.Tensor]:
        data = prompt_data(tmp_path, folders[0], batch_size=4, micro_batch_size=2)
        options |= {"accumulate_grad_batches": 2, "max_steps": 3, "max_epochs": 2}
        return fit(remax_module(*folders), data, tmp_path, **options).weights[-1]

    alone = weights()
    beside = weights(limit_val_batches=1.0, val_check_interval=1, num_sanity_val_steps=1)  # also inside a rollout batch
    assert all(torch.equal(beside[name], alone[name]) for name in alone)


@pytest.mark.slow
def test_test_logs_the_same_under_its_own_name(folders: tuple[str, str], tmp_path: Path) -> None:
    expected, _ = evaluate(folders, tmp_path)
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path)
    (metrics,) = trainer.test(remax_module(*folders), prompt_data(tmp_path, folders[0]), verbose=False)
    assert metrics == {name.replace("val/", "test/"): value for name, value in expected.items()}


@pytest.mark.slow
def test_prediction(folders: tuple[str, str], tmp_path: Path) -> None:
    _, recorder = evaluate(folders, tmp_path, sampling=SamplingConfig(max_response_length=6, num_samples=2))
    rollout = recorder.validations[0]["rollout"]
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path)
    module = remax_module(*folders, sampling=SamplingConfig(max_response_length=6, num_samples=2))
    (found,) = trainer.predict(module, prompt_data(tmp_path, folders[0]))
    assert len(found) == 16
    json.dumps(found)
    for i, line in enumerate(found):
        assert line == {
            "prompt": rollout.prompt.prompts[i // 2],
            "row": {"prompt": PROMPTS[i // 2]},
            "response": rollout.sampled.texts[i],
            "reward": float(rollout.reward[i]),
            "greedy_response": rollout.greedy.texts[i // 2],
            "baseline_reward": float(rollout.baseline_reward[i // 2]),
            "response_length": int(rollout.sampled.response_mask[i].sum()),
            "truncated": bool(rollout.sampled.truncated[i]),
        }


# Several responses to one prompt


def repeated(config: EvalConfig, texts: list[str], rewards: list[float]) -> dict[str, tuple[float, float]]:
    record = PromptRecord(0, "1+4=", {"sampled": texts}, {"sampled": rewards}, {})
    return add_repeated(record, config, answer_function(config.answer)).sums


def test_figures_of_several_responses_are_those_by_hand() -> None:
    config = EvalConfig(pass_at_k=(1, 2), maj_at_k=(2, 5), best_of_k=(4,))
    sums = repeated(config, ["5", "it is 5.0", "6", "six", ""], [1.0, 1.0, 0.0, 0.0, 0.0])
    assert sums["pass_at_1"] == pytest.approx((2.0, 5.0))
    assert sums["pass_at_2"] == pytest.approx((2 * 0.7, 2.0))  # 3 of 10 pairs have no right one
    assert sums["maj_at_2"] == pytest.approx((1.0, 2.0))  # 5 and 5.0 are one answer; 6 against six, both wrong
    assert sums["maj_at_5"] == (1.0, 1.0)
    assert sums["best_of_4"] == (1.0, 1.0)


def test_what_passes_and_what_votes_can_be_set() -> None:
    config = EvalConfig(pass_at_k=(1,), maj_at_k=(3,), pass_threshold=0.5, answer="helpers.answers.first_word")
    sums = repeated(config, ["yes of course", "no", "yes"], [0.5, 0.4, 0.6])
    assert sums == {"pass_at_1": pytest.approx((2.0, 3.0)), "maj_at_3": (1.0, 1.0)}


@pytest.mark.parametrize(("answer", "message"), [
    ("helpers.answers.nothing_here", r"evaluation\.answer: module 'helpers\.answers' .* has no 'nothing_here'"),
    ("helpers.answers.a_list", r"evaluation\.answer: helpers\.answers\.a_list must return .* on the response 'yes'"),
])  # fmt: skip
def test_a_function_of_answers_that_fails_is_named(answer: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        repeated(EvalConfig(maj_at_k=(1,), answer=answer), ["yes"], [1.0])
