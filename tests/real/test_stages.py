"""Prompts, pairs and reward models with published tokenizers, under tiny random models with their vocabularies.

What the package computes is compared with plain transformers: its rendering, its classifier, its log-probs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import make_trainer, remax_module
from lightning.pytorch import Callback
from real.conftest import published_tokenizer
from real.published import DIALOGUES, TEMPLATES, assistant, user

from remax_lightning.config import LossConfig
from remax_lightning.data import LoadingConfig, PreferenceDataModule, PromptDataModule
from remax_lightning.rewards import ClassifierReward
from remax_lightning.rollout import SamplingConfig
from remax_lightning.types import Conversation, Prompt, StepOutput

NAMES = [
    *("command_r_plus", "deepseek_v3", "gemma3", "gpt_oss", "llama3", "llama3_1", "mistral_nemo"),
    *("phi3_5", "qwen3", "smollm2"),
]
"""Templates with a tokenizer each; the others of `TEMPLATES` share one with them."""
UNUSED = 40
"""Embeddings behind the last token: published models have them."""
TURNS = DIALOGUES["turns"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `policy` and `reward` with a published tokenizer and a random Llama of its vocabulary."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    tokenizer = published_tokenizer(request.param)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(**sizes, **ids, vocab_size=len(tokenizer) + UNUSED, pad_token_id=None, num_labels=1)
    home = tmp_path_factory.mktemp(request.param)
    for name, kind in (("policy", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        torch.manual_seed(0)
        model = kind.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4.0) if parameter.dim() > 1 else None
        if name == "policy":
            ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TEMPLATES[request.param].turn_end)}
            model.generation_config.eos_token_id = sorted(ends)
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    return home


@cache
def tokenizer_in(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def ids_of(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    """The token ids of messages as transformers makes them."""
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


@cache
def classifier_in(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


@torch.no_grad()
def plain_score(folder: Path, ids: list[int]) -> float:
    """The score of one conversation by transformers' own classifier."""
    return float(classifier_in(folder)(torch.tensor([ids])).logits)


def test_a_pair_is_what_transformers_writes(folder: Path) -> None:
    tokenizer = tokenizer_in(folder / "policy")  # the same in both
    rejected = assistant("Nobody knows.")
    data = PreferenceDataModule(
        data=[{"prompt": TURNS.messages, "chosen": [TURNS.response], "rejected": [rejected]}],
        tokenizer=str(folder / "reward"),
        batch_size=1,
        loading=LoadingConfig(cache=False),
    )
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch.chosen_ids[0][batch.chosen_mask[0]].tolist() == ids_of(tokenizer, [*TURNS.messages, TURNS.response])
    assert batch.rejected_ids[0][batch.rejected_mask[0]].tolist() == ids_of(tokenizer, [*TURNS.messages, rejected])


def test_a_reward_model_scores_what_transformers_writes(folder: Path) -> None:
    tokenizer = tokenizer_in(folder / "policy")  # the same in both
    reward = ClassifierReward(str(folder / "reward"))
    reward.load(CPU)
    prompts, responses, expected = [], [], []
    for name in ("one turn", "turns", "other characters"):
        dialogue = DIALOGUES[name]
        text = tokenizer.apply_chat_template(dialogue.messages, tokenize=False, add_generation_prompt=True)
        prompts.append(Prompt(text, Conversation(dialogue.messages)))
        responses.append(dialogue.response["content"])
        expected.append(plain_score(folder / "reward", ids_of(tokenizer, [*dialogue.messages, dialogue.response])))
    assert len(set(expected)) == 3
    assert reward.score(prompts, responses, [{}, {}, {}]).tolist() == pytest.approx(expected, abs=1e-4)


class Outputs(Callback):
    """Keeps what the steps returned."""

    def __init__(self) -> None:
        self.steps: list[StepOutput] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(outputs)


def test_a_step_trains_what_was_drawn_and_scores_what_was_written(folder: Path, tmp_path: Path) -> None:
    """Random responses hold everything: cut characters, special tokens, words of all languages."""
    tokenizer = tokenizer_in(folder / "policy")
    rows = [{"prompt": TURNS.messages}, {"prompt": [user("Hello?")]}]
    data = PromptDataModule(
        data=rows,
        tokenizer=str(folder / "policy"),
        batch_size=2,
        micro_batch_size=1,
        loading=LoadingConfig(cache=False),
    )
    reward, outputs = ClassifierReward(str(folder / "reward")), Outputs()
    module = remax_module(
        str(folder / "policy"),
        str(folder / "policy"),
        reward=reward,
        sampling=SamplingConfig(max_response_length=8, num_samples=2),
        loss=LossConfig("clipped", old_log_probs="rollout"),
    )
    torch.manual_seed(0)
    make_trainer(tmp_path, [outputs], max_steps=2).fit(module, data)
    assert len(outputs.steps) == 2
    for step in outputs.steps:
        rollout = step["rollout"]
        (messages,) = [row["prompt"] for row in rollout.prompt.rows]
        prompt_ids = rollout.prompt.prompt_ids[0][rollout.prompt.prompt_mask[0]].tolist()
        assert prompt_ids == ids_of(tokenizer, messages, add_generation_prompt=True)
        assert int(rollout.sampled.response_ids.max()) < len(tokenizer)
        for text, score in zip(rollout.sampled.texts, rollout.reward.tolist(), strict=True):
            written = ids_of(tokenizer, [*messages, assistant(text)])
            assert score == pytest.approx(plain_score(folder / "reward", written), abs=1e-4)
    first = outputs.steps[0]["rollout"]
    assert first.log_probs is not None
    assert first.reference_log_probs is not None
    mask = first.sampled.response_mask
    assert (first.log_probs - first.reference_log_probs)[mask].abs().max() < 1e-4
