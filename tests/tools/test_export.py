"""`remax export` in one process: what it finds, what it refuses, adapters and memory. Sharded formats: distributed/."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_tokenizer, tiny_model
from helpers.cli import changed, in_folder, remax, small_config, write_config
from helpers.training import save_policy
from safetensors.torch import load_file

ADAPTED = ("q_proj", "down_proj")
LORA: dict[str, Any] = {"r": 2, "alpha": 6, "dropout": 0.0, "target_modules": list(ADAPTED), "path": None}


class Run:
    """A run's folder with a checkpoint made by hand: a policy other than the one it started from."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, folder / "base"
        save_policy(self.base)
        self.policy = tiny_model("llama", seed=1)
        self.checkpoint = folder / "run" / "checkpoints" / "last.ckpt"
        self.checkpoint.parent.mkdir(parents=True)
        self.config = folder / "run" / "config.yaml"
        self.out = folder / "out"
        self.configure(path=str(self.base))
        self.save(self.policy.state_dict())

    def configure(self, **policy: Any) -> None:
        self.config.write_text(
            yaml.safe_dump({"model": {"class_path": "ReMaxModule", "init_args": {"policy": policy}}})
        )

    def save(self, policy: dict[str, Any], **others: Any) -> None:
        state = {f"policy.{name}": value for name, value in policy.items()}
        torch.save({"state_dict": state, "loops": {}, **others}, self.checkpoint)

    def adapt(
        self, dtype: torch.dtype = torch.float32, modules: list[str] | None = LORA["target_modules"], **policy: Any
    ) -> dict[str, torch.Tensor]:
        """Save a checkpoint of an adapter alone, as a run with `model.policy.lora` does, and return it."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=2, lora_alpha=6, target_modules=modules or "all-linear", init_lora_weights=False)
        adapted = get_peft_model(tiny_model("llama"), config)
        weights = {name: value.to(dtype) for name, value in adapted.state_dict().items() if ".lora_" in name}
        self.save(weights)
        self.configure(path=str(self.base), lora={**LORA, "target_modules": modules}, **policy)
        return weights

    def export(self, capsys: Any, *arguments: str) -> Any:
        return remax(capsys, "export", str(self.checkpoint), str(self.out), *arguments)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def written(folder: Path) -> dict[str, torch.Tensor]:
    """The weights as transformers loads them."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.slow
def test_the_configuration_of_a_run_is_found(tmp_path: Path, policy_path: Path, capsys: Any) -> None:
    """Of one whose tokenizer lacks a pad token, which the configuration gives it."""
    policy = tmp_path / "policy"
    shutil.copytree(policy_path, policy)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(policy)
    config = changed(small_config(tmp_path, policy), data__loading={"pad_token": "eos"})
    with in_folder(tmp_path):
        fitted = remax(capsys, "fit", "--config", write_config(tmp_path / "run.yaml", config))
        assert fitted.code == 0, fitted.err
        [checkpoint] = (tmp_path / "runs").rglob("*.ckpt")
        exported = remax(capsys, "export", str(checkpoint), "out")
    assert exported.code == 0, exported.err
    last = checkpoint.parents[1] / "policy" / "last"
    assert same(written(tmp_path / "out"), written(last))
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_text() == (last / name).read_text()


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("adapted", [False, True])
def test_weights_that_are_not_finite_replace_nothing(adapted: bool, run: Run, capsys: Any) -> None:
    assert run.export(capsys).code == 0
    before = written(run.out)
    weights = run.adapt() if adapted else run.policy.state_dict()
    name = next(name for name in weights if "down_proj" in name)
    weights[name].view(-1)[1] = float("nan")
    run.save(weights)
    outcome = run.export(capsys, "--overwrite")
    assert outcome.code == 2
    assert f"{name} in '{run.checkpoint}' is not finite; export an earlier checkpoint" in outcome.err
    assert same(written(run.out), before)


@pytest.mark.slow(0.3)
def test_a_configuration_can_be_given(run: Run, capsys: Any) -> None:
    elsewhere = run.config.rename(run.folder / "mine.yaml")
    assert "--config must be the configuration of the run" in run.export(capsys).err
    assert run.export(capsys, "--config", str(elsewhere)).code == 0
    assert same(written(run.out), run.policy.state_dict())


def test_an_early_configuration_of_the_same_policy_is_as_good(run: Run, capsys: Any) -> None:
    shutil.copy(run.config, run.config.with_name("config_1.yaml"))
    assert run.export(capsys).code == 0
    run.configure(path=str(run.folder))
    refused = run.export(capsys, "--overwrite")
    assert refused.code == 2
    assert "--config must be one of config.yaml, config_1.yaml" in refused.err


