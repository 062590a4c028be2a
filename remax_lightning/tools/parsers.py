"""The options of the tools whose imports take seconds, apart from them: help and mistakes are told at once.

The other tools have their parsers beside their `main`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from remax_lightning.cli_help import TOOLS
from remax_lightning.files import DEFAULT_PYTHON, TRUST

_DTYPES = ("float32", "bfloat16", "float16")
"""The choices of `config.WeightDType`, which is not imported: it loads torch."""


def tool_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a tool's own options.

    Args:
        name: of the subcommand, a key of `cli_help.TOOLS`.
    """
    make = PARSERS.get(name) or import_module(f"remax_lightning.tools.{TOOLS[name].module}").make_parser
    parser: argparse.ArgumentParser = make()
    return parser


def read_tool_options(name: str, arguments: list[str]) -> None:
    """End with the help that is asked for, or the mistake in a tool's own options, before what takes seconds.

    Args:
        name: of the subcommand.
        arguments: those after it.
    """
    if name not in PARSERS:  # a tool that reads them at once
        return
    if TOOLS[name].reads_run:
        # what follows "--" is vLLM's
        PARSERS[name]().parse_known_args(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    else:
        PARSERS[name]().parse_args(arguments)


def plan_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments after `remax plan`."""
    parser = argparse.ArgumentParser(
        prog="remax plan",
        usage="remax plan --config FILE [--config FILE ...] [any argument of remax fit] [--memory GB] [--json]",
        description=(
            "Compute the memory that each device needs for `remax fit` with the same arguments. Nothing is"
            " run and no weights are read: models are built from their configurations."
        ),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--memory", type=float, metavar="GB", help="memory of a device; also print whether the run fits"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON, in bytes")
    return parser


def doctor_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments after `remax doctor`."""
    parser = argparse.ArgumentParser(
        prog="remax doctor",
        usage="remax doctor --config FILE [--config FILE ...] [any argument of remax fit] [--num_prompts N]"
        " [--json FILE]",
        description="Load models and data as `remax fit` would, on one process, and check them on a few prompts."
        " Nothing is trained or written. Exit code 1 if a check failed, 2 for a mistake in the"
        " configuration.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--num_prompts", type=int, default=16, metavar="N", help="number of prompts to check (default: 16)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    return parser


def baselines_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments after `remax baselines`."""
    parser = argparse.ArgumentParser(
        prog="remax baselines",
        usage="remax baselines --config FILE [--config FILE ...] [any argument of remax fit] [--num_prompts N]"
        " [--json FILE] [--picture FILE.svg]",
        description="Measure, without training, how much variance the gradient has with each baseline on the policy,"
        " reward and data of a run, what a response costs, and which baseline takes the least time for a"
        " gradient of the same precision. One backward pass for each response. model.advantage.baseline:"
        " auto compares them during the run instead.",
        allow_abbrev=False,
    )
    parser.add_argument("--num_prompts", type=int, default=128, metavar="N", help="prompts to measure (default: 128)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw them, as SVG")
    return parser


def export_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments after `remax export`."""
    parser = argparse.ArgumentParser(
        prog="remax export",
        description="Write the policy of a checkpoint, with tokenizer and generation settings, so that"
        " `from_pretrained` reads it. Reads checkpoints of one process, DDP, DeepSpeed ZeRO-1, 2 and 3 and"
        " FSDP2. A LoRA adapter is written alone, in PEFT's format. Memory holds one copy of the model, and"
        " the shards of one rank at a time.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file or folder")
    parser.add_argument("out", type=Path, help="the folder to write; new or empty")
    parser.add_argument(
        "--config", type=Path, help="the configuration of the run (default: searched above the checkpoint)"
    )
    parser.add_argument(
        "--merge", action="store_true", help="merge the LoRA adapter into its base and write the full model"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the folder")
    parser.add_argument(
        "--max_shard_size", type=_parse_size, default="5GB", help="maximum size of a weight file (default: 5GB)"
    )
    parser.add_argument(TRUST, action="store_true", help="run code in the checkpoint, or of its model")
    return parser


def lm_eval_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments after `remax lm-eval`."""
    parser = argparse.ArgumentParser(
        prog="remax lm-eval",
        description="Measure an exported policy, a full model or an adapter, with tasks of lm-evaluation-harness."
        " Prints a table with standard errors and writes the same figures as JSON beside the folder. Needs"
        " the extra lm-eval of this package.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="an exported policy, such as runs/remax/version_0/policy/best")
    parser.add_argument(
        "--tasks", nargs="+", required=True,
        help="names of tasks or groups, or paths of YAML files, with commas or spaces between them",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=float, help="documents of each task: a count, or a share below 1 (default: all)"
    )
    parser.add_argument("--num_fewshot", type=int, help="solved examples in each prompt (default: the task's own)")
    parser.add_argument("--batch_size", type=int, default=8, help="requests in one forward pass (default: 8)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: as they were saved)")
    parser.add_argument("--base", help="folder or hub name of an adapter's base (default: as the adapter says)")
    parser.add_argument("--apply_chat_template", action="store_true", help="write each prompt as a message of the user")
    parser.add_argument("--output", type=Path, help="a new JSON file (default: FOLDER_lm_eval.json)")
    parser.add_argument(
        "--confirm_run_unsafe_code", action="store_true", help="run tasks that execute what the model has written"
    )
    parser.add_argument(TRUST, action="store_true", help="run code that comes with the model")
    return parser


def convert_reward_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments after `remax convert-reward`."""
    parser = argparse.ArgumentParser(
        prog="remax convert-reward",
        description="Convert a reward model of OpenRLHF, DeepSpeed-Chat, TRL or PEFT into a plain sequence classifier."
        " The folder loads with transformers' AutoModelForSequenceClassification and scores as the original"
        " does. A bias of the score head and a saved mean and std go into the weights where these can hold"
        " them, and into config.json otherwise. Adapters are merged into their base.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="a folder or a hub name")
    parser.add_argument("out", type=Path, help="the folder to write; new or empty")
    parser.add_argument("--template", help="how prompt and response become one text, saved with the model")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--allow_pickle", action="store_true", help="also read .bin files, with weights_only=True")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the folder")
    parser.add_argument("--deepspeed_chat.pad_token", dest="pad_token", help="eos, or the token it was padded with")
    return parser


def serve_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments after `remax serve`."""
    parser = argparse.ArgumentParser(
        prog="remax serve",
        description="Start a vLLM server for the policy of a configuration. All other arguments are those of `remax"
        " fit`; what follows `--` goes to vLLM, such as `-- --tensor-parallel-size 2`.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--python",
        default=DEFAULT_PYTHON,
        help=f"of the environment that vLLM is installed in (default: {DEFAULT_PYTHON})",
    )
    which = "model.rollout's URL on this machine, or else its first one"
    parser.add_argument("--host", help=f"address to listen at (default: that of {which})")
    parser.add_argument("--port", type=int, help=f"port to listen at (default: that of {which})")
    parser.add_argument("--print", action="store_true", dest="only_print", help="print the command, and do not run it")
    return parser


def pipeline_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments after `remax pipeline`."""
    parser = argparse.ArgumentParser(
        prog="remax pipeline",
        description="Write preferences, run the three stages on them, evaluate before and after, and make a report.",
        allow_abbrev=False,
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data order and sampling (default: 0)")
    return parser


def _parse_size(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", text):
        raise argparse.ArgumentTypeError(f"must be a size such as 5GB or 500MB, got {text}")
    return text


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "plan": plan_parser,
    "doctor": doctor_parser,
    "baselines": baselines_parser,
    "export": export_parser,
    "lm-eval": lm_eval_parser,
    "convert-reward": convert_reward_parser,
    "serve": serve_parser,
    "pipeline": pipeline_parser,
}
"""The parsers of this file, by subcommand."""
