"""`VLLMEngine` against a small server with vLLM's endpoints: requests, weights, restarts, proofs and errors."""

from __future__ import annotations

import datetime
import gc
import ipaddress
import signal
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import certifi
import pytest
import torch
from conftest import make_tokenizer
from helpers.training import EARLY_ENDS, fit, prompt_data, remax_module
from helpers.vllm_server import ENDS, PROMPTS, engine_for, request_for, shake
from helpers.waiting import wait_until

from remax_lightning.config import LossConfig, MismatchConfig
from remax_lightning.errors import UserError
from remax_lightning.functional.log_probs import LogitTransform
from remax_lightning.models import LoRAConfig, ModelConfig
from remax_lightning.models.forward import HeadSearch
from remax_lightning.rollout import (
    AutoEngine,
    PairedEngine,
    ProofConfig,
    SamplingConfig,
    VLLMEngine,
    clone_engine,
    vllm_broadcast,
    vllm_proof,
)
from remax_lightning.rollout.base import stop_string_check
from remax_lightning.rollout.vllm_weights import weight_version

# ---- Requests and responses ----


@pytest.mark.slow
def test_greedy_responses_are_those_of_the_own_engine(model: Any, serve: Any, tmp_path: Path) -> None:
    engine = engine_for(tmp_path, serve())
    for step in range(2):
        request = request_for(seed=step)
        theirs, ours = engine.generate(model, request), PairedEngine().generate(model, request_for(seed=step))
        ends = torch.isin(ours.greedy_ids, torch.tensor(ENDS)).cumsum(1)
        mask = ends - torch.isin(ours.greedy_ids, torch.tensor(ENDS)).long() == 0
        assert torch.equal(theirs.greedy_ids.where(mask, 0), ours.greedy_ids.where(mask, 0))
        shake(model)  # the servers follow


@pytest.mark.slow
def test_log_probs_are_those_of_the_policy(model: Any, serve: Any, tmp_path: Path) -> None:
    output = engine_for(tmp_path, serve()).generate(model, request_for())
    assert output.sampled_ids.shape == (4, 6)
    for row, (ids, log_probs) in enumerate(zip(output.sampled_ids, output.log_probs, strict=True)):
        length = next((t + 1 for t, token in enumerate(ids.tolist()) if token in ENDS), 6)
        prompt = PROMPTS[row]
        logits = model(torch.tensor([prompt + ids[:length].tolist()])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, ids[:length, None]).squeeze(-1)
        torch.testing.assert_close(log_probs[:length], expected.detach(), rtol=0, atol=1e-4)
        assert (log_probs[length:] == 0).all()
        assert (ids[length:] == 3).all()


