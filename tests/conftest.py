"""Tiny models and tokenizers, made here once a session: nothing is downloaded."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakSet

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "HF_DATASETS_CACHE" not in os.environ:  # prepared rows of the tests, and of the commands that they start
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="remax-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

TESTS = Path(__file__).parent
LONGEST = 0.5
"""Seconds that a test without the mark `slow` may take; on a busy machine half of them are waiting."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more worker than there are cores: a fifth of the time a worker waits, for a process or a deadline."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a file's tests on one worker with its fixtures, and all that use forks on one, which imports for them once.

    Not by marks of groups: xdist 3.8 loses them under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "forks" if uses_forks(path) else path

    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # `longest_files_first` has put them in order
    return ByFile(config, log)


@cache
def uses_forks(path: str) -> bool:
    """Whether a file of tests, named from the root, uses the processes of `helpers/forks.py`, or through others."""
    text = (TESTS.parent / path).read_text(encoding="utf-8")
    users = ("helpers.forks", "helpers.ranks", "helpers.children", "distributed.killing")
    return any(f"from {module} import" in text for module in users)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files without the tests that `-m` asks for, which each worker would import.

    With `-m gpu`, a machine with a GPU may lack what they import.
    """
    from exhaustive import EXHAUSTIVE

    if not collection_path.name.startswith("test_") or collection_path.is_dir():
        return None
    if config.option.markexpr.startswith("exhaustive"):
        path = collection_path.relative_to(TESTS).as_posix()
        is_real = path.startswith("real/") and "real" in config.option.markexpr
        return None if is_real or any(path == file for file, _ in EXHAUSTIVE) else True
    if config.option.markexpr == "gpu":
        return True if "mark.gpu" not in collection_path.read_text(encoding="utf-8") else None
    return None


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Mark what only `make test-all` runs, and notice rows of that list that match nothing any more."""
    from exhaustive import is_exhaustive, unmatched, without_representative

    names = [(item.path.relative_to(TESTS).as_posix(), item.name) for item in items]
    for item, (path, name) in zip(items, names, strict=True):
        if is_exhaustive(path, name):
            item.add_marker(pytest.mark.exhaustive)
    chosen = (
        config.option.keyword
        or getattr(config.option, "lf", False)
        or any("::" in argument for argument in config.args)
    )
    if not chosen and (missing := unmatched(names)):
        raise pytest.UsageError(f"tests/exhaustive.py: no test matches {', '.join(missing)}")
    if not chosen and (bare := without_representative(names)):
        raise pytest.UsageError(f"tests/exhaustive.py: `make test` would run nothing of {', '.join(bare)}")
    yield  # here pytest leaves out what `-m` and `-k` do not choose
    longest_files_first(items)


