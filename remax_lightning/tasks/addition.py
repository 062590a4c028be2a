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
"""How often a demonstration forgets to carry from the units to the tens, where there is something to carry."""


def write_addition_task(folder: Path, *, digits: tuple[int, ...] = (2, 3), train: int = 20_000, val: int = 512) -> None:
    """Write the task's files into `folder`, the same ones at every call.

    `demonstrations.jsonl` is for supervised fine-tuning. Its authors were careless: most of the sums that need a carry
    from the units lack it. `train.jsonl` has the same prompts and `val.jsonl` others, with the right sums for the rule
    that rewards responses. `policy/` has a tokenizer and a configuration, no weights.

    Args:
        folder: is made where it is missing.
        digits: how many digits a number may have; each operand's count is drawn from them.
        train: different additions to train on; fewer where there are no more.
        val: additions held out, none of which is in the other files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pairs, width = _sample_operands(digits, train + val), max(digits)
    careless = random.Random(1)
    demonstrated = [careless.random() < CARELESS_SHARE for _ in pairs]
    rows = {
        "val": [(a, b, a + b) for a, b in pairs[:val]],
        "train": [(a, b, a + b) for a, b in pairs[val:]],
        "demonstrations": [
            (a, b, _sum_without_carry(a, b) if forgets else a + b)
            for (a, b), forgets in zip(pairs[val:], demonstrated[val:], strict=True)
        ],
    }
    for name, sums in rows.items():
        lines = [
            json.dumps({"prompt": f"{a:0{width}}+{b:0{width}}=", "response": f"{c:0{width + 1}}"}) for a, b, c in sums
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(folder / "policy")
    policy_config(tokenizer).save_pretrained(folder / "policy")


def _sample_operands(digits: tuple[int, ...], count: int) -> list[tuple[int, int]]:
    """Return up to `count` different pairs in a fixed random order, all digit counts equally likely.

    Numbers are written with leading zeros, so that a digit's place in the text is its place in the number: a policy
    this small then learns to add in hundreds of steps instead of thousands.
    """
    source = random.Random(0)
    possible = sum(9 * 10 ** (d - 1) for d in digits) ** 2
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < min(count, possible):
        a, b = (source.randrange(10 ** (d - 1), 10**d) for d in source.choices(digits, k=2))
        pairs[a, b] = None
    return list(pairs)


def _sum_without_carry(a: int, b: int) -> int:
    """Return the sum of one who forgets what the units carry to the tens."""
    return 10 * (a // 10 + b // 10) + (a + b) % 10


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per character, of transformers' own class."""
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
    """Return the configuration of a Llama of some hundred thousand parameters, as long as its tokenizer's texts."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        # The defaults are made for wide models and long texts: here they double the steps that are needed.
        initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
