"""What a checkpoint needs beyond weights: an unfinished rollout, and a place in the loops that resumes exactly."""

from __future__ import annotations

from typing import Any

from remax_lightning.batch import PromptBatch, Responses, Rollout
from remax_lightning.modules.objective import Experience


def experience_state(experience: Experience) -> dict[str, Any]:
    """Return the experience as nested dictionaries of tensors, numbers and text: `weights_only=True` reads those.

    The rows of the data set stay out: they may hold anything, and once a rollout is scored nothing reads them.
    """
    rollout = experience.rollout
    state = experience._asdict()
    state["rollout"] = rollout._asdict() | {
        "prompt": rollout.prompt._replace(rows=[])._asdict(),
        "sampled": rollout.sampled._asdict(),
        "greedy": None if rollout.greedy is None else rollout.greedy._asdict(),
    }
    return state


def experience_from_state(state: dict[str, Any]) -> Experience:
    """Return the experience that `experience_state` took apart."""
    rollout = dict(state["rollout"])
    rollout["prompt"] = PromptBatch(**rollout["prompt"])
    rollout["sampled"] = Responses(**rollout["sampled"])
    rollout["greedy"] = None if rollout["greedy"] is None else Responses(**rollout["greedy"])
    return Experience(**{**state, "rollout": Rollout(**rollout)})


def resume_after_last_batch(checkpoint: dict[str, Any]) -> None:
    """Make the loops of a checkpoint say that it was saved at the end of a training batch, whenever it was.

    That is the one place which Lightning 2.6 resumes exactly. From a checkpoint of the end of an epoch or of a
    validation, as its `ModelCheckpoint` saves by default, it counts an epoch too many or trains a batch too many in the
    old epoch, and every later epoch comes in another order. The data position is the loader's own, so nothing is lost.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    batches, epochs = loops.get("epoch_loop.batch_progress"), loops.get("epoch_progress")
    if batches is None or epochs is None:
        return
    now = batches["current"]
    if not 0 < now["ready"] == now["started"] == now["processed"]:
        return  # inside a batch, or before the first
    for part in ("total", "current"):
        batches[part]["completed"] = batches[part]["processed"] - 1
        epochs[part]["processed"] = epochs[part]["completed"] = epochs[part]["started"] - 1
