"""The embedded task: additions of two- and three-digit numbers, a character tokenizer, a tiny untrained policy."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
CHARACTERS = "0123456789+="


CARELESS_SHARE = 0.65
"""Share of demonstrations that forget the carry from the units to the tens."""


def write_addition_task(folder: Path, *, digits: tuple[int, ...] = (2, 3), train: int = 20_000, val: int = 512) -> None:
    """Write the files of the task into `folder`; every call writes the same content.

    `demonstrations.jsonl` is for supervised fine-tuning. It has errors: most sums with a carry from the units lack the
    carry. `train.jsonl` has the same prompts with correct sums, for the reward; `val.jsonl` has other prompts.
    `policy/` has a tokenizer and a configuration, but no weights.

    Args:
        folder: created if it is missing.
        digits: possible numbers of digits of an operand; each operand draws one of them.
        train: number of different additions to train on, or all if there are fewer.
        val: number of held-out additions; none of them is in the other files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # ---- Additions, and the demonstrations that are wrong ----
    pairs, width = _sample_operands(digits, train + val), max(digits)
    source = random.Random(1)
    forgets_carry = [source.random() < CARELESS_SHARE for _ in pairs]
    rows = {
        "val": [(a, b, a + b) for a, b in pairs[:val]],
        "train": [(a, b, a + b) for a, b in pairs[val:]],
        "demonstrations": [
            (a, b, _sum_without_carry(a, b) if forgets else a + b)
            for (a, b), forgets in zip(pairs[val:], forgets_carry[val:], strict=True)
        ],
    }
    # ---- {"prompt": "012+345=", "response": "0357"}, one per line ----
    for name, sums in rows.items():
        lines = [
            json.dumps({"prompt": f"{a:0{width}}+{b:0{width}}=", "response": f"{c:0{width + 1}}"}) for a, b, c in sums
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    # ---- The policy, without weights: each run draws its own ----
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(folder / "policy")
    policy_config(tokenizer).save_pretrained(folder / "policy")


def _sample_operands(digits: tuple[int, ...], count: int) -> list[tuple[int, int]]:
    """Return up to `count` different pairs in a fixed random order, all digit counts equally likely.

    Numbers have leading zeros, so that the position of a digit in the text is its position in the number. A small
    policy then learns to add in hundreds of steps instead of thousands.
    """
    source = random.Random(0)
    # 90 numbers of two digits, 900 of three
    possible = sum(9 * 10 ** (d - 1) for d in digits) ** 2
    pairs: dict[tuple[int, int], None] = {}  # in order, without repetitions
    while len(pairs) < min(count, possible):
        a, b = (source.randrange(10 ** (d - 1), 10**d) for d in source.choices(digits, k=2))
        pairs[a, b] = None
    return list(pairs)


def _sum_without_carry(a: int, b: int) -> int:
    """Return the sum without the carry from the units to the tens."""
    # 17 + 25: 30 from the tens, 2 from the units
    return 10 * (a // 10 + b // 10) + (a + b) % 10


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of transformers with one token per character."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=32
    )


def policy_config(tokenizer: PreTrainedTokenizerFast, num_layers: int = 2) -> LlamaConfig:
    """Return the configuration of a Llama with a few hundred thousand parameters and the tokenizer's maximum length."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        # The defaults suit wide models and long texts; here they would double the number of steps.
        initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
