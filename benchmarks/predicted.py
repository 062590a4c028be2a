"""What `remax plan` predicts of the passes that benchmarks/gpu.py measures."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from remax_lightning.rollout import SamplingConfig
from remax_lightning.tools.plan.activation_memory import StepPasses, StepShape


def predicted(model: Any, prompts: int, prompt: int, response: int, micro_batch: int) -> dict[str, float]:
    """Return the peaks of a rollout and of a training pass in GB, weights included.

    Args:
        model: without memory, built inside `shapes_only`, as this has to be called.
        prompts: of a rollout, each with a sampled and a greedy response.
        prompt: tokens.
        response: tokens.
        micro_batch: responses per training pass, of which there are several: gradients are there from the first on.
    """
    work = StepShape(
        prompts, SamplingConfig(max_response_length=response), prompt, micro_batch, micro_batch, micro_batch
    )
    passes = StepPasses(model, work, nullcontext, whole_logits=False)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    rollout, training = passes.rollout(greedy=True), passes.training()
    live = max(training.forward, *(moment.live for moment in training.backward))
    return {
        "rollout_predicted_gb": (weights + rollout.cache + rollout.working) / 1e9,
        "training_predicted_gb": (2 * weights + live) / 1e9,
    }
