"""What the options of sampling do to a run: stop strings, log-probs of the rollout, truncation of the training pass."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tiny_model
from helpers.training import (
    FixedEngine,
    Recorder,
    distance,
    fit,
    make_trainer,
    prompt_data,
    remax_module,
    save_policy,
)

from remax_lightning.errors import UserError
from remax_lightning.modules import KLConfig, LossConfig
from remax_lightning.modules import remax as module_file
from remax_lightning.rollout import GenerationOutput, GenerationRequest, HuggingFaceEngine, PairedEngine, SamplingConfig


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return save_policy(folder / "policy"), save_policy(folder / "reference", noise=0.02)


# Ids without a token


@pytest.mark.slow
@pytest.mark.parametrize("engine", [PairedEngine, HuggingFaceEngine])
def test_a_whole_run_draws_no_id_without_a_token(engine: Any, tmp_path: Path) -> None:
    """The embedding has 24 rows more than the tokenizer has tokens, each as likely as a token."""
    tokenizer, model = make_tokenizer(), tiny_model("llama", vocab_size=120)
    model.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    policy = str(tmp_path / "policy")
    sampling = SamplingConfig(max_response_length=12, num_samples=4)
    module = remax_module(policy, policy, rollout=engine(), sampling=sampling, check_on_policy=True)
    recorder = Recorder()
    data = prompt_data(tmp_path, policy, batch_size=2)
    make_trainer(tmp_path, [recorder], max_steps=2, limit_val_batches=1).fit(module, data)
    assert len(recorder.outputs) == 2
    for output in recorder.outputs:
        rollout = output["rollout"]
        for responses in (rollout.sampled, rollout.greedy):
            assert responses.response_ids.max() < len(tokenizer)
        # Half of them would be beyond the tokenizer's last ids now and then.
        assert rollout.sampled.response_ids.max() > len(tokenizer) // 2


# Stop strings


class StoppedEngine(FixedEngine):
    """Hands out responses that a stop string has ended, with the tokenizer's pad after it."""

    def __init__(self, texts: list[str], length: int, pad: int) -> None:
        tokenizer = make_tokenizer(bos=False)
        ids = [tokenizer(text)["input_ids"] for text in texts]
        self.stopped_at = torch.tensor([len(row) if len(row) < length else 0 for row in ids])
        super().__init__([[*row, *(length - len(row)) * [pad]] for row in ids])

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        assert request.stop_check is not None
        assert request.stop_check(self.sampled[:, :3]).tolist() == [True, False, False]
        made = super().generate(model, request)
        return GenerationOutput(made.sampled_ids, made.sampled_ids[:], None, self.stopped_at.repeat(2))


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("pad_is_eos", [True, False])
def test_a_stop_string_ends_a_response_as_eos_does(pad_is_eos: bool, tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "policy", ends=(2,), pad_is_eos=pad_is_eos)
    engine = StoppedEngine(["a##", "bcde##", "fghijk"], 6, 2 if pad_is_eos else 3)
    sampling = SamplingConfig(max_response_length=6, stop_strings=("##",))
    module = remax_module(policy, rollout=engine, sampling=sampling)
    recorder = fit(module, prompt_data(tmp_path, policy, ["x", "y", "z"]), tmp_path)
    sampled = recorder.outputs[0]["rollout"].sampled
    assert sampled.texts == ["a##", "bcde##", "fghijk"]
    assert sampled.response_mask.sum(-1).tolist() == [3, 6, 6]
    assert sampled.truncated.tolist() == [False, True, True]


@pytest.mark.slow
def test_stop_strings_end_real_rollouts(folders: tuple[str, str], tmp_path: Path) -> None:
    """Every response ends with one, or at the limit, or by a token that ends it."""
    sampling = SamplingConfig(max_response_length=24, stop_strings=tuple("GHIJKLMNOP"))
    policy = save_policy(tmp_path / "policy", ends=(2,))
    recorder = fit(remax_module(policy, sampling=sampling), prompt_data(tmp_path, policy), tmp_path)
    rollout = recorder.outputs[0]["rollout"]
    ended = 0
    for responses in (rollout.sampled, rollout.greedy):
        for text, mask in zip(responses.texts, responses.response_mask, strict=True):
            found = [i for i, character in enumerate(text) if character in "GHIJKLMNOP"]
            assert not found or (found[0] == len(text) - 1 and mask.sum() < 24)
            ended += bool(found)
    assert ended > 4


