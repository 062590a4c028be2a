"""A step of ReMax as the paper's own code takes it, in plain torch: what ours is measured against.

Two `generate` calls. Prompt and response go through the reward model once for the sampled and once for the greedy
responses. Policy and reference each make the logits of every position; from them the log-probs, and the entropy and
the KL over the vocabulary, for the logs, in `[B, T, V]` tensors. The returns are made by a loop over rows and tokens.
Then comes the training pass, over the logits of every position once more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from shapes import EOS, PAD, Shape
from timing import seconds
from torch import Tensor

KL_COEF, GAMMA, REWARD_CLIP = 0.05, 0.99, 5.0


class PapersWay:
    """Trains the policy in `folder` on given prompts.

    Args:
        folder: where `shapes.save` wrote.
        shape: what it wrote.
    """

    def __init__(self, folder: Path, shape: Shape) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        self.policy: Any = AutoModelForCausalLM.from_pretrained(folder / "policy")
        self.reference: Any = AutoModelForCausalLM.from_pretrained(folder / "policy").eval()
        self.reward: Any = AutoModelForSequenceClassification.from_pretrained(folder / "reward").eval()
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6)
        self.shape = shape

    def step(self, prompt_ids: Tensor) -> dict[str, float]:
        """Take one optimizer step and return its seconds by phase."""
        cpu = torch.device("cpu")
        rollout, (sampled, greedy) = seconds(lambda: self._generate(prompt_ids), cpu)
        scoring, experience = seconds(lambda: self._score(sampled, greedy), cpu)
        training, _ = seconds(lambda: self._train(sampled, *experience), cpu)
        return {"rollout": rollout, "scoring": scoring, "training": training}

    def _generate(self, prompt_ids: Tensor) -> tuple[Tensor, Tensor]:
        self.policy.eval()
        options = {
            "attention_mask": torch.ones_like(prompt_ids),
            "max_new_tokens": self.shape.response,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        }
        sampled = self.policy.generate(prompt_ids, do_sample=True, top_k=0, **options)
        greedy = self.policy.generate(prompt_ids, do_sample=False, **options)
        self.policy.train()
        return sampled, greedy

    @torch.no_grad()
    def _score(self, sampled: Tensor, greedy: Tensor) -> tuple[Tensor, Tensor]:
        """Return the advantages and the mask of the response tokens, each `[B, R]`."""
        mask, start = sampled != PAD, self.shape.prompt
        reward = self.reward(sampled, attention_mask=mask.long()).logits[:, 0]
        baseline = self.reward(greedy, attention_mask=(greedy != PAD).long()).logits[:, 0]
        logits = self.policy(sampled, attention_mask=mask.long(), use_cache=False).logits
        reference = self.reference(sampled, attention_mask=mask.long(), use_cache=False).logits
        log_ratio = _log_probs(logits, sampled) - _log_probs(reference, sampled)
        probabilities, log_p = logits.softmax(-1), logits.log_softmax(-1)
        entropy = -(probabilities * log_p).sum(-1)
        kl = (probabilities * (log_p - reference.log_softmax(-1))).sum(-1)
        self.logged = {"entropy": float(entropy.mean()), "kl": float(kl.mean())}
        response_mask = mask[:, start:]
        return _returns(
            log_ratio[:, start - 1 :], response_mask, (reward - baseline).clamp(-REWARD_CLIP, REWARD_CLIP)
        ), response_mask

    def _train(self, sampled: Tensor, advantages: Tensor, mask: Tensor) -> None:
        logits = self.policy(sampled, attention_mask=(sampled != PAD).long(), use_cache=False).logits
        log_probs = _log_probs(logits, sampled)[:, self.shape.prompt - 1 :]
        loss = -(log_probs * advantages * mask).sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Return `[B, T - 1]` log-probs of the tokens after the first."""
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def _returns(log_ratio: Tensor, mask: Tensor, reward: Tensor) -> Tensor:
    """Return `A_t = -kl_coef * log_ratio_t + gamma^k * reward`, `k` tokens from `t` to the end; one token at a time."""
    advantages = torch.zeros_like(log_ratio)
    for row in range(len(log_ratio)):
        discounted = reward[row]
        for token in reversed(range(int(mask[row].sum()))):
            discounted = GAMMA * discounted
            advantages[row, token] = -KL_COEF * log_ratio[row, token] + discounted
    return advantages
