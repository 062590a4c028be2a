"""Tiny random models of many families, and what the family table says of the rollout engines on each of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from remax_lightning.rollout import (
    AutoEngine,
    GenerationOutput,
    GenerationRequest,
    HuggingFaceEngine,
    RolloutEngine,
    SamplingConfig,
)
from remax_lightning.rollout.engines import choose_engine, why_unsupported

VOCABULARY, PAD = 64, 3
WINDOW = 4
"""Shorter than the prompts, so that a sliding window cuts something off."""
LENGTHS = [3, 9, 6, 7, 2, 8, 5, 4]
RESPONSE = 8
DRAWS = 1000
NEAR_TIE = {torch.float32: 0.0, torch.bfloat16: 0.1}
"""Logits closer than this may change places when the rows of a batch do, since the sums then round otherwise."""

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
GROUPED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 1, "rope_theta": 100.0}
GEMMA = {**GROUPED, "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 24}
UNTIED = {"tie_word_embeddings": False}
"""For families whose tied embeddings would make the last token outweigh what stands before it."""
STATE_SPACE = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
MAMBA_2 = {**STATE_SPACE, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}
JAMBA = {
    **GROUPED,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 4,
}
QWEN3_NEXT = {
    **GROUPED,
    **SHARED_EXPERT,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}


class Family(NamedTuple):
    """A family of models.

    Args:
        name: how the table calls it.
        model_type: how transformers calls it.
        arguments: of its configuration.
        lora: the modules that LoRA adapts: the projections of the attention, or what stands in their place.
    """

    name: str
    model_type: str
    arguments: dict[str, Any]
    lora: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")


FAMILIES = [
    Family("Llama", "llama", GROUPED),
    Family("Qwen2", "qwen2", GROUPED),
    Family("Qwen3", "qwen3", {**GROUPED, "head_dim": 16}),
    Family("Mistral (sliding window)", "mistral", {**GROUPED, "sliding_window": WINDOW}),
    Family("Gemma 2 (sliding window)", "gemma2", {**GEMMA, **UNTIED}),
    Family(
        "Gemma 3 (sliding window)",
        "gemma3_text",
        {**GEMMA, **UNTIED, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    Family("Phi", "phi", {**SMALL, "intermediate_size": 48}),
    Family("OPT", "opt", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    Family("OPT (projected embeddings)", "opt", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    Family("GPT-2", "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}, ("c_attn",)),
    Family("GPT-NeoX", "gpt_neox", {**SMALL, "intermediate_size": 48}, ("query_key_value",)),
    Family("BLOOM (ALiBi)", "bloom", {**UNTIED, "hidden_size": 32, "n_layer": 2, "n_head": 2}, ("query_key_value",)),
    Family("Falcon (ALiBi)", "falcon", {**SMALL, **UNTIED, "alibi": True}, ("query_key_value",)),
    Family("Falcon (rotary)", "falcon", {**SMALL, **UNTIED, "alibi": False}, ("query_key_value",)),
    Family("StableLM", "stablelm", GROUPED),
    Family("Mixtral", "mixtral", {**GROUPED, "num_local_experts": 4}),
    Family("Qwen2-MoE", "qwen2_moe", {**GROUPED, **SHARED_EXPERT}),
    Family("Qwen3-MoE", "qwen3_moe", {**GROUPED, **EXPERTS, "head_dim": 16}),
    Family("Mamba (state space)", "mamba", STATE_SPACE, ("x_proj",)),
    Family("Mamba 2 (state space)", "mamba2", MAMBA_2, ("in_proj",)),
    Family("Jamba (hybrid)", "jamba", JAMBA),
    Family("Qwen3-Next (hybrid)", "qwen3_next", QWEN3_NEXT),
    Family("LFM2 (hybrid)", "lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}),
]


def family_model(family: Family, dtype: torch.dtype = torch.float32, *, lora: bool = False, **changes: Any) -> Any:
    """Return a random model of `family` whose every parameter bears on the logits, LoRA adapters around it or not."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    arguments = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
    config = AutoConfig.for_model(family.model_type, **{**arguments, **family.arguments, **changes})
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    _randomize(model.parameters())
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=list(family.lora), task_type="CAUSAL_LM"))
        _randomize(parameter for name, parameter in model.named_parameters() if "lora_" in name)
    return model.to(dtype).eval()


