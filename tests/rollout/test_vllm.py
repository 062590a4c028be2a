"""`VLLMEngine` against a small server with vLLM's endpoints: requests, weights, restarts, proofs and errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from helpers.training import EARLY_ENDS, fit, prompt_data, remax_module, save_policy
from helpers.vllm_server import FakeVLLM

from remax_lightning.config import LossConfig, MismatchConfig
from remax_lightning.errors import UserError
from remax_lightning.models import LoRAConfig, ModelConfig
from remax_lightning.rollout import (
    AutoEngine,
    GenerationRequest,
    PairedEngine,
    SamplingConfig,
    VLLMEngine,
    clone_engine,
)
from remax_lightning.rollout.base import stop_string_check
from remax_lightning.rollout.vllm_weights import weight_version

PROMPTS = [[5, 9, 20], [7], [30, 31, 32, 33, 34], [8, 8]]
ENDS = [2, *range(4, 30)]
"""So many that responses are short: the server's model decodes without a cache."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def loaded(policy: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(policy).eval()


@pytest.fixture
def model(loaded: Any) -> Any:
    return deepcopy(loaded)


@pytest.fixture
def serve(loaded: Any) -> Iterator[Callable[..., FakeVLLM]]:
    servers: list[FakeVLLM] = []

    def start(**faults: Any) -> FakeVLLM:
        servers.append(FakeVLLM(loaded, make_tokenizer(), **faults).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


def engine_for(folder: Path, *servers: FakeVLLM, **options: Any) -> VLLMEngine:
    defaults = {"transfer_dir": str(folder / "weights"), "restart_timeout": 60.0, "timeout": 60.0, "retries": 2}
    return VLLMEngine([server.url for server in servers], **(defaults | options))


def request_for(num_samples: int = 1, seed: int = 0, **options: Any) -> GenerationRequest:
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[3] * (longest - len(row)) + row for row in PROMPTS])
    mask = torch.arange(longest) >= longest - torch.tensor([[len(row)] for row in PROMPTS])
    fields = {"max_response_length": 6, "num_samples": num_samples}
    sampling = SamplingConfig(
        **(fields | {name: options.pop(name) for name in list(options) if hasattr(SamplingConfig, name)})
    )
    defaults: dict[str, Any] = {"eos_ids": ENDS, "pad_id": 3, "return_log_probs": True}
    return GenerationRequest(ids, mask, sampling, generator=torch.Generator().manual_seed(seed), **(defaults | options))


