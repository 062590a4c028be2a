"""The reference of an adapted policy is the policy at its start, as a second copy of it would be."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import PROMPTS, Recorder, fit, make_trainer, prompt_data, remax_module, save_policy, write_rows
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file

from remax_lightning.errors import UserError
from remax_lightning.models import LoRAConfig, ModelConfig
from remax_lightning.modules import KLConfig, LossConfig, SFTModule

STEPS = {"max_steps": 3, "limit_val_batches": 1, "val_check_interval": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of an adapter that was trained before."""
    folder = tmp_path_factory.mktemp("trained")
    model: Any = ModelConfig(base, lora=LoRAConfig(r=2)).load("model.policy")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return str(folder)


def make(base: str, lora: LoRAConfig, reference: ModelConfig | None = None, **options: Any) -> Any:
    optimizer = partial(torch.optim.AdamW, lr=3e-2)
    defaults: dict[str, Any] = {"kl_coef": 0.05, "optimizer": optimizer}
    return remax_module(ModelConfig(base, lora=lora), reference, **(defaults | options))


def figures(seen: Recorder) -> list[dict[str, float]]:
    return [{name: value for name, value in step.items() if not name.startswith("time/")} for step in seen.logged]


VARIANTS: dict[str, dict[str, Any]] = {
    "k1": {},
    "full": {"kl": KLConfig("full", loss_coef=0.1, loss_estimator="full")},
    "clipped": {"loss": LossConfig("clipped"), "kl": KLConfig(reference_batch_size=8)},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("continued", [False, True])
def test_figures_are_those_with_a_second_copy(
    variant: str, continued: bool, base: str, trained: str, tmp_path: Path
) -> None:
    lora = LoRAConfig(path=trained) if continued else LoRAConfig(r=2)
    copy = ModelConfig(base, lora=lora if continued else None)
    shared, apart = (make(base, lora, each, **VARIANTS[variant]) for each in (None, copy))
    first, second = (fit(each, prompt_data(tmp_path, base), tmp_path, **STEPS) for each in (shared, apart))
    assert shared.reference is shared.policy
    assert apart.reference is not apart.policy
    assert len(first.logged) == 3
    for one, other in zip(figures(first), figures(second), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert first.outputs[0]["kl"].abs().max() == 0
    assert first.outputs[2]["kl"].abs().max() > 0.1


@pytest.mark.slow
def test_validation_measures_the_kl_without_a_coefficient_too(base: str, tmp_path: Path) -> None:
    module = make(base, LoRAConfig(r=2), kl_coef=0.0)
    seen = fit(module, prompt_data(tmp_path, base), tmp_path, num_sanity_val_steps=1, **STEPS)
    assert seen.validations[0]["kl"].abs().max() == 0
    assert seen.validations[-1]["kl"].abs().max() > 0.1
    assert "train/kl" not in seen.logged[0]


def test_a_head_that_is_adapted_gives_no_full_kl(base: str, tmp_path: Path) -> None:
    module = make(base, LoRAConfig(target_modules=["lm_head"]), kl=KLConfig("full"))
    with pytest.raises(UserError, match=r"full needs the output head of model\.policy"):
        fit(module, prompt_data(tmp_path, base), tmp_path)


# Checkpoints


@pytest.fixture(scope="module")
def checkpoints(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that saved each; what it logged is in `losses.pt`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run(make(base, LoRAConfig(r=2)), base, folder, saves=True)
    return folder


def run(module: Any, base: str, folder: Path, *, saves: bool = False, checkpoint: Path | None = None) -> Recorder:
    recorder, callbacks = Recorder(), []
    if saves:
        callbacks.append(ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    trainer = make_trainer(folder, [recorder, *callbacks], max_steps=6, enable_checkpointing=saves)
    torch.manual_seed(0 if checkpoint is None else 99)
    trainer.fit(module, prompt_data(folder, base, batch_size=2), ckpt_path=checkpoint)
    if saves:
        torch.save(losses_of(recorder), folder / "losses.pt")
    return recorder


def losses_of(recorder: Recorder) -> list[float]:
    return [float(output["loss"]) for output in recorder.outputs]


@pytest.mark.slow
def test_a_resumed_run_is_bit_for_bit_the_one_that_was_not_interrupted(base: str, checkpoints: Path) -> None:
    rest = run(make(base, LoRAConfig(r=2)), base, checkpoints, checkpoint=checkpoints / "step=3.ckpt")
    losses = torch.load(checkpoints / "losses.pt", weights_only=True)
    assert len(set(losses)) == 6
    assert losses_of(rest) == losses[3:]


def test_a_checkpoint_is_of_the_adapters_size(base: str, checkpoints: Path) -> None:
    state = torch.load(checkpoints / "step=3.ckpt", weights_only=True)
    adapter = sum(value.numel() for value in state["state_dict"].values())
    assert adapter == sum(p.numel() for p in make_policy(base).parameters() if p.requires_grad)
    moments = state["optimizer_states"][0]["state"].values()
    assert sum(entry["exp_avg"].numel() for entry in moments) == adapter


def make_policy(base: str) -> Any:
    return ModelConfig(base, lora=LoRAConfig(r=2)).load("model.policy")


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("lora", [LoRAConfig(r=3), LoRAConfig(r=2, target_modules=["q_proj"])])
def test_another_adapter_does_not_resume(lora: LoRAConfig, base: str, checkpoints: Path) -> None:
    with pytest.raises(
        UserError, match=r"ckpt_path: the checkpoint does not hold the adapter that model\.policy\.lora"
    ):
        run(make(base, lora), base, checkpoints, checkpoint=checkpoints / "step=3.ckpt")


@pytest.mark.slow
def test_a_whole_policy_does_not_resume_from_an_adapter_nor_an_adapter_from_it(
    base: str, checkpoints: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"ckpt_path: the checkpoint holds an adapter; set model\.policy\.lora"):
        run(remax_module(base), base, checkpoints, checkpoint=checkpoints / "step=3.ckpt")
    run(remax_module(base), base, tmp_path, saves=True)
    with pytest.raises(UserError, match=r"ckpt_path: the checkpoint does not hold the adapter"):
        run(make(base, LoRAConfig(r=2)), base, tmp_path, checkpoint=tmp_path / "step=3.ckpt")


# What is refused before anything is loaded


def test_a_policy_is_not_placed_as_a_frozen_model_is() -> None:
    with pytest.raises(UserError, match=r"model\.policy\.placement must be replicate, got cpu: .*trainer\.strategy"):
        remax_module(ModelConfig("policy", placement="cpu"))


def test_a_reference_takes_no_adapter_that_was_never_trained() -> None:
    with pytest.raises(UserError, match=r"model\.reference\.lora needs the path of a trained adapter"):
        remax_module("policy", ModelConfig("policy", lora=LoRAConfig()))


def test_a_placement_that_there_is_not(base: str, tmp_path: Path) -> None:
    reference = ModelConfig(base, placement="disk")  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"model\.reference\.placement must be one of replicate, shard, cpu, got 'disk'"
    ):
        fit(remax_module(base, reference), prompt_data(tmp_path, base), tmp_path)


# The stage before


@pytest.mark.slow(0.3)
def test_supervised_training_of_an_adapter(base: str, tmp_path: Path) -> None:
    from remax_lightning.data import SFTDataModule

    path = write_rows(tmp_path / "rows.jsonl", ({"prompt": prompt, "response": "7"} for prompt in PROMPTS))
    source = ModelConfig(base, lora=LoRAConfig(r=2))
    module = SFTModule(source, optimizer=partial(torch.optim.AdamW, lr=3e-2))
    seen = fit(module, SFTDataModule(path, base, batch_size=8), tmp_path, max_steps=3)
    moved = {name for name, value in seen.weights[0].items() if not torch.equal(value, weights(module)[name])}
    assert moved == {name for name, value in module.policy.named_parameters() if value.requires_grad}
    assert len(moved) == 28


def weights(module: Any) -> dict[str, torch.Tensor]:
    return dict(module.policy.named_parameters())


# A reference that moves


class References(Callback):
    """The reference and the policy as they are when each batch ends."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append({name: value.detach().clone() for name, value in pl_module.reference.named_parameters()})


def moving(base: str, alpha: float = 1.0, **options: Any) -> Any:
    kl = KLConfig(reference_sync_steps=2, reference_mixup_alpha=alpha)
    return remax_module(base, base, kl=kl, optimizer=partial(torch.optim.AdamW, lr=1e-2), **options)


def run_moving(module: Any, base: str, folder: Path, *callbacks: Any, **options: Any) -> tuple[Recorder, References]:
    recorder, references = Recorder(), References()
    checkpoint = options.pop("checkpoint", None)
    trainer = make_trainer(folder, [recorder, references, *callbacks], max_steps=5, **options)
    torch.manual_seed(0 if checkpoint is None else 99)
    trainer.fit(module, prompt_data(folder, base, batch_size=2), ckpt_path=checkpoint)
    return recorder, references


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_a_reference_moves_to_the_policy_every_second_step(base: str, tmp_path: Path, alpha: float) -> None:
    recorder, references = run_moving(moving(base, alpha), base, tmp_path)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        policy = [weights[name].double() for weights in recorder.weights]
        expected = policy[0]
        for step, seen in enumerate(references.seen):  # the step after the rollout, numbered by the steps before it
            if step in (2, 4):
                expected = (1 - alpha) * expected + alpha * policy[step]
            torch.testing.assert_close(seen[name].double(), expected, rtol=0, atol=1e-6)
        assert not torch.equal(references.seen[1][name], references.seen[2][name])
    if alpha == 1:
        assert recorder.outputs[2]["kl"].abs().max() < 1e-4 < recorder.outputs[1]["kl"].abs().max()


@pytest.mark.slow
def test_a_moved_reference_resumes_bit_for_bit(base: str, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, references = run_moving(moving(base, 0.5), base, tmp_path, saves, enable_checkpointing=True)
    for step in (2, 3):  # due, and done
        rest, resumed = run_moving(moving(base, 0.5), base, tmp_path, checkpoint=tmp_path / f"step={step}.ckpt")
        assert losses_of(rest) == losses_of(whole)[step:]
        for name, value in references.seen[-1].items():
            assert torch.equal(value, resumed.seen[-1][name])


@pytest.mark.slow
def test_what_cannot_move_is_refused(base: str, tmp_path: Path) -> None:
    kl = KLConfig(reference_sync_steps=2)
    with pytest.raises(UserError, match=r"reference_sync_steps needs a reference with weights of its own"):
        run_moving(make(base, LoRAConfig(r=2), kl=kl), base, tmp_path)
    with pytest.raises(UserError, match=r"needs a reference with the parameters of the policy"):
        run_moving(make(base, LoRAConfig(r=2), ModelConfig(base), kl=kl), base, tmp_path)
    rounded = remax_module(
        base, ModelConfig(base, dtype="bfloat16"), kl=KLConfig(reference_sync_steps=2, reference_mixup_alpha=0.5)
    )
    with pytest.raises(UserError, match=r"reference_mixup_alpha 0\.5 needs model\.reference\.dtype float32"):
        run_moving(rounded, base, tmp_path)
    with pytest.raises(UserError, match=r"reference_mixup_alpha must be 1\.0 unless model\.kl\.reference_sync_steps"):
        KLConfig(reference_mixup_alpha=0.5)


@pytest.mark.slow(0.3)
def test_a_reference_that_gives_no_numbers_ends_the_run_before_its_first_step(base: str, tmp_path: Path) -> None:
    """Else every step would be skipped after its rollout, and the learning rate would be blamed."""
    folder = tmp_path / "broken"
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    seen = Recorder()
    trainer = make_trainer(tmp_path, [seen], max_steps=8)
    with pytest.raises(UserError, match=r"^model\.reference: its log-probs are NaN"):
        trainer.fit(remax_module(base, str(folder)), prompt_data(tmp_path, base))
    assert trainer.global_step == 0
