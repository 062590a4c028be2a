"""Checks of the policy by `remax doctor`: each fails on a fault that was planted, and its figures are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cli import changed
from helpers.doctor import Liar, NeverStopsEngine, SampledAsGreedyEngine, ask, blind_to_padding, healthy, loaded
from helpers.training import save_policy

from remax_lightning.functional import TokenStatistics
from remax_lightning.models import packing
from remax_lightning.tools.doctor import DoctorContext
from remax_lightning.tools.doctor import policy as policy_checks
from remax_lightning.tools.doctor.context import Tolerance
from remax_lightning.tools.doctor.policy import KL, KL_16_BITS, LARGEST, LARGEST_16_BITS, MEAN, MEAN_16_BITS
from remax_lightning.types import Rollout

pytestmark = pytest.mark.slow  # every context loads a policy and a reference

SAMPLING = {"max_response_length": 24, "num_samples": 2}


@pytest.fixture(scope="module")
def well(tmp_path_factory: pytest.TempPathFactory) -> DoctorContext:
    folder = tmp_path_factory.mktemp("well")
    return loaded(folder, healthy(folder))


def test_healthy(well: DoctorContext) -> None:
    for name in ("kl_at_start", "log_probs", "packing", "on_policy", "greedy", "prompt_padding"):
        assert ask(well, name).status == "pass", ask(well, name)


def test_texts_that_see_each_other_in_a_packed_row(well: DoctorContext, monkeypatch: pytest.MonkeyPatch) -> None:
    def whole_row(query: Any, key: Any, value: Any, bounds: Any, scaling: Any, **options: Any) -> Any:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        ).transpose(1, 2)

    monkeypatch.setattr(packing, "attend_text_by_text", whole_row)
    found = ask(well, "packing")
    assert found.status == "fail"
    assert "attn_implementation: eager" in found.fix
    monkeypatch.setitem(packing._obstacles, well.module.policy, {None: "it is a test"})
    assert "because it is a test" in ask(well, "packing").measured


# The reference


@pytest.mark.parametrize(("noise", "status"), [(0.002, "warn"), (0.3, "fail")])
def test_another_checkpoint_as_reference(tmp_path: Path, noise: float, status: str) -> None:
    other = save_policy(tmp_path / "other", noise=noise)
    context = loaded(tmp_path, changed(healthy(tmp_path), model__init_args__reference={"path": other}))
    found = ask(context, "kl_at_start")
    assert found.status == status
    assert "is not the checkpoint of model.policy.path" in found.fix
    assert found.values["kl"] == pytest.approx(kl_of(context), rel=1e-3)


@torch.no_grad()
def kl_of(context: DoctorContext) -> float:
    """The mean of exp(-x) - 1 + x over all sampled tokens, one response after the other, without padding."""
    rollout, total, count = context.rollout, 0.0, 0
    for i, (ids, mask) in enumerate(zip(rollout.sampled.response_ids, rollout.sampled.response_mask, strict=True)):
        prompt = i // rollout.num_samples
        start = rollout.prompt.prompt_ids[prompt][rollout.prompt.prompt_mask[prompt]]
        response = ids[mask]
        row = torch.cat([start, response])[None]
        chosen = []
        for model in (context.module.policy, context.module.reference):
            log_probs = model(row).logits[0, len(start) - 1 : -1].double().log_softmax(-1)
            chosen.append(log_probs[torch.arange(len(response)), response])
        log_ratio = chosen[0] - chosen[1]
        total += float((torch.exp(-log_ratio) - 1 + log_ratio).sum())
        count += len(response)
    return total / count


def test_dropout_moves_the_training_pass(tmp_path: Path) -> None:
    config = healthy(tmp_path, family="gpt2")  # with dropouts of 0.1
    policy = config["model"]["init_args"]["policy"] | {"disable_dropout": False}
    context = loaded(tmp_path, changed(config, model__init_args__policy=policy))
    for name in ("kl_at_start", "log_probs"):
        found = ask(context, name)
        assert found.status == "fail"
        assert "model.policy.disable_dropout: true" in found.fix
    assert ask(context, "greedy").status == "pass"  # rollouts are in eval mode


def test_a_model_that_was_changed_after_loading(tmp_path: Path) -> None:
    context = loaded(tmp_path, healthy(tmp_path))
    with torch.no_grad():
        context.module.policy.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    found = ask(context, "kl_at_start")
    assert found.status == "fail"
    assert "differ in 1 tensors, such as model.layers.0.mlp.up_proj.weight" in found.fix


def test_an_adapter_starts_as_nothing(tmp_path: Path) -> None:
    config = healthy(tmp_path)
    policy = config["model"]["init_args"]["policy"] | {"lora": {"r": 2, "alpha": 4}}
    config = changed(config, model__init_args__policy=policy, model__init_args__reference=...)
    context = loaded(tmp_path, config)
    assert ask(context, "kl_at_start").status == "pass"
    with torch.no_grad():
        for name, weight in context.module.policy.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    found = ask(context, "kl_at_start")
    assert found.status == "fail"
    assert "the adapter changes the policy before training" in found.fix


def test_a_reference_of_other_precision_is_told_by_its_rounding(tmp_path: Path) -> None:
    config = healthy(tmp_path)
    reference = config["model"]["init_args"]["reference"] | {"dtype": "bfloat16"}
    context = loaded(tmp_path, changed(config, model__init_args__reference=reference))
    found = ask(context, "kl_at_start")
    assert found.values["kl"] > 1e-6
    assert found.status == "pass"
    assert "rounding explains 0.002" in found.measured


def test_without_a_reference_there_is_nothing_to_compare(tmp_path: Path) -> None:
    config = changed(healthy(tmp_path), model__init_args__reference=..., model__init_args__kl_coef=0.0)
    assert ask(loaded(tmp_path, config), "kl_at_start").status == "skip"


# Decoding


def test_log_probs_of_another_temperature(well: DoctorContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(well.module.worker, "engine", Liar())
    found = ask(well, "log_probs")
    assert found.status == "fail"
    assert "model.rollout" in found.fix


@pytest.mark.parametrize(("precision", "status"), [("32-true", "warn"), ("bf16-mixed", "pass"), ("bf16-true", "pass")])
def test_rounding_of_16_bits_passes_in_16_bits_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, status: str
) -> None:
    """The difference is planted: how much the two passes differ by rounding, if at all, depends on the processor."""

    def shifted(_model: Any, rollout: Rollout, _sampling: Any, **_options: Any) -> TokenStatistics:
        assert rollout.log_probs is not None
        nothing = torch.zeros_like(rollout.log_probs)
        return TokenStatistics(rollout.log_probs + 5e-3, nothing)

    monkeypatch.setattr(policy_checks, "policy_statistics", shifted)
    result = ask(loaded(tmp_path, healthy(tmp_path), trainer__precision=precision), "log_probs")
    assert result.status == status, result
    assert [result.values[name] for name in ("mean", "largest")] == pytest.approx([5e-3, 5e-3], rel=1e-3)


@pytest.mark.parametrize("tolerance", [KL, KL_16_BITS, MEAN, MEAN_16_BITS, LARGEST, LARGEST_16_BITS])
def test_a_tolerance_passes_rounding_and_fails_a_fault(tolerance: Tolerance) -> None:
    just_above = 1 + 1e-6
    assert tolerance.status(0.0) == tolerance.status(tolerance.rounding) == "pass"
    assert tolerance.status(tolerance.rounding * just_above) == tolerance.status(tolerance.fault) == "warn"
    assert tolerance.status(tolerance.fault * just_above) == tolerance.status(float("nan")) == "fail"


def test_greedy_responses_that_are_drawn(well: DoctorContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(well.module.worker, "engine", SampledAsGreedyEngine())
    found = ask(well, "greedy")
    assert found.status == "fail"
    assert "differ when they are generated again" in found.measured


def test_a_model_that_reads_padding(well: DoctorContext) -> None:
    with blind_to_padding(well.module.policy):
        padding, greedy = ask(well, "prompt_padding"), ask(well, "greedy")
    assert padding.status == "fail"
    assert "attention_mask" in padding.fix
    assert greedy.status == "fail"
    assert "depends on the batch" in greedy.fix
    assert greedy.values["largest_gap"] > 1e-3


@pytest.mark.parametrize(
    ("options", "fixed", "status"),
    [
        ({"top_p": 0.9}, {"processed_log_probs": True}, "warn"),
        ({"top_k": 1}, {"processed_log_probs": True}, "fail"),
        ({"temperature": 0.9, "scale_log_probs": False}, {"scale_log_probs": True}, "warn"),
        ({"temperature": 0.1, "scale_log_probs": False}, {"scale_log_probs": True}, "fail"),
    ],
    ids=str,
)
def test_training_another_distribution_than_is_sampled(
    tmp_path: Path, options: dict[str, Any], fixed: dict[str, Any], status: str
) -> None:
    config = healthy(tmp_path)
    context = loaded(tmp_path, changed(config, model__init_args__sampling=SAMPLING | options))
    found = ask(context, "on_policy")
    assert found.status == status
    [key] = fixed
    assert f"model.sampling.{key}" in found.fix
    assert ask(context, "log_probs").status == "pass"  # of what is trained, both passes say the same
    context = loaded(tmp_path, changed(config, model__init_args__sampling=SAMPLING | options | fixed))
    assert ask(context, "on_policy").status == "pass"


def test_a_blocked_eos_is_left_out_of_training_too(tmp_path: Path) -> None:
    config = changed(healthy(tmp_path), model__init_args__sampling=SAMPLING | {"min_response_length": 3})
    context = loaded(tmp_path, config)
    assert ask(context, "on_policy").status == "pass"
    assert ask(context, "log_probs").status == "pass"


def test_truncation_makes_drawn_tokens_likelier_by_what_it_cuts_off(tmp_path: Path) -> None:
    """With the two likeliest tokens alone, by minus the log of their mass."""
    sampling = SAMPLING | {"top_k": 2}
    context = loaded(tmp_path, changed(healthy(tmp_path), model__init_args__sampling=sampling))
    rollout, cut = context.rollout, []
    for i, (ids, mask) in enumerate(zip(rollout.sampled.response_ids, rollout.sampled.response_mask, strict=True)):
        start = rollout.prompt.prompt_ids[i // 2][rollout.prompt.prompt_mask[i // 2]]
        with torch.no_grad():
            logits = context.module.policy(torch.cat([start, ids[mask]])[None]).logits[0, len(start) - 1 : -1]
        cut.append(-logits.double().softmax(-1).topk(2).values.sum(-1).log())
    assert ask(context, "on_policy").values["difference"] == pytest.approx(float(torch.cat(cut).mean()), rel=1e-3)


def test_an_engine_that_does_not_stop_is_not_greedys_fault(
    well: DoctorContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(well.module.worker, "engine", NeverStopsEngine())
    assert ask(well, "greedy").status == "pass"