# Log-probs before the first of several updates


def two_updates(folders: tuple[str, str], folder: Path, kind: str, **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    loss = LossConfig("clipped", old_log_probs=kind)
    module = remax_module(*folders, loss=loss, rollout=PairedEngine(), **options)
    return fit(module, prompt_data(folder, folders[0], micro_batch_size=4), folder, max_steps=2)


@pytest.mark.slow
def test_log_probs_of_the_rollout_take_the_place_of_a_pass(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[bool] = []
    statistics = module_file.policy_statistics

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(torch.is_grad_enabled())
        return statistics(*args, **kwargs)

    monkeypatch.setattr(module_file, "policy_statistics", counted)
    recomputed = two_updates(folders, tmp_path / "recompute", "recompute")
    assert passes == [False, True, True]
    passes.clear()
    taken = two_updates(folders, tmp_path / "rollout", "rollout")
    assert passes == [True, True]
    for step in (0, 1):
        assert distance(taken.step(step), recomputed.step(step)) < 1e-4
        assert taken.logged[step] == pytest.approx(recomputed.logged[step], abs=1e-4, rel=1e-3)


@pytest.mark.slow
def test_the_rollout_is_not_asked_for_log_probs_that_nothing_reads(folders: tuple[str, str], tmp_path: Path) -> None:
    class Asked(PairedEngine):
        request = None

        def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
            self.request = request
            return super().generate(model, request)

    engine = Asked()
    module = remax_module(*folders, rollout=engine, loss=LossConfig("clipped", old_log_probs="rollout"))
    fit(module, prompt_data(tmp_path, folders[0]), tmp_path)
    assert engine.request is not None
    assert not engine.request.return_log_probs
    assert engine.request.stop_check is None


def test_a_kl_over_the_vocabulary_needs_a_pass_of_its_own(folders: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=r"model\.loss\.old_log_probs must be recompute"):
        remax_module(*folders, loss=LossConfig("clipped", old_log_probs="rollout"), kl=KLConfig(estimator="full"))


# Truncation


@pytest.mark.slow
@pytest.mark.parametrize("head", [True, False])
def test_the_ratio_of_the_first_update_is_one_under_truncation(
    head: bool, folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs of the rollout and of the training pass are over the same tokens, with the model's head and without."""
    if not head:
        from remax_lightning.models import log_probs as statistics

        found = statistics.find_head
        monkeypatch.setattr(statistics, "find_head", lambda model: found(model)._replace(head=None))
    ratios: list[torch.Tensor] = []
    from remax_lightning.training import objective

    surrogate = objective.clipped_surrogate_loss

    def seen(log_probs: Any, old: Any, advantages: Any, mask: Any, *rest: Any) -> Any:
        ratios.append((log_probs - old)[mask].detach())
        return surrogate(log_probs, old, advantages, mask, *rest)

    monkeypatch.setattr(objective, "clipped_surrogate_loss", seen)
    sampling = partial(SamplingConfig, max_response_length=6, temperature=1.2, top_p=0.5, min_p=0.01)
    two_updates(folders, tmp_path / "with", "rollout", sampling=sampling(processed_log_probs=True))
    assert ratios[0].abs().max() < 1e-4
    ratios.clear()
    two_updates(folders, tmp_path / "without", "rollout", sampling=sampling())
    assert ratios[0].abs().max() < 1e-4


@pytest.mark.slow
def test_truncated_log_probs_are_larger_and_train_another_gradient(folders: tuple[str, str], tmp_path: Path) -> None:
    steps = {}
    for truncate in (True, False):
        sampling = SamplingConfig(max_response_length=6, top_k=5, processed_log_probs=truncate)
        data = prompt_data(tmp_path, folders[0])
        steps[truncate] = fit(remax_module(folders[0], sampling=sampling), data, tmp_path)
    ids = [steps[each].outputs[0]["rollout"].sampled.response_ids for each in (True, False)]
    assert torch.equal(*ids)
    entropies = [steps[each].logged[0]["train/entropy"] for each in (True, False)]
    assert entropies[0] < torch.tensor(5.0).log() < entropies[1]
    assert distance(steps[True].step(), steps[False].step()) > 0.01
