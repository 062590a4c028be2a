"""Steps of TRL's PPO that write down the memory of each phase: `python phases_ppo.py FOLDER WARM_UP SHAPES OUTPUT`.

Measured as in `phases.py`, in an environment with the last TRL that has PPO. TRL runs policy and value model in one
pass with gradients, so that both models' activations are there at once.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from phases import RECORD
from ppo_peer import make_trainer
from shapes import Shape
from transformers import TrainerCallback
from trl.experimental.ppo import ppo_trainer

GENERATE = ppo_trainer.batch_generation


def watch(trainer: Any) -> None:
    """Enter a phase where the trainer begins it."""
    accumulate, update = trainer.accelerator.accumulate, trainer.optimizer.step

    def generation(*arguments: Any, **options: Any) -> Any:
        RECORD.enter("rollout")
        result = GENERATE(*arguments, **options)
        RECORD.enter("scoring")
        return result

    def training(*arguments: Any) -> Any:
        RECORD.enter("training")  # entered once: there is one epoch of one mini-batch
        return accumulate(*arguments)

    def updating(*arguments: Any, **options: Any) -> Any:
        RECORD.enter("update")
        return update(*arguments, **options)

    class _Steps(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **options: Any) -> None:
            RECORD.steps.append({})

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            RECORD.enter("")

    ppo_trainer.batch_generation = generation
    trainer.accelerator.accumulate, trainer.optimizer.step = training, updating
    trainer.add_callback(_Steps())


def main() -> None:
    """Take three steps on both folders and write those of the first one, without its first: it makes the optimizer."""
    folder, warm_up, shapes, output = sys.argv[1:]
    os.chdir(Path(output).parent)
    shape, small = (Shape(*numbers) for numbers in json.loads(shapes))
    for path, size in ((warm_up, small), (folder, shape)):
        RECORD.load()
        trainer = make_trainer(Path(path), size)
        watch(trainer)
        for _ in range(3):
            trainer.train()
        del trainer
        gc.collect()
    Path(output).write_text(json.dumps(RECORD.steps[1:]))


if __name__ == "__main__":
    main()
