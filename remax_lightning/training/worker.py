"""From prompts to a scored rollout: generate, decode to text, score. ReMax, SFT and doctor share this one worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from remax_lightning.data.tokenizers import hidden_ids, response_texts
from remax_lightning.distributed import raise_on_all_ranks
from remax_lightning.errors import UserError
from remax_lightning.functional import response_mask, soft_overlong_penalty
from remax_lightning.models import ModelConfig
from remax_lightning.models.forward import eval_mode
from remax_lightning.models.log_probs import with_reference
from remax_lightning.models.sampling import SuppressedTokens
from remax_lightning.rewards.base import Reward, checked_scores, shorten
from remax_lightning.rollout import AutoEngine, GenerationRequest, RolloutEngine, SamplingConfig, StopCheck
from remax_lightning.rollout.base import stop_string_check
from remax_lightning.strategies import rollout_parameters
from remax_lightning.strategies.stall_watchdog import report_progress
from remax_lightning.training.experience import reference_passes
from remax_lightning.types import PromptBatch, Responses, Rollout

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from remax_lightning.rollout import VLLMEngine
    from remax_lightning.training.objective import Objective
    from remax_lightning.training.reference import Reference


Phase: TypeAlias = Literal["rollout", "reward"]
"""`rollout` makes responses; `reward` scores them and runs the passes that need no gradient."""


class PhaseTimer:
    """Adds up the seconds of each phase until the end of a step, the device's own work included."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(get_args(Phase), 0.0)

    @contextmanager
    def measure(self, phase: Phase, device: torch.device) -> Iterator[None]:
        """Add the seconds spent inside to a phase.

        Args:
            phase: what the time is spent on.
            device: where the work runs; CUDA is waited for, because its kernels are only queued.
        """
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._seconds[phase] += time.perf_counter() - start

    @property
    def total(self) -> float:
        """Seconds of all phases so far."""
        return sum(self._seconds.values())

    def pop(self) -> dict[str, float]:
        """Return the seconds by phase, 0.0 where a phase did not run, and start again from zero."""
        seconds, self._seconds = self._seconds, dict.fromkeys(get_args(Phase), 0.0)
        return seconds


class GeneratedResponses(NamedTuple):
    """Responses that are not scored yet.

    Args:
        sampled: `S = B * n` sampled responses, prompt by prompt.
        greedy: `B` greedy responses; None where they were not requested.
        log_probs: `[S, R]` log-probs of the sampled tokens; None where they were not requested.
    """

    sampled: Responses
    greedy: Responses | None
    log_probs: Tensor | None