def test_weights_are_split_as_asked_for(run: Run, capsys: Any) -> None:
    assert run.export(capsys, "--max_shard_size", "50KB").code == 0
    assert len(list(run.out.glob("*.safetensors"))) > 1
    assert same(written(run.out), run.policy.state_dict())


def test_a_size_that_is_none_is_refused(run: Run, capsys: Any) -> None:
    refused = run.export(capsys, "--max_shard_size", "big")
    assert refused.code == 2
    assert "must be a size such as 5GB or 500MB, got big" in refused.err


def test_a_folder_is_replaced_only_when_told_so(run: Run, capsys: Any) -> None:
    run.out.mkdir()
    (run.out / "mine").touch()
    refused = run.export(capsys)
    assert refused.code == 2
    assert "is not empty" in refused.err
    assert [path.name for path in run.out.iterdir()] == ["mine"]
    assert run.export(capsys, "--overwrite").code == 0
    assert not (run.out / "mine").exists()
    assert (run.out / "model.safetensors").exists()


@pytest.mark.parametrize("out", ["run", "run/checkpoints/last.ckpt", "."])
def test_nothing_else_is_replaced(out: str, run: Run, capsys: Any) -> None:
    """Neither the run nor the checkpoint nor the folder that one is in."""
    with in_folder(run.folder):
        outcome = remax(capsys, "export", str(run.checkpoint), out, "--overwrite")
    assert outcome.code == 2
    assert "out must be a new folder" in outcome.err
    assert run.checkpoint.is_file()


def test_a_file_is_not_replaced(run: Run, capsys: Any) -> None:
    run.out.touch()
    assert "is a file" in run.export(capsys, "--overwrite").err
    file, run.out = run.out, run.out / "inside"
    assert f"out must be a folder, and '{file}' is a file" in run.export(capsys).err


class Evil:
    """Runs code where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


@pytest.mark.slow(0.3)
def test_a_checkpoint_runs_no_code_unless_it_is_trusted(run: Run, capsys: Any) -> None:
    proof = run.folder / "proof"
    run.save(run.policy.state_dict(), callbacks=Evil(proof))
    refused = run.export(capsys)
    assert refused.code == 2
    assert "which is not run; if you trust the author of the file, add --trust_checkpoint" in refused.err
    assert not proof.exists()
    assert run.export(capsys, "--trust_checkpoint").code == 0
    assert proof.exists()


def test_neither_does_one_in_shards(run: Run, capsys: Any) -> None:
    proof = run.folder / "proof"
    run.checkpoint.unlink()
    run.checkpoint.mkdir()
    (run.checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(proof)))
    refused = run.export(capsys)
    assert refused.code == 2
    assert "the file holds code (" in refused.err
    assert not proof.exists()


def test_neither_does_deepspeeds(run: Run, capsys: Any) -> None:
    proof, name = run.folder / "proof", "zero_pp_rank_0_mp_rank_00_{}_states.pt"
    run.checkpoint.unlink()
    (run.checkpoint / "step").mkdir(parents=True)
    (run.checkpoint / "latest").write_text("step")
    model = {"param_shapes": [{"policy.a": torch.Size([2])}], "dp_world_size": 1, "ds_config": {}, "module": {}}
    torch.save(model, run.checkpoint / "step" / name.format("model"))
    torch.save({"optimizer_state_dict": Evil(proof)}, run.checkpoint / "step" / name.format("optim"))
    refused = run.export(capsys)
    assert refused.code == 2
    assert "the file holds code (" in refused.err
    assert not proof.exists()


OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig
Path({proof!r}).touch()
class MyConfig(LlamaConfig):
    model_type = "mine"
"""


@pytest.mark.slow
@pytest.mark.parametrize("named", [False, True])
def test_what_a_run_trusted_is_not_trusted_by_its_export(named: bool, run: Run, capsys: Any) -> None:
    """The configuration may come with the folder, from a stranger."""
    proof = run.folder / "proof"
    config = json.loads((run.base / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "own_code.MyConfig"}}
    (run.base / "config.json").write_text(json.dumps(config))
    (run.base / "own_code.py").write_text(OWN_CODE.format(proof=str(proof)))
    run.configure(path=str(run.base), trust_remote_code=True)
    arguments = ["--config", str(run.config)] if named else []
    refused = run.export(capsys, *arguments)
    assert refused.code == 2
    assert f"{run.config}: model.policy.trust_remote_code is true" in refused.err
    assert "add --trust_checkpoint" in refused.err
    assert not proof.exists()
    run.export(capsys, *arguments, "--trust_checkpoint")
    assert proof.exists()


