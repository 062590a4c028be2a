from __future__ import annotations

from pathlib import Path

import pytest
import torch
from callbacks.fakes import FakeModule, events, make_output, make_trainer, two_steps_of_two_parts

from remax_lightning.callbacks import BaselineMonitor, KLMonitor, TensorBoardReport, Throughput
from remax_lightning.errors import UserError


def test_histograms_hold_the_responses_of_a_step(tmp_path: Path) -> None:
    outputs = two_steps_of_two_parts()
    trainer = make_trainer(tmp_path, [TensorBoardReport(every_n_steps=2)], accumulate_grad_batches=2)
    trainer.fit(FakeModule(outputs))
    reader, parts = events(tmp_path), outputs[2:]
    expected = {
        "reward": torch.cat([part["rollout"].reward for part in parts]),
        "response_length": torch.cat([part["rollout"].sampled.response_mask.sum(1) for part in parts]),
        "kl": torch.cat([part["kl"].sum(1) for part in parts if part["kl"] is not None]),
    }
    assert sorted(reader.Tags()["histograms"]) == [f"distribution/{name}" for name in sorted(expected)]
    for name, values in expected.items():
        (event,) = reader.Histograms(f"distribution/{name}")
        histogram = event.histogram_value
        assert (event.step, histogram.num) == (2, 12)
        assert histogram.sum == pytest.approx(float(values.sum()))
        assert (histogram.min, histogram.max) == pytest.approx((float(values.min()), float(values.max())))


def test_the_layout_groups_every_scalar_of_the_callbacks(tmp_path: Path) -> None:
    from tensorboard.plugins.custom_scalar import layout_pb2

    callbacks = [TensorBoardReport(every_n_steps=0), KLMonitor(), BaselineMonitor(), Throughput()]
    make_trainer(tmp_path, callbacks).fit(FakeModule([make_output(0), make_output(1)]))
    reader = events(tmp_path)
    (event,) = reader.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {
        chart.title: [tag.removeprefix("^").removesuffix("$") for tag in chart.multiline.tag]
        for group in layout.category
        for chart in group.chart
    }
    assert [group.title for group in layout.category] == ["Reward", "KL", "Responses", "Baseline", "Optimizer", "Time"]
    shown = {tag for tags in charts.values() for tag in tags}
    assert {"train/reward", "train/baseline_reward", "val/reward", "train/truncation_rate"} <= shown
    assert set(reader.Tags()["scalars"]) - {"epoch"} <= shown
    assert reader.Tags()["histograms"] == []


LOGGED = {
    f"{stage}/{name}"
    for stage in ("train", "val")
    for name in ("reward", "reward_part/kl", "baseline_reward", "kl", "kl_per_response", "kl_max", "kl_coef", "entropy")
}
"""Curves of which some names are the beginning of others."""


def test_each_chart_draws_its_own_curves_alone(tmp_path: Path) -> None:
    """As TensorBoard itself finds them, by the regular expressions of its plugin."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
    from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin

    trainer = make_trainer(tmp_path, [TensorBoardReport(every_n_steps=0)])
    trainer.fit(FakeModule([make_output(0)]))
    for tag in LOGGED | {f"{tag}_of_mine" for tag in LOGGED} | {f"my/{tag}" for tag in LOGGED}:
        trainer.logger.experiment.add_scalar(tag, 1.0, 1)
    trainer.logger.experiment.flush()
    multiplexer = EventMultiplexer().AddRun(str(tmp_path / "logs"), "run").Reload()
    context = TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(tmp_path)), plugin_name_to_instance={})
    context.plugin_name_to_instance["scalars"] = ScalarsPlugin(context)
    plugin = CustomScalarsPlugin(context)
    (event,) = multiplexer.Tensors("run", "custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    drawn = {
        (group.title, chart.title): sorted(
            name
            for tag in chart.multiline.tag
            for name in plugin.scalars_impl(RequestContext(), "run", tag, "")["tag_to_events"]
        )
        for group in layout.category
        for chart in group.chart
    }
    assert drawn["Reward", "training: sampled and greedy"] == ["train/baseline_reward", "train/reward"]
    assert drawn["KL", "training and validation"] == ["train/kl", "val/kl"]
    assert drawn["KL", "of a response: mean and largest"] == ["train/kl_max", "train/kl_per_response"]
    assert drawn["Responses", "entropy"] == ["train/entropy", "val/entropy"]
    assert all(name in LOGGED | {"train/kl_share"} for names in drawn.values() for name in names)


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    output = make_output(0)
    output["kl"][0, 0] = float("inf")  # type: ignore[index]
    make_trainer(tmp_path, [TensorBoardReport(every_n_steps=1)]).fit(FakeModule([output]))
    assert events(tmp_path).Histograms("distribution/kl")[0].histogram_value.num == 5


def test_without_tensorboard_nothing_happens(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [TensorBoardReport(every_n_steps=1)], logger=False)
    trainer.fit(FakeModule([make_output(0)]))
    assert trainer.global_step == 1


def test_bad_argument_names_its_key() -> None:
    with pytest.raises(UserError, match=r"tensorboard\.every_n_steps"):
        TensorBoardReport(every_n_steps=-1)
