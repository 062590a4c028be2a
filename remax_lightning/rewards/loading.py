"""Load a reward model of any supported format as a transformers classifier with one label, or make a new one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from remax_lightning.distributed import rank
from remax_lightning.errors import UserError
from remax_lightning.files import read_json_object
from remax_lightning.models import ModelConfig
from remax_lightning.models.checkpoint_reader import refused_pickle
from remax_lightning.models.checksums import check_exported
from remax_lightning.models.loading import enable_gradient_checkpointing, looks_local, zero_dropout
from remax_lightning.rewards.formats import (
    Kind,
    RewardCheckpoint,
    StoredTensor,
    detect_format,
    find_file,
    list_tensors,
    merge_adapter,
    read_adapter,
    read_tensor,
)
from remax_lightning.rewards.pooling import score_head, score_head_name
from remax_lightning.sharding import gathered, is_zero3_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ClassifierSource:
    """The source of a reward model, and how to load it.

    Args:
        path: a folder or a hub name: a sequence classifier of transformers, a reward model of DeepSpeed-Chat or
            OpenRLHF, a language model with TRL's value head, or a PEFT adapter of a sequence classifier.
        key: the configuration key of `path`'s parent, for messages.
        dtype: of the weights; None as they are saved.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model.
        allow_pickle: also take weights in `.bin` files, read by `torch.load(weights_only=True)`.
        new_head: give a model without a score head a new one.
        normalize: let the score head normalize as the configuration says.
        configure: changes the configuration before the model is made.
        options: further arguments of `from_pretrained`.
    """

    path: str
    key: str
    dtype: torch.dtype | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    new_head: bool = False
    normalize: bool = True
    configure: Callable[[Any], None] | None = None
    options: dict[str, Any] = field(default_factory=dict)


class LoadedClassifier(NamedTuple):
    """A reward model.

    Args:
        model: the classifier; its `ScoreHead` normalizes as the checkpoint says.
        kind: the format in which it was saved.
        has_new_head: whether the weights of its score head are not from the checkpoint.
    """

    model: PreTrainedModel
    kind: Kind
    has_new_head: bool = False


def load_classifier(source: ClassifierSource) -> LoadedClassifier:
    """Load a reward model.

    Raises:
        UserError: if it cannot be loaded, has more than one label, or is not whole.
    """
    adapter = read_adapter(source.path, source.revision, source.allow_pickle, source.key)
    if adapter is None:
        return _load_model(source)
    # ---- An adapter: load its base, merge it, and set the normalization of the merged head ----
    base = _load_model(
        replace(source, path=adapter.base_path, revision=adapter.base_revision, new_head=True), of_adapter=source.path
    )
    model = merge_adapter(base.model, adapter, needs_head=base.has_new_head, key=source.key)
    _set_normalization(model, model.config if source.normalize else None, source.path)
    return LoadedClassifier(model, base.kind)


def tokenizer_location(source: ClassifierSource) -> tuple[str, str | None]:
    """Return path and revision of a reward model's tokenizer: its own, or an adapter's base's if that has none."""
    adapter = read_adapter(source.path, source.revision, source.allow_pickle, source.key)
    if adapter is None or adapter.has_tokenizer:
        return source.path, source.revision
    return adapter.base_path, adapter.base_revision


def _load_model(source: ClassifierSource, of_adapter: str | None = None) -> LoadedClassifier:
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, AutoModelForSequenceClassification

    # ---- Configuration, and the names in the weight files ----
    common: dict[str, Any] = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source.path, **common)
        check_exported(Path(source.path), f"{source.key}.path")
        stored = list_tensors(source.path, source.revision, source.allow_pickle)
    except UserError:
        raise
    except Exception as error:  # the hub's, pickle's and the libraries' own kinds
        raise load_error(source, "configuration", error, of_adapter) from error
    # ---- Whose format it is, and whether it has one score ----
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    checkpoint = detect_format(stored, config, getattr(known, "base_model_prefix", "model"))
    _check_labels(source, config, checkpoint, stored)
    config.num_labels = 1
    if source.configure is not None:
        source.configure(config)
    try:
        # ---- Weights, under the names of the classifier ----
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source.path,
            config=config,
            dtype=source.dtype or "auto",
            use_safetensors=None if source.allow_pickle else True,
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            key_mapping=checkpoint.renames or None,
            **common,
            **source.options,
        )
    except Exception as error:
        raise load_error(source, "model", error, of_adapter) from error
    # ---- What transformers renamed, filled in or has no place for ----
    _drop_key_mapping(model, checkpoint)
    has_new_head = _check_complete(source, model, report, checkpoint, stored)
    bias = 0.0 if checkpoint.bias is None else float(read_tensor(stored[checkpoint.bias], checkpoint.bias))
    _set_normalization(model, config if source.normalize else None, source.path, bias)
    return LoadedClassifier(model, checkpoint.kind, has_new_head)


