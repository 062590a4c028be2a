"""`VLLMEngine` and servers that are slow, restart as others, stand behind proxies, or do not fit the policy."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import fit, prompt_data, remax_module
from helpers.vllm_server import GENERATE, engine_for, request_for, shake
from helpers.waiting import wait_until
from peft import LoraConfig, get_peft_model

from remax_lightning.config import LossConfig, MismatchConfig
from remax_lightning.errors import UserError
from remax_lightning.rollout import ProofConfig, VLLMEngine, vllm_weights
from remax_lightning.rollout.vllm_broadcast import FileTransfer
from remax_lightning.rollout.vllm_files import WeightFiles
from remax_lightning.rollout.vllm_weights import WeightSync


def sync_for(engine: VLLMEngine, folder: Path, timeout: float = 60.0, *, on_each_node: bool = False) -> WeightSync:
    """What brings the servers of an engine up to date, on another machine with a folder of its own."""
    return WeightSync(engine.servers, WeightFiles(folder), FileTransfer(), timeout, on_each_node, lambda _: None, None)


# ---- Answers ----


@pytest.mark.slow
def test_answers_may_come_in_any_order(model: Any, serve: Any, tmp_path: Path) -> None:
    expected = engine_for(tmp_path, serve()).generate(model, request_for())
    server = serve(delays=(0.2, 0.0, 0.15, 0.05, 0.1))
    output = engine_for(tmp_path / "other", server).generate(model, request_for())
    assert server.most_at_once > 1
    assert torch.equal(output.sampled_ids, expected.sampled_ids)
    assert torch.equal(output.greedy_ids, expected.greedy_ids)


@pytest.mark.slow(0.3)
def test_a_response_that_the_server_cut_ends_the_run(model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve()
    engine = engine_for(tmp_path, server)
    engine.check(model, request_for().sampling, 5)
    server.ends = [("length", 1)]
    with pytest.raises(UserError, match=r"cut a response after 1 of .*max_response_length 6 tokens; start the servers"):
        engine.generate(model, request_for(eos_ids=[2]))


@pytest.mark.slow(0.3)
def test_a_response_that_ends_where_none_does_ends_the_run(model: Any, serve: Any, tmp_path: Path) -> None:
    """A server may have ends of its own; what pads the row behind would be trained on."""
    server = serve()
    engine = engine_for(tmp_path, server)
    engine.check(model, request_for().sampling, 5)
    server.ends = [("stop", 2)] * 8
    with pytest.raises(UserError, match=r"ended a response of 2 tokens by None behind token \d+, and only 2 and .*end"):
        engine.generate(model, request_for(eos_ids=[2]))


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_response_that_the_server_gave_up_is_asked_for_again(
    reason: str, model: Any, serve: Any, tmp_path: Path
) -> None:
    expected = engine_for(tmp_path, serve()).generate(model, request_for())
    server = serve()
    engine = engine_for(tmp_path / "other", server)
    engine.check(model, request_for().sampling, 5)
    server.ends = [(reason, 0)]
    assert torch.equal(engine.generate(model, request_for()).sampled_ids, expected.sampled_ids)
    assert len(server.requests) == 1 + 8 + 1
    server.ends = [(reason, 0)] * 100
    with pytest.raises(UserError, match=rf"gave no response in 3 tries .*retries.*: the request ended with '{reason}'"):
        engine.generate(model, request_for(seed=1))


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("fault", ["seconds", "drips"])
def test_a_response_has_a_deadline_up_to_its_last_byte(fault: str, model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve()
    engine = engine_for(tmp_path, server, timeout=0.3, retries=0)
    engine.check(model, request_for().sampling, 5)
    setattr(server, fault, 60.0)
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"gave no response in 1 tries .*: no answer to {GENERATE} within 0.3 s"):
        engine.generate(model, request_for())
    assert time.monotonic() - start < 30


@pytest.mark.slow
def test_a_gateway_may_send_spaces_to_keep_a_connection_open(model: Any, serve: Any, tmp_path: Path) -> None:
    assert engine_for(tmp_path, serve(drips=0.05)).generate(model, request_for()).sampled_ids.shape == (4, 6)


# ---- Servers that come back as others ----

ELSE: dict[str, tuple[dict[str, Any], str]] = {
    "log-probs": ({"logprobs_mode": "processed_logprobs"}, "logprobs mode processed_logprobs, before raw_logprobs"),
    "length": ({"max_model_len": 10}, "max model len 10, before 128"),
    "transfer": ({"backend": None}, "transfer backend None, before remax"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", ELSE)
def test_a_server_that_restarts_as_another_one_is_named(what: str, model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve(dies_after=1 + 8 + 4, back_after=0.2)
    engine = engine_for(tmp_path, server)
    engine.generate(model, request_for())
    changes, message = ELSE[what]

    def come_back_otherwise() -> None:
        for name, value in changes.items():
            setattr(server, name, value)

    server.on_death = come_back_otherwise
    with pytest.raises(UserError, match=rf"{server.url} has restarted as another one: {message}.*; start it as before"):
        engine.generate(model, request_for(seed=1))


@pytest.mark.slow
def test_a_server_with_room_for_more_tokens_may_go_on(model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve()
    engine = engine_for(tmp_path, server)
    engine.generate(model, request_for())
    server.max_model_len = 256
    server.restart()
    engine.generate(model, request_for(seed=1))
    assert server.version == vllm_weights.weight_version(model)


@pytest.mark.slow
def test_the_first_rollout_behind_a_restart_is_proven(model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve()
    engine, proven = engine_for(tmp_path, server, proof=ProofConfig(every=100, responses=2)), []
    for step in range(6):
        if step == 4:
            server.restart()
        shake(model, 0.01)
        engine.generate(model, request_for())
        proven.append("rollout/log_prob_gap" in engine.metrics())
    # The first rollout, the first update, and the restart.
    assert proven == [True, True, False, False, True, False]


# ---- Proxies, names and keys of the environment ----


@pytest.mark.slow(0.3)
def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    model: Any, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    engine_for(tmp_path, serve()).check(model, request_for().sampling, 5)
    other = VLLMEngine(["http://node7.invalid:8000"], transfer_dir=str(tmp_path), restart_timeout=0.1)
    with pytest.raises(
        UserError, match=r"does not answer .*proxy that the environment names fails.*; no_proxy=node7.in"
    ):
        other.check(model, request_for().sampling, 5)


def test_a_netrc_does_not_take_the_place_of_the_key(
    model: Any, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("default login me password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("VLLM_TEST_KEY", "secret")
    engine_for(tmp_path, serve(key="secret"), api_key_env="VLLM_TEST_KEY").check(model, request_for().sampling, 5)


def test_a_redirect_is_told_with_where_it_leads(model: Any, serve: Any, tmp_path: Path) -> None:
    server = serve()
    server.statuses["/v1/models"] = [307]
    with pytest.raises(UserError, match=r"redirects /v1/models to http://elsewhere.invalid/; set .*urls to where it"):
        engine_for(tmp_path, server).check(model, request_for().sampling, 5)


# ---- Servers that do not fit ----


@pytest.mark.parametrize(("rank", "pattern"), [(24, {}), (4, {"q_proj": 24})])
def test_an_adapter_above_the_servers_rank_is_refused(
    rank: int, pattern: dict[str, int], model: Any, serve: Any, tmp_path: Path
) -> None:
    config = LoraConfig(r=rank, rank_pattern=pattern, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    with pytest.raises(UserError, match=r"adapters of rank 16 at most, .*lora has 24; start .* --max-lora-rank 32"):
        engine_for(tmp_path, serve(has_lora=True)).check(adapted, request_for().sampling, 5)
    engine_for(tmp_path, serve(has_lora=True, max_lora_rank=32)).check(adapted, request_for().sampling, 5)


@pytest.mark.slow(0.3)
def test_another_tokenizer_is_refused(policy: str, serve: Any, tmp_path: Path) -> None:
    server = serve(writes=lambda text: text.replace("7", "seven"))
    module = remax_module(policy, rollout=engine_for(tmp_path, server))
    with pytest.raises(UserError, match=rf"{server.url} has another tokenizer than the run: it writes 'seven"):
        fit(module, prompt_data(tmp_path, policy, val_path=None), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("status", [400, 404, 500])
def test_a_server_that_shows_no_tokenizer_is_taken(status: int, policy: str, serve: Any, tmp_path: Path) -> None:
    server = serve(writes=lambda text: text.replace("7", "seven"))
    server.statuses["/detokenize"] = [status]
    module = remax_module(policy, rollout=engine_for(tmp_path, server))
    assert len(fit(module, prompt_data(tmp_path, policy, val_path=None), tmp_path).logged) == 1


# ---- Ranks on other machines ----


@pytest.mark.slow(0.3)
def test_a_rank_that_sees_no_files_goes_on_once_another_one_has_sent_them(
    model: Any, serve: Any, tmp_path: Path
) -> None:
    engine = engine_for(tmp_path, serve())
    elsewhere = sync_for(engine, tmp_path / "node1")
    elsewhere.version = vllm_weights.weight_version(model)
    waiting = threading.Thread(target=elsewhere.bring_up_to_date, args=engine.servers, kwargs={"is_adapter": False})
    waiting.start()
    engine.generate(model, request_for())
    waiting.join(60)
    assert not waiting.is_alive()


@pytest.mark.slow(0.3)
def test_a_folder_that_no_rank_writes_to_is_told(serve: Any, tmp_path: Path) -> None:
    engine = engine_for(tmp_path, serve())
    sync = sync_for(engine, tmp_path / "node1", 0.1)
    sync.version = "0123456789abcdef"
    with pytest.raises(
        UserError, match=r"transfer_dir: no rank has written the weights of version 0123.* within 0.1 s"
    ):
        sync.bring_up_to_date(engine.servers[0], is_adapter=False)


@pytest.mark.slow
def test_the_first_rank_of_each_node_writes_for_the_servers_there(
    model: Any, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 is the only one of its machine; servers that the engine starts see no other one's memory."""
    engine = engine_for(tmp_path, serve())
    for name, value in {
        "rank": lambda: 1,
        "num_ranks": lambda: 2,
        "gather_objects": lambda _: ["node0", "node1"],
    }.items():
        monkeypatch.setattr(vllm_weights, name, value)
    assert sync_for(engine, tmp_path / "node1", on_each_node=True).update(model, None, lambda: None)
    shake(model)
    with pytest.raises(UserError, match="no rank has written"):
        sync_for(engine, tmp_path / "node1", 0.1).update(model, None, lambda: None)


