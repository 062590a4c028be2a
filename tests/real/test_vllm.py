"""The real vLLM, for CPUs, in an environment of its own (`make vllm`): training, weights, resuming, servers that die.

The server is started with the command of `remax serve`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distributed.vllm_ranks import colocate
from helpers.ranks import launch
from helpers.training import PROMPTS, CharacterReward, make_trainer, prompt_data, remax_module
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from remax_lightning.config import LossConfig, MismatchConfig
from remax_lightning.errors import UserError
from remax_lightning.models import LoRAConfig, ModelConfig
from remax_lightning.rollout import GenerationOutput, GenerationRequest, SamplingConfig, VLLMEngine
from remax_lightning.tools.serve import DEFAULT_PYTHON, serve_command
from remax_lightning.types import Rollout

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("REMAX_VLLM_PYTHON", ROOT / DEFAULT_PYTHON))
STEPS, LENGTH = 10, 12


class Server:
    """A server in a process group of its own."""

    def __init__(self, folder: Path, policy: Path, lora: bool) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        model = {
            "policy": {"path": str(policy), "dtype": "float32"} | ({"lora": {"r": 8}} if lora else {}),
            "kl_coef": 0.0,
            "reward": "remax_lightning.rewards.exact_match",
            "rollout": {"class_path": "VLLMEngine", "init_args": {"urls": [self.url]}},
            "sampling": {"max_response_length": 64},
        }
        data = {"path": str(folder / "rows.jsonl"), "max_prompt_length": 64}
        (folder / "rows.jsonl").write_text('{"prompt": "Hello"}\n')
        (folder / "serve.yaml").write_text(
            yaml.safe_dump({"model": model, "data": data, "trainer": {"accelerator": "cpu"}})
        )
        extra = ["--enforce-eager", "--max-num-seqs", "64"]
        self.command = serve_command(["--config", str(folder / "serve.yaml")], str(PYTHON), None, None, extra)
        self.log = folder / "server.log"
        self.start()

    def start(self) -> None:
        # No threads beside those of vLLM's own, and little memory for keys and values.
        environment = {**os.environ, **self.command.environment, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        environment["REMAX_VLLM_PARENT"] = str(os.getpid())  # it ends with this process, however that ends
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command.arguments, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self) -> None:
        """End all its processes at once, as the kernel does where memory runs out."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def engine(self, folder: Path, **options: Any) -> VLLMEngine:
        return VLLMEngine([self.url], transfer_dir=str(folder / "weights"), **({"restart_timeout": 180.0} | options))


@pytest.fixture(scope="module", params=["weights", "adapter"])
def server(request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not PYTHON.exists():
        pytest.skip(f"there is no {PYTHON}: run `make vllm`")
    started = Server(tmp_path_factory.mktemp("server"), smollm2, request.param == "adapter")
    yield started
    started.kill()


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    """Policies and optimizers of earlier tests, in cycles with their trainers, are a gigabyte each: free them."""
    yield
    gc.collect()


class Rollouts(Callback):
    """Keeps rollouts and figures of a run, and its weights at the end."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []
        self.logged: list[dict[str, float]] = []
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.rollouts.append(outputs["rollout"])
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trained = ((name, value) for name, value in pl_module.policy.named_parameters() if value.requires_grad)
        self.weights = {name: value.detach().clone() for name, value in trained}


class Replay:
    """An engine that hands out the responses of another run."""

    def __init__(self, rollouts: list[Rollout]) -> None:
        self.rollouts = list(rollouts)

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        rollout: Any = self.rollouts.pop(0)
        return GenerationOutput(rollout.sampled.response_ids, rollout.greedy.response_ids)


def train(
    policy: Path,
    lora: bool,
    folder: Path,
    engine: Any,
    mismatch: MismatchConfig,
    *,
    steps: int = STEPS,
    callbacks: Sequence[Callback] = (),
    checkpoint: Path | None = None,
) -> Rollouts:
    module = remax_module(
        ModelConfig(str(policy), dtype="float32", lora=LoRAConfig(r=8, alpha=16) if lora else None),
        rollout=engine,
        reward=CharacterReward(),
        sampling=SamplingConfig(max_response_length=LENGTH),
        loss=LossConfig(mismatch=mismatch),
        optimizer=partial(torch.optim.SGD, lr=1e-2),
    )
    data = prompt_data(folder, str(policy), PROMPTS[:4], val_path=None)
    recorder = Rollouts()
    torch.manual_seed(0)
    options = {"max_steps": steps, "max_epochs": STEPS, "enable_checkpointing": bool(callbacks)}
    make_trainer(folder, [recorder, *callbacks], **options).fit(module, data, ckpt_path=checkpoint)
    return recorder


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
        saves = ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, every_n_train_steps=1)
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


def test_a_server_of_the_engines_own(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed in the run, and gone behind it."""
    if not PYTHON.exists():
        pytest.skip(f"there is no {PYTHON}: run `make vllm`")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    arguments = ["--enforce-eager", "--max-num-seqs", "64"]
    options = {"transfer_dir": str(tmp_path / "weights"), "restart_timeout": 180.0, "server_args": arguments}
    engine = VLLMEngine(mode="colocate", python=str(PYTHON), **options)

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
    # Nobody may have waited for its workers, but none computes any more.
    stats = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
    assert not [stat for stat in stats if stat[2] == str(kill.pid) and stat[0] != "Z"]


def test_two_ranks_have_a_server_each(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both get the weights of the policy that the ranks share, and every rank's responses are of these."""
    if not PYTHON.exists():
        pytest.skip(f"there is no {PYTHON}: run `make vllm`")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    launch(colocate, str(PYTHON), str(smollm2), tmp_path / "run", fresh="servers inherit their environment")
    first, second = (json.loads((tmp_path / "run" / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["url"] != second["url"]
    assert first["version"] == second["version"]
    for logged in (first, second):
        assert logged["train/mismatch_kl"] < 1e-6
        assert logged["train/mismatch_ratio_max"] == pytest.approx(1, abs=1e-2)


def test_a_server_without_room_says_so(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not PYTHON.exists():
        pytest.skip(f"there is no {PYTHON}: run `make vllm`")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")  # GiB
    engine = VLLMEngine(mode="colocate", python=str(PYTHON), retries=0, server_args=["--enforce-eager"])
    with pytest.raises(
        UserError, match=r"ended with code 1: \w+Error: .*less than requested memory for kv .*; its log"
    ):
        engine.check(model, SamplingConfig(max_response_length=64), 64)
    engine.process.log.unlink()
    engine.close()


@pytest.mark.parametrize("parts", [("fixed", "uneven", "updates", "steps"), ("ahead",)], ids=lambda parts: parts[0])
def test_the_benchmark_measures_every_part(
    parts: tuple[str, ...], smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not PYTHON.exists():
        pytest.skip(f"there is no {PYTHON}: run `make vllm`")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    results = tmp_path / "results.jsonl"
    options = ["--python", str(PYTHON), "--policy", str(smollm2), "--length", "4", "--repetitions", "1"]
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
