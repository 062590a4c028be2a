"""Write the planning tables of `scaling.md`, beside this file, from what `remax plan` says.

`python docs/generate_scaling.py`; a test refuses tables that are out of date.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from remax_lightning.shipped_configs import config_folder
from remax_lightning.tools.plan.command import plan
from remax_lightning.tools.plan.model_sizes import measure
from remax_lightning.tools.plan.run_config import read_run

PAGE = Path(__file__).with_name("scaling.md")
BEGIN, END = "<!-- made by docs/generate_scaling.py -->", "<!-- end of what is made -->"
BEGIN_PPO = "<!-- made by docs/generate_scaling.py: against PPO -->"
MEMORY = (40, 80, 141)


def _llama(width: int, layers: int, inner: int, heads: int, key_value_heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }


MODELS: dict[str, dict[str, Any]] = {
    "OPT-1.3B": {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": 50272,
        "hidden_size": 2048,
        "word_embed_proj_dim": 2048,
        "ffn_dim": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    "Llama-2-7B": _llama(4096, 32, 11008, 32, 32),
    "Llama-2-13B": _llama(5120, 40, 13824, 40, 40),
    "Llama-2-70B": _llama(8192, 80, 28672, 64, 8),
}
"""Shapes of the published models."""
REWARD = _llama(2048, 16, 8192, 32, 8) | {"vocab_size": 128256, "head_dim": 64, "tie_word_embeddings": True}
"""The shape of the reward model in `llama2_7b.yaml`, a Llama 3.2 of 1B."""
SHARDED = {"model": {"reference": {"placement": "shard"}, "reward": {"init_args": {"placement": "shard"}}}}
WAYS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "DDP": ("ddp", "bf16-mixed", {}),
    "ZeRO-2": ("zero2", "bf16-true", {}),
    "ZeRO-3": ("zero3", "bf16-true", SHARDED),
    "ZeRO-3 with offload": ("zero3_offload", "bf16-true", SHARDED),
    "FSDP2": ("fsdp2", "bf16-mixed", SHARDED),
    "LoRA, ZeRO-3": ("zero3", "bf16-true", {"model": {"policy": {"lora": {"r": 16}}, "reference": None,
                                                       "reward": {"init_args": {"placement": "shard"}}}}),
}  # fmt: skip
"""By the name in the table: overlay, precision, and what else the run says."""


def run(folder: Path, precision: str) -> dict[str, Any]:
    """Return the configuration of the paper's lengths: 256 + 256 tokens, 4 prompts per device and pass."""
    return {
        "trainer": {"accelerator": "gpu", "devices": 8, "precision": precision, "accumulate_grad_batches": 4},
        "model": {
            "policy": {"path": str(folder), "gradient_checkpointing": True},
            "reference": {"path": str(folder), "dtype": "bfloat16"},
            "reward": {
                "class_path": "ClassifierReward",
                "init_args": {"path": str(folder), "dtype": "bfloat16", "batch_size": 8, "max_length": 512},
            },
            "sampling": {"max_response_length": 256},
        },
        "data": {"path": "prompts.jsonl", "batch_size": 16, "micro_batch_size": 4, "max_prompt_length": 256},
    }


HEADLINE: dict[str, tuple[str, ...]] = {
    "`llama2_7b`": (),
    "`llama2_7b`, `gpus/8x40gb`": ("gpus/8x40gb",),
    "`llama2_7b`, `gpus/8x40gb`, `strategies/zero3`": ("gpus/8x40gb", "strategies/zero3"),
}
"""The paper's Llama-2-7B on 8 GPUs, by what the table calls it: overlays over `llama2_7b`."""


def merge_runs(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` on top, deeply; what is None is left out."""
    runs = dict(base)
    for name, value in over.items():
        if value is None:
            runs.pop(name, None)
        else:
            runs[name] = merge_runs(runs.get(name, {}), value) if isinstance(value, dict) else value
    return runs


def cells(model: str, way: str) -> list[str]:
    """Return the fewest GPUs of each memory, for one line of the table."""
    overlay, precision, more = WAYS[way]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(MODELS[model]))
        (folder / "run.yaml").write_text(yaml.safe_dump(merge_runs(run(folder, precision), more)))
        strategy = config_folder() / "strategies" / f"{overlay}.yaml"
        planned = read_run(["--config", str(folder / "run.yaml"), "--config", str(strategy)])
        sizes = measure(planned)
    return [str(plan(planned, sizes, 1e9 * memory)["least_devices"] or "none") for memory in MEMORY]


def table() -> str:
    """Return the whole table."""
    heading = ["model", "strategy", *(f"{memory} GB" for memory in MEMORY)]
    rows = [[model, way, *cells(model, way)] for model in MODELS for way in WAYS]
    lines = ["| " + " | ".join(row) + " |" for row in [heading, ["---"] * len(heading), *rows]]
    return "\n".join(lines)


def headline_cells(overlays: tuple[str, ...]) -> list[str]:
    """Return GB per GPU of ReMax and of PPO, and where each fits, for one line of the second table."""
    with tempfile.TemporaryDirectory() as name:
        folder, paths = Path(name), {}
        for role, config in (("policy", MODELS["Llama-2-7B"]), ("reward", REWARD)):
            (folder / role).mkdir()
            (folder / role / "config.json").write_text(json.dumps(config))
            paths[role] = str(folder / role)
        arguments = [part for shipped in ("llama2_7b", *overlays) for part in ("--config", shipped)]
        arguments += [f"--model.{role}.path={paths['policy']}" for role in ("policy", "reference")]
        arguments += [f"--model.reward.init_args.path={paths['reward']}", "--trainer.devices=8"]
        planned = read_run(arguments)
        sizes = measure(planned)
        # Checkpointing is on, and the policy gathered as 80 GB allow it.
        answers = [plan(planned, sizes, 1e9 * memory) for memory in MEMORY[:2]]
        cells = []
        for ppo in (False, True):
            peaks = [answer["ppo"]["peak"] if ppo else answer["peak"] for answer in answers]
            fits = [f"{memory}" for memory, peak in zip(MEMORY[:2], peaks, strict=True) if peak <= 0.9e9 * memory]
            cells += [f"{peaks[0] / 1e9:.1f}", " and ".join(fits) or "none"]
    return cells


def headline() -> str:
    """Return the second table."""
    heading = ["configuration", "ReMax, GB per GPU", "fits into, GB", "PPO, GB per GPU", "fits into, GB"]
    rows = [[way, *headline_cells(overlays)] for way, overlays in HEADLINE.items()]
    lines = ["| " + " | ".join(row) + " |" for row in [heading, ["---"] * len(heading), *rows]]
    return "\n".join(lines)


def main() -> None:
    """Put the tables into the page."""
    for begin, made in ((BEGIN, table()), (BEGIN_PPO, headline())):  # minutes, in which the page may be edited
        before, rest = PAGE.read_text(encoding="utf-8").split(begin)
        PAGE.write_text(f"{before}{begin}\n\n{made}\n\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
