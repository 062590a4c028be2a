"""Where a sequence classifier's score is read.

transformers' decoder classifiers score the last token that is not the pad id and do not look at the mask.
With pad = eos and a text that ends in eos that is the token before the end. So the score is read here at the
mask's last position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from remax_lightning.rewards.score_head import score_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Pooling(Protocol):
    """From a batch of texts to their scores."""

    def __call__(
        self, model: PreTrainedModel, input_ids: Tensor, mask: Tensor, token_types: Tensor | None = None
    ) -> Tensor:
        """Return `[b]` float32 scores.

        Args:
            model: the classifier.
            input_ids: `[b, T]` token ids, padded on the right.
            mask: `[b, T]` ones on real tokens, zeros on padding.
            token_types: `[b, T]` which part of a pair a token belongs to; None for models that read no such thing.
        """


def _run(model: PreTrainedModel, input_ids: Tensor, mask: Tensor, token_types: Tensor | None) -> Any:
    types = {} if token_types is None else {"token_type_ids": token_types}
    return model(input_ids, attention_mask=mask, **types)


def pool_last_token(
    model: PreTrainedModel, input_ids: Tensor, mask: Tensor, token_types: Tensor | None = None
) -> Tensor:
    """Read a head that scores every token at the last real one of each row.

    A forward hook takes the scores, because a strategy that shards the weights gathers them only inside the model's own
    forward pass.
    """
    head_outputs: list[Tensor] = []
    head = cast("nn.Module", score_head(model))
    handle = head.register_forward_hook(lambda _module, _inputs, scores: head_outputs.append(scores))
    try:
        _run(model, input_ids, mask, token_types)
    finally:
        handle.remove()
    (scores,) = head_outputs  # [b, T, 1]
    return scores[torch.arange(len(scores), device=scores.device), mask.sum(1) - 1, 0].float()


def pool_by_model(model: PreTrainedModel, input_ids: Tensor, mask: Tensor, token_types: Tensor | None = None) -> Tensor:
    """Take the model's own pooling: encoders read their first token, or a mean under the mask."""
    logits: Tensor = _run(model, input_ids, mask, token_types).logits
    return logits[:, 0].float()


def pool_unpadded(model: PreTrainedModel, input_ids: Tensor, mask: Tensor, token_types: Tensor | None = None) -> Tensor:
    """Let the model's own pooling see each row without padding: slow, and right for every model."""
    scores = []
    for i, length in enumerate(mask.sum(1).tolist()):
        row = input_ids[i : i + 1, :length]
        types = None if token_types is None else token_types[i : i + 1, :length]
        scores.append(pool_by_model(model, row, torch.ones_like(row), types))
    return torch.cat(scores)


@torch.no_grad()
def choose_pooling(model: PreTrainedModel, special_ids: list[int]) -> Pooling:
    """Return the fastest pooling that gives the score of an unpadded text.

    Names of classes and heads say too little (`classifier` stands over encoders and over some decoders), so a
    probe decides: the first 3, 6, 9 and 11 of twelve ordinary tokens, scored alone by the model and then with the
    remaining ones behind them, which only the mask calls padding. A pooling that goes by the pad id or by the end
    of the row reads the same place in all four and is left out.

    Args:
        model: the classifier in eval mode.
        special_ids: token ids that may mean something to the model, kept out of the probe.
    """
    ordinary = torch.tensor(_plain_token_ids(model, special_ids), device=model.device)
    lengths = torch.tensor([3, 6, 9, 11], device=model.device)
    input_ids = ordinary.expand(len(lengths), -1)
    mask = (torch.arange(len(ordinary), device=model.device) < lengths[:, None]).long()
    # Of the spread of the right scores; in half precision the shape of a batch alone changes the third digit.
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.25

    def matches_unpadded(pooling: Pooling) -> bool:
        try:
            scores, expected = pooling(model, input_ids, mask), pool_unpadded(model, input_ids, mask)  # [4] each
        except Exception:  # for example no `last_hidden_state`, or a text that must end in eos
            return False
        return bool((scores - expected).abs().max() <= tolerance * (expected.max() - expected.min()))

    if score_head(model) is not None and matches_unpadded(pool_last_token):
        return pool_last_token
    if matches_unpadded(pool_by_model):
        return pool_by_model
    if not model.config.is_encoder_decoder:
        # One row has no padding, so its last token is the last one, also when its id is the pad id.
        model.config.pad_token_id = None
    return pool_unpadded


def _plain_token_ids(model: PreTrainedModel, special_ids: list[int]) -> list[int]:
    """Twelve token ids without a meaning of their own, as far apart as the first ten thousand allow."""
    special = {*special_ids, model.config.pad_token_id}
    size = min(cast("nn.Embedding", model.get_input_embeddings()).num_embeddings, 10_000)
    ordinary = [token for token in range(size) if token not in special]
    return ordinary[:: max(1, len(ordinary) // 12)][:12]
