"""What benchmarks/gpu.py measures: models of published shapes with random weights, padded prompts, and their plan."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from shapes import EOS, PAD, Shape, tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from remax_lightning.config import SamplingConfig
from remax_lightning.models import ModelConfig
from remax_lightning.modules import ReMaxModule
from remax_lightning.rewards import ClassifierReward
from remax_lightning.tools.plan.activation_memory import StepShape
from remax_lightning.tools.plan.model_sizes import measure
from remax_lightning.tools.plan.phases import peak_bytes, ppo_phases, remax_phases
from remax_lightning.tools.plan.planned_run import PlannedRun
from remax_lightning.tools.plan.types import Strategy
from remax_lightning.types import PromptBatch

TOP_P = 0.9
_MODELS = "policy", "reward"
"""Folders of the models of a training step."""


class Work(NamedTuple):
    """A model and the work that it is given.

    Args:
        family: `model_type` of transformers.
        config: its shape.
        prompt: most tokens of a prompt; prompts have half as many at least and are padded on the left.
        response: most tokens of a response; half as many on average, by a geometric distribution.
        prompts: of a rollout, each with a sampled and a greedy response.
        micro_batch: responses per training pass.
    """

    family: str
    config: dict[str, Any]
    prompt: int = 256
    response: int = 256
    prompts: int = 32
    micro_batch: int = 8

    @property
    def eos_ids(self) -> list[int]:
        """Token ids that end a response: so many that a token drawn evenly is one with probability 2 / `response`.

        Random weights draw nearly evenly, so lengths are geometric without a tokenizer's help.
        """
        share = max(1, round(2 * self.config["vocab_size"] / self.response))
        return [EOS, *range(self.config["vocab_size"] - share, self.config["vocab_size"])]

    @property
    def sampling(self) -> SamplingConfig:
        """How responses are sampled."""
        return SamplingConfig(max_response_length=self.response, top_p=TOP_P)


def _shape(width: int, inner: int, layers: int, heads: int, vocab: int, **others: Any) -> dict[str, Any]:
    names = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return names | {"num_attention_heads": heads, "vocab_size": vocab} | others


WORKS = {
    "opt-1.3b": Work(
        "opt",
        {
            "hidden_size": 2048,
            "ffn_dim": 8192,
            "word_embed_proj_dim": 2048,
            "vocab_size": 50272,
            "num_attention_heads": 32,
            "num_hidden_layers": 24,
        },
    ),
    "qwen2.5-1.5b": Work("qwen2", _shape(1536, 8960, 28, 12, 151936, num_key_value_heads=2, tie_word_embeddings=True)),
    "llama-2-7b": Work("llama", _shape(4096, 11008, 32, 32, 32000), micro_batch=4),
    "toy": Work(
        "qwen2", _shape(64, 128, 2, 4, 256, num_key_value_heads=2), prompt=8, response=8, prompts=4, micro_batch=2
    ),
}


def build(work: Work, device: torch.device, *, classifier: bool = False, **changes: Any) -> Any:
    """Return a random model in bfloat16, made on the device itself; `changes` are of its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    length = max(2048, work.prompt + work.response)
    config = AutoConfig.for_model(work.family, **work.config | {"max_position_embeddings": length} | changes)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, EOS, PAD
    config.num_labels = 1
    for name in ("dropout", "attention_dropout", "layerdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    with device:
        model = kind.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def padded_prompts(work: Work, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `[B, P]` random token ids and their mask; the first row is full, the others are padded on the left."""
    generator = torch.Generator().manual_seed(0)
    shape = work.prompts, work.prompt
    ids = torch.randint(EOS + 2, min(work.eos_ids[1:]), shape, generator=generator)  # [B, P]
    lengths = torch.randint(work.prompt // 2, work.prompt + 1, (work.prompts, 1), generator=generator)
    lengths[0] = work.prompt
    mask = torch.arange(work.prompt) >= work.prompt - lengths  # [B, P]
    return ids.masked_fill(~mask, PAD).to(device), mask.to(device)


class _Batches(IterableDataset[PromptBatch]):
    """The same prompts for ever, each rollout batch once for every micro-batch."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __iter__(self) -> Iterator[PromptBatch]:
        work = self.work
        ids, mask = padded_prompts(work, torch.device("cpu"))
        texts = [" ".join(f"w{token}" for token in row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)]
        splits = work.prompts // work.micro_batch
        for number in count():
            yield PromptBatch(ids, mask, texts, [{}] * len(texts), number % splits, splits)


def training_parts(work: Work, folder: Path) -> tuple[ReMaxModule, Any]:
    """Return a module that trains policy and reward model in `folder`, with its data loader; `save_weights` is next.

    Configurations and tokenizers alone are saved, which the plan needs.
    """
    vocab = work.config["vocab_size"]
    words = tokenizer(Shape(0, 0, vocab, work.prompt, work.response, work.prompts))
    for name in _MODELS:
        model = _model(work, torch.device("meta"), name)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    path = str(folder / "policy")
    module = ReMaxModule(
        ModelConfig(path, gradient_checkpointing=True),
        ClassifierReward(str(folder / "reward"), "{prompt} {response}", batch_size=16, dtype="bfloat16"),
        ModelConfig(path, dtype="bfloat16"),
        sampling=work.sampling,
        check_on_policy=False,
        stall_timeout=None,
    )
    return module, DataLoader(_Batches(work), batch_size=None)


def save_weights(work: Work, folder: Path, device: torch.device) -> None:
    """Make the models of `training_parts` on the device, and save them: twice 14 GB for 7 B."""
    for name in _MODELS:
        _model(work, device, name).save_pretrained(folder / name)


def _model(work: Work, device: torch.device, name: str) -> Any:
    model = build(work, device, classifier=name == "reward")
    if name == "policy":
        model.generation_config.eos_token_id = work.eos_ids
    return model


def planned(work: Work, module: ReMaxModule) -> dict[str, Any]:
    """Return what `remax plan` says of the step of `module` on one device in bf16-mixed, in GB."""
    splits = work.prompts // work.micro_batch
    shape = StepShape(
        prompts=work.prompts,
        sampling=work.sampling,
        prompt_length=work.prompt,
        training_rows=work.micro_batch,
        scoring_rows=work.micro_batch,
        reference_rows=work.micro_batch,
        reward_rows=16,
    )
    strategy = Strategy("single")
    run = PlannedRun(module, shape, splits, splits, scores_policy=False, strategy=strategy,
                     precision="bf16-mixed", device="gpu")  # fmt: skip
    sizes = measure(run)
    ours = remax_phases(sizes, strategy)
    peak, ppo = peak_bytes(ours), peak_bytes(ppo_phases(sizes, strategy))
    figures = {f"planned_{phase}_gb": sum(parts.values()) / 1e9 for phase, parts in ours.items()}
    return figures | {"planned_peak_gb": peak / 1e9, "planned_ppo_extra_gb": (ppo - peak) / 1e9}
