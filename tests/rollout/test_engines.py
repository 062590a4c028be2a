"""Both engines against `model.generate` and against the model's own distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_model

from remax_lightning.errors import UserError
from remax_lightning.models.sampling import SuppressedTokens
from remax_lightning.rollout import (
    AutoEngine,
    GenerationRequest,
    HuggingFaceEngine,
    PairedEngine,
    SamplingConfig,
    decode_loop,
)
from remax_lightning.rollout.decode_loop import smaller_batch
from remax_lightning.rollout.engines import why_unsupported
from remax_lightning.rollout.static_cache import DecodeBuffers

FAMILIES = ["llama", "qwen2", "gpt2", "opt"]
ENGINES = [PairedEngine, HuggingFaceEngine]
EOS, PAD = 2, 3


def left_padded(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return ids.where(mask, torch.tensor(PAD)), mask


def run(
    engine: Any,
    model: Any,
    lengths: list[int],
    seed: int = 0,
    eos: int = EOS,
    asked: dict[str, Any] | None = None,
    **sampling: Any,
) -> Any:
    ids, mask = left_padded(lengths)
    generator = torch.Generator().manual_seed(seed)
    request = GenerationRequest(ids, mask, SamplingConfig(**sampling), [eos], PAD, generator, **(asked or {}))
    return engine().generate(model, request)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def likely_token(model: Any) -> int:
    """A token the greedy responses meet in their middle, so that it can play the end of the sequence."""
    ids = run(PairedEngine, model, [3, 7, 5], max_response_length=12, eos=0).greedy_ids
    return int(ids[0, 4])


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_rows_are_those_of_generate(model: Any, engine: Any) -> None:
    eos = likely_token(model)
    ids, mask = left_padded([3, 7, 5])
    expected = model.generate(
        ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=12, eos_token_id=eos, pad_token_id=PAD
    )[:, 7:]
    greedy = run(engine, model, [3, 7, 5], max_response_length=12, eos=eos, num_samples=2).greedy_ids
    assert (expected == eos).any()
    assert torch.equal(greedy[:, : expected.shape[1]], expected)
    assert (greedy[:, expected.shape[1] :] == PAD).all()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_progress_is_told_of_and_changes_nothing(engine: Any) -> None:
    model, told = tiny_model("llama"), []
    watched = run(engine, model, [3, 7], max_response_length=40, eos=0, asked={"progress": told.append})
    alone = run(engine, model, [3, 7], max_response_length=40, eos=0)
    assert torch.equal(watched.sampled_ids, alone.sampled_ids)
    assert told == sorted(set(told))
    assert set(told) >= {16, 32}
    assert max(told) < 40


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("samples", "greedy"), [(1, False), (2, True)])
@pytest.mark.parametrize("engine", ENGINES)
def test_logits_that_are_not_finite_end_a_rollout(engine: Any, samples: int, greedy: bool, value: float) -> None:
    """One damaged row of the output head, on a CPU; test_cuda_graph.py has CUDA."""
    damaged = tiny_model("gpt2")
    handle = damaged.lm_head.register_forward_hook(lambda module, inputs, output: output.index_fill(-1, *fill))
    fill = torch.tensor([7]), value
    with pytest.raises(UserError, match=r"model\.policy: the logits of \d of \d responses are not finite"):
        run(engine, damaged, [3, 5], max_response_length=3, num_samples=samples, asked={"greedy": greedy}, top_p=0.9)
    handle.remove()
    run(engine, damaged, [3, 5], max_response_length=3, num_samples=samples, asked={"greedy": greedy}, top_p=0.9)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_may_rule_tokens_out(engine: Any) -> None:
    """Minus infinity on some tokens is a distribution."""
    model = tiny_model("gpt2")
    model.lm_head.register_forward_hook(
        lambda module, inputs, output: output.index_fill(-1, torch.arange(40), -torch.inf)
    )
    output = run(engine, model, [3, 5], max_response_length=6, num_samples=3)
    assert (output.sampled_ids[:, 0] >= 40).all()


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("engine", ENGINES)
def test_left_padding_changes_no_greedy_response(model: Any, engine: Any) -> None:
    ids, mask = left_padded([3, 7, 5])
    together = run(engine, model, [3, 7, 5], max_response_length=8).greedy_ids
    for row in range(3):
        alone = model.generate(
            ids[row][mask[row]][None], do_sample=False, max_new_tokens=8, eos_token_id=EOS, pad_token_id=PAD
        )[0, int(mask[row].sum()) :]
        assert torch.equal(together[row, : len(alone)], alone)


def test_the_engines_draw_the_same_responses_from_the_same_generator(model: Any) -> None:
    arguments = {"max_response_length": 6, "num_samples": 3, "temperature": 0.8, "eos": 0}
    paired = run(PairedEngine, model, [4, 6], seed=5, **arguments)
    other = run(HuggingFaceEngine, model, [4, 6], seed=5, **arguments)
    assert torch.equal(paired.sampled_ids, other.sampled_ids)
    assert paired.sampled_ids.shape == (6, 6)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("engine", ENGINES)
def test_rollouts_repeat_with_the_generator_and_ignore_the_global_one(model: Any, engine: Any) -> None:
    first = run(engine, model, [4, 6], seed=1, max_response_length=6)
    torch.manual_seed(123)
    again = run(engine, model, [4, 6], seed=1, max_response_length=6)
    other = run(engine, model, [4, 6], seed=2, max_response_length=6)
    assert torch.equal(first.sampled_ids, again.sampled_ids)
    assert not torch.equal(first.sampled_ids, other.sampled_ids)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("engine", ENGINES)
def test_sampled_tokens_follow_the_models_distribution(engine: Any) -> None:
    model = tiny_model("llama", vocab_size=12)
    ids = torch.tensor([[5, 6, 7]])
    draws = 4000
    request = GenerationRequest(
        prompt_ids=ids,
        prompt_mask=torch.ones_like(ids, dtype=torch.bool),
        sampling=SamplingConfig(max_response_length=1, num_samples=draws, temperature=0.7),
        eos_ids=[EOS],
        pad_id=PAD,
        generator=torch.Generator().manual_seed(0),
    )
    generated = engine().generate(model, request)
    expected = draws * (model(ids).logits[0, -1].double() / 0.7).softmax(-1)
    counts = torch.bincount(generated.sampled_ids[:, 0], minlength=12)
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 31.3  # the 99.9 % quantile at 11 degrees of freedom


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_models_own_generation_config_adds_nothing(engine: Any) -> None:
    model = tiny_model("llama", seed=3)
    plain = run(engine, model, [4, 6], max_response_length=8)
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.temperature = 0.1
    assert torch.equal(plain.sampled_ids, run(engine, model, [4, 6], max_response_length=8).sampled_ids)
    assert torch.equal(plain.greedy_ids, run(engine, model, [4, 6], max_response_length=8).greedy_ids)
    assert model.generation_config.top_k == 1


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("engine", ENGINES)
def test_min_response_length_holds_back_the_end(engine: Any) -> None:
    model = tiny_model("llama")
    eos = likely_token(model)
    free = run(engine, model, [3, 7, 5], max_response_length=12, eos=eos)
    held = run(engine, model, [3, 7, 5], max_response_length=12, eos=eos, min_response_length=9)
    assert (free.greedy_ids[:, :9] == eos).any()
    assert not (held.greedy_ids[:, :9] == eos).any()
    assert not (held.sampled_ids[:, :9] == eos).any()


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("engine", ENGINES)
def test_ids_without_a_token_are_never_drawn(engine: Any) -> None:
    model = tiny_model("llama")
    usual = run(engine, model, [3, 7, 5], max_response_length=12, eos=0, num_samples=8)
    unused = tuple(usual.greedy_ids.unique().tolist())
    assert torch.isin(usual.sampled_ids, torch.tensor(unused)).any()
    asked = {"unused_ids": unused}
    responses = run(engine, model, [3, 7, 5], max_response_length=12, eos=0, num_samples=8, asked=asked)
    for ids in (responses.greedy_ids, responses.sampled_ids):
        assert not torch.isin(ids, torch.tensor(unused)).any()


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_stands_after_the_end_but_padding(engine: Any) -> None:
    model = tiny_model("llama")
    eos = likely_token(model)
    generated = run(engine, model, [3, 7, 5, 4], max_response_length=16, eos=eos, num_samples=8)
    ids = torch.cat([generated.sampled_ids, generated.greedy_ids])
    assert (ids == eos).any(-1).sum() > 4
    after_end = (ids == eos).long().cumsum(-1).roll(1, -1)
    after_end[:, 0] = 0
    assert (ids[after_end > 0] == PAD).all()


@pytest.mark.slow
def test_engines_draw_the_same_responses_whichever_rows_have_ended() -> None:
    model = tiny_model("llama")
    arguments = {"max_response_length": 40, "eos": likely_token(model), "num_samples": 4}
    one, other = (run(engine, model, [3, 7, 5, 4], **arguments) for engine in (PairedEngine, HuggingFaceEngine))
    assert len({int((row != PAD).sum()) for row in one.sampled_ids}) > 4
    width = max(one.sampled_ids.shape[1], other.sampled_ids.shape[1])
    for first, second in ((one.sampled_ids, other.sampled_ids), (one.greedy_ids, other.greedy_ids)):
        padded = [torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=PAD) for ids in (first, second)]
        assert torch.equal(*padded)


@pytest.mark.slow
def test_compaction_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    eos = likely_token(model)
    arguments = {"max_response_length": 60, "eos": eos, "num_samples": 4}
    with_compaction = run(PairedEngine, model, [3, 7, 5, 4], **arguments)
    left = []
    monkeypatch.setattr(
        decode_loop.DecodeLoop, "_rows_are_left", lambda self, _: left.append(self.ended) or not bool(self.ended.all())
    )
    without = run(PairedEngine, model, [3, 7, 5, 4], **arguments)
    assert torch.equal(with_compaction.greedy_ids, without.greedy_ids)
    assert torch.equal(with_compaction.sampled_ids, without.sampled_ids)  # a row keeps its random numbers
    assert all(len(ended) == 20 for ended in left)
    assert left[-1].sum() >= 10  # so rows would have left


@pytest.mark.slow
def test_ended_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = tiny_model("llama"), []
    eos = likely_token(model)
    advance = decode_loop.DecodeLoop.decode_step

    def decode_step(self: decode_loop.DecodeLoop, step: int, tokens: torch.Tensor) -> None:
        sizes.append(len(self.active))
        advance(self, step, tokens)

    monkeypatch.setattr(decode_loop.DecodeLoop, "decode_step", decode_step)
    run(PairedEngine, model, [3, 7, 5, 4], max_response_length=200, eos=eos, num_samples=4)
    by_size = sorted(set(sizes), reverse=True)
    assert sizes == sorted(sizes, reverse=True)
    assert len(by_size) > 3
    assert set(by_size) <= {20, 16, 8, 4, 2, 1}


@pytest.mark.slow(0.3)
def test_without_greedy_rows() -> None:
    for engine in ENGINES:
        asked = {"greedy": False}
        generated = run(engine, tiny_model("llama"), [3, 5], asked=asked, max_response_length=4, num_samples=2)
        assert generated.greedy_ids is None
        assert generated.sampled_ids.shape == (4, 4)


def test_auto_engine_chooses_by_architecture(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(
        MambaConfig(
            hidden_size=32, num_hidden_layers=2, vocab_size=96, state_size=4, pad_token_id=PAD, eos_token_id=EOS
        )
    ).eval()
    with caplog.at_level("INFO"):
        generated = run(AutoEngine, mamba, [4, 4], max_response_length=4)
        run(AutoEngine, tiny_model("llama"), [4, 4], max_response_length=4)
    assert generated.greedy_ids.shape == (2, 4)
    assert "HuggingFaceEngine, since MambaForCausalLM" in caplog.text
    assert "PairedEngine, since LlamaForCausalLM" in caplog.text


def test_mixed_precision_decodes_in_slots_of_16_bits() -> None:
    """Rotary keys are float32 then, and values bfloat16."""
    from transformers import DynamicCache

    model = tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert why_unsupported(model) == ""
        cache = DynamicCache(config=model.config)
        model(torch.arange(5, 9)[None], past_key_values=cache)
        assert {states.dtype for states in DecodeBuffers.create(cache, 1, 16).states} == {torch.bfloat16}
        ids, mask = left_padded([3, 7, 5])
        written = run(PairedEngine, model, [3, 7, 5], max_response_length=6, eos=0).greedy_ids
        for prompt, real, response in zip(ids, mask, written, strict=True):
            logits = model(torch.cat([prompt[real], response])[None]).logits[0, -7:-1]
            assert (logits.max(-1).values - logits.gather(-1, response[:, None])[:, 0]).max() < 0.1  # a near-tie


@pytest.mark.slow(0.3)
def test_a_lora_wrapper_is_seen_through() -> None:
    from peft import LoraConfig, get_peft_model

    from remax_lightning.models.forward import accepts_argument

    model = tiny_model("gpt2")
    model.generation_config.top_k = 7
    wrapped = get_peft_model(model, LoraConfig(target_modules=["c_attn"]))
    assert accepts_argument(wrapped, "position_ids")
    expected = run(PairedEngine, model, [3, 7, 5], max_response_length=6)
    for engine in (AutoEngine, PairedEngine, HuggingFaceEngine):
        assert torch.equal(run(engine, wrapped, [3, 7, 5], max_response_length=6).greedy_ids, expected.greedy_ids)
    assert model.generation_config.top_k == 7


# Log-probs of what is sampled


LOG_PROBS = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.7, "scale_log_probs": False, "top_p": 0.6},
    {"temperature": 0.7, "top_p": 0.6, "top_k": 20, "processed_log_probs": True},
    {"min_response_length": 7},
    {"temperature": 0.7, "top_p": 0.6, "processed_log_probs": True, "min_response_length": 7},
]


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("options", LOG_PROBS, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_log_probs_at_sampling_are_those_of_a_training_pass(engine: Any, options: dict[str, Any]) -> None:
    """Against the pass over the finished responses, whose rows end at several lengths."""
    from remax_lightning.functional import response_mask
    from remax_lightning.models.log_probs import policy_statistics
    from remax_lightning.types import PromptBatch, Responses, Rollout

    model = tiny_model("llama")
    lengths, eos = [3, 7, 5, 4], likely_token(model)
    options = {"max_response_length": 16, "num_samples": 6, **options}
    unused = tuple(index for index in range(60, 96) if index != eos)
    made = run(engine, model, lengths, eos=eos, asked={"return_log_probs": True, "unused_ids": unused}, **options)
    ids, mask = left_padded(lengths)
    counted = response_mask(made.sampled_ids, [eos])
    empty = [""] * len(counted)
    prompt = PromptBatch(ids, mask, empty[:4], [{}] * 4)
    responses = Responses(made.sampled_ids, counted, counted.all(-1), empty)
    rollout = Rollout(prompt, responses, None, torch.zeros(24), None, {}, None, None)
    with torch.no_grad():
        suppressed = SuppressedTokens(unused, (eos,), options.get("min_response_length", 0))
        expected = policy_statistics(model, rollout, SamplingConfig(**options), suppressed=suppressed).log_probs
        plain = policy_statistics(model, rollout, SamplingConfig(**options)).log_probs
    assert not counted.all()
    assert (expected - plain).max() > 0.01  # what is left out has some probability
    torch.testing.assert_close(made.log_probs, expected, atol=1e-4, rtol=1e-4)
    assert run(engine, model, lengths, eos=eos, **options).log_probs is None


@pytest.mark.parametrize("engine", ENGINES)
def test_log_probs_have_32_bits_in_a_run_of_16(engine: Any) -> None:
    """In `bf16-true` Lightning runs a step with bfloat16 as the default dtype."""
    options: dict[str, Any] = {"max_response_length": 6, "asked": {"return_log_probs": True}}
    expected = run(engine, tiny_model("llama"), [3, 7], **options).log_probs
    model = tiny_model("llama")
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = run(engine, model, [3, 7], **options).log_probs
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(actual, expected)


# Stop strings


def ended_by(*endings: tuple[int, ...]) -> Any:
    """Says whether a response ends with one of the runs of tokens."""

    def ended(ids: torch.Tensor) -> torch.Tensor:
        rows = [any(row[-len(ending) :] == list(ending) for ending in endings) for row in ids.tolist()]
        return torch.tensor(rows)

    return ended


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("pad", [PAD, EOS])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_ends_a_response_beside_eos_ends_it_there(engine: Any, pad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PAD", pad)
    model = tiny_model("llama")
    free = run(engine, model, [3, 7, 5], max_response_length=12, eos=0, num_samples=2)
    token = int(free.greedy_ids[0, 4])
    made = run(
        engine, model, [3, 7, 5], max_response_length=12, eos=0, num_samples=2, asked={"stop_check": ended_by((token,))}
    )
    assert made.greedy_ids.shape == free.greedy_ids.shape
    for row, whole, at in zip(made.greedy_ids, free.greedy_ids, made.stopped_at[6:].tolist(), strict=True):
        places = (whole == token).nonzero()
        expected = int(places[0]) + 1 if len(places) else 0
        assert at == expected
        length = at or 12
        assert torch.equal(row[:length], whole[:length])
        assert (row[length:] == pad).all()
    assert (made.stopped_at[6:] > 0).any()


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("engine", ENGINES)
def test_eos_before_it_counts_and_the_minimum_length_holds_it_back(engine: Any) -> None:
    model = tiny_model("llama")
    eos = likely_token(model)
    asked = {"stop_check": ended_by((eos,))}
    at_once = run(engine, model, [3, 7, 5], max_response_length=12, eos=eos, asked=asked)
    assert (at_once.greedy_ids == eos).any()
    assert (at_once.stopped_at == 0).all()
    free = run(engine, model, [3, 7, 5], max_response_length=12, eos=0)
    token = int(free.greedy_ids[0, 4])
    held = run(
        engine,
        model,
        [3, 7, 5],
        max_response_length=12,
        eos=0,
        min_response_length=9,
        asked={"stop_check": ended_by((token,))},
    )
    assert ((held.stopped_at == 0) | (held.stopped_at > 9)).all()


@pytest.mark.parametrize(
    ("left", "size", "cpu", "cuda"),
    [(33, 64, 40, 64), (32, 64, 32, 32), (9, 64, 16, 16), (5, 64, 8, 8), (3, 64, 4, 4), (3, 3, 3, 3)],
)
def test_a_batch_shrinks_to_eights_on_a_cpu_and_to_halves_on_cuda(left: int, size: int, cpu: int, cuda: int) -> None:
    assert smaller_batch(left, size, torch.device("cpu")) == cpu
    assert smaller_batch(left, size, torch.device("cuda")) == cuda
