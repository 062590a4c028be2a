"""The default rollout engine: sampled and greedy responses decoded together, on the weights that are trained."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from remax_lightning.models.forward import language_model, prompt_index_per_row
from remax_lightning.rollout.base import GenerationOutput, GenerationRequest
from remax_lightning.rollout.cast_linear import CastLinear, cast_linears
from remax_lightning.rollout.cuda_graph import StepCache
from remax_lightning.rollout.decode_loop import DecodeBuffers, DecodeLoop
from remax_lightning.sharding import is_sharded

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


class PairedEngine:
    """Prefills the `B` prompts once, repeats their cache to `N = B * (n + 1)` rows, and decodes all rows in one loop.

    The greedy response costs one more row per prompt instead of one more `generate` call, and every prompt is read
    once. Works with every architecture of transformers whose `forward` takes a `Cache`; use `HuggingFaceEngine` for the
    rest.

    Args:
        cuda_graphs: on CUDA, capture the decoding step once per shape as a CUDA graph and replay it. The responses are
            the same, without Python's overhead per token. On a CPU it changes nothing.
        keep_cache: on CUDA, keep the key-value cache, and in mixed precision the 16-bit copy of the weights, between
            rollouts, because graphs stay valid only with them. False frees both for the training pass, and graphs are
            then captured anew in every rollout, as they are where a strategy gathers the weights for each.
    """

    def __init__(self, cuda_graphs: bool = True, keep_cache: bool = True) -> None:
        self.cuda_graphs, self.keep_cache = cuda_graphs, keep_cache
        self._step_cache = StepCache() if cuda_graphs else None
        self._buffers: DecodeBuffers | None = None
        self._casts: list[CastLinear] = []

    @torch.inference_mode(False)  # training cannot write into buffers that a validation allocated in inference mode
    @torch.no_grad()
    def generate(self, model: PreTrainedModel, request: GenerationRequest) -> GenerationOutput:
        """Generate `n` sampled responses and, if `request.greedy`, one greedy response per prompt."""
        model, num_sampled = language_model(model), request.num_sampled
        rows = prompt_index_per_row(request.prompt_ids, request.sampling.num_samples, request.greedy)  # [N]
        device = request.prompt_ids.device.type
        step_cache = self._step_cache if device == "cuda" else None  # a CPU runs each step as it is
        # Under autocast, weights are cast once for the rollout.
        casting: AbstractContextManager[list[CastLinear]] = nullcontext([])
        if torch.is_autocast_enabled(device):
            casting = cast_linears(model, self._casts)
        with casting as casts:
            if step_cache is not None:
                step_cache.begin(model)
                if casts != self._casts:
                    step_cache.clear()  # its graphs read the old copies
            self._casts = casts
            output = DecodeLoop(model, request, rows, step_cache, self._allocate).run()
        self._free(model, request.prompt_ids.device)
        return GenerationOutput(
            sampled_ids=output.ids[:num_sampled],  # [S, R]
            greedy_ids=output.ids[num_sampled:] if request.greedy else None,  # [B, R]
            log_probs=None if output.log_probs is None else output.log_probs[:num_sampled],  # [S, R]
            stopped_at=output.stopped_at,  # [N]
        )

    def _allocate(self, cache: DynamicCache, num_rows: int, length: int) -> DecodeBuffers:
        """Return buffers for a rollout: those of the last one if they are kept and large enough."""
        if self._buffers is None or not self._buffers.fits(cache, num_rows, length):
            if self._buffers is not None and self._step_cache is not None:
                self._step_cache.clear()  # its graphs read the old buffers
            self._buffers = None  # free the old ones before allocating new ones
            self._buffers = DecodeBuffers.create(cache, num_rows, length)
        return self._buffers

    def _free(self, model: PreTrainedModel, device: torch.device) -> None:
        """Free buffers and graphs, unless the next rollout can replay the graphs."""
        if device.type == "cuda" and self._step_cache is not None:
            if self.keep_cache and self._step_cache.is_reusable and not is_sharded(model):
                return
            self._step_cache.clear()
        self._buffers, self._casts = None, []
