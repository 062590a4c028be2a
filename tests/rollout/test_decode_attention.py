"""Prompts that their rows share, and attention by lengths, against masked slots: the same responses token for token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import tiny_model
from fake_cuda import FakeCuda
from helpers.operators import Operators
from helpers.varlen import FlashByLengths
from rollout.families import FAMILIES, PAD, Family, family_model, prompts

from remax_lightning.rollout import (
    GenerationOutput,
    GenerationRequest,
    PairedEngine,
    SamplingConfig,
    engines,
    row_lengths,
)
from remax_lightning.rollout.decode_attention import RolloutSize
from remax_lightning.rollout.row_lengths import PAGE, RowLengths
from remax_lightning.rollout.shared_prefix import SharedPrefix
from remax_lightning.rollout.static_cache import DecodeBuffers
from remax_lightning.tools.plan.activation_memory import LiveBytes, shapes_only

KINDS = pytest.mark.parametrize("kind", [SharedPrefix, RowLengths])
SLOTS = {"Gemma 2": "its attention is eager and not sdpa", "BLOOM": "it takes no positions"}
SLOTS |= {"Falcon": "a decoding step fails"}
BY_NAME = {family.name: family for family in FAMILIES}
ATTENTION = [family for family in FAMILIES if not any(kind in family.name for kind in ("state space", "hybrid"))]


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlashByLengths]:
    """torch's flash attention that is told lengths, also where this torch's is not."""
    from torch.nn.attention import varlen

    stand_in = FlashByLengths()
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    row_lengths.flash_takes_lengths.cache_clear()
    yield stand_in
    row_lengths.flash_takes_lengths.cache_clear()


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch, flash: FlashByLengths) -> Any:
    """Roll out with keys and values of a kind, if the model can; None lets the engine choose."""

    def choose(kind: Any) -> Any:
        def chosen(model: Any, cache: Any, size: Any) -> Any:
            assert engines.decoding_obstacle(model, kind) == ""
            return kind

        return chosen

    def roll_out(model: Any, kind: Any, ids: Any = None, mask: Any = None, eos: int = 7, **sampling: Any) -> Any:
        with monkeypatch.context() as patch:
            if kind is DecodeBuffers:
                patch.setattr(engines, "choose_states", lambda *_: DecodeBuffers)
            elif kind is not None:
                patch.setattr(engines, "choose_states", choose(kind))
            prompt_ids, prompt_mask = prompts() if ids is None else (ids, mask)
            options = {"max_response_length": 24, "num_samples": 2} | sampling
            chance = torch.Generator().manual_seed(0)
            request = GenerationRequest(
                prompt_ids, prompt_mask, SamplingConfig(**options), [eos], PAD, chance, return_log_probs=True
            )
            return PairedEngine().generate(model, request)

    return roll_out


def assert_same(found: GenerationOutput, expected: GenerationOutput) -> None:
    assert torch.equal(found.sampled_ids, expected.sampled_ids)
    assert torch.equal(found.greedy_ids, expected.greedy_ids)
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=5e-5, rtol=0)


@pytest.mark.slow(0.3)
@KINDS
@pytest.mark.parametrize("family", ATTENTION, ids=lambda family: family.name)
def test_a_family_writes_what_it_writes_in_masked_slots(
    family: Family, kind: Any, decode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = family_model(family)
    eos = int(decode(model, DecodeBuffers, eos=0).sampled_ids[0, 5])  # so that rows leave
    expected = decode(model, DecodeBuffers, eos=eos)
    reason = next((reason for name, reason in SLOTS.items() if family.name.startswith(name)), "")
    if reason:
        with caplog.at_level("INFO"):
            found = decode(model, None, eos=eos)
        assert f"masked slots for each row, because {reason}" in caplog.text
    else:
        found = decode(model, kind, eos=eos)
    assert_same(found, expected)


@pytest.mark.slow
@KINDS
def test_any_rows_of_any_prompts_may_be_left(kind: Any, decode: Any) -> None:
    """Five rows of a prompt, of which some end early: other prompts then have more rows than it."""
    model = tiny_model("llama")
    for eos in (5, 8, 12):
        arguments = {"num_samples": 4, "max_response_length": 60, "eos": eos}
        assert_same(decode(model, kind, **arguments), decode(model, DecodeBuffers, **arguments))


@pytest.mark.parametrize(("groups", "num_samples", "copies"), [(2, 1, 0), (2, 2, 4), (1, 1, 4)])
def test_a_sampled_and_a_greedy_row_of_each_prompt_are_read_without_copies(
    groups: int, num_samples: int, copies: int, decode: Any
) -> None:
    """Of heads that share keys, and of several sampled rows, queries, scores, probabilities and outputs are copied."""
    model = family_model(BY_NAME["Llama"], num_key_value_heads=groups)
    arguments = {"num_samples": num_samples, "max_response_length": 5, "eos": 0}
    expected = decode(model, DecodeBuffers, **arguments)
    decode(model, None, **arguments)  # chooses shared prompts, by a trial of the model
    with Operators() as operators:
        found = decode(model, None, **arguments)
    assert_same(found, expected)
    assert operators.counts["index_select"] == copies * model.config.num_hidden_layers * 4  # steps


def long_prompts(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return ids.where(mask, torch.tensor(PAD)), mask


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(
    ("lengths", "paged"),
    [([3 * PAGE + 40, 30, PAGE, PAGE - 1], True), ([PAGE - 1, 30], False), ([3 * PAGE, 3 * PAGE + 2], True)],
)
def test_rows_share_the_whole_pages_of_long_prompts(
    lengths: list[int], paged: bool, decode: Any, flash: FlashByLengths
) -> None:
    model = family_model(BY_NAME["Llama"], max_position_embeddings=1024)
    ids, mask = long_prompts(lengths)
    arguments = {"ids": ids, "mask": mask, "num_samples": 3, "max_response_length": 12, "eos": 0}
    expected = decode(model, DecodeBuffers, **arguments)
    flash.calls.update(pages=0)
    assert_same(decode(model, RowLengths, **arguments), expected)
    assert (flash.calls["pages"] > 0) == paged


@pytest.mark.parametrize("fault", ["fails", "computes something else"])
def test_pages_that_the_device_does_not_read_are_not_shared(
    fault: str, decode: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch.nn.attention import varlen

    class Without(FlashByLengths):
        def __call__(self, *arguments: Any, **options: Any) -> torch.Tensor:
            if "block_table" not in options:
                return super().__call__(*arguments, **options)
            if fault == "fails":
                raise RuntimeError("Paged KV cache block size must be divisible by something")
            return 2 * super().__call__(*arguments, **options)

    monkeypatch.setattr(varlen, "varlen_attn", Without())
    model = family_model(BY_NAME["Llama"], max_position_embeddings=1024)
    ids, mask = long_prompts([3 * PAGE, 3 * PAGE - 2])
    arguments = {"ids": ids, "mask": mask, "num_samples": 3, "max_response_length": 4, "eos": 0}
    with caplog.at_level("INFO"):
        found = decode(model, RowLengths, **arguments)
    assert f"do not share its pages: flash attention by a table {fault}" in caplog.text
    assert_same(found, decode(model, DecodeBuffers, **arguments))


@pytest.mark.slow(0.3)
def test_a_window_within_pages_is_the_same(decode: Any, flash: FlashByLengths) -> None:
    model = family_model(BY_NAME["Mistral (sliding window)"], sliding_window=PAGE + 20, max_position_embeddings=1024)
    ids, mask = long_prompts([3 * PAGE + 9, PAGE + 12])
    arguments = {"ids": ids, "mask": mask, "num_samples": 3, "max_response_length": 12, "eos": 0}
    for kind in (RowLengths, SharedPrefix):
        assert_same(decode(model, kind, **arguments), decode(model, DecodeBuffers, **arguments))
    assert flash.calls["pages"] > 0


@pytest.mark.slow(0.3)
def test_a_prompt_takes_memory_once_whatever_its_rows(decode: Any) -> None:
    model, (ids, mask) = family_model(BY_NAME["Llama"], max_position_embeddings=1024), long_prompts([400, 390])
    peaks = {}
    for kind in (SharedPrefix, DecodeBuffers):
        with LiveBytes([model]) as live:
            decode(model, kind, ids=ids, mask=mask, num_samples=40, max_response_length=3)
        peaks[kind] = live.peak
    assert peaks[SharedPrefix] < 0.5 * peaks[DecodeBuffers]  # of 82 rows, 80 need no copy


@pytest.mark.slow
def test_the_choice_is_logged_once_with_its_reason(decode: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    with caplog.at_level("INFO"):
        for _ in range(2):
            decode(model, None)
        with torch.autocast("cpu", torch.bfloat16):
            decode(model, None)
    said = [record.getMessage() for record in caplog.records if "rollouts decode in" in record.getMessage()]
    assert said == [
        "LlamaForCausalLM: rollouts decode in float32, with one copy of a prompt's keys and values for all its rows",
        "LlamaForCausalLM: rollouts decode in masked slots for each row, because a CPU shares in float32, not in"
        " bfloat16",
    ]


@pytest.mark.slow(0.3)
def test_attention_that_is_cut_into_chunks_keeps_its_masks(decode: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    model.config.attention_chunk_size = 20
    with caplog.at_level("INFO"):
        decode(model, None, max_response_length=8)
        decode(model, None, max_response_length=16)
    assert [
        record.getMessage().partition(", ")[2] for record in caplog.records if "rollouts" in record.getMessage()
    ] == [
        "with one copy of a prompt's keys and values for all its rows",
        "because texts of 25 tokens are longer than the 20 that some of its layers see",
    ]


@pytest.mark.slow(0.3)
def test_a_model_that_attends_otherwise_keeps_its_masks(
    decode: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that scales the values it reads: only the comparison of logits can notice."""
    model = tiny_model("llama")
    layer = model.model.layers[0].self_attn
    plain = type(layer).forward
    expected = decode(model, DecodeBuffers)

    def forward(self: Any, hidden_states: Any, *arguments: Any, **options: Any) -> Any:
        by_name = self.config._attn_implementation == "remax_decoding"
        output, weights = plain(self, hidden_states, *arguments, **options)
        return output * 1.1 if by_name else output, weights

    monkeypatch.setattr(type(layer), "forward", forward)
    with caplog.at_level("INFO"):
        assert_same(decode(model, None), expected)
    assert "masked slots for each row, because its logits would be others" in caplog.text


