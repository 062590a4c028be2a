"""Proof that a vLLM server holds and samples the policy: its weights, and its responses under the trainer's passes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from remax_lightning.config import ProofConfig, SamplingConfig
from remax_lightning.errors import UserError
from remax_lightning.functional.log_probs import LOGITS_AT_ONCE, LogitTransform
from remax_lightning.models.forward import accepts_argument, find_head, hidden_states
from remax_lightning.models.sampling import gather_log_probs, truncated_logits
from remax_lightning.rollout.base import GenerationRequest
from remax_lightning.rollout.vllm_client import ServerInfo, VLLMServer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GAP, GAP_16_BITS = 0.05, 1.0
"""Default of `ProofConfig.max_gap`."""
MEAN_GAP, MEAN_GAP_16_BITS = 0.01, 0.1
"""Default of `ProofConfig.mean_gap`."""
_TEMPERATURES = [2.0 ** (step / 8) for step in range(-16, 17)]  # 0.25 to 4
"""Temperatures that a server may sample at by mistake."""
_PADDING = 64
"""vLLM pads the rows of embeddings to a multiple of this."""
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers that vLLM stacks, and what they are made of."""


# ---- Log-probs ----


class ProvenRow(NamedTuple):
    """A response that is compared.

    Args:
        url: of the server.
        prompt: `[P]` token ids.
        tokens: `[t]` token ids of the response.
        log_probs: `[t]` that the server returned; None for a greedy response.
    """

    url: str
    prompt: Tensor
    tokens: Tensor
    log_probs: Tensor | None


def log_probs_mode(sampling: SamplingConfig, request: GenerationRequest | None = None) -> str | None:
    """Return which of vLLM's log-probs are those that are trained.

    Args:
        sampling: of the run.
        request: tells whether tokens are suppressed; None goes by `sampling` alone.

    Returns:
        `raw_logprobs` (the model's own), `processed_logprobs` (after suppression, temperature and truncation), None
        where both are the same, or `neither`.
    """
    suppresses = sampling.min_response_length > 0 or (request is not None and bool(request.unused_ids))
    # What differs between the model's own distribution and the one that is sampled from, and whether it is trained.
    parts = [(suppresses, True), (sampling.temperature != 1, sampling.scale_log_probs)]
    parts.append((sampling.truncates, sampling.processed_log_probs))
    trained = {is_trained for differs, is_trained in parts if differs}
    if not trained:
        return None
    if trained == {True}:
        # Tokens without a name in the tokenizer have next to no probability, so that raw log-probs do as well.
        only_unused = sampling.min_response_length == 0 and not any(differs for differs, _ in parts[1:])
        return None if only_unused else "processed_logprobs"
    return "raw_logprobs" if trained == {False} else "neither"


@torch.no_grad()
def prove(
    model: PreTrainedModel, request: GenerationRequest, rows: list[ProvenRow], config: ProofConfig, *, is_16_bit: bool
) -> float:
    """Compare responses of servers with passes of the policy, and return the mean difference of their log-probs.

    The policy runs a response at a time, and a few tokens of it have logits at once.

    Args:
        model: the policy, in eval mode and with full parameters.
        request: that the responses answer.
        rows: sampled responses with the servers' log-probs, and greedy ones.
        config: what rounding may explain.
        is_16_bit: whether a server computes in 16 bits.

    Raises:
        UserError: naming the server and what differs.
    """
    is_16_bit = is_16_bit or model.dtype != torch.float32 or torch.is_autocast_enabled(model.device.type)
    limits = _Limits(
        config.max_gap or (GAP_16_BITS if is_16_bit else GAP),
        config.mean_gap or (MEAN_GAP_16_BITS if is_16_bit else MEAN_GAP),
        config.standard_errors,
        config.impossible_share,
    )
    comparable = log_probs_mode(request.sampling, request) != "neither"
    gaps: list[Tensor] = []
    for url in dict.fromkeys(row.url for row in rows):
        mine = [row for row in rows if row.url == url]
        evidence = _Evidence()
        for row in mine:
            for part in _token_parts(model, request, row):
                evidence.add(part, request.sampling)
        if comparable and evidence.gaps:
            gaps.append(torch.cat(evidence.gaps))
            if gaps[-1].max() > limits.gap or gaps[-1].mean() > limits.mean_gap:
                _refuse_log_probs(model, request, mine, gaps[-1], limits)
        _judge_greedy(url, evidence, limits.gap)
        _judge_likelihood(url, evidence, request.sampling, limits)
    return float(torch.cat(gaps).mean()) if gaps else 0.0