@pytest.mark.slow
def test_a_run_repeats_and_rows_differ(model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve()
    engine = engine_for(tmp_path, server)
    first, again, other = (engine.generate(model, request_for(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first.sampled_ids, again.sampled_ids)
    assert not torch.equal(first.sampled_ids, other.sampled_ids)
    # The first request asks whether the server knows the last token of the vocabulary.
    seeds = [body["sampling_params"].get("seed") for body in server.requests[1:9]]
    assert len({seed for seed in seeds if seed is not None}) == 4
    assert seeds.count(None) == 4


@pytest.mark.slow(0.3)
def test_sampled_and_greedy_requests_are_under_way_together(model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve(gathers=5)
    engine_for(tmp_path, server).generate(model, request_for())
    assert server.most_at_once > 4  # of 8
    assert sum(body["sampling_params"]["temperature"] == 0 for body in server.requests[1:]) == 4


@pytest.mark.slow
def test_every_setting_that_a_server_may_have_of_its_own_is_sent(model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve(logprobs_mode="processed_logprobs")
    request = request_for(
        temperature=0.7, top_p=0.9, top_k=20, processed_log_probs=True, min_response_length=2, unused_ids=(90, 91)
    )
    output = engine_for(tmp_path, server).generate(model, request)
    sent = server.requests[1]["sampling_params"]
    assert {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "min_tokens"} <= sent.keys()
    assert sent["stop_token_ids"] == ENDS
    assert not torch.isin(output.sampled_ids[:, :2], torch.tensor(ENDS)).any()
    assert not torch.isin(output.sampled_ids, torch.tensor([90, 91])).any()


@pytest.mark.slow
def test_a_stop_string_ends_a_response(model: Any, serve: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    strings = tuple(tokenizer.decode([token]) for token in range(40, 60))
    check = stop_string_check(tokenizer, strings)
    request = request_for(stop_strings=strings, stop_check=check, eos_ids=[2])
    output = engine_for(tmp_path, serve()).generate(model, request)
    rows = torch.cat([output.sampled_ids, output.greedy_ids])
    for ids, stopped_at in zip(rows.tolist(), output.stopped_at.tolist(), strict=True):
        first = next((t for t in range(1, 7) if check(torch.tensor([ids[:t]]))[0]), 0)
        assert stopped_at == (0 if 2 in ids[: first - 1] else first)
    assert (output.stopped_at > 0).any()


@pytest.mark.slow
def test_prompts_are_spread_by_their_tokens(model: Any, serve: Any, tmp_path: Path) -> None:
    servers = [serve(), serve()]
    engine_for(tmp_path, *servers).generate(model, request_for())
    prompts = [{tuple(body["token_ids"]) for body in server.requests[1:]} for server in servers]
    assert len(prompts[0]) == len(prompts[1]) == 2
    assert not prompts[0] & prompts[1]  # all rows of a prompt are on one server


def test_the_reference_of_an_evaluation_decodes_in_the_trainer(tmp_path: Path) -> None:
    assert type(clone_engine(VLLMEngine(["http://localhost:1"]))) is AutoEngine


# ---- Weights ----


@pytest.mark.slow
def test_a_server_gets_weights_once_for_each_version(model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve()
    engine = engine_for(tmp_path, server)
    for _ in range(2):
        engine.generate(model, request_for())
    assert server.paths.count("/update_weights") == 1
    assert server.version == weight_version(model)
    metrics = engine.metrics()
    assert metrics["rollout/weight_sync_bytes"] == pytest.approx(
        sum(p.numel() * 4 for p in model.parameters()), rel=0.2
    )
    assert metrics["time/weight_sync_s"] > 0
    shake(model)
    engine.generate(model, request_for())
    assert server.paths.count("/update_weights") == 2
    assert server.paths.count("/resume") == server.paths.count("/pause") == 2
    assert all(torch.equal(a, b) for a, b in zip(server.base.parameters(), model.parameters(), strict=True))
    assert [path.name for path in (tmp_path / "weights").iterdir() if path.is_dir()] == [weight_version(model)]


@pytest.mark.slow
def test_the_files_go_with_the_engine(model: Any, serve: Any, tmp_path: Path) -> None:
    engine = engine_for(tmp_path, serve())
    engine.generate(model, request_for())
    assert [path.name for path in (tmp_path / "weights").iterdir() if path.is_dir()] == [weight_version(model)]
    del engine
    gc.collect()
    assert not [path for path in (tmp_path / "weights").iterdir() if path.is_dir()]


@pytest.mark.slow
def test_weights_can_be_sent_to_a_server_that_sees_no_file(model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve()
    engine = engine_for(tmp_path, server, transfer="broadcast")
    engine.check(model, request_for().sampling, 5)
    for _ in range(2):
        shake(model)
        engine.generate(model, request_for())
        assert all(torch.equal(a, b) for a, b in zip(server.base.parameters(), model.parameters(), strict=True))
    assert server.paths.count("/init_weight_transfer_engine") == 1  # the group stays
    # ---- A server that restarted is in no group, and gets the weights in a new one ----
    server.restart()
    engine.generate(model, request_for())
    assert all(torch.equal(a, b) for a, b in zip(server.base.parameters(), model.parameters(), strict=True))
    # ---- Workers that take nothing end the run at once, although nobody receives what is being sent ----
    server.refuses_files = True
    shake(model)
    with pytest.raises(UserError, match=r"cannot load the weights that are sent to it: .* 'no room'"):
        engine.generate(model, request_for())
    assert not server.paused


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (
            {"device": "cuda", "nccl": "2.29.3"},
            r"computes on cuda and the trainer on cpu; .* set it to files",
        ),
        ({"device": "cpu", "nccl": "2.27.5"}, r"has NCCL 2.27.5 and the trainer None, .* set .*transfer to files"),
    ],
)
def test_workers_that_cannot_join_the_trainer_are_refused(
    workers: dict[str, str], message: str, model: Any, serve: Any, tmp_path: Path
) -> None:
    engine = engine_for(tmp_path, serve(workers=workers), transfer="broadcast")
    with pytest.raises(UserError, match=message):
        engine.check(model, request_for().sampling, 5)


def test_a_machine_that_cannot_listen_for_workers_is_told(
    model: Any, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no port is free")

    monkeypatch.setattr(vllm_broadcast, "make_store", refuse)
    with pytest.raises(UserError, match=rf"cannot listen for the workers of {server.url} \(no port is free\)"):
        engine_for(tmp_path, server, transfer="broadcast").generate(model, request_for())
    assert not server.paused


def test_an_adapter_is_not_broadcast(model: Any, serve: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match=r"transfer broadcast sends all weights, and vLLM reads that of model.policy"):
        engine_for(tmp_path, serve(has_lora=True), transfer="broadcast").check(adapted, request_for().sampling, 5)


@pytest.mark.slow
def test_an_adapter_is_sent_alone(model: Any, serve: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    server = serve(has_lora=True, backend=None)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).eval()
    engine, versions = engine_for(tmp_path, server), []
    for _ in range(3):
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1)
        theirs = engine.generate(adapted, request_for())
        versions.append(weight_version(adapted))
        assert list(server.adapters) == [f"remax-{versions[-1]}"]
        ours = PairedEngine().generate(adapted, request_for())
        assert torch.equal(theirs.greedy_ids[:, 0], ours.greedy_ids[:, 0])
    assert len(set(versions)) == 3
    assert "/update_weights" not in server.paths
    assert engine.metrics()["rollout/weight_sync_bytes"] < 100_000


def test_a_version_tells_weights_in_other_places_apart(model: Any) -> None:
    first, second = model.model.layers[0].mlp.up_proj, model.model.layers[1].mlp.up_proj
    before = weight_version(model)
    first.weight, second.weight = second.weight, first.weight
    assert weight_version(model) != before
    first.weight, second.weight = second.weight, first.weight
    assert weight_version(model) == before


# ---- Servers that fail ----


@pytest.mark.slow
def test_a_server_that_dies_is_waited_for_and_gets_the_weights_anew(model: Any, serve: Any, tmp_path: Path) -> None:
    expected = engine_for(tmp_path, serve()).generate(model, request_for())
    shake(model, 0.0)
    server = serve(dies_after=6, back_after=0.3)
    engine = engine_for(tmp_path / "other", server)
    output = engine.generate(model, request_for())
    assert server.restarts == 1
    assert server.paths.count("/update_weights") == 2
    # Nothing is lost, and with its seed a row is what it would have been.
    assert torch.equal(output.sampled_ids, expected.sampled_ids)
    assert torch.equal(output.greedy_ids, expected.greedy_ids)
    answered = [tuple(body["token_ids"]) for body in server.requests]
    assert len(answered) < 2 * 8


@pytest.mark.slow
def test_a_server_that_restarts_between_rollouts_gets_the_weights_anew(model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve()
    engine = engine_for(tmp_path, server)
    shake(model)
    first = engine.generate(model, request_for())
    server.restart()
    assert torch.equal(engine.generate(model, request_for()).sampled_ids, first.sampled_ids)


@pytest.mark.slow
def test_a_server_that_stays_away_ends_the_run(model: Any, serve: Any, tmp_path: Path) -> None:
    engine = engine_for(tmp_path, serve(dies_after=4), restart_timeout=0.5)
    with pytest.raises(UserError, match=r"the server http://.* does not answer since 0.5 s .*restart_timeout"):
        engine.generate(model, request_for())


@pytest.mark.slow
@pytest.mark.parametrize("status", [429, 500])
def test_only_what_was_refused_is_asked_for_again(status: int, model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve()
    server.statuses["/inference/v1/generate"] = [200, status, status]
    engine_for(tmp_path, server).generate(model, request_for())
    assert server.paths.count("/inference/v1/generate") == 1 + 8 + 2
    server.statuses["/inference/v1/generate"] = [200] + [status] * 100
    with pytest.raises(UserError, match=rf"gave no response in 3 tries .*retries.* status {status}"):
        engine_for(tmp_path, server).generate(model, request_for())


@pytest.mark.slow
def test_an_update_that_a_killed_trainer_left_open_is_ended(model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve()
    server.paused = server.updating = True
    engine_for(tmp_path, server).generate(model, request_for())
    assert server.version == weight_version(model)


def test_workers_that_cannot_load_the_files_end_the_run_at_once(model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve(refuses_files=True)
    with pytest.raises(UserError, match=r"cannot load the weights in .* Worker failed with error 'no room'"):
        engine_for(tmp_path, server).generate(model, request_for())
    assert server.paths.count("/update_weights") == 1
    assert not server.paused


# ---- Proof ----

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "never updated": ({"drops_updates": True}, r"was never updated"),
    "updated in name only": ({"keeps_weights": True}, r"tensors are others: "),
    "an older version": ({"generates_with": "0123456789abcdef"}, r"generated with weights of version 0123456789abcdef"),
    "a permuted layer": (
        {"permutes": ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")},
        r"2 of \d+ tensors are others: model.layers.0.mlp.gate_up_proj.weight",
    ),
    "another temperature": ({"temperature": 1.5}, r"those of a temperature near 1.5, not of 1"),
    "greedy is random": ({"greedy_is_random": True}, r"greedy responses with tokens that are .* below the most likely"),
}


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_holds_or_samples_another_policy_ends_the_run(
    fault: str, model: Any, serve: Any, tmp_path: Path
) -> None:
    shake(model)
    faults, message = FAULTS[fault]
    with pytest.raises(UserError, match=message):
        engine_for(tmp_path, serve(**faults), retries=1).generate(model, request_for())


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("fault", ["updated in name only", "a permuted layer"])
def test_log_probs_find_what_checksums_would(fault: str, model: Any, serve: Any, tmp_path: Path) -> None:
    shake(model, 0.3)
    engine = engine_for(tmp_path, serve(**FAULTS[fault][0]), proof=ProofConfig(checksums=False))
    with pytest.raises(UserError, match=r"log-probs that differ .* it holds other weights"):
        engine.generate(model, request_for(num_samples=2))


@pytest.mark.slow
@pytest.mark.parametrize("fault", [{"samples_at": 0.3}, {"own_top_k": 8}], ids=["temperature", "truncated"])
def test_samples_of_another_distribution_are_noticed_by_their_likelihood(
    fault: dict[str, Any], model: Any, serve: Any, tmp_path: Path
) -> None:
    """The log-probs that come with them are right."""
    engine = engine_for(tmp_path, serve(**fault), proof=ProofConfig(responses=100))
    with pytest.raises(UserError, match="more likely than draws of the policy"):
        engine.generate(model, request_for(num_samples=8, eos_ids=[2]))


@pytest.mark.slow
def test_the_first_update_is_proven_and_then_every_so_many_rollouts(model: Any, serve: Any, tmp_path: Path) -> None:
    engine, proven = engine_for(tmp_path, serve(), proof=ProofConfig(every=4, responses=2)), []
    for step in range(5):
        if step in (1, 2):
            shake(model, 0.01)
        engine.generate(model, request_for())
        proven.append("rollout/log_prob_gap" in engine.metrics())
    assert proven == [True, True, False, False, True]


def test_rounding_may_explain_as_much_as_the_user_says(model: Any, serve: Any, tmp_path: Path) -> None:
    """A mixture of experts whose routers flip differs in single tokens by more than the default allows."""
    wide = ProofConfig(max_gap=50.0, mean_gap=50.0, standard_errors=50.0)
    engine_for(tmp_path, serve(temperature=1.5), proof=wide).generate(model, request_for())
    for narrow in ({"max_gap": 1e-3}, {"mean_gap": 1e-3}, {"standard_errors": 1e-3}):
        proof = ProofConfig(**({"max_gap": 50.0, "mean_gap": 50.0, "standard_errors": 50.0} | narrow))
        with pytest.raises(UserError, match=r"log-probs that differ|most likely ones|likely than draws"):
            engine_for(tmp_path, serve(temperature=1.5, samples_at=1.5), proof=proof).generate(model, request_for())


@pytest.mark.slow
@pytest.mark.parametrize("has_head", [True, False])
def test_the_proof_has_logits_of_a_few_tokens_at_once(
    has_head: bool, model: Any, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gaps = []
    for limit in (2**24, 2 * model.config.vocab_size):
        monkeypatch.setattr(vllm_proof, "LOGITS_AT_ONCE", limit)
        sizes: list[int] = []
        made = LogitTransform.log_softmax

        def log_softmax(self: Any, hidden: Any, *arguments: Any, made: Any = made, sizes: Any = sizes) -> Any:
            sizes.append(len(hidden))
            return made(self, hidden, *arguments)

        monkeypatch.setattr(LogitTransform, "log_softmax", log_softmax)
        if not has_head:
            monkeypatch.setattr(vllm_proof, "find_head", lambda _: HeadSearch(None, "sharded"))
        engine = engine_for(tmp_path, serve(temperature=1.02))
        engine.generate(model, request_for())
        gaps.append(engine.metrics()["rollout/log_prob_gap"])
        monkeypatch.setattr(LogitTransform, "log_softmax", made)
        if has_head:
            assert max(sizes) <= max(2, limit // model.config.vocab_size)
    assert 0 < gaps[0] == pytest.approx(gaps[1], rel=1e-4)


@pytest.mark.parametrize("name", ["every", "responses", "max_gap", "mean_gap", "standard_errors"])
def test_a_limit_of_the_proof_out_of_its_range_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"model.rollout.init_args.proof.{name} must be"):
        ProofConfig(**{name: 0})


# ---- Ends ----


def alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("vllm-request")]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A suite that a shell has started in the background ignores Ctrl-C, and so does Python in it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("how", ["a row is refused", "Ctrl-C", "a server is gone"])
@pytest.mark.usefixtures("interruptible")
def test_what_ends_a_rollout_ends_its_requests(how: str, model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve()
    engine = engine_for(tmp_path, server, timeout=60.0, restart_timeout=60.0)
    engine.generate(model, request_for())
    server.seconds = 30.0
    start = time.monotonic()
    if how == "a row is refused":
        server.statuses["/inference/v1/generate"] = [200, 400]
    else:
        asked = server.paths.count("/inference/v1/generate")

        def interrupt() -> None:
            wait_until(lambda: server.paths.count("/inference/v1/generate") > asked)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        threading.Thread(target=interrupt).start()
    if how == "a server is gone":
        server.statuses["/inference/v1/generate"] = [503] * 8
        server.statuses["/health"] = [503] * 1000
    with pytest.raises(UserError if how == "a row is refused" else KeyboardInterrupt):
        engine.generate(model, request_for())
    assert time.monotonic() - start < 25  # a response takes 30
    assert wait_until(lambda: not alive())


# ---- Mistakes, before training ----


@pytest.mark.parametrize(
    ("faults", "options", "message"),
    [
        ({"dev_mode": False}, {}, "has no endpoints for weights; start it with `remax serve`"),
        ({"scale_out": False}, {}, "status 403: Scale-out endpoints are disabled. Restart with --enable-scale-out"),
        ({"backend": "nccl"}, {}, "takes weights by nccl, expected remax"),
        ({"backend": None}, {}, "takes weights by nothing"),
        ({"vocab_size": 50}, {}, "a smaller vocabulary than the 96 tokens of the"),
        ({"max_model_len": 10}, {}, r"takes 10 tokens, and prompts of 5 .* have 11; start it with --max-model-len 11"),
        ({}, {"served_model": "other"}, "serves 'policy', not .*served_model 'other'"),
        ({"key": "secret"}, {}, "asks for a key; name the environment variable"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(
    faults: dict[str, Any], options: dict[str, Any], message: str, model: Any, serve: Any, tmp_path: Path
) -> None:
    engine = engine_for(tmp_path, serve(**faults), **options)
    with pytest.raises(UserError, match=message):
        engine.check(model, request_for().sampling, 5)


def test_the_doctor_tells_what_the_servers_are(model: Any, serve: Any, tmp_path: Path) -> None:
    from remax_lightning.tools.doctor.command import check_models

    engine = engine_for(tmp_path, serve())
    engine.check(model, request_for().sampling, 5)
    worker = SimpleNamespace(engine=engine)
    module = SimpleNamespace(trained_model=model, device="cpu", worker=worker)
    context: Any = SimpleNamespace(module=module, load_models=lambda: None, note="")
    assert check_models(context).measured.endswith("vLLM 0.32.0, policy in float32, 128 tokens, raw_logprobs")


ASKED_AT_START = ("/v1/models", "/server_info", "/weight_info", "/inference/v1/generate")
ASKED_FOR_WEIGHTS = ("/pause", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights",
                     "/finish_weight_update", "/weight_checker")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("path", [*ASKED_AT_START, *ASKED_FOR_WEIGHTS])
def test_a_server_that_is_busy_is_asked_again_and_then_named(path: str, model: Any, serve: Any, tmp_path: Path) -> None:
    """Whatever it is asked: one that starts answers 503 here and there."""
    server = serve()
    server.statuses[path] = [503]
    engine = engine_for(tmp_path, server)
    engine.check(model, request_for().sampling, 5)
    engine.generate(model, request_for())
    assert engine.describe()[0].startswith(server.url)
    server = serve()
    server.statuses[path] = [503] * 100
    with pytest.raises(UserError, match=rf"the server {server.url} .* in 1 tries \(.*retries\): status 503: not now"):
        engine_for(tmp_path / "other", server, retries=0).generate(model, request_for())


@pytest.mark.parametrize("path", [*ASKED_AT_START, "/weight_checker"])
def test_an_answer_of_something_else_is_told(path: str, model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve()
    engine = engine_for(tmp_path, server, retries=0)
    if path == "/inference/v1/generate":  # its content is read with the responses
        engine.check(model, request_for().sampling, 5)
    server.blank = path
    with pytest.raises(UserError, match=rf"the server {server.url} answered {path}\S* without .*is it a vLLM server"):
        engine.generate(model, request_for())


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ({"token_ids": None}, "token_ids None"),
        ({"token_ids": ["5"]}, r"token_ids \['5'\]"),
        ({"token_ids": [5, -1]}, r"token_ids \[5, -1\]"),
        ({"logprob": None}, r"\{'token_id': \d+, 'logprob': None\} in logprobs\.content"),
        ({"token_id": "5"}, r"\{'token_id': '5', .*\} in logprobs\.content"),
    ],
)
def test_ids_and_log_probs_that_are_no_numbers_are_told(
    broken: dict[str, Any], named: str, model: Any, serve: Any, tmp_path: Path
) -> None:
    server = serve()
    engine = engine_for(tmp_path, server, retries=0)
    engine.check(model, request_for().sampling, 5)
    server.breaks = broken
    with pytest.raises(
        UserError, match=rf"the server {server.url} answered /inference/v1/generate with {named}; is it"
    ):
        engine.generate(model, request_for(return_log_probs=True))


def certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate for 127.0.0.1 that signs itself, and what a server needs of it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a")])
    now, address = datetime.datetime.now(datetime.UTC), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    signed = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False).sign(key, hashes.SHA256())
    public, private = folder / "public.pem", folder / "private.pem"
    public.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    kinds = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, *kinds))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    return public, context


def test_a_certificate_is_checked_with_the_file_that_is_named(
    model: Any, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public, context = certificate(tmp_path)
    server = serve(tls=context)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # counts only where no file is named
        monkeypatch.setenv(name, certifi.where())
    with pytest.raises(UserError, match=r"the server https://.* has a certificate that cannot be checked .*ca_file"):
        engine_for(tmp_path, server).check(model, request_for().sampling, 5)
    with pytest.raises(UserError, match=r"the server https://.*cannot be asked: .*nowhere.pem"):
        engine_for(tmp_path, server, ca_file=str(tmp_path / "nowhere.pem")).check(model, request_for().sampling, 5)
    output = engine_for(tmp_path, server, ca_file=str(public)).generate(model, request_for())
    assert output.sampled_ids.shape == (4, 6)


@pytest.mark.slow(0.3)
def test_log_probs_of_another_kind_are_refused(model: Any, serve: Any, tmp_path: Path) -> None:
    sampling = SamplingConfig(max_response_length=6, temperature=0.7)
    with pytest.raises(UserError, match=r"returns raw_logprobs, .* start it with --logprobs-mode processed_logprobs"):
        engine_for(tmp_path, serve()).check(model, sampling, 5)
    engine_for(tmp_path, serve(logprobs_mode="processed_logprobs")).check(model, sampling, 5)


def test_an_adapter_needs_a_server_that_takes_some(model: Any, serve: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match=r"takes no adapters, and model\.policy\.lora trains one"):
        engine_for(tmp_path, serve()).check(adapted, request_for().sampling, 5)


@pytest.mark.slow(0.3)
def test_a_key_comes_from_the_environment(
    model: Any, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="api_key_env: the environment variable VLLM_TEST_KEY is not set"):
        VLLMEngine(["http://localhost:1"], api_key_env="VLLM_TEST_KEY")
    server = serve(key="secret")
    monkeypatch.setenv("VLLM_TEST_KEY", "wrong")
    with pytest.raises(UserError, match="refuses VLLM_TEST_KEY"):
        engine_for(tmp_path, server, api_key_env="VLLM_TEST_KEY").check(model, request_for().sampling, 5)
    monkeypatch.setenv("VLLM_TEST_KEY", "secret")
    engine_for(tmp_path, server, api_key_env="VLLM_TEST_KEY").generate(model, request_for())


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ([], "urls must be a list of at least one URL"),
        (["node7:8000"], "urls must begin with http:// or https:// and a host, got 'node7:8000'"),
        (["http://me:secret@node7:8000"], "urls must hold no name or password, .* at node7; .*api_key_env"),
        (["http://node7:8000", "http://node7:8000"], "urls must be different servers"),
    ],
)
def test_urls_that_are_none_are_refused(urls: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VLLMEngine(urls)


@pytest.mark.slow(0.3)
def test_a_port_where_nothing_listens_is_told(model: Any, tmp_path: Path) -> None:
    engine = VLLMEngine(["http://127.0.0.1:9"], transfer_dir=str(tmp_path), restart_timeout=0.3)
    with pytest.raises(UserError, match=r"the server http://127.0.0.1:9 does not answer since 0.3 s .*refused"):
        engine.check(model, SamplingConfig(max_response_length=6), 5)


def test_another_kind_of_server_is_told(model: Any, tmp_path: Path) -> None:
    from helpers.openai_server import OpenAIServer

    with OpenAIServer(lambda text: text) as server:
        engine = VLLMEngine([server.url], transfer_dir=str(tmp_path), restart_timeout=0.3)
        with pytest.raises(UserError, match=r"the server http://127.0.0.1:\d+ "):
            engine.check(model, SamplingConfig(max_response_length=6), 5)


def test_a_plain_server_under_https_is_told(model: Any, serve: Any, tmp_path: Path) -> None:
    url = serve().url.replace("http://", "https://")
    engine = VLLMEngine([url], transfer_dir=str(tmp_path), restart_timeout=0.3)
    with pytest.raises(UserError, match=r"the server https://127.0.0.1:\d+ .*(certificate|answer)"):
        engine.check(model, SamplingConfig(max_response_length=6), 5)


@pytest.mark.parametrize("name", ["concurrency", "timeout", "transfer_timeout"])
def test_a_number_out_of_its_range_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"model.rollout.init_args.{name} must be"):
        VLLMEngine(["http://localhost:1"], **{name: 0})


# ---- Runs ----


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoRAConfig(r=2, target_modules=["q_proj", "v_proj"])])
def test_a_run_trains_with_corrected_responses(lora: Any, policy: str, serve: Any, tmp_path: Path) -> None:
    server = serve(has_lora=lora is not None)
    module = remax_module(
        ModelConfig(policy, lora=lora),
        rollout=engine_for(tmp_path, server),
        loss=LossConfig(mismatch=MismatchConfig("tis")),
        check_on_policy=True,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    data = prompt_data(tmp_path, policy, val_path=None)
    recorder = fit(module, data, tmp_path, max_steps=3, max_epochs=3)
    assert len(recorder.logged) == 3
    for logged in recorder.logged:
        assert logged["train/mismatch_kl"] < 1e-6
        assert logged["train/mismatch_ratio_max"] == pytest.approx(1, abs=1e-3)
    assert recorder.logged[1]["rollout/weight_sync_bytes"] > 0
    assert recorder.logged[1]["time/weight_sync_s"] > 0
    assert EARLY_ENDS
