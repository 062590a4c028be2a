"""The real vLLM, for CPUs, in an environment of its own (`make vllm`): training, weights, a server that is killed.

The server is started with the command of `remax serve`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.training import PROMPTS, CharacterReward, make_trainer, prompt_data, remax_module
from lightning.pytorch import Callback

from remax_lightning.config import LossConfig, MismatchConfig
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
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command.arguments, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self) -> None:
        """End all its processes at once, as the kernel does where memory runs out."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def engine(self, folder: Path) -> VLLMEngine:
        return VLLMEngine([self.url], transfer_dir=str(folder / "weights"), restart_timeout=180.0)


@pytest.fixture(scope="module", params=["weights", "adapter"])
def server(request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not PYTHON.exists():
        pytest.skip(f"there is no {PYTHON}: run `make vllm`")
    started = Server(tmp_path_factory.mktemp("server"), smollm2, request.param == "adapter")
    yield started
    started.kill()


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


def train(policy: Path, lora: bool, folder: Path, engine: Any, mismatch: MismatchConfig) -> Rollouts:
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
    make_trainer(folder, [recorder], max_steps=STEPS, max_epochs=STEPS).fit(module, data)
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


def test_a_server_that_is_killed_in_a_rollout_loses_nothing(server: Server, smollm2: Path, tmp_path: Path) -> None:
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

    engine = server.engine(tmp_path)
    expected = engine.generate(model, request())

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
    assert server.log.read_text(errors="replace").count("Application startup complete") == 2
