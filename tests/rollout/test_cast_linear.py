"""What replaces layers in a rollout, casts and fused norms, computes the same and leaves nothing behind."""

from __future__ import annotations

import platform
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import tiny_model
from fake_cuda import FakeCuda
from helpers.operators import Operators
from rollout.families import FAMILIES, family_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from remax_lightning.rollout import GenerationRequest, PairedEngine, SamplingConfig, fused_layers
from remax_lightning.rollout.cuda_graph import CastLinear, cast_linears
from remax_lightning.rollout.fused_layers import fused_norms, fused_rotary, transposed_products


@pytest.fixture
def mixed() -> Iterator[None]:
    """Mixed precision on the CPU."""
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        yield


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 25)[None].expand(3, -1)).logits


def test_in_mixed_precision_logits_are_the_same_and_the_old_forward_comes_back(mixed: None) -> None:
    model = tiny_model("llama")
    plain = outputs(model)
    with cast_linears(model) as casts:
        assert "forward" in vars(model.lm_head)
        assert {cast.weight.dtype for cast in casts} == {torch.bfloat16}
        assert torch.equal(outputs(model), plain)
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(outputs(model), plain)


def test_in_float32_nothing_changes() -> None:
    model = tiny_model("llama")
    with cast_linears(model) as casts:
        assert casts == []
        assert not any("forward" in vars(module) for module in model.modules())


def test_weights_are_read_anew_each_time(mixed: None) -> None:
    model = tiny_model("llama")
    with cast_linears(model):
        before = outputs(model)
    model.lm_head.weight.mul_(2.0)
    with cast_linears(model):
        after = outputs(model)
    torch.testing.assert_close(after, 2 * before, atol=1e-5, rtol=1e-5)


def test_an_exception_inside_restores_the_layers(mixed: None) -> None:
    model = tiny_model("opt")
    with pytest.raises(RuntimeError, match="inside"), cast_linears(model):
        raise RuntimeError("inside")
    assert not any("forward" in vars(module) for module in model.modules())


def test_other_number_formats_and_subclasses_are_left_alone(mixed: None) -> None:
    class Doubled(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(inputs)

    for module in (nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4).double(), Doubled(4, 4)):
        with cast_linears(nn.Sequential(module)) as casts:
            assert "forward" not in vars(module)
            assert casts == []


def test_a_bias_is_added_and_leading_dimensions_are_kept(mixed: None) -> None:
    layer = nn.Linear(8, 6)
    inputs = torch.randn(2, 3, 8)
    plain = layer(inputs)
    with cast_linears(nn.Sequential(layer)):
        got = layer(inputs)
    assert got.shape == (2, 3, 6)
    assert torch.equal(got, plain)


def test_memory_is_reused_for_the_current_weights(mixed: None) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    inputs = torch.randn(2, 4)
    with cast_linears(model) as first:
        addresses = [cast.weight.data_ptr() for cast in first]
    for parameter in model.parameters():
        parameter.data = 2 * parameter.data
    plain = model(inputs)
    with cast_linears(model, first) as second:
        assert [cast.weight.data_ptr() for cast in second] == addresses
        assert torch.equal(model(inputs), plain)
    with cast_linears(model[:1], second) as third:
        assert third[0].weight.data_ptr() not in addresses


class Casts(TorchDispatchMode):
    """Notes casts from float32 of what has the shape of a weight."""

    def __init__(self, weights: list[torch.Size]) -> None:
        super().__init__()
        self.weights, self.shapes = weights, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_cast = func.overloadpacket.__name__ == "_to_copy" and args[0].dtype == torch.float32
        if is_cast and args[0].shape in self.weights:
            self.shapes.append(args[0].shape)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gathered", ["once", "layer by layer"])
def test_weights_that_fsdp2_has_gathered_are_cast_once(gathered: str, tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model: Any = tiny_model("llama")
        linears = [module.weight.shape for module in model.modules() if type(module) is nn.Linear]
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers if gathered == "layer by layer" else ():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh).unshard()
        mixed = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)
        with torch.no_grad(), mixed, Casts(linears) as counted:
            with cast_linears(model) as casts:
                # Of layers that are gathered for each pass, none is there to be cast.
                assert len(casts) == (len(linears) if gathered == "once" else 1)
                assert len(counted.shapes) == len(casts)
                counted.shapes.clear()
                outputs(model)
                outputs(model)
            assert len(counted.shapes) == 2 * (len(linears) - len(casts))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("mixed", [False, True])
