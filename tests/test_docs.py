"""The documentation site, and the pages that name options of other projects."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import shutil
import sys
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest
from helpers.pages import PAGES, README, ROOT, tables

MIGRATING = (ROOT / "docs" / "migrating.md").read_text()


def load(name: str) -> ModuleType:
    """A program of `docs`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_backticks(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


# The site


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    return load("site_hooks")


def test_links_lead_to_pages_of_the_site(hooks: ModuleType) -> None:
    text = "[a](data.md#batch-sizes) [b](../configs/base.yaml) [c](../README.md#presets) [d](https://x.org) [e](#here)"
    assert hooks.convert_links(text, "docs/lora.md") == (
        "[a](data.md#batch-sizes) [b](source/configs/base.yaml.md) [c](index.md#presets) [d](https://x.org) [e](#here)"
    )
    text = "[a](docs/data.md) ![b](docs/report.png) [c](configs/presets) [d](docs/README.md)"
    assert hooks.convert_links(text, "README.md") == (
        "[a](data.md) ![b](report.png) [c](source/configs/presets/index.md) [d](pages.md)"
    )
    assert hooks.convert_links("[a](docs/data.md)", "CONTRIBUTING.md") == "[a](../data.md)"


def test_tutorials_are_pages_with_their_code(hooks: ModuleType) -> None:
    pages = dict(hooks.notebook_pages())
    text = pages["docs/tutorials/own_reward.ipynb"]
    assert text.startswith(
        "# A reward of your own\n\n*This page is the notebook `docs/tutorials/own_reward.ipynb`.*\n\n"
    )
    assert "```python\ndef sevens(prompts, responses, rows):\n" in text
    link = hooks.convert_links("[a](own_reward.ipynb) [b](../../README.md#presets)", "docs/tutorials/from_trl.ipynb")
    assert link == "[a](own_reward.md) [b](../index.md#presets)"
    shown = (ROOT / "mkdocs.yml").read_text()
    assert [page for page in pages if f": {hooks.site_path(page)}\n" not in shown] == []


def test_linked_folders_have_pages_for_their_files(hooks: ModuleType) -> None:
    linked = hooks.linked_files(["docs/scaling.md"])
    assert {"configs/strategies", "configs/strategies/zero3.yaml"} <= set(linked)
    assert "- [zero3.yaml](zero3.yaml.md)\n" in hooks.source_page("configs/strategies")
    page = hooks.source_page("configs/strategies/zero3.yaml")
    assert page.endswith(f"```yaml\n{(ROOT / 'configs/strategies/zero3.yaml').read_text().rstrip()}\n```\n")


def test_every_page_is_in_the_navigation_and_in_the_index(hooks: ModuleType) -> None:
    shown = (ROOT / "mkdocs.yml").read_text()
    index = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES:
        path = page.relative_to(ROOT).as_posix()
        assert re.search(rf"[ :]{re.escape(hooks.site_path(path))}$", shown, re.MULTILINE), path
        assert page.parent == ROOT or page.name == "README.md" or f"]({page.name})" in index, path
    for path, text in hooks.reference_pages():
        assert re.search(rf"[ :]?{re.escape(path)}$", shown, re.MULTILINE), path
        assert "| [`" not in text or re.search(r"\) \| \w.* \|\n", text)


@pytest.fixture(scope="module")
def mkdocs() -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        reason = "mkdocs is not installed: pip install '.[docs]'"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@pytest.mark.parametrize("target", ["docs", "test-rest", "test-left"])
def test_targets_that_build_the_site_install_what_it_takes(target: str, tmp_path: Path) -> None:
    import subprocess

    command = ["make", "--dry-run", f"VENV={tmp_path / 'new'}", target]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(r"--editable '\.\[([a-z-]+,)?docs\]'", told)


def build(site: Path, config: Path) -> tuple[int, str]:
    """Build the site as `make docs` does; exit code and what it says."""
    import subprocess

    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("mkdocs")
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    code, told = build(tmp_path / "site", ROOT / "mkdocs.yml")
    assert code == 0, told
    modules = (tmp_path / "site" / "reference" / "modules" / "index.html").read_text()
    assert 'id="remax_lightning.modules.ReMaxModule"' in modules
    assert "kl_coef" in modules
    assert 'href="source/configs/demo.yaml/"' in (tmp_path / "site" / "index.html").read_text()
    told_by_file = (tmp_path / "site" / "source" / "configs" / "demo.yaml" / "index.html").read_text()
    assert "kl_coef" in told_by_file
    pages = [page.read_text() for page in (tmp_path / "site").rglob("index.html")]
    fetched = {
        address for page in pages for address in re.findall(r'<(?:script|link)[^>]*(?:src|href)="(https?:[^"]+)', page)
    }
    assert fetched == set()  # a page needs no network


@pytest.mark.slow
@pytest.mark.usefixtures("mkdocs")
def test_links_that_lead_nowhere_fail_the_site(tmp_path: Path) -> None:
    for name in ("docs", "configs", "benchmarks", "examples", "remax_lightning"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for page in (*ROOT.glob("*.md"), ROOT / "LICENSE", ROOT / "Dockerfile"):
        shutil.copy(page, tmp_path)
    # without the API reference, which takes most of the time
    config = (ROOT / "mkdocs.yml").read_text().partition("\nplugins:")[0] + "\nplugins: []\n"
    rest = (ROOT / "mkdocs.yml").read_text().partition("\nmarkdown_extensions:")
    (tmp_path / "mkdocs.yml").write_text(config + "".join(rest[1:]))
    page = tmp_path / "docs" / "guards.md"
    links = ["../configs/gone.yaml", "gone.md", "data.md#gone-1", "../README.md#gone-2"]
    page.write_text(page.read_text() + "".join(f"\n[here]({link})\n" for link in links))
    code, told = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert code != 0
    warnings = [line for line in told.splitlines() if "WARNING" in line and "guards.md" in line]  # each fails by itself
    for name in ("configs/gone.yaml", "gone.md", "gone-1", "gone-2"):
        assert any(name in line for line in warnings), told


# Coming from other projects


def known_keys() -> set[str]:
    """Every key of a configuration that a page may name."""
    import torch
    from lightning import Trainer

    configuration = load("generate_configuration")
    keys = {"seed_everything", *(f"trainer.{name}" for name in inspect.signature(Trainer.__init__).parameters)}
    keys |= {f"model.optimizer.init_args.{name}" for name in inspect.signature(torch.optim.AdamW).parameters}
    for section in configuration.sections():
        for prefix in section.key.replace("`", "").replace(" and ", ", ").split(", "):
            chosen = section.is_choice and prefix not in ("model", "data")  # what stands under class_path's init_args
            names = configuration.arguments(section.target)
            keys |= {f"{prefix}.init_args.{name}" if chosen else f"{prefix}.{name}" for name in names}
    return keys


def known_metrics() -> set[str]:
    """Every log key that the README or the page about evaluation tells of."""
    logged = re.findall(r"`((?:train|val|time|throughput)/[\w/]+)`", README)
    evaluation = tables((ROOT / "docs" / "evaluation.md").read_text())
    figures = [name for table in evaluation for row in table for name in in_backticks(row[0])]
    return {*logged, *(f"{stage}/{re.sub('_4$', '_k', name)}" for stage in ("val", "test") for name in figures)}


def migration_rows(logs: bool) -> list[list[str]]:
    """The rows of the tables of options, or of metrics."""
    chosen = [table for table in tables(MIGRATING) if table[0][0].endswith(" logs") == logs]
    assert len(chosen) >= 4
    return [row for table in chosen for row in table[1:]]


def test_every_key_for_an_option_of_another_project_is_known() -> None:
    keys = known_keys()
    for option, key, note in migration_rows(logs=False):
        named = in_backticks(key)
        assert named or key == "–", option  # noqa: RUF001 - the dash of the page
        assert [name for name in named if name not in keys] == [], option
        # notes name values and keys: a key there has a dot
        dotted = [
            name.partition(":")[0]
            for name in in_backticks(note)
            if re.match(r"(model|data|trainer|evaluation)\.", name)
        ]
        assert [name for text in dotted for name in re.split(r" [*/] ", text) if name not in keys and "." in name] == []


def test_every_metric_for_one_of_another_project_is_known() -> None:
    metrics = known_metrics()
    for theirs, ours, _ in migration_rows(logs=True):
        named = in_backticks(ours)
        assert named or ours == "–", theirs  # noqa: RUF001
        assert [name for name in named if re.sub(r"pass_at_\d+", "pass_at_k", name) not in metrics] == [], theirs


def trl_fields(name: str) -> set[str]:
    """The fields that a configuration of TRL adds to `TrainingArguments`, read from its source."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "trainer" / f"{name}_config.py"
    [kind] = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    return {
        node.target.id for node in kind.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed: pip install '.[bench]'")
def test_trls_fields_are_told_by_their_names_and_all_of_them() -> None:
    from transformers import TrainingArguments

    [table] = [table for table in tables(MIGRATING) if table[1][0].startswith("`num_generations`")]
    told = {name for row in table[1:] for name in in_backticks(row[0])}
    own = (trl_fields("rloo") | trl_fields("grpo")) - {"vllm_importance_sampling_cap"}
    there = own | {field.name for field in fields(TrainingArguments)}
    assert {name for name in told if "*" not in name} <= there
    assert {name for name in own if not any(fnmatch(name, pattern) for pattern in told)} == set()
