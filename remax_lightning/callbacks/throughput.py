"""Logs the time and the throughput of optimizer steps, and the share of the device's operations that they use."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.throughput import get_available_flops, measure_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from remax_lightning.callbacks.monitors import log_step, rollout_output
from remax_lightning.distributed import sum_over_ranks
from remax_lightning.types import PromptBatch, Responses, StepOutput

log = logging.getLogger(__name__)

PROBED_LENGTHS = (64, 128)
"""Tokens of the rows whose operations are counted."""


class ForwardFlops(NamedTuple):
    """Operations of a forward pass without padding.

    Args:
        per_token: of a token, in all that grows with the length.
        per_square: of a pair of tokens, in attention.
        per_logits: of the logits of a token.
    """

    per_token: float
    per_square: float
    per_logits: float

    def total(self, lengths: Tensor, num_logits: Tensor) -> float:
        """Return the operations over rows of `lengths` `[M]` tokens, with the logits of `num_logits` tokens in all."""
        lengths = lengths.double()
        linear, square = self.per_token * lengths.sum(), self.per_square * lengths.square().sum()
        return float(linear + square + self.per_logits * num_logits.sum())


def count_forward_flops(make: Callable[[], Any]) -> ForwardFlops:
    """Count the operations of a model by running it at two lengths, on tensors that have no values.

    Products of weights grow with the length, attention with its square, so that two lengths tell all others.

    Args:
        make: makes a causal language model on the meta device.
    """
    # transformers reads masks on the host, but not those of fake tensors.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make()

        def body(length: int) -> int:
            ids = torch.zeros(1, length, dtype=torch.long, device="meta")
            return measure_flops(model, lambda: model.base_model(input_ids=ids, use_cache=False))

        short, long = PROBED_LENGTHS
        # a T + b T^2 at T = short and at T = long
        at_short, at_long = body(short) / short, body(long) / long  # a + b T
        head = model.get_output_embeddings()
        per_logits = 0 if head is None else 2 * head.weight.numel()
    per_square = max(0.0, (at_long - at_short) / (long - short))
    return ForwardFlops(at_short - per_square * short, per_square, per_logits)


class Throughput(Callback):
    """Logs seconds by phase and tokens per second of each optimizer step.

    Seconds are sums over the micro-batches of the step and means over ranks. Tokens are those of sampled and greedy
    responses, summed over ranks; padding does not count.

    - `time/rollout_s`, `time/reward_s`: as the module measures them; the pass of the reference is part of `reward_s`.
    - `time/train_s`: the rest, from the start to the end of each batch: forward, backward, optimizer, and
      waiting for other ranks. It excludes data loading and validation.
    - `time/step_s`: the sum of the three.
    - `throughput/tokens_per_s`: trained tokens (with their greedy responses) per second of the step. If several
      optimizer steps share a rollout batch, the first one includes the whole time of the rollout.
    - `throughput/rollout_tokens_per_s`: tokens per second of the rollout, of the latest rollout batch whose last
      micro-batch was trained on.
    - `throughput/mfu`: model FLOPs utilization, the operations of the policy and its reference on real tokens per
      second of the step, as a share of the device's peak. Recomputed activations, padding and the reward do not count.
      Only where Lightning knows the peak of the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._started = 0.0
        self._rollout_rate: float | None = None  # logged again until the next rollout has ended
        self._peak_flops: float | None = None  # per second of one device
        self._forward_flops: ForwardFlops | None = None
        self._backward = 2  # passes forward that a backward pass costs
        self._clear_step()
        self._clear_rollout()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the state of an earlier fit, and look up what the device can do."""
        self._clear_step()
        self._clear_rollout()
        self._peak_flops, self._forward_flops = _peak_flops(trainer), None
        source = getattr(pl_module, "policy_source", None)
        if self._peak_flops is None or source is None:
            return
        # With an adapter, the weights of the base get no gradient, only their inputs do.
        self._backward = 2 if source.lora is None else 1
        try:
            self._forward_flops = count_forward_flops(lambda: source.empty_model("model.policy", torch.bfloat16))
        except Exception as error:  # a model that looks at its values, which it does not have here
            log.info("throughput/mfu is not logged, since the policy's operations cannot be counted: %s", error)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the timer."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the timer; log at the end of the optimizer step."""
        output = rollout_output(outputs)
        if output is None:
            return
        if pl_module.device.type == "cuda":  # kernels are asynchronous
            torch.cuda.synchronize(pl_module.device)
        self._add(output, time.perf_counter() - self._started)
        if output["closes_step"]:
            # A rollout batch is trained on in several micro-batches, perhaps over several optimizer steps.
            ends_rollout = not isinstance(batch, PromptBatch) or batch.micro_batch_index == batch.num_micro_batches - 1
            log_step(pl_module, self._reduce_step(trainer, ends_rollout))

    def _add(self, output: StepOutput, seconds: float) -> None:
        rollout, times = output["rollout"], output["times"]
        tokens = int(rollout.sampled.response_mask.sum())
        tokens += 0 if rollout.greedy is None else int(rollout.greedy.response_mask.sum())
        if self._forward_flops is not None:
            self._flops += step_flops(self._forward_flops, output, self._backward)
        # ---- Of the optimizer step, then of the rollout batch ----
        self._rollout_s += times["rollout"]
        self._reward_s += times["reward"]
        self._step_s += seconds
        self._tokens += tokens
        self._batch_rollout_s += times["rollout"]
        self._batch_tokens += tokens

    def _reduce_step(self, trainer: Trainer, ends_rollout: bool) -> dict[str, float]:
        local = [
            self._rollout_s,
            self._reward_s,
            self._step_s,
            self._batch_rollout_s,
            self._tokens,
            self._batch_tokens,
            self._flops,
        ]
        # ---- Means of seconds, sums of tokens and operations ----
        *seconds, tokens, batch_tokens, flops = sum_over_ranks(trainer, local)
        rollout_s, reward_s, step_s, batch_rollout_s = (value / trainer.world_size for value in seconds)
        self._clear_step()
        values = {
            "time/rollout_s": rollout_s,
            "time/reward_s": reward_s,
            "time/train_s": max(step_s - rollout_s - reward_s, 0.0),
            "time/step_s": step_s,
            "throughput/tokens_per_s": tokens / step_s,
        }
        if self._peak_flops is not None and self._forward_flops is not None:
            values["throughput/mfu"] = flops / (step_s * self._peak_flops * trainer.world_size)
        # ---- The rate of a whole rollout, not of the part that fell into this step ----
        if ends_rollout:
            self._clear_rollout()
            if batch_rollout_s > 0:
                self._rollout_rate = batch_tokens / batch_rollout_s
        if self._rollout_rate is not None:
            values["throughput/rollout_tokens_per_s"] = self._rollout_rate
        return values

    def _clear_step(self) -> None:
        self._rollout_s = self._reward_s = self._step_s = 0.0
        self._tokens, self._flops = 0, 0.0

    def _clear_rollout(self) -> None:
        self._batch_rollout_s = 0.0
        self._batch_tokens = 0