class _Limits(NamedTuple):
    """What rounding and chance explain; see `ProofConfig`."""

    gap: float
    mean_gap: float
    standard_errors: float
    impossible_share: float


class _Part(NamedTuple):
    """Some tokens of a response under the trainer.

    Args:
        tokens: `[m]` token ids.
        log_probs: `[m]` the server's; None for a greedy response.
        raw: `[m, V]` the policy's logits, up to a constant of each token.
        possible: `[m, V]` the same with minus infinity on suppressed tokens.
    """

    tokens: Tensor
    log_probs: Tensor | None
    raw: Tensor
    possible: Tensor


def _token_parts(model: Any, request: GenerationRequest, row: ProvenRow) -> Iterator[_Part]:
    """Yield the tokens of a response with the policy's logits, as many at a time as `LOGITS_AT_ONCE` allows."""
    vocabulary: int = model.config.get_text_config().vocab_size
    if int(row.tokens.max()) >= vocabulary:
        raise UserError(
            f"model.rollout: the server {row.url} drew token {int(row.tokens.max())}, and the policy has {vocabulary};"
            " it serves a model with another vocabulary"
        )
    suppressed, phases = request.suppressed, request.suppressed.ids_by_phase(row.tokens.device)
    positions = torch.arange(len(row.tokens), device=row.tokens.device)  # [t]
    for part, raw in _logits(model, row):
        theirs = None if row.log_probs is None else row.log_probs[part].to(raw)
        yield _Part(row.tokens[part], theirs, raw, suppressed.apply(raw, positions[part], phases))


