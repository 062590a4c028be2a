"""The choices that make one variant of the algorithm differ from another, grouped as the configuration groups them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeAlias, cast, get_args, get_origin, get_type_hints

from remax_lightning.baselines import Baseline, BaselineName, baseline_from_dict, baseline_to_dict
from remax_lightning.errors import UserError, above, at_least, check_ranges
from remax_lightning.functional.advantages import KLCredit, RewardClipAt
from remax_lightning.functional.losses import MismatchKind, MismatchLevel

WeightDType: TypeAlias = Literal["float32", "bfloat16", "float16"]
"""The dtypes that a model's weights can be loaded in."""


def _require(holds: bool, key: str, expected: str, got: object) -> None:
    if not holds:
        raise UserError(f"model.{key} must be {expected}, got {got}")


def config_from_dict(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """Return a dataclass of a configuration from what `dataclasses.asdict` made of it.

    Args:
        kind: the dataclass; its fields may be dataclasses or None.
        values: its fields. What the class does not know, as of a later version, is left out.
    """
    hints = get_type_hints(kind)  # annotations are text here, which this resolves
    arguments = {}
    for field in fields(kind):
        if field.name not in values:
            continue
        value, hint = values[field.name], hints[field.name]
        # A field such as `lora: LoRAConfig | None` holds a dictionary in the file.
        inner = next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)
        if inner is not None and isinstance(value, Mapping):
            value = config_from_dict(cast("type[Any]", inner), value)
        # JSON and YAML know no tuples.
        arguments[field.name] = tuple(value) if get_origin(hint) is tuple and isinstance(value, list) else value
    return kind(**arguments)


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled. By default nothing truncates the distribution.

    Args:
        max_response_length: maximum number of tokens in a response, including the end-of-sequence token.
        min_response_length: minimum number of tokens before a response may end. Until then EOS is neither drawn nor
            part of the distribution that is trained.
        num_samples: sampled responses per prompt, `n`. The paper uses one.
        temperature: divides the logits.
        top_k: sample from the `top_k` most likely tokens only; 0 samples from all of them.
        top_p: sample from the smallest set of most likely tokens whose probability reaches `top_p`.
        min_p: drop tokens less likely than `min_p` times the most likely one.
        scale_log_probs: divide the logits by the temperature in the training pass too. True keeps the gradient
            on-policy; False is what the paper's code does.
        stop_strings: strings that end a response as an end-of-sequence token does; the tokens that complete one belong
            to the response.
        skip_special_tokens: leave special tokens out of the text that the reward, evaluations and samples read. False
            keeps all but those that end or pad a response, for rewards that look for tags such as `<think>` which the
            tokenizer marks as special, and for gpt-oss, whose special tokens separate the thought from the
            answer.
        processed_log_probs: take the policy's log-probs under the truncated distribution, over the tokens that top-k,
            top-p and min-p keep. True keeps the gradient on-policy under truncation; False is what the paper's code
            does. The reference always keeps all tokens, so that the KL is finite.

    Raises:
        UserError: if a value is out of its range.
    """

    max_response_length: Annotated[int, at_least(1)] = 256
    min_response_length: Annotated[int, at_least(0, up_to="max_response_length")] = 0
    num_samples: Annotated[int, at_least(1)] = 1
    temperature: Annotated[float, above(0, note="the greedy response is decoded anyway, as the baseline")] = 1.0
    top_k: Annotated[int, at_least(0, zero="all tokens")] = 0
    top_p: Annotated[float, above(0, at_most=1)] = 1.0
    min_p: Annotated[float, at_least(0, below=1)] = 0.0
    scale_log_probs: bool = True
    stop_strings: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    processed_log_probs: bool = False

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self), "model.sampling")
        checks = (
            (all(self.stop_strings), "stop_strings", "strings of at least one character"),
            (self.truncates or not self.processed_log_probs, "processed_log_probs",
             "false where top_k, top_p and min_p drop no token"),
        )  # fmt: skip
        for holds, name, expected in checks:
            _require(holds, f"sampling.{name}", expected, getattr(self, name))

    @property
    def truncates(self) -> bool:
        """Whether sampling drops part of the policy's distribution."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True)
