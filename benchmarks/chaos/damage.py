"""Checkpoints with a flipped bit or a missing end, and files with code in their pickles."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.chaos.runs import Fixtures, configuration, write
from benchmarks.chaos.warm import CLEAR, CODE, RIGHT, UNCLEAR, WRONG, Ended, Outcome, Trial, command, in_fork, judge

FORMATS = {"file": 6, "zero2": 2, "zero3": 1, "fsdp2": 2}
"""How often each kind of checkpoint is damaged: a file of one process, folders of strategies."""
USES = ("fit", "fit", "last", "test", "export")
STEP = 3
"""Optimizer step of the checkpoint; one step is left."""


# ---- Whole checkpoints, and what comes of them ----


def checkpoint_of(fixtures: Fixtures, kind: str) -> Path:
    """Return a run folder with checkpoints of steps 2 and 3; it is made once."""
    folder = fixtures.folder / f"checkpoints-{kind}"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        ended = command(folder, "fit", "--config", _config(fixtures, folder, kind), "--trainer.max_steps", str(STEP))
        if ended.code != 0:
            raise RuntimeError(f"no checkpoint of {kind}:\n{ended.text}")
        (folder / "complete").touch()
    return folder


def _config(fixtures: Fixtures, folder: Path, kind: str) -> str:
    config = configuration(fixtures, folder)
    config["trainer"]["callbacks"][1]["init_args"] |= {"save_top_k": -1, "dirpath": str(folder / "saved")}
    if kind != "file":
        from benchmarks.chaos.runs import configuration as of_two

        config["trainer"]["strategy"] = of_two(fixtures, folder, strategy=kind)["trainer"]["strategy"]
    config["evaluation"]["path"] = str(folder / "evaluation.json")
    return write(folder / "run.yaml", config)


def use(fixtures: Fixtures, folder: Path, kind: str, name: str) -> tuple[Ended, str]:
    """Use the checkpoint of step 3 in a folder, and return how that ended and a digest of what came of it."""
    config, path = _config(fixtures, folder, kind), folder / "saved" / f"step={STEP}.ckpt"
    if name == "export":
        ended = command(folder, "export", str(path), "exported", "--config", config)
        results = [folder / "exported" / "model.safetensors"]
    elif name == "test":
        ended = command(folder, "test", "--config", config, "--ckpt_path", str(path))
        results = [folder / "evaluation.json"]
    else:
        ended = command(folder, "fit", "--config", config, "--ckpt_path", "last" if name == "last" else str(path))
        results = [folder / "losses-0.jsonl", *sorted(folder.glob("runs/*/*/policy/last/model.safetensors"))]
    digest = hashlib.sha256()
    for result in results:
        content = result.read_bytes() if result.exists() else b""
        if result.name == "evaluation.json" and content:
            figures = json.loads(content)
            content = json.dumps({key: value for key, value in figures.items() if key != "checkpoint"}).encode()
            content = content.replace(str(folder).encode(), b"")
        digest.update(content)
    return ended, digest.hexdigest()


def expected(fixtures: Fixtures, kind: str, name: str) -> str:
    """Return the digest of what comes of the whole checkpoint; made once."""
    path = fixtures.folder / f"digest-{kind}-{name}"
    if not path.exists():
        folder = fixtures.folder / f"use-{kind}-{name}-{os.getpid()}"
        shutil.copytree(checkpoint_of(fixtures, kind) / "saved", folder / "saved", symlinks=True)
        ended, digest = use(fixtures, folder, kind, name)
        if ended.code != 0:
            raise RuntimeError(f"{name} of a whole checkpoint of {kind}:\n{ended.text}")
        path.write_text(digest)
    return path.read_text()


def prepare(fixtures: Fixtures, kinds: tuple[str, ...]) -> None:
    """Make all checkpoints and digests, in this process, before trials run at once."""
    for kind in kinds:
        for name in dict.fromkeys(USES):
            expected(fixtures, kind, name)


# ---- Damage ----


def trials(fixtures: Fixtures, seed: int, kind: str, count: int) -> Iterator[Trial]:
    """Yield trials of a kind of damage, `flip` or `truncate`."""
    formats = tuple(FORMATS) if count >= 100 else ("file", "fsdp2")
    prepare(fixtures, formats)
    for index in range(count):
        yield Trial(kind, index, seed, partial(damage, fixtures, kind, formats))


def damage(fixtures: Fixtures, kind: str, formats: tuple[str, ...], folder: Path, rng: random.Random) -> Outcome:
    """Damage one file of a checkpoint and use it."""
    form = rng.choices(formats, [FORMATS[name] for name in formats])[0]
    name = rng.choice(USES)
    shutil.copytree(checkpoint_of(fixtures, form) / "saved", folder / "saved", symlinks=True)
    target = folder / "saved" / f"step={STEP}.ckpt"
    files = [path for path in sorted(target.rglob("*")) if path.is_file()] if target.is_dir() else [target]
    file = rng.choices(files, [max(path.stat().st_size, 200) for path in files])[0]
    content = bytearray(file.read_bytes())
    if not content:
        return Outcome(RIGHT, "an empty file cannot be damaged", f"{kind} of {file.name}")
    place = rng.randrange(len(content))
    if kind == "flip":
        bit = rng.randrange(8)
        content[place] ^= 1 << bit
        what = f"bit {bit} of byte {place}"
    else:
        del content[place:]
        what = f"all from byte {place}"
    file.write_bytes(content)
    case = f"{kind}: {what} of {file.relative_to(folder / 'saved')} ({form}), then {name}"
    ended, digest = use(fixtures, folder, form, name)
    outcome = judge(ended)
    if outcome.outcome == CLEAR and file.name not in outcome.detail and target.name not in outcome.detail:
        return Outcome(UNCLEAR, f"the file is not named: {outcome.detail}", case)
    if outcome.outcome == RIGHT and name == "last" and "left out in the search" in ended.text:
        return Outcome(RIGHT, "went on from the checkpoint before", case)
    if outcome.outcome == RIGHT and digest != expected(fixtures, form, name):
        return Outcome(WRONG, "the damaged checkpoint was used", case)
    return outcome._replace(case=case)


# ---- Payloads ----


def payload_trials(fixtures: Fixtures, seed: int, quick: bool = False) -> Iterator[Trial]:
    """Yield a trial for every file with code."""
    names = list(PAYLOADS)
    for index, name in enumerate(names[::5] if quick else names):
        yield Trial("payload", index, seed, partial(open_payload, fixtures, name))


def open_payload(fixtures: Fixtures, name: str, folder: Path, _: random.Random) -> Outcome:
    """Give a file with code to a command, and see whether the code ran."""
    mark = folder / "mark"
    arguments: list[str] = []

    def write_files() -> None:
        (folder / "arguments.json").write_text(json.dumps(PAYLOADS[name](fixtures, folder, mark)))

    in_fork(write_files)
    arguments = json.loads((folder / "arguments.json").read_text())
    if mark.exists():
        raise RuntimeError("the code ran while its file was written")
    outcome = judge(command(folder, *arguments))
    if mark.exists():
        return Outcome(CODE, f"{outcome.outcome}: {outcome.detail}", name)
    return outcome._replace(case=name)


def _pickles(mark: Path) -> dict[str, bytes]:
    """Return pickles that run code in several ways."""
    from helpers.payloads import RunsCode, reaches_code

    shell = f"touch {mark}".encode()
    return {
        "reduce": pickle.dumps(RunsCode(mark)),
        "protocol 0": b"cos\nsystem\n(S'" + shell + b"'\ntR.",
        "inst": b"(S'" + shell + b"'\nios\nsystem\n.",
        "through torch": reaches_code(mark, "torch.serialization", "os.system"),
        "eval": b'c__builtin__\neval\n(S\'__import__("os").system("' + shell + b"\")'\ntR.",
    }


def _fit(fixtures: Fixtures, folder: Path, *arguments: str, **data: Any) -> list[str]:
    config = configuration(fixtures, folder)
    config["data"] |= data
    return ["fit", "--config", write(folder / "run.yaml", config), *arguments]


def _as_pickle(way: str, name: str) -> Callable[..., list[str]]:
    """Give a bare pickle as a checkpoint."""

    def make(fixtures: Fixtures, folder: Path, mark: Path) -> list[str]:
        path = folder / "stranger.ckpt"
        path.write_bytes(_pickles(mark)[way])
        return _command(fixtures, folder, name, path)

    return make


def _as_torch(name: str, **more: str) -> Callable[..., list[str]]:
    """Give a file of `torch.save` with code in a part of it as a checkpoint."""

    def make(fixtures: Fixtures, folder: Path, mark: Path) -> list[str]:
        from helpers.payloads import RunsCode, lightning_file

        path = lightning_file(folder / "stranger.ckpt", **{more.get("part", "callbacks"): {"a": RunsCode(mark)}})
        return _command(fixtures, folder, name, path)

    return make


def _as_folder(kind: str, name: str) -> Callable[..., list[str]]:
    """Give a folder of DeepSpeed or FSDP2 with code in one of its files as a checkpoint."""

    def make(fixtures: Fixtures, folder: Path, mark: Path) -> list[str]:
        import torch
        from helpers.payloads import RunsCode, fsdp2_folder, zero_folder

        path = folder / "stranger.ckpt"
        if kind.startswith("zero"):
            zero_folder(path, int(kind[4]), ranks=1)
            part = next(path.glob(f"checkpoint/*{kind.partition(' ')[2]}*"))
            content = torch.load(part, weights_only=True)
            torch.save(content | {"more": RunsCode(mark)}, part)
        else:
            fsdp2_folder(path, setting=RunsCode(mark) if kind == "fsdp2 shard" else 0.1)
            if kind == "fsdp2 metadata":
                (path / ".metadata").write_bytes(_pickles(mark)["reduce"])
            if kind == "fsdp2 rest":
                torch.save({"global_step": 3, "callbacks": RunsCode(mark)}, path / "meta.pt")
        return _command(fixtures, folder, name, path, kind.partition(" ")[0])

    return make


def _command(fixtures: Fixtures, folder: Path, name: str, path: Path, strategy: str = "") -> list[str]:
    if name == "export":
        return ["export", str(path), "exported", "--config", _fit(fixtures, folder)[2]]
    config = _config(fixtures, folder, strategy or "file")
    if name == "last":
        (folder / "saved").mkdir()
        path.rename(folder / "saved" / path.name)
        return ["test", "--config", config, "--ckpt_path", "last"]
    return [name, "--config", config, "--ckpt_path", str(path)]


def _model_with(name: str) -> Callable[..., list[str]]:
    """Give a model folder with code as the policy: `.bin` weights, or Python files that its configuration names."""

    def make(fixtures: Fixtures, folder: Path, mark: Path) -> list[str]:
        model = folder / "model"
        shutil.copytree(fixtures.policy, model)
        settings = model / ("tokenizer_config.json" if name == "tokenizer code" else "config.json")
        if name == "bin weights":
            (model / "model.safetensors").unlink()
            (model / "pytorch_model.bin").write_bytes(_pickles(mark)["reduce"])
        else:
            (model / "stranger.py").write_text(f"import os\nos.system('touch {mark}')\nclass Model: ...\n")
            content = json.loads(settings.read_text())
            names = ("AutoTokenizer",) if name == "tokenizer code" else ("AutoConfig", "AutoModelForCausalLM")
            content["auto_map"] = dict.fromkeys(names, "stranger.Model")
            if name == "model code":
                content["model_type"] = "stranger"
            settings.write_text(json.dumps(content))
        arguments = _fit(fixtures, folder, "--model.policy.path", str(model))
        return [*arguments, "--model.policy.allow_pickle", "true"] if name == "bin weights" else arguments

    return make


def _run_folder_that_trusts(fixtures: Fixtures, folder: Path, mark: Path) -> list[str]:
    """Export from a run folder whose configuration trusts the code of a model beside it."""
    _model_with("model code")(fixtures, folder, mark)
    shutil.copytree(checkpoint_of(fixtures, "file") / "saved", folder / "version_0" / "checkpoints")
    import yaml

    config = configuration(fixtures, folder)
    policy = {"path": str(folder / "model"), "trust_remote_code": True}
    saved = {"model": {"class_path": "ReMaxModule", "init_args": config["model"] | {"policy": policy}}}
    (folder / "version_0" / "config.yaml").write_text(yaml.safe_dump(saved | {"data": config["data"]}))
    return ["export", str(folder / "version_0" / "checkpoints" / f"step={STEP}.ckpt"), "exported"]


def _template_that_escapes(fixtures: Fixtures, folder: Path, mark: Path) -> list[str]:
    """Give a tokenizer whose chat template reaches for Python's functions."""
    model = folder / "model"
    shutil.copytree(fixtures.chat_policy, model)
    reach = "{{ cycler.__init__.__globals__.os.system('touch %s') }}" % mark  # noqa: UP031
    reach += "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages.__class__.__base__ }}"
    (model / "chat_template.jinja").write_text(reach + "{{ messages[0]['content'] }}")
    rows = [{"prompt": [{"role": "user", "content": "1+1="}], "response": "2"}] * 8
    arguments = _fit(fixtures, folder, "--model.policy.path", str(model))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return arguments


