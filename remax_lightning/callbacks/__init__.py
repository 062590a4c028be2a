"""Callbacks. They read only what `training_step` and `validation_step` return."""

from __future__ import annotations

from lightning.pytorch import Callback

from remax_lightning.callbacks.collapse_detector import CollapseDetector
from remax_lightning.callbacks.evaluation import Evaluation
from remax_lightning.callbacks.export_policy import ExportPolicy
from remax_lightning.callbacks.gradient_variance import GradientVariance
from remax_lightning.callbacks.lm_eval import LMEval
from remax_lightning.callbacks.monitors import BaselineMonitor, KLMonitor, rollout_output
from remax_lightning.callbacks.run_progress import RunProgress
from remax_lightning.callbacks.samples import PredictionWriter, SampleDump
from remax_lightning.callbacks.tensorboard import TensorBoardReport
from remax_lightning.callbacks.throughput import Throughput


def default_callbacks() -> list[Callback]:
    """Return what the command line adds to every run, for a `Trainer` of your own.

    Samples, figures of KL, baseline and throughput, a comparison of baselines, guards against collapse, the exported
    policy, the table of an evaluation, TensorBoard's charts and the progress, each with its defaults. To change one,
    leave it out and add your own. `LMEval`, which needs tasks, is not among them.
    """
    return [
        KLMonitor(),
        SampleDump(),
        BaselineMonitor(),
        GradientVariance(),
        CollapseDetector(),
        Throughput(),
        ExportPolicy(),
        TensorBoardReport(),
        PredictionWriter(),
        Evaluation(),
        RunProgress(),
    ]


__all__ = [
    "BaselineMonitor",
    "CollapseDetector",
    "Evaluation",
    "ExportPolicy",
    "GradientVariance",
    "KLMonitor",
    "LMEval",
    "PredictionWriter",
    "RunProgress",
    "SampleDump",
    "TensorBoardReport",
    "Throughput",
    "default_callbacks",
    "rollout_output",
]