def shake(model: Any, size: float = 0.1) -> None:
    """Change every weight, as an optimizer step does."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


# ---- Requests and responses ----


def test_greedy_responses_are_those_of_the_own_engine(model: Any, serve: Any, tmp_path: Path) -> None:
    engine = engine_for(tmp_path, serve())
    for step in range(2):
        request = request_for(seed=step)
        theirs, ours = engine.generate(model, request), PairedEngine().generate(model, request_for(seed=step))
        ends = torch.isin(ours.greedy_ids, torch.tensor(ENDS)).cumsum(1)
        mask = ends - torch.isin(ours.greedy_ids, torch.tensor(ENDS)).long() == 0
        assert torch.equal(theirs.greedy_ids.where(mask, 0), ours.greedy_ids.where(mask, 0))
        shake(model)  # the servers follow


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


def test_sampled_and_greedy_requests_are_under_way_together(model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve(gathers=5)
    engine_for(tmp_path, server).generate(model, request_for())
    assert server.most_at_once > 4  # of 8
    assert sum(body["sampling_params"]["temperature"] == 0 for body in server.requests[1:]) == 4


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


def test_prompts_are_spread_by_their_tokens(model: Any, serve: Any, tmp_path: Path) -> None:
    servers = [serve(), serve()]
    engine_for(tmp_path, *servers).generate(model, request_for())
    prompts = [{tuple(body["token_ids"]) for body in server.requests[1:]} for server in servers]
    assert len(prompts[0]) == len(prompts[1]) == 2
    assert not prompts[0] & prompts[1]  # all rows of a prompt are on one server


def test_the_reference_of_an_evaluation_decodes_in_the_trainer(tmp_path: Path) -> None:
    assert type(clone_engine(VLLMEngine(["http://localhost:1"]))) is AutoEngine


# ---- Weights ----


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


def test_the_files_go_when_the_run_ends(
    model: Any, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    engine_for(tmp_path, serve()).generate(model, request_for())
    assert [path.name for path in (tmp_path / "weights").iterdir() if path.is_dir()] == [weight_version(model)]
    for call in at_exit:
        call()
    assert not [path for path in (tmp_path / "weights").iterdir() if path.is_dir()]


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


def test_a_server_that_restarts_between_rollouts_gets_the_weights_anew(model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve()
    engine = engine_for(tmp_path, server)
    shake(model)
    first = engine.generate(model, request_for())
    server.restart()
    assert torch.equal(engine.generate(model, request_for()).sampled_ids, first.sampled_ids)


def test_a_server_that_stays_away_ends_the_run(model: Any, serve: Any, tmp_path: Path) -> None:
    engine = engine_for(tmp_path, serve(dies_after=4), restart_timeout=0.5)
    with pytest.raises(UserError, match=r"the server http://.* does not answer since 0.5 s .*restart_timeout"):
        engine.generate(model, request_for())


@pytest.mark.parametrize("status", [429, 500])
def test_only_what_was_refused_is_asked_for_again(status: int, model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve()
    server.statuses["/inference/v1/generate"] = [200, status, status]
    engine_for(tmp_path, server).generate(model, request_for())
    assert server.paths.count("/inference/v1/generate") == 1 + 8 + 2
    server.statuses["/inference/v1/generate"] = [200] + [status] * 100
    with pytest.raises(UserError, match=rf"gave no response in 3 tries .*retries.* status {status}"):
        engine_for(tmp_path, server).generate(model, request_for())


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


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_holds_or_samples_another_policy_ends_the_run(
    fault: str, model: Any, serve: Any, tmp_path: Path
) -> None:
    shake(model)
    faults, message = FAULTS[fault]
    with pytest.raises(UserError, match=message):
        engine_for(tmp_path, serve(**faults), retries=1).generate(model, request_for())


@pytest.mark.parametrize("fault", ["updated in name only", "a permuted layer"])
def test_log_probs_find_what_checksums_would(fault: str, model: Any, serve: Any, tmp_path: Path) -> None:
    shake(model, 0.3)
    engine = engine_for(tmp_path, serve(**FAULTS[fault][0]), checksums=False)
    with pytest.raises(UserError, match=r"log-probs that differ .* it holds other weights"):
        engine.generate(model, request_for(num_samples=2))


def test_samples_of_another_temperature_are_noticed_by_their_likelihood(model: Any, serve: Any, tmp_path: Path) -> None:
    engine = engine_for(tmp_path, serve(samples_at=0.3), prove_responses=100)
    with pytest.raises(UserError, match="more likely than draws of the policy"):
        engine.generate(model, request_for(num_samples=8, eos_ids=[2]))


def test_the_first_update_is_proven_and_then_every_so_many_rollouts(model: Any, serve: Any, tmp_path: Path) -> None:
    engine, proven = engine_for(tmp_path, serve(), prove_every=4, prove_responses=2), []
    for step in range(5):
        if step in (1, 2):
            shake(model, 0.01)
        engine.generate(model, request_for())
        proven.append("rollout/log_prob_gap" in engine.metrics())
    assert proven == [True, True, False, False, True]


# ---- Mistakes, before training ----


@pytest.mark.parametrize(
    ("faults", "options", "message"),
    [
        ({"dev_mode": False}, {}, "has no endpoints for weights; start it with `remax serve`"),
        ({"scale_out": False}, {}, "status 403: Scale-out endpoints are disabled. Restart with --enable-scale-out"),
        ({"backend": "nccl"}, {}, "takes weights by nccl, expected remax_files"),
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
    ],
)
def test_urls_that_are_none_are_refused(urls: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VLLMEngine(urls)


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


@pytest.mark.parametrize("name", ["concurrency", "timeout", "transfer_timeout", "prove_every", "prove_responses"])
def test_a_number_out_of_its_range_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"model.rollout.init_args.{name} must be"):
        VLLMEngine(["http://localhost:1"], **{name: 0})


# ---- Runs ----


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