def test_the_engine_takes_the_casts_in_mixed_precision_alone(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(self: CastLinear, inputs: torch.Tensor, plain: Any = CastLinear.__call__) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return plain(self, inputs)

    monkeypatch.setattr(CastLinear, "__call__", counted)
    ids = torch.tensor([[5, 6, 7]])
    request = GenerationRequest(
        prompt_ids=ids,
        prompt_mask=torch.ones_like(ids, dtype=torch.bool),
        sampling=SamplingConfig(max_response_length=3),
        eos_ids=[],
        pad_id=3,
        generator=torch.Generator().manual_seed(0),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        PairedEngine().generate(tiny_model(), request)
    assert (calls > 0) == mixed


# Norms


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_family_computes_the_same_with_fused_norms(dtype: torch.dtype) -> None:
    """Llama's norms are torch's, Gemma's scale by 1 + weight; every family is looked at for itself."""
    ids, fused = torch.arange(5, 17)[None], {}
    for family in FAMILIES:
        model = family_model(family, dtype)
        with torch.no_grad():
            plain = model(ids).logits.float()
            with fused_norms(model, {}) as number:
                got = model(ids).logits.float()
            assert not any("forward" in vars(module) for module in model.modules())
            assert torch.equal(model(ids).logits.float(), plain)
        fused[family.name] = number
        close = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(got, plain, rtol=close, atol=close * float(plain.abs().max()), msg=family.name)
    assert fused["Llama"] == fused["Qwen2"] == 5  # two of each of two layers, and the last one
    assert {fused["OPT"], *(number for name, number in fused.items() if "Gemma" in name)} == {0}


def test_weights_far_from_one_are_told_apart() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(0.5)
    norm = model.model.norm
    kind = type(norm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", lambda self, x: torch.nn.functional.rms_norm(x, x.shape[-1:], 1 + self.weight))
        with fused_norms(model, {}) as number:
            assert number == 0


@pytest.mark.parametrize("width", [64, 100, 576])
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (3, 20)])
def test_a_norm_on_a_cpu_is_torchs_in_every_bit(width: int, shape: tuple[int, int]) -> None:
    norm = torch.nn.RMSNorm(width, eps=1e-5)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        inputs = 3 * torch.randn(*shape, width)
        plain, kept = norm(inputs), inputs.clone()
        with fused_norms(norm, {}) as number, Operators() as operators:
            got = norm(inputs)
    wide = inputs.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight.double()
    assert (number, operators.counts.total()) == (1, 7)
    assert torch.equal(got, plain)
    assert torch.equal(inputs, kept)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def test_rollouts_on_cuda_fuse_norms(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, plain = [], torch.nn.functional.rms_norm

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return plain(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "rms_norm", counted)
    ids = torch.tensor([[5, 6, 7]], device="cuda")
    mask, generator = torch.ones_like(ids, dtype=torch.bool), torch.Generator("cuda").manual_seed(0)
    request = GenerationRequest(ids, mask, SamplingConfig(max_response_length=3), [], 3, generator)
    PairedEngine(cuda_graphs=False).generate(tiny_model().to("cuda"), request)
    assert len(calls) > 5 * 3  # of the prompt, and of two tokens


# Products of few rows


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "OPT"])  # OPT and Qwen2 have biases
@pytest.mark.parametrize("rows", [1, 2, 4, 9, 16])
def test_a_family_computes_the_same_with_transposed_products(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(fused_layers, "multiplies_as_intel", lambda: False)
    model = family_model(next(family for family in FAMILIES if family.name == name), torch.float32)
    ids = torch.arange(5, 5 + rows)[:, None]  # [M, 1]
    with torch.no_grad():
        plain = model(ids).logits
        with transposed_products(model) as number, Products() as products:
            got = model(ids).logits
    assert number > 10
    assert products.transposed == (number if rows in (2, 4, 16) else 0)
    assert not any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-6 * float(plain.abs().max()))


