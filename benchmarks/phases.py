"""A run of `remax fit` that writes down the memory of each phase: `python benchmarks/phases.py CONFIG WARM_UP OUTPUT`.

Memory is the most that the process had resident in a phase, over what it had before models were loaded. A small run
goes first, so that libraries and their buffers are there by then. `GLIBC` says how the process has to be started.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from machine import resident

from remax_lightning.modules import ReMaxModule

GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""What makes glibc give a tensor back to the system when it is freed, so that resident memory is that of live ones."""


class Record:
    """The most memory of each phase of each step, in bytes."""

    def __init__(self) -> None:
        self.base, self.steps, self.phase = 0, [], ""
        self.steps: list[dict[str, int]]

    def load(self) -> None:
        """Count from here on."""
        gc.collect()
        self.__init__()
        self.base = resident("VmRSS")

    def enter(self, phase: str) -> None:
        """Close the phase that was entered before and begin another, or none."""
        if self.phase:
            step = self.steps[-1]
            step[self.phase] = max(step.get(self.phase, 0), resident("VmHWM") - self.base)
        self.phase = phase
        Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts anew


RECORD = Record()


class PhasedReMax(ReMaxModule):
    """ReMax that says when a phase begins."""

    def configure_model(self) -> None:
        """Count from the loading of the models on."""
        if "policy" not in self._modules:
            RECORD.load()
        super().configure_model()

    def on_fit_start(self) -> None:
        """Let scoring begin where the reward does."""
        super().on_fit_start()
        score = self.reward.score

        def entering(*arguments: Any) -> Any:
            RECORD.enter("scoring")
            return score(*arguments)

        self.reward.score = entering  # type: ignore[method-assign]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin a step with its rollout."""
        super().on_train_batch_start(batch, batch_idx)
        self.closes_step = (batch.micro_batch_index + 1) % self.trainer.accumulate_grad_batches == 0
        if batch.micro_batch_index == 0:
            RECORD.steps.append({})
            RECORD.enter("rollout")

    def _make_experience(self, *arguments: Any) -> Any:
        experience = super()._make_experience(*arguments)
        RECORD.enter("training")
        return experience

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Begin the update; DeepSpeed calls this after every micro-batch."""
        if self.closes_step:
            RECORD.enter("update")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the step."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.closes_step:
            RECORD.enter("")


def main() -> None:
    """Run both configurations and write the second one's steps, without the first of them: it makes the optimizer."""
    # Its twin under this name is the module that the configurations name.
    import phases

    from remax_lightning.cli_run import run

    config, warm_up, output = sys.argv[1:]
    os.chdir(Path(output).parent)
    for path in (warm_up, config):
        run(["fit", "--config", path])
        gc.collect()
    Path(output).write_text(json.dumps(phases.RECORD.steps[1:]))


if __name__ == "__main__":
    main()
