"""The head of a reward model: where a score is read, which layer makes it, and its normalization in the weights.

transformers' decoder classifiers score the last token that is not the pad id and do not look at the mask. With pad =
eos and a text that ends in eos that is the token before the end. So the score is read here at the mask's last position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remax_lightning.models.last_mlp import skip_unread_tokens
from remax_lightning.models.packing import packed_texts, packing_obstacle

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ScoreHead(nn.Linear):
    """A linear layer with one output that scores in float32 whatever the weights are, and normalizes the scores.

    Half precision would round the scores of like responses to the same number. Parameters have the names of the plain
    layer's; what a score is normalized with is not among them.
    """

    mean: float = 0.0
    """What is subtracted from a score."""
    std: float = 1.0
    """What the difference is divided by."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return `[..., 1]` scores of `[..., D]` hidden states."""
        # Autocast would cast the operands back to 16 bits.
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            scores = F.linear(hidden.to(dtype), self.weight.to(dtype), bias)
        return (scores - self.mean) / self.std


def score_head_name(model: PreTrainedModel) -> str | None:
    """Return the name of the linear layer with one output that stands outside of the body, None unless there is one."""
    body = set() if model.base_model is model else set(model.base_model.modules())
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == 1 and module not in body
    ]
    return names[0] if len(names) == 1 else None


def score_head(model: PreTrainedModel) -> ScoreHead | None:
    """Return the model's score head, turned into a `ScoreHead` in place, or None where there is none to be found."""
    name = score_head_name(model)
    if name is None:
        return None
    head = model.get_submodule(name)
    if type(head) is nn.Linear:
        head.__class__ = ScoreHead
    return head if isinstance(head, ScoreHead) else None


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

    Rows are packed where the model can be, and where that saves padding.
    """
    lengths = mask.sum(1)  # [b]
    has_padding = token_types is None and not bool(mask.all())
    if has_padding and not packing_obstacle(model, input_ids.shape[1], _token_scores):
        last = lengths.cumsum(0) - 1  # [b], of the T tokens of the packed row
        packing = packed_texts(model, lengths.tolist(), input_ids[mask.bool()][None])
        with skip_unread_tokens(model, last, _head_outputs), packing as packed:
            scores = _head_outputs(model, packed.inputs)  # [1, T, 1]
    else:
        last = torch.arange(len(mask), device=mask.device) * mask.shape[1] + lengths - 1  # [b], of the b * T tokens
        types = {} if token_types is None else {"token_type_ids": token_types}
        with skip_unread_tokens(model, last, _head_outputs):
            scores = _head_outputs(model, {"input_ids": input_ids, "attention_mask": mask, **types})  # [b, T, 1]
    return scores.flatten()[last].float()


def _token_scores(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Return `[T, 1]` scores of all tokens of one row."""
    return _head_outputs(model, inputs)[0]


