"""Supervised fine-tuning against transformers' own loss, and its validation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import make_tokenizer, tiny_config
from helpers.chat_templates import user, with_turn_token
from helpers.stages import EXAMPLES, sft_data
from helpers.training import distance, fit, make_trainer, save_policy, without_optimizer, write_rows
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from remax_lightning.data import SFTDataModule
from remax_lightning.data.collate import MicroBatchSampler
from remax_lightning.errors import UserError
from remax_lightning.models import ModelConfig, log_probs
from remax_lightning.models.forward import HeadSearch
from remax_lightning.modules import SFTModule
from remax_lightning.rewards import FunctionReward
from remax_lightning.rewards.base import Reward
from remax_lightning.rollout import SamplingConfig
from remax_lightning.types import SupervisedBatch


class Exact(Reward):
    """1 for the response of the row, which it can tell only once it is loaded."""

    def __init__(self) -> None:
        self.loads = 0

    def load(self, device: torch.device) -> None:
        self.loads += 1

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
        return [float(text == row["response"] and self.loads > 0) for text, row in zip(responses, rows, strict=True)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


def sft_module(policy: str, **options: Any) -> SFTModule:
    defaults = {
        "sampling": SamplingConfig(max_response_length=24),
        "optimizer": partial(torch.optim.SGD, lr=1.0),
    }
    return SFTModule(ModelConfig(policy), **(defaults | options))


def cross_entropy(policy: str) -> tuple[Tensor, Any, int]:
    """Mean over all response tokens, end of sequence included, by the labels of transformers; the model; the tokens."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float64), make_tokenizer()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in EXAMPLES:
        prompt = tokenizer(row["prompt"])["input_ids"]
        response = [*tokenizer(row["response"], add_special_tokens=False)["input_ids"], 2]
        labels = torch.tensor([[-100] * len(prompt) + response])
        total = total + model(torch.tensor([prompt + response]), labels=labels).loss * len(response)
        tokens += len(response)
    return total / tokens, model, tokens


@pytest.mark.slow
def test_loss_and_gradient_equal_plain_cross_entropy(policy: str, tmp_path: Path) -> None:
    recorder = fit(sft_module(policy), sft_data(tmp_path, policy), tmp_path)
    expected, model, _ = cross_entropy(policy)
    expected.backward()
    assert without_optimizer(recorder.logged[0]) == {"train/loss": pytest.approx(expected.item(), rel=1e-5)}
    gradient = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert distance(recorder.step(), gradient) < 1e-5


@pytest.mark.slow(0.3)
def test_validation_loss_is_a_mean_over_tokens_whatever_the_batches(policy: str, tmp_path: Path) -> None:
    expected, _, _ = cross_entropy(policy)
    for size in (8, 3):
        trainer = make_trainer(tmp_path, limit_val_batches=1.0)
        (metrics,) = trainer.validate(sft_module(policy), sft_data(tmp_path, policy, batch_size=size), verbose=False)
        assert metrics == {
            "val/loss": pytest.approx(expected.item(), rel=1e-5),
            "val/perplexity": pytest.approx(math.exp(expected.item()), rel=1e-4),
        }


def test_a_loss_too_large_for_its_exponential(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        SFTModule, "_log_probs", lambda self, batch, packing: torch.full(batch.response_ids.shape, -1e4)
    )
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    (metrics,) = trainer.validate(sft_module(policy), sft_data(tmp_path, policy), verbose=False)
    assert metrics == {"val/loss": 1e4, "val/perplexity": math.inf}


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (2, 4), (1, 8)])
def test_the_split_into_micro_batches_leaves_the_step(
    policy: str, tmp_path: Path, batch_size: int, accumulate: int, packing: bool
) -> None:
    """Their responses have 2 to 22 tokens, so a mean of means would be another one."""
    whole = fit(sft_module(policy), sft_data(tmp_path, policy), tmp_path)
    data = sft_data(tmp_path, policy, batch_size=batch_size)
    parts = fit(sft_module(policy, packing=packing), data, tmp_path, accumulate_grad_batches=accumulate)
    assert distance(parts.step(), whole.step()) < 1e-5
    assert parts.logged[0] == pytest.approx(whole.logged[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_size", "batches", "is_cut"), [(2, 1, True), (2, 2, True), (2, 3, False), (4, 2, False)]
)
def test_a_checkpoint_in_the_middle_of_a_step_is_told(
    policy: str, tmp_path: Path, batch_size: int, batches: int, is_cut: bool
) -> None:
    """Of three batches to a step; an epoch of two is a step, too."""

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if arguments[-1] + 1 == batches:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    data = partial(sft_data, tmp_path, policy, batch_size=batch_size)
    fit(sft_module(policy), data(), tmp_path, callbacks=[Save()], accumulate_grad_batches=3)
    trainer = make_trainer(tmp_path, max_steps=2, accumulate_grad_batches=3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(sft_module(policy), data(), ckpt_path=tmp_path / "saved.ckpt")
    cut = [str(each.message) for each in told if "in the middle of an optimizer step" in str(each.message)]
    assert len(cut) == is_cut
    assert all(f"the first {batches} of its 3 batches count for nothing" in text for text in cut)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 3}, {"overfit_batches": 2, "accumulate_grad_batches": 2}]
)
def test_a_step_that_is_not_whole_still_trains(policy: str, tmp_path: Path, options: dict[str, Any]) -> None:
    """Too few rows for a step, or an order of Lightning's own: the tokens of the others are not known."""
    recorder = fit(sft_module(policy), sft_data(tmp_path, policy, batch_size=4), tmp_path, **options)
    assert max(float(value.abs().max()) for value in recorder.step().values()) > 1e-3