def _logits(model: Any, row: ProvenRow) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the `t` tokens of a response, with float32 logits `[m, V]` that predict them."""
    count = len(row.tokens)  # t
    ids = torch.cat([row.prompt, row.tokens])[None]  # [1, P + t], nothing is padded
    head = find_head(model).head
    if head is None:
        keep = {"logits_to_keep": count + 1} if accepts_argument(model, "logits_to_keep") else {}
        logits = cast(Tensor, model(ids, use_cache=False, **keep).logits)[0, -count - 1 : -1]  # [t, V]
        rows = max(1, LOGITS_AT_ONCE // logits.shape[-1])
        for start in range(0, count, rows):
            yield slice(start, start + rows), logits[start : start + rows].float()
        return
    # The log-softmax of logits differs from them by a constant of each token, which no figure here depends on.
    hidden = hidden_states(model, ids, torch.ones_like(ids, dtype=torch.bool))[0, -count - 1 : -1]  # [t, D]
    transform = LogitTransform.from_head(head, 1.0, torch.float32)
    rows = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):  # the transform says which dtype a product has
        weight, bias = transform.cast_weights(head.weight, head.bias)
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            yield part, transform.log_softmax(hidden[part], weight, bias, row.tokens[part], part)[0]


class _Evidence:
    """What the responses of one server add up to."""

    def __init__(self) -> None:
        self.gaps: list[Tensor] = []  # [m] absolute differences of log-probs, of sampled tokens
        self.greedy_gap = 0.0
        self.difference = self.variance = 0.0
        self.count = self.impossible = 0

    def add(self, part: _Part, sampling: SamplingConfig) -> None:
        """Count some tokens.

        A server may return right log-probs and draw from another distribution. Of a token drawn from p the log-prob has
        the mean `sum p log p` and the variance `sum p (log p)^2 - mean^2`; tokens are drawn one after the other, so the
        variances of their differences from these means add up.
        """
        if part.log_probs is None:
            below = part.possible.max(-1).values - _gather(part.possible, part.tokens, normalize=False)
            self.greedy_gap = max(self.greedy_gap, float(below.nan_to_num(math.inf).max()))
            return
        self.gaps.append(_gap(part.log_probs, gather_log_probs(part.possible, part.tokens, sampling)))
        log_probs = _sampled_from(part.possible, sampling).log_softmax(-1)  # [m, V]
        probs, bounded = log_probs.exp(), log_probs.clamp_min(-1e4)  # 0 * -inf is NaN
        mean, square = (probs * bounded).sum(-1), (probs * bounded.square()).sum(-1)  # [m]
        drawn = _gather(log_probs, part.tokens, normalize=False)
        possible = drawn.isfinite()
        self.count, self.impossible = self.count + len(drawn), self.impossible + int((~possible).sum())
        self.difference += float((drawn - mean)[possible].sum())
        self.variance += float((square - mean.square())[possible].sum())


def _gap(theirs: Tensor, ours: Tensor) -> Tensor:
    """Return absolute differences; what is no number counts as far off."""
    return (theirs - ours).abs().nan_to_num(1e4, 1e4)


def _gather(logits: Tensor, tokens: Tensor, *, normalize: bool = True) -> Tensor:
    values = logits.log_softmax(-1) if normalize else logits
    return values.gather(-1, tokens[:, None]).squeeze(-1)


def _sampled_from(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    return truncated_logits(logits, sampling)


def _refuse_log_probs(
    model: Any, request: GenerationRequest, rows: list[ProvenRow], gaps: Tensor, limits: _Limits
) -> None:
    """Stop the run with the distribution that has the server's log-probs, if one of those that are known has."""
    sampling, url = request.sampling, rows[0].url
    others: dict[str | float, list[Tensor]] = {}
    for row in rows:
        for tokens, theirs, raw, possible in _token_parts(model, request, row) if row.log_probs is not None else ():
            assert theirs is not None
            candidates: dict[str | float, Tensor] = {"raw": raw, "processed": _sampled_from(possible, sampling)}
            candidates |= {temperature: possible / temperature for temperature in _TEMPERATURES}
            for name, logits in candidates.items():
                others.setdefault(name, []).append(_gap(theirs, _gather(logits, tokens)))
    by_name = {name: torch.cat(values) for name, values in others.items()}
    nearest = min(_TEMPERATURES, key=lambda temperature: float(by_name[temperature].mean()))
    cause = "it holds other weights, or reads the prompts otherwise"
    if by_name["processed"].max() <= limits.gap:
        cause = "they are those of the distribution that is sampled from; start it with --logprobs-mode raw_logprobs"
    elif by_name["raw"].max() <= limits.gap:
        cause = "they are those of the model itself; start it with --logprobs-mode processed_logprobs"
    elif by_name[nearest].mean() <= max(limits.mean_gap, 0.2 * float(gaps.mean())):
        cause = f"they are those of a temperature near {nearest:.2g}, not of {sampling.temperature:g}"
    raise UserError(
        f"model.rollout: the server {url} has log-probs that differ from the trainer's by {float(gaps.mean()):.2g} nats"
        f" in the mean and {float(gaps.max()):.2g} at most, of {len(gaps)} drawn tokens; rounding explains"
        f" {limits.mean_gap:g} and {limits.gap:g} (model.rollout.init_args.proof): {cause}"
    )


def _judge_greedy(url: str, evidence: _Evidence, limit: float) -> None:
    if evidence.greedy_gap > limit:
        raise UserError(
            f"model.rollout: the server {url} has greedy responses with tokens that are {evidence.greedy_gap:.2g} nats"
            f" below the most likely ones of the trainer; rounding explains {limit:g} (proof.max_gap): it holds other"
            " weights, or decodes otherwise"
        )


