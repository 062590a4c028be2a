"""What `remax plan` says against what a run holds: `python benchmarks/plan.py`; writes results/plan.jsonl.

Every case is a run of three steps on CPU processes, two of them over gloo but for `single`; a process that is the only
one of its kind in turn. `predicted_mb` is what `remax plan` says of the same file, `measured_mb` the most that a
process had resident in the phase, over what it had before models were loaded, in the second and the third step. The
first step is left out: before it there is no optimizer. `spread` is how far these steps and processes lie apart,
`error` is predicted over measured minus 1.

With `--ppo-python`, an interpreter of an environment with '.[bench-ppo]', what it says of PPO against TRL's, too.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from machine import RESULTS
from phases import GLIBC
from shapes import EOS, PAD, Shape, prompt_texts, tokenizer
from timing import save

from remax_lightning.tools.plan.model_sizes import measure
from remax_lightning.tools.plan.phases import PHASES, ppo_phases, remax_phases
from remax_lightning.tools.plan.run_config import read_run

FOLDER = Path(__file__).parent
OURS = "remax_lightning.strategies."
SIZES = {
    "toy": Shape(layers=2, width=64, vocab=256, prompt=8, response=8, prompts=4),
    "50M": Shape(layers=6, width=640, vocab=12288, prompt=64, response=64, prompts=8),
    "85M": Shape(layers=8, width=768, vocab=16384, prompt=64, response=64, prompts=8),
}
STRATEGIES: dict[str, Any] = {
    "single": "auto",
    "ddp": "ddp",
    "zero1": {"class_path": f"{OURS}ReMaxDeepSpeedStrategy", "init_args": {"stage": 1}},
    "zero2": {"class_path": f"{OURS}ReMaxDeepSpeedStrategy", "init_args": {"stage": 2}},
    "zero3": {"class_path": f"{OURS}ReMaxDeepSpeedStrategy", "init_args": {"stage": 3}},
    "fsdp2": {"class_path": f"{OURS}ReMaxFSDP2Strategy"},
}
OPTIONS = ("", "checkpointing", "micro_batches", "full_kl", "bf16")


class Case(NamedTuple):
    """A run: the policy's family and size, how it is spread, and a key of `OPTIONS`."""

    family: str
    size: str
    strategy: str
    option: str = ""


