"""The reward model's loss, gradient, figures and export, against one conversation after the other in float64."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tiny_config
from helpers.chat_templates import assistant, user
from helpers.reward_models import body_of, encoder_config, opts_tokenizer, save_classifier, save_deepspeed_chat
from helpers.stages import PAIRS, pair_data
from helpers.training import distance, make_trainer, without_optimizer, write_rows
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from oracles import preferences
from safetensors.torch import load_file
from torch import Tensor

from remax_lightning.callbacks import ExportPolicy
from remax_lightning.data import LoadingConfig, PreferenceDataModule
from remax_lightning.errors import UserError
from remax_lightning.models import LoRAConfig, ModelConfig
from remax_lightning.modules import RewardModelModule
from remax_lightning.rewards import ClassifierReward
from remax_lightning.rewards.loading import load_reward_model
from remax_lightning.types import PreferenceBatch

GAPS = [float(row["gap"]) for row in PAIRS]
FAMILIES = ("llama", "opt", "gpt2", "qwen2")
CPU = torch.device("cpu")


def config_of(family: str) -> Any:
    from transformers import BloomConfig, FalconConfig, GPTNeoXConfig

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "vocab_size": 96, "hidden_size": 32}
    small = {"num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "gpt_neox":
        return GPTNeoXConfig(**ids, **small, intermediate_size=64, max_position_embeddings=256)
    if family == "falcon":
        return FalconConfig(**ids, **small, bias=True)
    if family == "bloom":
        return BloomConfig(**ids, n_layer=2, n_head=2)
    return encoder_config(family) if family == "bert" else tiny_config(family)


def save_start(folder: Path, family: str = "llama", **options: Any) -> str:
    """A classifier with one label and its tokenizer, whose scores are far apart."""
    return save_classifier(folder, config_of(family), make_tokenizer(**options))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_start(tmp_path_factory.mktemp("start"))


def reward_module(path: str, **options: Any) -> RewardModelModule:
    """Plain gradient descent of rate 1, so that a step's gradient is weights before minus after."""
    defaults = {"optimizer": partial(torch.optim.SGD, lr=1.0)}
    return RewardModelModule(ModelConfig(path), **(defaults | options))


