"""A small healthy run for `remax doctor`, ways to make it ill, and what the command says of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tiny_config
from helpers.cli import Outcome, changed, in_folder, remax, write_config
from helpers.reward_models import CHAT, save_classifier
from helpers.training import save_policy, write_rows

from remax_lightning.data import PromptDataModule
from remax_lightning.rewards import Reward
from remax_lightning.rollout import GenerationOutput, GenerationRequest, PairedEngine
from remax_lightning.tools.doctor import CHECKS, DoctorContext, Finding, load_context
from remax_lightning.tools.doctor.command import run_check
from remax_lightning.types import PromptBatch

ENDS = (2, *range(21, 47))
"""EOS and the small letters: none of them is in the prompts, and a random policy soon writes one."""
TURNS = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
"""A chat template that ends every turn with EOS."""
PROMPTS = [f"{n}+{7 * n}=" for n in range(1, 25)]


def healthy(folder: Path, **policy: Any) -> dict[str, Any]:
    """The configuration of a run that nothing is wrong with; `policy` are options of `save_policy`."""
    path = save_policy(folder / "policy", **({"ends": ENDS} | policy))
    return {
        "trainer": {"accelerator": "cpu", "devices": 1},
        "model": {
            "class_path": "ReMaxModule",
            "init_args": {
                "policy": {"path": path},
                "reference": {"path": path},
                "reward": {"class_path": "helpers.training.CharacterReward"},
                "sampling": {"max_response_length": 24, "num_samples": 2},
            },
        },
        "data": {
            "class_path": "PromptDataModule",
            "init_args": {
                "path": write_rows(folder / "rows.jsonl", ({"prompt": prompt} for prompt in PROMPTS)),
                "val_size": 4,
                "batch_size": 8,
                "max_prompt_length": 48,
            },
        },
    }


def with_reward_model(config: dict[str, Any], folder: Path, **options: Any) -> dict[str, Any]:
    """The same with a reward model."""
    tokenizer = options.pop("tokenizer", None) or make_tokenizer(chat_template=CHAT)
    path = save_classifier(folder / "reward", tiny_config("llama"), tokenizer)
    reward = {"class_path": "ClassifierReward", "init_args": {"path": path, **options}}
    return changed(config, model__init_args__reward=reward)


def supervised(folder: Path, **policy: Any) -> dict[str, Any]:
    """A healthy run of the first stage."""
    config = healthy(folder, **policy)
    rows = [{"prompt": prompt, "response": prompt[::-1]} for prompt in PROMPTS]
    init_args = config["data"]["init_args"] | {"path": write_rows(folder / "pairs.jsonl", rows)}
    model = {"class_path": "SFTModule", "init_args": {"policy": config["model"]["init_args"]["policy"]}}
    return config | {"model": model, "data": {"class_path": "SFTDataModule", "init_args": init_args}}


def preferred(folder: Path, **policy: Any) -> dict[str, Any]:
    """A healthy run of the second stage."""
    config = healthy(folder, **policy)
    rows = [{"prompt": prompt, "chosen": prompt[::-1], "rejected": "no"} for prompt in PROMPTS]
    init_args = config["data"]["init_args"] | {"path": write_rows(folder / "pairs.jsonl", rows), "max_length": 64}
    model = {"class_path": "RewardModelModule", "init_args": {"reward_model": config["model"]["init_args"]["policy"]}}
    return config | {"model": model, "data": {"class_path": "PreferenceDataModule", "init_args": init_args}}


def loaded(folder: Path, config: dict[str, Any], **values: Any) -> DoctorContext:
    """What `remax doctor` examines, loaded; `values` change keys of `model` and `data` by dotted name."""
    path = write_config(folder / "run.yaml", changed(config, **values))
    context = load_context(["--config", path], num_prompts=12)
    for check in CHECKS[:3]:
        assert run_check(check, context, set()).status != "fail", run_check(check, context, set()).measured
    return context


def ask(context: DoctorContext, name: str) -> Finding:
    """What a check says of a loaded run as it is now, whatever was asked before."""
    [check] = [each for each in CHECKS if each.name == name]
    fresh = DoctorContext(context.args, context.module, context.data, context.trainer, context.num_prompts)
    fresh.note, fresh.is_spread = context.note, context.is_spread
    return run_check(check, fresh, set())


@contextmanager
def blind_to_padding(model: Any) -> Iterator[None]:
    """Let the model ignore its attention mask inside."""
    body = model.get_decoder()
    forward = type(body).forward

    def ignoring(*args: Any, **options: Any) -> Any:
        given = options.get("attention_mask")
        return forward(body, *args, **options | {"attention_mask": None if given is None else torch.ones_like(given)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body, "forward", ignoring)
        yield


class EosStrippingEngine(PairedEngine):
    """Cuts EOS off the responses, as engines do that hand over text."""

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        found = super().generate(model, request)
        for ids in (found.sampled_ids, found.greedy_ids):
            if ids is not None:
                ids[torch.isin(ids, torch.tensor(request.eos_ids))] = request.pad_id
        return found


class NeverStopsEngine(PairedEngine):
    """Stops nowhere."""

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        return super().generate(model, replace(request, eos_ids=[95]))


class SampledAsGreedyEngine(PairedEngine):
    """Hands sampled responses out for greedy ones."""

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        found = super().generate(model, request)
        return found._replace(greedy_ids=found.sampled_ids[:: request.sampling.num_samples])


class Liar(PairedEngine):
    """Says log-probs of another temperature."""

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        found = super().generate(model, request)
        return found if found.log_probs is None else found._replace(log_probs=found.log_probs / 2)


class Breaker(PairedEngine):
    """Cannot roll out."""

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        raise RuntimeError("the engine is out of order")


class HidesPads(PromptDataModule):
    """Makes the mask of ids, as the paper's code does: with pad = eos it hides an EOS inside a prompt."""

    def _collate(self, num_micro_batches: int) -> Any:
        collate, pad_id = super()._collate(num_micro_batches), self.tokenizer.pad_token_id

        def hiding(items: Any) -> PromptBatch:
            batch: PromptBatch = collate(items)
            return batch._replace(prompt_mask=batch.prompt_ids != pad_id)

        return hiding


