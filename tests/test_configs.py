"""Every configuration that is shipped: it is read, and it trains once tiny random models stand where the hub's do."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_tokenizer, tiny_config, tiny_model
from helpers.cli import in_folder, remax, small_config, write_config
from helpers.training import write_rows

from remax_lightning.cli_run import run
from remax_lightning.shipped_configs import config_folder

FOLDER = config_folder()
COMPLETE = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "base.yaml")
OVERLAYS = [FOLDER / "base.yaml", *sorted(FOLDER.glob("*/*.yaml"))]
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def name_of(path: Path) -> str:
    return str(path.relative_to(FOLDER))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny policy, reward model and data set in the places of the big ones."""
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("local")
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    tiny_model("llama").save_pretrained(folder / "policy")
    config = tiny_config("llama")
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(folder / name)
    rows = (
        {"prompt": f"{n}+{n}=", "response": str(2 * n), "chosen": str(2 * n), "rejected": "no idea"} for n in range(600)
    )
    return {
        "policy": str(folder / "policy"),
        "reward": str(folder / "reward"),
        "data": write_rows(folder / "rows.jsonl", rows),
    }


def parsed(capsys: pytest.CaptureFixture[str], *files: Path | str, subcommand: str = "fit") -> dict[str, Any]:
    """The whole configuration that `files` make, as the command prints it."""
    arguments = [part for file in files for part in ("--config", str(file))]
    printed = remax(capsys, subcommand, *arguments, "--print_config")
    assert printed.code == 0, printed.err
    return yaml.safe_load(printed.out)


def sources(module: dict[str, Any]) -> list[dict[str, Any]]:
    """The language models of a configuration, the one that is trained first."""
    return [module[name] for name in ("policy", "reward_model", "reference") if module.get(name)]


def rewards(reward: dict[str, Any]) -> list[dict[str, Any]]:
    """A reward and its parts."""
    return [reward, *reward.get("init_args", {}).get("parts", {}).values()]


def made_small(config: dict[str, Any], local: dict[str, str]) -> dict[str, Any]:
    """The configuration with everything replaced that a laptop without a network does not have."""
    trainer, module, data = config["trainer"], config["model"]["init_args"], config["data"]["init_args"]
    parts = data["batch_size"] // (data.get("micro_batch_size") or data["batch_size"])
    trainer |= {"accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": "32-true"}
    # Two rollout batches, or two steps.
    trainer["fast_dev_run"] = 2 * max(parts, trainer["accumulate_grad_batches"])
    for source in sources(module):
        source["path"] = local["policy"]
    for reward in rewards(module.get("reward") or {}):
        if "ClassifierReward" in str(reward.get("class_path")):
            reward["init_args"] |= {"path": local["reward"], "dtype": None, "max_length": None}
    data |= {"path": local["data"], "batch_size": 2 * parts, "val_size": min(32, data["val_size"] or 0)}
    data |= {"micro_batch_size": 2} if data.get("micro_batch_size") else {}
    data |= {"val_path": local["data"]} if data.get("val_path") else {}
    # What the tiny policy's 256 positions hold.
    for values, name, most in (
        (data, "max_prompt_length", 64),
        (data, "max_response_length", 64),
        (data, "max_length", 128),
        (module.get("sampling") or {}, "max_response_length", 8),
    ):
        if name in values:
            values[name] = min(most, values[name])
    return config