def _data_with(name: str) -> Callable[..., list[str]]:
    """Give data that is code: a loading script, a pickle, an Arrow folder with a pickled state."""

    def make(fixtures: Fixtures, folder: Path, mark: Path) -> list[str]:
        place = folder / "stranger"
        if name == "loading script":
            place.mkdir()
            (place / "stranger.py").write_text(f"import os\nos.system('touch {mark}')\n")
            return _fit(fixtures, folder, path=str(place))
        path = place.with_suffix({"pickle": ".pkl", "pickle as parquet": ".parquet", "pickle as arrow": ".arrow",
                                  "pickle as jsonl": ".jsonl", "pickle as csv": ".csv"}[name])  # fmt: skip
        path.write_bytes(_pickles(mark)["reduce"])
        return _fit(fixtures, folder, path=str(path))

    return make


def _yaml_with(tag: str) -> Callable[..., list[str]]:
    """Give a configuration with a tag of YAML that calls a function."""

    def make(fixtures: Fixtures, folder: Path, mark: Path) -> list[str]:
        arguments = _fit(fixtures, folder)
        encoded = base64.b64encode(f"touch {mark}".encode()).decode()
        text = tag.format(command=f"touch {mark}", encoded=encoded)
        path = Path(arguments[2])
        path.write_text(path.read_text().replace("max_prompt_length: 16", f"max_prompt_length: {text}"))
        return arguments

    return make