@pytest.mark.parametrize(("num_samples", "is_transposed"), [(1, True), (3, True), (8, False)])
def test_rollouts_of_few_rows_multiply_the_other_way_around(
    num_samples: int, is_transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_layers, "multiplies_as_intel", lambda: False)
    ids = torch.arange(5, 15)[None]
    mask, generator = torch.ones_like(ids, dtype=torch.bool), torch.Generator().manual_seed(0)
    sampling = SamplingConfig(max_response_length=3, num_samples=num_samples)
    model, engine = tiny_model(), PairedEngine()
    request = GenerationRequest(ids, mask, sampling, [], 3, generator)
    engine.generate(model, request)  # the first rollout looks at the model, with a few tokens
    with Products() as products:
        engine.generate(model, request)
    assert (products.transposed > 0) == is_transposed  # with the greedy response 2, 4 and 9 rows


@pytest.mark.parametrize(
    ("inputs", "outputs", "rows"),
    [(512, 512, {16, 32, 48}), (576, 511, set()), (511, 4096, set()), (512, 8192, {16, 32, 48}), (512, 8193, set())],
)
def test_intels_processors_do_it_with_wide_layers_and_blocks_of_rows(
    inputs: int, outputs: int, rows: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_layers, "multiplies_as_intel", lambda: True)
    layer = torch.nn.Linear(inputs, outputs)
    assert {number for number in range(1, 129) if fused_layers.is_quicker_transposed(number, layer)} == rows
    model, reference = torch.nn.Sequential(layer), torch.nn.functional.linear
    with torch.no_grad(), transposed_products(model), Products() as products:
        for number in (2, 16):
            given = torch.randn(number, inputs)
            expected = reference(given.double(), layer.weight.double(), layer.bias.double())
            torch.testing.assert_close(model(given).double(), expected, rtol=1e-5, atol=1e-5)
    assert products.transposed == bool(rows)


@pytest.mark.parametrize(
    ("text", "is_intel"), [("vendor_id\t: GenuineIntel\n", True), ("vendor_id\t: AuthenticAMD\n", False)]
)
def test_the_system_tells_whose_processor_it_is(
    text: str, is_intel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_layers, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6 Model 143, GenuineIntel")
    assert fused_layers.multiplies_as_intel.__wrapped__()
    (tmp_path / "cpuinfo").write_text(text)
    assert fused_layers.multiplies_as_intel.__wrapped__() == is_intel


class Products(TorchDispatchMode):
    """Counts products whose first factor is a weight as it is stored."""

    transposed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, factors = func.overloadpacket.__name__, [arg for arg in args if isinstance(arg, torch.Tensor)]
        if name in ("mm", "addmm"):
            self.transposed += isinstance(factors[-2], torch.nn.Parameter)
        return func(*args, **(kwargs or {}))


ROTARY = (
    "Llama",
    "Qwen3",
    "Mistral (sliding window)",
    "Gemma 3 (sliding window)",
    "Phi",
    "StableLM",
    "GPT-NeoX",
    "GPT-2",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROTARY)
def test_a_family_rotates_a_token_as_it_does_itself(name: str, dtype: torch.dtype) -> None:
    model = family_model(next(family for family in FAMILIES if family.name == name), dtype)
    module = sys.modules[type(model).__module__]
    before = getattr(module, "apply_rotary_pos_emb", None)
    tokens = torch.arange(5, 45).view(4, 10)
    with torch.no_grad():
        logits, cached = [], []
        for fused in (False, True):
            with fused_rotary(model, {}) if fused else nullcontext(0) as number:
                assert number == (fused and name != "GPT-2")
                output = model(tokens, use_cache=True)
                with Operators() as operators:
                    logits.append(model(tokens[:, :1], past_key_values=output.past_key_values).logits)
            cached.append(operators.counts["neg"])
    assert getattr(module, "apply_rotary_pos_emb", None) is before
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert (logits[1] - logits[0]).norm() <= tolerance * logits[0].norm()
    if name in ("Llama", "Qwen3"):
        assert cached == [2 * 2, 1]  # of queries and keys in both layers; of the sines, once for all


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Phi"])
def test_a_token_in_mixed_precision_is_rotated_together(name: str) -> None:
    """Queries and keys are in bfloat16 and angles in float32; the family's own has two negations in every layer."""
    model = family_model(next(family for family in FAMILIES if family.name == name), torch.float32)
    tokens = torch.arange(5, 45).view(4, 10)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, negations = [], []
        for fused in (False, True):
            with fused_rotary(model, {}) if fused else nullcontext(0) as number:
                assert number == fused
                output = model(tokens, use_cache=True)
                with Operators() as operators:
                    logits.append(model(tokens[:, :1], past_key_values=output.past_key_values).logits)
            negations.append(operators.counts["neg"])
    assert negations == [2 * 2, 1]
    assert logits[0].dtype == logits[1].dtype
    assert (logits[1] - logits[0]).norm() <= 0.01 * logits[0].norm()


def test_a_rotation_that_rounds_to_16_bits_is_left_alone_in_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.apply_rotary_pos_emb

    def rounds(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return tuple(rotated.to(q.dtype) for rotated in plain(q, k, cos, sin))

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rounds)
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed), fused_rotary(tiny_model("llama"), {}) as number:
            assert number == (not mixed)