class Recorder(Callback):
    """Keeps the weights around every optimizer step, and what was logged."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights.append(weights_of(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        if trainer.global_step == len(self.weights):
            self.weights.append(weights_of(pl_module))
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def step(self, number: int = 0) -> dict[str, Tensor]:
        before, after = self.weights[number], self.weights[number + 1]
        return {name: before[name] - after[name] for name in before}


def weights_of(module: LightningModule) -> dict[str, Tensor]:
    model: Any = module.reward_model
    return {name: copy.deepcopy(value.detach()) for name, value in model.named_parameters()}


def train(module: RewardModelModule, data: Any, folder: Path, seed: int = 0, **options: Any) -> Recorder:
    recorder = Recorder()
    torch.manual_seed(seed)
    make_trainer(folder, [recorder, *options.pop("callbacks", ())], **options).fit(module, data)
    return recorder


def texts(side: str) -> list[str]:
    return [f"{row['prompt']}{row[side]}</s>" for row in PAIRS]


def scores_by_hand(model: Any, tokenizer: Any, side: str) -> Tensor:
    """Scores of one conversation after the other, without padding: head times last (BERT: the model's own)."""
    found = []
    for text in texts(side):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        if hasattr(model, "score"):
            hidden = model.base_model(ids).last_hidden_state[0, -1]
            found.append((hidden * model.score.weight[0]).sum())
        else:
            found.append(model(ids).logits[0, 0])
    return torch.stack(found)


def loaded(path: str | Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64, num_labels=1).eval()


def both_sides(path: str | Path, model: Any = None) -> tuple[Tensor, Tensor]:
    """Scores by hand of chosen and rejected responses; Qwen2 reads a tokenizer in a way of its own."""
    from transformers import AutoTokenizer

    model, tokenizer = model or loaded(path), AutoTokenizer.from_pretrained(path)
    return scores_by_hand(model, tokenizer, "chosen"), scores_by_hand(model, tokenizer, "rejected")


# The loss and its gradient


@pytest.mark.slow
@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "bert"])
def test_loss_and_gradient_are_those_of_unpadded_conversations(
    tmp_path: Path, family: str, pad_is_eos: bool, recwarn: pytest.WarningsRecorder
) -> None:
    path = save_start(tmp_path / "start", family, pad_is_eos=pad_is_eos)
    module = reward_module(path, centering_coef=0.1, margin=0.5)
    recorder = train(module, pair_data(tmp_path, path), tmp_path)
    model = loaded(path)
    chosen, rejected = both_sides(path, model)
    expected = preferences.pair_losses(chosen, rejected, [gap + 0.5 for gap in GAPS], 0.1)
    expected.backward()
    gradient = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert distance(recorder.step(), gradient) < 2e-5
    right = preferences.accuracy(chosen.tolist(), rejected.tolist())
    margin = float((chosen - rejected).mean())
    assert without_optimizer(recorder.logged[0]) == {
        "train/loss": pytest.approx(expected.item(), rel=1e-5),
        "train/accuracy": pytest.approx(right),
        "train/margin": pytest.approx(margin, rel=1e-4),
    }
    told = [str(each.message) for each in recwarn if "pads with its end-of-sequence token" in str(each.message)]
    assert bool(told) == (pad_is_eos and family != "bert")


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (2, 4), (1, 8)])
def test_the_split_into_micro_batches_leaves_the_step(
    start: str, tmp_path: Path, batch_size: int, accumulate: int
) -> None:
    whole = train(reward_module(start), pair_data(tmp_path, start), tmp_path)
    data = pair_data(tmp_path, start, batch_size=batch_size)
    parts = train(reward_module(start), data, tmp_path, accumulate_grad_batches=accumulate)
    assert distance(parts.step(), whole.step()) < 1e-5
    assert parts.logged[0] == pytest.approx(whole.logged[0], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_padding_on_either_side_changes_nothing(tmp_path: Path, family: str) -> None:
    class Wider(PreferenceDataModule):
        def _collate(self, num_micro_batches: int) -> Any:
            collate = super()._collate(num_micro_batches)

            def wider(items: Any) -> PreferenceBatch:
                batch = collate(items)
                sides = {"chosen": (5, 3), "rejected": (0, 9)}
                changed = {}
                for side, pad in sides.items():
                    ids, mask = getattr(batch, f"{side}_ids"), getattr(batch, f"{side}_mask")
                    changed[f"{side}_ids"] = torch.nn.functional.pad(ids, pad, value=7)
                    changed[f"{side}_mask"] = torch.nn.functional.pad(mask, pad, value=False)
                return batch._replace(**changed)

            return wider

    path = save_start(tmp_path / "start", family)
    plain = train(reward_module(path), pair_data(tmp_path, path), tmp_path)
    wide = train(reward_module(path), pair_data(tmp_path, path, Wider), tmp_path)
    assert distance(wide.step(), plain.step()) < 1e-5
    assert wide.logged[0] == pytest.approx(plain.logged[0], abs=1e-5)


@pytest.mark.slow(0.3)
def test_gradient_checkpointing_leaves_the_step(start: str, tmp_path: Path) -> None:
    plain = train(reward_module(start), pair_data(tmp_path, start), tmp_path)
    module = RewardModelModule(
        ModelConfig(start, gradient_checkpointing=True), optimizer=partial(torch.optim.SGD, lr=1.0)
    )
    assert distance(train(module, pair_data(tmp_path, start), tmp_path).step(), plain.step()) < 1e-5
    assert module.reward_model.is_gradient_checkpointing


# Where it starts


@pytest.mark.slow
def test_a_language_model_gets_the_same_new_head_in_every_run_of_a_seed(policy_path: Path, tmp_path: Path) -> None:
    def heads(seed: int) -> Tensor:
        recorder = train(reward_module(str(policy_path)), pair_data(tmp_path, str(policy_path)), tmp_path, seed)
        weights = recorder.weights[0]
        body = load_file(policy_path / "model.safetensors")
        assert all(torch.equal(weights[name], value) for name, value in body.items() if name != "lm_head.weight")
        return weights["score.weight"]

    first = heads(0)
    assert torch.equal(first, heads(0))
    assert not torch.equal(first, heads(1))
    assert float(first.std()) == pytest.approx(1 / math.sqrt(33), rel=0.4)


def test_a_trained_head_is_kept(start: str, tmp_path: Path) -> None:
    recorder = train(reward_module(start), pair_data(tmp_path, start), tmp_path)
    assert torch.equal(
        recorder.weights[0]["score.weight"], load_file(Path(start) / "model.safetensors")["score.weight"]
    )


@pytest.mark.slow(0.3)
def test_from_scratch(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path / "start")
    make_tokenizer().save_pretrained(tmp_path / "start")
    path = str(tmp_path / "start")
    module = RewardModelModule(ModelConfig(path, from_scratch=True), optimizer=partial(torch.optim.SGD, lr=1.0))
    recorder = train(module, pair_data(tmp_path, path), tmp_path)
    assert recorder.weights[0]["score.weight"].shape == (1, 32)


# Validation


def fitted(path: str, folder: Path, rate: float = 0.0, **options: Any) -> tuple[RewardModelModule, Trainer]:
    """A run of two steps that ends with a validation and an export to `folder / model / last`."""
    module = reward_module(path, optimizer=partial(torch.optim.SGD, lr=rate), **options.pop("module", {}))
    data = pair_data(folder, path, **options.pop("data", {}))
    export = ExportPolicy(str(folder / "model"), monitor="val/accuracy")
    defaults = {"max_steps": 2, "max_epochs": 2, "limit_val_batches": 1.0}
    trainer = make_trainer(folder, [export], **(defaults | options))
    torch.manual_seed(0)
    trainer.fit(module, data)
    return module, trainer


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("batch_size", [8, 3])
def test_figures_are_those_of_the_pairs(start: str, tmp_path: Path, batch_size: int, stage: str) -> None:
    module = reward_module(start, centering_coef=0.2)
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    (metrics,) = getattr(trainer, stage)(module, pair_data(tmp_path, start, batch_size=batch_size), verbose=False)
    with torch.no_grad():
        chosen, rejected = both_sides(start)
        loss = float(preferences.pair_losses(chosen, rejected, GAPS, 0.2))
    first, second = chosen.tolist(), rejected.tolist()
    mean, std = preferences.moments(first + second)
    prefix = "val" if stage == "validate" else "test"
    assert metrics == {
        f"{prefix}/loss": pytest.approx(loss, rel=1e-4),
        f"{prefix}/accuracy": pytest.approx(preferences.accuracy(first, second)),
        f"{prefix}/calibration_error": pytest.approx(preferences.calibration_error(first, second), abs=1e-4),
        f"{prefix}/margin": pytest.approx(float((chosen - rejected).mean()), rel=1e-4),
        f"{prefix}/reward_mean": pytest.approx(mean, abs=1e-4),
        f"{prefix}/reward_std": pytest.approx(std, rel=1e-4),
    }


def test_calibration_error_of_many_pairs() -> None:
    from remax_lightning.training.metrics import PairScores

    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 400, generator=generator, dtype=torch.float64)
    figures = PairScores(3 * chosen, 2 * rejected, torch.zeros(400)).figures(0.0)
    expected = preferences.calibration_error((3 * chosen).tolist(), (2 * rejected).tolist())
    assert expected > 0.1
    assert figures["calibration_error"] == pytest.approx(expected, abs=1e-6)


