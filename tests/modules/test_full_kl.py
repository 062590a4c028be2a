"""The KL over the vocabulary as reward and as loss, in real runs, against double precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import Recorder, distance, fit, prompt_data, remax_module, save_policy
from lightning.pytorch import Callback
from oracles import policies
from torch import Tensor

from remax_lightning.errors import UserError
from remax_lightning.functional import TokenStatistics
from remax_lightning.modules import AdvantageConfig, KLConfig, LossConfig
from remax_lightning.rollout import SamplingConfig
from remax_lightning.training.experience import Experience
from remax_lightning.training.rollouts import RolloutBuffer
from remax_lightning.types import Rollout

FULL = KLConfig("full")
BOTH = KLConfig("full", loss_coef=0.3, loss_estimator="full")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return save_policy(folder / "policy"), save_policy(folder / "reference", noise=0.05)


def one_step(folders: tuple[str, str], folder: Path, splits: int = 1, **options: Any) -> Recorder:
    trainer = {name: options.pop(name) for name in ("accumulate_grad_batches", "max_steps") if name in options}
    data = prompt_data(folder, folders[0], micro_batch_size=8 // splits)
    return fit(remax_module(*folders, **options), data, folder, **{"accumulate_grad_batches": splits, **trainer})


def kl_of(own: Any, other: Any, rollout: Rollout, temperature: float = 1.0) -> list[list[Tensor]]:
    """KL per token, one unpadded response after the other, differentiable in the policy's weights."""
    found = []
    for prompt, response in policies.rows(rollout):
        logits, reference = (
            model(input_ids=torch.tensor([prompt + response])).logits[0][len(prompt) - 1 : -1] / temperature
            for model in (own, other)
        )
        probs = torch.softmax(logits, -1)
        log_ratio = torch.log(probs) - torch.log(torch.softmax(reference.detach(), -1))
        found.append(list((probs * log_ratio).sum(-1)))
    return found


@pytest.mark.slow(0.3)
def test_kl_equals_the_oracle(folders: tuple[str, str], tmp_path: Path) -> None:
    sampling = SamplingConfig(max_response_length=6, temperature=0.7)
    recorder = one_step(folders, tmp_path, sampling=sampling, kl=FULL)
    (output,) = recorder.outputs
    expected = kl_of(*map(policies.load, folders), output["rollout"], 0.7)
    for row, wanted in zip(output["kl"].tolist(), expected, strict=True):
        values = [value.item() for value in wanted]
        assert min(values) > 1e-3
        assert row == pytest.approx(values + [0.0] * (6 - len(values)), abs=2e-5)
    tokens = [value.item() for row in expected for value in row]
    assert recorder.logged[0]["train/kl"] == pytest.approx(sum(tokens) / len(tokens), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("credit", ["to_go", "one_step"])
def test_kl_enters_the_advantages(credit: Any, folders: tuple[str, str], tmp_path: Path) -> None:
    kl = KLConfig("full", credit=credit, clamp=0.14)
    (output,) = one_step(folders, tmp_path, kl=kl, kl_coef=0.3).outputs
    rollout: Rollout = output["rollout"]
    expected = kl_of(*map(policies.load, folders), rollout)
    assert 0 < sum(value.item() > 0.14 for row in expected for value in row) < sum(map(len, expected))
    for i, row in enumerate(expected):
        values = [min(value.item(), 0.14) for value in row]
        plain = (rollout.reward[i] - rollout.baseline_reward[i]).item()
        wanted = [plain - 0.3 * (sum(values[t:]) if credit == "to_go" else values[t]) for t in range(len(values))]
        assert output["advantages"][i, : len(values)].tolist() == pytest.approx(wanted, abs=2e-5)


@pytest.mark.slow
def test_kl_loss_adds_its_own_gradient(folders: tuple[str, str], tmp_path: Path) -> None:
    without = one_step(folders, tmp_path, kl_coef=0.0)
    kl = KLConfig(credit="none", loss_coef=0.7, loss_estimator="full")
    with_term = one_step(folders, tmp_path, kl_coef=0.0, kl=kl)
    own, other = map(policies.load, folders)
    terms = [value for row in kl_of(own, other, without.outputs[0]["rollout"]) for value in row]
    (0.7 * sum(terms) / len(terms)).backward()
    expected = {name: value + without.step()[name] for name, value in policies.gradient(own).items()}
    assert distance(with_term.step(), expected) < TOLERANCE
    assert distance(without.step(), expected) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"kl": FULL},
    {"kl": BOTH},
    {"kl": BOTH, "loss": LossConfig("clipped"), "advantage": AdvantageConfig(whiten=True)},
], ids=["reward", "reward_and_loss", "whitened"])  # fmt: skip
def test_the_split_leaves_the_gradient(options: Any, folders: tuple[str, str], tmp_path: Path) -> None:
    whole = one_step(folders, tmp_path, **options)
    parts = one_step(folders, tmp_path, 4, **options)
    assert distance(parts.step(), whole.step()) < TOLERANCE
    assert parts.logged[0]["train/kl"] == pytest.approx(whole.logged[0]["train/kl"], abs=1e-5)
    assert all(output["rollout"].reference_hidden is None for output in parts.outputs)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(("kl", "kept"), [(FULL, False), (BOTH, True), (KLConfig(), False)])