@pytest.mark.slow
@pytest.mark.parametrize("path", COMPLETE, ids=name_of)
@pytest.mark.parametrize("subcommand", ["fit", "validate"])
def test_a_configuration_is_read(path: Path, subcommand: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = yaml.safe_load(path.read_text())
    config = parsed(capsys, path, subcommand=subcommand)
    given = own["model"].get("init_args", own["model"])
    assert sources(config["model"]["init_args"])[0]["path"] == sources(given)[0]["path"]
    assert config["seed_everything"] == 0  # of base.yaml, which lies under it


@pytest.mark.slow
@pytest.mark.parametrize("path", OVERLAYS, ids=name_of)
def test_an_overlay_changes_what_it_says(
    path: Path, tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_config(tmp_path / "mine.yaml", small_config(tmp_path, policy_path))
    if path.stem == "8x40gb":  # of one configuration
        base = str(FOLDER / "llama2_7b.yaml")
    config = parsed(capsys, base, path)
    assert contains(config, yaml.safe_load(path.read_text())) == []


@pytest.mark.slow
def test_the_debug_overlay_ends_after_two_steps(
    tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(tmp_path, policy_path)
    config["trainer"] |= {"max_steps": 50, "max_epochs": -1}
    base = write_config(tmp_path / "mine.yaml", config)
    with in_folder(tmp_path):
        done = remax(capsys, "fit", "--config", base, "--config", str(FOLDER / "overlays" / "debug.yaml"))
    assert done.code == 0, done.err
    checkpoints = [torch.load(path, weights_only=True) for path in tmp_path.rglob("*.ckpt")]
    assert max(checkpoint["global_step"] for checkpoint in checkpoints) == 2


def contains(whole: Any, part: Any, key: str = "") -> list[str]:
    """The keys of `part` whose values `whole` does not have."""
    if isinstance(part, dict):
        return [
            missing
            for name, value in part.items()
            for missing in contains(whole.get(name, ...) if isinstance(whole, dict) else ..., value, f"{key}.{name}")
        ]
    same = whole == part or (isinstance(part, str) and str(whole).endswith(f".{part}"))  # short class names
    return [] if same else [key]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem == "demo" else [pytest.mark.slow]) for path in COMPLETE],
    ids=[name_of(path) for path in COMPLETE],
)
def test_a_configuration_trains_with_tiny_models(
    path: Path, tmp_path: Path, local: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = made_small(parsed(capsys, path), local)
    with in_folder(tmp_path):
        cli = run(["fit", "--config", write_config(tmp_path / "small.yaml", config)])
    assert cli.trainer.global_step >= 2
    wanted = sources(config["model"]["init_args"])[0]["gradient_checkpointing"]
    assert cli.model.trained_model.is_gradient_checkpointing == (wanted is True)  # auto is off without a GPU


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FOLDER.glob("presets/*.yaml")), ids=name_of)
def test_a_preset_trains(path: Path, tmp_path: Path, policy_path: Path) -> None:
    base = write_config(tmp_path / "mine.yaml", small_config(tmp_path, policy_path))
    quick = ("--model.sampling.max_response_length=4", "--data.max_prompt_length=16", "--trainer.fast_dev_run=1")
    with in_folder(tmp_path):
        cli = run(["fit", "--config", base, "--config", str(path), *quick])
    preset = yaml.safe_load(path.read_text())["model"]["init_args"]
    assert cli.model.kl_coef == preset["kl_coef"]
    assert cli.model.objective.loss_config.kind == preset["loss"]["kind"]


@pytest.mark.slow
@pytest.mark.parametrize("path", [*COMPLETE, *sorted(FOLDER.glob("strategies/*.yaml"))], ids=name_of)
def test_a_strategy_can_be_made(path: Path) -> None:
    """Its class takes the arguments; a machine with several GPUs is needed only to use it."""
    strategy = yaml.safe_load(path.read_text()).get("trainer", {}).get("strategy", "auto")
    if isinstance(strategy, str):
        from lightning.pytorch.strategies import StrategyRegistry

        assert strategy == "auto" or strategy in StrategyRegistry.available_strategies()
        return
    module, _, name = strategy["class_path"].rpartition(".")
    made = getattr(import_module(module or "lightning.pytorch.strategies"), name)(**strategy.get("init_args", {}))
    assert type(made).__name__ == name


def test_there_is_something_to_read() -> None:
    assert {"demo.yaml", "sft.yaml", "reward_model.yaml", "opt1.3b.yaml", "llama2_7b.yaml"} <= {
        path.name for path in COMPLETE
    }
    assert {"reference.yaml", "verl.yaml", "openrlhf.yaml", "model_card.yaml"} <= {path.name for path in OVERLAYS}