CASES = [
    *(Case(family, "85M", "single") for family in ("llama", "opt", "gpt2")),
    *(Case("llama", "85M", "single", option) for option in ("checkpointing", "micro_batches", "full_kl")),
    *(Case("llama", "50M", strategy) for strategy in STRATEGIES if strategy != "single"),
    *(Case("opt", "50M", strategy) for strategy in ("ddp", "zero2", "zero3", "fsdp2")),
    Case("llama", "50M", "zero2", "bf16"),
    Case("llama", "50M", "zero3", "micro_batches"),
    Case("llama", "50M", "fsdp2", "checkpointing"),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cases, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name, as in `opt-50M-zero2`, has it")
    parser.add_argument("--size", choices=list(SIZES), help="instead of a case's own")
    parser.add_argument("--results", type=Path, default=RESULTS / "plan.jsonl", help="default: %(default)s")
    parser.add_argument("--ppo-python", type=Path, help="interpreter of an environment with '.[bench-ppo]'")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.ppo_python:
        with tempfile.TemporaryDirectory() as folder:
            save(options.results, compare_ppo(options.size or "85M", options.ppo_python, Path(folder)))
    for case in CASES:
        if options.only in "-".join(filter(None, case)):
            with tempfile.TemporaryDirectory() as folder:
                save(options.results, compare_case(case._replace(size=options.size or case.size), Path(folder)))


def compare_case(case: Case, folder: Path) -> list[dict[str, Any]]:
    """Return a line for each phase."""
    config = write(case, SIZES[case.size], folder / "run")
    warm_up = write(case, SIZES["toy"], folder / "warm_up")
    run = read_run(["--config", config])
    ranks = run.strategy.devices
    command = [sys.executable, str(FOLDER / "phases.py"), config, warm_up]
    steps = [step for rank in launch(command, folder, ranks) for step in rank]
    variant = f"{case.family}-{case.strategy}{case.option and '-' + case.option}"
    common = {"benchmark": "plan", "size": case.size, "variant": variant, "device": "cpu"}
    common |= {"dtype": "bfloat16" if case.option == "bf16" else "float32", "ranks": ranks}
    return phase_lines(common, remax_phases(measure(run), run.strategy), steps)


def compare_ppo(size: str, python: Path, folder: Path) -> list[dict[str, Any]]:
    """Return a line for each phase of PPO, predicted by `remax plan` and measured of TRL's trainer."""
    case, shapes = Case("llama", size, "single"), [SIZES[size], SIZES["toy"]]
    config, _ = (write(case, shape, folder / name) for shape, name in zip(shapes, ("run", "warm_up"), strict=True))
    run = read_run(["--config", config])
    command = [str(python), str(FOLDER / "phases_ppo.py"), str(folder / "run"), str(folder / "warm_up")]
    [steps] = launch([*command, json.dumps(shapes)], folder, ranks=1)
    common = {"benchmark": "plan", "size": size, "variant": "llama-single-trl_ppo", "device": "cpu"}
    common |= {"dtype": "float32", "ranks": 1}
    return phase_lines(common, ppo_phases(measure(run), run.strategy), steps)


def phase_lines(
    common: dict[str, Any], phase_parts: dict[str, dict[str, int]], steps: Sequence[dict[str, int]]
) -> list[dict[str, Any]]:
    """Return a line for each phase: what was predicted, and the most of all steps and processes."""
    predicted = {phase: sum(parts.values()) for phase, parts in phase_parts.items()}
    lines = []
    for phase in PHASES:
        values = [step[phase] for step in steps]
        figures = {"predicted_mb": predicted[phase] / 1e6, "measured_mb": max(values) / 1e6}
        figures |= {"error": predicted[phase] / max(values) - 1, "spread": 1 - min(values) / max(values)}
        lines.append({**common, "phase": phase, **figures})
    return lines


def launch(command: list[str], folder: Path, ranks: int) -> list[list[dict[str, int]]]:
    """Run the command on each rank, with the file that it writes as its last argument; return what they measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, **GLIBC, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    paths = [str(FOLDER), str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    if ranks > 1:  # for one process accelerate, too, would make buckets of all gradients
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    outputs = [folder / f"rank{rank}.json" for rank in range(ranks)]
    processes = []
    for rank, output in enumerate(outputs):
        with output.with_suffix(".log").open("w") as log:
            own = environment | ({"LOCAL_RANK": str(rank)} if ranks > 1 else {})
            processes.append(subprocess.Popen([*command, str(output)], env=own, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError("\n".join(output.with_suffix(".log").read_text()[-3000:] for output in outputs))
    return [json.loads(output.read_text()) for output in outputs]


def write(case: Case, shape: Shape, folder: Path) -> str:
    """Write models, prompts and the configuration of a case, and return the path of that."""
    ranks, steps = 1 if case.strategy == "single" else 2, 3
    for name in ("policy", "reward"):
        model(case.family, shape, classifier=name == "reward").save_pretrained(folder / name)
        tokenizer(shape).save_pretrained(folder / name)
    texts = [text for seed in range(ranks * steps) for text in prompt_texts(shape, seed)]
    # Some are shorter: without padding attention takes another kernel.
    rows = [json.dumps({"prompt": text.split(" ", 2)[-1] if i % 2 else text}) for i, text in enumerate(texts)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(configuration(case, shape, folder, ranks, steps)))
    return str(path)


def model(family: str, shape: Shape, *, classifier: bool) -> Any:
    """Return a random model."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    heads, inner = shape.width // 64, 4 * shape.width
    common = {"vocab_size": shape.vocab, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}
    usual = {"hidden_size": shape.width, "num_hidden_layers": shape.layers, "num_attention_heads": heads}
    usual |= {"max_position_embeddings": 2 * (shape.prompt + shape.response)}
    own = {
        "llama": usual | {"intermediate_size": inner * 2 // 3 // 16 * 16, "tie_word_embeddings": False},
        "opt": usual | {"ffn_dim": inner, "word_embed_proj_dim": shape.width},
        "gpt2": {
            "n_embd": shape.width,
            "n_layer": shape.layers,
            "n_head": heads,
            "n_positions": usual["max_position_embeddings"],
        },
    }
    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    return kind.from_config(AutoConfig.for_model(family, **common, **own[family], num_labels=1))


def configuration(case: Case, shape: Shape, folder: Path, ranks: int, steps: int) -> dict[str, Any]:
    """Return what `remax fit` reads; no response ends before its last token."""
    policy = {"path": str(folder / "policy")}
    module = {
        "policy": policy,
        "reference": policy,
        "reward": {
            "class_path": "ClassifierReward",
            "init_args": {"path": str(folder / "reward"), "template": "{prompt} {response}"},
        },
        "sampling": {"max_response_length": shape.response, "min_response_length": shape.response},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}},
    }
    trainer = {
        "accelerator": "cpu",
        "devices": ranks,
        "strategy": STRATEGIES[case.strategy],
        "max_steps": steps,
        "gradient_clip_val": 1.0,
        "limit_val_batches": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "default_root_dir": str(folder),
    }
    config = {
        "trainer": trainer,
        "model": {"class_path": "phases.PhasedReMax", "init_args": module},
        "data": {
            "path": str(folder / "prompts.jsonl"),
            "batch_size": shape.prompts,
            "max_prompt_length": shape.prompt,
        },
        "export": {"last": False, "best": False},
    }
    changes = {
        "": {},
        "checkpointing": {"policy": policy | {"gradient_checkpointing": True}},
        "full_kl": {"kl": {"estimator": "full"}},
    }
    module |= changes.get(case.option, {})
    if case.option == "micro_batches":
        config["data"]["micro_batch_size"] = 2
        trainer["accumulate_grad_batches"] = shape.prompts // 2
    if case.option == "bf16":
        trainer["precision"] = "bf16-true"
    return config


if __name__ == "__main__":
    main()
