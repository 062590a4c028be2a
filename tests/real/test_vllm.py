"""The real vLLM, for CPUs, in an environment of its own (`make vllm`): training, weights, resuming, servers that die.

The server is started with the command of `remax serve`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.vllm_real import LENGTH, STEPS, Replay, Rollouts, Server, train
from lightning.pytorch.callbacks import ModelCheckpoint

from remax_lightning.config import MismatchConfig
from remax_lightning.errors import UserError
from remax_lightning.rollout import GenerationRequest, SamplingConfig
from remax_lightning.rollout.vllm_server import describe

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module", params=["weights", "adapter"])
def server(
    request: pytest.FixtureRequest, vllm_python: str, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    started = Server(tmp_path_factory.mktemp("server"), smollm2, request.param == "adapter")
    yield started
    started.kill()


def test_what_the_server_tells_of_itself_is_compared_with_the_policy(
    server: Server, smollm2: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    engine = server.engine(tmp_path)
    [asked] = engine.servers
    asked.wait()
    info = describe(asked, None)
    assert info.max_lora_rank == (8 if "--enable-lora" in server.command.arguments else None)
    # ---- Texts are compared, too; the policy's own tokenizer is the server's ----
    if info.max_lora_rank is None:
        engine.check(AutoModelForCausalLM.from_pretrained(smollm2), SamplingConfig(max_response_length=64), 64)
        tokenizer = AutoTokenizer.from_pretrained(smollm2)
        engine.check_tokenizer(tokenizer)
        decode = tokenizer.decode
        tokenizer.decode = lambda *arguments, **options: decode(*arguments, **options).replace("a", "b")
        with pytest.raises(UserError, match="has another tokenizer than the run"):
            engine.check_tokenizer(tokenizer)


def test_ten_steps_are_those_of_the_own_engine_on_the_same_responses(
    server: Server, smollm2: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    lora = "--enable-lora" in server.command.arguments
    theirs = train(smollm2, lora, tmp_path, server.engine(tmp_path), MismatchConfig("tis", "response"))
    assert len(theirs.logged) == STEPS
    for logged in theirs.logged:
        assert logged["train/mismatch_kl"] < 1e-6
        assert logged["train/mismatch_ratio_max"] == pytest.approx(1, abs=1e-2)
        assert logged["train/mismatch_clipped"] == 0
    # Weights follow at every step, and an adapter is a small share of them.
    sent = [logged["rollout/weight_sync_bytes"] for logged in theirs.logged]
    assert all(10_000 < size < 30e6 if lora else size > 500e6 for size in sent)
    ours = train(smollm2, lora, tmp_path, Replay(theirs.rollouts), MismatchConfig())
    for name, value in ours.weights.items():
        torch.testing.assert_close(theirs.weights[name], value, rtol=0, atol=1e-4)
    assert len(ours.weights) > 100


@pytest.mark.parametrize("transfer", ["files", "broadcast"])
def test_a_server_that_is_killed_in_a_rollout_loses_nothing(
    transfer: str, server: Server, smollm2: Path, tmp_path: Path
) -> None:
    if "--enable-lora" in server.command.arguments:
        pytest.skip("the engine is the same; one server is started again")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    with torch.no_grad():  # weights that the server has from the trainer alone
        model.model.norm.weight.mul_(1.1)
    ids = torch.randint(1000, 40000, (4, 8), generator=torch.Generator().manual_seed(0))

    def request() -> GenerationRequest:
        sampling, generator = SamplingConfig(max_response_length=64), torch.Generator().manual_seed(0)
        return GenerationRequest(ids, torch.ones_like(ids, dtype=torch.bool), sampling, [2], 2, generator)

    engine = server.engine(tmp_path, transfer=transfer)
    # ---- As a trainer leaves it that is killed in an update: paused, with the layers ready for weights ----
    [asked] = engine.servers
    asked.wait()
    starts = server.log.read_text(errors="replace").count("Application startup complete")
    for path, body in (("/pause?mode=abort", None), ("/init_weight_transfer_engine", {"init_info": {}})):
        asked.post(path, body)
    asked.post("/start_weight_update")
    engine.generate(model, request())  # which is proven
    with torch.no_grad():
        model.model.norm.weight.div_(1.05)
    expected = engine.generate(model, request())  # so is the first update

    def kill_and_start() -> None:
        time.sleep(1.0)
        server.kill()
        server.start()

    killer = threading.Thread(target=kill_and_start)
    killer.start()
    output = engine.generate(model, request())
    killer.join()
    # The first tokens are the same; rounding depends on which rows are decoded together.
    assert torch.equal(output.sampled_ids[:, :4], expected.sampled_ids[:, :4])
    assert torch.equal(output.greedy_ids[:, :4], expected.greedy_ids[:, :4])
    assert server.log.read_text(errors="replace").count("Application startup complete") == starts + 1


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_resumed_run_trains_on_the_same_responses(ahead: int, server: Server, smollm2: Path, tmp_path: Path) -> None:
    lora = "--enable-lora" in server.command.arguments
    if lora and not ahead:
        pytest.skip("what is written again is the same whatever is sent")
    mismatch = MismatchConfig("tis")

    def run(name: str, steps: int, checkpoint: Path | None = None) -> Rollouts:
        saves = ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, every_n_train_steps=2)
        engine = server.engine(tmp_path, ahead=ahead)
        options = {"steps": steps, "callbacks": [saves], "checkpoint": checkpoint}
        return train(smollm2, lora, tmp_path, engine, mismatch, **options)

    whole = run("whole", 4)
    rest = run("rest", 4, tmp_path / "whole" / "step=2.ckpt")
    assert len(rest.rollouts) == 2
    for ours, theirs in zip(rest.rollouts, whole.rollouts[2:], strict=True):
        for kind in ("sampled", "greedy"):
            one, other = getattr(ours, kind).response_ids, getattr(theirs, kind).response_ids
            # Written ahead they are in the checkpoint; written again, the same up to how rows are batched.
            length = LENGTH if ahead and ours is rest.rollouts[0] else 3
            assert torch.equal(one[:, :length], other[:, :length])
    for name, value in rest.weights.items():
        torch.testing.assert_close(value, whole.weights[name], rtol=0, atol=1e-3)
    # One step apart the responses are those of other weights, and corrected.
    figures = [logged["train/mismatch_kl"] for logged in whole.logged]
    assert figures[0] < 1e-6
    assert all(figure > 1e-6 if ahead else figure < 1e-6 for figure in figures[1:])
