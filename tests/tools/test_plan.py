"""What `remax plan` says of a run, against sizes counted by hand and runs that are larger or spread further."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_tokenizer, tiny_model
from helpers.cli import changed, small_config
from helpers.training import save_policy
from torch import nn

from remax_lightning.errors import UserError
from remax_lightning.models import ModelConfig
from remax_lightning.shipped_configs import config_folder
from remax_lightning.tools.plan import run_config
from remax_lightning.tools.plan.activation_memory import StepPasses
from remax_lightning.tools.plan.command import main
from remax_lightning.tools.plan.phases import least_devices

pytestmark = pytest.mark.slow  # every plan drives a whole step on meta tensors


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("plan") / "policy")


@pytest.fixture(scope="module")
def usual(policy: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is planned where nothing is set."""
    return planned(tmp_path_factory.mktemp("usual"), policy)


def planned(folder: Path, policy: str, *arguments: str, **values: Any) -> dict[str, Any]:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(changed(small_config(folder, policy), **values)))
    return main(["--config", str(path), *arguments])


def strategy(name: str, devices: int) -> list[str]:
    return ["--config", str(config_folder() / "strategies" / f"{name}.yaml"), "--trainer.devices", str(devices)]


def test_weights_gradients_and_optimizer_are_those_of_the_model(policy: str, usual: dict[str, Any]) -> None:
    count = sum(weight.numel() for weight in ModelConfig(policy).load("model.policy").parameters())
    assert usual["parameters"] == count
    for phase in ("training", "update"):
        parts = usual["phases"][phase]
        assert parts["policy weights"] == parts["reference"] == 4 * count
        assert parts["optimizer"] == pytest.approx(8 * count, rel=0.01)  # AdamW has two moments, and counts its steps
    assert usual["phases"]["update"]["gradients"] == 4 * count
    assert "gradients" not in usual["phases"]["rollout"]
    assert usual["peak"] == max(sum(parts.values()) for parts in usual["phases"].values())


def test_the_cache_has_every_prompt_once_and_the_tokens_of_every_row(
    policy: str, usual: dict[str, Any], tmp_path: Path
) -> None:
    """Two layers of keys and values of 32 numbers, 4 prompts of 16 tokens with a sampled and a greedy row of 4 each."""
    assert usual["phases"]["rollout"]["KV cache"] == 2 * 2 * 32 * 4 * (4 * 16 + 8 * 4)
    longer = planned(tmp_path, policy, model__sampling={"max_response_length": 40, "num_samples": 3})
    assert longer["phases"]["rollout"]["KV cache"] == 2 * 2 * 32 * 4 * (4 * 16 + 16 * 40)


def test_a_rollout_in_mixed_precision_has_keys_values_and_a_copy_of_the_weights_in_16_bits(
    policy: str, tmp_path: Path
) -> None:
    model = ModelConfig(policy).load("model.policy")
    parts = planned(tmp_path, policy, trainer__precision="bf16-mixed")["phases"]["rollout"]
    assert parts["KV cache"] == 2 * 2 * 32 * 2 * 8 * 32
    assert parts["16-bit copy"] == 2 * sum(each.weight.numel() for each in model.modules() if type(each) is nn.Linear)


def test_rollouts_on_servers_take_no_memory_here(policy: str, tmp_path: Path) -> None:
    engine = {"class_path": "remax_lightning.rollout.VLLMEngine", "init_args": {"urls": ["http://localhost:8000"]}}
    phases = planned(tmp_path, policy, trainer__precision="bf16-mixed", model__rollout=engine)["phases"]
    assert phases["rollout"]["policy weights"] > 0
    assert {
        name for name in ("KV cache", "16-bit copy", "logits and temporary") if phases["rollout"].get(name)
    } == set()
    assert phases["training"]["logits and temporary"] > 0


