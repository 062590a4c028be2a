"""Checks of prompts and responses by `remax doctor`: each fails on a planted fault, and its figures are right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from helpers.chat_templates import with_turn_token
from helpers.cli import changed
from helpers.doctor import (
    ENDS,
    PROMPTS,
    TURNS,
    EosStrippingEngine,
    NeverStopsEngine,
    ask,
    healthy,
    loaded,
    preferred,
    supervised,
)
from helpers.training import write_rows

from remax_lightning.data.chat_templates import ChatRenderer
from remax_lightning.tools.doctor import DoctorContext
from remax_lightning.tools.doctor.responses import check_special_tokens

pytestmark = pytest.mark.slow  # every context loads a policy and a reference


@pytest.fixture(scope="module")
def well(tmp_path_factory: pytest.TempPathFactory) -> DoctorContext:
    folder = tmp_path_factory.mktemp("well")
    return loaded(folder, healthy(folder))


def with_prompts(folder: Path, prompts: list[Any], template: str | None = None, **values: Any) -> DoctorContext:
    """A healthy run but for its prompts, which `template` makes of messages."""
    config = healthy(folder)
    write_rows(folder / "rows.jsonl", ({"prompt": prompt} for prompt in prompts))
    if template is not None:
        make_tokenizer(chat_template=template).save_pretrained(folder / "policy")
    return loaded(folder, changed(config, **values))


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# Prompts


def test_healthy(well: DoctorContext) -> None:
    for name in ("prompts", "bos", "prompt_eos", "pad_token", "eos", "eos_trained", "truncation", "generation_config"):
        assert ask(well, name).status == "pass", ask(well, name)


def test_an_empty_prompt(tmp_path: Path) -> None:
    empty = [{"role": "system", "content": ""}]  # an empty question is refused before
    context = with_prompts(tmp_path, [empty] * 24, "<s>{{ messages[0]['content'] }}")
    found = ask(context, "prompts")
    assert found.status == "fail"
    assert found.values["empty"] == 12


@pytest.mark.parametrize(("long", "status"), [(1, "pass"), (4, "warn"), (30, "fail")])
def test_rows_that_are_left_out(tmp_path: Path, long: int, status: str) -> None:
    context = with_prompts(tmp_path, PROMPTS + ["1" * 60] * long, data__init_args__val_size=0)
    found = ask(context, "prompts")
    assert (found.values["left_out"], found.values["rows"]) == (long, 24 + long)
    assert found.status == status


def test_prompts_that_are_all_the_same(tmp_path: Path) -> None:
    context = with_prompts(tmp_path, PROMPTS, data__init_args__template="Say something. {{prompt}} {prompt:.0}")
    found = ask(context, "prompts")
    assert found.status == "warn"
    assert "11 of 12 prompts repeat another one" in found.measured


def test_doubled_bos(tmp_path: Path) -> None:
    context = with_prompts(tmp_path, [said(f"<s>{prompt}") for prompt in PROMPTS], "<s>{{ messages[0]['content'] }}")
    found = ask(context, "bos")
    assert found.status == "fail"
    assert found.values["doubled"] == 12


def test_a_chat_template_without_bos(tmp_path: Path) -> None:
    context = with_prompts(tmp_path, [said(prompt) for prompt in PROMPTS], "{{ messages[0]['content'] }}")
    found = ask(context, "bos")
    assert found.status == "warn"
    assert found.values["lacking"] == 12


def test_doubled_bos_in_pairs(tmp_path: Path) -> None:
    config = preferred(tmp_path)
    rows = [{"prompt": f"<s><s>{prompt}", "chosen": prompt, "rejected": "no"} for prompt in PROMPTS]
    write_rows(tmp_path / "pairs.jsonl", rows)
    assert ask(loaded(tmp_path, config), "bos").values["doubled"] == 24


def test_eos_at_the_end_of_prompts(tmp_path: Path) -> None:
    found = ask(with_prompts(tmp_path, [f"{prompt}</s>" for prompt in PROMPTS]), "prompt_eos")
    assert found.status == "fail"
    assert "12 of 12 prompts end with EOS" in found.measured


def test_eos_inside_of_plain_prompts(tmp_path: Path) -> None:
    found = ask(with_prompts(tmp_path, [f"1</s>{prompt}" for prompt in PROMPTS]), "prompt_eos")
    assert found.status == "warn"
    assert found.values == {"at_the_end": 0, "inside": 12}


def test_eos_between_the_turns_of_a_chat(tmp_path: Path) -> None:
    found = ask(with_prompts(tmp_path, [said(prompt) for prompt in PROMPTS], TURNS), "prompt_eos")
    assert found.status == "pass"
    assert found.values["inside"] == 12


# Padding


def test_a_mask_of_ids_hides_eos_where_it_pads(tmp_path: Path) -> None:
    config = healthy(tmp_path, pad_is_eos=True)
    rows = ({"prompt": f"{'1' * n}</s>{prompt}"} for n, prompt in enumerate(PROMPTS, 1))
    path = write_rows(tmp_path / "eos.jsonl", rows)
    config = changed(config, data__init_args__path=path)
    assert ask(loaded(tmp_path, config), "pad_token").status == "pass"
    found = ask(loaded(tmp_path, config, data__class_path="helpers.doctor.HidesPads"), "pad_token")
    assert found.status == "fail"
    assert found.values == {"pad_is_eos": 1, "rows_with_holes": 12}


def test_a_pad_token_that_the_model_lacks(well: DoctorContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(well.module.policy, "get_input_embeddings", lambda: SimpleNamespace(num_embeddings=3))
    found = ask(well, "pad_token")
    assert found.status == "fail"
    assert "the pad token 3 is not among the model's 3 embeddings" in found.measured


def test_a_second_eos_in_responses_to_imitate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = supervised(tmp_path, pad_is_eos=True)
    assert ask(loaded(tmp_path, config), "pad_token").status == "pass"
    # A data module of a user's own may let through what this package's refuses.
    monkeypatch.setattr(ChatRenderer, "early_end", lambda *_: "")
    write_rows(tmp_path / "pairs.jsonl", ({"prompt": prompt, "response": "1</s>2"} for prompt in PROMPTS))
    found = ask(loaded(tmp_path, config), "pad_token")
    assert found.status == "fail"
    assert "12 responses count more than one EOS" in found.measured


def test_a_reward_model_that_pads_with_eos(tmp_path: Path) -> None:
    found = ask(loaded(tmp_path, preferred(tmp_path, pad_is_eos=True)), "pad_token")
    assert found.status == "warn"
    assert "data.loading.pad_token" in found.fix


# Ends


def test_an_eos_that_is_no_token(well: DoctorContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(well.module.policy.generation_config, "eos_token_id", [2, 200])
    found = ask(well, "eos")
    assert found.status == "fail"
    assert "EOS 200 is not among the policy's 96 tokens" in found.measured


def test_an_eos_that_is_never_written(well: DoctorContext) -> None:
    def never(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor(ENDS), -1e4)

    hook = well.module.policy.lm_head.register_forward_hook(never)
    try:
        found = ask(well, "eos")
    finally:
        hook.remove()
    assert found.status == "fail"
    assert found.values == {"highest_probability": 0, "ended": 0}


def test_the_highest_probability_of_eos_is_that_of_a_plain_pass(well: DoctorContext) -> None:
    highest, rollout = 0.0, well.rollout
    for i in range(0, len(rollout.sampled.response_ids), 2):
        start = rollout.prompt.prompt_ids[i // 2][rollout.prompt.prompt_mask[i // 2]]
        response = rollout.sampled.response_ids[i][rollout.sampled.response_mask[i]]
        with torch.no_grad():
            logits = well.module.policy(torch.cat([start, response])[None]).logits[0, len(start) - 1 : -1]
        highest = max(highest, float(logits.double().softmax(-1)[:, list(ENDS)].sum(-1).max()))
    assert ask(well, "eos").values["highest_probability"] == pytest.approx(highest, rel=1e-4)


def test_a_tokenizer_whose_eos_the_policy_does_not_name(tmp_path: Path) -> None:
    found = ask(loaded(tmp_path, healthy(tmp_path, ends=ENDS[1:])), "eos")
    assert found.status == "warn"
    assert "the tokenizer's 2 is not in generation_config" in found.measured


@pytest.mark.parametrize(("ends", "status"), [(ENDS, "fail"), ((*ENDS, 83), "pass")])
def test_a_chat_template_that_ends_turns_with_another_token(tmp_path: Path, ends: Any, status: str) -> None:
    config = healthy(tmp_path, ends=ends)
    write_rows(tmp_path / "rows.jsonl", ({"prompt": said(prompt)} for prompt in PROMPTS))
    with_turn_token().save_pretrained(tmp_path / "policy")
    found = ask(loaded(tmp_path, config), "eos")
    assert found.status == status, found
    assert ("the chat template ends a turn with '<turn>' (83)" in found.measured) == (status == "fail")


@pytest.mark.parametrize(
    ("engine", "measured"),
    [(EosStrippingEngine(), "one is padded without an EOS"), (NeverStopsEngine(), "one continues after its EOS")],
)
def test_an_engine_that_mistreats_ends(
    well: DoctorContext, monkeypatch: pytest.MonkeyPatch, engine: Any, measured: str
) -> None:
    monkeypatch.setattr(well.module.worker, "engine", engine)
    found = ask(well, "eos_trained")
    assert found.status == "fail"
    assert measured in found.measured


def test_where_nothing_ends_another_token_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(healthy(tmp_path, ends=[95]), model__init_args__sampling={"max_response_length": 3})
    context = loaded(tmp_path, config)
    monkeypatch.setattr(context.module, "eos_ids", lambda: [95])  # the tokenizer's own may be drawn
    found = ask(context, "eos_trained")
    assert found.status == "pass"
    assert "ended at a token that stands in for EOS" in found.measured
    monkeypatch.setattr(context.module.worker, "engine", NeverStopsEngine())
    assert ask(context, "eos_trained").status == "fail"


def test_responses_to_imitate_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = loaded(tmp_path, supervised(tmp_path))
    assert ask(context, "eos_trained").status == "pass"
    batch: Any = context.batch
    monkeypatch.setattr(DoctorContext, "batch", batch._replace(response_mask=batch.response_ids > 3))
    found = ask(context, "eos_trained")
    assert found.status == "fail"
    assert "0 of 12 responses" in found.measured


@pytest.mark.parametrize(("limit", "statuses"), [(24, {"pass"}), (2, {"warn"})])
def test_responses_that_are_cut(tmp_path: Path, limit: int, statuses: set[str]) -> None:
    sampling = {"max_response_length": limit, "num_samples": 2}
    context = loaded(tmp_path, changed(healthy(tmp_path), model__init_args__sampling=sampling))
    found = ask(context, "truncation")
    rows = context.rollout.sampled.response_ids.tolist()
    cut = sum(not set(ENDS) & set(row) for row in rows)
    assert found.values["truncation_rate"] == pytest.approx(cut / len(rows))
    ends = [next((i + 1 for i, token in enumerate(row) if token in ENDS), limit) for row in rows]
    assert found.values["mean_length"] == pytest.approx(sum(ends) / len(ends))
    assert found.status in statuses


def test_responses_that_are_all_cut(tmp_path: Path) -> None:
    sampling = {"max_response_length": 2, "min_response_length": 2}
    found = ask(loaded(tmp_path, changed(healthy(tmp_path), model__init_args__sampling=sampling)), "truncation")
    assert found.status == "fail"
    assert found.values["truncation_rate"] == 1


@pytest.mark.parametrize(
    ("settings", "status", "said"),
    [
        ({"temperature": 0.8, "repetition_penalty": 1.1}, "warn", "set model.sampling.temperature to apply them"),
        ({"suppress_tokens": [*range(3, 96, 2), *range(4, 80, 2)]}, "fail", "none of them can be set here"),
        ({"temperature": 0.1}, "fail", "set model.sampling.temperature"),
    ],
    ids=str,
)
def test_generation_settings_that_rollouts_ignore(
    well: DoctorContext, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], status: str, said: str
) -> None:
    assert "top_k 50, its default" in ask(well, "generation_config").measured
    for name, value in settings.items():
        monkeypatch.setattr(well.module.policy.generation_config, name, value)
    found = ask(well, "generation_config")
    assert found.status == status, found
    assert found.measured.startswith("model.generate also applies ")
    assert all(f"{name} {value}" in found.measured for name, value in settings.items())
    assert said in found.fix


def test_how_far_generate_samples_from_rollouts(well: DoctorContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of greedy settings: the surprise of the policy at its likeliest tokens, of a pass over whole responses."""
    monkeypatch.setattr(well.module.policy.generation_config, "top_k", 1)
    surprise: list[float] = []
    for i, ids in enumerate(well.prompt.prompt_ids[:4]):
        row = ids[well.prompt.prompt_mask[i]]
        for _ in range(24):
            with torch.no_grad():
                log_probs = well.module.policy(row[None]).logits[0, -1].double().log_softmax(-1)
            surprise.append(-float(log_probs.max()))
            row = torch.cat([row, log_probs.argmax()[None]])
            if int(row[-1]) in ENDS:
                break
    assert ask(well, "generation_config").values["kl"] == pytest.approx(sum(surprise) / len(surprise), rel=1e-4)


def test_special_tokens_that_the_reward_does_not_see(tmp_path: Path) -> None:
    context = loaded(tmp_path, healthy(tmp_path))
    assert check_special_tokens(context).status == "pass"
    context.tokenizer.add_special_tokens({"additional_special_tokens": ["7"]})
    sampled = context.rollout.sampled
    sampled.response_ids[1, 0], sampled.response_mask[1, 0] = context.tokenizer.convert_tokens_to_ids("7"), True
    found = check_special_tokens(context)  # `ask` would draw other responses than the planted one
    assert found.status == "warn", found
    assert "'7' (" in found.measured
    assert found.values["responses"] >= 1
    assert "set model.sampling.skip_special_tokens: false" in found.fix
    sampling = replace(context.module.sampling, skip_special_tokens=False)
    context.module.worker.sampling = sampling
    assert check_special_tokens(context).status == "pass"
