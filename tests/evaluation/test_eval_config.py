"""What an evaluation measures beside the policy's own responses, against values made by hand or by transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from helpers.training import PROMPTS, Recorder, make_trainer, prompt_data, remax_module, save_policy, write_rows
from lightning.pytorch import Callback

from remax_lightning.config import EvalConfig
from remax_lightning.data import PromptDataModule
from remax_lightning.evaluation.evaluator import split_text
from remax_lightning.files import PromptRecord
from remax_lightning.models import LoRAConfig, ModelConfig
from remax_lightning.modules import AdvantageConfig
from remax_lightning.rewards.base import Reward
from remax_lightning.rollout import (
    AutoEngine,
    GenerationOutput,
    GenerationRequest,
    HuggingFaceEngine,
    PairedEngine,
    SamplingConfig,
)
from remax_lightning.rollout.engines import clone_engine
from remax_lightning.types import PromptBatch

ALL = EvalConfig(win_rate_reference=True, win_rate_chosen=True, perplexity=True)
COLD = SamplingConfig(max_response_length=8, temperature=1e-4)
"""Sampling that is greedy decoding, but for ties."""
CHOSEN = ["46", "", "yes, hello there to you", "2", "the end of the alphabet", "x", "answer", "James Bond"]


class Letters(Reward):
    """How many letters a response has."""

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
        return [float(sum(each.isalpha() for each in response)) for response in responses]


class Scripted:
    """Writes `z` as often as the model's script says, for each prompt and sample in turn."""

    def __init__(self) -> None:
        self.scripts: dict[int, list[list[int]]] = {}

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        script = self.scripts[id(model)][: len(request.prompt_ids)]
        z = make_tokenizer().convert_tokens_to_ids("z")
        rows = [[z] * count + [2] * (5 - count) for counts in script for count in counts]
        greedy = torch.tensor([[z] * 2 + [2] * 3] * len(request.prompt_ids))
        return GenerationOutput(torch.tensor(rows), greedy if request.greedy else None)


class Start(Callback):
    """Runs a function when everything is loaded."""

    def __init__(self, what: Any) -> None:
        self.what = what

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.what(pl_module)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return save_policy(folder / "policy"), save_policy(folder / "reference", seed=3)


def data_of(folder: Path, policy: str, rows: Sequence[dict[str, Any]], batch_size: int = 8) -> PromptDataModule:
    path = write_rows(folder / "rows.jsonl", rows)
    return PromptDataModule(path, policy, val_path=path, batch_size=batch_size, max_prompt_length=64)


def rows_with(chosen: Sequence[Any] = CHOSEN) -> list[dict[str, Any]]:
    rows = [{"prompt": prompt, "chosen": text} for prompt, text in zip(PROMPTS, chosen, strict=True)]
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def measured(
    module: Any, data: PromptDataModule, folder: Path, measures: EvalConfig = ALL, callbacks: Sequence[Callback] = ()
) -> tuple[list[PromptRecord], dict[str, float]]:
    recorder = Recorder()
    module.evaluator.config = measures
    torch.manual_seed(0)
    trainer = make_trainer(folder, [recorder, *callbacks], limit_val_batches=1.0)
    (metrics,) = trainer.validate(module, data, verbose=False)
    return [record for output in recorder.validations for record in output["records"]], metrics


# Win rates


@pytest.mark.slow
def test_win_rates_are_those_of_the_rewards(folders: tuple[str, str], tmp_path: Path) -> None:
    engine = Scripted()
    module = remax_module(*folders, reward=Letters(), rollout=engine, sampling=SamplingConfig(5, num_samples=2))
    own, theirs = [[3, 1], [0, 4], [2, 2]], [[1, 1], [4, 4], [2, 3]]

    def script(loaded: Any) -> None:
        engine.scripts = {id(loaded.policy): own, id(loaded.reference): theirs}

    rows = [{"prompt": "a", "chosen": "ab"}, {"prompt": "b", "chosen": "1"}, {"prompt": "c"}]
    found, metrics = measured(module, data_of(tmp_path, folders[0], rows), tmp_path, callbacks=[Start(script)])
    assert [record.rewards["sampled"] for record in found] == own
    assert [record.rewards["reference"] for record in found] == theirs
    assert [record.responses["reference"][0] for record in found] == ["z", "zzzz", "zz"]
    assert [record.responses.get("chosen") for record in found] == [["ab"], ["1"], None]
    # 3 and 1 against 1 and 1: two won, two ties; 0 and 4 against 4 and 4: two lost, two ties; two ties, two lost.
    assert metrics["val/win_rate_reference"] == pytest.approx((0.75 + 0.25 + 0.25) / 3)
    # 3 and 1 against 2; 0 and 4 against 0; the third prompt has no chosen response.
    assert metrics["val/win_rate_chosen"] == pytest.approx((0.5 + 0.75) / 2)
    assert metrics["val/reference_reward"] == pytest.approx(15 / 6)
    assert metrics["val/chosen_reward"] == pytest.approx(1.0)
    assert metrics["val/reward"] == pytest.approx(2.0)


