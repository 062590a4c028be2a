"""The recipe of a sweep with the real Optuna, on a tiny policy."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from conftest import make_tokenizer, tiny_model
from helpers.cli import changed, in_folder, small_config, write_config

pytestmark = pytest.mark.slow(5)

SCRIPT = Path(__file__).parents[2] / "examples" / "sweep" / "sweep.py"


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    pytest.importorskip("optuna")
    spec = importlib.util.spec_from_file_location("sweep", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path: Path) -> str:
    """Two steps, with a validation after each."""
    tiny_model("llama").save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    return write_config(
        tmp_path / "run.yaml",
        changed(
            small_config(tmp_path, tmp_path / "policy"),
            model__optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            trainer__val_check_interval=1,
            trainer__check_val_every_n_epoch=None,
        ),
    )


def test_trials_have_their_values_and_folders(
    sweep: ModuleType, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with in_folder(tmp_path):
        study = sweep.main(["--config", config, "--trials", "2", "--data.val_size=2"])
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    for trial in study.trials:
        folder = tmp_path / "runs" / "sweep" / "trials" / f"trial_{trial.number}"
        saved = (folder / "config.yaml").read_text()
        assert f"kl_coef: {trial.params['kl_coef']}" in saved
        assert "val_size: 2" in saved
        assert (folder / "policy" / "last" / "config.json").is_file()
        assert sorted(trial.intermediate_values) == [0, 1, 2]
        assert trial.value == trial.intermediate_values[2]
    assert study.trials[0].params != study.trials[1].params
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("best: trial ")


def test_a_bad_trial_is_given_up_and_a_second_call_goes_on(
    sweep: ModuleType, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optuna

    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda trial: trial.number == 1)
    with in_folder(tmp_path):
        for _ in range(2):
            study = sweep.main(["--config", config, "--trials", "1"])
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert sorted(study.trials[1].intermediate_values) == [0, 1]
