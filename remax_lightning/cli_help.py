"""The subcommands of `remax` with their help: what can be told without torch, whose import takes seconds."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Tool(NamedTuple):
    """A subcommand that is not Lightning's.

    Args:
        module: where its `main` is, under `remax_lightning.tools`; `tools.parsers` has its options.
        help: what it does, in a line.
        reads_run: whether it takes every option of `remax fit`, beside its own.
    """

    module: str
    help: str
    reads_run: bool = False


RUNS = {
    "fit": "train a policy with ReMax, or one of the stages before it",
    "validate": "measure reward, baseline and KL on the validation prompts",
    "test": "evaluate a policy, with a table of figures and their intervals",
    "predict": "write responses and their rewards to a file",
}
"""Lightning's subcommands, which read YAML and options."""

TOOLS = {
    "plan": Tool("plan.command", "compute the memory that each device needs for a configuration", reads_run=True),
    "doctor": Tool("doctor.command", "check a configuration's models and data before any training", reads_run=True),
    "baselines": Tool("baselines", "measure which baseline pays on a run's policy, reward and data", reads_run=True),
    "report": Tool("report", "write an HTML page about a run, with curves and samples"),
    "compare": Tool("compare", "compare the figures of two evaluations, with paired intervals"),
    "export": Tool("export", "write a checkpoint's policy as a Hugging Face folder"),
    "lm-eval": Tool("lm_eval", "measure an exported policy with tasks of lm-evaluation-harness"),
    "convert-reward": Tool("convert_reward", "write another project's reward model as a plain sequence classifier"),
    "serve": Tool("serve", "start a vLLM server for a configuration's policy", reads_run=True),
    "configs": Tool("configs", "list, show and copy the configurations that come with the package"),
    "demo": Tool("demo", "train a tiny policy on an embedded task, on a CPU in minutes"),
    "pipeline": Tool("pipeline", "run all three stages on generated preferences, in minutes"),
}
"""Subcommands of this package, in the order of the help."""

_SYNONYMS = {
    "train": "fit", "sft": "fit", "eval": "test", "evaluate": "test", "generate": "predict", "memory": "plan",
    "check": "doctor", "diff": "compare", "convert": "convert-reward", "config": "configs", "help": "--help",
    "version": "--version", "completion": "--print_shtab",
}  # fmt: skip
"""What other commands call it."""


def help_text() -> str:
    """Return the help of the command, which names all subcommands."""
    runs, tools = _rows(RUNS, 16), _rows({name: tool.help for name, tool in TOOLS.items()}, 16)
    return f"""usage: remax SUBCOMMAND ...

Align language models with ReMax, REINFORCE with a greedy baseline.

runs, from YAML files and options:
{runs}

tools:
{tools}

options:
  -h, --help            print this help; remax SUBCOMMAND --help prints that of a subcommand
  --version             print the version
  --print_shtab SHELL   print a script that completes subcommands and options; bash, zsh, fish or tcsh

examples:
  remax fit --config run.yaml --trainer.max_steps 100
  remax doctor --config run.yaml
  remax report runs/remax/version_0"""


def _rows(texts: Mapping[str, str], width: int = 40) -> str:
    return "\n".join(f"  {name:{width}}{text}" for name, text in texts.items())


def explain_subcommand(name: str) -> str:
    """Return what is wrong with the name of a subcommand that does not exist; an empty one is missing."""
    names = [*RUNS, *TOOLS]
    known = f"the subcommands are {', '.join(names)}; remax --help explains them"
    if not name or name.startswith("-"):
        return f"the subcommand is missing; {known}"
    if name.endswith((".yaml", ".yml", ".json")):
        return f"there is no subcommand {name!r}; did you mean remax fit --config {name}? {known}"
    close = [_SYNONYMS[name.lower()]] if name.lower() in _SYNONYMS else difflib.get_close_matches(name, names, 1)
    return f"there is no subcommand {name!r}; " + (f"did you mean {close[0]}? {known}" if close else known)


# ---- The keys that most runs set ----


class Key(NamedTuple):
    """A key of a configuration in the short help.

    Args:
        name: as an option, without dashes.
        default: as in YAML; "required" where there is none.
        meaning: in a line.
        runs: the subcommands that it matters to.
    """

    name: str
    default: str
    meaning: str
    runs: Sequence[str] = tuple(RUNS)


