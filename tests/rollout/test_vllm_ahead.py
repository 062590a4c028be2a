"""`VLLMEngine` that writes a rollout ahead: which weights it is of, what resumes, and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from helpers.checkpoints import HALF, WHOLE, Setting
from helpers.training import fit, make_trainer, prompt_data, remax_module
from helpers.vllm_server import FakeVLLM, engine_for, request_for, shake
from transformers import AutoModelForCausalLM

from remax_lightning.baselines import Tracker
from remax_lightning.config import AdvantageConfig, LossConfig, MismatchConfig
from remax_lightning.errors import UserError
from remax_lightning.modules import SFTModule
from remax_lightning.rollout import SamplingConfig, VLLMEngine
from remax_lightning.rollout.vllm_weights import weight_version


def ahead_for(folder: Path, *servers: FakeVLLM, **options: Any) -> VLLMEngine:
    return engine_for(folder, *servers, ahead=1, **options)


@pytest.mark.slow
def test_the_next_rollout_is_of_the_weights_from_before_the_update(model: Any, serve: Any, tmp_path: Path) -> None:
    server, before = serve(), weight_version(model)
    expected = engine_for(tmp_path / "other", serve()).generate(model, request_for(seed=1))
    engine = ahead_for(tmp_path, server)
    engine.generate(model, request_for(seed=0))
    engine.begin(model, request_for(seed=1))
    shake(model)  # a step of training
    written = engine.generate(model, request_for(seed=1))
    assert torch.equal(written.sampled_ids, expected.sampled_ids)
    assert torch.equal(written.greedy_ids, expected.greedy_ids)
    torch.testing.assert_close(written.log_probs, expected.log_probs)
    # Every row was asked for once, and nothing was updated in between.
    assert server.versions[1:] == [before] * 16
    assert server.paths.count("/update_weights") == 1
    engine.begin(model, request_for(seed=2))
    engine.generate(model, request_for(seed=2))
    assert set(server.versions[17:]) == {weight_version(model)}


def test_an_evaluation_in_between_waits_for_what_is_written_ahead(model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve()
    engine = ahead_for(tmp_path, server)
    expected = engine.generate(model, request_for(seed=1))
    server.seconds = 0.2
    engine.begin(model, request_for(seed=1))
    shake(model)
    engine.generate(model, request_for(seed=5))  # with the weights of now
    assert torch.equal(engine.generate(model, request_for(seed=1)).sampled_ids, expected.sampled_ids)
    # No request was under way when the weights changed: none was asked for twice.
    assert len(server.requests) == 1 + 3 * 8
    assert server.versions[9:17] == [server.versions[1]] * 8
    assert len(set(server.versions[17:])) == 1


@pytest.mark.slow(0.3)
def test_what_is_written_ahead_is_in_the_state(model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve()
    engine = ahead_for(tmp_path, server)
    assert engine.state_dict() is None
    engine.begin(model, request_for(seed=1, stop_check=lambda ids: ids[:, -1] == 50))
    torch.save(engine.state_dict(), tmp_path / "state.pt")
    resumed = ahead_for(tmp_path / "other", serve())
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    shake(model)
    request = {"seed": 1, "stop_check": lambda ids: ids[:, -1] == 50}
    for ours, theirs in zip(
        resumed.generate(model, request_for(**request)), engine.generate(model, request_for(**request)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_other_prompts_than_those_written_ahead_are_written_anew(
    model: Any, serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ahead_for(tmp_path, serve())
    engine.begin(model, request_for(seed=1))
    expected = engine_for(tmp_path / "other", serve()).generate(model, request_for(seed=2))
    assert torch.equal(engine.generate(model, request_for(seed=2)).sampled_ids, expected.sampled_ids)
    engine.begin(model, request_for(seed=3))
    assert "were never asked for" in caplog.text


def test_an_error_ahead_ends_the_run_where_the_responses_are_needed(model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve()
    engine = ahead_for(tmp_path, server)
    engine.generate(model, request_for())
    server.statuses["/inference/v1/generate"] = [400]
    engine.begin(model, request_for(seed=1))
    with pytest.raises(UserError, match=r"refused /inference/v1/generate with status 400"):
        engine.generate(model, request_for(seed=1))


def ahead_module(policy: str, engine: Any, **options: Any) -> Any:
    defaults = {"loss": LossConfig(mismatch=MismatchConfig("tis")), "sampling": SamplingConfig(max_response_length=5)}
    return remax_module(policy, rollout=engine, **(defaults | options))


def test_a_run_asks_ahead_and_trains_corrected(policy: str, serve: Any, tmp_path: Path) -> None:
    server = serve()
    data = prompt_data(tmp_path, policy, batch_size=4, val_path=None)  # two rollouts to an epoch
    optimizer = partial(torch.optim.SGD, lr=0.1)
    module = ahead_module(policy, ahead_for(tmp_path, server), optimizer=optimizer)
    recorder = fit(module, data, tmp_path, max_steps=4, max_epochs=4)
    # ---- Four rollouts of 8 rows, none behind the last step; each but the first of the weights one step before ----
    assert len(server.requests) == 1 + 4 * 8
    versions = [set(server.versions[start : start + 8]) for start in range(1, 33, 8)]
    assert [len(version) for version in versions] == [1, 1, 1, 1]
    assert versions[0] == versions[1]
    assert len(set.union(*versions)) == 3
    assert recorder.logged[0]["train/mismatch_kl"] < 1e-6
    assert all(logged["train/mismatch_kl"] > 1e-5 for logged in recorder.logged[1:])
    # ---- The prompts are those of a run that writes nothing ahead ----
    plain = serve()
    other = ahead_module(policy, engine_for(tmp_path / "other", plain), optimizer=optimizer)
    fit(other, prompt_data(tmp_path, policy, batch_size=4, val_path=None), tmp_path, max_steps=4, max_epochs=4)
    asked, expected = (
        [sorted(map(str, (body["token_ids"] for body in made.requests[first : first + 8]))) for first in (1, 9, 17, 25)]
        for made in (server, plain)
    )
    assert asked == expected


@pytest.mark.parametrize("at", ["in the middle of an epoch", "at its end"])
def test_a_run_that_asks_ahead_resumes_bit_for_bit(at: str, serve: Any, tmp_path: Path) -> None:
    server = serve()
    options: dict[str, Any] = {"data": {"batch_size": 2, "val_path": None}} if at == "at its end" else {}
    run = Setting(tmp_path, prompts=6 if options else 8, **options)
    model = AutoModelForCausalLM.from_pretrained(run.policy)
    server = FakeVLLM(model, make_tokenizer()).__enter__()
    loss = LossConfig(mismatch=MismatchConfig("tis"))

    def start(name: str, *arguments: Any, **keywords: Any) -> Any:
        run.module = {"rollout": ahead_for(tmp_path / name, server), "loss": loss}
        server.restart()
        return run.start(*arguments, **keywords)[0]

    whole, half = start("whole", seed=0, steps=WHOLE), start("half", seed=0, steps=HALF)
    # The half asks for nothing behind its last step, so its checkpoints are those of the whole up to there.
    rest = start("rest", seed=99, steps=WHOLE, checkpoint=run.saved(0, WHOLE, HALF))
    assert half.losses + rest.losses == whole.losses
    for first, second in zip(whole.weights, half.weights + rest.weights, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)
    # Without what was written ahead the rollout is one of other weights.
    checkpoint = torch.load(run.saved(0, WHOLE, HALF), weights_only=True)
    assert checkpoint["remax"]["ahead"][0]["sampled_ids"].shape[1] == 5
    server.__exit__()


@pytest.mark.slow(0.3)
def test_ahead_is_refused_where_it_cannot_be_corrected(policy: str, serve: Any, tmp_path: Path) -> None:
    engine = ahead_for(tmp_path, serve())
    with pytest.raises(UserError, match=r"ahead 1 writes .* set model.loss.mismatch.kind to tis or mis"):
        ahead_module(policy, engine, loss=LossConfig())
    with pytest.raises(UserError, match=r"ahead must be 0 with model.advantage.baseline .* only after the rollout"):
        ahead_module(policy, engine, advantage=AdvantageConfig(baseline=Tracker()))
    with pytest.raises(UserError, match="ahead must be between 0 and 1"):
        VLLMEngine(["http://localhost:1"], ahead=2)
    with pytest.raises(UserError, match="ahead must be 0 where responses are only evaluated, got 1"):
        SFTModule(policy, rollout=engine)
    trainer = make_trainer(tmp_path)
    with pytest.raises(UserError, match="needs the next prompts, which loaders without a data module does not tell"):
        trainer.fit(ahead_module(policy, engine), train_dataloaders=[1])
    trainer = make_trainer(tmp_path, overfit_batches=1)
    with pytest.raises(UserError, match=r"ahead must be 0 where trainer.overfit_batches is set"):
        trainer.fit(ahead_module(policy, engine), prompt_data(tmp_path, policy, val_path=None))
