"""Parameter groups, learning rates that the weights cannot take, and schedules."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from fake_cuda import FakeCuda, is_there
from helpers.training import fit, make_trainer, prompt_data, remax_module, save_policy
from lightning.pytorch import Callback
from torch import nn
from torch.profiler import ProfilerActivity, profile

from remax_lightning.errors import UserError
from remax_lightning.modules import WarmupCosine, WarmupLinear
from remax_lightning.training.optimization import (
    check_learning_rate_precision,
    choose_update_kernel,
    parameter_groups,
    set_total_steps,
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


# Parameter groups


def test_biases_and_norms_take_no_weight_decay() -> None:
    model = tiny_model("gpt2")
    frozen = model.transformer.wpe.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-3, weight_decay=0.3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    trained = [parameter for parameter in model.parameters() if parameter is not frozen]
    assert sorted(decay) == sorted(map(id, trained))
    assert {decay[id(p)] for p in trained if p.dim() > 1} == {0.3}
    assert {decay[id(p)] for p in trained if p.dim() <= 1} == {0.0}


def test_a_model_without_vectors_has_one_group() -> None:
    assert len(parameter_groups(nn.Linear(2, 2, bias=False))) == 1


# Kernels


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_adam_updates_in_one_kernel_on_cuda(kind: Any, fake_cuda: FakeCuda) -> None:
    weights = []
    for fused in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2).to("cuda")
        optimizer = kind(parameter_groups(layer), lr=0.1)
        if fused:
            choose_update_kernel(optimizer, layer.weight.device)
        for _ in range(3):
            layer(torch.ones(1, 3, device="cuda")).sum().backward()
            optimizer.step()
        assert {group["fused"] for group in optimizer.param_groups} == {True if fused else None}
        assert all(is_there(state["step"]) == fused for state in optimizer.state.values())
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("options", [{"foreach": False}, {"fused": False}, {"capturable": True}])
def test_a_kernel_that_was_chosen_stays(options: dict[str, bool]) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], **options)
    for device in ("cpu", "cuda"):
        choose_update_kernel(optimizer, torch.device(device))
        assert not optimizer.param_groups[0]["fused"]


@pytest.mark.slow(0.3)
def test_a_fused_optimizer_is_clipped_in_mixed_precision(policy: str, tmp_path: Path) -> None:
    """Lightning refuses it otherwise, in bfloat16 too, where there is no loss scale."""
    module = remax_module(policy, optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=True))
    recorder = fit(module, prompt_data(tmp_path, policy), tmp_path, precision="bf16-mixed", gradient_clip_val=1.0)
    assert recorder.logged[0]["train/grad_norm"] > 0
    assert any(value.abs().max() > 0 for value in recorder.step().values())


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_adam_updates_in_one_kernel_on_a_cpu(kind: Any) -> None:
    weights = []
    for chosen in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        optimizer = kind(parameter_groups(layer), lr=0.1)
        if chosen:
            choose_update_kernel(optimizer, torch.device("cpu"))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(3):
                layer(torch.ones(1, 3)).sum().backward()
                optimizer.step()
        assert any(event.key.startswith("aten::_fused_adam") for event in profiler.key_averages()) == chosen
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights)


@pytest.mark.slow
def test_a_run_updates_in_one_kernel_on_a_cpu(policy: str, tmp_path: Path) -> None:
    module, data = remax_module(policy, optimizer=partial(torch.optim.AdamW, lr=1e-3)), prompt_data(tmp_path, policy)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        fit(module, data, tmp_path, max_steps=2)
    calls = {event.key: event.count for event in profiler.key_averages()}
    assert calls.get("aten::_fused_adamw_") == 2 * len(module.optimizers().param_groups)  # biases have a group


# Lost updates


def test_bfloat16_weights_refuse_a_small_rate_before_training(policy: str, tmp_path: Path) -> None:
    module = remax_module(policy, optimizer=partial(torch.optim.AdamW, lr=1e-6))
    with pytest.raises(UserError, match=r"model\.optimizer\.init_args\.lr is 1e-06.*bf16-mixed"):
        fit(module, prompt_data(tmp_path, policy), tmp_path, precision="bf16-true")
    assert module.reward.scored == []


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(("precision", "rate", "dtype"), [
    ("bf16-true", 1e-1, torch.bfloat16),
    ("bf16-mixed", 1e-6, torch.float32),
    ("32-true", 1e-6, torch.float32),
])  # fmt: skip
def test_other_rates_train(precision: Any, rate: float, dtype: torch.dtype, policy: str, tmp_path: Path) -> None:
    module = remax_module(policy, optimizer=partial(torch.optim.AdamW, lr=rate))
    recorder = fit(module, prompt_data(tmp_path, policy), tmp_path, precision=precision)
    assert next(module.policy.parameters()).dtype == dtype
    moved = recorder.step()["model.layers.0.mlp.up_proj.weight"]
    assert moved.dtype == dtype
    assert float((moved != 0).float().mean()) > 0.5


def test_half_of_the_weights_is_the_limit() -> None:
    weights = nn.Parameter(torch.tensor([1.0, 1.0, 1e-6, 1e-6], dtype=torch.bfloat16))
    check_learning_rate_precision(torch.optim.SGD([weights], lr=1e-4))
    more = nn.Parameter(torch.ones(1, dtype=torch.float16))
    with pytest.raises(UserError, match="60% of the model's 16-bit weights"):
        check_learning_rate_precision(torch.optim.SGD([weights, more], lr=1e-4))


# Schedules


def cosine(step: int, warmup: int, total: int, least: float) -> float:
    if step < warmup:
        return (step + 1) / warmup
    if step >= total:
        return least
    return least + (1 - least) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def linear(step: int, warmup: int, total: int, least: float) -> float:
    if step < warmup:
        return (step + 1) / warmup
    if step >= total:
        return least
    return 1 - (1 - least) * (step - warmup) / (total - warmup)


SHAPES = [(WarmupCosine, cosine), (WarmupLinear, linear)]


@pytest.mark.parametrize("least", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(("kind", "shape"), SHAPES)
def test_schedules_equal_their_formula(kind: Any, shape: Any, warmup: int, least: float) -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in (2.0, 0.5)]
    optimizer = torch.optim.SGD(groups)
    scheduler = kind(optimizer, warmup_steps=warmup, total_steps=9, min_ratio=least)
    for step in range(12):
        expected = shape(step, warmup, 9, least)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2 * expected, expected / 2])
        optimizer.step()
        scheduler.step()


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"max_steps": 4, "max_epochs": 4},
    {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 2},
])  # fmt: skip
@pytest.mark.parametrize(("kind", "shape"), SHAPES)
def test_a_schedule_learns_the_length_of_the_run(
    kind: Any, shape: Any, options: dict[str, int], policy: str, tmp_path: Path
) -> None:
    rates: list[float] = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    splits = options.get("accumulate_grad_batches", 1)
    data = prompt_data(tmp_path, policy, batch_size=4, micro_batch_size=4 // splits)  # two steps an epoch
    module = remax_module(policy, lr_scheduler=partial(kind, warmup_steps=1))
    fit(module, data, tmp_path, callbacks=[Rates()], **options)
    assert rates == pytest.approx([shape(step, 1, 4, 0.0) for step in range(4)])


def test_a_given_length_stays_and_an_endless_run_decays_nothing() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    given, endless = WarmupCosine(optimizer, total_steps=7), WarmupLinear(optimizer)
    set_total_steps(given, 100)
    set_total_steps(endless, math.inf)
    assert (given.total_steps, endless.total_steps) == (7, None)
    for _ in range(5):
        optimizer.step()
        endless.step()
    assert optimizer.param_groups[0]["lr"] == 1.0


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": torch.optim.LBFGS}, r"model\.optimizer: LBFGS doesn't support per-parameter options"),
        (
            {"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1)},
            r"model\.lr_scheduler: You must define either total_steps",
        ),
        (
            {"lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau},
            r"model\.lr_scheduler: .*which follows a figure",
        ),
    ],
    ids=["LBFGS", "OneCycleLR", "ReduceLROnPlateau"],
)
def test_what_an_optimizer_or_a_schedule_refuses_is_told_by_its_key(
    options: dict[str, Any], message: str, policy: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path).fit(remax_module(policy, **options), prompt_data(tmp_path, policy))
