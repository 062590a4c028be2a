"""The task of the pipeline: templated dialogues, preferences by a hidden rule, a tokenizer, a tiny policy."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from remax_lightning.tasks.addition import SPECIAL_TOKENS, policy_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# fmt: off
ADJECTIVES = (
    "black", "blue", "brown", "cheap", "green", "heavy", "large", "light", "new", "pink", "red", "round", "small",
    "square", "white", "yellow",
)
NOUNS = (
    "basket", "bench", "bicycle", "blanket", "bottle", "bowl", "brush", "candle", "carpet", "chair", "clock", "coat",
    "cup", "curtain", "desk", "drum", "fan", "guitar", "hammer", "hat", "jacket", "kettle", "ladder", "lamp",
    "mirror", "mug", "oven", "pan", "pillow", "plate", "radio", "rope", "saw", "scarf", "shelf", "shirt", "sofa",
    "spade", "stove", "table", "tent", "towel", "vase", "violin",
)
PLACES = ("Athens", "Bergen", "Cork", "Delft", "Evora", "Fes", "Graz", "Hobart", "Izmir", "Jena", "Kyoto", "Lima")
# fmt: on
QUESTIONS = (
    "Where can I buy a {thing} in {place}?",
    "Who repairs a {thing} in {place}?",
    "What does a {thing} cost in {place}?",
    "Can I rent a {thing} in {place}?",
    "How do I send a {thing} to {place}?",
    "Is there a {thing} for sale in {place}?",
)

# ---- Parts of a response: the rule likes the first and third kind, and dislikes the second and fourth ----
POLITE = ("Of course!", "Gladly!", "Thank you for asking!")
CURT = ("Look,", "Well,", "As I said,")
OFFERS = ("Can I help with anything else?", "Please ask me if you need more.", "Would you like me to call them?")
DISMISSALS = ("That is all.", "Do not ask again.", "The rest is your own affair.")
BODIES = (
    "you will find a {thing} at the market",
    "the old shop by the river has a {thing}",
    "a {thing} is in the next catalog",
    "they keep a {thing} at the station",
    "for a {thing} you have to see the smith",
)
FILLERS = (
    "I have thought about this for a long time.",
    "Many people come here with such questions.",
    "The weather was quite different last year.",
    "My neighbor told me so on Monday morning.",
)

BRIEF = 18
"""Number of words from which a longer response loses score."""

# "red chair"
_THING = re.compile(rf"\b({'|'.join(ADJECTIVES)}) ({'|'.join(NOUNS)})\b")


class Pair(NamedTuple):
    """A prompt with its chosen and rejected response."""

    prompt: str
    chosen: str
    rejected: str


def true_score(
    prompts: Sequence[str],
    responses: Sequence[str],
    rows: Sequence[dict[str, Any]],  # noqa: ARG001 (the signature of FunctionReward)
) -> list[float]:
    """Score responses with the rule behind the preferences. No stage is trained on it; the maximum is 4.

    A response gains 2 for naming the thing that the prompt asks about, 1 for a polite opening, 1 for a final offer. It
    loses 1 for every other thing that it names, 1 for a curt opening, 1 for a dismissive end, and 0.1 for every word
    after the first 18. It has the signature of `FunctionReward`.
    """
    return [_score_response(prompt, response.strip()) for prompt, response in zip(prompts, responses, strict=True)]


def _score_response(prompt: str, response: str) -> float:
    # ---- Things, opening, end, length ----
    asked, named = set(_THING.findall(prompt)), _THING.findall(response)
    score = 2.0 * any(thing in asked for thing in named) - sum(thing not in asked for thing in named)
    score += response.startswith(POLITE) - float(response.startswith(CURT))
    score += response.endswith(OFFERS) - float(response.endswith(DISMISSALS))
    return score - 0.1 * max(0, len(response.split()) - BRIEF)


def make_preferences(count: int, seed: int = 0) -> list[Pair]:
    """Return pairs with different prompts, the same ones for the same seed.

    Two responses are drawn independently of the rule. One is chosen with the probability of the Bradley-Terry model
    for their scores, so that labels have realistic errors.

    Raises:
        ValueError: if there are fewer different prompts.
    """
    source = random.Random(f"dialogues/{seed}")
    # 6 questions x 16 adjectives x 44 nouns x 12 places
    prompts = list(_all_prompts())
    if count > len(prompts):
        raise ValueError(f"there are {len(prompts)} different prompts, {count} pairs need as many")
    return [_make_pair(source, prompt, thing) for prompt, thing in source.sample(prompts, count)]


def read_pairs(path: Path) -> list[Pair]:
    """Read the pairs in a file of `write_dialogue_task`."""
    return [Pair(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def preference_probability(pair: Pair) -> float:
    """Return the probability with which the rule chooses the chosen response."""
    first, second = true_score([pair.prompt] * 2, [pair.chosen, pair.rejected], [{}, {}])
    # Bradley-Terry: the logistic function of the difference
    return 1 / (1 + math.exp(second - first))


def _all_prompts() -> Iterator[tuple[str, str]]:
    for question in QUESTIONS:
        for adjective in ADJECTIVES:
            for noun in NOUNS:
                for place in PLACES:
                    thing = f"{adjective} {noun}"
                    # "User: Who repairs a red chair in Cork?\nAssistant:", "red chair"
                    yield f"User: {question.format(thing=thing, place=place)}\nAssistant:", thing


def _make_pair(source: random.Random, prompt: str, thing: str) -> Pair:
    first = _make_response(source, thing)
    second = first
    while second == first:
        second = _make_response(source, thing)
    pair = Pair(prompt, first, second)
    return pair if source.random() < preference_probability(pair) else Pair(prompt, second, first)


def _make_response(source: random.Random, thing: str) -> str:
    """Return a response whose parts are drawn independently, good and bad ones."""
    other = f"{source.choice(ADJECTIVES)} {source.choice(NOUNS)}"
    # the thing of the prompt, another one, or none
    named = source.choices((thing, other, "thing"), weights=(4, 3, 3))[0]
    opening = source.choice((source.choice(POLITE), source.choice(CURT), ""))
    body = source.choice(BODIES).format(thing=named) + "."
    if not opening.endswith(","):
        body = body[0].upper() + body[1:]
    fillers = source.sample(FILLERS, source.choice((0, 0, 1, 2)))
    ending = source.choice((source.choice(OFFERS), source.choice(DISMISSALS), ""))
    # " Gladly! You will find a red chair at the market. That is all."
    return " " + " ".join(part for part in (opening, body, *fillers, ending) if part)


def write_dialogue_task(folder: Path, *, train: int = 20_000, val: int = 256, held_out: int = 1024) -> None:
    """Write the files of the task into `folder`; every call writes the same content.

    `preferences.jsonl` is for all three stages, `val.jsonl` for validation, `held_out.jsonl` for the final evaluation.
    No prompt appears twice. `policy/` has a tokenizer and a configuration, but no weights.

    Args:
        folder: created if it is missing.
        train: pairs for the three stages.
        val: pairs for validation.
        held_out: pairs for evaluation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # ---- Pairs, cut into three files ----
    pairs = make_preferences(train + val + held_out)
    files = {"val": pairs[:val], "held_out": pairs[val : val + held_out], "preferences": pairs[val + held_out :]}
    for name, rows in files.items():
        lines = "".join(json.dumps(row._asdict()) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    # ---- A tokenizer of the training pairs, and a policy without weights ----
    tokenizer = train_tokenizer(text for pair in files["preferences"] for text in pair)
    tokenizer.save_pretrained(folder / "policy")
    policy_config(tokenizer, num_layers=3).save_pretrained(folder / "policy")


def train_tokenizer(texts: Iterator[str], vocab_size: int = 896, longest: int = 96) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of transformers, trained on `texts`.

    Args:
        texts: training data.
        vocab_size: number of tokens, including special tokens and the 256 bytes.
        longest: maximum number of tokens of a text.
    """
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    # ---- Bytes, merged by frequency: any text can be encoded ----
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # ---- <s> in front of every text ----
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=longest
    )