# On CUDA: one graph for a number of rows


def on_cuda(
    model: Any, engine: PairedEngine, length: int, eos: int = 2, top_p: float = 1.0, others: tuple[int, ...] = ()
) -> GenerationOutput:
    ids, mask = prompts()
    chance = torch.Generator("cuda").manual_seed(0)
    sampling = SamplingConfig(max_response_length=length, top_p=top_p)
    eos_ids = [eos, *others]
    request = GenerationRequest(ids.to("cuda"), mask.to("cuda"), sampling, eos_ids, PAD, chance, return_log_probs=True)
    return engine.generate(model, request)


@pytest.mark.slow
def test_a_rollout_on_cuda_takes_one_graph_for_each_number_of_rows(
    flash: FlashByLengths, fake_cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    model, engine = tiny_model("llama").to("cuda", torch.bfloat16), PairedEngine()
    with caplog.at_level("INFO"):
        first = on_cuda(model, engine, 40)
    assert "rollouts decode in flash attention, which is told the length of each row" in caplog.text
    assert len(fake_cuda.graphs) == 1  # and not one for every sixteen slots
    assert fake_cuda.graphs[0].replays == 39
    assert flash.calls["starts"] > 0
    again = on_cuda(model, engine, 30)
    assert len(fake_cuda.graphs) == 1
    assert fake_cuda.graphs[0].replays == 39 + 29
    assert torch.equal(again.greedy_ids, first.greedy_ids[:, :30])
    plain = on_cuda(model, PairedEngine(cuda_graphs=False), 40)
    assert all(torch.equal(one, other) for one, other in zip(first[:3], plain[:3], strict=True))
    # The log-probs are those of masked slots within the rounding of bfloat16.
    assert (first.log_probs.exp() - plain.log_probs.exp()).abs().max() < 0.01


@pytest.mark.slow
def test_rows_that_end_leave_the_graphs_of_fewer_rows_to_replay(flash: FlashByLengths, fake_cuda: FakeCuda) -> None:
    """16 rows, then those of the halves that are left; a second rollout captures none of them anew."""
    model, engine = tiny_model("llama").to("cuda", torch.bfloat16), PairedEngine()
    free = on_cuda(model, engine, 100, eos=0)
    # A token that ends most rows, and not all.
    counts = [
        (free.sampled_ids == token).any(-1).sum() + (free.greedy_ids == token).any(-1).sum() for token in range(60)
    ]
    eos = next(token for token in range(5, 60) if 9 <= int(counts[token]) <= 13)
    whole = len(fake_cuda.graphs)
    plain = on_cuda(model, PairedEngine(cuda_graphs=False), 100, eos=eos)
    found = on_cuda(model, engine, 100, eos=eos)
    assert all(torch.equal(one, other) for one, other in zip(found[:3], plain[:3], strict=True))
    fewer = fake_cuda.graphs[whole:]
    assert 1 <= len(fewer) <= 4  # of 8, 4, 2 rows and 1
    assert all(graph.replays for graph in fewer)
    before = sum(graph.replays for graph in fake_cuda.graphs)
    on_cuda(model, engine, 100, eos=eos)
    assert len(fake_cuda.graphs) == whole + len(fewer)
    assert sum(graph.replays for graph in fake_cuda.graphs) > before


@pytest.mark.slow
def test_top_p_runs_in_a_graph_of_its_own_and_waits_for_nothing(flash: FlashByLengths, fake_cuda: FakeCuda) -> None:
    model, engine = tiny_model("llama").to("cuda", torch.bfloat16), PairedEngine()
    found = on_cuda(model, engine, 12, top_p=0.7)
    assert [graph.replays for graph in fake_cuda.graphs] == [12, 11]  # a draw for every token, a step for all but one
    # Neither takes memory that the other has given back: log-probs read the logits of the step after the draw.
    assert [graph.pool_given for graph in fake_cuda.graphs] == [None, None]
    assert fake_cuda.reads["nonzero"] == 0
    plain = on_cuda(model, PairedEngine(cuda_graphs=False), 12, top_p=0.7)
    assert all(torch.equal(one, other) for one, other in zip(found[:3], plain[:3], strict=True))
    assert not torch.equal(found.sampled_ids, on_cuda(model, engine, 12).sampled_ids)


@pytest.mark.slow(0.3)
def test_many_tokens_that_end_a_response_wait_for_nothing(flash: FlashByLengths, fake_cuda: FakeCuda) -> None:
    model = tiny_model("llama").to("cuda", torch.bfloat16)
    on_cuda(model, PairedEngine(), 12, eos=10**6, others=(*range(10**6 + 1, 10**6 + 60),))
    assert fake_cuda.reads["isin"] == 0


@pytest.mark.skipif(not row_lengths.flash_takes_lengths(), reason="torch's flash attention takes no lengths")
def test_torchs_flash_attention_takes_what_it_is_given() -> None:
    """Arguments, shapes and dtypes of the operator itself, which computes nothing on tensors without memory."""
    from transformers import DynamicCache

    with shapes_only(torch.bfloat16):
        for length in (4 * PAGE, 20):
            states, cache = torch.empty(2, 2, length, 16), DynamicCache()
            cache.update(states, states, 0)
            pool = RowLengths.create(cache, RolloutSize(2, 6, length, 8))
            assert bool(pool.table.shape[1]) == (length > PAGE)
            output = pool.attend(0, torch.empty(6, 4, 16), 0.25)
            assert (output.shape, output.dtype) == ((6, 4, 16), torch.bfloat16)
