"""What a training step leaves out without changing the gradient: responses without an advantage, and the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import FixedEngine, Recorder, distance, fit, prompt_data, remax_module, save_policy
from lightning.pytorch import Callback
from torch import Tensor

from remax_lightning.callbacks import KLMonitor
from remax_lightning.models.last_mlp import PROBED
from remax_lightning.models.packing import PROBED_LENGTHS
from remax_lightning.modules import AdvantageConfig, KLConfig, LossConfig
from remax_lightning.rewards.base import Reward
from remax_lightning.rollout import SamplingConfig
from remax_lightning.training.experience import Experience

EOS, J = 2, 30
WRONG = [[40, 41, EOS, EOS, EOS, EOS], [42, 43, 44, 45, EOS, EOS]]
RIGHT = [[J, EOS, EOS, EOS, EOS, EOS], [40, 41, 42, J, 44, 45]]
SAMPLED = [RIGHT[0], WRONG[1], RIGHT[1], WRONG[0], *WRONG, *WRONG]
"""Only the first and the third differ from the greedy response's reward: all of the second half teaches nothing."""
GREEDY = [WRONG[0]] * 8

VARIANTS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "responses": {"loss": LossConfig(normalizer="responses")},
    "micro_batch": {"loss": LossConfig(normalizer="micro_batch")},
    "clipped": {"loss": LossConfig("clipped")},
    "dual_clip": {"loss": LossConfig("clipped", dual_clip=2.0)},
    "discounted": {"advantage": AdvantageConfig(gamma=0.9)},
    "masked": {"advantage": AdvantageConfig(overlong="mask")},
}


class HasJ(Reward):
    """1 for a response with a j in it, otherwise 0."""

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
        return [float("j" in text) for text in responses]


