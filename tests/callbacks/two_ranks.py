"""Every callback on two ranks that see different responses; run by test_two_ranks.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from callbacks.fakes import FakeModule, make_output, make_trainer
from torch.utils.data import DataLoader

from remax_lightning import callbacks
from remax_lightning.config import AdvantageConfig, KLConfig, LossConfig, SamplingConfig
from remax_lightning.data.collate import MicroBatchSampler
from remax_lightning.training.objective import Objective

STOP_KL, TARGET_KL, HORIZON = 1.0, 0.5, 40


def outputs_of(rank: int) -> list[Any]:
    """Four steps of two parts. Ranks differ in the number of responses; at step 3 only rank 1's KL is large."""
    outputs = [make_output(10 * rank + i, closes=i % 2 == 1, prompts=3 - rank) for i in range(8)]
    for i, output in enumerate(outputs):
        large = rank == 1 and i in (4, 5)
        kl = output["kl"]
        assert kl is not None
        kl.copy_((10.0 if large else 0.1) * output["rollout"].sampled.response_mask)
        output["times"] = {"rollout": 0.001 * (1 + rank), "reward": 0.0}
        mask = output["rollout"].sampled.response_mask
        output["squared_norm"] = torch.rand(mask.shape, generator=torch.Generator().manual_seed(10 * rank + i)) * mask
    return outputs


class RankedModule(FakeModule):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.objective = Objective(KLConfig(), AdvantageConfig(), LossConfig(), 2)
        self.sampling, self.norm_askers = SamplingConfig(num_samples=2), list[Any]()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.train_outputs = outputs_of(self.global_rank)
        return super().training_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return [{"row": row} for row in batch.tolist() for _ in range(2)]  # as with two responses per prompt

    def predict_dataloader(self) -> Any:
        rows = range(5)
        place = {"rank": self.global_rank, "world_size": 2}
        sampler = MicroBatchSampler(len(rows), 2, shuffle=False, drop_last=False, **place)
        return DataLoader(rows, batch_size=2, sampler=sampler)  # type: ignore[arg-type]

    def on_train_end(self) -> None:
        seen = {"steps": self.trainer.global_step, "kl_coefs": [*self.kl_coefs, self.kl_coef]}
        (Path(self.trainer.default_root_dir) / f"rank{self.global_rank}.json").write_text(json.dumps(seen))


def main(folder: Path) -> None:
    ddp = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    every: list[Any] = [
        callbacks.KLMonitor(target_kl=TARGET_KL, adaptive=True, horizon=HORIZON, stop_kl=STOP_KL),
        callbacks.BaselineMonitor(),
        callbacks.GradientVariance(window=1),
        callbacks.Throughput(),
        callbacks.SampleDump(every_n_steps=1),
        callbacks.TensorBoardReport(every_n_steps=1),
    ]
    module = RankedModule(outputs_of(0), kl_coef=0.2)
    make_trainer(folder, every, accumulate_grad_batches=2, **ddp).fit(module)
    make_trainer(folder, [callbacks.PredictionWriter()], logger=False, **ddp).predict(
        RankedModule(outputs_of(0)), return_predictions=False
    )