def _head_outputs(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Return the output of the score head in a pass of the model.

    A forward hook takes it, because a strategy that shards the weights gathers them only inside the model's own
    forward pass.
    """
    outputs: list[Tensor] = []
    head = cast("nn.Module", score_head(model))
    # The head may run on [b, T, D], whatever position the model then picks.
    handle = head.register_forward_hook(lambda _module, _inputs, scores: outputs.append(scores))
    try:
        model(**inputs)
    finally:
        handle.remove()
    (scores,) = outputs
    return scores


def pool_by_model(model: PreTrainedModel, input_ids: Tensor, mask: Tensor, token_types: Tensor | None = None) -> Tensor:
    """Take the model's own pooling: encoders read their first token, or a mean under the mask."""
    logits: Tensor = _run(model, input_ids, mask, token_types).logits  # [b, 1]
    return logits[:, 0].float()


def pool_unpadded(model: PreTrainedModel, input_ids: Tensor, mask: Tensor, token_types: Tensor | None = None) -> Tensor:
    """Let the model's own pooling see each row without padding: slow, and right for every model."""
    scores = []
    for i, length in enumerate(mask.sum(1).tolist()):
        row = input_ids[i : i + 1, :length]  # [1, length]
        types = None if token_types is None else token_types[i : i + 1, :length]
        scores.append(pool_by_model(model, row, torch.ones_like(row), types))
    return torch.cat(scores)  # [b]


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
    ordinary = torch.tensor(_plain_token_ids(model, special_ids), device=model.device)  # [12]
    lengths = torch.tensor([3, 6, 9, 11], device=model.device)
    input_ids = ordinary.expand(len(lengths), -1)  # [4, 12]
    mask = (torch.arange(len(ordinary), device=model.device) < lengths[:, None]).long()  # [4, 12]
    # Of the spread of the right scores; in half precision the shape of a batch alone changes the third digit.
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.25

    def matches_unpadded(pooling: Pooling) -> bool:
        try:
            scores, expected = pooling(model, input_ids, mask), pool_unpadded(model, input_ids, mask)  # [4] each
        except Exception:  # for example no `last_hidden_state`, or a text that must end in eos
            return False
        return bool((scores - expected).abs().max() <= tolerance * (expected.max() - expected.min()))

    # ---- Fastest first ----
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


def num_positions(model: nn.Module, config: Any) -> int | None:
    """Return how many tokens of a text a model has positions for; None where its configuration does not say.

    Args:
        model: the reward model.
        config: its configuration, or the part of it that is about text.
    """
    count: int | None = getattr(config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and its like count positions from behind the pad id: 514 rows with pad id 1 are 512 positions.
        is_table = isinstance(module, nn.Embedding) and name.endswith("position_embeddings")
        if is_table and module.padding_idx is not None and count is not None and module.num_embeddings == count:
            return count - int(module.padding_idx) - 1
    return count


class Normalization(NamedTuple):
    """What makes scores of mean 0 and variance 1 on the validation set.

    Args:
        mean: of the scores as the model in training gives them.
        std: their standard deviation.
    """

    mean: float = 0.0
    std: float = 1.0


class ScoreLayers(NamedTuple):
    """The layers of a reward model that can hold a normalization.

    Args:
        head: name of the score head; None where there is none to be found.
        norm: name of the layer norm whose output the head reads, if it has a bias; None otherwise.
    """

    head: str | None
    norm: str | None


@torch.no_grad()
def score_layers(model: PreTrainedModel, input_ids: Tensor) -> ScoreLayers:
    """Find them; a few tokens are run through the model, to see what its head reads.

    Args:
        model: the reward model.
        input_ids: `[1, T]` token ids.
    """
    head_name, head = score_head_name(model), score_head(model)
    if head_name is None or head is None:
        return ScoreLayers(None, None)
    norm_outputs: dict[int, str] = {}  # address of its output -> name of the layer norm
    head_inputs: list[Tensor] = []
    # ---- Record what each layer norm writes and what the head reads; equal addresses are the same tensor ----
    norms = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and module.bias is not None
    }

    def record_output(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        norm_outputs[output.data_ptr()] = norms[module]  # type: ignore[index]

    handles = [norm.register_forward_hook(record_output) for norm in norms]
    handles.append(head.register_forward_pre_hook(lambda _module, inputs: head_inputs.append(inputs[0])))
    try:
        model(input_ids, attention_mask=torch.ones_like(input_ids))
    finally:
        for handle in handles:
            handle.remove()
    # A head that reads one pooled position, [1, D], reads no layer norm's whole output.
    reads_all_tokens = len(head_inputs) == 1 and head_inputs[0].shape[:2] == input_ids.shape
    return ScoreLayers(head_name, norm_outputs.get(head_inputs[0].data_ptr()) if reads_all_tokens else None)


def fold_into_weights(
    weights: dict[str, Tensor], layers: ScoreLayers, head: ScoreHead | None, normalization: Normalization
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights that score normalized, and what of it has to stand in the configuration.

    The weight of the head is divided by the standard deviation. The mean goes into the bias of the head, or else into
    that of the layer norm in front of it, along the head's weight: the head reads what that one writes, so its score
    moves by a constant. A model that has neither (the root mean square norms of Llama, Qwen and others have no bias)
    cannot hold a constant: it stays in the configuration as `mean` beside a `std` of 1, where `ClassifierReward` and
    OpenRLHF look for it. Whoever does not gets scores of variance 1, all shifted by the same amount.

    Args:
        weights: the whole weights by name; not changed.
        layers: where the normalization may go.
        head: the score head in training, which may normalize already.
        normalization: of the scores that it gives.
    """
    if layers.head is None or head is None:
        return weights, {"mean": normalization.mean, "std": normalization.std}
    # score = ((w h + b - head.mean) / head.std - mean) / std: the weight is divided by both deviations, and `constant`
    # is the score of h = 0.
    key, bias = f"{layers.head}.weight", f"{layers.head}.bias"
    head_bias = weights[bias].double().item() if bias in weights else 0.0
    weight = weights[key].double() / (head.std * normalization.std)
    constant = ((head_bias - head.mean) / head.std - normalization.mean) / normalization.std
    changed = {**weights, key: weight.to(weights[key].dtype)}
    settings: dict[str, Any] = {"mean": None, "std": None}
    norm = f"{layers.norm}.bias"
    if bias in weights:
        changed[bias] = torch.full_like(weights[bias], constant)
    elif norm in weights:
        # w (h + shift) = w h + constant
        shift = constant * weight[0] / weight.square().sum()
        changed[norm] = (weights[norm].double() + shift).to(weights[norm].dtype)
    elif constant:
        settings = {"mean": -constant, "std": 1.0}
    return changed, settings