class Dice(Reward):
    """Draws its scores."""

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
        return torch.rand(len(responses)).tolist()


class Ranks(Reward):
    """Scores a response by its place among the longest of a batch."""

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
        order = sorted({len(text) for text in responses})
        return [float(order.index(len(text))) for text in responses]


class Places(Reward):
    """Scores a response by its place in the batch."""

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
        return [float(place) for place in range(len(responses))]


class Turns(Reward):
    """Scores a batch that begins with another response than the first one did higher, so that its order shows."""

    def __init__(self) -> None:
        self.first: str | None = None

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
        keys = [f"{prompt}{response}" for prompt, response in zip(prompts, responses, strict=True)]
        if len(keys) > 1 and self.first is None:
            self.first = keys[0]
        turned = len(keys) > 1 and keys[0] != self.first
        return [float(len(key)) + turned for key in keys]


def doctor(
    capsys: pytest.CaptureFixture[str], folder: Path, config: dict[str, Any], *arguments: str
) -> tuple[Outcome, dict[str, dict[str, Any]]]:
    """How the command ended, and its results by the name of the check."""
    with in_folder(folder):
        path = write_config(folder / "run.yaml", config)
        outcome = remax(capsys, "doctor", "--config", path, "--json", "out.json", *arguments)
        results = json.loads((folder / "out.json").read_text())["checks"] if outcome.code < 2 else []
    return outcome, {result["name"]: result for result in results}


def statuses(results: dict[str, dict[str, Any]], *, other_than: str = "pass") -> dict[str, str]:
    return {name: each["status"] for name, each in results.items() if each["status"] != other_than}
