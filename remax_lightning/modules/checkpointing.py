"""An unfinished rollout in a checkpoint, as plain dictionaries that `torch.load(weights_only=True)` reads."""

from __future__ import annotations

from typing import Any

from remax_lightning.batch import PromptBatch, Responses, Rollout
from remax_lightning.modules.objective import Experience


def experience_state(experience: Experience) -> dict[str, Any]:
    """Return the experience as nested dictionaries of tensors, numbers and text.

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
