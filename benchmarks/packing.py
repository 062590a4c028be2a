"""Passes over rows of unlike length, padded and packed, side by side: `python benchmarks/packing.py`.

`before` are prompts padded on the left and responses on the right, side by side; `padded` are responses directly
behind their prompts, padded to the longest row; `sub_batches` are those in passes of four rows of like length; `packed`
is one row without padding; `budget` is packed rows under `data.tokens_per_micro_batch`. `real_over_computed` is real
tokens over those that were computed, padding included.

`training` is the forward and the backward pass of the policy over one rollout. `step` is a whole optimizer step with
reference and reward model, as in `benchmarks/step.py`: each response ends at its length, sampled or greedy. Before, the
engine halved its batch when half of the rows had ended, and multiplied few rows by the weights like many.

Lengths are geometric, with a mean of a third of the longest prompt and a quarter of the longest response, or those of a
file of JSON lines with `question` and `answer` (`--lengths`), four characters to a token.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from machine import RESULTS
from shapes import EOS, FIRST_WORD, PAD, Shape, llama
from shapes import save as save_models
from step import Clock
from timing import interleaved, medians, save
from torch import Tensor

from remax_lightning.models import log_probs as passes
from remax_lightning.models.forward import find_head
from remax_lightning.models.log_probs import ForwardBatch, policy_statistics
from remax_lightning.models.packing import packing_obstacle
from remax_lightning.rewards import pooling
from remax_lightning.rollout import (
    GenerationOutput,
    GenerationRequest,
    PairedEngine,
    SamplingConfig,
    decode_loop,
    engines,
)
from remax_lightning.rollout.decode_loop import DecodeLoop, smaller_batch
from remax_lightning.training.experience import plan_micro_batches, response_numbers, row_lengths
from remax_lightning.types import PromptBatch, Responses, Rollout

SHAPES = {
    "toy": Shape(2, 64, 256, 12, 12, 4),  # for the test suite: shows that the path runs, measures nothing
    "tiny": Shape(4, 256, 4096, 96, 192, 16),
    "small": Shape(8, 512, 8192, 96, 192, 16),
}
SUB_BATCH = 4
"""Rows of a pass of `sub_batches`."""
BASE = "before"
Run = Callable[[int], dict[str, float]]
"""Runs once and returns figures, seconds among them; takes the number of the round."""


class Lengths(NamedTuple):
    """Tokens of `B` prompts and of their responses."""

    prompts: list[int]
    responses: list[int]


def main(arguments: list[str] | None = None) -> None:
    """Measure every size that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=["tiny", "small"])
    parser.add_argument("--phases", nargs="+", choices=["training", "step"], default=["training", "step"])
    parser.add_argument("--lengths", type=Path, help="JSON lines with question and answer; default: geometric")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS / "packing.jsonl")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for size in options.sizes:
        for phase in options.phases:
            measure(size, phase, options)


def measure(size: str, phase: str, options: argparse.Namespace) -> None:
    """Measure the variants of a phase in turn, and write their medians down."""
    path: Path | None = options.lengths
    shape, lengths = SHAPES[size], "geometric" if path is None else f"{path.parent.name}/{path.stem}"
    rows = None if path is None else _read(path)
    with tempfile.TemporaryDirectory() as name:
        make = training_runs if phase == "training" else step_runs
        variants = make(Path(name), shape, lambda turn: _draw(shape, turn, rows))
        figures = interleaved(variants, options.repetitions, options.warmup)
    values = {variant: medians(figure) for variant, figure in figures.items()}
    base = values[BASE]
    lines = []
    for variant, line in values.items():
        head = {"benchmark": "packing", "size": size, "lengths": lengths, "phase": phase, "variant": variant}
        ratios = {"ratio": line["seconds"] / base["seconds"]}
        if phase == "step":
            ratios["training_ratio"] = line["training"] / base["training"]
        head |= {"device": "cpu", "dtype": "float32"}
        lines.append(head | line | ratios | {"repetitions": options.repetitions})
    save(options.results, lines)


# ---- Lengths ----


