"""The architecture, held by a test: who may import whom, how large a file may be, and what a light import loads."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import remax_lightning

PACKAGE = Path(remax_lightning.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(file.relative_to(PACKAGE)) for file in FILES]

LOWER = {
    *("functional", "types", "config", "errors", "distributed", "sharding", "run_folder", "files"),
    *("loggers", "baselines", "http_client", "credentials"),
}
ANYTHING = {file.stem if file.parent == PACKAGE else file.relative_to(PACKAGE).parts[0] for file in FILES}
ALLOWED = {
    "__init__": {"version"},
    "version": set(),
    "errors": set(),
    "types": {"files"},
    "baselines": {"errors", "functional", "evaluation.statistics"},
    "config": {"baselines", "errors", "functional"},
    "distributed": {"errors"},
    "sharding": {"errors"},
    "files": {"errors"},
    "credentials": set(),
    "loggers": {"credentials", "errors", "files", "version"},
    "run_folder": {"distributed", "errors", "files", "loggers"},
    "functional": set(),
    "http_client": set(),
    "models": LOWER,
    # What strategies load is read there first.
    "strategies": LOWER | {"models.checkpoint_reader", "models.checksums", "models.shard_reader"},
    "data": LOWER,
    "rewards": LOWER | {"models", "data.conversations", "data.chat_templates"},  # the tokens that it was trained on
    "rollout": LOWER | {"models", "strategies"},
    "training": LOWER | {"rollout", "rewards", "models", "strategies", "data.tokenizers"},
    "evaluation": LOWER
    | {"rollout", "rewards", "models", "strategies", "training", "modules"}
    # responses of the data set, as the supervised stage trains them
    | {"data.conversations", "data.chat_templates", "data.tokenizers"},
    "callbacks": LOWER | {"models", "evaluation", "strategies", "data.tokenizers"},
    "modules": LOWER
    | {"training", "evaluation", "rollout", "rewards", "models", "strategies", "data.tokenizers"}
    | {"data.collate", "data.formatting"},  # prompts that `generate` is given, rendered as in training
    "tasks": ANYTHING,
    "yaml_files": set(),
    "cli_errors": {"cli_paths", "cli_shorthand", "errors"},
    "cli_shorthand": {"errors"},
    "shipped_configs": {"errors"},
    "cli_arguments": {"cli_errors", "cli_shorthand", "shipped_configs", "yaml_files"},
    "cli_schema": {"cli_errors", "errors", "shipped_configs"},
    "cli_rules": set(),
    "cli_paths": set(),
    "cli_keys": {
        "cli_arguments",
        "cli_errors",
        "cli_paths",
        "cli_rules",
        "cli_schema",
        "cli_shorthand",
        "errors",
        "shipped_configs",
    },
    "cli_signatures": {"baselines", "cli_help", "cli_schema", "cli_shorthand", "errors", "rewards"},
    "cli_parser": {
        *("errors", "cli_arguments", "cli_errors", "cli_checks", "cli_keys", "cli_shorthand", "cli_signatures"),
        "yaml_files",
    },
    "cli_checks": {"cli_arguments", "cli_errors", "cli_rules", "errors", "files"},
    "cli_exit": {"errors", "cli_errors", "files", "run_folder"},
    "launcher": set(),
    "cli_help": set(),
    "cli": {"cli_errors", "cli_exit", "cli_help", "cli_keys", "errors", "launcher", "tools.parsers", "version"},
    "__main__": {"cli"},
    "cli_run": ANYTHING,
    "tools": ANYTHING,
}
"""What each part of the package may import of it, beside itself."""


def part_of(module: str) -> str:
    """The folder or file of the package that a dotted name under it stands for; what it exports itself is `__init__`"""
    first = module.split(".")[0]
    return first if (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file() else "__init__"


@cache
def nodes(source: str) -> list[ast.AST]:
    """The syntax tree of `source`, which several checks read."""
    return list(ast.walk(ast.parse(source)))


def imports(source: str) -> Iterator[str]:
    """Every module that `source` imports, inside functions and conditions too; `from a import b` gives `a.b`."""
    for node in nodes(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the layer"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def of_package(source: str) -> list[str]:
    """Dotted names under the package that `source` imports."""
    prefix = "remax_lightning."
    return [name.removeprefix(prefix) for name in imports(source) if name.startswith(prefix)]


def forbidden(own: str, source: str) -> list[str]:
    """The imports in `source`, a file of part `own`, that the layers forbid."""
    allowed = ALLOWED[own] | {own}
    return [
        name
        for name in of_package(source)
        if part_of(name) not in allowed and not any(name.startswith(f"{each}.") for each in allowed if "." in each)
    ]


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_a_file_imports_only_what_its_layer_may(file: Path) -> None:
    own = part_of(file.relative_to(PACKAGE).with_suffix("").parts[0])
    assert forbidden(own, file.read_text()) == []


def test_every_part_has_a_layer() -> None:
    assert set(ALLOWED) >= ANYTHING


@pytest.mark.parametrize(
    ("own", "source"),
    [
        ("functional", "from remax_lightning.types import Rollout"),
        ("rewards", "def f():\n    from remax_lightning.training import worker"),
        ("callbacks", "import remax_lightning.modules.remax"),
        ("modules", "from remax_lightning.data import PromptDataModule"),
        ("modules", "from remax_lightning import cli"),
        ("types", "if True:\n    from remax_lightning.errors import UserError"),
        ("data", "from remax_lightning import ReMaxModule"),
    ],
)
def test_the_check_sees_a_wrong_import(own: str, source: str) -> None:
    assert len(forbidden(own, source)) == 1


@pytest.mark.slow
def test_only_tools_import_the_command_line() -> None:
    users = {part_of(name.split("/")[0].removesuffix(".py")) for name, file in zip(NAMES, FILES, strict=True)
             if any(part_of(each) in ("cli", "cli_run") for each in of_package(file.read_text()))}  # fmt: skip
    assert users <= {"tools", "cli", "__main__"}


SHARDING_NAMES = {"ds_id", "ds_shape", "ds_numel", "FSDPModule", "GatheredParameters", "get_base_model"}
COLLECTIVES = {
    "all_gather", "all_gather_object", "all_reduce", "all_to_all", "barrier", "broadcast", "broadcast_object_list",
    "destroy_process_group", "gather_object", "get_rank", "get_world_size", "init_process_group", "new_group",
    "reduce_scatter", "scatter_object_list",
}  # fmt: skip
"""What talks to other ranks, as a method of `torch.distributed` or of Lightning's strategies."""