def test_a_server_that_shares_the_device_takes_its_part_of_it(
    policy: str, usual: dict[str, Any], tmp_path: Path
) -> None:
    """On a GPU in rollouts alone, between which its weights are on the host; on a CPU always."""
    arguments = ["--gpu-memory-utilization", "0.5"]
    engine: dict[str, Any] = {"class_path": "VLLMEngine", "init_args": {"mode": "colocate", "server_args": arguments}}
    gpu = {"trainer__accelerator": "gpu", "trainer__devices": 1, "trainer__precision": "bf16-mixed"}
    count = sum(weight.numel() for weight in ModelConfig(policy).load("model.policy").parameters())
    alone = planned(tmp_path, policy, **gpu)["host"]
    known = planned(tmp_path, policy, "--memory", "1", model__rollout=engine, **gpu)
    assert known["phases"]["rollout"]["vLLM server"] == 0.5e9
    assert "vLLM server" not in known["phases"]["training"]
    assert known["host"] - alone == 2 * count
    assert known["fits"]
    # ---- Too small a part for its weights: no number of devices helps ----
    engine["init_args"]["server_args"] = ["--gpu-memory-utilization=0.000001"]
    short = planned(tmp_path, policy, "--memory", "1", model__rollout=engine, **gpu)
    assert (short["fits"], short["least_devices"]) == (False, None)
    assert "raise --gpu-memory-utilization in model.rollout.init_args.server_args" in short["notes"][-1]
    # ---- On a CPU ----
    cache = usual["phases"]["rollout"]["KV cache"]
    on_cpu = planned(tmp_path, policy, model__rollout=engine)["phases"]
    assert {on_cpu[phase]["vLLM server"] for phase in on_cpu} == {4 * count + cache}


def test_tokens_that_are_not_drawn_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded embedding needs masks of the vocabulary, in every pass that makes logits."""
    model = tiny_model("llama", vocab_size=5000)
    model.save_pretrained(tmp_path / "wide")
    make_tokenizer().save_pretrained(tmp_path / "wide")
    masked = planned(tmp_path, str(tmp_path / "wide"))["phases"]
    monkeypatch.setattr(run_config, "_tokenizer", lambda data: None)
    usual = planned(tmp_path, str(tmp_path / "wide"))["phases"]
    for phase in ("scoring", "training"):
        assert masked[phase]["logits and temporary"] > usual[phase]["logits and temporary"]


def test_without_a_reference_there_is_none(policy: str, tmp_path: Path) -> None:
    answer = planned(tmp_path, policy, model__reference=..., model__kl_coef=0.0)
    assert all("reference" not in parts for parts in answer["phases"].values())


def test_a_job_of_slurm_can_be_planned(
    policy: str, usual: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = usual["peak"]
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    assert planned(tmp_path, policy)["peak"] == expected


def test_ppo_needs_the_value_model_too(usual: dict[str, Any]) -> None:
    value = usual["ppo"]["phases"]["update"]["value model"]
    assert value >= 12 * usual["parameters"]
    assert usual["ppo"]["peak"] > usual["peak"]


@pytest.mark.parametrize(("name", "part", "divided"), [
    ("ddp", "optimizer", False),
    ("zero1", "optimizer", True),
    ("zero2", "optimizer", True),
    ("zero3", "policy weights", True),
    ("fsdp2", "policy weights", True),
    ("zero2", "policy weights", False),
])  # fmt: skip
def test_a_strategy_divides_what_it_says(name: str, part: str, divided: bool, policy: str, tmp_path: Path) -> None:
    one, eight = (planned(tmp_path, policy, *strategy(name, n))["phases"]["update"][part] for n in (2, 8))
    assert (eight < one / 3) == divided


def test_offloaded_memory_is_the_hosts(policy: str, tmp_path: Path) -> None:
    answer = planned(tmp_path, policy, *strategy("zero3_offload", 2))
    assert "optimizer" not in answer["phases"]["update"]
    assert answer["host"] > planned(tmp_path, policy, *strategy("zero3", 2))["host"] == 0


def test_smaller_passes_need_less(policy: str, usual: dict[str, Any], tmp_path: Path) -> None:
    whole = usual["phases"]["training"]["activations"]
    options = {"data__micro_batch_size": 1, "trainer__accumulate_grad_batches": 4}
    assert planned(tmp_path, policy, **options)["phases"]["training"]["activations"] < whole / 3
    # A budget of tokens counts as if all rows were the longest, 16 + 4 tokens here; and no smaller one is planned.
    cut = planned(tmp_path, policy, data__tokens_per_micro_batch=39)
    assert cut["phases"] == planned(tmp_path, policy, **options)["phases"]
    with pytest.raises(UserError, match=r"data\.tokens_per_micro_batch must be at least 20, got 19"):
        planned(tmp_path, policy, data__tokens_per_micro_batch=19)
    again = planned(tmp_path, policy, model__policy__gradient_checkpointing=True)
    assert again["phases"]["training"]["activations"] < whole / 1.5


def test_it_says_whether_a_run_fits_and_from_how_many_devices_on(
    policy: str, usual: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peak = usual["peak"]
    assert planned(tmp_path, policy, "--memory", str(1.2 * peak / 1e9))["fits"]
    assert not planned(tmp_path, policy, "--memory", str(1.05 * peak / 1e9))["fits"]  # a tenth is left free
    assert "Does not fit" in capsys.readouterr().out
    sharded = [*strategy("fsdp2", 1), "--memory", str(0.9 * peak / 1e9)]
    least = planned(tmp_path, policy, *sharded)["least_devices"]
    assert least > 1
    sharded[3] = str(least)
    assert planned(tmp_path, policy, *sharded)["fits"]


def test_checkpointing_is_off_where_the_run_then_fits(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "model__policy__gradient_checkpointing"
    on, off = (planned(tmp_path, policy, **{key: value})["peak"] for value in (True, False))
    assert on < off
    for memory, expected in ((1.2 * off, off), (1.05 * off, on), (None, on)):
        more = [] if memory is None else ["--memory", str(memory / 1e9)]
        assert planned(tmp_path, policy, *more, **{key: "auto"})["peak"] == expected
    assert "Note: model.policy.gradient_checkpointing: auto is true, because" in capsys.readouterr().out


def test_a_gpu_holds_graphs_and_workspaces(policy: str, usual: dict[str, Any], tmp_path: Path) -> None:
    """A step's temporary memory, and the logits of a graph for each bucket of lengths, all rows, half of them ..."""
    on_gpu = {"trainer__accelerator": "gpu", "trainer__devices": 1}
    parts = planned(tmp_path, policy, **on_gpu)["phases"]
    logits = 8 * 96 * 4  # 4 prompts with a sampled and a greedy row; 16 + 4 tokens are one bucket of 32 slots
    for phase in ("rollout", "update"):  # kept between rollouts
        assert parts[phase]["CUDA workspaces"] == 2 * 32 * 2**20
        assert 2 * logits < parts[phase]["CUDA graphs"] < 20 * logits
    sharded = planned(tmp_path, policy, *strategy("fsdp2", 2), **on_gpu)["phases"]
    assert "CUDA graphs" in sharded["rollout"]
    assert "CUDA graphs" not in sharded["update"]
    off = {"class_path": "remax_lightning.rollout.PairedEngine", "init_args": {"cuda_graphs": False}}
    assert "CUDA graphs" not in planned(tmp_path, policy, **on_gpu, model__rollout=off)["phases"]["rollout"]
    assert "CUDA workspaces" not in usual["phases"]["rollout"]


