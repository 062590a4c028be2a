"""`VLLMEngine` with `mode: colocate`: a server of its own in a child process, which a small one stands in for here."""

from __future__ import annotations

import gc
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from helpers.vllm_server import FakeVLLM, engine_for, request_for, shake
from helpers.waiting import wait_until
from peft import LoraConfig, get_peft_model

from remax_lightning.errors import UserError
from remax_lightning.models import LoRAConfig, ModelConfig
from remax_lightning.rollout import VLLMEngine, vllm_broadcast
from remax_lightning.rollout.vllm_plugin.remax_vllm_group import SharedBuffer, open_shared
from remax_lightning.rollout.vllm_process import ServerProcess

LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def program(folder: Path, lines: str) -> str:
    """A program in place of Python: it writes its arguments down, and does what the lines say."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "python"
    path.write_text(f'#!/bin/sh\necho "$@" >> {folder}/arguments\n{lines}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def colocated(folder: Path, lines: str, **options: Any) -> VLLMEngine:
    defaults = {"transfer_dir": str(folder / "weights"), "restart_timeout": 60.0, "retries": 2}
    return VLLMEngine(mode="colocate", python=program(folder, lines), **(defaults | options))


def children(engine: VLLMEngine, folder: Path) -> int:
    return len((folder / "arguments").read_text().splitlines())


@pytest.fixture
def started(loaded: Any, tmp_path: Path) -> Iterator[Callable[..., tuple[VLLMEngine, FakeVLLM]]]:
    """A function that returns an engine whose child only sleeps, and what answers at the child's port."""
    engines: list[tuple[VLLMEngine, FakeVLLM]] = []

    def start(transfer: str = "files", **faults: Any) -> tuple[VLLMEngine, FakeVLLM]:
        engine = colocated(tmp_path, "exec sleep 100", transfer=transfer)
        port = int(engine.servers[0].url.rpartition(":")[2])
        engines.append((engine, FakeVLLM(loaded, make_tokenizer(), port=port, **faults).__enter__()))
        return engines[-1]

    yield start
    for engine, server in engines:
        engine.close()
        server.__exit__()


@pytest.mark.slow
def test_it_starts_a_server_for_the_policy(started: Any, model: Any, serve: Any, tmp_path: Path) -> None:
    engine, _ = started()
    output = engine.generate(model, request_for())
    expected = engine_for(tmp_path / "other", serve()).generate(model, request_for())
    assert torch.equal(output.sampled_ids, expected.sampled_ids)
    [arguments] = (tmp_path / "arguments").read_text().splitlines()
    assert arguments.startswith(f"-m remax_vllm_serve serve {model.name_or_path} --host 127.0.0.1 --port ")
    assert "--dtype float32" in arguments
    assert "--max-model-len 11" in arguments  # the longest prompt has 5 tokens, a response 6
    assert "--enable-sleep-mode" not in arguments  # there is none on a CPU


@pytest.mark.slow(0.3)
def test_it_serves_what_remax_serve_would(started: Any, model: Any, tmp_path: Path) -> None:
    """The source of the policy, and the dtype that the trainer computes in, not that of the weights."""
    engine, _ = started()
    source = ModelConfig("hub/policy", revision="v2", trust_remote_code=True, from_scratch=True, lora=LoRAConfig(r=12))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match="takes no adapters"):
        engine.check(get_peft_model(model, LORA), request_for().sampling, 5, source, "hub/tokenizer")
    [arguments] = (tmp_path / "arguments").read_text().splitlines()
    expected = "--dtype bfloat16", "--max-lora-rank 16", "--tokenizer hub/tokenizer", "--revision v2"
    for part in (" serve hub/policy ", *expected, "--trust-remote-code", "--load-format dummy"):
        assert part in arguments