class PerToken(Reward):
    """0.5 for every token."""

    def score(self, prompts: Sequence[str], responses: Sequence[Any], rows: Sequence[dict[str, Any]]) -> Any:
        return [[0.5] * len(response.token_ids) for response in responses]


@pytest.mark.slow
def test_rewards_of_tokens_count_as_their_sums(folders: tuple[str, str], tmp_path: Path) -> None:
    """Of the data set's responses too, whose tokens are those of their text: one for each letter."""
    module = remax_module(*folders, reward=PerToken(), sampling=SamplingConfig(5))
    rows = [{"prompt": "a", "chosen": "abc"}, {"prompt": "b", "chosen": "1"}]
    found, metrics = measured(module, data_of(tmp_path, folders[0], rows), tmp_path)
    assert metrics["val/chosen_reward"] == pytest.approx((1.5 + 0.5) / 2)
    assert metrics["val/reward"] == pytest.approx(metrics["val/response_length"] / 2)
    assert metrics["val/advantage"] != 0
    assert len(found) == 2


@pytest.mark.slow(0.3)
def test_the_penalty_of_truncation_is_the_references_too(folders: tuple[str, str], tmp_path: Path) -> None:
    engine = Scripted()
    module = remax_module(
        *folders, reward=Letters(), rollout=engine, sampling=SamplingConfig(5),
        advantage=AdvantageConfig(overlong="penalize", truncation_penalty=10.0),
    )  # fmt: skip

    def script(loaded: Any) -> None:
        engine.scripts = {id(loaded.policy): [[4]], id(loaded.reference): [[5]]}

    data = data_of(tmp_path, folders[0], [{"prompt": "a", "chosen": "abcdefghij"}])
    (record,), _ = measured(module, data, tmp_path, callbacks=[Start(script)])
    assert record.rewards == {"sampled": [4.0], "greedy": [2.0], "reference": [-5.0], "chosen": [10.0]}


def greedy_texts(model: Any, prompts: Sequence[str]) -> list[str]:
    """What transformers decodes greedily, a prompt at a time."""
    tokenizer, texts = make_tokenizer(), []
    for prompt in prompts:
        ids = torch.tensor([[1, *tokenizer(prompt, add_special_tokens=False).input_ids]])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        texts.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["replicate", "cpu"])
@pytest.mark.parametrize("engine", [AutoEngine, HuggingFaceEngine])
def test_the_reference_writes_its_own_responses(
    engine: Any, placement: Any, folders: tuple[str, str], tmp_path: Path
) -> None:
    reference = ModelConfig(folders[1], placement=placement)
    module = remax_module(folders[0], reference, sampling=COLD, rollout=engine())
    found, _ = measured(module, prompt_data(tmp_path, folders[0], batch_size=3), tmp_path)
    expected = [greedy_texts(ModelConfig(path).load("model.policy").eval(), PROMPTS) for path in folders]
    assert [record.responses["sampled"][0] for record in found] == expected[0]
    assert [record.responses["reference"][0] for record in found] == expected[1]
    assert expected[0] != expected[1]


