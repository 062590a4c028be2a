"""Two ranks share a vLLM server: whole and sharded policies get to it once for each version."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer
from distributed.vllm_ranks import STEPS, fail, train
from helpers.ranks import launch
from helpers.training import save_policy
from helpers.vllm_server import GENERATE, FakeVLLM

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp2"])
def test_ranks_train_with_the_responses_of_one_server(strategy: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    policy = save_policy(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(policy)
    with FakeVLLM(model, make_tokenizer()) as server:
        launch(train, server.url, policy, tmp_path / "run", strategy)
    end = torch.load(tmp_path / "run" / "end.pt", weights_only=True)
    assert end["logged"]["train/mismatch_kl"] < 1e-6
    assert end["logged"]["train/mismatch_ratio_max"] == pytest.approx(1, abs=1e-3)
    # One update for each version, whichever rank made it; the last step's weights are not rolled out any more.
    assert server.paths.count("/update_weights") == STEPS
    last, start = end["weights"]["model.norm.weight"], dict(model.named_parameters())["model.norm.weight"]
    held = dict(server.base.named_parameters())["model.norm.weight"]
    assert 0 < (held - start).norm() < (last - start).norm()
    # Each rank asked for its prompts: 4 of 8, with a sampled and a greedy response; and each checks the vocabulary.
    assert len(server.requests) == 2 + STEPS * 2 * 4 * 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_share_servers_that_write_ahead(strategy: str, tmp_path: Path) -> None:
    """No rank updates the weights while the responses of another one are under way: none is aborted and asked again."""
    from transformers import AutoModelForCausalLM

    policy = save_policy(tmp_path / "policy")
    with FakeVLLM(AutoModelForCausalLM.from_pretrained(policy), make_tokenizer(), seconds=0.05) as server:
        launch(train, server.url, policy, tmp_path / "run", strategy, 1)
    end = torch.load(tmp_path / "run" / "end.pt", weights_only=True)
    assert end["logged"]["train/mismatch_kl"] > 1e-6
    assert len(server.requests) == 2 + STEPS * 2 * 4 * 2
    versions = [set(server.versions[start : start + 16]) for start in range(2, 2 + STEPS * 16, 16)]
    assert [len(version) for version in versions] == [1] * STEPS
    assert versions[0] == versions[1] != versions[2]


def test_rank_0_sends_weights_to_a_server_that_any_rank_has_lost(tmp_path: Path) -> None:
    """The other one sees no file; with 16 responses of each rollout, the server dies in the second one."""
    from transformers import AutoModelForCausalLM

    policy = save_policy(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(policy)
    with FakeVLLM(model, make_tokenizer(), dies_after=2 + 16 + 12, back_after=0.3) as server:
        launch(train, server.url, policy, tmp_path / "run", "ddp", 0, "broadcast")
    end = torch.load(tmp_path / "run" / "end.pt", weights_only=True)
    assert end["logged"]["train/mismatch_ratio_max"] == pytest.approx(1, abs=1e-3)
    assert server.restarts == 1
    assert server.paths.count("/update_weights") == STEPS + 1


@pytest.mark.parametrize(
    ("strategy", "where"), [("ddp", "write"), ("zero3", "proof"), ("fsdp2", "proof"), ("fsdp2", "response")]
)
def test_a_rank_that_fails_ends_all_at_once(strategy: str, where: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    policy = save_policy(tmp_path / "policy")
    with FakeVLLM(AutoModelForCausalLM.from_pretrained(policy), make_tokenizer()) as server:
        if where == "response":
            server.statuses[GENERATE] = [200] * 4 + [400]  # the first two check the vocabulary
        launch(fail, server.url, policy, tmp_path / "run", strategy, where)