def without(policy: dict[str, Any], part: str) -> dict[str, Any]:
    return {name: value for name, value in policy.items() if part not in name}


MISTAKES = {
    "no such path": (lambda run: run.checkpoint.unlink(), "does not exist; give a complete checkpoint"),
    "a folder of something else": (
        lambda run: (run.checkpoint.unlink(), run.checkpoint.mkdir()),
        "is neither a .ckpt file nor a folder of DeepSpeed or FSDP2",
    ),
    "a file of something else": (lambda run: run.checkpoint.write_text("mine"), "cannot be read"),
    "an empty file": (lambda run: run.checkpoint.write_bytes(b""), "cannot be read"),
    "half a file": (
        lambda run: run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:-100]),
        "it is not a checkpoint, or an incomplete one",
    ),
    "tensors alone": (lambda run: torch.save(torch.ones(2), run.checkpoint), "holds a Tensor"),
    "no policy": (
        lambda run: torch.save({"state_dict": {"reward_model.a": torch.ones(2)}}, run.checkpoint),
        "holds no weights policy.*",
    ),
    "a weight too few": (
        lambda run: run.save(without(run.policy.state_dict(), "layers.1.mlp.up")),
        "it lacks 1 weights (model.layers.1.mlp.up_proj.weight)",
    ),
    "a weight too many": (
        lambda run: run.save({**run.policy.state_dict(), "extra": torch.ones(1)}),
        "it has, unlike model.policy.path, 1 weights (extra)",
    ),
    "another shape": (
        lambda run: run.save({**run.policy.state_dict(), "model.norm.weight": torch.ones(3)}),
        "it has in another shape 1 weights (model.norm.weight)",
    ),
    "a configuration without a policy": (
        lambda run: run.config.write_text("model: {}"),
        "has no model.policy.path; give the configuration of the run",
    ),
    "a configuration that is none": (lambda run: run.config.write_text("a: [b"), "cannot be read"),
    "a base that is gone": (lambda run: shutil.rmtree(run.base), "there is no folder"),
    "no adapter in the configuration": (
        lambda run: (run.adapt(), run.configure(path=str(run.base))),
        "the configuration of the run must have model.policy.lora",
    ),
    "a base in four bits": (
        lambda run: run.adapt(quantization="nf4"),
        "model.policy.quantization is nf4",
    ),
    "another adapter in the configuration": (
        lambda run: (run.adapt(), run.configure(path=str(run.base), lora={**LORA, "target_modules": ["v_proj"]})),
        "its adapter does not match model.policy.lora",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_exported_is_refused(mistake: str, run: Run, capsys: Any) -> None:
    make, expected = MISTAKES[mistake]
    make(run)
    outcome = run.export(capsys, *(["--merge"] if "four bits" in mistake else []))
    assert outcome.code == 2
    assert outcome.err.startswith("remax: error: ")
    assert outcome.err.count("\n") == 1
    assert expected in outcome.err
    assert not run.out.exists()
    assert not list(run.folder.glob(".out*"))


@pytest.mark.slow(0.3)
def test_tied_weights_that_differ_are_refused(tmp_path: Path, capsys: Any) -> None:
    run = Run(tmp_path)
    shutil.rmtree(run.base)
    save_policy(run.base, "opt")
    weights = tiny_model("opt").state_dict()
    run.save({**weights, "lm_head.weight": weights["lm_head.weight"] + 1})
    assert (
        "it has untied, contrary to the configuration of the model, 1 weights (lm_head.weight)"
        in run.export(capsys).err
    )


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("modules", [list(ADAPTED), None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_merged_into_its_base(
    dtype: torch.dtype, modules: list[str] | None, run: Run, capsys: Any
) -> None:
    adapter = run.adapt(dtype, modules)
    assert run.export(capsys, "--merge").code == 0
    found = written(run.out)
    for name, value in tiny_model("llama").state_dict().items():
        expected = value.to(dtype).double()
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if "_proj" in name and (modules is None or any(part in name for part in modules)):
            down, up = (adapter[f"{module}.lora_{part}.default.weight"].double() for part in "AB")
            expected = expected + 6 / 2 * up @ down
        assert found[name].dtype == dtype
        rounding = torch.finfo(dtype).eps * float(expected.abs().max())  # of base and update, which may cancel out
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=2 * rounding)
    assert not (run.out / "adapter_config.json").exists()


@pytest.mark.slow
def test_an_adapter_alone_is_what_peft_reads(run: Run, capsys: Any) -> None:
    from peft import PeftModel

    run.adapt()
    assert run.export(capsys, "--merge").code == 0
    merged, ids = run.out.rename(run.folder / "merged"), torch.tensor([[1, 7, 9, 30]])
    assert run.export(capsys).code == 0
    assert not list(run.out.glob("model*"))
    assert {path.name for path in run.out.iterdir()} >= {"adapter_config.json", "tokenizer.json"}
    assert set(load_file(run.out / "adapter_model.safetensors")) == {
        f"base_model.model.model.layers.{layer}.{module}.lora_{part}.weight"
        for layer in range(2)
        for module in ("self_attn.q_proj", "mlp.down_proj")
        for part in "AB"
    }
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(run.base)
    adapted = PeftModel.from_pretrained(base, run.out)
    assert adapted.peft_config["default"].base_model_name_or_path == str(run.base)
    logits = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    torch.testing.assert_close(adapted(ids).logits, logits, rtol=1e-4, atol=1e-4)
    alone = AutoModelForCausalLM.from_pretrained(run.out)  # transformers finds the base by itself
    torch.testing.assert_close(alone(ids).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow(0.3)
def test_an_adapter_trained_further_has_the_settings_it_was_saved_with(run: Run, capsys: Any) -> None:
    adapter = run.adapt()
    assert run.export(capsys).code == 0
    first = run.out.rename(run.folder / "first")
    run.configure(path=str(run.base), lora={"r": 16, "alpha": 32, "target_modules": None, "path": str(first)})
    assert run.export(capsys).code == 0
    found = load_file(run.out / "adapter_model.safetensors")
    assert {name.replace(".default", ""): value.sum() for name, value in adapter.items()} == {
        name: value.sum() for name, value in found.items()
    }
    assert '"lora_alpha": 6' in (run.out / "adapter_config.json").read_text()


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("trained", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 6, 7]}])
def test_what_an_adapter_holds_beside_its_matrices_is_exported(
    trained: dict[str, Any], merge: bool, run: Run, capsys: Any
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **trained)
    policy = get_peft_model(tiny_model("llama"), config).eval()
    policy.save_pretrained(run.folder / "first")
    weights = {name: value for name, value in policy.state_dict(keep_vars=True).items() if value.requires_grad}
    for value in weights.values():
        value.data.add_(0.1)
    run.configure(path=str(run.base), lora={"path": str(run.folder / "first")})
    run.save({name: value.detach() for name, value in weights.items()})
    outcome = run.export(capsys, *(["--merge"] if merge else []))
    assert outcome.code == 0, outcome.err
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(run.out)(ids).logits
        torch.testing.assert_close(exported, policy(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow(0.3)
def test_biases_of_an_adapter_need_biases_in_the_base_to_be_merged(run: Run, capsys: Any) -> None:
    from peft import LoraConfig, get_peft_model

    policy = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    policy.save_pretrained(run.folder / "first")
    run.configure(path=str(run.base), lora={"path": str(run.folder / "first")})
    weights = policy.state_dict(keep_vars=True).items()
    run.save({name: value.detach() for name, value in weights if value.requires_grad})
    refused = run.export(capsys, "--merge")
    assert refused.code == 2
    assert "--merge: the adapter has lora_bias, and model.layers.0.self_attn.q_proj of its base has no" in refused.err
    assert run.export(capsys).code == 0


@pytest.mark.slow(0.3)
def test_a_saved_adapter_that_is_gone_or_another_one_is_named(run: Run, capsys: Any) -> None:
    from peft import LoraConfig, get_peft_model

    run.adapt()
    run.configure(path=str(run.base), lora={"path": "gone"})
    assert "model.policy.lora.path: 'gone' is not an adapter" in run.export(capsys).err
    other = get_peft_model(tiny_model("llama"), LoraConfig(r=3, target_modules=list(ADAPTED)))
    other.save_pretrained(run.folder / "other")
    run.configure(path=str(run.base), lora={"path": str(run.folder / "other")})
    refused = run.export(capsys)
    assert refused.code == 2
    assert "its adapter does not match model.policy.lora; 8 weights differ" in refused.err


def test_whole_weights_have_nothing_to_merge(run: Run, capsys: Any) -> None:
    assert "--merge needs a checkpoint with a LoRA adapter" in run.export(capsys, "--merge").err


@pytest.mark.slow(0.3)
def test_the_model_card_says_what_the_folder_of_the_run_knows(run: Run, capsys: Any) -> None:
    from huggingface_hub import ModelCard

    from remax_lightning.models.checksums import check_exported

    run.adapt()
    config = yaml.safe_load(run.config.read_text())
    config["model"]["init_args"]["reward"] = {"class_path": "HttpReward", "init_args": {"headers": {"key": "hidden"}}}
    config["data"] = {"path": "owner/prompts"}
    run.config.write_text(yaml.safe_dump(config))
    figure = {"value": 0.75, "low": 0.5, "high": 1.0, "n": 8}
    evaluation = {"checkpoint": "last.ckpt", "num_prompts": 8, "figures": {"reward": figure}}
    (run.config.parent / "evaluation.json").write_text(json.dumps(evaluation))
    assert run.export(capsys).code == 0
    card = ModelCard.load(run.out / "README.md")
    assert (card.data.library_name, card.data.datasets) == ("peft", ["owner/prompts"])
    assert "| `reward` | 0.75 | 0.5 to 1 | 8 |" in card.text
    assert "HttpReward" in card.text
    assert "hidden" not in card.text
    assert "README.md" in json.loads((run.out / "checksums.json").read_text())["files"]
    check_exported(run.out, "model.policy.lora.path")
    # ---- A run folder that nobody can read is no reason to export nothing ----
    (run.config.parent / "evaluation.json").write_text('{"figures": [')
    with pytest.warns(UserWarning, match="no model card was written"):
        assert run.export(capsys, "--overwrite").code == 0
    assert (run.out / "adapter_model.safetensors").is_file()


MEMORY = """
import sys
from pathlib import Path
import deepspeed, peft, transformers.models.llama.modeling_llama
from remax_lightning.tools.export import main

def resident(name):
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":")]
    return int(line.split()[1]) * 1024

main(sys.argv[1:3])  # a small one, for all that is loaded on the way
Path("/proc/self/clear_refs").write_text("5")
base = resident("VmRSS")
main(sys.argv[3:])
print("PEAK", resident("VmHWM") - base)
"""


@pytest.mark.slow(8)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts resident memory as Linux tells it")
def test_memory_holds_one_copy_and_one_ranks_part(run: Run, tmp_path: Path) -> None:
    """A model of 100 MB in five parts, with the optimizer's 200 MB beside it."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    ranks = 5
    config = LlamaConfig(vocab_size=6000, hidden_size=1000, num_hidden_layers=1, num_attention_heads=10,
                         intermediate_size=3000, bos_token_id=1, eos_token_id=2, pad_token_id=3)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    (tmp_path / "big").mkdir()
    big = Run(tmp_path / "big")
    config.save_pretrained(big.base)
    big.checkpoint.unlink()
    (big.checkpoint / "step").mkdir(parents=True)
    (big.checkpoint / "latest").write_text("step")
    shapes = {f"policy.{name}": value.shape for name, value in model.state_dict().items()}
    state = {"param_shapes": [shapes], "dp_world_size": ranks, "ds_config": {}, "module": {}}
    for rank in range(ranks):
        part = torch.cat([_part(value, rank, ranks) for value in model.state_dict().values()])
        moments = {"exp_avg": torch.zeros_like(part), "exp_avg_sq": torch.zeros_like(part)}
        optimizer = {"fp32_flat_groups": [part], "optimizer_state_dict": {"state": {0: moments}}}
        for kind, content in (("model", state), ("optim", {"optimizer_state_dict": optimizer})):
            torch.save(content, big.checkpoint / "step" / f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt")
    paths = [str(path) for each in (run, big) for path in (each.checkpoint, each.out)]
    ended = subprocess.run([sys.executable, "-c", MEMORY, *paths], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert same(written(big.out), model.state_dict())
    peak = int(ended.stdout.rpartition("PEAK ")[2])
    copy = 4 * sum(value.numel() for value in model.state_dict().values())
    assert copy < peak < copy * (1 + 1 / ranks) + 15e6


def _part(value: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """A rank's part of a parameter, padded at the end."""
    length = -(-value.numel() // ranks)
    padded = torch.nn.functional.pad(value.detach().flatten(), (0, ranks * length - value.numel()))
    return padded[rank * length : (rank + 1) * length].clone()
