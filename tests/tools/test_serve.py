"""`remax serve`: the command that it makes of a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from remax_lightning.errors import UserError
from remax_lightning.tools.serve import main, serve_command

ENGINE = {"class_path": "VLLMEngine", "init_args": {"urls": ["http://127.0.0.1:8123"]}}


@pytest.fixture
def config(tmp_path: Path, policy_path: Path) -> Any:
    """A function that writes a configuration and returns the arguments that name it."""

    def write(**model: Any) -> list[str]:
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1="}\n')
        arguments = {
            "policy": {"path": str(policy_path)},
            "kl_coef": 0,
            "reward": "remax_lightning.rewards.exact_match",
        } | model
        content = {
            "model": {"class_path": "ReMaxModule", "init_args": arguments},
            "data": {
                "class_path": "PromptDataModule",
                "init_args": {"path": str(tmp_path / "prompts.jsonl"), "max_prompt_length": 40},
            },
            "trainer": {"accelerator": "cpu"},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        return ["--config", str(tmp_path / "config.yaml")]

    return write


def value(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


@pytest.mark.slow
def test_the_server_is_started_as_the_engine_wants_it(config: Any, policy_path: Path) -> None:
    arguments, environment = serve_command(
        config(rollout=ENGINE, sampling={"max_response_length": 24, "temperature": 0.7}),
        "python3",
        None,
        None,
        ["--x", "1"],
    )
    assert arguments[:5] == ["python3", "-m", "remax_vllm_serve", "serve", str(policy_path)]
    assert (value(arguments, "--host"), value(arguments, "--port")) == ("127.0.0.1", "8123")
    assert value(arguments, "--max-model-len") == "64"
    assert value(arguments, "--dtype") == "float32"
    assert value(arguments, "--logprobs-mode") == "processed_logprobs"
    assert json.loads(value(arguments, "--weight-transfer-config")) == {"backend": "remax"}
    assert arguments[-2:] == ["--x", "1"]
    assert "--enable-lora" not in arguments
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    # What is imported in the server's environment is on its path.
    for module in (arguments[2], value(arguments, "--worker-extension-cls").partition(".")[0]):
        assert Path(environment["PYTHONPATH"].split(":")[0], f"{module}.py").is_file()


@pytest.mark.slow
def test_each_machine_serves_at_its_own_url(config: Any) -> None:
    """192.0.2.1 belongs to documentation, so to no machine."""
    urls = ["http://192.0.2.1:8001", "http://127.0.0.1:8002", "http://127.0.0.1:8003"]
    rollout = {"class_path": "VLLMEngine", "init_args": {"urls": urls}}
    arguments, _ = serve_command(config(rollout=rollout), "python3", None, None, [])
    assert (value(arguments, "--host"), value(arguments, "--port")) == ("127.0.0.1", "8002")


@pytest.mark.slow
def test_an_adapter_and_a_key(config: Any, monkeypatch: pytest.MonkeyPatch, policy_path: Path) -> None:
    monkeypatch.setenv("SERVE_KEY", "secret")
    engine = {"class_path": "VLLMEngine", "init_args": {**ENGINE["init_args"], "api_key_env": "SERVE_KEY"}}
    policy = {"path": str(policy_path), "dtype": "bfloat16", "lora": {"r": 12}}
    command = serve_command(config(rollout=engine, policy=policy), "python3", "0.0.0.0", 9000, [])
    assert value(command.arguments, "--max-lora-rank") == "16"
    assert value(command.arguments, "--dtype") == "bfloat16"
    assert (value(command.arguments, "--host"), value(command.arguments, "--port")) == ("0.0.0.0", "9000")
    assert command.environment["VLLM_API_KEY"] == "secret"
    assert "secret" not in str(command)


@pytest.mark.slow
def test_without_vllm_it_says_what_to_install(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*config(), "--python", "no-such-program"]
    main([*arguments, "--print"])
    assert "no-such-program -m remax_vllm_serve serve" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is no 'no-such-program'; install vLLM"):
        main(arguments)
