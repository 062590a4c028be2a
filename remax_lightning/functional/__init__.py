"""Pure maths of ReMax: tensors in, tensors out; no logging, trainer, configuration or state."""

from remax_lightning.functional.advantages import (
    Baseline,
    KLCredit,
    RewardClipAt,
    baseline_values,
    remax_advantages,
    soft_overlong_penalty,
    whiten_advantages,
)
from remax_lightning.functional.bootstrap import (
    best_of_k,
    majority_vote,
    pass_at_k,
    percentile_interval,
    proportion_interval,
    resampled_ratios,
    win_rates,
)
from remax_lightning.functional.log_probs import (
    OutputHead,
    PolicyStatistics,
    SamplingMask,
    TokenStatistics,
    hidden_statistics,
    token_statistics,
)
from remax_lightning.functional.losses import (
    KLEstimator,
    SurrogateLoss,
    bradley_terry_loss,
    clipped_surrogate_loss,
    kl_estimate,
    kl_loss,
    reinforce_loss,
)
from remax_lightning.functional.masking import masked_mean, masked_sum, response_mask

__all__ = [
    "Baseline",
    "KLCredit",
    "KLEstimator",
    "OutputHead",
    "PolicyStatistics",
    "RewardClipAt",
    "SamplingMask",
    "SurrogateLoss",
    "TokenStatistics",
    "baseline_values",
    "best_of_k",
    "bradley_terry_loss",
    "clipped_surrogate_loss",
    "hidden_statistics",
    "kl_estimate",
    "kl_loss",
    "majority_vote",
    "masked_mean",
    "masked_sum",
    "pass_at_k",
    "percentile_interval",
    "proportion_interval",
    "reinforce_loss",
    "remax_advantages",
    "resampled_ratios",
    "response_mask",
    "soft_overlong_penalty",
    "token_statistics",
    "whiten_advantages",
    "win_rates",
]
