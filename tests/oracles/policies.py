"""Log-probs of one unpadded response at a time, in double precision, differentiable token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remax_lightning.types import Rollout


def load(path: str, weights: dict[str, Tensor] | None = None) -> Any:
    """The causal language model saved at `path`, with other weights if they are given."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    return model


def log_probs(model: Any, prompt: list[int], response: list[int], temperature: float = 1.0) -> list[Tensor]:
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double() / temperature
    return [
        logits[len(prompt) + t - 1][token] - torch.logsumexp(logits[len(prompt) + t - 1], 0)
        for t, token in enumerate(response)
    ]


def rows(rollout: Rollout) -> list[tuple[list[int], list[int]]]:
    """Prompt and sampled response without padding, one pair per response."""
    prompt, sampled = rollout.prompt, rollout.sampled
    prompts = [ids[mask].tolist() for ids, mask in zip(prompt.prompt_ids, prompt.prompt_mask, strict=True)]
    responses = [ids[mask].tolist() for ids, mask in zip(sampled.response_ids, sampled.response_mask, strict=True)]
    return [(prompts[i // rollout.num_samples], response) for i, response in enumerate(responses)]


def gradient(model: Any) -> dict[str, Tensor]:
    """The gradient that `backward` left on the parameters."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}