def test_a_disk_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(37, "No locks available")

    (tmp_path / "file").touch()
    none, files = WeightFiles(tmp_path / "file"), WeightFiles(tmp_path)
    with pytest.raises(UserError, match=r"transfer_dir: .*File exists"), none.locked("a"):
        pass
    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match=r"transfer_dir: .*No locks available; set it to"), files.locked("a"):
        pass


# ---- What a run leaves behind ----


@pytest.mark.slow
def test_files_of_equal_weights_stay_until_the_last_run_ends(model: Any, serve: Any, tmp_path: Path) -> None:
    first, second = engine_for(tmp_path, serve()), engine_for(tmp_path, serve())
    for engine in (first, second):
        engine.generate(model, request_for())
    folder = tmp_path / "weights" / vllm_weights.weight_version(model)
    del first, engine
    gc.collect()
    assert list(folder.glob("*.safetensors"))
    del second
    gc.collect()
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [None, 0, 1])
def test_nothing_holds_a_policy_behind_its_run(ahead: int | None, policy: str, serve: Any, tmp_path: Path) -> None:
    """A second run in the same process needs the memory; None is the engine of the trainer."""
    engine = None if ahead is None else engine_for(tmp_path, serve(), ahead=ahead)
    module = remax_module(policy, rollout=engine, loss=LossConfig(mismatch=MismatchConfig("tis")))
    data = prompt_data(tmp_path, policy, batch_size=4, val_path=None)
    assert len(fit(module, data, tmp_path, max_steps=2).logged) == 2
    held = [weakref.ref(value) for value in (module, module.policy, module.engine, module.trainer.optimizers[0])]
    del engine, module, data
    # Threads that were asking a server end with their request.
    assert wait_until(lambda: gc.collect() >= 0 and not any(reference() for reference in held))
    assert not (tmp_path / "weights").is_dir() or not [
        path for path in (tmp_path / "weights").iterdir() if path.is_dir()
    ]


def test_who_sends_weights_anew_ends_with_the_run(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_weights, "_LOOKS_EVERY", 0.01)
    server = serve()
    engine = engine_for(tmp_path, server)
    sync = sync_for(engine, tmp_path, 0.1)
    sync.version = "default"  # the server's
    watcher = threading.Thread(target=vllm_weights.watch, args=(weakref.ref(sync),), daemon=True)
    watcher.start()
    assert wait_until(lambda: "/weight_info" in server.paths)
    del sync
    assert wait_until(lambda: gc.collect() >= 0 and not watcher.is_alive())