def _randomize(parameters: Iterator[Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.35 * noise if parameter.dim() > 1 else parameter.data + 0.1 * noise


def prompts() -> tuple[Tensor, Tensor]:
    """Return `[B, P]` prompts of unequal lengths, padded on the left, and their mask."""
    ids = torch.randint(5, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]
    return ids.where(mask, torch.tensor(PAD)), mask


def rollout(
    engine: RolloutEngine, model: Any, ids: Tensor, mask: Tensor, *, eos: int, **sampling: Any
) -> GenerationOutput:
    """Call `engine` with a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    return engine.generate(model, GenerationRequest(ids, mask, SamplingConfig(**sampling), [eos], PAD, generator))


# Greedy rows


def generate(model: Any, ids: Tensor, mask: Tensor, eos: int | None) -> tuple[Tensor, Tensor]:
    """Return `[B, R]` greedy responses of transformers and by how much each token's logit leads the next best."""
    output = model.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        do_sample=False,
        max_new_tokens=RESPONSE,
        eos_token_id=eos,
        pad_token_id=PAD,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(output.logits, 1).float().topk(2, -1).values
    return output.sequences[:, ids.shape[1] :], best[..., 0] - best[..., 1]


def ending_token(ids: Tensor, clear: Tensor) -> int:
    """Return a token that some of the `[B, R]` responses, but not all, meet midway: it then ends those."""
    for token in ids[:, 1:][clear[:, 1:]].tolist():
        is_token = ids == token
        if not is_token[:, 0].any() and not is_token.any(-1).all():
            return int(token)
    raise AssertionError(f"no token ends some rows midway and leaves others: {ids.tolist()}")


@torch.no_grad()
def greedy_agrees(engine: RolloutEngine, model: Any) -> bool:
    """Whether greedy rows equal those of `model.generate`, in each row up to the first near-tie, if any."""
    ids, mask = prompts()
    free, lead = generate(model, ids, mask, None)
    tolerance = NEAR_TIE[next(model.parameters()).dtype]
    clear = (lead >= tolerance).long().cumprod(-1).bool()
    assert clear.float().mean() > 0.2, f"too many near-ties to tell: {lead.tolist()}"
    eos = ending_token(free, clear)
    expected, _ = generate(model, ids, mask, eos)
    greedy = rollout(engine, model, ids, mask, eos=eos, max_response_length=RESPONSE, num_samples=2).greedy_ids
    assert (expected[clear] == eos).any()
    return torch.equal(greedy[clear], expected[clear])


# Sampled rows


def chi_square_cdf(statistic: float, degrees: int) -> float:
    """Return how likely a chi-square variable is to stay below `statistic`: a regularized incomplete gamma function."""
    half = torch.tensor([degrees, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammainc(half[0], half[1]))


def chi_square(counts: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """Return the statistic and its degrees of freedom; tokens expected less than five times share one cell."""
    expected = counts.sum() * probabilities
    rare = expected < 5
    cells = [(counts[~rare], expected[~rare]), (counts[rare].sum()[None], expected[rare].sum()[None])]
    observed, predicted = (torch.cat(parts) for parts in zip(*cells, strict=True))
    if predicted[-1] < 5 and len(predicted) > 1:  # still rare together: they join the cell before them
        observed[-2] += observed[-1]
        predicted[-2] += predicted[-1]
        observed, predicted = observed[:-1], predicted[:-1]
    return float(((observed - predicted) ** 2 / predicted).sum()), len(predicted) - 1


def distributions(model: Any, rows: list[Tensor]) -> Tensor:
    """Return `[M, V]` float64 probabilities of what follows rows of one length, by one pass without cache or mask."""
    return model(torch.stack(rows), use_cache=False).logits[:, -1].double().softmax(-1)


@torch.no_grad()
def sampled_agrees(engine: RolloutEngine, model: Any, temperature: float = 1.0) -> bool:
    """Whether many drawn first tokens, and second tokens after each common first one, follow the distribution.

    The prompts are the shortest, on which padding weighs most, and the longest.
    """
    ids, mask = (tensor[:2] for tensor in prompts())
    eos = 2
    drawn = rollout(
        engine, model, ids, mask, eos=eos, max_response_length=2, num_samples=DRAWS, temperature=temperature
    ).sampled_ids.view(2, DRAWS, 2)
    first, second = [], []
    for row, prompt in enumerate([ids[row][mask[row]] for row in range(2)]):
        counts = torch.bincount(drawn[row, :, 0], minlength=VOCABULARY)
        first.append(chi_square(counts, distributions(model, [prompt])[0]))
        common = [token for token in (counts >= 50).nonzero().flatten().tolist() if token != eos]
        followed = distributions(model, [torch.cat([prompt, torch.tensor([token])]) for token in common])
        for token, probabilities in zip(common, followed, strict=True):
            follow = torch.bincount(drawn[row, drawn[row, :, 0] == token, 1], minlength=VOCABULARY)
            second.append(chi_square(follow, probabilities))
    sums = [(sum(statistic for statistic, _ in parts), sum(free for _, free in parts)) for parts in (first, second)]
    return all(chi_square_cdf(statistic, degrees) < 0.999 for statistic, degrees in sums)


# What the table says


def engine_cells(family: Family) -> list[str]:
    """Return the engine that `AutoEngine` chooses, and why."""
    model = family_model(family)
    return [type(choose_engine(model)).__name__, why_unsupported(model) or "takes a key-value cache"]


def check_cells(family: Family) -> list[str]:
    """Return whether greedy rows agree in fp32 and in bf16, whether sampled ones do, and whether all do with LoRA."""
    plain, adapted = list(_checks(family, lora=False)), list(_checks(family, lora=True))
    return [_cell(plain, "greedy float32"), _cell(plain, "greedy bfloat16"), _cell(plain, "sampled"), _cell(adapted)]


def _checks(family: Family, *, lora: bool) -> Iterator[tuple[str, bool]]:
    """Yield what is checked and whether it holds, with the chosen engine and with `HuggingFaceEngine`."""
    for dtype in NEAR_TIE:
        model = family_model(family, dtype, lora=lora)
        for engine in (AutoEngine, HuggingFaceEngine):
            how = f"{str(dtype).removeprefix('torch.')} by {engine.__name__}"
            yield f"greedy {how}", greedy_agrees(engine(), model)
            yield f"sampled {how}", sampled_agrees(engine(), model)


def _cell(results: list[tuple[str, bool]], start: str = "") -> str:
    failed = [what for what, holds in results if what.startswith(start) and not holds]
    return "no: " + ", ".join(failed) if failed else "yes"
