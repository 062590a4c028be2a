"""Small chat templates that behave as the templates of published models do, each in what it is known for."""

from __future__ import annotations

from typing import Any

from conftest import make_tokenizer

KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}"
    "<s>{{ m.role }}\n{{ m.content }}</s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""Skips roles that it does not know, without a word (Qwen, Phi-3, GLM)."""

STRICT_ROLES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}] {{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
"""Takes user and assistant in turns, and trims (Gemma, Mistral)."""

THINKING = (
    "{% if tools %}<s>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</s>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set r = m.reasoning_content if m.reasoning_content is string else '' %}{% set c = m.content or '' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}"
    "<s>assistant\n{% if loop.last %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>"
    "{% endfor %}</s>\n"
    "{% elif m.role == 'tool' %}<s>tool\n{{ m.content | tojson }}</s>\n"
    "{% else %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n<think>\n"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""Opens a thought in the generation prompt, writes that of the last turn alone, and reads tools (Qwen3, DeepSeek)."""

OPENS_THOUGHT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<s>assistant\n{{ (m.content or '').split('</think>')[-1] }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>"
    "{% endfor %}</s>\n{% else %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n"
    "{% if no_think %}{{ '<think>\n\n</think>\n\n' }}{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
"""Opens a thought in the generation prompt and takes it out of every answer (R1 distill); closes it on demand (QwQ)."""

MOVED_SYSTEM = (
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content %}"
    "{% elif m.role == 'user' %}"
    "<u>{% if loop.last and ns.system %}{{ ns.system + '\n\n' }}{% endif %}{{ m.content }}</u>"
    "{% else %}{{ ' ' + m.content }}</s>{% endif %}{% endfor %}"
)
"""Writes the system message into the last turn, if that is the user's (Mistral Nemo)."""

PARTS = (
    "{% for m in messages %}<s>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""Reads lists of parts; text itself is no such list, and its letters have no type (vision models)."""

AS_TEXT = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""Writes whatever content there is, lists and null as a program prints them (Llama 3)."""

CONCATENATING = (
    "{% for m in messages %}{{ m.role + ': ' + (m.content or '') + '\n' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name + call.function.arguments + '\n' }}{% endfor %}"
    "{% endfor %}"
)
"""Adds strings up, and stumbles over everything else with a TypeError (DeepSeek V3)."""

TURN_ENDS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<turn>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Ends turns with another token than the tokenizer's EOS (Llama 3 base); for `with_turn_token`."""


def with_turn_token(**options: Any) -> Any:
    """A tokenizer whose special token `<turn>` has no name of its own; EOS is `</s>` as ever."""
    from tokenizers import AddedToken

    tokenizer = make_tokenizer(chat_template=TURN_ENDS, **options)
    tokenizer.add_tokens([AddedToken("<turn>", special=True)], special_tokens=True)
    return tokenizer


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
