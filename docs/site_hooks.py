"""Hooks of the documentation site: pages for files outside `docs`, links to them, and pages of the API reference.

The pages are written for a code host, where `../configs/base.yaml` leads to the file. In the site every file and folder
that a page links to is a page of its own, so that a link never leaves the site and `mkdocs build --strict` checks it.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

PAGES = {
    "README.md": "index.md",
    "docs/README.md": "pages.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
}
"""Pages that have another place in the site: their path in the repository, and their path in the site."""

PACKAGES = (
    "modules",
    "functional",
    "config",
    "types",
    "models",
    "rollout",
    "rewards",
    "baselines",
    "data",
    "callbacks",
    "loggers",
    "strategies",
    "errors",
)
"""Parts of the package with a page in the API reference."""

LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".jsonl": "json", ".toml": "toml", "": "text"}
"""Language of the files that may be shown, by suffix."""

LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=\))")
"""A link to a file: `](`, the path, and the anchor if there is one."""


def site_path(path: str) -> str:
    """Return where the site has a file or a folder of the repository."""
    # "docs/data.md" -> "data.md", "docs/tutorials/a.ipynb" -> "tutorials/a.md", "configs/base.yaml" ->
    # "source/configs/base.yaml.md"
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    return f"source/{path}/index.md" if (ROOT / path).is_dir() else f"source/{path}.md"


def repository_path(path: str) -> str | None:
    """Return where the repository has a page of the site; None for pages that are made here."""
    if path.startswith(("source/", "reference/")):
        return None
    return next((home for home, page in PAGES.items() if page == path), f"docs/{path}")


def convert_links(text: str, path: str) -> str:
    """Return the text of a page with its links as the site has them.

    Args:
        text: Markdown.
        path: of the page in the repository.
    """
    here = posixpath.dirname(site_path(path)) or "."

    def convert(match: re.Match[str]) -> str:
        return f"{match[1]}{posixpath.relpath(site_path(_target(path, match[2])), here)}{match[3] or ''}"

    return LINK.sub(convert, text)


def linked_files(pages: Iterable[str]) -> list[str]:
    """Return the files and folders of the repository that pages link to, and the files in these folders.

    Args:
        pages: paths in the repository.
    """
    paths: set[str] = set()
    for page in pages:
        for match in LINK.finditer((ROOT / page).read_text(encoding="utf-8")):
            target = _target(page, match[2])
            if site_path(target).startswith("source/") and (ROOT / target).exists():
                paths.add(target)
    paths |= {file for path in paths if (ROOT / path).is_dir() for file in _shown_files(path)}
    return sorted(paths)


def _target(page: str, link: str) -> str:
    # "docs/data.md", "../configs/base.yaml" -> "configs/base.yaml"
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _shown_files(folder: str) -> Iterator[str]:
    for path in sorted((ROOT / folder).iterdir()):
        if path.is_file() and path.suffix in LANGUAGES and not path.name.startswith("."):
            yield f"{folder}/{path.name}"


def source_page(path: str) -> str:
    """Return the page of a file, or of a folder with links to its files."""
    head = f"---\ntitle: {path}\nsearch: {{exclude: true}}\n---\n\n# `{path}`\n\n"
    if (ROOT / path).is_dir():
        names = (posixpath.basename(file) for file in _shown_files(path))
        return head + "".join(f"- [{name}]({name}.md)\n" for name in names)
    text = (ROOT / path).read_text(encoding="utf-8")
    # a fence longer than any in the file
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    return f"{head}{fence}{LANGUAGES.get(Path(path).suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def notebook_pages() -> Iterator[tuple[str, str]]:
    """Yield path in the repository and text of every tutorial: its texts, and its code in blocks."""
    for path in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")):
        parts = []
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        name = path.relative_to(ROOT).as_posix()
        title, _, rest = parts[0].partition("\n")
        parts[0] = f"{title}\n\n*This page is the notebook `{name}`.*\n{rest}"
        yield name, "\n\n".join(parts) + "\n"


def reference_pages() -> Iterator[tuple[str, str]]:
    """Yield path and text of the pages of the API reference; mkdocstrings fills them from docstrings."""
    rows = ["# API reference\n\n| package | content |\n|---|---|\n"]
    for name in PACKAGES:
        module = ROOT / "remax_lightning" / name
        file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
        summary = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        rows.append(f"| [`remax_lightning.{name}`]({name}.md) | {summary} |\n")
        yield f"reference/{name}.md", f"# `remax_lightning.{name}`\n\n::: remax_lightning.{name}\n"
    names = (
        "`remax_lightning` itself exports the classes that a script needs: `from remax_lightning import ReMaxModule`."
    )
    yield "reference/index.md", "".join([*rows, f"\n{names}\n"])


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in `docs`. mkdocs calls this."""
    from mkdocs.structure.files import File, InclusionLevel

    files.remove(files.get_file_from_path("README.md"))  # it would take the place of the start page
    pages = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    for notebook, text in notebook_pages():
        pages.append(notebook)
        files.append(File.generated(config, site_path(notebook), content=text))
    for page, text in reference_pages():
        files.append(File.generated(config, page, content=text))
    for path in linked_files(pages):
        level = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, site_path(path), content=source_page(path), inclusion=level))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Convert the links of a page that is written for a code host. mkdocs calls this."""
    path = repository_path(page.file.src_uri)
    return markdown if path is None else convert_links(markdown, path)
