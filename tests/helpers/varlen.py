"""What stands in for torch's flash attention by lengths where there is no device for it: the same, computed exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class FlashByLengths:
    """`torch.nn.attention.varlen.varlen_attn` for one query per row; counts its calls.

    Attributes:
        calls: how often it was called, with a table of pages and without.
    """

    def __init__(self) -> None:
        self.calls = {"pages": 0, "starts": 0}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        seqused_k: Tensor,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        block_table: Tensor | None = None,
    ) -> Tensor:
        assert max_q == 1
        assert cu_seq_q.shape == (len(query) + 1,)
        assert cu_seq_k.shape == cu_seq_q.shape  # flash attention 2 asks for it with a table, too
        assert {tensor.dtype for tensor in (cu_seq_q, cu_seq_k, seqused_k)} == {torch.int32}
        if block_table is None:
            self.calls["starts"] += 1
            places = (cu_seq_k[:-1, None].long() + torch.arange(max_k, device=query.device)).clamp_max(len(key) - 1)
            keys, values = key[places], value[places]  # [N, max_k, H', d]
        else:
            self.calls["pages"] += 1
            assert key.shape[1] % 256 == 0  # what the kernel asks for
            assert max_k <= block_table.shape[1] * key.shape[1]
            keys, values = (states[block_table.long()].flatten(1, 2) for states in (key, value))
        place, used = torch.arange(keys.shape[1], device=query.device), seqused_k[:, None]
        seen = place < used
        if window_size[0] >= 0:
            seen = seen & (place >= used - 1 - window_size[0])
        rows: Any = (states.transpose(1, 2) for states in (query[:, None], keys, values))
        output = scaled_dot_product_attention(*rows, attn_mask=seen[:, None, None], scale=scale, enable_gqa=enable_gqa)
        return output[:, :, 0]
