"""Rollouts of a policy in shards: `python benchmarks/zero3_rollout.py`; writes results/zero3_rollout.jsonl.

Two CPU processes over gloo make the same rollouts in turn: under ZeRO-2, where the policy is whole; under ZeRO-3 and
FSDP2 gathered once per rollout, and layer by layer; and under ZeRO-3 with DeepSpeed's own hooks, which gather module by
module for every token (`zero3_hooks`). No response ends before the limit, since with the hooks the ranks would wait for
each other for good. Before every rollout there is a training pass, not measured, because the hooks go by its record.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import RESULTS
from shapes import EOS, PAD, SHAPES, Shape, llama, prompts, set_ending
from timing import interleaved, medians, save
from torch import Tensor, distributed, nn

RANKS = 2
BASE = "zero2"


class Way(NamedTuple):
    """A way of making rollouts.

    Args:
        policy: what makes them.
        train: runs a training pass that changes no weight.
        gathering: in what the rollout is made.
    """

    policy: Any
    train: Callable[[Tensor], None]
    gathering: Callable[[], AbstractContextManager[None]]


class Root(nn.Module):
    """What stands above the policy in a run: there it is Lightning's module."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, ids: Tensor) -> Tensor:
        """Return the loss of a language model."""
        loss: Tensor = self.policy(ids, labels=ids, use_cache=False).loss
        return loss


def main(arguments: list[str] | None = None) -> None:
    """Measure every size that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=["tiny", "small"])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS / "zero3_rollout.jsonl")
    options = parser.parse_args(arguments)
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(measure, (folder, size, options), nprocs=RANKS)


def measure(rank: int, folder: str, size: str, options: argparse.Namespace) -> None:
    """Measure all ways on one size, in turn, as one of the ranks; rank 0 writes the lines down."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    warnings.simplefilter("ignore", FutureWarning)  # of torch, about DeepSpeed's calls of it
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    shape, responses = SHAPES[size], {}
    rounds = {name: partial(_round, name, way, shape, responses) for name, way in make_ways(shape).items()}
    times = interleaved(rounds, options.repetitions, options.warmup)
    if rank == 0:
        base = medians(times[BASE])["seconds"]
        save(options.results, [_line(size, name, figures["seconds"], base) for name, figures in times.items()])
    distributed.barrier()
    distributed.destroy_process_group()


def _line(size: str, name: str, seconds: list[float], base: float) -> dict[str, Any]:
    middle = medians({"seconds": seconds})["seconds"]
    return {
        "benchmark": "zero3_rollout",
        "size": size,
        "variant": name,
        "device": "cpu",
        "dtype": "float32",
        "ranks": RANKS,
        "seconds": middle,
        "ratio": middle / base,
        "fastest": min(seconds),
        "slowest": max(seconds),
        "response": SHAPES[size].response,
        "repetitions": len(seconds),
    }


def _round(name: str, way: Way, shape: Shape, responses: dict[int, Tensor], turn: int) -> dict[str, float]:
    """Train, make a rollout and time it, from when all ranks begin until all have ended."""
    from remax_lightning.rollout import GenerationRequest, PairedEngine, SamplingConfig

    ids = prompts(shape, seed=turn + 1000 * (1 + distributed.get_rank()))
    way.train(ids)
    way.policy.eval()
    request = GenerationRequest(
        prompt_ids=ids,
        prompt_mask=torch.ones_like(ids, dtype=torch.bool),
        sampling=SamplingConfig(max_response_length=shape.response),
        eos_ids=[EOS],
        pad_id=PAD,
        generator=torch.Generator().manual_seed(turn + 1000),
    )
    distributed.barrier()
    start = time.perf_counter()
    with torch.no_grad(), way.gathering():
        made = PairedEngine().generate(way.policy, request)
    distributed.barrier()
    seconds = time.perf_counter() - start
    way.policy.train()
    # Greedy ones: with two random numbers nearly alike, rounding may decide on a sampled token.
    same = torch.equal(responses.setdefault(turn, made.greedy_ids), made.greedy_ids)
    assert same, f"{name} writes other responses than the way before it"
    return {"seconds": seconds}


def make_ways(shape: Shape) -> dict[str, Way]:
    """Return every way by name; those of ZeRO-3 share a policy, and so do those of FSDP2."""
    import deepspeed

    from remax_lightning.strategies import rollout_parameters

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled on first use
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    whole, train_whole = _zero(shape, stage=2)
    parts, train_parts = _zero(shape, stage=3)
    sharded, train_sharded = _fsdp2(shape)
    return {
        BASE: Way(whole, train_whole, lambda: rollout_parameters(whole)),
        "zero3_once": Way(parts, train_parts, lambda: _gathering(parts, "once")),
        "zero3_layerwise": Way(parts, train_parts, lambda: _gathering(parts, "layerwise")),
        "zero3_hooks": Way(parts, train_parts, nullcontext),
        "fsdp2_once": Way(sharded, train_sharded, lambda: _gathering(sharded, "once")),
        "fsdp2_layerwise": Way(sharded, train_sharded, lambda: _gathering(sharded, "layerwise")),
    }


@contextmanager
def _gathering(policy: nn.Module, gather: Any) -> Iterator[None]:
    from remax_lightning.strategies import gather_mode as choice
    from remax_lightning.strategies import rollout_parameters

    choice.register_gather_mode(policy, gather)
    with rollout_parameters(policy):
        yield


def _policy(shape: Shape) -> Any:
    policy = llama(shape)
    set_ending(policy, None)
    return policy.train()


def _zero(shape: Shape, stage: int) -> tuple[Any, Callable[[Tensor], None]]:
    import deepspeed

    from remax_lightning.strategies import zero3

    root = Root(_policy(shape))
    # Of a model so small everything would be whole, by default; nothing is kept for a pass that comes soon again,
    # because DeepSpeed searches its record for that at every module, for seconds.
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_optimization": zero}
    optimizer = torch.optim.SGD(root.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=root, optimizer=optimizer, config=config, dist_init_required=False)
    if stage == 3:
        zero3.register_engine(root, engine)

    def train(ids: Tensor) -> None:
        engine.backward(engine(ids))
        engine.step()

    return root.policy, train


def _fsdp2(shape: Shape) -> tuple[Any, Callable[[Tensor], None]]:
    from torch.distributed.device_mesh import init_device_mesh

    from remax_lightning.strategies import shard_policy

    policy = _policy(shape)
    shard_policy(policy, init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("data_parallel", "tensor_parallel")))
    root = Root(policy)
    optimizer = torch.optim.SGD(root.parameters(), lr=0.0)

    def train(ids: Tensor) -> None:
        root(ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return policy, train


if __name__ == "__main__":
    main()