class KLConfig:
    """How the KL to the reference is estimated and charged. `model.kl_coef` scales what enters the reward.

    Args:
        estimator: k1, k2 or k3 of http://joschu.net/blog/kl-approx.html; k1 is unbiased and what to-go credit needs.
            `full` is the KL over the vocabulary itself. It does not depend on the token that was sampled, so as a
            reward it charges a token for later tokens only (`to_go`), or on average for nothing (`one_step`).
            `loss_estimator: full` with `loss_coef` equal to `model.kl_coef` adds the missing term to `to_go`.
        credit: `to_go` charges a token with the KL of itself and all later tokens, which is the exact gradient;
            `one_step` with its own only, as the paper's code does; `none` keeps the KL out of the reward.
        clamp: bound of a token's estimate in nats; None for no bound.
        in_baseline: the baseline is taken of reward minus KL; leave_one_out and group_mean only. TRL's RLOO has such a
            baseline, and charges every token with the whole response's KL; that of earlier tokens is noise, which to-go
            credit leaves out.
        loss_coef: coefficient of the KL as a term of the loss, beside or instead of the one in the reward.
        loss_estimator: estimator of that term. k2's gradient is on average that of each token's KL, which `full` has
            exactly; k1's is zero on average.
        reference_batch_size: responses per forward pass of the reference; None for those of a training micro-batch.
            Nothing is kept for a gradient there, so more of them fit.
        reference_sync_steps: the reference moves to the policy before the first rollout after every so many optimizer
            steps, for long runs that a fixed reference would hold back (TRL's `ref_model_sync_steps`). None keeps it.
        reference_mixup_alpha: share of the policy in the moved reference: 1.0 resets it to the policy, less makes it an
            exponential moving average (TRL's `ref_model_mixup_alpha`), which needs `model.reference.dtype: float32`.
    """

    estimator: Literal["k1", "k2", "k3", "full"] = "k1"
    credit: KLCredit = "to_go"
    clamp: Annotated[float | None, above(0)] = None
    in_baseline: bool = False
    loss_coef: Annotated[float, at_least(0)] = 0.0
    loss_estimator: Literal["k2", "k3", "full"] = "k2"
    reference_batch_size: Annotated[int | None, at_least(1)] = None
    reference_sync_steps: Annotated[int | None, at_least(1)] = None
    reference_mixup_alpha: Annotated[float, above(0, at_most=1)] = 1.0

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self), "model.kl")
        steps, alpha = self.reference_sync_steps, self.reference_mixup_alpha
        _require(alpha == 1 or steps is not None, "kl.reference_mixup_alpha",
                 "1.0 unless model.kl.reference_sync_steps is set", alpha)  # fmt: skip

    @property
    def full_loss(self) -> bool:
        """Whether the loss has a term with the KL over the vocabulary."""
        return self.loss_coef > 0 and self.loss_estimator == "full"

    @property
    def full(self) -> bool:
        """Whether the KL over the vocabulary is needed."""
        return self.estimator == "full" or self.full_loss


@dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages.

    Args:
        baseline: what the reward is compared with: the `greedy` response's reward (ReMax), the mean of the other
            samples (`leave_one_out`), of all samples (`group_mean`), `none`, `auto` whichever the run shows to be the
            cheapest, another short name, or a class of `remax_lightning.baselines` or of your own; docs/baselines.md
            compares them.
        gamma: discount per token towards the end of the response; 1 weighs all tokens of a response alike.
        reward_clip: bound of the absolute reward; None, because clipping hides differences between good responses.
        reward_clip_at: clip the rewards, or their difference to the baseline.
        whiten: give the advantages mean 0 and variance 1 over all tokens of a rollout batch and all ranks.
        overlong: what to do with a response that hit the length limit: `keep` it as it is, `mask` it out of the loss,
            `penalize` it, as a greedy response too, by `truncation_penalty`, or penalize it `soft`: a response loses
            a share of `truncation_penalty` that grows linearly over its last `overlong_cache` tokens before the limit
            (DAPO, arXiv 2503.14476), so that long responses are told apart before they are cut.
        truncation_penalty: how much reward a truncated response loses under `penalize` and `soft`.
        overlong_cache: tokens before the limit over which the `soft` penalty grows. None takes a fifth of
            `sampling.max_response_length`, DAPO's share (4,096 of 20,480).
    """

    baseline: BaselineName | Baseline = "greedy"
    gamma: Annotated[float, above(0, at_most=1)] = 1.0
    reward_clip: Annotated[float | None, above(0)] = None
    reward_clip_at: RewardClipAt = "after_baseline"
    whiten: bool = False
    overlong: Literal["keep", "mask", "penalize", "soft"] = "keep"
    truncation_penalty: Annotated[float, at_least(0)] = 1.0
    overlong_cache: Annotated[int | None, at_least(1)] = None

    def __post_init__(self) -> None:
        if isinstance(self.baseline, Mapping):  # of a checkpoint
            object.__setattr__(self, "baseline", baseline_from_dict(self.baseline))
        check_ranges(type(self), vars(self), "model.advantage")
        cache = self.overlong_cache
        _require(cache is None or self.overlong == "soft", "advantage.overlong_cache",
                 f"null where advantage.overlong is {self.overlong}; only soft reads it", cache)  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as text and numbers, for checkpoints."""
        return {
            field.name: baseline_to_dict(self.baseline) if field.name == "baseline" else getattr(self, field.name)
            for field in fields(self)
        }

    def soft_cache(self, max_response_length: int) -> int:
        """Return the tokens over which the soft penalty grows; 0 where there is no such penalty.

        Args:
            max_response_length: the length limit, in tokens.

        Raises:
            UserError: if `overlong_cache` is longer than a response can be.
        """
        if self.overlong != "soft":
            return 0
        if self.overlong_cache is None:
            return max(1, max_response_length // 5)
        _require(self.overlong_cache <= max_response_length, "advantage.overlong_cache",
                 f"at most model.sampling.max_response_length {max_response_length}", self.overlong_cache)  # fmt: skip
        return self.overlong_cache


@dataclass(frozen=True)
class MismatchConfig:
    """How the gradient is corrected where the engine draws from other probabilities than the trainer computes.

    Engines of this project decode with the trainer's own weights and need no correction. Another engine differs by the
    rounding of its kernels: in bfloat16 by about 1e-2 nats per token, more for mixtures of experts.

    Args:
        kind: `none` takes the engine's responses as the policy's own; `tis`, truncated importance sampling, multiplies
            the gradient by the ratio of the trainer's probability to the engine's, at most `cap`; `mis`, masked
            importance sampling, leaves out what has a ratio outside of `band`.
        level: the ratio of each `token`, which varies little and leaves a bias, or of the whole `response`, which is
            exact where nothing is cut, and varies more the longer the responses are.
        cap: largest weight of `tis`; 2.0 is what verl takes. Null has no bound.
        band: smallest and largest ratio that `mis` keeps; 0.5 and 5.0 as in IcePop (arXiv 2510.18855).

    Raises:
        UserError: if a value is out of its range.
    """

    kind: MismatchKind = "none"
    level: MismatchLevel = "token"
    cap: Annotated[float | None, at_least(1)] = 2.0
    band: tuple[float, float] = (0.5, 5.0)

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self), "model.loss.mismatch")
        low, high = self.band
        _require(0 <= low <= 1 <= high and low < high, "loss.mismatch.band",
                 "two numbers around 1, the first 0 or more", list(self.band))  # fmt: skip


