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


def write_addition_task(folder: Path, *, digits: tuple[int, ...] = (2, 3), train: int = 20_000, val: int = 512) -> None:
    """Write `train.jsonl`, `val.jsonl` and `policy/` (tokenizer and configuration, no weights) into `folder`.

    Args:
        folder: is made where it is missing; the same call writes the same files.
        digits: how many digits a number may have; each operand's count is drawn from them.
        train: different additions to train on; fewer where there are no more.
        val: additions held out, none of which is in `train.jsonl`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = _additions(digits, train + val)
    for name, part in (("val", rows[:val]), ("train", rows[val:])):
        lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(folder / "policy")
    policy_config(tokenizer).save_pretrained(folder / "policy")


def _additions(digits: tuple[int, ...], count: int) -> list[tuple[str, str]]:
    """Return up to `count` different additions in a fixed random order, all digit counts equally likely.

    Numbers have leading zeros, so that a digit's place in the text is its place in the number: a policy this small then
    learns to add in hundreds of steps instead of thousands.
    """
    source = random.Random(0)
    possible = sum(9 * 10 ** (d - 1) for d in digits) ** 2
    found: dict[tuple[int, int], None] = {}
    while len(found) < min(count, possible):
        a, b = (source.randrange(10 ** (d - 1), 10**d) for d in source.choices(digits, k=2))
        found[a, b] = None
    width = max(digits) + 1
    return [(f"{a:0{width - 1}}+{b:0{width - 1}}=", f"{a + b:0{width}}") for a, b in found]


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


def policy_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the configuration of a Llama of a third of a million parameters."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        # The defaults are made for wide models and long texts: here they double the steps that are needed.
        initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