# The export


def rewards_of(path: Path, **options: Any) -> tuple[Tensor, ClassifierReward]:
    """What `ClassifierReward` gives the validation set's responses: chosen and rejected ones."""
    reward = ClassifierReward(str(path), **options)
    reward.load(CPU)
    prompts = [str(row["prompt"]) for row in PAIRS] * 2
    responses = [str(row[side]) for side in ("chosen", "rejected") for row in PAIRS]
    scores = reward.score(prompts, responses, [{} for _ in prompts])
    assert isinstance(scores, Tensor)
    return scores, reward


@torch.no_grad()
def transformers_alone(path: Path) -> Tensor:
    """What a padded batch gets from transformers' own classifier."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    encoded = tokenizer(texts("chosen") + texts("rejected"), padding=True, return_tensors="pt")
    return model(encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits[:, 0]


def standardized(scores: Tensor) -> bool:
    return abs(float(scores.mean())) < 1e-4 and abs(float(scores.std(correction=0)) - 1) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, "gpt_neox", "falcon", "bloom", "bert"])
def test_the_exported_model_scores_the_validation_set_with_mean_0_and_variance_1(tmp_path: Path, family: str) -> None:
    path = save_start(tmp_path / "start", family)
    module, _ = fitted(path, tmp_path)
    raw = torch.cat(both_sides(path)).detach()
    mean, std = preferences.moments(raw.tolist())
    assert abs(mean) > 0.005
    assert abs(std - 1) > 0.05
    for name in ("best", "last"):
        scores, reward = rewards_of(tmp_path / "model" / name)
        torch.testing.assert_close(scores, ((raw - mean) / std).float(), rtol=1e-3, atol=1e-4)
        assert standardized(scores)
        assert reward.model is not None
        assert reward.model.config.num_labels == 1
        assert reward.model.config.score_normalization == {
            "mean": pytest.approx(mean, abs=1e-5),
            "std": pytest.approx(std, rel=1e-4),
        }
        alone = transformers_alone(tmp_path / "model" / name)
        if family in ("llama", "qwen2"):  # no bias in its last norm or head: the same constant everywhere
            torch.testing.assert_close(alone - alone.mean(), scores, rtol=1e-3, atol=1e-4)
            assert abs(float(alone.mean())) > 0.01
            stored = reward.model.config
            torch.testing.assert_close((alone - stored.mean) / stored.std, scores, rtol=1e-3, atol=1e-4)
        else:
            torch.testing.assert_close(alone, scores, rtol=1e-3, atol=1e-4)
            assert not hasattr(reward.model.config, "mean")
    # The model in training is left as it was.
    name = "classifier.weight" if family == "bert" else "score.weight"
    assert torch.equal(weights_of(module)[name], load_file(Path(path) / "model.safetensors")[name])
    assert not hasattr(module.reward_model.config, "score_normalization")


@pytest.mark.slow(0.3)
def test_a_run_without_a_validation_is_normalized_too(start: str, tmp_path: Path) -> None:
    """It stops in the middle of its first epoch, at whose end it would have validated."""
    module, trainer = fitted(start, tmp_path, rate=0.5, max_steps=2, data={"batch_size": 2})
    assert "val/accuracy" not in trainer.callback_metrics
    assert standardized(rewards_of(tmp_path / "model" / "last")[0])
    assert module._normalized_at == 2


@pytest.mark.slow
def test_the_end_of_training_is_normalized_for_its_own_weights(start: str, tmp_path: Path) -> None:
    """The validation is before the last step, which moves the scores."""
    _, trainer = fitted(
        start, tmp_path, rate=0.5, max_steps=3, max_epochs=3, check_val_every_n_epoch=None, val_check_interval=2
    )
    assert trainer.global_step == 3
    assert standardized(rewards_of(tmp_path / "model" / "last")[0])
    assert standardized(rewards_of(tmp_path / "model" / "best")[0])
    first, last = (load_file(tmp_path / "model" / name / "model.safetensors") for name in ("best", "last"))
    assert not torch.equal(first["score.weight"], last["score.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"module": {"normalize": False}}, {"data": {"val_path": None}}])
def test_scores_stay_as_they_are_without_normalization(start: str, tmp_path: Path, options: dict[str, Any]) -> None:
    fitted(start, tmp_path, **options)
    scores, _ = rewards_of(tmp_path / "model" / "last", template="{prompt}{response}{eos}")
    raw = torch.cat(both_sides(start)).detach()
    torch.testing.assert_close(scores, raw.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_equal_scores_are_not_divided_by_0(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    path = save_start(tmp_path / "start")
    model = AutoModelForSequenceClassification.from_pretrained(path)
    torch.nn.init.zeros_(model.score.weight)
    model.save_pretrained(path)
    with pytest.warns(UserWarning, match="All scores on the validation pairs are equal"):
        fitted(path, tmp_path)
    assert rewards_of(tmp_path / "model" / "last")[0].abs().max() == 0


@pytest.mark.slow(0.3)
def test_a_reward_model_of_deepspeed_chat_goes_on_and_is_exported_plainly(tmp_path: Path) -> None:
    body, v_head = body_of("opt"), torch.randn(1, 32)
    path = save_deepspeed_chat(tmp_path / "start", body, v_head, opts_tokenizer())
    module = RewardModelModule(ModelConfig(path, allow_pickle=True), optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer = make_trainer(tmp_path, [ExportPolicy(str(tmp_path / "model"), best=False)], limit_val_batches=1.0)
    trainer.fit(module, pair_data(tmp_path, path))
    weights = load_file(tmp_path / "model" / "last" / "model.safetensors")
    std = module._normalization.std
    torch.testing.assert_close(weights["score.weight"], v_head / std)
    assert not [name for name in weights if name.startswith(("rw", "v_head"))]
    scores, _ = rewards_of(tmp_path / "model" / "last")
    assert standardized(scores)


@pytest.mark.slow(0.3)
def test_the_exported_model_reads_messages_with_the_variables_of_its_training(tmp_path: Path) -> None:
    template = "<s>{{ style }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}</s>"
    path = save_classifier(tmp_path / "start", tiny_config("llama"), make_tokenizer(chat_template=template))
    sides = {side: [user("1+1"), assistant(text)] for side, text in (("chosen", "2"), ("rejected", "3"))}
    loading = LoadingConfig(chat_template_kwargs={"style": "brief "})
    rows = write_rows(tmp_path / "rows.jsonl", [sides])
    data = PreferenceDataModule(rows, path, batch_size=1, max_length=100, loading=loading)
    module = RewardModelModule(ModelConfig(path), normalize=False, optimizer=partial(torch.optim.SGD, lr=0.0))
    make_trainer(tmp_path, [ExportPolicy(str(tmp_path / "model"), best=False)]).fit(module, data)
    reward = ClassifierReward(str(tmp_path / "model" / "last"))
    reward.load(CPU)
    (batch,) = list(data.train_dataloader())
    text = reward.text(batch.prompts[0], "2", {})
    assert text.startswith("<s>brief user: 1+1")
    assert reward._token_ids(text) == batch.chosen_ids[0].tolist()


@pytest.mark.slow
def test_a_normalized_model_can_be_trained_again(tmp_path: Path) -> None:
    """What the first export could not fold is part of the score that the second run normalizes."""
    path = save_start(tmp_path / "start", "llama")
    fitted(path, tmp_path)
    (tmp_path / "again").mkdir()
    module, _ = fitted(str(tmp_path / "model" / "last"), tmp_path / "again")
    assert module._normalization == pytest.approx((0.0, 1.0), abs=1e-4)
    first, second = rewards_of(tmp_path / "model" / "last")[0], rewards_of(tmp_path / "again" / "model" / "last")[0]
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


# Resuming, predicting, learning


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(start: str, tmp_path: Path) -> None:
    def run(steps: int, ckpt_path: str | None = None) -> RewardModelModule:
        module = reward_module(start, optimizer=partial(torch.optim.AdamW, lr=1e-2))
        checkpoint = ModelCheckpoint(tmp_path / f"to{steps}", filename="{step}", every_n_train_steps=3, save_top_k=-1)
        options = {"max_epochs": 4, "max_steps": steps, "enable_checkpointing": True, "limit_val_batches": 1.0}
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, [checkpoint], **options)
        data = pair_data(tmp_path, start, batch_size=4)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return module

    whole = run(6)
    run(3)
    resumed = run(6, str(tmp_path / "to3" / "step=3.ckpt"))
    assert resumed._normalization == whole._normalization
    first, second = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_predictions_are_normalized(start: str, tmp_path: Path) -> None:
    module, trainer = fitted(start, tmp_path)
    found = [
        line for batch in trainer.predict(module, pair_data(tmp_path, start, batch_size=3)) or [] for line in batch
    ]
    assert [line["prompt"] for line in found] == [row["prompt"] for row in PAIRS]
    scores = torch.tensor([[line["chosen_reward"] for line in found], [line["rejected_reward"] for line in found]])
    torch.testing.assert_close(scores.flatten(), rewards_of(tmp_path / "model" / "last")[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_checkpoint_knows_the_normalization(start: str, tmp_path: Path) -> None:
    _, trainer = fitted(start, tmp_path)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    module, data = reward_module(start), pair_data(tmp_path, start)
    (found,) = make_trainer(tmp_path).predict(module, data, ckpt_path=tmp_path / "end.ckpt", weights_only=True) or []
    assert module._normalization.std != 1
    scores = torch.tensor([[line["chosen_reward"], line["rejected_reward"]] for line in found])
    assert standardized(scores)


@pytest.mark.slow
def test_a_tiny_reward_model_learns_a_rule_and_tells_new_pairs_apart(tmp_path: Path) -> None:
    """Politer is better: of two responses that are alike otherwise, the chosen one says please."""
    generator = torch.Generator().manual_seed(0)

    def pairs(count: int) -> list[dict[str, str]]:
        rows = []
        for _ in range(count):
            words = [
                "".join(chr(97 + int(i)) for i in torch.randint(0, 26, (4,), generator=generator)) for _ in range(3)
            ]
            rows.append({"prompt": words[0], "chosen": f"{words[1]} please", "rejected": f"{words[1]} {words[2]}xy"})
        return rows

    tiny_config("llama").save_pretrained(tmp_path / "start")
    make_tokenizer().save_pretrained(tmp_path / "start")
    path = str(tmp_path / "start")
    train_path, val_path = (
        write_rows(tmp_path / "train.jsonl", pairs(256)),
        write_rows(tmp_path / "val.jsonl", pairs(64)),
    )
    module = RewardModelModule(ModelConfig(path, from_scratch=True), optimizer=partial(torch.optim.AdamW, lr=3e-3))
    data = PreferenceDataModule(train_path, path, val_path, batch_size=32, max_prompt_length=32, max_length=64)
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path, max_steps=48, max_epochs=6, limit_val_batches=1.0, num_sanity_val_steps=1)
    trainer.validate(module, data, verbose=False)
    before = float(trainer.callback_metrics["val/accuracy"])
    trainer.fit(module, data)
    assert before < 0.8
    assert float(trainer.callback_metrics["val/accuracy"]) > 0.95


# Mistakes


def test_numbers_are_checked() -> None:
    for name in ("margin", "centering_coef"):
        with pytest.raises(UserError, match=rf"model\.{name} must be 0 or more, got -1"):
            reward_module("anywhere", **{name: -1})


def test_conversations_must_fit_the_model(start: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.max_length 300 is more than the 256 positions"):
        train(reward_module(start), pair_data(tmp_path, start, max_length=300), tmp_path)


@pytest.mark.parametrize(("name", "value"), [("lora", LoRAConfig()), ("quantization", "nf4"), ("placement", "cpu")])
def test_what_is_for_other_models_is_refused(name: str, value: Any, start: str) -> None:
    with pytest.raises(UserError, match=rf"model\.reward_model\.{name} must be left out"):
        load_reward_model(ModelConfig(start, **{name: value}))


def test_more_than_one_label_is_refused(tmp_path: Path) -> None:
    path = save_classifier(tmp_path / "start", tiny_config("llama"), make_tokenizer(), num_labels=3)
    with pytest.raises(
        UserError, match=r"score\.weight has shape \[3, 32\], .* needs \[1, 32\].*\(a head for 3 labels"
    ):
        train(reward_module(path), pair_data(tmp_path, path), tmp_path)


def test_a_folder_that_is_not_there(start: str, tmp_path: Path) -> None:
    module = RewardModelModule(ModelConfig("./nowhere"), tokenizer=start)
    with pytest.raises(UserError, match=r"model\.reward_model\.path: there is no folder '\./nowhere'"):
        train(module, pair_data(tmp_path, start), tmp_path)


@pytest.mark.slow(0.3)
def test_another_models_tokenizer_is_refused(start: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = make_tokenizer()
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    numbers = description["model"]["vocab"]
    numbers["a"], numbers["b"] = numbers["b"], numbers["a"]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.save_pretrained(tmp_path / "mixed")
    module = reward_module(start, tokenizer=str(tmp_path / "mixed"))
    with pytest.raises(UserError, match=r"model\.tokenizer .* is not the one of model\.reward_model .*: 2 tokens have"):
        train(module, pair_data(tmp_path, str(tmp_path / "mixed")), tmp_path)


@pytest.mark.slow(0.3)
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    path = save_classifier(tmp_path / "start", tiny_config("llama", vocab_size=40), make_tokenizer())
    with pytest.raises(UserError, match=r"model\.tokenizer .* has \d+ tokens, the reward model .* only 40"):
        train(reward_module(path), pair_data(tmp_path, path), tmp_path)


@pytest.mark.slow(0.3)
def test_a_16_bit_rate_that_would_move_nothing_is_refused(start: str, tmp_path: Path) -> None:
    module = reward_module(start, optimizer=partial(torch.optim.AdamW, lr=1e-6))
    with pytest.raises(UserError, match="16-bit weights would round away"):
        train(module, pair_data(tmp_path, start), tmp_path, precision="bf16-true")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_scores_in_float32(start: str, tmp_path: Path, precision: Any) -> None:
    recorder = train(reward_module(start), pair_data(tmp_path, start), tmp_path)
    half = train(reward_module(start), pair_data(tmp_path, start), tmp_path, precision=precision)
    assert half.logged[0]["train/loss"] == pytest.approx(recorder.logged[0]["train/loss"], rel=0.1)
