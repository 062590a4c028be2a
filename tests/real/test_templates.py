"""What is trained on, of messages: exactly what transformers writes with published templates, or a refusal."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from real.conftest import published_tokenizer
from real.published import DIALOGUES, TEMPLATES, Dialogue

from remax_lightning.data import LoadingConfig, SFTDataModule
from remax_lightning.data.chat_templates import special_tokens
from remax_lightning.data.tokenizers import hidden_ids, response_texts
from remax_lightning.errors import DataError, UserError

THOUGHT = re.compile(r"</?think>")


def spelled(dialogue: Dialogue) -> Iterator[Dialogue]:
    """The dialogue in the forms that templates read it in: contents as text, arguments as JSON."""
    yield dialogue

    def with_text(message: dict[str, Any]) -> dict[str, Any]:
        content = message["content"]
        parts = content if isinstance(content, list) else []
        return {**message, "content": "\n".join(part["text"] for part in parts) if parts else content or ""}

    def with_json(message: dict[str, Any]) -> dict[str, Any]:
        message = copy.deepcopy(with_text(message))
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        return message

    for change in (with_text, with_json):
        yield Dialogue([change(message) for message in dialogue.messages], change(dialogue.response), dialogue.tools)


def write(tokenizer: Any, dialogue: Dialogue) -> tuple[str, str]:
    """The prompt and the whole conversation as transformers writes them."""
    options = {"tools": copy.deepcopy(dialogue.tools) or None, "tokenize": False}
    prompt = tokenizer.apply_chat_template(copy.deepcopy(dialogue.messages), add_generation_prompt=True, **options)
    return prompt, tokenizer.apply_chat_template(copy.deepcopy([*dialogue.messages, dialogue.response]), **options)


def pieces(dialogue: Dialogue) -> Iterator[str]:
    """All that a text has to hold: contents, the thought of the response, calls, descriptions of tools."""
    for message in [*dialogue.messages, dialogue.response]:
        content = message["content"]
        parts = [part["text"] for part in content] if isinstance(content, list) else [content or ""]
        yield from (piece.strip() for part in parts for piece in THOUGHT.split(part))
        yield from (call["function"]["arguments"]["city"] for call in message.get("tool_calls", []))
    yield dialogue.response.get("reasoning_content", "")
    yield from (tool["function"]["description"] for tool in dialogue.tools)


def expected(tokenizer: Any, dialogue: Dialogue) -> tuple[str, str] | None:
    """Prompt and whole conversation, in the first form of which nothing is lost; None where there is none."""
    for form in spelled(dialogue):
        try:
            prompt, whole = write(tokenizer, form)
        except Exception:  # whatever a template raises
            continue
        printed = any(text in whole for text in ("'type': 'text'", "'city': ", '\\"city\\"', "None"))
        if all(piece in whole for piece in pieces(dialogue)) and not printed and whole.startswith(prompt):
            return prompt, whole
        if (
            not printed
            and (whole := composed(tokenizer, form, prompt))
            and all(piece in whole for piece in pieces(dialogue))
        ):
            return prompt, whole
    return None


def composed(tokenizer: Any, dialogue: Dialogue, prompt: str) -> str | None:
    """Prompt and response where no whole conversation begins with the prompt: the turn that the template writes behind
    the last message, behind a thought that is closed."""
    response, thought = dict(dialogue.response), dialogue.response.get("reasoning_content", "")
    response.pop("reasoning_content", None)
    if "</think>" in (response["content"] or ""):
        thought, _, response["content"] = response["content"].removeprefix("<think>").partition("</think>")
        thought, response["content"] = thought.strip(), response["content"].lstrip()
    whole = write(tokenizer, Dialogue(dialogue.messages, response, dialogue.tools))[1]
    stem = prompt.removesuffix("<think>\n")
    if stem != prompt and whole.startswith(stem):
        return f"{prompt}{thought}\n</think>\n\n{whole[len(stem) :]}"
    # Mistral Nemo: the system message stands in the last turn, while nothing follows it.
    system = dialogue.messages[0]
    if not thought and system["role"] == "system" and f"{system['content']}\n\n" in prompt:
        stem = prompt.replace(f"{system['content']}\n\n", "")
        return f"{prompt}{whole[len(stem) :]}" if whole.startswith(stem) else None
    return None


@pytest.mark.parametrize(
    ("name", "kind", "trained"),
    [
        ("r1_distill_llama", "one turn", "\n</think>\n\nOslo is the capital.<｜end▁of▁sentence｜>"),
        ("r1_distill_llama", "thought", "Two and two, counted.\n</think>\n\nIt is four.<｜end▁of▁sentence｜>"),
        ("r1_distill_llama", "thought as text", "Two and two.\n</think>\n\nIt is four.<｜end▁of▁sentence｜>"),
        ("qwq", "one turn", "\n</think>\n\nOslo is the capital.<|im_end|>"),
        ("qwq", "thought", "Two and two, counted.\n</think>\n\nIt is four.<|im_end|>"),
        ("qwq", "turns", "\n</think>\n\nAbout 700,000.\n\nSo says the last census.<|im_end|>"),
        ("mistral_nemo", "system", "Roma aeterna.</s>"),
    ],
)
def test_ordinary_rows_train_where_the_template_writes_prompts_otherwise(name: str, kind: str, trained: str) -> None:
    """Spelled out, beside `composed`: what the policy learns to write behind the prompt that it is given."""
    dialogue, tokenizer = DIALOGUES[kind], published_tokenizer(name)
    data = Supervised(
        data=[{"prompt": dialogue.messages, "response": [dialogue.response]}],
        tokenizer=name,
        batch_size=1,
        loading=LoadingConfig(cache=False),
    )
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch.prompts[0] == write(tokenizer, dialogue)[0]
    assert tokenizer.decode(batch.response_ids[0]) == trained


class Supervised(SFTDataModule):
    """Takes one of `TEMPLATES` for its tokenizer, loaded once for all tests of it."""

    @property
    def tokenizer(self) -> Any:
        return published_tokenizer(self.tokenizer_path)


@pytest.mark.parametrize("kind", DIALOGUES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_response_is_what_transformers_writes_behind_the_prompt(name: str, kind: str) -> None:
    published, tokenizer, dialogue = TEMPLATES[name], published_tokenizer(name), DIALOGUES[kind]
    texts = expected(tokenizer, dialogue)
    data = Supervised(
        data=[{"prompt": dialogue.messages, "response": [dialogue.response], "tools": dialogue.tools}],
        tokenizer=name,
        batch_size=1,
        max_prompt_length=4096,
        loading=LoadingConfig(cache=False),
    )
    if texts is None:
        with pytest.raises((DataError, UserError), match=r"row 1|line 1"):
            data.setup("fit")
        return
    prompt, whole = texts
    end = published.call_end if dialogue.response.get("tool_calls") and published.call_end else published.turn_end
    text = whole[: whole.rindex(end) + len(end)]
    assert whole.removeprefix(text).strip() == published.after
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.prompts == [prompt]
    prompt_ids, response_ids = batch.prompt_ids[0].tolist(), batch.response_ids[0].tolist()
    assert prompt_ids == tokenizer(prompt, add_special_tokens=False).input_ids
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if ids[: len(prompt_ids)] == prompt_ids:
        assert prompt_ids + response_ids == ids
    else:  # a token would reach over the end of the prompt, which a policy cannot write
        assert tokenizer.decode(prompt_ids + response_ids) == tokenizer.decode(ids)
    # A reward is given the same text, without special tokens, where a policy writes these tokens.
    hidden = hidden_ids(tokenizer, [response_ids[-1]], skip_special_tokens=True)
    (read,) = response_texts(tokenizer, [prompt_ids], [response_ids], hidden)
    specials = "|".join(map(re.escape, special_tokens(tokenizer)))
    written = re.sub(specials, "", text.removeprefix(prompt))
    # A token that takes the white space behind it takes that of the response, too.
    assert read == (written.lstrip() if published.rstrip else written)
