"""Packing: several examples per row, without padding; no example attends to another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from remax_lightning.errors import UserError
from remax_lightning.functional import hidden_statistics, token_statistics
from remax_lightning.models.forward import accepts_argument, eval_mode, find_head
from remax_lightning.sharding import language_model
from remax_lightning.types import SupervisedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PackingMode = Literal["positions", "mask"]
"""How the examples of a row are separated: by positions that restart at 0, or by an attention mask."""


class PackedRows(NamedTuple):
    """Rows of several examples.

    Args:
        input_ids: `[N, T]` token ids.
        position_ids: `[N, T]` positions, which restart at 0 in each example.
        targets: `[N, T]` bool, True on response tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor


def pack(batch: SupervisedBatch) -> PackedRows:
    """Pack the examples of a batch into rows of the length of the longest example, by first-fit decreasing.

    Rows are as wide as without packing, and there are fewer of them.
    """
    prompt_lengths, response_lengths = batch.prompt_mask.sum(1).tolist(), batch.response_mask.sum(1).tolist()
    lengths = [prompt + response for prompt, response in zip(prompt_lengths, response_lengths, strict=True)]  # [B]
    width = max(lengths)
    # ---- First-fit decreasing: put each example into the first row with room for it ----
    rows: list[list[int]] = []
    free: list[int] = []  # tokens left in each row
    for example in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((i for i, left in enumerate(free) if left >= lengths[example]), None)
        if row is None:
            rows.append([])
            free.append(width)
            row = len(rows) - 1
        rows[row].append(example)
        free[row] -= lengths[example]
    # ---- Copy the examples into their rows ----
    # Tails count on from 0 as well, as one more example that is no target.
    input_ids = batch.prompt_ids.new_zeros(len(rows), width)
    position_ids = torch.zeros_like(input_ids)
    targets = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, examples in enumerate(rows):
        start = 0
        for i in examples:
            end, response = start + lengths[i], start + prompt_lengths[i]
            ids = [batch.prompt_ids[i][batch.prompt_mask[i]], batch.response_ids[i][batch.response_mask[i]]]
            input_ids[row, start:end] = torch.cat(ids)
            position_ids[row, start:end] = torch.arange(lengths[i], device=input_ids.device)
            targets[row, response:end] = True
            start = end
        position_ids[row, start:] = torch.arange(width - start, device=input_ids.device)
    return PackedRows(input_ids, position_ids, targets)


def packed_log_probs(model: PreTrainedModel, rows: PackedRows, packing_mode: PackingMode) -> Tensor:
    """Return `[M]` log-probs of the target tokens, row by row."""
    inputs = _inputs(model, rows.input_ids, rows.position_ids, packing_mode)
    # The state before a token predicts it: the targets, one place to the left. No row starts with a target, so none
    # wraps around.
    ids, predicting = rows.input_ids[rows.targets], rows.targets.roll(-1, dims=1)
    head = find_head(model).head
    if head is None:
        logits = cast(Tensor, model(**inputs).logits)[predicting]  # [M, V]
        return token_statistics(logits[None], ids[None]).log_probs[0]
    hidden = language_model(model).base_model(**inputs).last_hidden_state[predicting]  # [M, D]
    return hidden_statistics(hidden, head, ids).log_probs


@torch.no_grad()
def find_packing_mode(model: PreTrainedModel) -> PackingMode:
    """Return how this model separates the examples of a row, found by running a few tokens packed and unpacked.

    Most models of transformers derive a mask from positions that restart at 0. Some, such as OPT, need an explicit
    mask, and others support neither.

    Raises:
        UserError: if the model supports neither.
    """
    # ---- Three examples of random tokens, in one packed row and one by one ----
    lengths, generator = (5, 3, 4), torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(0, size, (1, sum(lengths)), generator=generator).to(model.device)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(model.device)
    # In half precision the shape of a batch alone changes the third digit.
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    with eval_mode(model):
        separate = torch.cat([model(input_ids=example, use_cache=False).logits[0] for example in ids.split(lengths, 1)])
        for packing_mode in get_args(PackingMode) if accepts_argument(model, "position_ids") else ():
            try:
                packed = model(**_inputs(model, ids, positions, packing_mode)).logits[0]
            except (RuntimeError, TypeError, ValueError):  # this attention does not support the mask
                continue
            # Examples that see each other give other logits by far more than rounding.
            if (packed - separate).abs().max() <= tolerance * separate.std():
                return cast(PackingMode, packing_mode)
    raise UserError(
        f"model.packing must be false for {type(model).__name__}, got true: packed into one row, its examples would see"
        " each other"
    )


def _inputs(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, packing_mode: PackingMode
) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
    if packing_mode == "mask":
        # Attend to earlier tokens of the same example only.
        number = (position_ids == 0).cumsum(1)  # [N, T], the example of each token
        place = torch.arange(input_ids.shape[1], device=input_ids.device)  # [T]
        seen = (number[:, :, None] == number[:, None, :]) & (place[:, None] >= place)  # [N, T, T]
        if model.config._attn_implementation == "sdpa":
            inputs["attention_mask"] = seen[:, None]
        else:  # other kernels add the mask to the attention logits
            least = torch.finfo(model.dtype).min
            inputs["attention_mask"] = torch.zeros_like(seen, dtype=model.dtype).masked_fill(~seen, least)[:, None]
    return inputs