def step_flops(forward: ForwardFlops, output: StepOutput, backward: int) -> float:
    """Return the operations of policy and reference on the real tokens of a micro-batch.

    Rollout: prompts once, all responses. Reference: sampled sequences. Training: those that the policy was run over.

    Args:
        forward: of the policy; the reference counts as much.
        output: of the training step.
        backward: passes forward that a backward pass costs.
    """
    rollout = output["rollout"]
    prompts = rollout.prompt.prompt_mask.sum(-1)  # [B]

    def lengths_of(responses: Responses) -> tuple[Tensor, Tensor]:
        """Return `[M]` tokens of the responses, and with their prompts."""
        written = responses.response_mask.sum(-1)
        return written, prompts.repeat_interleave(len(written) // len(prompts)) + written

    # ---- Training, and the reference ----
    written, lengths = lengths_of(rollout.sampled)  # [S]
    trained = output["entropy_mask"].any(-1)  # [S]
    flops = (1 + backward) * forward.total(lengths * trained, written * trained)
    if rollout.reference_log_probs is not None:
        flops += forward.total(lengths, written)
    # ---- The rollout: a prompt is read once, for all of its responses ----
    shared = len(written) // len(prompts) - 1 + (rollout.greedy is not None)  # responses that do not read it
    flops += forward.total(lengths, written) - shared * forward.per_token * float(prompts.sum())
    if rollout.greedy is not None:
        written, lengths = lengths_of(rollout.greedy)  # [B]
        flops += forward.total(lengths, written)
    return flops


def _peak_flops(trainer: Trainer) -> float | None:
    """Return the operations per second of this device in the precision of the run; None where they are not known."""
    precision = str(trainer.precision)
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32
    try:
        with warnings.catch_warnings():  # a device that Lightning has no number for is no mistake
            warnings.simplefilter("ignore")
            return get_available_flops(trainer.strategy.root_device, dtype)
    except (IndexError, KeyError, RuntimeError) as error:  # a name that it cannot read
        log.info("throughput/mfu is not logged, since the peak of the device is not known: %s", error)
        return None
