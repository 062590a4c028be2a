"""Measure how much code a reader opens, and write the table of `architecture.md`, beside this file.

`python docs/measure_architecture.py` trains a tiny random model for three optimizer steps on the CPU, watches the
second one with `sys.setprofile`, and reads the source of the package. It takes about half a minute and downloads
nothing. It also prints which functions the step calls, file by file.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import os
import statistics
import sys
import tempfile
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import yaml

import remax_lightning

PAGE = Path(__file__).with_name("architecture.md")
BEGIN, END = "<!-- made by docs/measure_architecture.py -->", "<!-- end of what is made -->"
PACKAGE = Path(remax_lightning.__file__).parent

VAGUE_NAMES = frozenset({"each", "found", "own", "kept", "there", "heard", "given"})
"""Words that say nothing about a value; a variable has the name of its value instead."""
SHARDING_MARKERS = frozenset({"ds_id", "FSDPModule"})
"""What DeepSpeed and FSDP2 leave on a sharded model, and code looks for to tell that it is sharded."""
COLLECTIVES = frozenset(
    {
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_object",
        "all_reduce",
        "broadcast_object_list",
        "gather_object",
        "reduce_boolean_decision",
        "reduce_scatter_tensor",
    }
)
"""Calls that combine values of several ranks."""


# ---- The source ----


class SourceFigures(NamedTuple):
    """What the source of the package says, without running it.

    Args:
        files: Python files.
        lines: their lines.
        median_lines: of a file.
        comment_lines: lines with a comment that is not an instruction to a tool.
        vague_names: assignments and parameters with one of `VAGUE_NAMES`.
        sharding_readers: files that look for one of `SHARDING_MARKERS`.
        collective_callers: files that call one of `COLLECTIVES`, or `reduce` of a strategy.
    """

    files: int
    lines: int
    median_lines: float
    comment_lines: int
    vague_names: int
    sharding_readers: list[str]
    collective_callers: list[str]


def count_comments(source: str) -> int:
    """Return the number of comments in `source`, instructions to linters and type checkers left out."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = (token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT)
    return sum(not comment.startswith(("noqa", "type:", "fmt:")) for comment in comments)


def count_vague_names(tree: ast.AST) -> int:
    """Return how many assignments, loops and parameters in `tree` bind one of `VAGUE_NAMES`."""
    bound = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    bound += [node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)]
    return sum(name in VAGUE_NAMES for name in bound)


def reads_sharding(tree: ast.AST) -> bool:
    """Return whether `tree` names one of `SHARDING_MARKERS`: as a name, an attribute, an import or a whole string."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name) | ast.Constant(value=str(name)):
                if name in SHARDING_MARKERS:
                    return True
    return False


def calls_collective(tree: ast.AST) -> bool:
    """Return whether `tree` calls one of `COLLECTIVES`, or `reduce` of a strategy."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if name in COLLECTIVES or (name == "reduce" and owner.endswith("strategy")):
            return True
    return False


def measure_source(files: Iterable[Path]) -> SourceFigures:
    """Return the figures of the source in `files`."""
    sources = {str(file.relative_to(PACKAGE)): file.read_text(encoding="utf-8") for file in sorted(files)}
    trees = {name: ast.parse(source) for name, source in sources.items()}
    lengths = [source.count("\n") for source in sources.values()]
    return SourceFigures(
        files=len(sources),
        lines=sum(lengths),
        median_lines=statistics.median(lengths),
        comment_lines=sum(map(count_comments, sources.values())),
        vague_names=sum(map(count_vague_names, trees.values())),
        sharding_readers=[name for name, tree in trees.items() if reads_sharding(tree)],
        collective_callers=[name for name, tree in trees.items() if calls_collective(tree)],
    )


# ---- One training step ----


class StepFigures(NamedTuple):
    """What one call of `training_step` runs of the package.

    Args:
        functions: by file, the qualified names of the functions that the step calls.
        stack: most frames of the package on top of each other, from `training_step` on.
        data_files: files of `data` that ran before the step: they make the batch from the rows.
    """

    functions: dict[str, set[str]]
    stack: list[str]
    data_files: set[str]

    @property
    def files(self) -> int:
        """Files that the step visits."""
        return len(self.functions)

    @property
    def depth(self) -> int:
        """Frames of the package on top of each other, `training_step` included."""
        return len(self.stack)

    @property
    def num_functions(self) -> int:
        """Functions that the step calls."""
        return sum(map(len, self.functions.values()))


class StepProfiler:
    """Follows calls into the package, and keeps those of one training step.

    Args:
        step: which call of `training_step` is kept, counted from 1. From the second on, caches are filled.
    """

    def __init__(self, step: int = 2) -> None:
        self.step = step
        self.functions: dict[str, set[str]] = defaultdict(set)
        self.data_files: set[str] = set()
        self.deepest: list[str] = []
        self._steps_seen = 0
        self._stack: list[str] = []  # the frames of the package
        self._start: int | None = None  # how many of them are below the training step that is kept; None outside of it
        self._folder = f"{PACKAGE}{os.sep}"

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:  # noqa: ARG002 (the signature of `sys.setprofile`)
        """Take an event of `sys.setprofile`.

        Calls of C functions and comprehensions do not count, nor do bodies of classes, which run as a file is imported.
        """
        code = frame.f_code
        is_function = "<" not in code.co_name and bool(code.co_flags & inspect.CO_OPTIMIZED)
        if event not in ("call", "return") or not code.co_filename.startswith(self._folder) or not is_function:
            return
        if event == "return":
            if self._stack:
                self._stack.pop()
            if self._start == len(self._stack):
                self._start = None
            return

        file = Path(code.co_filename).relative_to(PACKAGE).as_posix()
        starts_step = code.co_name == "training_step"
        self._steps_seen += starts_step
        if starts_step and self._steps_seen == self.step:
            self._start = len(self._stack)
        self._stack.append(f"{file} {code.co_qualname}")
        if self._start is not None:
            self.functions[file].add(code.co_qualname)
            if len(self._stack) - self._start > len(self.deepest):
                self.deepest = self._stack[self._start :]
        elif self._steps_seen < self.step and file.startswith("data/"):
            self.data_files.add(file)

    def figures(self) -> StepFigures:
        """Return what was kept."""
        return StepFigures(dict(self.functions), self.deepest, self.data_files)


