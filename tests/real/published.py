"""Published chat templates with tokenizers that have their tokens, and conversations as data sets have them."""

from __future__ import annotations

from typing import Any, NamedTuple


class Published(NamedTuple):
    """A chat template and what stands around it.

    Args:
        tokenizer: a part of `fetch.ARCHIVES`.
        turn_end: the token that ends a turn of the assistant.
        template: file of the part `templates`, without its ending; empty for the tokenizer's own.
        tokens: special tokens of the template's model that the tokenizer lacks.
        eos: end-of-sequence token of the template's model; empty for the tokenizer's.
        call_end: the token that ends a turn with calls of tools; empty for `turn_end`.
        after: what the template writes behind the end of a turn, besides white space.
        rstrip: whether `tokens` take the white space behind them, which is then no token.
    """

    tokenizer: str
    turn_end: str
    template: str = ""
    tokens: tuple[str, ...] = ()
    eos: str = ""
    call_end: str = ""
    after: str = ""
    rstrip: bool = False


LLAMA = "<|eot_id|>"
CHATML = "<|im_end|>"
PHI = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>")
GRANITE = ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")
KIMI = ("<|im_user|>", "<|im_middle|>", "<|im_system|>", "<|im_assistant|>")
R1 = ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<think>", "</think>")
TEMPLATES = {
    # The tokenizers' own.
    "command_r_plus": Published("command_r_plus", "<|END_OF_TURN_TOKEN|>"),
    "deepseek_v3": Published("deepseek_v3", "<｜end▁of▁sentence｜>"),
    "gemma3": Published("gemma3", "<end_of_turn>"),
    "llama3": Published("llama3", LLAMA, after="<|start_header_id|>assistant<|end_header_id|>"),
    "llama3_1": Published("llama3_1", LLAMA),
    "mistral_nemo": Published("mistral_nemo", "</s>"),
    "qwen3": Published("qwen3", CHATML),
    "smollm2": Published("smollm2", CHATML),
    # Those that llama.cpp has collected.
    "gpt_oss": Published("gpt_oss", "<|return|>", "openai-gpt-oss-120b", call_end="<|call|>"),
    "phi3_5": Published(
        "llama2", "<|end|>", "microsoft-Phi-3.5-mini-instruct", PHI, "<|endoftext|>", after="<|endoftext|>", rstrip=True
    ),
    "gemma2": Published("gemma3", "<end_of_turn>", "google-gemma-2-2b-it"),
    "granite3_3": Published(
        "qwen3", "<|end_of_text|>", "ibm-granite-granite-3.3-2B-Instruct", GRANITE, "<|end_of_text|>"
    ),
    "hermes3": Published(
        "llama3_1", CHATML, "NousResearch-Hermes-3-Llama-3.1-8B-tool_use", ("<|im_start|>", CHATML), CHATML
    ),
    "functionary3_2": Published("llama3_1", LLAMA, "meetkai-functionary-medium-v3.2"),
    "kimi_k2": Published("qwen3", CHATML, "moonshotai-Kimi-K2", KIMI),
    "llama3_2": Published("llama3_1", LLAMA, "meta-llama-Llama-3.2-3B-Instruct"),
    "llama3_3": Published("llama3_1", LLAMA, "meta-llama-Llama-3.3-70B-Instruct"),
    "mistral_small3_2": Published(
        "mistral_nemo", "</s>", "Mistral-Small-3.2-24B-Instruct-2506", ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    ),
    "qwen2_5": Published("qwen3", CHATML, "Qwen-Qwen2.5-7B-Instruct"),
    "qwq": Published("qwen3", CHATML, "Qwen-QwQ-32B"),
    "r1_distill_llama": Published("llama3_1", R1[2], "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", R1, R1[2]),
}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


CALL = {"type": "function", "id": "abcde1234", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


TOOL_SAYS = {"role": "tool", "content": "17 degrees", "tool_call_id": "abcde1234", "name": "weather"}


class Dialogue(NamedTuple):
    """Messages, the response to them, and the tools that it may call."""

    messages: list[dict[str, Any]]
    response: dict[str, Any]
    tools: list[dict[str, Any]] = []  # noqa: RUF012 - never written to


DIALOGUES = {
    "one turn": Dialogue([user("Which city is the capital of Norway?")], assistant("Oslo is the capital.")),
    "turns": Dialogue(
        [user("Which city is the capital of Norway?"), assistant("Oslo is it."), user("How many people live there?")],
        assistant("About 700,000.\n\nSo says the last census."),
    ),
    "system": Dialogue(
        [{"role": "system", "content": "You answer in Latin."}, user("Which city is Rome?")], assistant("Roma aeterna.")
    ),
    "code": Dialogue([user("Write a loop.")], assistant("    for i in x:\n        print(i)  \n")),
    "parts": Dialogue(
        [user([{"type": "text", "text": "What stands here,"}, {"type": "text", "text": "and what there?"}])],
        assistant("Nothing at all."),
    ),
    "thought": Dialogue([user("What is 2+2?")], assistant("It is four.", reasoning_content="Two and two, counted.")),
    "thought as text": Dialogue([user("What is 2+2?")], assistant("<think>\nTwo and two.\n</think>\n\nIt is four.")),
    "call without tools": Dialogue([user("Is it warm there?")], assistant("", tool_calls=[CALL])),
    "call": Dialogue([user("Is it warm there?")], assistant(None, tool_calls=[CALL]), [TOOL]),
    "tool": Dialogue(
        [user("Is it warm?"), assistant(None, tool_calls=[CALL]), TOOL_SAYS],
        assistant("It is mild."),
        [TOOL],
    ),
    "spaces": Dialogue(
        [user("Repeat :  it is n't so .")], assistant("It is n't so , is it ?  No  , it 's not ! I 'm , you 're .")
    ),
    "other characters": Dialogue([user("Übersetze „日本語“ 🙂")], assistant("“Japanese” — naïve? 🎉")),
}
TOPICS = ("the sea", "an old friend", "your work", "a train, late at night")
"""What the pretrained model writes about."""