def longest_files_first(items: list[pytest.Item]) -> None:
    """Put the files that take longest first, those that use forks before all; within a file the order stays.

    A worker that begins a long file at the end leaves the others without work. The mark `slow` may tell the seconds.
    """
    seconds: Counter[Path] = Counter()
    for item in items:
        mark = item.get_closest_marker("slow")
        seconds[item.path] += 0.03 if mark is None else mark.args[0] if mark.args else 1.0  # type: ignore[assignment]
    forks = {path for path in seconds if uses_forks(path.relative_to(TESTS.parent).as_posix())}
    items.sort(key=lambda item: (item.path not in forks, -seconds[item.path]))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the tests that took long and have no mark `slow`: `make quick` waits for them."""
    unmarked = [
        report
        for report in terminalreporter.stats.get("passed", [])
        if report.duration > LONGEST and not {"slow", "real"} & set(report.keywords)
    ]
    if unmarked:
        terminalreporter.section(f"tests above {LONGEST} s without the mark slow")
    for report in sorted(unmarked, key=lambda report: -report.duration):
        terminalreporter.write_line(f"{report.duration:.2f}s {report.nodeid}")


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Search for no garbage while tests are imported. Ranks, which import this module without pytest, keep theirs."""
    gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what the imports have made to no later search for garbage, and search the old objects less often.

    By default an eighth of the suite's time goes into them: a search of all objects takes a third of a second. What the
    imports have left as garbage stays: to look for it would take two.
    """
    gc.freeze()
    gc.set_threshold(2_000, 20, 100)
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _one_parser() -> Iterator[None]:
    """Build the parser of the `remax` command once a process, and let it remember where its keys are."""
    from helpers.parsing import remember_defaults, remember_keys, remember_lookups, share_parser

    with pytest.MonkeyPatch.context() as patch:
        share_parser(patch)
        remember_lookups(patch)
        remember_keys(patch)
        remember_defaults(patch)
        yield


@pytest.fixture(autouse=True, scope="session")
def _figures_stay_where_they_are() -> Iterator[None]:
    """Let Lightning move no figure to the device where it is: half a millisecond each time that one is logged."""
    from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric

    move = _ResultMetric.to

    def to(metric: Any, device: Any, **options: Any) -> Any:
        states = (getattr(metric, name, None) for name in ("value", "cumulated_batch_size"))
        is_there = metric.is_tensor and all(state is None or state.device == device for state in states)
        return metric if is_there else move(metric, device, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ResultMetric, "to", to)
        yield


@pytest.fixture(autouse=True, scope="session")
def _packages_stay_the_same() -> Iterator[None]:
    """Let Lightning read once which callbacks other packages bring: each new trainer reads the files of them all."""
    from lightning.fabric.utilities import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", cache(registry.entry_points))
        yield


@pytest.fixture(autouse=True, scope="session")
def _loaders() -> Iterator[WeakSet[Any]]:
    """The iterators over loaders with worker processes that are still there."""
    from torchdata.stateful_dataloader.stateful_dataloader import _StatefulMultiProcessingDataLoaderIter as Workers

    loaders, begin = WeakSet[Any](), Workers.__init__

    def noticed(loader: Any, *args: Any, **options: Any) -> None:
        begin(loader, *args, **options)
        loaders.add(loader)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workers, "__init__", noticed)
        yield loaders


@pytest.fixture(autouse=True)
def _no_worker_outlives_its_test(_loaders: WeakSet[Any]) -> Iterator[None]:
    """End the workers of loaders, which a search for garbage would end later, waiting 5 seconds for each."""
    yield
    for loader in list(_loaders):
        loader._shutdown_workers()


@pytest.fixture(autouse=True)
def _lightning_speaks_as_before() -> Iterator[None]:
    """Restore what a run may have changed of Lightning's logging, so that no test depends on another."""
    import logging

    from lightning.fabric.utilities.rank_zero import rank_zero_only

    rank = rank_zero_only.rank
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    states = [(logger.level, logger.disabled, logger.propagate) for logger in loggers]
    yield
    rank_zero_only.rank = rank
    for logger, (level, disabled, propagate) in zip(loggers, states, strict=True):
        if logger.level != level:  # this empties the caches of all loggers, a millisecond for every test
            logger.setLevel(level)
        logger.disabled, logger.propagate = disabled, propagate


CHARACTERS = "0123456789+-=*?. abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ\n:,!#$<>/'"
FILLERS = ("<turn>", *"αβγδεζηθικλμ")
"""Make as many tokens as the tiny models have embeddings, 96, since an id without a token is never drawn."""


def make_tokenizer(*, pad_is_eos: bool = False, bos: bool = True, chat_template: str | None = None) -> Any:
    """A character tokenizer of transformers' own class."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *CHARACTERS, *FILLERS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    from tokenizers.decoders import Fuse

    tokenizer.decoder = Fuse()
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>" if pad_is_eos else "<pad>",
    )
    if chat_template:
        fast.chat_template = chat_template
    return fast


def tiny_config(family: str, vocab_size: int = 96) -> Any:
    """The configuration of a two-layer model of `family`: llama, qwen2, gpt2 or opt."""
    from transformers import GPT2Config, LlamaConfig, OPTConfig, Qwen2Config

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": vocab_size}
    if family == "llama":
        return LlamaConfig(**small, **ids, intermediate_size=64, max_position_embeddings=256)
    if family == "qwen2":
        return Qwen2Config(**small, **ids, intermediate_size=64, num_key_value_heads=1, max_position_embeddings=256)
    if family == "gpt2":
        return GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=256, **ids)
    if family == "opt":
        return OPTConfig(**small, **ids, ffn_dim=64, max_position_embeddings=256, word_embed_proj_dim=32, dropout=0.0)
    raise ValueError(family)


def tiny_model(family: str = "llama", seed: int = 0, vocab_size: int = 96) -> Any:
    """A random causal language model of `family` in eval mode, with logits far enough from uniform to tell apart."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, vocab_size))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.eval()


@pytest.fixture
def no_garbage_search() -> Iterator[None]:
    """For a test that calls as deep as Python can: what is collected there cannot clean up, a failure for pytest."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A CUDA device that is really the CPU, for the length of a test."""
    from fake_cuda import pretend

    with pretend(monkeypatch) as device:
        yield device


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama policy and its tokenizer, as `from_pretrained` reads it."""
    path = tmp_path_factory.mktemp("policy")
    tiny_model("llama").save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """The GSM8K folder, where this machine has it beside the project."""
    path = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
    if not path.is_dir():
        pytest.skip("no GSM8K beside this checkout")
    return path
