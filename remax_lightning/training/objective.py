"""The loss of a rollout: applies the configuration to the functions of `functional`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast, get_args

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from remax_lightning.baselines import Baseline, baseline_name, checked_values, make_baseline
from remax_lightning.config import AdvantageConfig, KLConfig, LossConfig
from remax_lightning.errors import UserError
from remax_lightning.functional import (
    BaselineKind,
    Mismatch,
    TokenStatistics,
    clipped_surrogate_loss,
    kl_estimate,
    kl_loss,
    masked_mean,
    mismatch_weights,
    normalized_differences,
    reinforce_loss,
    remax_advantages,
)
from remax_lightning.training.config_checks import check_token_rewards
from remax_lightning.training.experience import Experience, baseline_inputs, places_over_ranks
from remax_lightning.training.metrics import Figures
from remax_lightning.types import PromptBatch, Rollout


class Objective:
    """The loss of ReMax in the configured variant; its only state is the memory of a baseline that has one."""

    def __init__(self, kl: KLConfig, advantage: AdvantageConfig, loss: LossConfig, num_samples: int) -> None:
        self.baseline: Baseline = make_baseline(advantage.baseline)
        # With n = 1 there is no other sample, and the mean of the group is r itself.
        if num_samples < self.baseline.min_samples:
            raise UserError(
                f"model.advantage.baseline {baseline_name(advantage.baseline)} needs model.sampling.num_samples of at"
                f" least {self.baseline.min_samples}, got {num_samples}"
            )
        if kl.in_baseline and advantage.baseline not in ("leave_one_out", "group_mean"):
            raise UserError(
                "model.kl.in_baseline needs model.advantage.baseline leave_one_out or group_mean,"
                f" got {baseline_name(advantage.baseline)}: the KL of a greedy response is not known"
            )
        if kl.in_baseline and kl.credit == "none":
            raise UserError("model.kl.in_baseline needs model.kl.credit to_go or one_step, got none")
        if self.baseline.reads_gradients and loss.old_log_probs == "rollout":
            raise UserError(
                "model.loss.old_log_probs must be recompute where model.advantage.baseline is"
                f" {baseline_name(advantage.baseline)}, got rollout: it reads gradients from a pass of its own"
            )
        if kl.full and loss.old_log_probs == "rollout":
            raise UserError(
                "model.loss.old_log_probs must be recompute where model.kl.estimator or loss_estimator is full, got"
                " rollout: that KL needs the hidden states of a pass of its own"
            )
        self.kl_config, self.advantage_config, self.loss_config = kl, advantage, loss
        self.compares_vocabulary = kl.full
        """Whether a KL is over the vocabulary, for which the hidden states of the reference are kept."""
        self.needs_greedy = self.baseline.greedy != "never"
        """Whether the baseline reads the greedy response's reward, in some rollouts at least."""
        self.reads_whole_batch = advantage.baseline not in get_args(BaselineKind)
        """Whether the baseline takes more than the samples of one prompt and its greedy response."""
        self.reads_all_scores = self.reads_whole_batch and not self.baseline.reads_gradients
        """Whether that is the scores of the whole batch, which are known before any training pass."""

    @property
    def truncation_penalty(self) -> float:
        """Reward that a truncated response loses."""
        config = self.advantage_config
        return config.truncation_penalty if config.overlong in ("penalize", "soft") else 0.0

    def uses_kl(self, kl_coef: float) -> bool:
        """Whether a KL to the reference enters the advantages or the loss."""
        return self.kl_config.loss_coef > 0 or (kl_coef > 0 and self.kl_config.credit != "none")

    def normalize(
        self, rollout: Rollout, weights: dict[str, float], penalty: Tensor, reduce: Callable[[Tensor], Tensor]
    ) -> Rollout:
        """Return `rollout` with `normalized_reward`, the parts above their greedy values on one scale.

        Args:
            rollout: whole, with greedy responses: the scale of a part is that of all micro-batches and ranks.
            weights: by the names of the parts.
            penalty: `[S]` reward that a response loses for its length, above that of its greedy response. It stays in
                the unit of its key, beside parts whose root mean square is their weight.
            reduce: sums a tensor over ranks.
        """
        greedy = cast("dict[str, Tensor]", rollout.baseline_parts)
        parts = torch.stack([rollout.reward_parts[name] for name in weights], dim=1)  # [S, K]
        baseline_parts = torch.stack([greedy[name] for name in weights], dim=1)  # [B, K]
        values = torch.tensor(list(weights.values()), device=parts.device)  # [K]
        above = normalized_differences(parts, baseline_parts, values, reduce)  # [S]
        return rollout._replace(normalized_reward=above - penalty)

    def loss_mask(self, rollout: Rollout) -> Tensor:
        """Return `[S, R]` bool, True on the tokens that are trained on."""
        mask = rollout.sampled.response_mask
        if self.advantage_config.overlong == "mask":
            return mask & ~rollout.sampled.truncated[:, None]
        return mask

    def advantages(
        self,
        rollout: Rollout,
        kl: Tensor | None,
        kl_coef: float,
        reduce: Callable[[Tensor], Tensor],
        baseline: Tensor | None = None,
    ) -> Tensor:
        """Return `[S, R]` advantages of the trained tokens.

        Args:
            rollout: the responses and their rewards.
            kl: `[S, R]` KL estimate; None without a reference.
            kl_coef: beta.
            reduce: sums a tensor over ranks.
            baseline: `[S]` of a baseline that reads the whole batch; None compares with what the rollout has, in an
                evaluation with the greedy response.
        """
        config = self.advantage_config
        kind = cast(BaselineKind, "greedy" if self.reads_whole_batch else config.baseline)
        # A KL that is in the loss only is measured, but costs no reward.
        uses_kl = kl is not None and kl_coef > 0 and self.kl_config.credit != "none"
        reward, baseline_reward = rollout.reward, rollout.baseline_reward
        if rollout.normalized_reward is not None:  # the greedy values are subtracted already
            reward, kind = rollout.normalized_reward, "none"
        if rollout.token_rewards is not None:
            check_token_rewards(self.kl_config, config)
            reward, baseline_reward = rollout.token_rewards, rollout.baseline_token_rewards  # [S, R], [B, R']
        return remax_advantages(
            reward,
            rollout.sampled.response_mask,
            loss_mask=self.loss_mask(rollout),
            num_samples=rollout.num_samples,
            baseline=kind if baseline is None else baseline,
            baseline_reward=baseline_reward if kind == "greedy" else None,
            baseline_mask=None if rollout.greedy is None else rollout.greedy.response_mask,
            kl=kl if uses_kl else None,
            kl_coef=kl_coef if uses_kl else 0.0,
            kl_credit=self.kl_config.credit if uses_kl else "none",
            kl_in_baseline=self.kl_config.in_baseline and uses_kl,
            gamma=config.gamma,
            reward_clip=config.reward_clip,
            reward_clip_at=config.reward_clip_at,
            whiten=config.whiten,
            reduce=reduce,
        )

    # ---- Baselines that read the whole batch ----

    def needs_greedy_now(self, batch: PromptBatch, trainer: Trainer) -> bool:
        """Return whether a baseline that does not always need greedy responses needs those of these prompts."""
        return self.baseline.greedy == "sometimes" and self.baseline.needs_greedy(places_over_ranks(batch, trainer))

    def baseline_of_batch(self, rollout: Rollout, trainer: Trainer, squared_norm: Tensor | None = None) -> Tensor:
        """Return `[S]` what the rewards of this rank are compared with, and let the baseline learn from the rollout.

        For a baseline that `reads_whole_batch`; one of the samples of a prompt alone is computed by `remax_advantages`.

        Args:
            rollout: of this rank.
            trainer: knows the ranks.
            squared_norm: `[S, R]` of the gradients of the tokens; the values are then of tokens, too, `[S, R]`.

        Raises:
            UserError: if the baseline returns something else than finite numbers.
        """
        config = self.advantage_config
        bound = config.reward_clip if config.reward_clip_at == "before_baseline" else None
        inputs = baseline_inputs(rollout, trainer, math.inf if bound is None else bound, squared_norm)
        # ---- The values of this rank's responses; all ranks have as many ----
        values = checked_values(self.baseline, inputs)  # [ranks * S]
        self.baseline.observe(inputs)
        start, size = trainer.global_rank * len(rollout.reward), len(rollout.reward)
        values = values[start : start + size].to(rollout.reward)
        return values if squared_norm is None else values[:, : squared_norm.shape[1]]

    def state_dict(self) -> tuple[str, dict[str, Any]]:
        """Return the memory of the baseline, the same on every rank, with the class that it belongs to."""
        return type(self.baseline).__qualname__, self.baseline.state_dict()

    def load_state_dict(self, state: tuple[str, dict[str, Any]] | None) -> bool:
        """Restore the memory, if it is of this baseline, and return whether it is; else the baseline starts anew."""
        kind, memory = state or ("", {})
        if kind != type(self.baseline).__qualname__:
            return False
        self.baseline.load_state_dict(memory)
        return True

    def with_advantages(
        self,
        experience: Experience,
        stats: TokenStatistics | None,
        kl_coef: float,
        reduce: Callable[[Tensor], Tensor],
    ) -> Experience:
        """Return `experience` with its advantages, A_t = r - b - beta * sum_{s>=t} kl_s by default.

        Advantages that exist already are kept.

        Args:
            experience: a rollout, or a micro-batch of one.
            stats: of the policy, for the KL, which is estimated where there is a reference; None without one.
            kl_coef: beta.
            reduce: sums a tensor over ranks.
        """
        if experience.advantages is not None:
            return experience
        rollout, config, kl = experience.rollout, self.kl_config, None
        # ---- kl_t of every token [S, R]: a part of the reward, so detached; `_kl_term` is differentiated ----
        if stats is not None and rollout.reference_log_probs is not None:
            if config.estimator == "full":
                kl = _clamped(stats.kl, config.clamp).detach()
            else:
                # log pi(y_t) - log pi_ref(y_t)
                log_ratio = stats.log_probs.detach() - rollout.reference_log_probs
                kl = kl_estimate(log_ratio, config.estimator, config.clamp)
            kl = kl.masked_fill(~rollout.sampled.response_mask, 0.0)
        advantages = self.advantages(rollout, kl, kl_coef, reduce, experience.baseline)  # [S, R]
        return experience._replace(advantages=advantages, kl=kl)

    def update_counts(self, rollout: Rollout, updates: int) -> Tensor:
        """Return `[U]` the divisor of the loss of each update on this rank: trained tokens, or responses."""
        counted = self.loss_mask(rollout)  # [S, R]
        if self.loss_config.normalizer == "responses":
            counted = torch.ones_like(counted[:, :1])  # [S, 1], a response counts once, whatever is masked
        # Updates take equal shares of the responses, in their order. float64, since float32 counts up to 2^24 only.
        return counted.view(updates, -1).sum(-1).double()

    def loss(
        self, log_probs: Tensor, experience: Experience, normalizer: Tensor, full_kl: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a micro-batch and the share of its tokens whose ratio was clipped.

        Args:
            log_probs: `[S, R]` of the policy now, differentiable.
            experience: the micro-batch, with its advantages.
            normalizer: divisor of the sum over tokens, N; `micro_batch` uses the tokens of the micro-batch instead.
            full_kl: `[S, R]` KL over the vocabulary, differentiable; needed for `full`.
        """
        rollout, advantages = experience.rollout, cast(Tensor, experience.advantages)
        # ---- What is trained on, and N ----
        mask, config = self.loss_mask(rollout), self.loss_config
        # Lightning and the strategy then take the mean of these means over micro-batches and ranks.
        if config.normalizer == "micro_batch":
            normalizer = mask.sum().double()
        # N is 0 where no token of the step is trained on; then the sum is 0 as well.
        normalizer = normalizer.clamp_min(1e-8).float()
        clip_fraction = torch.zeros_like(normalizer)
        # ---- pi(y) / mu(y), where an engine drew from other probabilities mu ----
        weights = None
        if rollout.engine_log_probs is not None:
            weights = self.mismatch(log_probs, rollout, rollout.engine_log_probs).weights  # [S, R]
            advantages = advantages * weights
        # ---- The policy gradient: - sum_t A_t log pi(y_t) / N, or PPO's surrogate of it ----
        if config.kind == "reinforce":
            loss = reinforce_loss(log_probs, advantages, mask, normalizer)
        else:
            loss, clip_fraction = clipped_surrogate_loss(
                log_probs,
                _old_log_probs(log_probs, rollout),
                advantages,
                mask,
                normalizer,
                config.clip_range,
                config.dual_clip,
            )
        # ---- The KL as a loss, over the same tokens and with the same N ----
        if self.kl_config.loss_coef > 0 and rollout.reference_log_probs is not None:
            loss = loss + self.kl_config.loss_coef * self._kl_term(log_probs, rollout, normalizer, full_kl, weights)
        return loss, clip_fraction.detach()

    def mismatch(self, log_probs: Tensor, rollout: Rollout, theirs: Tensor) -> Mismatch:
        """Return the weights that correct for an engine with other probabilities.

        Args:
            log_probs: `[S, R]` of the policy now. With several updates per rollout those before the first are compared,
                and the clip bounds what comes after.
            rollout: the responses.
            theirs: `[S, R]` log-probs of the engine.
        """
        config = self.loss_config.mismatch
        old, mask = _old_log_probs(log_probs, rollout), self.loss_mask(rollout)
        return mismatch_weights(old, theirs, mask, config.kind, config.level, config.cap, config.band)

    def mismatch_values(
        self, log_probs: Tensor, rollout: Rollout, theirs: Tensor, active: Tensor
    ) -> tuple[Figures, dict[str, Tensor]]:
        """Return what is logged of a mismatch: figures whose mean counts, and those whose largest value counts.

        Args:
            log_probs: as in `mismatch`.
            rollout: the responses.
            theirs: `[S, R]` log-probs of the engine.
            active: `[S]` bool, True on the responses that the policy was run over.
        """
        mismatch = self.mismatch(log_probs, rollout, theirs)
        mask = self.loss_mask(rollout) & active[:, None]  # [S, R]
        # KL(mu || pi) of the tokens that mu drew; k3 has the same mean as k1, and is never negative.
        log_ratio = torch.where(mask, theirs - _old_log_probs(log_probs, rollout).detach(), 0.0)
        values: Figures = {"mismatch_kl": (kl_estimate(log_ratio.clamp(-20.0, 20.0), "k3"), mask)}
        # A response that is cut counts once, however long it is.
        whole = self.loss_config.mismatch.level == "response"
        cut, counted = (mismatch.cut.any(-1), mask.any(-1)) if whole else (mismatch.cut, mask)
        values["mismatch_clipped"] = (cut.float(), counted)
        return values, {"mismatch_ratio_max": mismatch.ratio.masked_fill(~mask, 0.0).max()}

    def _kl_term(
        self,
        log_probs: Tensor,
        rollout: Rollout,
        normalizer: Tensor,
        full_kl: Tensor | None,
        weights: Tensor | None,
    ) -> Tensor:
        mask, config = self.loss_mask(rollout), self.kl_config
        if config.loss_estimator == "full":
            kl = _clamped(full_kl, config.clamp)  # [S, R]
            return masked_mean(kl if weights is None else weights * kl, mask, normalizer)
        log_ratio = log_probs - cast(Tensor, rollout.reference_log_probs)  # [S, R]
        return kl_loss(log_ratio, mask, normalizer, config.loss_estimator, config.clamp, weights)


def _old_log_probs(log_probs: Tensor, rollout: Rollout) -> Tensor:
    """Return the log-probs before the first update: in that update itself, those of the policy now."""
    return log_probs.detach() if rollout.log_probs is None else rollout.log_probs


def _clamped(full_kl: Tensor | None, clamp: float | None) -> Tensor:
    if full_kl is None:
        raise ValueError("full_kl must be a tensor [S, R] for a KL over the vocabulary, got None")
    return full_kl if clamp is None else full_kl.clamp(max=clamp)
