"""A chat template that would run without an end, or write without a bound, ends with a message that names it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import make_tokenizer

from remax_lightning.data import templates
from remax_lightning.data.chat_templates import ChatRenderer
from remax_lightning.data.preparation import Recipe
from remax_lightning.data.templates import TemplateLimitError, run_template
from remax_lightning.errors import DataError, UserError
from remax_lightning.types import Conversation

resource = pytest.importorskip("resource")

LOOP = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
GROWS = "{% set all = namespace(s='xxxxxxxx') %}{% for i in range(64) %}{% set all.s = all.s ~ all.s %}{% endfor %}"
CALLS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
ENDLESS = {
    "loops": LOOP,
    "calls": CALLS,
    "powers in C": "{% set n = messages|length * 10 %}{{ n ** (n ** 8) }}",
    "in one row only": "{% if messages[0].content == '1+1=' %}" + LOOP + "{% endif %}{{ messages[0].content }}",
}
LARGE = {
    "text that doubles": GROWS,
    "repeated text": "{{ 'x' * 10**11 }}",
    "padded text": "{{ 'x'.ljust(10**11) }}",
    "a filter": "{{ 'x'|center(10**11) }}",
    "replaced text": "{% set a = 'x' * 1000000 %}{{ a.replace('x', a) }}",
    "much text": "{% for i in range(60) %}{{ 'x' * 1000000 }}{% endfor %}",
}


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Limits that a test can wait for; those of the process must be the same afterwards."""
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.3)
    monkeypatch.setattr(templates, "MAX_MEMORY", 2**28)
    before = (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM))
    yield
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def rendered(template: str, content: str = "1+1=") -> str:
    conversation = Conversation([{"role": "user", "content": content}], where="rows.jsonl, line 1")
    return ChatRenderer(make_tokenizer(chat_template=template)).prompt(conversation)


@pytest.mark.slow(0.3)
@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("case", ENDLESS)
def test_a_template_without_an_end_is_stopped(case: str) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=r"^rows.jsonl, line 1: the chat template was stopped: it runs for more than"):
        rendered(ENDLESS[case])
    assert time.monotonic() - started < 60  # without the limit it would take days


@pytest.mark.slow(0.3)
@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("case", LARGE)
def test_a_template_without_a_bound_is_stopped(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_SECONDS", 30)  # a loaded machine fills memory slowly
    with pytest.raises(UserError, match=r"was stopped: it (takes more memory|writes 60,000,000 char)"):
        rendered(LARGE[case])


@pytest.mark.usefixtures("_short", "no_garbage_search")
def test_other_rows_and_other_errors_are_as_before() -> None:
    assert rendered(ENDLESS["in one row only"], "2+2=") == "2+2="
    with pytest.raises(DataError, match="refuses message 0"):
        rendered("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}")


@pytest.mark.slow(0.3)
@pytest.mark.usefixtures("_short")
def test_so_it_is_in_a_thread() -> None:
    """Where no signal arrives."""
    said: list[str] = []

    def render() -> None:
        try:
            rendered(LOOP)
        except UserError as error:
            said.append(str(error))

    thread = threading.Thread(target=render)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert "it runs for more than" in said[0]


@pytest.mark.slow
@pytest.mark.usefixtures("_short")
def test_time_is_that_of_one_row_in_a_batch() -> None:
    """A batch may take longer than the limit, and rows may be slow between two templates."""
    renderer = ChatRenderer(make_tokenizer(chat_template="{{ messages[0].content }}"))

    def render(row: dict[str, Any], where: str) -> Any:
        time.sleep(0.25)
        return renderer.prompt(Conversation([{"role": "user", "content": row["prompt"]}], where=where))

    recipe: Any = Recipe(render, lambda examples: examples, tuple)  # type: ignore[arg-type]
    assert recipe.rendered([({"prompt": f"{i}+1="}, "") for i in range(4)]) == [f"{i}+1=" for i in range(4)]


@pytest.mark.slow(0.3)
@pytest.mark.usefixtures("_short")
def test_a_batch_with_an_endless_row_ends() -> None:
    renderer = ChatRenderer(make_tokenizer(chat_template=ENDLESS["in one row only"]))

    def render(row: dict[str, Any], where: str) -> Any:
        return renderer.prompt(Conversation([{"role": "user", "content": row["prompt"]}], where=where))

    recipe: Any = Recipe(render, lambda examples: examples, tuple)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="b: the chat template was stopped"):
        recipe.rendered([({"prompt": "2"}, "a"), ({"prompt": "1+1="}, "b")])


@pytest.mark.slow
def test_an_alarm_of_the_users_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rung: list[int] = []
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.1)
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        assert run_template(lambda: "x") == "x"
        with pytest.raises(TemplateLimitError):
            run_template(lambda: str(time.sleep(1)))
        assert not rung or signal.getitimer(signal.ITIMER_REAL)[0] == 0
        time.sleep(0.5)
        assert rung == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
