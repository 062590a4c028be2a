from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.fakes import FakeModule, checkpoint_at, make_output, make_trainer
from conftest import make_tokenizer, tiny_config, tiny_model
from helpers import training
from helpers.hub import Hub, use_hub
from safetensors.torch import load_file, save_file

from remax_lightning.callbacks import ExportPolicy
from remax_lightning.callbacks.export_policy import write_folder_atomically
from remax_lightning.errors import UserError
from remax_lightning.models import LoRAConfig, ModelConfig
from remax_lightning.models.hf_export import export_generation_config, policy_weights, save_policy
from remax_lightning.models.model_card import (
    MAX_POINTS,
    CardFacts,
    LoggedFigure,
    draw_course,
    render_card,
    update_figures,
)

LOAD = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
expected = load_file(sys.argv[2])
state = model.state_dict()
assert set(expected) == set(state), set(expected) ^ set(state)
assert all(torch.equal(state[name], expected[name]) for name in expected)
ids = tokenizer("1+1=", return_tensors="pt").input_ids
written = model.generate(ids, max_new_tokens=3, do_sample=False)
assert written.shape[1] <= ids.shape[1] + 3 and tokenizer.decode(ids[0], skip_special_tokens=True) == "1+1="
assert model.generation_config.use_cache and model.config.use_cache
assert not any(name.startswith("remax_lightning") for name in sys.modules)
print(model.generation_config.eos_token_id, model.generation_config.pad_token_id)
"""


def loads_with_transformers_alone(folder: Path, state: dict[str, torch.Tensor], scratch: Path) -> str:
    """Load `folder` in a process without this package, compare the weights, and return what it printed."""
    save_file({name: value.clone() for name, value in state.items()}, scratch / "expected.safetensors")
    command = [sys.executable, "-c", LOAD, str(folder), str(scratch / "expected.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class PolicyModule(FakeModule):
    """Fake steps, real policy: each step moves a weight, so that steps can be told apart."""

    def __init__(self, steps: int, scores: list[float], policy: Any = None, **arguments: Any) -> None:
        super().__init__([make_output(i) for i in range(steps)], [make_output(9)], scores=scores, **arguments)
        self.policy = policy or tiny_model("llama")
        self.tokenizer = make_tokenizer()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self.policy.get_input_embeddings().weight[0, 0] = float(self.trainer.global_step + 1)
        return super().training_step(batch, batch_idx)


def step_of(folder: Path) -> float:
    """The optimizer step whose policy lies in `folder`."""
    return float(load_file(folder / "model.safetensors")["model.embed_tokens.weight"][0, 0])


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_alone_loads_the_exported_policy(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama")
    config.tie_word_embeddings, config.use_cache = tied, False
    policy = AutoModelForCausalLM.from_config(config)
    module = PolicyModule(1, [], policy)
    make_trainer(tmp_path, [ExportPolicy(best=False)]).fit(module)
    folder = tmp_path / "logs" / "policy" / "last"
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
    assert loads_with_transformers_alone(folder, policy.state_dict(), tmp_path) == "2 3"
    assert policy.config.use_cache is False  # the policy in training is left as it was


def test_last_is_the_end_and_best_is_the_best_validation(tmp_path: Path) -> None:
    module = PolicyModule(4, [0.5, 0.9, float("nan"), 0.7])
    export = ExportPolicy()
    make_trainer(tmp_path, [export], num_sanity_val_steps=1, val_check_interval=1).fit(module)
    folder = tmp_path / "logs" / "policy"
    assert (step_of(folder / "best"), step_of(folder / "last")) == (2.0, 4.0)
    assert export.best_score == pytest.approx(0.9)
    assert sorted(path.name for path in folder.iterdir()) == ["best", "last"]


def test_least_can_be_best_and_the_folder_chosen(tmp_path: Path) -> None:
    export = ExportPolicy(folder=str(tmp_path / "mine"), mode="min", last=False)
    make_trainer(tmp_path, [export], val_check_interval=1).fit(PolicyModule(3, [0.5, 0.2, 0.3]))
    assert step_of(tmp_path / "mine" / "best") == 2.0
    assert not (tmp_path / "mine" / "last").exists()


def test_the_folder_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves `~` in YAML files, where it would be a folder of that name."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    make_trainer(tmp_path, [ExportPolicy(folder="~/policy", best=False)]).fit(PolicyModule(1, []))
    assert (tmp_path / "home" / "policy" / "last" / "config.json").is_file()
    assert not (tmp_path / "~").exists()


def test_nothing_is_exported_by_validate(tmp_path: Path) -> None:
    make_trainer(tmp_path, [ExportPolicy()]).validate(PolicyModule(1, [0.5]), verbose=False)
    assert not (tmp_path / "logs" / "policy").exists()


@pytest.mark.slow
def test_a_resumed_run_remembers_the_best_score(tmp_path: Path) -> None:
    def run(scores: list[float], export: ExportPolicy, **arguments: Any) -> None:
        trainer = make_trainer(tmp_path, [export, checkpoint_at(3, tmp_path)], val_check_interval=1)
        trainer.fit(PolicyModule(5, scores), **arguments)

    run([0.5, 0.9, 0.1, 0.0, 0.0], ExportPolicy())
    best = tmp_path / "logs" / "policy" / "best"
    resume = {"ckpt_path": tmp_path / "step=3.ckpt", "weights_only": True}
    resumed = ExportPolicy()
    run([0.1, 0.8, 0.8], resumed, **resume)
    assert resumed.best_score == pytest.approx(0.9)
    assert step_of(best) == 2.0
    run([0.1, 0.95, 0.8], ExportPolicy(), **resume)
    assert step_of(best) > 3.0
    other = ExportPolicy(monitor="val/other")
    run([0.1, 0.1, 0.1], other, **resume)
    assert other.best_score is None


def test_says_which_metrics_exist_when_the_monitored_one_does_not(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(tmp_path, [ExportPolicy(monitor="val/loss", last=False)])
        trainer.fit(PolicyModule(1, [0.5]))
    (message,) = [str(warning.message) for warning in caught if "No best policy" in str(warning.message)]
    assert "'val/loss'" in message
    assert "val/reward" in message


@pytest.mark.parametrize(
    ("resumed", "expected"), [(False, ["No best policy was exported, because no validation ran."]), (True, [])]
)
def test_a_run_without_validation_says_so_unless_it_goes_on_from_a_best_policy(
    resumed: bool, expected: list[str], tmp_path: Path
) -> None:
    export = ExportPolicy(last=False)
    if resumed:
        export.load_state_dict({"monitor": "val/reward", "best_score": 0.9, "best_path": str(tmp_path), "figures": {}})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, [export], limit_val_batches=0).fit(PolicyModule(1, [0.5]))
    assert [text for item in caught if "No best policy" in (text := str(item.message))] == expected


def test_a_module_without_a_policy_is_left_alone(tmp_path: Path) -> None:
    make_trainer(tmp_path, [ExportPolicy()]).fit(FakeModule([{}], [{}]))
    assert not (tmp_path / "logs" / "policy").exists()


def test_bad_arguments_name_their_key() -> None:
    with pytest.raises(UserError, match=r"export\.mode"):
        ExportPolicy(mode="most")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"export\.monitor"):
        ExportPolicy(monitor="")


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "policy" / "best"

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_folder_atomically(target, fail)
    assert not target.exists()
    write_folder_atomically(target, lambda folder: (folder / "first").touch())
    with pytest.raises(OSError, match="no space"):
        write_folder_atomically(target, fail)
    assert {path.name for path in target.iterdir()} == {"first", "checksums.json"}
    write_folder_atomically(target, lambda folder: (folder / "second").touch())
    assert {path.name for path in target.iterdir()} == {"second", "checksums.json"}
    assert [path.name for path in target.parent.iterdir()] == ["best"]


def interrupted(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace a folder in a process that is killed between the two renames."""
    rename = Path.rename

    def killed(path: Path, other: Path) -> Path:
        if path.name.endswith(".new"):
            raise KeyboardInterrupt
        return rename(path, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write_folder_atomically(target, lambda folder: (folder / "second").touch())
    assert not target.exists()


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old folder was the only copy then, and was deleted before the next one was written."""
    target = tmp_path / "best"
    write_folder_atomically(target, lambda folder: (folder / "config.json").touch())
    interrupted(target, monkeypatch)

    def fail(_: Path) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_folder_atomically(target, fail)
    assert (target / "config.json").exists()
    # ---- A run that is resumed and finds no better policy has it, too ----
    interrupted(target, monkeypatch)
    export = ExportPolicy(folder=str(tmp_path), last=False)
    export.best_score = 1.0
    make_trainer(tmp_path, [export], val_check_interval=1).fit(PolicyModule(1, [0.5]))
    assert (target / "config.json").exists()


def test_a_link_stays_and_its_folder_is_replaced(tmp_path: Path) -> None:
    link, folder = tmp_path / "best", tmp_path / "large_disk" / "best"
    link.symlink_to(folder)
    for name in ("first", "second", "third"):
        write_folder_atomically(link, lambda new, name=name: (new / name).touch())
        assert link.is_symlink()
        assert {path.name for path in folder.iterdir()} == {name, "checksums.json"}


def test_nothing_else_is_replaced(tmp_path: Path) -> None:
    """It was deleted at the end of training, and a file raised an error then."""
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for folder, message in (
        (
            tmp_path,
            r"export\.folder: '.*last' would be replaced, and holds something else than an exported model; give",
        ),
        (tmp_path / "file", r"export\.folder: '.*file' is a file; give another folder"),
    ):
        with pytest.raises(UserError, match=message):
            make_trainer(tmp_path, [ExportPolicy(folder=str(folder))]).fit(PolicyModule(1, [0.5]))
    assert (tmp_path / "last" / "thesis.tex").exists()


def test_generation_settings_that_transformers_refuses_are_mended(tmp_path: Path) -> None:
    policy, tokenizer = tiny_model("llama"), make_tokenizer()
    policy.generation_config.temperature = 0.6
    policy.generation_config.do_sample = False
    policy.generation_config.eos_token_id = 7
    policy.generation_config.pad_token_id = None
    before = copy.deepcopy(policy.generation_config).to_dict()
    with pytest.raises(ValueError, match="temperature"):
        policy.save_pretrained(tmp_path / "plain")
    config = export_generation_config(policy, tokenizer)
    assert (config.eos_token_id, config.pad_token_id) == ([7, 2], 3)
    assert (config.do_sample, config.temperature) == (True, 0.6)
    save_policy(policy, tokenizer, None, tmp_path)
    assert policy.generation_config.to_dict() == before


def test_settings_beyond_mending_are_replaced(tmp_path: Path) -> None:
    policy = tiny_model("llama")
    policy.generation_config.early_stopping = True  # only beams have it
    config = export_generation_config(policy, make_tokenizer())
    config.save_pretrained(tmp_path)
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (2, 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [True, False])
def test_lora_adapters_are_merged_into_a_copy(tmp_path: Path, wrapped: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    policy = tiny_model("llama")
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    expected = {name: value.clone() for name, value in policy.state_dict().items()}
    if wrapped:
        policy = get_peft_model(policy, lora)
    else:
        policy.add_adapter(lora)
    adapted = {name: value.clone() for name, value in policy.state_dict().items()}
    for name, down in adapted.items():
        if "lora_A" in name:
            key = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
            up = adapted[name.replace("lora_A", "lora_B")]
            expected[key] = expected[key] + (up @ down) * (lora.lora_alpha / lora.r)
    (tmp_path / "out").mkdir()
    save_policy(policy, make_tokenizer(), None, tmp_path / "out", merge_adapter=True)
    assert all(torch.equal(value, adapted[name]) for name, value in policy.state_dict().items())
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in exported.items():
        torch.testing.assert_close(value, expected[name])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[name], value) for name, value in exported.items())


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trained", [
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["norm"]},
    {"trainable_token_indices": [5, 6, 7]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"]},
])  # fmt: skip
def test_a_merged_policy_says_what_the_adapted_one_says(trained: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    """Also where the adapter holds whole modules or tokens, or unties the embeddings."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama", 96)
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    lora = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **trained})
    policy = get_peft_model(AutoModelForCausalLM.from_config(config), lora).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        save_policy(policy, make_tokenizer(), None, tmp_path, merge_adapter=True)
        ids = torch.arange(4, 20)[None]
        merged = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits
        torch.testing.assert_close(merged, policy(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_weights_that_fsdp2_has_sharded_are_gathered(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    policy = tiny_model("llama")
    expected = {name: value.clone() for name, value in policy.state_dict().items()}
    assert policy_weights(policy, keep=True) is None
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        fully_shard(policy, mesh=init_device_mesh("cpu", (1,)))
        weights = policy_weights(policy, keep=True)
        assert weights is not None
        assert policy_weights(policy, keep=False) == {}
        (tmp_path / "out").mkdir()
        save_policy(policy, make_tokenizer(), weights, tmp_path / "out")
    finally:
        dist.destroy_process_group()
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in exported.items())
    assert len(exported) == len(expected)


def test_an_adapter_is_saved_alone(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    policy = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    policy.add_adapter("start", LoraConfig(target_modules=["q_proj"]))  # that training began with
    assert policy_weights(policy, keep=True, merge_adapter=False) is None  # all of it is here
    save_policy(policy, make_tokenizer(), None, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 2 * 2  # two matrices in two layers
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).state_dict()
    assert all(torch.equal(value, policy.state_dict()[name]) for name, value in loaded.items())
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "tokenizer.json").is_file()


# ---- The model card ----


def test_the_card_says_where_the_model_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import ModelCard

    command = "/bin/remax fit --reward.api_key hidden --hub_token=hidden --pad_token=x --url=http://me:hidden@host"
    monkeypatch.setattr(sys, "argv", [*command.split(), '--reward={"headers": {"X": "hidden"}}'])
    policy = tiny_model("llama")
    policy.config._name_or_path = "owner/base"
    trainer = make_trainer(tmp_path, [ExportPolicy()], val_check_interval=1)
    trainer.fit(PolicyModule(3, [0.5, 0.9, 0.7], policy))
    card = ModelCard.load(tmp_path / "logs" / "policy" / "last" / "README.md")
    assert (card.data.base_model, card.data.library_name, card.data.license) == ("owner/base", "transformers", None)
    assert "| `val/reward` | 0.5 (1) | 0.7 (3) | 0.9 (2) |" in card.text
    assert "remax fit --reward.api_key '***' '--hub_token=***' --pad_token=x '--url=http://***@host'" in card.text
    assert "hidden" not in card.text
    assert f"torch {torch.__version__.partition('+')[0]}" in card.text


def test_a_resumed_run_goes_on_with_the_figures_of_its_card(tmp_path: Path) -> None:
    first = ExportPolicy(last=False)
    make_trainer(tmp_path, [first], val_check_interval=1).fit(PolicyModule(2, [0.2, 0.9]))
    resumed = ExportPolicy()
    resumed.load_state_dict(first.state_dict())
    make_trainer(tmp_path / "resumed", [resumed], val_check_interval=1).fit(PolicyModule(1, [0.4]))
    card = (tmp_path / "resumed" / "logs" / "policy" / "last" / "README.md").read_text()
    assert "| `val/reward` | 0.2 (1) | 0.4 (1) | 0.9 (2) |" in card


def test_the_card_draws_the_curves(tmp_path: Path) -> None:
    figures: dict[str, LoggedFigure] = {}
    for step in range(1, 1001):
        value = step / 1000 if step <= 500 else 0.5
        update_figures(figures, step, {"train/reward": value, "train/kl": 0.25}, "train")
    reward, kl = figures["train/reward"], figures["train/kl"]
    assert reward.course[0] == (1, 0.001)
    assert reward.course[-1] == (1000, 0.5)
    assert 100 < len(reward.course) <= MAX_POINTS
    drawn = draw_course(reward.course)
    assert len(drawn) == len(draw_course(kl.course)) <= 32
    assert drawn[0] == "▁"
    assert sorted(drawn) == list(drawn)  # it rises, and stays
    assert set(drawn[len(drawn) // 2 + 1 :]) == {"█"}
    assert len(set(draw_course(kl.course))) == 1
    assert draw_course([(1, 2.0)]) == ""
    facts = CardFacts("base", "ReMaxModule", False, True, [], "", figures, {}, [])
    assert f"| `train/reward` | 0.001 (1) | 0.5 (1000) | 0.5 (500) | {drawn} |" in render_card(facts)


@pytest.mark.parametrize("name", [
    *("secret_key", "aws_secret_access_key", "private_key", "key"),
    *("accessToken", "hf_token", "passwd", "db_password", "credential"),
])  # fmt: skip
def test_the_card_tells_no_secret(name: str) -> None:
    facts = CardFacts("b", "ReMaxModule", False, True, [], "", {}, {}, [])
    for arguments in (
        [f"--reward.{name}=xyzzy"],
        [f"--reward.{name}", "xyzzy"],
        [f"--url=https://h/s?a=b&{name}=xyzzy"],
    ):
        assert "xyzzy" not in render_card(facts._replace(command=["remax", "fit", *arguments]))
    shown = [
        "--reward.token_env=xyzzy",
        "--data.pad_token=xyzzy",
        "--model.tokenizer=xyzzy",
        "--url=https://h/?q=xyzzy",
    ]
    assert render_card(facts._replace(command=["remax", "fit", *shown])).count("xyzzy") == len(shown)


def test_a_card_that_cannot_be_written_fails_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.ModelCard.save", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="no model card was written"):
        make_trainer(tmp_path, [ExportPolicy(best=False)]).fit(PolicyModule(1, []))
    assert step_of(tmp_path / "logs" / "policy" / "last") == 1.0


# ---- The hub ----


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        use_hub(monkeypatch, hub.url)
        yield hub


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("last", [True, False])
def test_the_policy_is_pushed_to_a_private_repository(tmp_path: Path, hub: Hub, last: bool) -> None:
    for _ in range(2):  # a second run adds a commit
        export = ExportPolicy(last=last, push_to_hub="me/policy")
        make_trainer(tmp_path, [export], val_check_interval=1).fit(PolicyModule(2, [0.5, 0.2]))
    name = "last" if last else "best"
    [options] = hub.repositories.values()
    assert "private" in (options.get("visibility"), *[key for key, value in options.items() if value is True])
    assert hub.commits == [("me/policy", f"Upload policy/{name}")] * 2
    folder = tmp_path / "logs" / "policy" / name
    assert hub.files == {"me/policy": {path.name: path.read_bytes() for path in folder.iterdir()}}
    assert {"model.safetensors", "tokenizer.json", "README.md", "checksums.json"} <= set(hub.files["me/policy"])


@pytest.mark.parametrize("failure", ["no right to write", "no server"])
def test_a_push_that_fails_leaves_the_folder(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    use_hub(monkeypatch, *((hub.url, "hf_wrong") if failure == "no right to write" else ("http://127.0.0.1:1",)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, [ExportPolicy(best=False, push_to_hub="me/policy")]).fit(PolicyModule(1, []))
    [said] = [str(item.message) for item in caught if "push_to_hub" in str(item.message)]
    assert "is not on the hub (" in said
    assert ("401" in said) == (failure == "no right to write")
    assert said.endswith(f"push it with: hf upload me/policy {tmp_path / 'logs' / 'policy' / 'last'}")
    assert "\n" not in said
    assert hub.files == {}
    assert step_of(tmp_path / "logs" / "policy" / "last") == 1.0


def test_weights_that_are_not_finite_are_not_pushed(tmp_path: Path, hub: Hub) -> None:
    module = PolicyModule(1, [])
    module.policy.lm_head.weight.data[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="nothing is pushed to me/policy"):
        make_trainer(tmp_path, [ExportPolicy(best=False, push_to_hub="me/policy")]).fit(module)
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"push_to_hub": "policy"}, r"export\.push_to_hub must be owner/name.*no owner"),
        ({"push_to_hub": "me/po licy"}, r"export\.push_to_hub must be owner/name"),
        ({"push_to_hub": "me/policy", "last": False, "best": False}, r"export\.push_to_hub needs"),
    ],
)
def test_a_push_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ExportPolicy(**options)


@pytest.mark.slow(0.3)
def test_an_adapter_that_cannot_be_merged_is_refused_before_training(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, adapter = training.save_policy(tmp_path / "policy", "llama"), str(tmp_path / "adapter")
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(adapter)
    module = training.remax_module(ModelConfig(base, lora=LoRAConfig(path=adapter)))
    trainer = training.make_trainer(tmp_path, [ExportPolicy(str(tmp_path / "out"), best=False, merge_adapter=True)])
    with pytest.raises(UserError, match=r"export\.merge_adapter: the adapter has lora_bias, and model\.layers\.0"):
        trainer.fit(module, training.prompt_data(tmp_path, base))
    assert trainer.global_step == 0