def load_error(source: ClassifierSource, what: str, error: Exception, of_adapter: str | None = None) -> UserError:
    """Return the message for a part of a reward model that a library could not load."""
    hint = "name a folder or a hub model that holds a sequence classifier and its tokenizer"
    if "safetensors" in str(error) and not source.allow_pickle:
        hint = f"convert the weights to safetensors, or set {source.key}.allow_pickle if you trust their source"
    if of_adapter is not None:
        hint = f"base_model_name_or_path in {of_adapter}/adapter_config.json names it; {hint}"
    if refused := refused_pickle(error):
        return UserError(f"{source.key}.path: the {what} of {source.path!r} cannot be loaded: {refused}")
    reason = f"{type(error).__name__}: {error}"
    return UserError(f"{source.key}.path: the {what} of {source.path!r} cannot be loaded; {hint}. {reason}")


def _check_labels(
    source: ClassifierSource, config: Any, checkpoint: RewardCheckpoint, stored: dict[str, StoredTensor]
) -> None:
    """Refuse models with more than one score, before gigabytes of weights are read."""
    key = f"{source.key}.path"
    if not stored:  # no weights in a permitted format, which is what loading them will say
        return
    # ---- A transformers classifier says how many labels it has ----
    if checkpoint.head is None:
        if config.num_labels != 1 and not source.new_head:
            raise UserError(
                f"{key}: expected a reward model with one label, got {source.path} with {config.num_labels} labels;"
                " name a model trained as a reward model (a language model says 2)"
            )
        return
    # ---- Other formats: the head's weight shows it, [1, D] ----
    head = stored.get(checkpoint.head)
    if head is None:
        raise UserError(f"{key}: {source.path} has no {checkpoint.head}, the score head of {checkpoint.kind}")
    if len(head.shape) != 2 or head.shape[0] != 1:
        raise UserError(
            f"{key}: {head.file}: expected {checkpoint.head} of shape [1, D], one score, got {list(head.shape)}"
        )


def _check_complete(
    source: ClassifierSource,
    model: PreTrainedModel,
    report: dict[str, Any],
    checkpoint: RewardCheckpoint,
    stored: dict[str, StoredTensor],
) -> bool:
    """Refuse a model with randomly initialized weights; return whether its head is new, where that is allowed."""
    # ---- Tensors of another shape ----
    files = {checkpoint.target_name(name): (name, tensor.file) for name, tensor in stored.items()}
    for entry in sorted(report["mismatched_keys"]):
        name, shape, expected = entry[0], list(entry[1]), list(entry[2])
        stored_name, file = files.get(name, (name, source.path))
        raise UserError(
            f"{source.key}.path: {file}: {stored_name} has shape {shape}, the model that the configuration describes"
            f" needs {expected}; the weights belong to another model" + _widen_labels(model, name, shape)
        )
    # ---- Tensors that the files lack: only those outside of the body may be new ----
    missing = set(report["missing_keys"])
    head = score_head_name(model)
    outside = {name for name in missing if not name.startswith(f"{model.base_model_prefix}.")}
    if missing and source.new_head and missing == outside:
        return f"{head}.weight" in missing
    if missing:
        raise UserError(
            f"{source.key}.path: expected the weights of a sequence classifier, got {source.path} without"
            f" {', '.join(sorted(missing)[:4])}; name a model that was trained as a reward model"
        )
    return False


def _widen_labels(model: PreTrainedModel, name: str, shape: list[int]) -> str:
    head = score_head_name(model)
    return f" (a head for {shape[0]} labels, where a reward model has one)" if name == f"{head}.weight" else ""


def _drop_key_mapping(model: Any, checkpoint: RewardCheckpoint) -> None:
    """Prevent transformers from saving the weights under the names that they have in the checkpoint."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        ours = set(checkpoint.renames)
        model._weight_conversions = [rule for rule in conversions if not ours & set(_patterns(rule))]


def _patterns(conversion: Any) -> list[str]:
    patterns = conversion.source_patterns
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _set_normalization(model: PreTrainedModel, config: Any, path: str, bias: float = 0.0) -> None:
    """Set the normalization of the score head from `mean` and `std` in the configuration, OpenRLHF's names."""
    mean, std = getattr(config, "mean", 0.0), getattr(config, "std", 1.0)
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in (mean, std)) or std <= 0:
        raise UserError(
            f"{path}/config.json: mean and std, which normalize the score, must be finite numbers and std above 0,"
            f" got {mean!r} and {std!r}; correct or remove them"
        )
    head = score_head(model)
    if head is not None:
        # (score + bias - mean) / std: a bias that the head has no place for is part of the mean
        head.mean, head.std = mean - bias, std
    elif (mean - bias, std) != (0.0, 1.0):
        raise UserError(f"{path}: no score head was found in {type(model).__name__} to normalize its scores")


def saved_template(source: ClassifierSource) -> str | None:
    """Return the template in a reward model's configuration that combines prompt and response; None without one."""
    template = _saved_setting(source, "reward_template")
    return template if isinstance(template, str) else None


def saved_template_kwargs(source: ClassifierSource) -> dict[str, Any]:
    """Return the variables of the chat template that a reward model was trained with."""
    kwargs = _saved_setting(source, "reward_chat_template_kwargs")
    return kwargs if isinstance(kwargs, dict) else {}


def _saved_setting(source: ClassifierSource, name: str) -> Any:
    file = find_file(source.path, "config.json", source.revision)
    return None if file is None else read_json_object(file).get(name)


# ---- The reward model that training starts from ----


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