def _classifier_with_bin(fixtures: Fixtures, folder: Path, mark: Path) -> list[str]:
    """Give a reward model whose weights are a pickle."""
    model = folder / "reward_model"
    shutil.copytree(fixtures.policy, model)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(_pickles(mark)["through torch"])
    config = configuration(fixtures, folder)
    config["model"]["reward"] = {"class_path": "ClassifierReward",
                                 "init_args": {"path": str(model), "allow_pickle": True}}  # fmt: skip
    return ["fit", "--config", write(folder / "run.yaml", config)]


def _adapter_with_bin(fixtures: Fixtures, folder: Path, mark: Path) -> list[str]:
    """Give an adapter whose weights are a pickle."""
    adapter = folder / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    (adapter / "adapter_model.bin").write_bytes(_pickles(mark)["reduce"])
    config = configuration(fixtures, folder)
    config["model"]["policy"]["lora"] = {"path": str(adapter)}
    del config["model"]["reference"]
    return ["fit", "--config", write(folder / "run.yaml", config)]


PAYLOADS: dict[str, Callable[[Fixtures, Path, Path], list[str]]] = {
    **{f"a bare pickle ({way}), {name}": _as_pickle(way, name)
       for way in ("reduce", "protocol 0", "inst", "through torch", "eval") for name in ("fit", "export")},
    **{f"torch.save, {name}": _as_torch(name) for name in ("fit", "test", "predict", "validate", "export", "last")},
    "torch.save, in the optimizer": _as_torch("fit", part="optimizer_states"),
    "torch.save, in the loops": _as_torch("fit", part="loops"),
    **{f"{kind}, {name}": _as_folder(kind, name)
       for kind in ("zero2 model_states", "zero2 optim_states", "zero3 model_states", "zero3 optim_states",
                    "fsdp2 metadata", "fsdp2 shard", "fsdp2 rest") for name in ("fit", "export")},
    **{f"a policy with {name}": _model_with(name) for name in ("bin weights", "model code", "tokenizer code")},
    "a run folder that trusts code": _run_folder_that_trusts,
    "a chat template that escapes": _template_that_escapes,
    **{f"data: {name}": _data_with(name) for name in ("loading script", "pickle", "pickle as parquet",
                                                      "pickle as arrow", "pickle as jsonl", "pickle as csv")},
    "YAML: python/object/apply": _yaml_with("!!python/object/apply:os.system ['{command}']"),
    "YAML: python/object/new": _yaml_with("!!python/object/new:os.system ['{command}']"),
    "YAML: python/name": _yaml_with("!!python/name:os.system"),
    "YAML: python/module": _yaml_with("!!python/module:os"),
    "YAML: binary": _yaml_with("!!binary {encoded}"),
    "a reward model with bin weights": _classifier_with_bin,
    "an adapter with bin weights": _adapter_with_bin,
}  # fmt: skip
"""Files of a stranger with code, and the command that reads them."""