_TRAINING = ("fit",)
_EVALUATION = ("validate", "test")
KEYS = (
    Key("model.policy", "required", "the language model: a folder or a hub name"),
    Key("model.reward", "required", "my_module.my_function, or a class such as HTTPReward"),
    Key("model.reference", "null", "frozen model of the KL; null: the start of the policy"),
    Key("model.policy.lora", "null", "an adapter is trained in place of the weights: {r: 16}", _TRAINING),
    Key("model.kl_coef", "0.05", "reward per nat of KL that is subtracted", _TRAINING),
    Key("model.advantage.baseline", "greedy", "greedy (ReMax), auto, batch_mean, tracker, ...", _TRAINING),
    Key("model.sampling.num_samples", "1", "sampled responses per prompt"),
    Key("model.sampling.max_response_length", "256", "tokens of a response, at most"),
    Key("model.sampling.temperature", "1.0", "divides the logits"),
    Key("model.optimizer.init_args.lr", "1e-06", "learning rate; an adapter starts with 1e-05", _TRAINING),
    Key("data.path", "required", "training rows: files, a folder, or a name on the hub"),
    Key("data.val_path", "null", "validation rows, for validate, test and predict, too"),
    Key("data.prompt_column", "prompt", "column of the prompt: text, or messages"),
    Key("data.batch_size", "64", "prompts per rollout and device"),
    Key("data.micro_batch_size", "null", "prompts per training pass; null: batch_size", _TRAINING),
    Key("trainer.max_epochs", "1", "passes over the prompts, unless max_steps is set", _TRAINING),
    Key("trainer.max_steps", "-1", "optimizer steps; -1: no limit", _TRAINING),
    Key("trainer.val_check_interval", "null", "batches between validations; null: an epoch", _TRAINING),
    Key("trainer.devices", "auto", "GPUs: a number, or indices"),
    Key("trainer.strategy", "auto", "ddp, or --config strategies/zero3, strategies/fsdp2, ..."),
    Key("trainer.precision", "null", "null: bf16-mixed on a GPU that has it, else float32"),
    Key("trainer.logger", "TensorBoard", "or --config loggers/wandb, loggers/mlflow, ..."),
    Key("samples.every_n_steps", "50", "optimizer steps between two dumps of samples", _TRAINING),
    Key("export.folder", "null", "of the trained policy; null: in the folder of the run", _TRAINING),
    Key("evaluation.pass_at_k", "[]", "for each k: how often one of k responses passes", ("test",)),
    Key("predictions.path", "null", "file of the responses; null: in the folder of the run", ("predict",)),
    Key("seed_everything", "0", "seed of weights, data order and sampling"),
    Key("ckpt_path", "null", "resume: last, or the path of a checkpoint", _TRAINING),
    Key("ckpt_path", "null", "the checkpoint whose weights are used, or last", (*_EVALUATION, "predict")),
)  # fmt: skip
"""What users set most, in the order of a configuration; `docs/configuration.md` has every key."""

_EXAMPLES = {
    "fit": (
        "remax fit --config run.yaml",
        "remax fit --config run.yaml --config presets/verl --trainer.max_steps 100",
        "remax fit --config run.yaml --ckpt_path last",
    ),
    "validate": ("remax validate --config run.yaml --ckpt_path last",),
    "test": ("remax test --config run.yaml --ckpt_path runs/remax/version_0/checkpoints/last.ckpt",),
    "predict": ("remax predict --config run.yaml --ckpt_path last --predictions.path out.jsonl",),
}


def run_help(name: str) -> str:
    """Return the help of one of `RUNS`: the keys that users set, on one screen."""
    keys = [key for key in KEYS if name in key.runs]
    rows = "\n".join(f"  --{key.name:36}{key.default:13}{key.meaning}" for key in keys)
    examples = "\n".join(f"  {example}" for example in _EXAMPLES[name])
    more = {
        f"remax {name} --help-all": "all options, Lightning's too",
        f"remax {name} --model.help SFTModule": "those of a class; also --data.help, --model.reward.help",
        "remax configs list": "configurations that --config finds by name",
    }
    return f"""usage: remax {name} --config FILE_OR_NAME [--config ...] [--KEY VALUE ...]

{RUNS[name][0].upper()}{RUNS[name][1:]}.
A later file or option overrides an earlier one.

  {"key, in YAML or as an option":38}{"default":13}meaning
{rows}

examples:
{examples}

more:
{_rows(more)}"""