CHARACTERS = "0123456789+= abcdefghijklmnopqrstuvwxyz"
REWARD = """\
def count_digits(prompts, responses, rows):
    return [sum(map(str.isdigit, response)) / 8 for response in responses]
"""


def write_run(folder: Path) -> Path:
    """Write a random policy of two layers, its tokenizer, prompts, a reward and a configuration; return its path."""
    import torch
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *CHARACTERS]
    tokenizer = Tokenizer(WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder / "policy")

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "policy")

    prompts = (json.dumps({"prompt": f"{number} + {number} ="}) for number in range(20))
    (folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    (folder / "measured_reward.py").write_text(REWARD, encoding="utf-8")
    policy = {"path": str(folder / "policy")}
    run = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 3,
            "gradient_clip_val": 1.0,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {
            "policy": policy,
            "reference": policy,
            "reward": {"class_path": "FunctionReward", "init_args": {"function": "measured_reward.count_digits"}},
            "sampling": {"max_response_length": 8},
        },
        "data": {
            "path": str(folder / "prompts.jsonl"),
            "val_size": 4,
            "batch_size": 4,
            "max_prompt_length": 16,
            "loading": {"cache": False},  # the rows of an earlier measurement would hide the files that prepare them
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Make `folder` the current one and importable, for the length of a block."""
    before, arguments = Path.cwd(), sys.argv
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path.remove(str(folder))
        sys.argv = arguments


def measure_step() -> StepFigures:
    """Train a tiny policy by the `remax` command, in a temporary folder, and return the figures of its second step."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from remax_lightning.cli import main as remax

    profiler = StepProfiler()
    with tempfile.TemporaryDirectory() as name, inside(Path(name)), redirect_stdout(sys.stderr):
        sys.argv = ["remax", "fit", "--config", str(write_run(Path(name)))]
        sys.setprofile(profiler)
        try:
            remax()
        finally:
            sys.setprofile(None)
    return profiler.figures()


# ---- The table ----


class Figures(NamedTuple):
    """All that is measured."""

    source: SourceFigures
    step: StepFigures


class Row(NamedTuple):
    """A line of the table.

    Args:
        what: what is measured.
        before: its value in version 0.1.
        goal: what the second design asks for.
        value: how it is read off the figures.
    """

    what: str
    before: str
    goal: str
    value: Callable[[Figures], str]


ROWS = [
    Row("package files that one training step visits", "35", "26", lambda figures: str(figures.step.files)),
    Row("functions that it calls", "140", "100", lambda figures: str(figures.step.num_functions)),
    Row("frames deep", "13", "9", lambda figures: str(figures.step.depth)),
    Row(
        "files from a row of the data to its gradient",
        "46",
        "30",
        lambda figures: str(figures.step.files + len(figures.step.data_files - figures.step.functions.keys())),
    ),
    Row("files in the package", "151", "about 110", lambda figures: str(figures.source.files)),
    Row("median lines of a file", "121", "150 to 200", lambda figures: f"{figures.source.median_lines:.0f}"),
    Row(
        'files that ask "is it sharded"',
        "10",
        "1",
        lambda figures: str(len(figures.source.sharding_readers)),
    ),
    Row("files that reduce over ranks", "9", "1", lambda figures: str(len(figures.source.collective_callers))),
    Row(
        "vague names (`each`, `found`, `own`, ...) per 1,000 lines",
        "14",
        "below 1",
        lambda figures: f"{1000 * figures.source.vague_names / figures.source.lines:.1f}",
    ),
    Row(
        "comments as a share of the lines",
        "1.3 %",
        "5 % or more",
        lambda figures: f"{100 * figures.source.comment_lines / figures.source.lines:.1f} %",
    ),
]


def table(source: SourceFigures, step: StepFigures) -> str:
    """Return the table of all figures."""
    lines = ["| | 0.1 | goal | now |", "|---|---|---|---|"]
    lines += [f"| {row.what} | {row.before} | {row.goal} | {row.value(Figures(source, step))} |" for row in ROWS]
    return "\n".join(lines)


def main() -> None:
    """Put the table into the page and print what the step calls."""
    step, source = measure_step(), measure_source(PACKAGE.rglob("*.py"))
    made = table(source, step)
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")

    print(made)
    print(f"\nsharding: {', '.join(source.sharding_readers)}\ncollectives: {', '.join(source.collective_callers)}\n")
    for file in sorted(step.functions):
        print(f"{file}: {', '.join(sorted(step.functions[file]))}")
    print(f"\nbefore the step: {', '.join(sorted(step.data_files))}\ndeepest:")
    for frame in step.stack:
        print(f"  {frame}")


if __name__ == "__main__":
    main()
