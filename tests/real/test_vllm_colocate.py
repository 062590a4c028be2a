"""The real vLLM, for CPUs, in child processes of the engine (`mode: colocate`) and of the benchmark."""

from __future__ import annotations

import importlib
import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.vllm_ranks import colocate
from helpers.ranks import launch
from helpers.vllm_real import ROOT, train
from helpers.waiting import wait_until
from lightning.pytorch import Callback

from remax_lightning.config import MismatchConfig
from remax_lightning.errors import UserError
from remax_lightning.rollout import GenerationRequest, ProofConfig, SamplingConfig, VLLMEngine, vllm_broadcast

pytestmark = pytest.mark.vllm


def test_a_server_of_the_engines_own(
    vllm_python: str, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed in the run, and gone behind it."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    arguments = ["--enforce-eager", "--max-num-seqs", "64"]
    options = {"transfer_dir": str(tmp_path / "weights"), "restart_timeout": 600.0, "server_args": arguments}
    engine = VLLMEngine(mode="colocate", python=vllm_python, **options)

    class Kill(Callback):
        """Kills the server between two steps."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 1:
                os.killpg(engine.process.pid, signal.SIGKILL)
            self.pid = engine.process.pid

    kill = Kill()
    ours = train(smollm2, True, tmp_path, engine, MismatchConfig("tis"), steps=3, callbacks=[kill])
    assert len(ours.logged) == 3
    assert all(logged["train/mismatch_kl"] < 1e-6 for logged in ours.logged)
    engine.close()
    # Nobody may have waited for its workers, but none computes any more; the system takes its time over gigabytes.
    assert wait_until(lambda: not _computing(kill.pid))


def _computing(group: int) -> list[str]:
    """Return the states of the processes of a group, without those that have ended."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            stats.append(path.read_text().rpartition(")")[2].split())
    return [stat[0] for stat in stats if stat[2] == str(group) and stat[0] != "Z"]


@pytest.mark.parametrize(
    ("family", "options", "transfer"), [("qwen3", {"tie_word_embeddings": False}, "ipc"), ("phi3", {}, "files")]
)
def test_weights_of_other_families_reach_the_server(
    family: str,
    options: dict[str, Any],
    transfer: Any,
    vllm_python: str,
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under their names, in layers that vLLM stacks, and with a head of their own: every rollout is proven."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setattr(vllm_broadcast, "_BUFFER", 2**20)
    model = AutoModelForCausalLM.from_pretrained(tiny(family, **options), dtype=torch.float32).eval()
    engine = VLLMEngine(
        mode="colocate", python=vllm_python, transfer_dir=str(tmp_path / "weights"), restart_timeout=600.0,
        server_args=["--enforce-eager", "--max-num-seqs", "16"], proof=ProofConfig(every=1),
        transfer=transfer,
    )  # fmt: skip
    ids = torch.randint(1000, 40000, (4, 8), generator=torch.Generator().manual_seed(0))
    for seed in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        mask, generator = torch.ones_like(ids, dtype=torch.bool), torch.Generator().manual_seed(seed)
        request = GenerationRequest(ids, mask, SamplingConfig(max_response_length=8), [2], 2, generator)
        engine.generate(model, request)
        assert engine.metrics()["rollout/log_prob_gap"] < 1e-3
    engine.close()


def test_two_ranks_have_a_server_each(
    vllm_python: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both get the weights of the policy that the ranks share, and every rank's responses are of these."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    policy = str(tiny("llama"))  # two servers and two trainers of a real one would not fit into 16 GB
    launch(colocate, vllm_python, policy, tmp_path / "run", fresh="servers inherit their environment")
    first, second = (json.loads((tmp_path / "run" / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["url"] != second["url"]
    assert first["version"] == second["version"]
    for logged in (first, second):
        assert logged["train/mismatch_kl"] < 1e-6
        assert logged["train/mismatch_ratio_max"] == pytest.approx(1, abs=1e-2)


def test_a_server_without_room_says_so(vllm_python: str, smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")  # GiB
    engine = VLLMEngine(mode="colocate", python=vllm_python, retries=0, server_args=["--enforce-eager"])
    with pytest.raises(
        UserError, match=r"ended with code 1: \w+Error: .*less than requested memory for kv .*; its log"
    ):
        engine.check(model, SamplingConfig(max_response_length=64), 64)
    engine.process.log.unlink()
    engine.close()


@pytest.mark.parametrize("parts", [("fixed", "uneven", "updates", "steps"), ("ahead",)], ids=lambda parts: parts[0])
def test_the_benchmark_measures_every_part(
    parts: tuple[str, ...], vllm_python: str, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    results = tmp_path / "results.jsonl"
    options = ["--python", vllm_python, "--policy", str(smollm2), "--length", "4", "--repetitions", "1"]
    importlib.import_module("vllm_rollout").main([*options, "--parts", *parts, "--results", str(results)])
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    if parts == ("ahead",):
        assert {line["variant"] for line in lines} == {"ahead 0", "ahead 1"}
        return
    updates = {line["variant"]: line["bytes"] for line in lines if line.get("phase") == "update"}
    assert updates["all weights"] > 500e6
    assert updates["adapter"] < 50e6
    ways = {(line["variant"], line["lengths"]) for line in lines if "lengths" in line}
    assert ways == {(way, kind) for way in ("vllm", "ours", "two generate calls") for kind in ("fixed", "uneven")}
    [step] = [line for line in lines if line.get("phase") == "step"]
    assert 0 < step["overhead"] < 1
