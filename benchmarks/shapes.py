"""The models, tokenizers and prompts that the benchmarks run on: random weights, nothing downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

PAD, EOS, UNKNOWN = 0, 1, 2
FIRST_WORD = 3


class Shape(NamedTuple):
    """A model's size and the work it is given.

    Args:
        layers: transformer layers.
        width: hidden size; heads are 64 wide.
        vocab: vocabulary, `V`.
        prompt: tokens of every prompt, `P`.
        response: most tokens of a response, `R`.
        prompts: prompts of a step, `B`.
    """

    layers: int
    width: int
    vocab: int
    prompt: int
    response: int
    prompts: int


SHAPES = {
    "toy": Shape(2, 64, 256, 8, 8, 4),  # for the test suite: shows that the path runs, measures nothing
    "tiny": Shape(4, 256, 4096, 32, 64, 16),
    "small": Shape(8, 512, 8192, 64, 128, 16),
}


def llama(shape: Shape, *, classifier: bool = False, seed: int = 0) -> Any:
    """Return a random Llama of `shape` in eval mode: a language model, or a sequence classifier with one label."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=(shape.width * 8 // 3 + 15) // 16 * 16,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        max_position_embeddings=2 * (shape.prompt + shape.response),
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        tie_word_embeddings=False,
        num_labels=1,
    )
    torch.manual_seed(seed)
    return (LlamaForSequenceClassification if classifier else LlamaForCausalLM)(config).eval()


def tokenizer(shape: Shape) -> Any:
    """Return a tokenizer with one word per token of the vocabulary, so that text and tokens have the same length."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *(_word(i) for i in range(FIRST_WORD, shape.vocab))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def prompts(shape: Shape, seed: int) -> Tensor:
    """Return `[B, P]` random token ids without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, shape.vocab, (shape.prompts, shape.prompt), generator=generator)


def prompt_texts(shape: Shape, seed: int) -> list[str]:
    """Return the prompts as text."""
    return [" ".join(_word(i) for i in row) for row in prompts(shape, seed).tolist()]


def _word(token: int) -> str:
    return f"w{token}"


@torch.no_grad()
def set_ending(model: Any, rate: float | None) -> None:
    """Give a random Llama weights with which it ends a response at every token with probability `rate`, or never.

    The end is in the weights alone, so every way of generating meets the same model and pays nothing for it. Feature 0
    of all embeddings is one constant that no layer writes to, so it serves as a bias of the output embedding. The
    end-of-sequence row reads a random direction of the hidden state against a threshold, steeply: after a share `rate`
    of all contexts the end is certain, after the others impossible. That is so on sampled and on greedy rows: sampled
    tokens are nearly uniform, greedy ones run through the vocabulary like a random map, and the hidden state depends
    mostly on the last token, because the embeddings are large. So lengths are geometric with mean 1 / `rate`, cut at
    the limit.

    Args:
        model: as `llama` makes it.
        rate: share of contexts after which a response ends; None for no end.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embedding.mul_(100)
    embedding[:, 0] = 5 * embedding.std()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
    head[:, 0] = 0
    generator = torch.Generator().manual_seed(1)
    if rate is None:
        head[EOS] = 0
        head[EOS, 0] = -1000.0
        return
    tokens = torch.randint(FIRST_WORD, len(embedding), (256, 16), generator=generator)
    hidden = model.model(tokens).last_hidden_state.flatten(0, 1)
    direction = torch.randn(hidden.shape[-1], generator=generator)
    direction[0] = 0
    threshold = (hidden @ direction / hidden[:, 0]).quantile(1 - rate)
    head[EOS] = 10 * direction
    head[EOS, 0] = -10 * threshold


def save(folder: Path, shape: Shape) -> None:
    """Save `policy` (which never ends a response) and `reward`, and `prompts.jsonl` for a step to train on."""
    policy = llama(shape)
    set_ending(policy, None)
    for name, model in (("policy", policy), ("reward", llama(shape, classifier=True, seed=1))):
        model.save_pretrained(folder / name)
        tokenizer(shape).save_pretrained(folder / name)
    rows = [json.dumps({"prompt": text}) for text in prompt_texts(shape, 0)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