TALKING = {"distributed.py", "remax_vllm_group.py"}
"""The collectives of ranks, and those of the trainer with the workers of a vLLM server."""


def mentions(source: str, names: set[str]) -> set[str]:
    """The names that `source` uses: as an attribute, as an import, or in a string of its own, as `getattr` takes it."""
    used: set[str] = set()
    for node in nodes(source):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            used.add(node.value)
    return used & names


def calls_collectives(source: str) -> bool:
    """Whether `source` calls a collective, or asks `torch.distributed` for its process group."""
    attributes = [node for node in nodes(source) if isinstance(node, ast.Attribute)]
    # Others may have a method `reduce` too.
    reduces = any(node.attr == "reduce" and ast.unparse(node.value).endswith("strategy") for node in attributes)
    from_torch = {f"torch.distributed.{name}" for name in COLLECTIVES} & set(imports(source))
    return bool(
        {node.attr for node in attributes} & COLLECTIVES
        or reduces
        or from_torch
        or "torch.distributed.is_initialized" in source
    )


@pytest.mark.parametrize("file", [file for file in FILES if file.name != "sharding.py"], ids=lambda file: file.name)
def test_only_sharding_knows_how_engines_mark_what_they_shard(file: Path) -> None:
    assert mentions(file.read_text(), SHARDING_NAMES) == set()


@pytest.mark.parametrize("file", [file for file in FILES if file.name not in TALKING], ids=lambda file: file.name)
def test_only_distributed_calls_collectives(file: Path) -> None:
    assert not calls_collectives(file.read_text())


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.distributed.all_reduce(x)",
        "total = trainer.strategy.reduce(x, reduce_op='sum')",
        "from functools import partial\nf = partial(trainer.strategy.reduce, reduce_op='sum')",
        "from torch.distributed import all_gather_object",
        "self.broadcast(path)",
        "ranks = torch.distributed.get_world_size()",
    ],
)
def test_the_check_sees_a_collective(source: str) -> None:
    assert calls_collectives(source)


@pytest.mark.parametrize(
    "source",
    [
        "parameter.ds_id",
        "getattr(p, 'ds_shape', None)",
        "from torch.distributed.fsdp import FSDPModule",
        "m.get_base_model()",
    ],
)
def test_the_check_sees_a_mark_of_sharding(source: str) -> None:
    assert mentions(source, SHARDING_NAMES)


@pytest.mark.parametrize("file", sorted((PACKAGE / "functional").glob("*.py")), ids=lambda file: file.name)
def test_functional_needs_torch_alone(file: Path) -> None:
    roots = {name.split(".")[0] for name in imports(file.read_text())}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "remax_lightning"}


LIGHT = """
import json, sys

loaded, before = {}, set()
def note(stage):
    loaded[stage] = sorted(set(sys.modules) - before)

import remax_lightning
note("package")
import lightning.pytorch
before = set(sys.modules)
import remax_lightning.callbacks
note("callbacks")
import remax_lightning.rewards as rewards
assert rewards.__all__
note("rewards")
import remax_lightning.data
note("data")
import remax_lightning.cli_run
note("the command")
print(json.dumps(loaded), file=sys.stderr)
"""
"""Imports one part after the other, those that may load least first, and notes which modules are there by then."""

HEAVY = {
    "package": {"torch", "lightning", "transformers", "datasets", "deepspeed", "peft"},
    "callbacks": {"tensorboard", "transformers", "datasets", "deepspeed", "peft"},
    "rewards": {"transformers", "datasets", "deepspeed", "peft"},
    "data": {"datasets", "deepspeed", "peft", "pyarrow", "transformers.modeling_utils"},
    "the command": {"datasets", "deepspeed", "peft", "transformers.modeling_utils"},
}
"""What a part loads only once it is used."""


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """The modules that each part has loaded, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return json.loads(result.stderr.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("part", HEAVY)
def test_an_import_loads_nothing_heavy(part: str, loaded: dict[str, list[str]]) -> None:
    names = set(loaded[part])
    assert "remax_lightning" in names or part != "package"
    assert not {name for name in HEAVY[part] if name in names}
    assert not {name for name in names if is_a_model(name)}


def is_a_model(module: str) -> bool:
    """Whether it is the code of one of transformers' models."""
    within = module.startswith("transformers.models.") and not module.startswith("transformers.models.auto.")
    return within and ".modeling_" in module


@pytest.mark.slow
def test_no_test_imports_another() -> None:
    """What several tests need stands in a module without tests: in `tests/helpers`, or beside them."""
    tests = Path(__file__).parent
    test_modules = {".".join(path.relative_to(tests).with_suffix("").parts) for path in tests.rglob("test_*.py")}
    for path in tests.rglob("*.py"):
        names = set(imports(path.read_text()))
        parents = {name.rpartition(".")[0] for name in names}
        assert not (names | parents) & test_modules, path