@pytest.mark.slow
def test_an_adapted_policy_is_compared_with_its_start(folders: tuple[str, str], tmp_path: Path) -> None:
    module = remax_module(ModelConfig(folders[0], lora=LoRAConfig(r=4)), sampling=COLD, kl_coef=0.05)

    def move(loaded: Any) -> None:
        with torch.no_grad():
            for value in loaded.policy.parameters():
                if value.requires_grad:
                    value.copy_(0.5 * torch.randn(value.shape, generator=torch.Generator().manual_seed(7)))

    found, metrics = measured(module, data_of(tmp_path, folders[0], rows_with()), tmp_path, callbacks=[Start(move)])
    base = ModelConfig(folders[0]).load("model.policy").eval()
    assert [record.responses["reference"][0] for record in found] == greedy_texts(base, PROMPTS)
    assert [record.responses["sampled"][0] for record in found] != greedy_texts(base, PROMPTS)
    nats, tokens = likelihoods(base, CHOSEN)
    assert metrics["val/reference_perplexity"] == pytest.approx(math.exp(sum(nats) / sum(tokens)), rel=1e-5)
    assert abs(metrics["val/perplexity"] / metrics["val/reference_perplexity"] - 1) > 1e-4


class Noted(PairedEngine):
    """Notes what seeds its rollouts have."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds: list[int] = []

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        self.seeds.append(request.generator.initial_seed())
        return super().generate(model, request)


@pytest.mark.slow
def test_policy_and_reference_draw_independently(folders: tuple[str, str], tmp_path: Path) -> None:
    engine, data = Noted(), prompt_data(tmp_path, folders[0], batch_size=3)
    found, _ = measured(remax_module(folders[0], folders[0], rollout=engine), data, tmp_path)
    assert len(set(engine.seeds)) == len(engine.seeds) == 2 * 3
    assert [record.responses["sampled"] for record in found] != [record.responses["reference"] for record in found]


@pytest.mark.slow
def test_the_reference_leaves_the_policys_figures_alone(folders: tuple[str, str], tmp_path: Path) -> None:
    found, metrics = measured(remax_module(*folders), prompt_data(tmp_path, folders[0]), tmp_path)
    again, _ = measured(remax_module(*folders), prompt_data(tmp_path, folders[0]), tmp_path)
    assert again == found
    alone, without = measured(remax_module(*folders), prompt_data(tmp_path, folders[0]), tmp_path, EvalConfig())
    assert [each.responses["sampled"] for each in alone] == [each.responses["sampled"] for each in found]
    assert {name: metrics[name] for name in without} == without


def test_an_engine_is_not_shared_by_two_models() -> None:
    for engine in (AutoEngine(), PairedEngine(cuda_graphs=False, keep_cache=False)):
        other = clone_engine(engine)
        assert type(other) is type(engine)
        assert other is not engine
    assert vars(clone_engine(PairedEngine(cuda_graphs=False, keep_cache=False))) == vars(PairedEngine(False, False))
    own = Scripted()
    assert clone_engine(own) is own


# Perplexity


def likelihoods(model: Any, texts: Sequence[str], cut: int = 10**6) -> tuple[list[float], list[int]]:
    """Nats and tokens of responses to `PROMPTS`, a token at a time in float64; an empty one has none."""
    tokenizer, model = make_tokenizer(), model.double()
    nats, tokens = [], []
    for prompt, text in zip(PROMPTS, texts, strict=True):
        before = [1, *tokenizer(prompt, add_special_tokens=False).input_ids]
        response = [*tokenizer(text, add_special_tokens=False).input_ids, 2][:cut] if text else []
        total = 0.0
        for i, token in enumerate(response):
            with torch.no_grad():
                logits = model(torch.tensor([before + response[:i]])).logits[0, -1]
            total += math.log(float(logits.exp().sum())) - float(logits[token])
        nats.append(total)
        tokens.append(len(response))
    return nats, tokens


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [8, 3, 1])
@pytest.mark.parametrize("cut", [1024, 4])
def test_the_perplexity_is_that_of_responses_and_their_ends(
    cut: int, batch_size: int, folders: tuple[str, str], tmp_path: Path
) -> None:
    data = data_of(tmp_path, folders[0], rows_with(), batch_size)
    measures = EvalConfig(perplexity=True, max_length=cut)
    found, metrics = measured(remax_module(*folders), data, tmp_path, measures)
    for name, path in zip(("perplexity", "reference_perplexity"), folders, strict=True):
        nats, tokens = likelihoods(ModelConfig(path).load("model.policy").eval(), CHOSEN, cut)
        sums = [record.sums.get(name, (0.0, 0.0)) for record in found]
        assert [count for _, count in sums] == tokens
        assert [total for total, _ in sums] == pytest.approx(nats, rel=1e-5)
        assert metrics[f"val/{name}"] == pytest.approx(math.exp(sum(nats) / sum(tokens)), rel=1e-5)


@pytest.mark.slow(0.3)
def test_responses_are_text_or_end_messages(folders: tuple[str, str], tmp_path: Path) -> None:
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "46"}]
    forms = [said, "46", said[:1], None, 7, [], "  ", [{"role": "assistant", "content": 3}]]
    rows = [{"prompt": "12+34=", "reply": form} for form in forms]
    measures = EvalConfig(perplexity=True, win_rate_chosen=True, response_column="reply")
    found, _ = measured(remax_module(*folders), data_of(tmp_path, folders[0], rows), tmp_path, measures)
    assert [record.responses.get("chosen") for record in found] == [["46"], ["46"], *[None] * 6]
    assert found[0].sums["perplexity"] == pytest.approx(found[1].sums["perplexity"])
    assert all("perplexity" not in record.sums for record in found[2:])


@pytest.mark.slow(0.3)
def test_pairs_of_transcripts_have_their_responses(folders: tuple[str, str], tmp_path: Path) -> None:
    start = "\n\nHuman: hi\n\nAssistant:"
    data = data_of(tmp_path, folders[0], [{"chosen": f"{start} hello", "rejected": f"{start} no"}])
    (record,), _ = measured(remax_module(*folders), data, tmp_path)
    assert (record.prompt, record.responses["chosen"]) == (start, [" hello"])


@pytest.mark.slow(0.3)
def test_without_such_responses_nothing_is_measured_of_them(folders: tuple[str, str], tmp_path: Path) -> None:
    found, metrics = measured(remax_module(folders[0]), prompt_data(tmp_path, folders[0]), tmp_path)
    assert not {"perplexity", "chosen_reward", "reference_reward", "kl"} & {
        name for each in found for name in each.sums
    }
    assert not any("win_rate" in name or "perplexity" in name for name in metrics)


@pytest.mark.slow(0.3)
def test_long_responses_are_cut_to_the_positions(folders: tuple[str, str], tmp_path: Path) -> None:
    """The tiny policy has 256 of them."""
    data = data_of(tmp_path, folders[0], [{"prompt": "abcd", "chosen": "x" * 400}])
    (record,), _ = measured(remax_module(*folders), data, tmp_path, EvalConfig(perplexity=True))
    assert record.sums["perplexity"][1] == 256 - 1 - 4  # one token begins every text


@pytest.mark.parametrize("bos", [True, False])
def test_every_token_of_a_text_is_predicted_once(bos: bool, folders: tuple[str, str]) -> None:
    tokenizer, policy = make_tokenizer(), ModelConfig(folders[0]).load("model.policy")
    if not bos:
        tokenizer.bos_token = None
    text = "0123456789abc"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = split_text(tokenizer, policy, text, 5)
    assert [token for _, piece in pieces for token in piece] == (ids if bos else ids[1:])
    assert [len(piece) for _, piece in pieces] == ([5, 5, 3] if bos else [5, 5, 2])
    before = [[1]] * 3 if bos else [[ids[0]], [ids[5]], [ids[10]]]
    assert [prompt for prompt, _ in pieces] == before


# Prompts


@pytest.mark.slow(0.3)
def test_prompts_carry_their_places(folders: tuple[str, str], tmp_path: Path) -> None:
    rows = [{"prompt": prompt} for prompt in ("a", "x" * 100, "b", "a")]  # the second is too long
    found, metrics = measured(remax_module(*folders), data_of(tmp_path, folders[0], rows), tmp_path)
    assert [(record.number, record.prompt) for record in found] == [(0, "a"), (2, "b"), (3, "a")]
    assert metrics["val/reward"] == pytest.approx(sum(record.rewards["sampled"][0] for record in found) / 3)


@pytest.mark.slow(0.3)
def test_a_users_batches_need_no_places(folders: tuple[str, str], tmp_path: Path) -> None:
    class Plain(PromptDataModule):
        def on_after_batch_transfer(self, batch: PromptBatch, dataloader_idx: int) -> PromptBatch:
            return batch._replace(indices=None)

    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}] * 4)
    data = Plain(path, folders[0], val_path=path, batch_size=2, max_prompt_length=64)
    found, metrics = measured(remax_module(*folders), data, tmp_path)
    assert [record.number for record in found] == [None] * 4
    assert metrics["val/reward"] == pytest.approx(sum(record.rewards["sampled"][0] for record in found) / 4)