@pytest.mark.slow
def test_the_server_sleeps_but_for_rollouts(started: Any, model: Any) -> None:
    engine, server = started()
    for _ in range(2):
        engine.generate(model, request_for())
        assert server.awake == set()
        shake(model)
    order = ("/wake_up", "/update_weights", "/inference/v1/generate", "/sleep")
    paths = [path for path in server.paths if path in order]
    paths = [path for index, path in enumerate(paths) if index == 0 or path != paths[index - 1]]
    # The weights wake up first, are updated, and then keys and values get their memory.
    step = ["/wake_up", "/update_weights", "/wake_up", "/inference/v1/generate", "/sleep"]
    assert paths == ["/inference/v1/generate", *step, *step]  # the first asks whether it knows the vocabulary


def test_a_server_that_is_killed_is_started_again(started: Any, model: Any, tmp_path: Path) -> None:
    engine, server = started()
    expected = engine.generate(model, request_for())
    server.dies_after = 3

    def come_back() -> None:
        os.killpg(engine.process.pid, signal.SIGKILL)
        wait_until(lambda: children(engine, tmp_path) == 2)  # what answers in its place must not come before it
        server.restart()

    server.on_death = come_back
    output = engine.generate(model, request_for())
    assert torch.equal(output.sampled_ids, expected.sampled_ids)
    assert children(engine, tmp_path) == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_server_reads_whole_weights_in_the_trainers_memory(
    dtype: torch.dtype, started: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_broadcast, "_BUFFER", 20_000)  # of 96 * 32 * 4 bytes and more for a tensor
    engine, server = started("ipc", dtype=str(dtype).removeprefix("torch."))
    for _ in range(2):
        shake(model, 0.02)
        engine.generate(model, request_for())
        for held, value in zip(server.base.parameters(), model.parameters(), strict=True):
            assert torch.equal(held, value.to(dtype).float())
        assert 2 * server.paths.count("/finish_weight_update") < server.paths.count("/update_weights")
    assert engine.metrics()["rollout/weight_sync_bytes"] == sum(
        value.numel() * dtype.itemsize for value in model.parameters()
    )
    assert not list(tmp_path.glob("weights/*/*.safetensors"))
    # ---- A server that comes back gets them anew, in the middle of a rollout ----
    if dtype == torch.float32:
        expected = engine.generate(model, request_for(seed=3))
        server.dies_after, server.on_death = 3, server.restart
        assert torch.equal(engine.generate(model, request_for(seed=3)).sampled_ids, expected.sampled_ids)


@pytest.mark.slow(0.3)
def test_weights_in_memory_are_proven_by_their_checksums(started: Any, model: Any) -> None:
    names = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    engine, _ = started("ipc", permutes=names)
    with pytest.raises(UserError, match=r"2 of \d+ tensors are others: model.layers.0.mlp.gate_up_proj.weight"):
        engine.generate(model, request_for())


@pytest.mark.slow
def test_an_adapter_travels_in_files_also_where_memory_is_shared(started: Any, model: Any) -> None:
    engine, server = started("ipc", has_lora=True)
    engine.generate(get_peft_model(model, LORA), request_for())
    assert len(server.adapters) == 1
    assert "/update_weights" not in server.paths