def _judge_likelihood(url: str, evidence: _Evidence, sampling: SamplingConfig, limits: _Limits) -> None:
    """Stop the run if drawn tokens are more or less likely than draws of the policy are."""
    if evidence.impossible > max(1.0, limits.impossible_share * evidence.count):
        raise UserError(
            f"model.rollout: the server {url} drew {evidence.impossible} of {evidence.count} tokens that model.sampling"
            " leaves out: it samples from another distribution"
        )
    difference, variance = evidence.difference, evidence.variance
    errors = abs(difference) / math.sqrt(variance) if variance > 1e-6 else 0.0
    if errors > limits.standard_errors:
        what = "more" if difference > 0 else "less"
        raise UserError(
            f"model.rollout: the server {url} draws tokens that are {what} likely than draws of the policy, by"
            f" {errors:.2g} standard errors over {evidence.count} tokens: it samples at another temperature than"
            f" model.sampling.temperature {sampling.temperature:g}, or truncates otherwise"
        )


# ---- Checksums ----


class ChecksumResult(NamedTuple):
    """What a comparison of checksums gave.

    Args:
        compared: number of tensors with a checksum on both sides.
        different: names of those that differ.
    """

    compared: int
    different: list[str]


def compare_checksums(
    server: VLLMServer, folder: Path, weights: dict[str, Tensor] | None, info: ServerInfo
) -> ChecksumResult:
    """Compare SHA-256 of the weights that a server computes with, and of those that it was given.

    Compared are the tensors whose values follow from the weights: those of the same name, and stacks of attention and
    feed-forward weights. A server that shards (tensor parallelism) has none to compare; on a CPU vLLM packs the weights
    of linear layers, so that embeddings and norms are left.

    Args:
        server: that is asked.
        folder: whose files have the weights, where `weights` is None.
        weights: by the names of published checkpoints.
        info: what the server said of itself.
    """
    path = "/weight_checker"
    answer = server.post(path, {"action": "checksum"}, server.options.transfer_timeout)
    theirs: dict[str, str] = {}
    for key, digest in server.read(path, answer, "checksums").items():
        place, name = key.rsplit(":", 1)  # "dp0:pp0:pcp0:tp0:model.norm.weight"
        if not place.endswith("tp0"):
            return ChecksumResult(0, [])
        is_packed = info.device == "cpu" and "norm" not in name and "embed" not in name
        if not is_packed:
            theirs[name.replace(".base_layer.", ".")] = digest
    dtype = getattr(torch, info.dtype) if info.dtype is not None else None
    stored = _stored(folder) if weights is None else {name: partial(value.cpu) for name, value in weights.items()}
    ours = dict(_digests(stored, dtype, set(theirs)))
    different = [name for name, digests in ours.items() if theirs[name] not in digests]
    return ChecksumResult(len(ours), different)


def _stored(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Return what reads each tensor in the files of a folder."""
    from safetensors import safe_open

    stored: dict[str, Callable[[], Tensor]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        opened: Any = safe_open(file, "pt")
        stored |= {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118 - no dictionary
    return stored


def _digests(
    stored: Mapping[str, Callable[[], Tensor]], dtype: torch.dtype | None, names: set[str]
) -> Iterator[tuple[str, list[str]]]:
    """Yield the names of a server's tensors with the SHA-256 that they may have."""
    for name in sorted(names):
        parts = _parts(name)
        if not all(part in stored for part in parts):
            continue
        tensors = [stored[part]() for part in parts]
        yield name, _possible_digests(tensors, dtype)


def _parts(name: str) -> list[str]:
    for fused, parts in _FUSED.items():
        if f".{fused}." in name:
            return [name.replace(fused, part) for part in parts]
    return [name]


def _possible_digests(tensors: list[Tensor], dtype: torch.dtype | None) -> list[str]:
    digest = hashlib.sha256()
    row_bytes = rows = 0
    for tensor in tensors:
        values = (tensor if dtype is None else tensor.to(dtype)).contiguous()
        digest.update(cast(Any, values.flatten().view(torch.uint8).numpy()))
        row_bytes, rows = values[0].nbytes, rows + len(values)
    digests = [digest.hexdigest()]
    if missing := -rows % _PADDING:
        # Embeddings with rows of zeros at the end.
        digest.update(bytes(missing * row_bytes))
        digests.append(digest.hexdigest())
    return digests
