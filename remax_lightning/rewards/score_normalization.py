"""Where the mean and the standard deviation of the scores go when a reward model is saved: into its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from remax_lightning.rewards.score_head import ScoreHead, score_head, score_head_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        shift = constant * weight[0] / weight.square().sum()
        changed[norm] = (weights[norm].double() + shift).to(weights[norm].dtype)
    elif constant:
        settings = {"mean": -constant, "std": 1.0}
    return changed, settings