class RolloutWorker:
    """Generates responses with a model and scores them. Call `prepare` before the first rollout.

    Args:
        engine: generates token ids.
        sampling: how responses are sampled, and which strings stop them.
        reward: scores responses; None where the worker only generates.
        truncation_penalty: reward that a truncated response loses, sampled or greedy.
        overlong_cache: tokens before the length limit over which that penalty grows from 0, for every response that is
            so long; 0 charges truncated responses only.
        timer: receives the seconds of `rollout` and `reward`; None makes a new one.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_ids: list[int]
    unused_ids: tuple[int, ...]
    hidden: frozenset[int]
    """Token ids that are left out of the text of a response."""
    suppressed: SuppressedTokens
    """Tokens that rollouts do not draw, and that log-probs leave out."""
    stop_check: StopCheck | None
    progress_bar: Callable[[int], AbstractContextManager[Callable[[int], None]]] | None = None
    """Shows a bar for so many tokens, and returns what tells it their number so far; None shows none."""

    def __init__(
        self,
        engine: RolloutEngine,
        sampling: SamplingConfig,
        reward: Reward | None = None,
        truncation_penalty: float = 0.0,
        overlong_cache: int = 0,
        timer: PhaseTimer | None = None,
    ) -> None:
        self.engine, self.sampling, self.reward = engine, sampling, reward
        self.truncation_penalty, self.overlong_cache = truncation_penalty, overlong_cache
        self.timer = timer if timer is not None else PhaseTimer()
        self._has_checked_reference = False
        # What tells the engine's own figures since the last call, by the name that they are logged under.
        self.engine_metrics: Callable[[], dict[str, float]] = getattr(engine, "metrics", dict)
        self.ahead = int(getattr(engine, "ahead", 0))  # rollouts that the engine writes while one is trained on, 0 or 1
        self.device: torch.device | None = None
        self._chosen_engine: RolloutEngine | None = None

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: list[int],
        device: torch.device,
        unused_ids: tuple[int, ...] = (),
    ) -> None:
        """Prepare rollouts on a device; the reward is loaded once for each device.

        Args:
            tokenizer: the policy's; turns token ids into text.
            eos_ids: token ids that end a response.
            device: of the prompts.
            unused_ids: ids of the policy without a token in the tokenizer; they are never drawn.
        """
        self.tokenizer, self.eos_ids, self.unused_ids = tokenizer, eos_ids, unused_ids
        self.suppressed = SuppressedTokens(unused_ids, tuple(eos_ids), self.sampling.min_response_length)
        self.hidden = hidden_ids(tokenizer, eos_ids, skip_special_tokens=self.sampling.skip_special_tokens)
        # Every evaluation comes here again; stop strings and rewards are made once for each device.
        if self.device == device:
            return
        self.stop_check = stop_string_check(tokenizer, self.sampling.stop_strings)
        if self.reward is not None:
            self.reward.load(device)
        self.device = device

    def check_engine(
        self, model: PreTrainedModel, max_prompt_length: int | None, source: ModelConfig, tokenizer: str
    ) -> None:
        """Let an engine that can, such as `VLLMEngine`, refuse the run before its first rollout.

        Args:
            model: the policy.
            max_prompt_length: tokens of the longest prompt; None where it is not known.
            source: where the policy is loaded from.
            tokenizer: folder or hub name.

        Raises:
            UserError: if it cannot roll out with the policy.
        """
        check = getattr(self.engine, "check", None)
        if check is not None:
            check(model, self.sampling, max_prompt_length, source, tokenizer)
        check_tokenizer = getattr(self.engine, "check_tokenizer", None)
        if check_tokenizer is not None:
            check_tokenizer(self.tokenizer)

    def roll_out(
        self,
        model: PreTrainedModel,
        prompt: PromptBatch,
        generator: torch.Generator,
        *,
        greedy: bool,
        return_log_probs: bool = False,
    ) -> Rollout:
        """Generate responses to the prompts and score them; see `generate_responses` and `score_responses`."""
        responses = self.generate_responses(model, prompt, generator, greedy=greedy, return_log_probs=return_log_probs)
        return self.score_responses(prompt, responses)

    def generate_responses(
        self,
        model: PreTrainedModel,
        prompt: PromptBatch,
        generator: torch.Generator,
        *,
        greedy: bool,
        return_log_probs: bool = False,
        num_samples: int | None = None,
    ) -> GeneratedResponses:
        """Let a model respond to the prompts.

        Args:
            model: the policy, or whatever else responds.
            prompt: `B` prompts.
            generator: the only source of randomness.
            greedy: whether greedy responses are generated too.
            return_log_probs: whether the engine returns the log-probs of the tokens that it samples.
            num_samples: sampled responses per prompt; None for `sampling.num_samples`.
        """
        # ---- What the engine is asked for ----
        sampling = self.sampling if num_samples is None else replace(self.sampling, num_samples=num_samples)
        request = self._request(prompt, sampling, generator, greedy, return_log_probs)
        report_progress(f"generating responses to {len(prompt.prompts)} prompts")
        # ---- Decode: in eval mode, on weights that are gathered where a strategy shards them ----
        measure = self.timer.measure("rollout", prompt.prompt_ids.device)
        # An engine in other processes gathers the weights itself, to send them.
        is_remote = getattr(self.engine, "gathers_parameters", False)
        gathering = nullcontext() if is_remote else rollout_parameters(model)
        bar = nullcontext() if self.progress_bar is None else self.progress_bar(sampling.max_response_length)
        with measure, torch.no_grad(), eval_mode(model), gathering, bar as progress:
            if progress is not None:
                request = replace(request, progress=progress)
            if self._chosen_engine is None:
                # Once: the choice of `AutoEngine` runs the model, whose parameters are gathered here.
                is_auto = type(self.engine) is AutoEngine
                self._chosen_engine = cast(AutoEngine, self.engine).choice(model) if is_auto else self.engine
            output = self._chosen_engine.generate(model, request)
            # ---- From token ids to responses: mask, truncation, text ----
            # `stopped_at` counts the sampled rows first, then the greedy ones.
            num_sampled, stopped_at = len(output.sampled_ids), output.stopped_at
            stops = None if stopped_at is None else stopped_at[:num_sampled]
            sampled = self._responses(prompt, output.sampled_ids, stops)
            greedy_responses = None
            if output.greedy_ids is not None:
                stops = None if stopped_at is None else stopped_at[num_sampled:]
                greedy_responses = self._responses(prompt, output.greedy_ids, stops)
        return GeneratedResponses(sampled, greedy_responses, output.log_probs)

    def _request(
        self,
        prompt: PromptBatch,
        sampling: SamplingConfig,
        generator: torch.Generator,
        greedy: bool,
        return_log_probs: bool,
    ) -> GenerationRequest:
        return GenerationRequest(
            prompt_ids=prompt.prompt_ids,  # [B, P]
            prompt_mask=prompt.prompt_mask,  # [B, P]
            sampling=sampling,
            eos_ids=self.eos_ids,
            pad_id=int(cast(int, self.tokenizer.pad_token_id)),
            generator=generator,
            greedy=greedy,
            return_log_probs=return_log_probs,
            stop_check=self.stop_check,
            unused_ids=self.unused_ids,
        )

    # ---- Ahead: an engine in other processes may write the next responses while these are trained on ----

    def begin_responses(
        self, model: PreTrainedModel, prompt: PromptBatch, generator: torch.Generator, *, greedy: bool
    ) -> None:
        """Let the engine write what `generate_responses` returns later to the same arguments, with log-probs."""
        request = self._request(prompt, self.sampling, generator, greedy, return_log_probs=True)
        with self.timer.measure("rollout", prompt.prompt_ids.device), torch.no_grad(), eval_mode(model):
            cast("VLLMEngine", self.engine).begin(model, request)

    def state_dict(self) -> dict[str, Any] | None:
        """Return what the engine has written ahead, which is waited for; None where that is nothing."""
        return cast("VLLMEngine", self.engine).state_dict() if self.ahead else None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore the result of `state_dict`."""
        if self.ahead:
            cast("VLLMEngine", self.engine).load_state_dict(state)

    def drop_responses(self) -> None:
        """Give up on what the engine writes ahead."""
        if self.ahead:
            cast("VLLMEngine", self.engine).drop()

    def _responses(self, prompt: PromptBatch, ids: Tensor, stopped_at: Tensor | None) -> Responses:
        """Return token ids `[M, R]` with their mask, whether each was truncated, and their text."""
        # A row without an end was cut by the length limit.
        mask = response_mask(ids, self.eos_ids, stopped_at)  # [M, R]
        ends = torch.isin(ids, torch.tensor(self.eos_ids, device=ids.device)).any(-1)  # [M]
        if stopped_at is not None:
            ends |= stopped_at > 0
        # Token ids row by row, without padding: of the prompts, then of the responses.
        prompts, responses = (
            [row[row_mask].tolist() for row, row_mask in zip(rows.cpu(), masks.cpu(), strict=True)]
            for rows, masks in ((prompt.prompt_ids, prompt.prompt_mask), (ids, mask))
        )
        texts = response_texts(self.tokenizer, prompts, responses, self.hidden)
        return Responses(ids, mask, ~ends, texts)

    def score_responses(
        self, prompt: PromptBatch, responses: GeneratedResponses, baselines: Sequence[str] | None = None
    ) -> Rollout:
        """Score sampled and greedy responses in one pass of the reward.

        Args:
            prompt: `B` prompts.
            responses: to these prompts.
            baselines: the `B` greedy responses of the policy, which a reward may compare with; None for those in
                `responses`.

        Raises:
            RewardError: if the reward fails or returns what must not be trained on.
        """
        sampled, greedy = responses.sampled, responses.greedy
        num_sampled, num_prompts = len(sampled.texts), len(prompt.prompts)
        device = prompt.prompt_ids.device
        # ---- Put y and y* into one list, each with the y* of its prompt, for rewards that compare ----
        # The prompt of each row: n times each for the sampled responses, once for the greedy ones.
        rows = [i for i in range(num_prompts) for _ in range(num_sampled // num_prompts)]
        baselines = greedy.texts if baselines is None and greedy is not None else baselines
        texts = sampled.to_score(None if baselines is None else [baselines[i] for i in rows])  # [S]
        penalty = self.overlong_penalty(sampled)  # [S]
        if greedy is not None:
            rows = rows + list(range(num_prompts))
            texts = texts + greedy.to_score(baselines)  # [S + B]
            penalty = torch.cat([penalty, self.overlong_penalty(greedy)])  # [S + B]
        # ---- Score them in one call, so that a reward model fills its batches with both ----
        report_progress(f"scoring {len(texts)} responses with {self.reward!r}, the first {shorten(texts[0])}")
        with self.timer.measure("reward", device), torch.no_grad():
            scores = checked_scores(
                cast(Reward, self.reward),
                [prompt.prompts[i] for i in rows],
                texts,
                [prompt.rows[i] for i in rows],
            )
            # The penalty falls on y and y* alike, so it enters r and b.
            reward = scores.total.to(device) - penalty  # [S + B]
        parts = {name: part.to(device) for name, part in scores.parts.items()}  # [S + B] each
        rollout = Rollout(
            prompt=prompt,
            sampled=sampled,
            greedy=greedy,
            reward=reward[:num_sampled],  # r(x, y) [S]
            baseline_reward=None if greedy is None else reward[num_sampled:],  # r(x, y*) [B]
            reward_parts={name: part[:num_sampled] for name, part in parts.items()},
            reference_log_probs=None,
            log_probs=responses.log_probs,
            baseline_parts=None if greedy is None else {name: part[num_sampled:] for name, part in parts.items()},
        )
        return rollout if scores.reward.dim() == 1 else _with_token_rewards(rollout, scores.reward.to(device), penalty)

    def with_reference(self, rollout: Rollout, reference: Reference, objective: Objective, trainer: Trainer) -> Rollout:
        """Return `rollout` with the log-probs of its sampled tokens under the reference, and hidden states if needed.

        Args:
            rollout: as `score_responses` returns it.
            reference: prepared.
            objective: what the log-probs are for, and how many responses a pass has.
            trainer: of the run.

        Raises:
            UserError: if the first log-probs are NaN.
        """
        batch_size: int | Sequence[Tensor] | None = objective.kl_config.reference_batch_size
        budget, model = rollout.prompt.tokens_per_micro_batch, reference.model
        with self.timer.measure("reward", rollout.reward.device), torch.no_grad(), reference.running():
            if batch_size is None and budget is not None:
                batch_size = reference_passes(rollout, budget, model, trainer)
            keep_hidden = objective.compares_vocabulary
            rollout = with_reference(rollout, model, self.sampling, keep_hidden, batch_size, self.suppressed)
        # ---- Once: weights that are not numbers would show as steps that are skipped, each after its rollout ----
        if not self._has_checked_reference:
            self._has_checked_reference = True
            with raise_on_all_ranks(trainer):
                _check_reference(rollout)
        return rollout

    def penalty_above_greedy(self, rollout: Rollout) -> Tensor:
        """Return `[S]` the reward that each response loses for its length, above its greedy response."""
        greedy = self.overlong_penalty(cast(Responses, rollout.greedy))  # [B]
        return self.overlong_penalty(rollout.sampled) - greedy.repeat_interleave(rollout.num_samples)

    def overlong_penalty(self, responses: Responses) -> Tensor:
        """Return `[M]` the reward that each response loses for its length."""
        if not self.overlong_cache:
            return self.truncation_penalty * responses.truncated.float()
        lengths = responses.response_mask.sum(-1)  # [M]
        share = soft_overlong_penalty(lengths, self.sampling.max_response_length, self.overlong_cache)
        return self.truncation_penalty * share


def _check_reference(rollout: Rollout) -> None:
    log_probs = cast(Tensor, rollout.reference_log_probs)
    if bool((log_probs.isnan() & rollout.sampled.response_mask).any()):
        raise UserError(
            "model.reference: its log-probs are NaN, so that the KL would be: its weights are damaged, or its"
            " activations overflow. Use another model, and with float16 set model.reference.dtype: bfloat16"
        )


def _with_token_rewards(rollout: Rollout, tokens: Tensor, penalty: Tensor) -> Rollout:
    """Return `rollout` with rewards of its tokens.

    Args:
        rollout: `S` sampled and perhaps `B` greedy responses.
        tokens: `[S + B, W]` rewards of their tokens, at least as wide as the longest response and 0 beyond each.
        penalty: `[S + B]` that a response loses for its length, on its last token.
    """

    def of(responses: Responses, rows: slice) -> Tensor:
        mask = responses.response_mask  # [M, R]
        is_last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
        width = mask.shape[1]
        # From the width of the reward to that of the ids; what is cut or added is 0.
        values = pad(tokens[rows], (0, max(0, width - tokens.shape[1])))[:, :width]
        return values - penalty[rows, None] * is_last

    count, greedy = len(rollout.reward), rollout.greedy
    return rollout._replace(
        token_rewards=of(rollout.sampled, slice(0, count)),
        baseline_token_rewards=None if greedy is None else of(greedy, slice(count, None)),
    )
