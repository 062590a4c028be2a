"""Every family of the table: the right engine, `generate`'s greedy responses, the model's distribution, LoRA."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout.families import (
    DRAWS,
    FAMILIES,
    WINDOW,
    Family,
    check_cells,
    chi_square,
    chi_square_cdf,
    engine_cells,
    family_model,
    generate,
    greedy_agrees,
    prompts,
    sampled_agrees,
)

from remax_lightning.rollout import (
    AutoEngine,
    GenerationOutput,
    GenerationRequest,
    HuggingFaceEngine,
    PairedEngine,
    SamplingConfig,
)

SCRIPT = Path(__file__).parents[2] / "docs" / "generate_families.py"
COMMITTED = SCRIPT.with_name("families.md").read_text(encoding="utf-8")
ROWS = [line for line in COMMITTED.splitlines() if line.startswith("| ")][1:]
BY_NAME = {family.name: family for family in FAMILIES}
LLAMA = BY_NAME["Llama"]

WINDOWED = [family for family in FAMILIES if "sliding" in family.name]


def is_slow(family: Family) -> bool:
    """Whether its layers, without kernels of their own, keep a CPU busy for a second and more."""
    return family.name.endswith(("(state space)", "(hybrid)"))


each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
each_family_slow = pytest.mark.parametrize(
    "family",
    [pytest.param(family, id=family.name, marks=[pytest.mark.slow] if is_slow(family) else []) for family in FAMILIES],
)


def committed(family: Family) -> list[str]:
    """The cells that the page has for `family`, without its name."""
    return next(cells[1:] for cells in (line.strip("| ").split(" | ") for line in ROWS) if cells[0] == family.name)


def test_the_page_is_what_its_script_writes_around_these_rows() -> None:
    spec = importlib.util.spec_from_file_location("generate_families", SCRIPT)
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert generator.page(ROWS) == COMMITTED, "stale: run python docs/generate_families.py"
    assert [line.strip("| ").split(" | ")[0] for line in ROWS] == list(BY_NAME)


@pytest.mark.slow(0.3)
@each_family
def test_the_engine_of_a_family(family: Family) -> None:
    assert engine_cells(family) == committed(family)[:2]


@pytest.mark.slow
@each_family_slow
def test_a_family_passes_every_check(family: Family) -> None:
    cells = check_cells(family)
    assert cells == ["yes"] * 4
    assert cells == committed(family)[2:]


# The models: what sets a family apart bears on its responses


@pytest.mark.parametrize("family", WINDOWED, ids=lambda family: family.name)
def test_the_sliding_window_matters(family: Family) -> None:
    ids, mask = prompts()
    assert mask.sum(-1).max() > WINDOW
    wide = family_model(family, sliding_window=64)
    assert not torch.equal(generate(family_model(family), ids, mask, None)[0], generate(wide, ids, mask, None)[0])


@pytest.mark.slow(0.3)
@each_family
def test_the_adapter_matters(family: Family) -> None:
    ids, mask = prompts()
    adapted = family_model(family, lora=True)
    assert not torch.equal(generate(family_model(family), ids, mask, None)[0], generate(adapted, ids, mask, None)[0])


def test_an_adapted_policy_is_decoded_by_the_fast_engine(caplog: pytest.LogCaptureFixture) -> None:
    ids, mask = prompts()
    with caplog.at_level("INFO"):
        _generate(AutoEngine(), family_model(LLAMA, lora=True), ids, mask, SamplingConfig(max_response_length=2))
    assert "PairedEngine, since LlamaForCausalLM" in caplog.text


# The checks: each notices the fault it is there for


class _Faulty:
    """An engine with a fault between it and a right one."""

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        request = replace(request, prompt_mask=self.mask(request.prompt_mask))
        return self.spoil(HuggingFaceEngine().generate(model, request))

    def mask(self, mask: torch.Tensor) -> torch.Tensor:
        return mask

    def spoil(self, generated: GenerationOutput) -> GenerationOutput:
        return generated


class IgnoresPadding(_Faulty):
    def mask(self, mask: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(mask)


class MixesRows(_Faulty):
    """Right first tokens, and second tokens that belong to other first ones of the same prompt."""

    def spoil(self, generated: GenerationOutput) -> GenerationOutput:
        ids = generated.sampled_ids.clone().view(2, DRAWS, -1)
        ids[:, :, 1] = ids[:, :, 1].roll(1, 1)
        return generated._replace(sampled_ids=ids.flatten(0, 1))


def _generate(
    engine: Any, model: Any, ids: torch.Tensor, mask: torch.Tensor, sampling: SamplingConfig
) -> GenerationOutput:
    generator = torch.Generator().manual_seed(0)
    return engine.generate(model, GenerationRequest(ids, mask, sampling, [2], 3, generator))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_checks_notice_padding_that_is_not_masked(dtype: torch.dtype) -> None:
    model = family_model(LLAMA, dtype)
    assert not greedy_agrees(IgnoresPadding(), model)
    assert not sampled_agrees(IgnoresPadding(), model)


@pytest.mark.slow(0.3)
def test_the_checks_notice_second_tokens_of_other_rows_and_another_temperature() -> None:
    model = family_model(LLAMA)
    assert sampled_agrees(PairedEngine(), model)
    assert not sampled_agrees(MixesRows(), model)
    assert not sampled_agrees(PairedEngine(), model, temperature=1.2)


@pytest.mark.parametrize(("degrees", "quantile"), [(5, 20.515), (11, 31.264), (60, 99.607)])
def test_the_distribution_function_is_that_of_printed_tables(degrees: int, quantile: float) -> None:
    assert chi_square_cdf(quantile, degrees) == pytest.approx(0.999, abs=1e-6)


def test_rare_tokens_share_a_cell_of_the_statistic() -> None:
    statistic, degrees = chi_square(torch.tensor([12, 8, 1, 4]), torch.tensor([0.4, 0.4, 0.1, 0.1]).double())
    assert (statistic, degrees) == (pytest.approx(4 / 10 + 4 / 10), 2)