def test_several_updates_keep_hidden_states_for_the_loss_only(
    kl: KLConfig, kept: bool, folders: tuple[str, str], tmp_path: Path
) -> None:
    states: list[Any] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            state = pl_module.buffer.state_dict()
            if state is not None:
                states.append(state)

    module = remax_module(*folders, kl=kl, loss=LossConfig("clipped"))
    data = prompt_data(tmp_path, folders[0], micro_batch_size=4)
    recorder = fit(module, data, tmp_path, accumulate_grad_batches=1, max_steps=2, callbacks=[Look()])
    assert len(recorder.logged) == 2
    (state,) = states
    assert (state["rollout"]["reference_hidden"] is not None) == kept
    buffer = RolloutBuffer()
    buffer.load_state_dict(state)
    again, before = buffer.state_dict()["rollout"]["reference_hidden"], state["rollout"]["reference_hidden"]
    assert again is before if before is None else torch.equal(again, before)
    first, second = recorder.outputs
    assert torch.equal(first["kl"], buffer.micro_batch(0).kl)
    assert torch.equal(second["kl"], buffer.micro_batch(1).kl)


@pytest.mark.slow
def test_evaluation_measures_it_too(folders: tuple[str, str], tmp_path: Path) -> None:
    module, data = remax_module(*folders, kl=FULL), prompt_data(tmp_path, folders[0])
    recorder = fit(module, data, tmp_path, limit_val_batches=1, val_check_interval=1)
    (output,) = recorder.validations
    assert output["rollout"].reference_hidden is None
    weights = {f"{name}": value for name, value in recorder.weights[1].items()}
    own, other = policies.load(folders[0], weights), policies.load(folders[1])
    for row, wanted in zip(output["kl"].tolist(), kl_of(own, other, output["rollout"]), strict=True):
        assert row[: len(wanted)] == pytest.approx([value.item() for value in wanted], abs=2e-5)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("kl", [FULL, KLConfig(loss_coef=0.1, loss_estimator="full")])
@pytest.mark.parametrize("name", ["policy", "reference"])
def test_a_head_that_cannot_be_read_is_refused_before_the_first_rollout(
    name: str, kl: KLConfig, folders: tuple[str, str], tmp_path: Path
) -> None:
    module = remax_module(*folders, kl=kl)
    configure = module.configure_model

    def hooked() -> None:
        configure()
        getattr(module, name).lm_head.register_forward_hook(lambda *_: None)

    module.configure_model = hooked
    with pytest.raises(
        UserError, match=rf"model\.kl\.estimator .* model\.{name}, which cannot be read: .* k1, k2 or k3"
    ):
        fit(module, prompt_data(tmp_path, folders[0]), tmp_path)
    assert module.reward.scored == []


@pytest.mark.slow(0.3)
def test_the_objective_needs_the_kl_that_it_is_configured_for(folders: tuple[str, str], tmp_path: Path) -> None:
    module = remax_module(*folders, kl=BOTH)
    (output,) = one_step(folders, tmp_path).outputs
    rollout: Rollout = output["rollout"]
    stats = TokenStatistics(rollout.reference_log_probs)
    with pytest.raises(ValueError, match="full_kl must be a tensor"):
        module.objective.with_advantages(Experience(rollout, torch.ones(1)), stats, 0.1, lambda values: values)
    experience = Experience(rollout, torch.ones(1), output["advantages"])
    with pytest.raises(ValueError, match="full_kl must be a tensor"):
        module.objective.loss(rollout.reference_log_probs, experience, torch.tensor(1.0))