def test_handles_of_cuda_memory_are_plain_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a CPU goes: what torch hands over for another process arrives there, with the device as it calls it."""
    sent = (torch.Tensor, (8,), (1,), 2, torch.storage.TypedStorage, torch.uint8, 5, b"handle", 16, 4, False,
            b"counter", 3, b"event", True)  # fmt: skip
    received: list[Any] = []
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.multiprocessing.reductions, "reduce_tensor", lambda _: (None, sent))
    monkeypatch.setattr(torch.multiprocessing.reductions, "rebuild_cuda_tensor", lambda *given: received.extend(given))
    buffer: Any = object.__new__(SharedBuffer)
    buffer.device, buffer.values, buffer._file = torch.device("cuda", 5), torch.zeros(8, dtype=torch.uint8), None
    open_shared(json.loads(json.dumps(buffer.facts())), torch.device("cuda", 0))
    assert received == [*sent[:6], 0, *sent[7:]]


@pytest.mark.slow(0.3)
def test_a_server_that_cannot_start_ends_the_run_with_its_last_words(model: Any, tmp_path: Path) -> None:
    words = "(EngineCore pid=9) ERROR 11-28 00:10:01 [core.py:12] ValueError: no memory for keys and values"
    last = "RuntimeError: Engine core initialization failed. See root cause above."
    engine = colocated(tmp_path, f'echo "{words}" >&2; echo "{last}"; echo "bye"; exit 3', retries=1)
    with pytest.raises(UserError, match=r"ended with code 3: ValueError: no memory for keys and values; its log is"):
        engine.generate(model, request_for())
    assert children(engine, tmp_path) == 2
    engine.process.log.unlink()  # it is for the user
    with pytest.raises(UserError, match=r"python: there is no 'nowhere/python'; install vLLM in an environment"):
        VLLMEngine(mode="colocate", python="nowhere/python").generate(model, request_for())


def test_the_server_ends_with_the_trainer(tmp_path: Path) -> None:
    """Also where that is killed: the kernel tells the child, which runs what vLLM's environment has in its place."""
    package = tmp_path / "vllm/entrypoints/cli"
    package.mkdir(parents=True)
    (package / "main.py").write_text("import time\ndef main():\n    print('up', flush=True)\n    time.sleep(100)\n")
    code = (
        "import os, sys, threading, time\n"
        "from remax_lightning.rollout.vllm_process import ServerProcess\n"
        "process = ServerProcess([sys.executable, '-m', 'remax_vllm_serve'], None, 0, None)\n"
        "def start():\n"  # as a thread does whose request has found it gone
        "    process.start()\n"
        "    while 'up' not in process.log.read_text(): time.sleep(0.01)\n"
        "thread = threading.Thread(target=start)\n"
        "thread.start()\n"
        "thread.join()\n"
        "print(process.pid, process.log, flush=True)\n"
        "time.sleep(100)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert trainer.stdout is not None
    pid, log = trainer.stdout.readline().split()
    assert not wait_until(lambda: not living(int(pid)), 1.0), "it ended with the thread that started it"
    trainer.kill()
    trainer.wait()
    assert wait_until(lambda: not living(int(pid)))
    Path(log).unlink()


def living(group: int) -> list[str]:
    """The processes of a group that have not ended; nobody may have waited for those that have."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            stats.append(path.read_text().rpartition(")")[2].split())
    return [stat[0] for stat in stats if stat[2] == str(group) and stat[0] != "Z"]


@pytest.mark.slow
def test_the_server_ends_with_the_engine(loaded: Any, model: Any, tmp_path: Path) -> None:
    """Not only with the process: a second run in it would have the memory of two."""
    engine = colocated(tmp_path, "exec sleep 100")
    with FakeVLLM(loaded, make_tokenizer(), port=int(engine.servers[0].url.rpartition(":")[2])):
        engine.check(model, request_for().sampling, 5)
    group = engine.process.pid
    assert living(group)
    del engine
    gc.collect()
    assert not living(group)


def test_an_end_leaves_neither_process_nor_log(tmp_path: Path) -> None:
    process = ServerProcess([program(tmp_path, "sleep 100 & sleep 100"), "serve"], None, 0, None)
    process.start()
    process.start()  # it runs
    assert wait_until((tmp_path / "arguments").exists)
    group = process.pid
    process.stop()
    assert not process.log.exists()
    assert wait_until(lambda: not living(group))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": ["http://localhost:1"]}, "urls must be null with mode colocate"),
        ({"ahead": 1}, "ahead must be 0 with mode colocate"),
        ({"mode": "server", "urls": ["http://localhost:1"], "server_args": []}, "server_args must be null without"),
        ({"mode": "both"}, "mode must be one of server, colocate, got both"),
        ({"transfer": "broadcast"}, "transfer must be files or ipc with mode colocate"),
        ({"mode": "server", "urls": ["http://localhost:1"], "transfer": "ipc"}, "files or broadcast without mode"),
        ({"transfer": "nccl"}, "transfer must be one of files, broadcast, ipc, got nccl"),
        ({"server_args": ["--gpu-memory-utilization", "40"]}, "gpu-memory-utilization must be above 0 .* got '40'"),
        ({"server_args": ["--gpu_memory_utilization=x"]}, "gpu-memory-utilization must be above 0 .* got 'x'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VLLMEngine(**({"mode": "colocate"} | options))