@dataclass(frozen=True)
class ProofConfig:
    """How `VLLMEngine` proves that the servers hold the policy and sample from it; a difference ends the run.

    Args:
        every: rollouts between two comparisons of log-probs; the first one and the first after an update are always
            compared. With 10, a comparison costs less than 1 % of the steps between two.
        responses: sampled responses that are compared, and as many greedy ones, spread over the servers.
        checksums: compare SHA-256 of the weights that a server computes with after each update, where vLLM keeps them
            as they were sent. It reads all weights once on both sides; false leaves it to version and log-probs.
        max_gap: largest difference of the log-prob of one token, in nats, also of a greedy token to the most likely
            one. None takes 0.05 where servers and trainer compute in float32, and 1.0 in 16 bits, as for the engines of
            this project. Mixtures of experts in 16 bits need more, such as 10: where rounding flips the choice of an
            expert, a single token moves by several nats.
        mean_gap: largest mean difference, in nats. None takes 0.01 and 0.1: rounding moves single tokens by much and
            most by little, so that the mean tells other weights from rounding, of experts too.
        standard_errors: by how many the mean log-prob of drawn tokens may differ from that of draws of the policy. By
            chance it is more than 6 in one comparison of 500 million.
        impossible_share: share of drawn tokens that `model.sampling` would leave out. Rounding moves a token over the
            edge of top-k or top-p now and then.

    Raises:
        UserError: if a value is out of its range.
    """

    every: Annotated[int, at_least(1)] = 10
    responses: Annotated[int, at_least(1)] = 8
    checksums: bool = True
    max_gap: Annotated[float | None, above(0, note="nats")] = None
    mean_gap: Annotated[float | None, above(0, note="nats")] = None
    standard_errors: Annotated[float, above(0)] = 6.0
    impossible_share: Annotated[float, at_least(0, at_most=1)] = 0.02

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self), "model.rollout.init_args.proof")


@dataclass(frozen=True)
class LossConfig:
    """How advantages become a loss.

    Args:
        kind: `reinforce`, log-prob times advantage, right while there is one update per rollout; `clipped`, the clipped
            surrogate of PPO, for several.
        normalizer: what the sum over tokens is divided by: the response `tokens` of the whole optimizer step over all
            ranks, its `responses` (the plain policy gradient: a long response counts for more), or the tokens of each
            `micro_batch` alone (the paper's code; the gradient then depends on the micro-batch size).
        clip_range: how far the ratio of new to old probability may move before its gradient is cut.
        dual_clip: bound of the ratio where the advantage is negative (arXiv 1912.09729); None for no bound.
        old_log_probs: where the log-probs before the first of several updates come from: `recompute` runs the training
            pass without gradients once more, so that the ratio is exactly 1 at first; `rollout` takes those that
            decoding made, which saves that pass, and in 16 bits differ by rounding.
        mismatch: correction for an engine with other probabilities than the trainer's.
    """

    kind: Literal["reinforce", "clipped"] = "reinforce"
    normalizer: Literal["tokens", "responses", "micro_batch"] = "tokens"
    clip_range: Annotated[float, above(0, below=1)] = 0.2
    dual_clip: Annotated[float | None, above(1)] = None
    old_log_probs: Literal["recompute", "rollout"] = "recompute"
    mismatch: MismatchConfig = MismatchConfig()

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self), "model.loss")
        # With the engine's log-probs as the old ones, the ratio of the surrogate holds the mismatch already, and
        # nothing is left to compare the engine with.
        _require(self.mismatch.kind == "none" or self.old_log_probs == "recompute", "loss.old_log_probs",
                 f"recompute where model.loss.mismatch.kind is {self.mismatch.kind}, which compares the engine's"
                 " log-probs with recomputed ones", self.old_log_probs)  # fmt: skip


@dataclass(frozen=True)
class EvalConfig:
    """What an evaluation measures beside the policy's own responses; each costs passes or responses of its own.

    Args:
        win_rate_reference: whether the reference answers the prompts too, and the rewards are compared.
        win_rate_chosen: whether the rewards are compared with that of the data set's response.
        perplexity: whether policy and reference are asked for the log-probs of the data set's response.
        response_column: column of the data set's response.
        max_length: tokens of such a response that are read for the perplexity.
        num_samples: sampled responses per prompt; None for those of training.
        pass_at_k: numbers of responses of which one has to pass.
        maj_at_k: numbers of responses whose most frequent answer has to pass.
        best_of_k: numbers of responses of which the one with the highest reward counts.
        pass_threshold: the least reward of a response that passes.
        answer: dotted path of a function that returns the answer of a response, for the vote; None for the project's.
    """

    win_rate_reference: bool = False
    win_rate_chosen: bool = False
    perplexity: bool = False
    response_column: str = "chosen"
    max_length: int = 1024
    num_samples: int | None = None
    pass_at_k: tuple[int, ...] = ()
    maj_at_k: tuple[int, ...] = ()
    best_of_k: tuple[int, ...] = ()
    pass_threshold: float = 1.0
    answer: str | None = None
