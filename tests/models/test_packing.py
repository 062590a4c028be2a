"""Packed rows against padded ones and against each text alone; and which models run padded rows instead."""

from __future__ import annotations

import logging
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model
from fake_cuda import FakeCuda
from helpers.reward_models import PLAIN, PROMPTS, RESPONSES, ROWS, loaded, save_classifier
from helpers.six_responses import batch, model_of, one_by_one, pass_with_gradient, rollout_of
from torch import Tensor

from remax_lightning.config import SamplingConfig
from remax_lightning.models import flash_attention, packing
from remax_lightning.models import log_probs as statistics_module
from remax_lightning.models.flash_attention import TextBounds
from remax_lightning.models.forward import HeadSearch, find_head, output_gap
from remax_lightning.models.loading import enable_gradient_checkpointing
from remax_lightning.models.log_probs import policy_statistics, with_reference
from remax_lightning.models.packing import attend_text_by_text, packed_texts, packing_obstacle
from remax_lightning.rewards import pooling
from remax_lightning.rollout.engines import why_unsupported
from remax_lightning.types import Rollout

FAMILIES = ("llama", "qwen2", "gpt2", "opt", "cohere", "granite")
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


def distance(first: list[Tensor], second: list[Tensor]) -> float:
    largest = max(float(value.abs().max()) for value in second)
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True)) / largest


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("has_head", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradient_are_those_of_padded_rows(
    family: str, has_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_head:  # as where a strategy shards it
        monkeypatch.setattr(statistics_module, "find_head", lambda model: HeadSearch(None, "test"))
    model = model_of(family)
    assert packing_obstacle(model) == ""
    log_probs, gradients = pass_with_gradient(model, packed=True)
    expected, expected_gradients = pass_with_gradient(model, packed=False)
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=0)
    assert distance(gradients, expected_gradients) < 1e-5
    for row, wanted in zip(log_probs.tolist(), one_by_one(model, 1.0)[0], strict=True):
        assert row[: len(wanted)] == pytest.approx(wanted, abs=2e-5)


def test_passes_of_any_rows_in_any_order_give_every_response_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    sampling = SamplingConfig(temperature=0.7, top_k=20, processed_log_probs=True, min_response_length=2)
    whole = policy_statistics(model, rollout_of(), sampling)
    parts = [torch.tensor([4, 1]), torch.tensor([0]), torch.tensor([5, 2, 3])]
    for packed in (True, False):
        found = policy_statistics(model, rollout_of(), sampling, batch_size=parts, packed=packed)
        torch.testing.assert_close(found.log_probs, whole.log_probs, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.entropy, whole.entropy, atol=1e-5, rtol=0)
    with torch.no_grad():
        found = with_reference(rollout_of(), model, sampling, keep_hidden=True, batch_size=parts)
        expected = with_reference(rollout_of(), model, sampling, keep_hidden=True)
    torch.testing.assert_close(found.reference_hidden, expected.reference_hidden, atol=1e-5, rtol=0)


def test_rows_of_one_length_have_nothing_to_save_and_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rollout = tiny_model("llama"), rollout_of(extra_right=3)
    mask = torch.arange(8) < torch.tensor([5, 5, 2, 2, 7, 7])[:, None]  # behind prompts of 3, 6 and 1 tokens
    rollout = rollout._replace(sampled=rollout.sampled._replace(response_mask=mask))
    expected = policy_statistics(model, rollout, SamplingConfig(), batch_size=[torch.tensor([i]) for i in range(6)])
    monkeypatch.setattr(statistics_module, "packed_texts", None)
    found = policy_statistics(model, rollout, SamplingConfig())
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-5, rtol=0)
    with pytest.raises(TypeError):  # of other lengths: packed
        policy_statistics(model, rollout_of(), SamplingConfig())


