"""The own rollout engine: sampled and greedy responses of a prompt decoded together, on the trainer's own weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from remax_lightning.models.forward import language_model, row_prompts
from remax_lightning.rollout.base import GenerationOutput, GenerationRequest
from remax_lightning.rollout.cast_linear import Packed, is_shared, packed_linears
from remax_lightning.rollout.decode_loop import Buffers, Decoding
from remax_lightning.rollout.step_cache import Recorder

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


class PairedEngine:
    """One prefill of the `B` prompts, its cache repeated to `N = B * (n + 1)` rows, one decoding loop for all of them.

    The greedy response costs one more row per prompt instead of one more `generate` call, and the prompt is read once.
    Works with every architecture of transformers whose `forward` takes a `Cache`; `HuggingFaceEngine` is for the rest.

    Args:
        record: record the decoding step once per shape and replay it, as a CUDA graph or, on a CPU, as its bare
            operators without Python between them. The responses are the same; only Python's work per token goes.
        keep_slots: on CUDA, keep the memory of keys and values, and in mixed precision that of the weights in 16 bits,
            between rollouts, because graphs stay valid only with it. False gives it back to the training pass, and the
            graphs are made anew in every rollout, as they are where a strategy gathers the weights for each.
    """

    def __init__(self, record: bool = True, keep_slots: bool = True) -> None:
        self.recorder = Recorder() if record else None
        self.keep_slots = keep_slots
        self._buffers: Buffers | None = None
        self._packed: list[Packed] = []

    @torch.inference_mode(False)  # training could not write into memory that is kept from a validation's
    @torch.no_grad()
    def generate(self, model: PreTrainedModel, request: GenerationRequest) -> GenerationOutput:
        """Write `n` sampled responses and, if `request.greedy`, one greedy response per prompt; see `RolloutEngine`."""
        model = language_model(model)
        rows = row_prompts(request.prompt_ids, request.sampling.num_samples, request.greedy)  # [N]
        with packed_linears(model, len(rows), self._packed) as weights:
            self._packed = weights
            if self.recorder is not None:
                self.recorder.begin(model)
            written = Decoding(model, request, rows, self.recorder, weights, self._room).write()
        self._end(model, request.prompt_ids.device)
        num_sampled = request.num_sampled
        return GenerationOutput(
            written.ids[:num_sampled],
            written.ids[num_sampled:] if request.greedy else None,
            None if written.log_probs is None else written.log_probs[:num_sampled],
            written.stopped_at,
        )

    def _room(self, cache: DynamicCache, num_rows: int, length: int) -> Buffers:
        """Return buffers for a rollout: those of the last one where they are kept and large enough."""
        if self._buffers is None or not self._buffers.fit(cache, num_rows, length):
            if self._buffers is not None and self.recorder is not None:
                self.recorder.forget()  # graphs read the old ones
            self._buffers = None  # before there are new ones
            self._buffers = Buffers.make(cache, num_rows, length)
        return self._buffers

    def _end(self, model: PreTrainedModel, device: torch.device) -> None:
        """Give the buffers back unless graphs go on reading them."""
        lasts = self.recorder is not None and self.recorder.lasts and not is_shared(model)
        if device.type == "cuda" and self.keep_slots and lasts:
            return
        self._buffers, self._packed = None, []
        if device.type == "cuda" and self.recorder is not None:
            self.recorder.forget()
