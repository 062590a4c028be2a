"""Runs whose policy is spread over the ranks; run by test_sharded.py, which reads what every rank wrote down."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from distributed.invariance import make_strategy, whole_weights
from helpers.training import make_trainer, prompt_data, remax_module
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from remax_lightning.callbacks import ExportPolicy
from remax_lightning.models import ModelConfig
from remax_lightning.models.forward import find_head
from remax_lightning.models.last_mlp import last_mlp_obstacle
from remax_lightning.modules import LossConfig
from remax_lightning.rollout import GenerationOutput, GenerationRequest, PairedEngine, SamplingConfig
from remax_lightning.strategies import full_parameters, rollout_parameters
from remax_lightning.strategies import gather_mode as choice

STRATEGIES = ("fsdp2", "fsdp2-layerwise", "zero2", "zero3", "zero3-layerwise")
RANK, RANKS = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")))
LENGTHS = (2, 24)
"""Of the responses of two ranks; one rank alone writes the longer ones."""
DTYPES: dict[str, Any] = {"32-true": "float32", "bf16-true": "bfloat16"}


class UnevenEngine:
    """Lets rank 1 write on long after rank 0 has ended, and looks whether a plain copy of the model writes the same."""

    def __init__(self, path: str, dtype: Any) -> None:
        self.plain, self.equal, self.lengths, self.held = ModelConfig(path, dtype), None, [], []

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        length = LENGTHS[RANK - RANKS]
        sampling = SamplingConfig(max_response_length=length, min_response_length=length)
        request, state = replace(request, sampling=sampling), request.generator.get_state()
        self.hooks = sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())
        with self.counting(model):
            made = PairedEngine().generate(model, request)
        self.lengths.append(made.sampled_ids.shape[1])
        if self.equal is None:
            request.generator.set_state(state)
            plain = self.plain.load("model.policy")
            plain.to(made.sampled_ids.device)
            wanted = PairedEngine().generate(plain, request)
            self.equal = torch.equal(made.sampled_ids, wanted.sampled_ids) and torch.equal(
                made.greedy_ids, wanted.greedy_ids
            )
        return made

    @contextmanager
    def counting(self, model: Any) -> Iterator[None]:
        """Keep how many numbers of the model were whole on this rank whenever a layer had just run inside."""
        hooks = [
            layer.mlp.register_forward_hook(lambda *_: self.held.append(whole_numbers(model)))
            for layer in model.model.layers
        ]
        yield
        for hook in hooks:
            hook.remove()


def whole_numbers(model: Any) -> int:
    """How many numbers of the model's parameters this rank holds whole."""
    return sum(p.numel() for p in model.parameters() if not hasattr(p, "to_local"))


class Look(Callback):
    """Looks at policy and reference during the run."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {"losses": [], "reasons": [], "validations": []}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        from safetensors.torch import load_file

        policy, reference = pl_module.policy, pl_module.reference
        self.seen["kept"] = sum(local(p).numel() for p in policy.parameters())
        self.seen["reference"] = sum(p.numel() for p in reference.parameters())
        self.seen["reference_is_plain"] = not any(hasattr(p, "ds_id") for p in reference.parameters())
        file = load_file(Path(pl_module.policy_source.path) / "model.safetensors")
        with full_parameters(policy):
            whole = {name: value.detach().clone() for name, value in policy.named_parameters()}
            self.seen["hooks_inside"] = sum(len(module._forward_pre_hooks) for module in policy.modules())
        self.seen["layer"] = sum(getattr(p, "ds_numel", p.numel()) for p in policy.model.layers[0].parameters())
        self.seen["layerwise"] = [
            uses_layerwise_gather(policy, room=[1, 1]),
            uses_layerwise_gather(policy, room=[1, 0]),
        ]
        self.seen["hooks_outside"] = sum(len(module._forward_pre_hooks) for module in policy.modules())
        self.seen["file_equal"] = set(whole) == set(file) and all(
            torch.equal(whole[key].cpu(), file[key].to(whole[key].dtype)) for key in file
        )
        self.seen["runs_on"] = [pl_module.device.type, str(next(iter(whole.values())).dtype)]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen["losses"].append(float(trainer.callback_metrics["train/loss"]))
        self.seen["reasons"].append(find_head(pl_module.policy).reason)
        self.seen["last_mlp"] = [last_mlp_obstacle(model) for model in (pl_module.policy, pl_module.reference)]
        self.seen["external"] = sum(len(getattr(m, "_external_params", ())) for m in pl_module.modules())
        self.seen["kept_after"] = sum(local(p).numel() for p in pl_module.policy.parameters())

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen["validations"].append(figures(trainer.callback_metrics))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.whole = whole_weights(pl_module.policy)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen["met_after_a_failure"] = met_after_a_failure(pl_module.policy.eval())


def met_after_a_failure(policy: Any) -> int:
    """How many ranks meet after a rollout in which the first has failed inside a layer and the second has gone on."""

    def fail(*_: Any) -> None:
        raise KeyError

    if RANK == 0:
        policy.model.layers[1].mlp.register_forward_hook(fail)
    ids = torch.ones(1, 2, dtype=torch.long, device=policy.device)
    with suppress(KeyError), torch.no_grad(), rollout_parameters(policy):
        for _ in range(3):
            policy(ids)
    ranks = torch.ones((), device=policy.device)
    torch.distributed.all_reduce(ranks)
    return int(ranks)


def figures(metrics: dict[str, Any]) -> dict[str, float]:
    """What a validation measured, but for seconds."""
    return {name: float(value) for name, value in metrics.items() if name.startswith("val/") and "time" not in name}


def uses_layerwise_gather(policy: Any, room: list[int]) -> bool:
    """What is chosen if each rank's device has room for so many of the policy."""
    free, choice.free_bytes = choice.free_bytes, lambda device: room[RANK] * 2**30
    try:
        return choice.uses_layerwise_gather(policy)
    finally:
        choice.free_bytes = free


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor if parameter.numel() == 0 else parameter
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def make_module(policy: str, reference: str, engine: Any) -> Any:
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    return remax_module(policy, reference, rollout=engine, optimizer=optimizer, loss=LossConfig("clipped"))


