"""Write `configuration.md`, beside this file, and the package's `signatures.json`, from signatures and docstrings.

`python docs/generate_configuration.py` writes them; with `--check` it only says whether one of them is out of date.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from docstring_parser import parse

from remax_lightning import cli_run, cli_schema, cli_signatures, data, models, modules, rewards, rollout, strategies

PAGE = Path(__file__).with_name("configuration.md")

INTRODUCTION = """\
# Configuration

<!-- Written by `python docs/generate_configuration.py` from the code's own docstrings: change those. -->

Every key of a configuration, with its default. A configuration is `configs/base.yaml` and over it every `--config` file
and every `--key=value` in the order given; `remax fit ... --print_config` shows what comes out. *required* means that
there is no default. A dotted key stands for nested mappings: `model.kl.credit: to_go` is

```yaml
model:
  kl:
    credit: to_go
```

`class_path` takes the short name of a class below or the full path of your own; its arguments stand under `init_args`.
For `model` and `data` both may be left out: they are `ReMaxModule` and `PromptDataModule` unless you say otherwise.
`trainer` is [Lightning's Trainer](https://lightning.ai/docs/pytorch/stable/common/trainer.html), and
`seed_everything` seeds weights, data order and sampling.
"""


_YAML = {"None": "null", "True": "true", "False": "false"}


class Section(NamedTuple):
    """A heading with the table of one class's or function's arguments.

    Args:
        key: where it is configured.
        target: the class or function; its docstring describes the arguments.
        is_choice: whether it is one of several that `class_path` chooses from.
    """

    key: str
    target: Callable[..., Any]
    is_choice: bool = False


def sections() -> Iterator[Section]:
    """Yield every part of a configuration that is this project's own, in the order of the page."""
    yield Section("model", modules.ReMaxModule, is_choice=True)
    yield Section("model.policy`, `model.reference` and `model.reward_model", models.ModelConfig)
    yield Section("model.policy.lora", models.LoRAConfig)
    yield Section("model.sampling", rollout.SamplingConfig)
    yield Section("model.kl", modules.KLConfig)
    yield Section("model.advantage", modules.AdvantageConfig)
    yield Section("model.loss", modules.LossConfig)
    yield Section("model.loss.mismatch", modules.MismatchConfig)
    for name in rewards.__all__:
        target = getattr(rewards, name)
        if inspect.isclass(target) and issubclass(target, rewards.Reward) and target is not rewards.Reward:
            yield Section("model.reward", target, is_choice=True)
    yield Section("model.reward.init_args.deepspeed_chat", rewards.DeepSpeedChatConfig)
    for name in rewards.__all__:
        target = getattr(rewards, name)
        if inspect.isfunction(target) and target.__module__.endswith(".verifiers"):
            yield Section("model.reward.init_args.function", target, is_choice=True)
    for engine in (rollout.AutoEngine, rollout.PairedEngine, rollout.HuggingFaceEngine, rollout.VLLMEngine):
        yield Section("model.rollout", engine, is_choice=True)
    yield Section("model.rollout.init_args.proof", rollout.ProofConfig)
    for schedule in (modules.WarmupCosine, modules.WarmupLinear):
        yield Section("model.lr_scheduler", schedule, is_choice=True)
    yield Section("model", modules.SFTModule, is_choice=True)
    yield Section("model", modules.RewardModelModule, is_choice=True)
    yield Section("data", data.PromptDataModule, is_choice=True)
    yield Section("data", data.ReasoningGymDataModule, is_choice=True)
    yield Section("data", data.SFTDataModule, is_choice=True)
    yield Section("data", data.PreferenceDataModule, is_choice=True)
    yield Section("data.pair_columns", data.PairColumns)
    yield Section("data.loading", data.LoadingConfig)
    yield Section("data.selection", data.SelectionConfig)
    yield Section("trainer.strategy", strategies.ReMaxDeepSpeedStrategy, is_choice=True)
    yield Section("trainer.strategy", strategies.ReMaxFSDP2Strategy, is_choice=True)
    for key, callback in cli_run.CALLBACKS.items():
        yield Section(key, callback)


def arguments(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return what a user can set: the first parameters of a verifier and the optimizer of a schedule come from us."""
    injected = ("prompts", "responses", "rows", "optimizer") if not _is_module(target) else ()
    parameters = dict(inspect.signature(target).parameters)
    variable = inspect.Parameter.VAR_KEYWORD
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name not in injected and parameter.kind is not variable
    }


def _is_module(target: Callable[..., Any]) -> bool:
    return hasattr(target, "configure_optimizers")


def page() -> str:
    """Return the whole page."""
    return "\n".join([INTRODUCTION, *(_section(section) for section in sections())]).rstrip() + "\n"


def _section(section: Section) -> str:
    key, target, is_choice = section
    documentation = parse(_docstring(target, ""))
    lines = [f"## `{key}`" + (f": {_path(target)}" if is_choice else ""), "", _prose(documentation.short_description)]
    known = arguments(target)
    if known:
        lines += ["", "| key | default | meaning |", "|---|---|---|"]
    for name, parameter in known.items():
        default = "that of `model`" if (key, name) == ("data", "tokenizer") else _default(parameter)  # linked
        lines.append(f"| `{name}` | {default} | {_meaning(target, name)} |")
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            lines += ["", f"Further keys: {_meaning(target, name)}"]
    return "\n".join([*lines, ""])


def _path(target: Callable[..., Any]) -> str:
    """Return what a YAML calls it: our classes by their short name, functions by their path."""
    return f"`{target.__name__}`" if inspect.isclass(target) else f"`{target.__module__}.{target.__name__}`"


def _default(parameter: inspect.Parameter) -> str:
    value = parameter.default
    if value is inspect.Parameter.empty:
        return "*required*"
    if is_dataclass(value) and not isinstance(value, type):
        assert value == type(value)(), f"{parameter.name}: its own defaults are in its own table"
        return "its own table"
    if isinstance(value, type):
        return f"`{value.__name__}`"
    if inspect.isfunction(value):  # lambda parameters: torch.optim.AdamW(parameters, lr=1e-6)
        source = inspect.getsource(value)
        called = re.search(rf"{parameter.name}: .* = lambda \w+: torch\.optim\.(\w+)\(\w+, (.+?)\),?$", source, re.M)
        assert called, f"{parameter.name}: cannot tell the default from its source: {source}"
        return f"`{called[1]}({called[2]})`"
    return f"`{_YAML.get(str(value), value)}`"


def _meaning(target: Callable[..., Any], name: str) -> str:
    """Return what the docstring says of an argument; a dataclass or a base class may say it."""
    described = {each.arg_name: each.description for each in parse(_docstring(target, name)).params}
    text = described.get(name)
    assert text, f"{target.__name__} does not describe {name}"
    return _prose(text)


def _docstring(target: Callable[..., Any], name: str) -> str:
    """Return the docstring of `target`, or the first of its base classes' that describes `name`."""
    homes = inspect.getmro(target) if inspect.isclass(target) else (target,)
    for home in homes:
        text = inspect.cleandoc(home.__doc__ or "")
        if not name or re.search(rf"^\s+{name}: ", text, re.MULTILINE):
            return text
    return ""


def _prose(text: str | None) -> str:
    """Put prose on one line, in the words of YAML; a bar would end the cell of a table."""
    line = " ".join((text or "").split()).replace("|", "\\|")
    return re.sub(r"\b(None|True|False)\b", lambda match: _YAML[match[0]], line)


def signatures() -> str:
    """Return the signatures by which the command finds wrong keys before it imports torch."""
    return cli_signatures.as_json(cli_signatures.shipped_content(cli_run.CALLBACKS)) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write page and signatures, or end with 1 where that would change one of them."""
    parser = argparse.ArgumentParser(description="Write docs/configuration.md and remax_lightning/signatures.json.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if one is out of date")
    options = parser.parse_args(arguments)
    for path, fresh in ((PAGE, page()), (cli_schema.SIGNATURES, signatures())):
        if not options.check:
            path.write_text(fresh, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != fresh:
            sys.exit(f"{path.name} is out of date: run python docs/generate_configuration.py")


if __name__ == "__main__":
    main()
