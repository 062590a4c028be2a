"""Six responses to three prompts, all of other lengths, and their log-probs one by one in double precision."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from conftest import tiny_model
from torch import Tensor

from remax_lightning.config import SamplingConfig
from remax_lightning.models.log_probs import policy_statistics
from remax_lightning.types import PromptBatch, Responses, Rollout

FAMILIES = ("llama", "qwen2", "gpt2", "opt")
PROMPTS = [[1, 5, 6], [1, 9, 8, 7, 30, 31], [40]]
RESPONSES = [[10, 11, 12, 2], [2], [13, 14], [15, 16, 17, 18, 19], [2], [20, 3, 21, 2]]  # two to a prompt
PAD = 3


def batch(extra_left: int = 0, extra_right: int = 0, pad: int = PAD) -> tuple[PromptBatch, Responses]:
    left = max(map(len, PROMPTS)) + extra_left
    right = max(map(len, RESPONSES)) + extra_right
    prompt_ids = torch.tensor([[pad] * (left - len(ids)) + ids for ids in PROMPTS])
    prompt_mask = torch.tensor([[False] * (left - len(ids)) + [True] * len(ids) for ids in PROMPTS])
    ids = torch.tensor([ids + [pad] * (right - len(ids)) for ids in RESPONSES])
    mask = torch.tensor([[True] * len(ids) + [False] * (right - len(ids)) for ids in RESPONSES])
    prompt = PromptBatch(prompt_ids, prompt_mask, [""] * len(PROMPTS), [{}] * len(PROMPTS))
    return prompt, Responses(ids, mask, torch.zeros(len(RESPONSES), dtype=torch.bool), [""] * len(RESPONSES))


def one_by_one(model: Any, temperature: float) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """Log-probs, entropies and squared norms of the gradients at the logits, token by token."""
    double = copy.deepcopy(model).double()
    log_probs, entropies, norms = [], [], []
    for i, response in enumerate(RESPONSES):
        prompt = PROMPTS[i // 2]
        with torch.no_grad():
            logits = double(input_ids=torch.tensor([prompt + response])).logits[0].double()
        log_probs.append([])
        entropies.append([])
        norms.append([])
        for t, token in enumerate(response):
            scaled = [value / temperature for value in logits[len(prompt) + t - 1].tolist()]
            highest = max(scaled)
            log_total = highest + math.log(math.fsum(math.exp(value - highest) for value in scaled))
            log_probs[-1].append(scaled[token] - log_total)
            entropies[-1].append(-math.fsum(math.exp(v - log_total) * (v - log_total) for v in scaled))
            slopes = [float(i == token) - math.exp(value - log_total) for i, value in enumerate(scaled)]
            norms[-1].append(math.fsum(slope * slope for slope in slopes))
    return log_probs, entropies, norms


def rollout_of(num_micro_batches: int = 1, **padding: int) -> Rollout:
    prompt, responses = batch(**padding)
    nothing = torch.zeros(len(RESPONSES))
    return Rollout(prompt._replace(num_micro_batches=num_micro_batches), responses, None, nothing, None, {}, None, None)


def pass_with_gradient(model: Any, *, packed: bool) -> tuple[Tensor, list[Tensor]]:
    """Log-probs of a pass over the six responses, and the gradient of their weighted sum."""
    found = policy_statistics(model, rollout_of(), SamplingConfig(), packed=packed).log_probs
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype)
    # Zeros stand for weights that a pass does not touch, such as the last learned positions.
    gradients = torch.autograd.grad((weights * found).sum(), list(model.parameters()), allow_unused=True)
    zeros = [torch.zeros_like(parameter) for parameter in model.parameters()]
    return found.detach(), [zero if value is None else value for value, zero in zip(gradients, zeros, strict=True)]


FORMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gpt2": {},
    "opt": {},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 16},
    "cohere": {"logit_scale": 3.0},
    "granite": {"logits_scaling": 0.2},
}


def model_of(family: str, seed: int = 0) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if family in FAMILIES:
        return tiny_model(family, seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**sizes, **ids, **FORMS[family], intermediate_size=64, vocab_size=96)
    return AutoModelForCausalLM.from_config(config).eval()