def test_queries_wider_than_their_angles_stay_as_wide() -> None:
    """As behind norms that are kept in float32; the family's own has the wider dtype."""
    from transformers.models.llama import modeling_llama

    queries, angles = torch.randn(2, 2, 1, 16), torch.randn(2, 1, 16, dtype=torch.bfloat16)
    with fused_rotary(tiny_model("llama").bfloat16(), {}) as number:
        found = modeling_llama.apply_rotary_pos_emb(queries, queries, angles, angles)
    expected = modeling_llama.apply_rotary_pos_emb(queries, queries, angles, angles)
    assert number == 1
    torch.testing.assert_close(found[0], expected[0])


def test_a_rotation_of_another_kind_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbors in place of halves, as Cohere rotates."""
    from transformers.models.llama import modeling_llama

    def by_neighbors(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        def rotated(x: Any) -> Any:
            return x * cos[:, None] + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin[:, None]

        return rotated(q), rotated(k)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", by_neighbors)
    with fused_rotary(tiny_model("llama"), {}) as number:
        assert number == 0
        assert modeling_llama.apply_rotary_pos_emb is by_neighbors


# liger-kernel


def liger_of(monkeypatch: pytest.MonkeyPatch, factor: float) -> Counter[str]:
    """Install liger-kernel's two functions, which compute something else where the factor is not 1."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    calls: Counter[str] = Counter()

    def liger_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        calls["rotary"] += 1
        return tuple(factor * rotated for rotated in apply_rotary_pos_emb(q, k, cos, sin))

    def _swiglu_dispatch(gate: Any, up: Any) -> Any:
        calls["swiglu"] += 1
        return factor * nn.functional.silu(gate) * up

    rope, swiglu = ModuleType("liger_kernel.transformers.rope"), ModuleType("liger_kernel.transformers.swiglu")
    rope.liger_rotary_pos_emb, swiglu._swiglu_dispatch = liger_rotary_pos_emb, _swiglu_dispatch
    for module in (rope, swiglu):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return calls


def greedy_rollout(model: Any, device: str) -> torch.Tensor:
    ids = torch.arange(5, 25).view(4, 5).to(device)
    generator = torch.Generator(device).manual_seed(0)
    sampling = SamplingConfig(max_response_length=6)
    request = GenerationRequest(ids, torch.ones_like(ids, dtype=torch.bool), sampling, [0], 3, generator)
    return PairedEngine().generate(model, request).greedy_ids


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_liger_kernel_is_taken_on_cuda_where_it_is_right(
    factor: float, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = greedy_rollout(tiny_model("llama"), "cpu")
    calls = liger_of(monkeypatch, factor)
    with caplog.at_level("INFO"):
        found = greedy_rollout(tiny_model("llama").to("cuda"), "cuda")
    assert torch.equal(found.cpu(), expected)
    said = [record.getMessage() for record in caplog.records if "liger-kernel" in record.getMessage()]
    if factor == 1:
        assert said == [f"rollouts take liger-kernel's {name}" for name in ("liger_rotary_pos_emb", "swiglu_dispatch")]
        assert min(calls.values()) > 2  # and not only in its trial
    else:
        assert all("do not take" in text and "it computes something else" in text for text in said)
        assert len(said) == 2
        assert set(calls.values()) == {1}


def test_liger_kernel_is_left_alone_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = liger_of(monkeypatch, 1.0)
    greedy_rollout(tiny_model("llama"), "cpu")
    assert not calls