# Packing


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_packed_rows_take_the_same_step(tmp_path: Path, family: str) -> None:
    path = save_policy(tmp_path / "policy", family)
    plain = fit(sft_module(path), sft_data(tmp_path, path), tmp_path)
    packed = fit(sft_module(path, packing=True), sft_data(tmp_path, path), tmp_path)
    assert distance(packed.step(), plain.step()) < 1e-5
    assert packed.logged[0] == pytest.approx(plain.logged[0], rel=1e-5)


@pytest.mark.slow(0.3)
def test_packed_rows_without_a_head_that_can_be_read(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fit(sft_module(policy), sft_data(tmp_path, policy), tmp_path)
    monkeypatch.setattr(log_probs, "find_head", lambda model: HeadSearch(None, "it is sharded"))
    packed = fit(sft_module(policy, packing=True), sft_data(tmp_path, policy), tmp_path)
    assert distance(packed.step(), plain.step()) < 1e-5


@pytest.mark.slow(0.3)
def test_a_packed_pass_computes_no_padding(policy: str, tmp_path: Path) -> None:
    widths: list[torch.Size] = []

    class Watch(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.policy.get_input_embeddings().register_forward_pre_hook(self._note)

        def _note(self, module: Any, inputs: Any) -> None:
            if module.training:  # not how the head is looked at, once
                widths.append(inputs[0].shape)

    data = sft_data(tmp_path, policy)
    fit(sft_module(policy, packing=True), data, tmp_path, callbacks=[Watch()])
    (batch,) = list(data.train_dataloader())
    assert widths == [(1, int(batch.prompt_mask.sum() + batch.response_mask.sum()))]


@pytest.mark.slow(0.3)
def test_a_model_whose_examples_would_see_each_other_is_not_packed(tmp_path: Path) -> None:
    """BLOOM takes no positions."""
    from transformers import AutoModelForCausalLM, BloomConfig

    config = BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    make_tokenizer().save_pretrained(tmp_path / "bloom")
    path = str(tmp_path / "bloom")
    with pytest.raises(UserError, match=r"model\.packing must be false for BloomForCausalLM, got true"):
        fit(sft_module(path, packing=True), sft_data(tmp_path, path), tmp_path)
    fit(sft_module(path), sft_data(tmp_path, path), tmp_path)


@pytest.mark.slow(0.3)
def test_padding_of_a_batch_changes_nothing(policy: str, tmp_path: Path) -> None:
    class Wider(SFTDataModule):
        def _collate(self, num_micro_batches: int) -> Any:
            collate = super()._collate(num_micro_batches)

            def wider(items: Any) -> SupervisedBatch:
                batch = collate(items)
                left, right = partial(torch.nn.functional.pad, pad=(5, 0)), partial(torch.nn.functional.pad, pad=(0, 7))
                return batch._replace(
                    prompt_ids=left(batch.prompt_ids, value=3),
                    prompt_mask=left(batch.prompt_mask),
                    response_ids=right(batch.response_ids, value=3),
                    response_mask=right(batch.response_mask),
                )

            return wider

    path = write_rows(tmp_path / "rows.jsonl", EXAMPLES)
    wide = fit(sft_module(policy), Wider(path, policy, batch_size=8, max_prompt_length=64), tmp_path)
    plain = fit(sft_module(policy), sft_data(tmp_path, policy), tmp_path)
    assert distance(wide.step(), plain.step()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_alone_loads_the_reward_once(stage: str, policy: str, tmp_path: Path) -> None:
    reward = Exact()
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    module, data = sft_module(policy, reward=reward), sft_data(tmp_path, policy, batch_size=4)
    for _ in range(2):
        (metrics,) = getattr(trainer, stage)(module, data, verbose=False)
    assert reward.loads == 1
    prefix = "val" if stage == "validate" else "test"
    assert set(metrics) == {f"{prefix}/{name}" for name in ("loss", "perplexity", "reward", "baseline_reward")}
    assert metrics[f"{prefix}/baseline_reward"] == 0.0


@pytest.mark.slow
def test_an_example_that_fills_up_a_rank_counts_once(policy: str, tmp_path: Path) -> None:
    """Of five rows the second of two ranks has two, and one of the first rank again, to have as many batches."""

    class OfBothRanks(SFTDataModule):
        def val_dataloader(self) -> Any:
            examples, batches = cast(Any, self._val), []
            for rank in (0, 1):
                sampler = MicroBatchSampler(5, 2, shuffle=False, drop_last=False, rank=rank, world_size=2)
                rows = [examples[place] for place in sampler.order(0)]
                batches += [rows[start : start + 2] for start in range(0, len(rows), 2)]
            assert sum(map(len, batches)) == 6
            return DataLoader(cast(Any, batches), batch_size=None, collate_fn=self._collate(1))

    path, val = (write_rows(tmp_path / f"{name}.jsonl", EXAMPLES[:5]) for name in ("train", "val"))
    reward = FunctionReward(lambda prompts, responses, rows: [float(len(prompt)) for prompt in prompts])
    found = []
    for kind in (SFTDataModule, OfBothRanks):
        data = kind(path, policy, val_path=val, batch_size=2)
        trainer = make_trainer(tmp_path, limit_val_batches=1.0)
        found += trainer.validate(sft_module(policy, reward=reward), data, verbose=False)
    assert found[1] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.slow
def test_a_tiny_policy_learns_its_rows_by_heart(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    policy = str(tmp_path / "policy")

    class Losses(Callback):
        found: list[float] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
            self.found.append(float(outputs["loss"]))

    torch.manual_seed(0)
    reward = Exact()
    module = SFTModule(
        ModelConfig(policy, from_scratch=True),
        reward=reward,
        sampling=SamplingConfig(max_response_length=24),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
    )
    trainer = make_trainer(
        tmp_path, [Losses()], max_steps=80, max_epochs=80, limit_val_batches=1.0, check_val_every_n_epoch=80
    )
    trainer.fit(module, sft_data(tmp_path, policy))
    assert Losses.found[0] > 3
    assert Losses.found[-1] < 0.05
    assert float(trainer.callback_metrics["val/baseline_reward"]) == 1.0
    assert float(trainer.callback_metrics["val/reward"]) >= 0.75
    assert reward.loads == 1


@pytest.mark.slow(0.3)
def test_tokens_are_counted_in_32_bits_in_bf16_true(policy: str, tmp_path: Path) -> None:
    """289 tokens: in 8 bits of precision they would be 288, and the gradient 0.35 % too large."""
    rows = [{"prompt": "1+1=", "response": "a" * (36 if number == 0 else 35)} for number in range(8)]
    data = SFTDataModule(write_rows(tmp_path / "rows.jsonl", rows), policy, batch_size=8)
    seen = fit(sft_module(policy), data, tmp_path, precision="bf16-true")
    assert float(seen.outputs[0]["loss"]) == pytest.approx(seen.logged[0]["train/loss"], rel=1e-3)


def turn_ending_data(folder: Path, policy: str) -> SFTDataModule:
    """Messages in a template that ends turns with a token that is not EOS, in the policy's tokenizer."""
    with_turn_token().save_pretrained(policy)
    rows = ({"prompt": [user(prompt)], "response": response} for prompt, response in (("1+1", "2"), ("2+2", "4")))
    return SFTDataModule(write_rows(folder / "turns.jsonl", rows), policy, batch_size=2)


def test_a_turn_end_that_ends_no_response_is_refused(tmp_path: Path) -> None:
    path = save_policy(tmp_path / "policy", ends=(2,))
    data = turn_ending_data(tmp_path, path)
    message = r"data\.tokenizer: the chat template ends a turn with '<turn>' \(83\), and responses .* end at '</s>'"
    with pytest.raises(UserError, match=message):
        fit(sft_module(path), data, tmp_path)


@pytest.mark.slow(0.3)
def test_a_turn_end_that_the_policy_names_is_trained(tmp_path: Path) -> None:
    path = save_policy(tmp_path / "policy", ends=(2, 83))
    recorder = fit(sft_module(path), turn_ending_data(tmp_path, path), tmp_path)
    assert len(recorder.outputs) == 1


def test_the_reward_checks_rows_of_validation_only(tmp_path: Path, policy: str) -> None:
    text, number = {"prompt": "2+2=", "response": "four"}, {"prompt": "2+2=", "response": "4"}
    paths = [write_rows(tmp_path / f"{row['response']}.jsonl", [row] * 2) for row in (text, number)]
    reward = FunctionReward("remax_lightning.rewards.verifiers.numeric_answer")
    for train, val in (paths, paths[::-1]):
        module = sft_module(policy, reward=reward)
        module.trainer = make_trainer(tmp_path)
        module.trainer.datamodule = SFTDataModule(train, policy, val, batch_size=2)  # type: ignore[attr-defined]
        module.trainer.datamodule.setup("fit")  # type: ignore[attr-defined]
        if val is paths[1]:
            module.setup("fit")
        else:
            with pytest.raises(UserError, match=r"got 'four' for .*four.jsonl, line 1;"):
                module.setup("fit")