class Watch(Callback):
    """Counts what goes through policy and reference, rows and tokens of every pass, and keeps the gradients."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.tokens: list[int] = []
        self.reference_rows: list[int] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.policy.model.register_forward_pre_hook(self._count, with_kwargs=True)
        if pl_module.reference is not None:
            pl_module.reference.model.register_forward_pre_hook(self._count_reference, with_kwargs=True)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append({name: weight.grad.clone() for name, weight in pl_module.policy.named_parameters()})

    def _count(self, module: Any, inputs: Any, options: dict[str, Any]) -> None:
        if not self.probing(options):
            self.rows.append(int((options["position_ids"] == 0).sum()))  # the texts of a packed row
            self.tokens.append(options["input_ids"].numel())

    def _count_reference(self, module: Any, inputs: Any, options: dict[str, Any]) -> None:
        if not self.probing(options):
            self.reference_rows.append(int((options["position_ids"] == 0).sum()))

    @staticmethod
    def probing(options: dict[str, Any]) -> bool:
        """How the head is looked at, whether rows can be packed, and who runs through the last MLP, once each."""
        shape = options["input_ids"].shape
        return options.get("position_ids") is None or shape in ((2, 8), (1, sum(PROBED_LENGTHS)), PROBED)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return save_policy(folder / "policy", ends=(EOS,)), save_policy(folder / "reference", noise=0.02, ends=(EOS,))


def one_step(
    folders: tuple[str, str | None], folder: Path, splits: int = 2, updates: int = 1, **options: Any
) -> tuple[Recorder, Watch]:
    watch = Watch()
    defaults = {"reward": HasJ(), "rollout": FixedEngine(SAMPLED, GREEDY), "kl_coef": 0.0}
    module = remax_module(*folders, **{**defaults, **options})
    data = prompt_data(folder, folders[0], micro_batch_size=8 // splits)
    callbacks = [watch, KLMonitor()]
    recorder = fit(
        module, data, folder, callbacks=callbacks, accumulate_grad_batches=splits // updates, max_steps=updates
    )
    return recorder, watch


def run_all(self: Experience, num_micro_batches: int = 1) -> Tensor:
    return torch.ones_like(self.rollout.reward, dtype=torch.bool)


def lengths(recorder: Recorder) -> list[int]:
    """Tokens of prompt and response, row by row."""
    return [
        int(prompt) + int(response)
        for output in recorder.outputs
        for prompt, response in zip(
            output["rollout"].prompt.prompt_mask.sum(-1), output["rollout"].sampled.response_mask.sum(-1), strict=True
        )
    ]


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_without_an_advantage_are_not_run_and_the_gradient_stays(
    variant: str, folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, watch = one_step((folders[0], None), tmp_path, **VARIANTS[variant])
    first, second = recorder.outputs
    ran = [0, 4] if variant == "masked" else [0, 2, 4]  # the one with the length limit is masked; one of the half stays
    assert first["advantages"].count_nonzero(-1).bool().nonzero().flatten().tolist() == [row for row in ran if row < 4]
    assert second["advantages"].count_nonzero() == 0
    sizes = lengths(recorder)
    assert watch.rows == [len(ran) - 1, 1]
    assert sum(watch.tokens) == sum(sizes[row] for row in ran)

    monkeypatch.setattr(Experience, "active_responses", run_all)
    whole, all_run = one_step((folders[0], None), tmp_path, **VARIANTS[variant])
    assert all_run.rows == [4, 4]
    assert sum(all_run.tokens) == sum(sizes)
    assert distance(watch.gradients[0], all_run.gradients[0]) < 1e-6
    assert max(float(value.abs().max()) for value in all_run.gradients[0].values()) > 1e-2
    figures, expected = recorder.logged[0], whole.logged[0]
    # Only the entropy is of fewer tokens; it is a mean over those, with no zeros among them.
    entropies = torch.cat([output["entropy"] for output in whole.outputs])
    mask = torch.cat([output["rollout"].sampled.response_mask for output in whole.outputs])
    assert figures.pop("train/entropy") == pytest.approx(float(entropies[ran][mask[ran]].mean()), rel=1e-5)
    assert expected.pop("train/entropy") == pytest.approx(float(entropies[mask].mean()), rel=1e-5)
    assert figures == pytest.approx(expected, abs=1e-6)
    for output in recorder.outputs:
        assert output["entropy_mask"].sum() < output["rollout"].sampled.response_mask.sum()
        assert torch.equal(output["entropy"] != 0, output["entropy_mask"])


@pytest.mark.slow(0.3)
def test_whitened_advantages_are_hardly_ever_zero(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"advantage": AdvantageConfig(whiten=True)}
    _, watch = one_step((folders[0], None), tmp_path, **options)
    assert watch.rows == [4, 4]  # and no pass before them: without a KL the rewards say all
    monkeypatch.setattr(Experience, "active_responses", run_all)
    _, all_run = one_step((folders[0], None), tmp_path, **options)
    assert distance(watch.gradients[0], all_run.gradients[0]) < 1e-6


@pytest.mark.slow
def test_other_baselines_leave_out_prompts_whose_samples_agree(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "rollout": FixedEngine([row for row in SAMPLED for _ in range(2)][:14] + WRONG),
        "sampling": SamplingConfig(max_response_length=6, num_samples=2),
        "advantage": AdvantageConfig(baseline="leave_one_out"),
    }
    options["rollout"].sampled[1] = torch.tensor(WRONG[1])
    _, watch = one_step((folders[0], None), tmp_path, **options)
    assert watch.rows == [2, 1]  # both samples of the first prompt, and the one that stays
    monkeypatch.setattr(Experience, "active_responses", run_all)
    _, all_run = one_step((folders[0], None), tmp_path, **options)
    assert distance(watch.gradients[0], all_run.gradients[0]) < 1e-6


@pytest.mark.slow(0.3)
def test_several_updates_leave_them_out_of_the_old_log_probs_too(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = [WRONG[0], RIGHT[0], *WRONG, WRONG[0], RIGHT[1], *WRONG]
    options = {"loss": LossConfig("clipped", clip_range=0.1), "rollout": FixedEngine(sampled, GREEDY)}
    recorder, watch = one_step((folders[0], None), tmp_path, updates=2, **options)
    assert watch.rows == [1, 1, 1, 1]  # before the updates, then in them
    monkeypatch.setattr(Experience, "active_responses", run_all)
    whole, all_run = one_step((folders[0], None), tmp_path, updates=2, **options)
    assert distance(watch.gradients[1], all_run.gradients[1]) < 1e-6
    assert recorder.logged[1]["train/clip_fraction"] == pytest.approx(whole.logged[1]["train/clip_fraction"])
    assert recorder.logged[1]["train/clip_fraction"] > 0


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("kl", [KLConfig(), KLConfig(credit="none", loss_coef=0.3)])
def test_where_a_kl_enters_every_row_is_run(kl: KLConfig, folders: tuple[str, str], tmp_path: Path) -> None:
    recorder, watch = one_step(folders, tmp_path, kl_coef=0.05, kl=kl)
    assert watch.rows == watch.reference_rows == [4, 4]
    assert "train/kl" in recorder.logged[0]
    assert all(torch.equal(out["entropy_mask"], out["rollout"].sampled.response_mask) for out in recorder.outputs)


# The reference


@pytest.mark.slow
@pytest.mark.parametrize(("kl_coef", "kl"), [(0.0, KLConfig()), (0.05, KLConfig(credit="none"))])
def test_a_reference_whose_kl_enters_nothing_is_run_in_validation_only(
    kl_coef: float, kl: KLConfig, folders: tuple[str, str], tmp_path: Path
) -> None:
    recorder, watch = one_step(folders, tmp_path, kl_coef=kl_coef, kl=kl)
    without, _ = one_step((folders[0], None), tmp_path)
    assert watch.reference_rows == []
    assert watch.rows == [2, 1]
    assert all(output["kl"] is None for output in recorder.outputs)
    assert all(torch.equal(recorder.step()[name], value) for name, value in without.step().items())
    assert not [name for name in recorder.logged[0] if "kl" in name]

    watch, validated = Watch(), Recorder()
    module = remax_module(*folders, kl_coef=kl_coef, kl=kl)
    data = prompt_data(tmp_path, folders[0])
    fit(module, data, tmp_path, callbacks=[watch, validated], limit_val_batches=1.0, val_check_interval=1)
    assert watch.reference_rows == [8]
    assert validated.validations[0]["kl"].abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("size", "passes"), [(None, [4, 4]), (3, [3, 3, 2]), (8, [8]), (100, [8])])
def test_the_reference_has_a_batch_size_of_its_own(
    size: int | None, passes: list[int], folders: tuple[str, str], tmp_path: Path
) -> None:
    recorder, watch = one_step(folders, tmp_path, kl_coef=0.05, kl=KLConfig(reference_batch_size=size))
    assert watch.reference_rows == passes
    assert watch.rows == [4, 4]
    expected, _ = one_step(folders, tmp_path, kl_coef=0.05)
    for output, wanted in zip(recorder.outputs, expected.outputs, strict=True):
        torch.testing.assert_close(output["kl"], wanted["kl"], atol=1e-5, rtol=0)
    assert distance(recorder.step(), expected.step()) < 1e-5