def train(strategy: str, folder: Path, options: dict[str, Any], resume: str | None = None) -> tuple[Look, UnevenEngine]:
    """Train for four steps, two with each rollout, or for those after the checkpoint in the middle of the first.

    The policy is validated after every second one.
    """
    policy, reference = str(folder / "policy"), str(folder / "reference")
    engine, look = UnevenEngine(policy, DTYPES[options["precision"]]), Look()
    module = make_module(policy, reference, engine)
    own = folder / f"data{RANK}"
    own.mkdir(exist_ok=True)
    data = prompt_data(own, policy, batch_size=2, micro_batch_size=1)
    files = folder / strategy / ("second" if resume else "first")
    callbacks: list[Any] = [look, ExportPolicy(str(files / "export"), best=False)]
    if resume is None:
        callbacks.append(ModelCheckpoint(files, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    options = options | {"limit_val_batches": 1, "val_check_interval": 2, "enable_checkpointing": resume is None}
    options["strategy"] = make_strategy(strategy)
    trainer = make_trainer(files, callbacks, max_steps=4, **options)
    torch.manual_seed(0)
    trainer.fit(module, data, ckpt_path=resume)
    return look, engine


def exported(folder: Path, whole: dict[str, torch.Tensor], dtype: Any) -> bool:
    """Whether the exported policy is the one in training."""
    model = ModelConfig(str(folder), dtype).load("export").state_dict()
    return all(torch.equal(model[name], value) for name, value in whole.items())


def validate(strategy: str, folder: Path, options: dict[str, Any]) -> dict[str, float]:
    """Evaluate without a fit before it."""
    policy, reference = str(folder / "policy"), str(folder / "reference")
    module = make_module(policy, reference, UnevenEngine(policy, DTYPES[options["precision"]]))
    data = prompt_data(folder / f"data{RANK}", policy, batch_size=1)
    trainer = make_trainer(folder, strategy=make_strategy(strategy), limit_val_batches=2, **options)
    torch.manual_seed(0)
    return dict(trainer.validate(module, data, verbose=False)[0])


def check(strategy: str, folder: Path, precision: str) -> dict[str, Any]:
    options = {"devices": RANKS, "accelerator": "gpu" if torch.cuda.is_available() else "cpu", "precision": precision}
    look, engine = train(strategy, folder, options)
    seen = {**look.seen, "rollout_equal": engine.equal, "lengths": engine.lengths, "held": max(engine.held)}
    seen["hooks"] = engine.hooks
    seen["whole"] = sum(value.numel() for value in look.whole.values())
    if RANK == 0:
        last = folder / strategy / "first" / "export" / "last"
        seen["exported"] = exported(last, look.whole, DTYPES[precision])
    resumed, _ = train(strategy, folder, options, resume=str(folder / strategy / "first" / "step=1.ckpt"))
    seen["resumed_losses"] = resumed.seen["losses"]
    seen["validated"] = figures(validate(strategy, folder, options))
    return seen


def main(folder: Path, precision: str, *strategies: str) -> None:
    for strategy in strategies:
        seen = check(strategy, folder, precision)
        assert torch.distributed.get_world_size() == RANKS
        (folder / f"{strategy}-{RANK}.json").write_text(json.dumps(seen))
        print(strategy, json.dumps(seen), flush=True)