def _read(path: Path) -> list[tuple[int, int]]:
    """Return the tokens of question and answer of each row, four characters to a token."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(max(1, len(row["question"]) // 4), max(1, len(row["answer"]) // 4)) for row in rows]


def _draw(shape: Shape, turn: int, rows: list[tuple[int, int]] | None) -> Lengths:
    """Return the lengths of a round, cut at those of the shape."""
    generator = random.Random(turn)
    if rows is None:
        rows = [
            (int(generator.expovariate(3 / shape.prompt)) + 4, int(generator.expovariate(4 / shape.response)) + 1)
            for _ in range(shape.prompts)
        ]
    chosen = generator.sample(rows, shape.prompts)
    return Lengths(
        [min(shape.prompt, prompt) for prompt, _ in chosen], [min(shape.response, response) for _, response in chosen]
    )


def _budget(shape: Shape) -> int:
    """Return a budget of tokens: four of the longest rows."""
    return 4 * (shape.prompt + shape.response)


# ---- How it was before ----


def side_by_side(
    _model: Any,
    prompt: PromptBatch,
    responses: Responses,
    _batch_size: Any = None,
    chosen: Tensor | None = None,
) -> Iterator[ForwardBatch]:
    """Yield one batch of prompts padded on the left beside responses padded on the right."""
    assert chosen is None or bool(chosen.all())
    num_prompt_tokens = int(prompt.prompt_mask.sum(1).max())  # P
    length = int(responses.response_mask.sum(1).max())  # R
    ids, mask = responses.response_ids[:, :length], responses.response_mask[:, :length]  # [S, R]
    row, position = mask.nonzero(as_tuple=True)  # both [K]
    yield ForwardBatch(
        torch.cat([prompt.prompt_ids[:, -num_prompt_tokens:], ids], dim=1),
        torch.cat([prompt.prompt_mask[:, -num_prompt_tokens:], mask], dim=1),
        length,
        predicting=row * (num_prompt_tokens + length) + num_prompt_tokens - 1 + position,
        targets=ids[row, position],
        positions=position,
        places=row * responses.response_ids.shape[1] + position,
    )


def halved_batch(left: int, size: int, _device: torch.device) -> int:
    """Return the rows that a batch shrinks to when `left` of them are unfinished, as on CUDA."""
    return smaller_batch(left, size, torch.device("cuda"))


def padded_passes(batches: bool) -> ExitStack:
    """Return a context in which nothing is packed; with `batches`, rows are laid out and decoded as before."""
    stack = ExitStack()
    for module in (passes, pooling):
        stack.enter_context(patch.object(module, "packing_obstacle", lambda *_: "it is measured without"))
    if batches:
        stack.enter_context(patch.object(passes, "_forward_batches", side_by_side))
        stack.enter_context(patch.object(decode_loop, "smaller_batch", halved_batch))
        stack.enter_context(patch.object(engines, "transposed_products", nullcontext))
    return stack


# ---- The training pass ----


def training_runs(_folder: Path, shape: Shape, draw: Callable[[int], Lengths]) -> dict[str, Run]:
    """Return a forward and a backward pass of each variant over the rollout of a round."""
    model = llama(shape).train()
    # Each looks at the model once, with a few tokens that are not to be counted.
    find_head(model)
    packing_obstacle(model)
    computed = 0

    def count(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        nonlocal computed
        computed += inputs[0].numel()

    model.model.embed_tokens.register_forward_pre_hook(count)

    def backward(rollout: Rollout, batches: list[Tensor] | None = None) -> None:
        policy_statistics(model, rollout, SamplingConfig(), batch_size=batches).log_probs.sum().backward()

    def sub_batches(rollout: Rollout) -> None:
        lengths = torch.tensor(row_lengths(rollout)).flatten()
        backward(rollout, list(lengths.argsort(descending=True).split(SUB_BATCH)))

    def budget(rollout: Rollout) -> None:
        parts = plan_micro_batches(row_lengths(rollout), _budget(shape), packed=True)
        for numbers in response_numbers(rollout, parts):
            backward(rollout.select(numbers))

    def variant(run: Callable[[Rollout], None], context: Callable[[], ExitStack]) -> Run:
        def once(turn: int) -> dict[str, float]:
            nonlocal computed
            rollout = _rollout(shape, draw(turn), turn)
            real = sum(map(sum, row_lengths(rollout)))
            model.zero_grad()
            with context():
                start, computed = time.perf_counter(), 0
                run(rollout)
                return {"seconds": time.perf_counter() - start, "real_over_computed": real / computed}

        return once

    return {
        BASE: variant(backward, lambda: padded_passes(batches=True)),
        "padded": variant(backward, lambda: padded_passes(batches=False)),
        "sub_batches": variant(sub_batches, lambda: padded_passes(batches=False)),
        "packed": variant(backward, ExitStack),
        "budget": variant(budget, ExitStack),
    }


def _rollout(shape: Shape, lengths: Lengths, seed: int) -> Rollout:
    """Return responses of random tokens with these lengths."""
    generator = torch.Generator().manual_seed(seed)

    def rows(sizes: list[int], side: str) -> tuple[Tensor, Tensor]:
        width, tokens = max(sizes), torch.tensor(sizes)[:, None]
        places = torch.arange(width) if side == "right" else torch.arange(width).flip(0)
        mask = places < tokens  # [B, width]
        ids = torch.randint(FIRST_WORD, shape.vocab, mask.shape, generator=generator)
        return ids.where(mask, torch.tensor(PAD)), mask

    prompt_ids, prompt_mask = rows(lengths.prompts, "left")
    ids, mask = rows(lengths.responses, "right")
    nothing = torch.zeros(len(ids))
    prompt = PromptBatch(prompt_ids, prompt_mask, [""] * len(ids), [{}] * len(ids))
    return Rollout(prompt, Responses(ids, mask, nothing.bool(), [""] * len(ids)), None, nothing, None, {}, None, None)


# ---- The whole step ----


class EndingEngine(PairedEngine):
    """Ends the responses of a round at their lengths; a greedy one is as long as the sampled."""

    lengths: list[int]

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        """Generate with the end of the sequence as the only token where a response ends."""
        last = torch.tensor(self.lengths) - 1  # [B]

        def suppress(loop: DecodeLoop, step: int) -> None:
            ends = step >= last[loop.active % len(last)]  # [M]
            loop.logits = loop.logits.masked_fill(ends[:, None], -torch.inf)  # [M, V]
            loop.logits[:, EOS] = torch.where(ends, 0.0, -torch.inf)

        with patch.object(DecodeLoop, "suppress_tokens", suppress):
            return super().generate(model, request)


def step_runs(folder: Path, shape: Shape, draw: Callable[[int], Lengths]) -> dict[str, Run]:
    """Return a whole step of each variant: a `fit` of one step that keeps the optimizer of the one before."""
    save_models(folder, shape)
    return {
        BASE: _step(folder, shape, draw, lambda: padded_passes(batches=True), None),
        "packed": _step(folder, shape, draw, ExitStack, None),
        "budget": _step(folder, shape, draw, ExitStack, _budget(shape)),
    }


def _step(
    folder: Path,
    shape: Shape,
    draw: Callable[[int], Lengths],
    context: Callable[[], ExitStack],
    budget: int | None,
) -> Run:
    from lightning.pytorch import Trainer

    from remax_lightning.data import PromptDataModule
    from remax_lightning.models import ModelConfig
    from remax_lightning.modules import ReMaxModule
    from remax_lightning.rewards import ClassifierReward

    made: list[torch.optim.Optimizer] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        if not made:
            made.append(torch.optim.AdamW(parameters, lr=1e-6))
        return made[0]

    policy, engine = str(folder / "policy"), EndingEngine()
    reward = ClassifierReward(str(folder / "reward"), template="{prompt} {response}")
    module: ReMaxModule | None = None

    def step(turn: int) -> dict[str, float]:
        nonlocal module
        lengths = draw(turn)
        # Words of the tokenizer, one token each
        words = [f"w{word}" for word in range(FIRST_WORD, shape.vocab)]
        generator = random.Random(turn)
        texts = [" ".join(generator.choices(words, k=size)) for size in lengths.prompts]
        engine.lengths = lengths.responses
        data = PromptDataModule(
            data=[{"prompt": text} for text in texts],
            tokenizer=policy,
            val_size=0,
            batch_size=shape.prompts,
            tokens_per_micro_batch=budget,
            max_prompt_length=shape.prompt,
        )
        if module is None:
            module = ReMaxModule(
                ModelConfig(policy),
                reward,
                reference=ModelConfig(policy),
                rollout=engine,
                sampling=SamplingConfig(max_response_length=shape.response),
                optimizer=optimizer,
                check_on_policy=False,  # the engine writes ends that the policy does not draw
                stall_timeout=None,
            )
        clock = Clock(lambda: None)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=1,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
            callbacks=[clock],
        )
        with context():
            trainer.fit(module, data)
        phases = clock.phases()
        return {"seconds": sum(phases.values()), **phases}

    return step


if __name__ == "__main__":
    main()