def test_json_is_what_is_returned(policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = planned(tmp_path, policy, "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == answer


def test_the_fewest_devices_of_a_need_that_jumps() -> None:
    assert least_devices(lambda n: 100 // n + (30 if n >= 4 else 0), 34) == 3
    assert least_devices(lambda n: 100, 34) is None


def test_mistakes_name_the_argument(policy: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--memory must be above 0, got -1"):
        planned(tmp_path, policy, "--memory", "-1")
    with pytest.raises(UserError, match=r"model: remax plan is for ReMaxModule, got SFTModule"):
        main(["--config", str(config_folder() / "demo_sft.yaml")])
    with pytest.raises(SystemExit) as ended:
        planned(tmp_path, policy, model__kl_coeff=0.1)
    assert ended.value.code == 2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_mixtures_of_experts_are_planned_in_any_precision(precision: str, tmp_path: Path) -> None:
    """torch's product of grouped experts has shapes for bfloat16 alone, and numbers for all."""
    from transformers import MixtralConfig

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    config.save_pretrained(tmp_path / "experts")
    make_tokenizer().save_pretrained(tmp_path / "experts")
    answer = planned(tmp_path, str(tmp_path / "experts"), trainer__precision=precision)
    assert answer["parameters"] > 2 * 4 * 3 * 32 * 64  # those of the experts
    assert answer["phases"]["training"]["activations"] > 0


@pytest.mark.slow
def test_a_name_of_lightning_for_deepspeed_is_planned_as_the_strategy_of_the_run(policy: str, tmp_path: Path) -> None:
    """It sums the gradients of micro-batches in float32, which Lightning's own does not."""
    named, ours = "deepspeed_stage_2", {"class_path": "ReMaxDeepSpeedStrategy", "init_args": {"stage": 2}}
    options: dict[str, Any] = {"trainer__accelerator": "gpu", "trainer__devices": 2, "trainer__precision": "bf16-true"}
    options |= {"data__micro_batch_size": 2, "trainer__accumulate_grad_batches": 2}
    plans = [planned(tmp_path, policy, **options, trainer__strategy=strategy) for strategy in (named, ours)]
    assert plans[0] == plans[1]


def test_a_reward_model_reads_as_many_tokens_as_it_has_positions(policy: str, tmp_path: Path) -> None:
    """As in the run, which cuts longer texts."""
    from transformers import BertConfig

    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=24).save_pretrained(tmp_path / "reward")
    reward = {"class_path": "ClassifierReward", "init_args": {"path": str(tmp_path / "reward"), "batch_size": 4}}
    longer = {"max_response_length": 40}
    assert planned(tmp_path, policy, model__reward=reward, model__sampling=longer)["peak"] > 0


def test_whatever_a_model_raises_without_values_is_told_in_a_line(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a run whose checkpointing the plan decides starts nevertheless."""
    monkeypatch.setattr(StepPasses, "training", lambda *_: {}["of the model's own code"])
    with pytest.raises(UserError, match=r"model\.policy\.path: the passes of .* cannot be followed .*own code"):
        planned(tmp_path, policy)


QWEN = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SMALL = {
    "OPT-1.3B": None,  # of the script
    # the Qwen2.5 of 0.5B has less of everything
    "Qwen2.5-1.5B": QWEN | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                            "num_attention_heads": 12},
}  # fmt: skip


@pytest.mark.slow(6)
@pytest.mark.parametrize("overlay", ["24gb", "24gb_lora", "80gb", "80gb_lora"])
@pytest.mark.parametrize("model", SMALL)
def test_overlays_for_one_gpu_fit_into_it(model: str, overlay: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL[model] or scaling().MODELS[model]))
    reward = {"path": str(folder), "dtype": "bfloat16", "max_length": 512}
    config = {
        "model": {
            "policy": {"path": str(folder)},
            "reward": {"class_path": "ClassifierReward", "init_args": reward},
            "sampling": {"max_response_length": 256},
        },
        "data": {"path": "prompts.jsonl", "max_prompt_length": 256},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    memory = overlay.split("gb")[0]
    answer = main(["--config", str(tmp_path / "run.yaml"), "--config", f"gpus/{overlay}", "--memory", memory])
    assert answer["fits"]
    assert answer["devices"] == 1


SCRIPT = Path(__file__).parents[2] / "docs" / "generate_scaling.py"


def scaling() -> Any:
    spec = importlib.util.spec_from_file_location("generate_scaling", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow(8)
@pytest.mark.parametrize(
    ("model", "way"), [("OPT-1.3B", "FSDP2"), ("Llama-2-7B", "LoRA, ZeRO-3"), ("Llama-2-13B", "ZeRO-3")]
)
def test_the_table_of_the_page_is_what_the_plan_says(model: str, way: str) -> None:
    """Some lines of it: all would take minutes. `python docs/generate_scaling.py` writes it anew."""
    script = scaling()
    page = script.PAGE.read_text(encoding="utf-8")
    assert "| " + " | ".join([model, way, *script.cells(model, way)]) + " |" in page
    assert all(f"| {each} | {strategy} |" in page for each in script.MODELS for strategy in script.WAYS)


@pytest.mark.slow(6)
@pytest.mark.parametrize("way", ["`llama2_7b`", "`llama2_7b`, `gpus/8x40gb`"])
def test_the_table_against_ppo_is_what_the_plan_says(way: str) -> None:
    script = scaling()
    cells = script.headline_cells(script.HEADLINE[way])
    assert "| " + " | ".join([way, *cells]) + " |" in script.PAGE.read_text(encoding="utf-8")
    if "8x40gb" in way:
        assert cells[1::2] == ["40 and 80", "80"]  # ReMax fits into 40 GB, and PPO does not
