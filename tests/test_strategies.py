"""The DeepSpeed strategy, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import launch
from strategies.one_weight import main

from remax_lightning.errors import UserError
from remax_lightning.strategies import ReMaxDeepSpeedStrategy, full_parameters, sharded_init, strategy_of_name
from remax_lightning.strategies.deepspeed import sums_in


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_loss_is_divided_once(accumulate: int, tmp_path: Path) -> None:
    """A weight of 1 with gradient 1 and learning rate 1 ends at 0, however many micro-batches make the step."""
    launch(main, [1.0] * accumulate, tmp_path / "weight", ranks=1)
    assert float((tmp_path / "weight").read_text()) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_of_several_micro_batches_add_up_in_float32(stage: int, tmp_path: Path) -> None:
    """In bfloat16, 1 + 1/512 is 1, and the weight of 1 would end at 0."""
    launch(main, [4.0, *3 * [4 / 512]], tmp_path / "weight", "bf16-true", stage, ranks=1)
    assert float((tmp_path / "weight").read_text()) == -3 / 512


def test_a_dtype_of_the_configuration_counts_and_an_offloaded_optimizer_has_deepspeeds_own() -> None:
    assert [sums_in(ReMaxDeepSpeedStrategy(stage=stage).config) for stage in (1, 2, 3)] == ["", "fp32", "fp32"]
    assert sums_in(ReMaxDeepSpeedStrategy(stage=2, offload_optimizer=True).config) == ""
    own = {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}}
    assert sums_in(ReMaxDeepSpeedStrategy(config=own).config) == "bf16"


@pytest.mark.parametrize(
    ("name", "stage", "offloads"),
    [("deepspeed", 2, False), ("deepspeed_stage_1", 1, False), ("deepspeed_stage_3_offload", 3, True)],
)
def test_lightnings_names_stand_for_this_strategy(name: str, stage: int, offloads: bool) -> None:
    strategy = strategy_of_name(name)
    assert strategy is not None
    zero = strategy.config["zero_optimization"]  # type: ignore[index]
    assert (zero["stage"], "offload_optimizer" in zero) == (stage, offloads)


@pytest.mark.parametrize("name", ["ddp", "auto", "deepsped", None, ReMaxDeepSpeedStrategy(stage=2)])
def test_other_strategies_stay_what_they_are(name: Any) -> None:
    assert strategy_of_name(name) is None


def test_zero_3_does_not_start_from_scratch() -> None:
    with (
        pytest.raises(UserError, match=r"model\.policy\.from_scratch must be false under ZeRO-3"),
        sharded_init(ReMaxDeepSpeedStrategy(stage=3), from_scratch=True),
    ):
        pass


def test_a_partition_that_is_not_ours_is_refused() -> None:
    """A policy under Lightning's own ZeRO-3: its parameters bear DeepSpeed's mark, nothing is known of its hooks."""
    layer = torch.nn.Linear(2, 2)
    layer.weight.ds_id = 0
    with pytest.raises(UserError, match="ReMaxDeepSpeedStrategy"), full_parameters(layer):
        pass


def test_whole_parameters_leaves_a_plain_model_alone() -> None:
    layer = torch.nn.Linear(2, 2)
    weight = layer.weight
    with full_parameters(layer):
        assert layer.weight is weight
    assert layer.weight is weight
