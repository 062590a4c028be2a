"""The detector on two ranks that see different responses; run by test_collapse_two_ranks.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from callbacks.fakes import FakeModule, make_output, make_trainer

from remax_lightning.callbacks import CollapseDetector

STEPS, WINDOW = 8, 2


def outputs_of(rank: int) -> list[Any]:
    """Eight steps; from the fifth on rank 1's responses are all cut, and rank 0's are as they were."""
    outputs = [make_output(10 * rank + i, prompts=3 - rank) for i in range(STEPS)]
    for i, output in enumerate(outputs):
        output["rollout"].sampled.truncated[:] = rank == 1 and i >= 4
        output["rollout"].sampled.texts[0] = "on both ranks"
    return outputs


class RankedModule(FakeModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.train_outputs = outputs_of(self.global_rank)
        return super().training_step(batch, batch_idx)

    def on_train_end(self) -> None:
        seen = {"steps": self.trainer.global_step, "stopped": self.trainer.should_stop}
        (Path(self.trainer.default_root_dir) / f"rank{self.global_rank}.json").write_text(json.dumps(seen))


def main(folder: Path) -> None:
    # The share over both ranks is 0.4, on rank 0 alone 0 and on rank 1 alone 1.
    detector = CollapseDetector(window=WINDOW, action="stop", max_truncation_rate=0.35, min_eos_share=None)
    ddp = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    make_trainer(folder, [detector], **ddp).fit(RankedModule(outputs_of(0)))
