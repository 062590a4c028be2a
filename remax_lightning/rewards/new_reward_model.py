"""Making the reward model that training starts from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from remax_lightning.distributed import rank
from remax_lightning.errors import UserError
from remax_lightning.models import ModelConfig
from remax_lightning.models.loading import enable_gradient_checkpointing, looks_local, zero_dropout
from remax_lightning.rewards.formats.load import ClassifierSource, load_classifier
from remax_lightning.rewards.pooling import score_head
from remax_lightning.sharding import gathered, is_zero3_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "model.reward_model"


def load_reward_model(source: ModelConfig) -> PreTrainedModel:
    """Load a reward model, or make one of a language model: then its score head is new.

    Raises:
        UserError: if it is to have an adapter, 4 bits or a placement, if there is no such model,
            it has no sequence classifier in transformers, or scores several things.
    """
    # ---- Options of `ModelConfig` that are not for reward models ----
    for name, neutral in (("lora", None), ("quantization", None), ("placement", "replicate")):
        if getattr(source, name) != neutral:
            raise UserError(
                f"{KEY}.{name} must be left out, got {getattr(source, name)}: a reward model is trained whole, on every"
                " device that its strategy gives it"
            )
    if looks_local(source.path) and not _is_folder(source.path):
        raise UserError(f"{KEY}.path: there is no folder {source.path!r}; give a folder or a hub name")
    # ---- Load, or make at random ----
    options: dict[str, Any] = {}
    if source.attn_implementation is not None:
        options["attn_implementation"] = source.attn_implementation
    dtype = torch.get_default_dtype() if source.dtype is None else getattr(torch, source.dtype)
    classifier = ClassifierSource(
        source.path,
        KEY,
        dtype=dtype,
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
        allow_pickle=source.allow_pickle,
        new_head=True,
        configure=zero_dropout if source.disable_dropout else None,
        options=options,
    )
    if source.from_scratch:
        model, is_new = _random_model(classifier), True
    else:
        loaded = load_classifier(classifier)
        model, is_new = loaded.model, loaded.has_new_head
    # ---- A new head ----
    head = score_head(model)
    if is_new and head is not None:
        rank_zero_info(f"{source.path} has no score head: it gets a new one.")
        _init_head(head)
    if source.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model


def _is_folder(path: str) -> bool:
    from pathlib import Path

    return Path(path).is_dir()


def _random_model(source: ClassifierSource) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    common = {"trust_remote_code": source.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source.path, revision=source.revision, num_labels=1, **common)
        if source.configure is not None:
            source.configure(config)
        model = AutoModelForSequenceClassification.from_config(config, dtype=source.dtype, **common, **source.options)
    except Exception as error:  # whatever the libraries raise is about the files at the path
        raise UserError(f"{KEY}.path: no reward model can be made after {source.path!r}: {error}") from error
    return cast("PreTrainedModel", model)


@torch.no_grad()
def _init_head(head: nn.Linear) -> None:
    """Draw the weights of a new head, the same on every rank.

    With a variance of 1 / (D + 1), as in Stiennon et al. (2020, arXiv 2009.01325, appendix C), scores begin around 1.
    """
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    weight = torch.randn(1, head.in_features, generator=generator) / math.sqrt(head.in_features + 1)  # [1, D]
    with gathered([head.weight], writer_rank=0):
        if rank() == 0 or not is_zero3_sharded(head.weight):
            head.weight.copy_(weight)
    if head.bias is not None and not is_zero3_sharded(head.bias):
        head.bias.zero_()