@pytest.mark.slow(0.3)
def test_a_layer_is_recomputed_as_it_was_run() -> None:
    plain, model = tiny_model("llama"), tiny_model("llama")
    enable_gradient_checkpointing(model)
    model.train()
    for packed in (True, False):
        gradients = pass_with_gradient(model, packed=packed)[1]
        assert distance(gradients, pass_with_gradient(plain, packed=packed)[1]) < 1e-6
    assert model.config._attn_implementation == "sdpa"


def test_positions_restart_with_each_text() -> None:
    with packed_texts(tiny_model("llama"), [2, 1, 3], torch.arange(6)[None]) as texts:
        assert texts.inputs["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2]]
        assert texts.bounds.ends.tolist() == [0, 2, 3, 6]


# Models that cannot be packed


def made(name: str, **options: Any) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**sizes, **IDS, **options)).eval()


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("bloom", {}, "it takes no positions"),
        ("gemma2", {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64}, "its attention is eager"),
        (
            "lfm2",
            {"num_key_value_heads": 2, "intermediate_size": 64, "layer_types": ["conv", "full_attention"]},
            "only 1 of its layers have attention that can be replaced",
        ),
    ],
)
def test_models_that_cannot_be_packed_run_padded_rows_and_say_so_once(
    name: str, options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = made(name, **options)
    with caplog.at_level(logging.INFO, "remax_lightning.models.packing"):
        found = policy_statistics(model, rollout_of(), SamplingConfig())
        policy_statistics(model, rollout_of(), SamplingConfig())
    assert reason in packing_obstacle(model)
    (said,) = [record.message for record in caplog.records if record.name == packing.__name__]
    assert "padded rows, because " + reason in said
    expected = policy_statistics(model, rollout_of(), SamplingConfig(), packed=False)
    assert torch.equal(found.log_probs, expected.log_probs)


def test_texts_within_a_sliding_window_are_packed_and_longer_ones_are_not() -> None:
    model = made("mistral", num_key_value_heads=1, intermediate_size=64, sliding_window=11)
    assert packing_obstacle(model, 11) == ""
    assert "longer than its attention window of 11 tokens" in packing_obstacle(model, 12)
    prompt, responses = batch()  # texts of up to 11 tokens, with 2 responses to each of the prompts
    assert int((prompt.prompt_mask.sum(1).repeat_interleave(2) + responses.response_mask.sum(1)).max()) == 11
    assert distance(pass_with_gradient(model, packed=True)[1], pass_with_gradient(model, packed=False)[1]) < 1e-5


# The attention function


def random_rows(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((1, 4, 12, 16), (1, 2, 12, 16), (1, 2, 12, 16))
    query, key, value = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return query, key, value


def with_flash(called: list[int], takes_groups: bool = True) -> Any:
    """Stands in for torch's flash attention over texts: text by text. That of torch 2.11 takes no groups of heads."""

    def varlen_attn_2_11(
        query: Tensor, key: Tensor, value: Tensor, ends: Tensor, _: Tensor, longest: int, __: int, **options: Any
    ) -> Tensor:
        called.append(longest)
        assert query.dtype == key.dtype == value.dtype
        assert query.shape[1] == key.shape[1] == value.shape[1] or options.pop("enable_gqa")
        rows = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        causal, bounds = options["window_size"] == (-1, 0), TextBounds(ends.diff().tolist(), ends)
        return attend_text_by_text(*rows, bounds, options["scale"], causal=causal, dropout=0.0)[0]

    def varlen_attn(*arguments: Any, enable_gqa: bool = False, **options: Any) -> Tensor:
        return varlen_attn_2_11(*arguments, enable_gqa=enable_gqa, **options)

    return varlen_attn if takes_groups else varlen_attn_2_11


@pytest.mark.parametrize("takes_groups", [True, False])
def test_flash_attention_takes_the_rows_in_its_own_layout(takes_groups: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    called: list[int] = []
    monkeypatch.setattr(varlen, "varlen_attn", with_flash(called, takes_groups))
    bounds = TextBounds([5, 3, 4], torch.tensor([0, 5, 8, 12], dtype=torch.int32))
    rows = random_rows()
    for causal in (True, False):
        found = flash_attention.flash_attention(*rows, bounds, 0.3, causal=causal, dropout=0.0)
        expected = attend_text_by_text(*rows, bounds, 0.3, causal=causal, dropout=0.0)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert called == [5, 5]


def test_torchs_flash_attention_takes_what_it_is_given() -> None:
    """Shapes, dtypes and arguments of the operator itself, which computes nothing on tensors without memory."""
    query, key, value = (torch.empty(row.shape, dtype=torch.bfloat16, device="meta") for row in random_rows())
    bounds = TextBounds([5, 3, 4], torch.empty(4, dtype=torch.int32, device="meta"))
    output = flash_attention.flash_attention(query, key, value, bounds, None, causal=True, dropout=0.0)
    assert output.shape == (1, 12, 4, 16)
    assert output.dtype == torch.bfloat16


def on_device(rollout: Rollout) -> Rollout:
    prompt, sampled = rollout.prompt, rollout.sampled
    return rollout._replace(
        prompt=prompt._replace(prompt_ids=prompt.prompt_ids.cuda(), prompt_mask=prompt.prompt_mask.cuda()),
        sampled=sampled._replace(response_ids=sampled.response_ids.cuda(), response_mask=sampled.response_mask.cuda()),
    )


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(
    ("dtype", "mixed", "flash"),
    [(torch.bfloat16, False, True), (torch.float32, False, False), (torch.float32, True, True)],
)
def test_a_pass_on_cuda_takes_flash_attention_in_16_bits(
    dtype: torch.dtype, mixed: bool, flash: bool, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mixed precision, too, where rotary embeddings give float32 queries and keys."""
    from torch.nn.attention import varlen

    called: list[int] = []
    monkeypatch.setattr(varlen, "varlen_attn", with_flash(called))
    model, autocast = tiny_model("llama").to(dtype), partial(torch.autocast, "cpu", torch.bfloat16, enabled=mixed)
    with autocast():
        expected = policy_statistics(model, rollout_of(), SamplingConfig()).log_probs
    assert called == []
    there, rollout = tiny_model("llama").to(dtype).to("cuda"), on_device(rollout_of())
    with autocast():
        found = policy_statistics(there, rollout, SamplingConfig()).log_probs
    assert bool(called) == flash
    torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.slow
def test_a_gpu_without_flash_attention_runs_padded_rows_in_mixed_precision(
    fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Torch's asks for the Ampere generation, which a T4 or V100 is older than; in float32 rows are packed."""
    from torch.nn.attention import varlen

    def refuses(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    monkeypatch.setattr(varlen, "varlen_attn", refuses)
    model, there = tiny_model("llama"), tiny_model("llama").to("cuda")
    for mixed in (False, True, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            with caplog.at_level(logging.WARNING, packing.__name__):
                expected = policy_statistics(model, rollout_of(), SamplingConfig(), packed=not mixed).log_probs
            with caplog.at_level(logging.INFO, packing.__name__):
                found = policy_statistics(there, on_device(rollout_of()), SamplingConfig()).log_probs
        torch.testing.assert_close(found.cpu(), expected)
    said = [record.getMessage().partition(": ")[2] for record in caplog.records]
    packed = "passes over whole texts run packed rows, without padding"
    padded = "passes over whole texts run padded rows, because a packed pass fails (RuntimeError: FlashAttention only"
    assert [text[: len(padded)] for text in said] == [packed, padded]


@pytest.fixture
def another_kernel() -> Any:
    """The choice of a kernel, made anew and forgotten at the end."""
    flash_attention.flash_kernel.cache_clear()
    yield
    flash_attention.flash_kernel.cache_clear()


def flash_attn_varlen_func(factor: float, called: list[int]) -> Any:
    """flash-attn's function, text by text, which computes something else where the factor is not 1."""

    def function(
        q: Tensor, k: Tensor, v: Tensor, ends: Tensor, _: Tensor, longest: int, __: int, **options: Any
    ) -> Any:
        assert set(options) == {"softmax_scale", "causal"}
        called.append(longest)
        rows = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        bounds = TextBounds([5, 4] if len(q) == 9 else ends.diff().tolist(), ends)
        scale, causal = options["softmax_scale"], options["causal"]
        return factor * attend_text_by_text(*rows, bounds, scale, causal=causal, dropout=0.0)[0]

    return function


@pytest.mark.parametrize(
    ("module", "factor", "said"),
    [
        ("flash_attn", 1.0, "packed rows attend by flash-attn"),
        ("flash_attn_interface", 1.0, "packed rows attend by flash-attn 3"),
        ("flash_attn", 3.0, "packed rows do not attend by flash-attn: it computes something else"),
        ("flash_attn", None, "packed rows do not attend by flash-attn: it fails (TypeError"),
        ("flash_attn", "absent", ""),
    ],
)
def test_flash_attn_is_taken_where_it_is_installed_and_right(
    module: str,
    factor: Any,
    said: str,
    another_kernel: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from torch.nn.attention import varlen

    of_package, of_torch = [], []
    monkeypatch.setattr(varlen, "varlen_attn", with_flash(of_torch))
    if factor != "absent":
        functions = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func(factor, of_package))
        monkeypatch.setitem(sys.modules, module, functions)
    bounds = TextBounds([5, 3, 4], torch.tensor([0, 5, 8, 12], dtype=torch.int32))
    rows = random_rows(torch.bfloat16)
    with caplog.at_level(logging.INFO, "remax_lightning.models.flash_attention"):
        for _ in range(2):
            found = flash_attention.flash_attention(*rows, bounds, 0.3, causal=True, dropout=0.0)
    expected = attend_text_by_text(*rows, bounds, 0.3, causal=True, dropout=0.0)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    assert len(of_torch) == (0 if factor == 1.0 else 2)
    assert [record.getMessage()[: len(said)] for record in caplog.records] == ([said] if said else [])


# Reward models


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_reward_model_scores_packed_texts(family: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = loaded(save_classifier(tmp_path, tiny_config(family)), template=PLAIN)
    texts: list[int] = []

    def attend(*rows: Any, **options: Any) -> Tensor:
        texts.append(len(rows[3].lengths))
        return attend_text_by_text(*rows, **options)

    monkeypatch.setattr(packing, "attend_text_by_text", attend)
    packed = reward.score(PROMPTS, RESPONSES, ROWS)
    assert max(texts) == len(PROMPTS)
    monkeypatch.setattr(pooling, "packing_obstacle", lambda *_: "it is a test")
    texts.clear()
    torch.testing.assert_close(packed, reward.score(PROMPTS, RESPONSES, ROWS), rtol=1e-5, atol=1e-5)
    assert texts == []


# Probes: of packed rows, of the head, and of decoding


PROBES = {"packing": packing_obstacle, "head": lambda model: find_head(model).reason, "decoding": why_unsupported}


@pytest.mark.parametrize("name", PROBES)
def test_what_a_model_raises_in_a_probe_is_a_reason_unless_memory_is_short(name: str) -> None:
    for error in (KeyError("a mask"), torch.OutOfMemoryError("CUDA out of memory")):
        model = tiny_model("llama")

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        model.model.layers[1].register_forward_pre_hook(fail)
        if isinstance(error, KeyError):
            assert "KeyError: 'a mask'" in PROBES[name](model)
        else:
            with pytest.raises(torch.OutOfMemoryError):
                PROBES[name](model)


def test_rounding_of_mixed_precision_is_no_obstacle() -> None:
    """The weights are float32, the outputs that are compared are not."""
    with torch.autocast("cpu", torch.bfloat16):
        assert packing_obstacle(tiny_model("llama")) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_row_among_many_is_a_gap(dtype: torch.dtype) -> None:
    expected = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert output_gap(expected + torch.finfo(dtype).eps * expected.abs().max(), expected) == ""
    for change in (torch.roll(expected[3], 1), expected[3] * 1.5, torch.nan):
        outputs = expected.clone()
        outputs[3] = change
        assert "they differ by" in output_gap(outputs, expected)
