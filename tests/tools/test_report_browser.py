"""The report's page in a real Chromium: it is drawn, it asks the network for nothing, and its controls work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import wait_until
from tools.browser import chromium, requests_of
from tools.report_run import HOSTILE, planted_curves, sample, write_events, write_run, write_samples

from remax_lightning.tools.report import main
from remax_lightning.tools.report.charts import smooth
from remax_lightning.tools.report.run import Curve

pytestmark = pytest.mark.slow

VALIDATION = ["sampled, validation", "greedy, validation"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return main([str(write_run(tmp_path_factory.mktemp("runs") / "version_0"))])


@pytest.fixture
def page(browser: Any, report: Path) -> Any:
    """The page, just loaded."""
    browser.get_log("browser"), requests_of(browser)
    open_report(browser, report)
    return browser


def run(page: Any, script: str) -> Any:
    return page.execute_script(f"return {script}")


def open_report(browser: Any, report: Path) -> None:
    """Open a page and wait until its scripts have run: once, a large one was empty when the driver returned."""
    run(browser, "window.isLeft = true")
    browser.get(report.as_uri())
    assert wait_until(lambda: run(browser, "!window.isLeft && document.readyState == 'complete'"))


def shown(page: Any) -> list[dict[str, str]]:
    """The rows of the table: the numbers by column, and the three texts."""
    return run(
        page,
        """[...document.querySelectorAll('#rows tbody')].map((body) => {
          const names = [...document.querySelectorAll('#columns th')].map((head) => head.dataset.name);
          const cells = [...body.querySelectorAll('.numbers td')].map((cell) => cell.textContent);
          const texts = [...body.querySelectorAll('.text')].map((text) => text.textContent);
          return {...Object.fromEntries(names.map((name, i) => [name, cells[i]])),
                  prompt: texts[0], response: texts[1], greedy: texts[2]};
        })""",
    )


def put(page: Any, name: str, value: str) -> None:
    """Type into a field of the filter as a person does."""
    element = page.find_element("name", name)
    element.clear() if element.tag_name == "input" else None
    element.send_keys(value)


def press(page: Any, selector: str) -> None:
    page.find_element("css selector", selector).click()


def emulate(page: Any, **media: Any) -> None:
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def every_page(page: Any) -> list[dict[str, str]]:
    rows = shown(page)
    while run(page, "!document.getElementById('next').disabled"):
        press(page, "#next")
        rows += shown(page)
    return rows


def expect(page: Any, holds: Callable[[], bool]) -> None:
    assert wait_until(holds), page.find_element("id", "count").text


def test_it_loads_without_an_error_and_without_the_network(page: Any, report: Path) -> None:
    assert page.get_log("browser") == []
    assert requests_of(page) == [report.as_uri()]
    assert page.title.endswith("/version_0 · ReMax run")


def test_a_request_and_an_error_would_be_seen(browser: Any, tmp_path: Path) -> None:
    """Without the page's policy, and with what the page does not have."""
    other = tmp_path / "other.html"
    other.write_text("<img src='http://127.0.0.1:9/seen.png'><script>nowhere()</script>")
    browser.get_log("browser"), requests_of(browser)
    browser.get(other.as_uri())
    assert "http://127.0.0.1:9/seen.png" in requests_of(browser)
    assert any("nowhere" in entry["message"] for entry in browser.get_log("browser"))


def test_every_chart_is_drawn_where_its_numbers_are(page: Any) -> None:
    titles = run(page, "[...document.querySelectorAll('figcaption')].map((each) => each.textContent)")
    assert titles[0] == "Mean reward of the sampled and the greedy responses"
    assert {"Mean reward against KL, nats per token", "Seconds of an optimizer step, by phase"} <= set(titles)
    charts = run(
        page,
        """[...document.querySelectorAll('svg.chart')].map((chart) => ({
          label: chart.getAttribute('aria-label'),
          numbers: [...chart.querySelectorAll('path')].map((path) => path.getAttribute('d')).join(' ')
            + [...chart.querySelectorAll('circle')].map((dot) => dot.getAttribute('cy')).join(' '),
          inside: [...chart.querySelectorAll('path, circle')].every((each) => {
            const [a, b] = [each.getBBox(), chart.viewBox.baseVal];
            return a.x >= 0 && a.y >= 0 && a.x + a.width <= b.width && a.y + a.height <= b.height;
          }),
        }))""",
    )
    assert len(charts) == len(titles) == 19
    assert page.find_element("css selector", ".told").text.startswith(
        "On this run batch_mean needs 0.57 of the seconds"
    )
    for chart in charts:
        assert chart["inside"], chart["label"]
        assert chart["numbers"], chart["label"]
        assert "NaN" not in chart["numbers"], chart["label"]
    first = "svg.chart"
    assert run(page, f"document.querySelectorAll('{first}')[0].querySelectorAll('.band').length") == 2
    assert run(page, f"document.querySelectorAll('{first}')[0].querySelectorAll('circle').length") == 2 * 4


def test_hovering_a_chart_tells_its_numbers(page: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    chart = page.find_element("css selector", "svg.chart")
    ActionChains(page).move_to_element(chart).perform()
    step, *lines = page.find_element("id", "tooltip").text.split("\n")
    points = planted_curves()["train/reward"]
    steps, means, deviations = smooth(Curve([at + 1 for at, _ in points], [value for _, value in points]))
    place = steps.index(int(step.removeprefix("step ")))
    assert 90 <= steps[place] <= 110
    label, mean, _, deviation = lines[0].rsplit(" ", 3)
    assert label == "sampled, training:"
    assert float(mean) == pytest.approx(means[place], rel=1e-3)
    assert float(deviation) == pytest.approx(deviations[place], rel=1e-2)
    assert [line.split(":")[0] for line in lines[1:]] == ["greedy, training", *VALIDATION]
    ActionChains(page).move_to_element(page.find_element("tag name", "h1")).perform()
    assert not page.find_element("id", "tooltip").is_displayed()


def test_the_filters_leave_the_right_rows(page: Any) -> None:
    assert page.find_element("id", "count").text == "69 of 69 samples"
    put(page, "reward-from", "2")
    put(page, "reward-to", "2.55")
    assert sorted(row["reward"] for row in shown(page)) == ["2", "2.1", "2.2", "2.3", "2.4", "2.5"]
    put(page, "step-to", "30")
    assert sorted(row["reward"] for row in shown(page)) == ["2", "2.1", "2.2", "2.3"]
    press(page, "button[type=reset]")
    expect(page, lambda: len(shown(page)) == 20)
    put(page, "stage", "validation")
    assert [row["response"] for row in shown(page)] == [f"answer {i}" for i in range(5)]
    assert {row["step"] for row in shown(page)} == {"100"}
    press(page, "button[type=reset]")
    put(page, "text", "GREEDY 63")
    assert [row["greedy"] for row in shown(page)] == ["greedy 63"]
    put(page, "text", "nothing has this")
    assert shown(page) == []
    assert page.find_element("id", "count").text == "0 of 69 samples"


def test_paging_shows_every_sample_once(page: Any) -> None:
    assert run(page, "document.getElementById('previous').disabled")
    put(page, "stage", "train")
    rows = every_page(page)
    assert len(rows) == 64
    assert {row["reward"] for row in rows} == {f"{i / 10:g}" for i in range(64)}
    assert page.find_element("id", "page").text == "page 4 of 4"


def test_a_column_sorts_both_ways(page: Any) -> None:
    put(page, "stage", "train")
    for selector, order in (("descending", range(63, -1, -1)), ("ascending", range(64))):
        press(page, "[data-name=reward] button")
        assert run(page, "document.querySelector('#columns [aria-sort]').ariaSort") == selector
        assert [row["reward"] for row in shown(page)] == [f"{i / 10:g}" for i in list(order)[:20]]


def colors(page: Any, number: int) -> list[tuple[float, ...]]:
    """Background of the tokens of a train sample: red, green, blue and opacity, each from 0 to 1."""
    put(page, "text", f"question {number}?")
    put(page, "stage", "train")
    return run(
        page,
        """[...document.querySelectorAll('#rows tbody [data-i]')].map((token) => {
          const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
          canvas.fillStyle = getComputedStyle(token).backgroundColor;
          canvas.fillRect(0, 0, 1, 1);
          return [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
        })""",
    )


def test_shading_follows_the_tokens_numbers_and_switches(page: Any) -> None:
    by_kl = colors(page, 63)
    assert len(by_kl) == len("answer 63") + 1  # the end is a token, too
    assert all(token[3] > 0 for token in by_kl)
    assert all(red > blue for red, _, blue, _ in by_kl[0::2])  # planted: +0.01 and -0.01 in turn
    assert all(blue > red for red, _, blue, _ in by_kl[1::2])
    press(page, "input[value=token_advantages]")
    high, low = colors(page, 63), colors(page, 0)
    assert all(green > red for red, green, _, _ in high)  # 5.3, and -1
    assert all(red > green for red, green, _, _ in low)
    assert high[0][3] > 3 * low[0][3]
    assert "advantage" in page.find_element("id", "legend").text
    press(page, "#shading input[value='']")
    assert {token[3] for token in colors(page, 63)} == {0}
    assert not page.find_element("id", "legend").is_displayed()


def test_hovering_a_token_tells_its_numbers(page: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    put(page, "text", "question 63?")
    ActionChains(page).move_to_element(page.find_element("css selector", "#rows [data-i='1']")).perform()
    expected = ["token 2", "KL, nats per token: -0.01", "advantage: 5.3"]
    assert page.find_element("id", "tooltip").text.split("\n") == expected


def test_markup_in_a_sample_is_shown_as_text(page: Any) -> None:
    put(page, "text", "onerror")
    assert [row["response"] for row in shown(page)] == [HOSTILE]
    assert [row["prompt"] for row in shown(page)] == [HOSTILE]
    assert [row["greedy"] for row in shown(page)] == [HOSTILE]
    assert run(page, "document.querySelectorAll('#samples img, #samples b, #samples script').length") == 0
    assert run(page, "window.hacked") is None
    run(page, "document.querySelector('details').open = true")
    assert "<i>not markup</i>" in page.find_element("tag name", "pre").text


def test_characters_of_several_tokens_are_one_piece(browser: Any, tmp_path: Path) -> None:
    several = sample(0, response="a数b", tokens=["a", "", "", "数", "b", ""], token_kl=[0.1, 0.2, None, 0.4, 0.5, 0.6])
    write_samples(tmp_path, [several | {"token_advantages": [1, 2, 3, 4, 5, 6]}])
    open_report(browser, main([str(tmp_path)]))
    tokens = "[...document.querySelectorAll('#rows [data-i]')]"
    assert run(browser, f"{tokens}.map((token) => token.textContent)") == ["a", "数", "b", ""]
    texts = run(browser, f"{tokens}.map(tokenText)")
    assert texts[1].split("\n") == ["tokens 2 to 4, one character", "KL, nats per token: 0.6", "advantage: 3"]
    assert texts[3].startswith("token 6, special or the end")


def test_dumps_without_tokens_are_shown_without_shading(browser: Any, tmp_path: Path) -> None:
    old = {key: value for key, value in sample(3).items() if "token" not in key}
    write_samples(tmp_path, [old, old | {"reward": None, "kl": None, "greedy_response": None}])
    browser.get_log("browser")
    open_report(browser, main([str(tmp_path)]))
    assert browser.get_log("browser") == []
    assert [row["response"] for row in shown(browser)] == ["answer 3"] * 2
    assert sorted(row["reward"] for row in shown(browser)) == ["0.3", "–"]  # noqa: RUF001
    assert not browser.find_element("id", "shading").is_displayed()
    assert run(browser, "document.querySelectorAll('svg.chart').length") == 0


def test_thousands_of_long_samples_do_not_slow_the_page(browser: Any, tmp_path: Path) -> None:
    """Draws one page of rows whatever the number of samples; the deadlines only notice a page that hangs."""
    text = " ".join(f"word{i}" for i in range(300))
    tokens = [f"word{i}{' ' if i < 299 else ''}" for i in range(300)]
    figures = {"tokens": tokens, "token_kl": [math.sin(i) for i in range(300)], "token_advantages": [0.5] * 300}
    write_samples(tmp_path, [sample(i, response=text, **figures) for i in range(2000)])
    started = time.perf_counter()
    open_report(browser, main([str(tmp_path)]))
    assert time.perf_counter() - started < 60
    assert len(shown(browser)) == 20
    assert run(browser, "document.querySelectorAll('#rows [data-i]').length") == 20 * 300
    milliseconds = run(
        browser,
        """(() => {
          const started = performance.now();
          for (const name of ['reward', 'kl', 'step']) document.querySelector(`[data-name=${name}] button`).click();
          document.getElementsByName('text')[0].value = 'question 19';
          render();
          return performance.now() - started;
        })()""",
    )
    assert browser.find_element("id", "count").text == "111 of 2,000 samples"
    assert milliseconds < 60_000


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(page: Any, scheme: str) -> None:
    """Contrast by WCAG 2: at least 4.5 for text, in both schemes."""
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    names = ("ink", "soft", "accent")
    read = "getComputedStyle(document.documentElement).getPropertyValue('--{}')"
    grounds = [run(page, read.format(name)) for name in ("page", "card")]
    for name in names:
        for ground in grounds:
            assert contrast(run(page, read.format(name)), ground) >= 4.5, (name, ground)
    emulate(page, features=[])
    assert grounds == (["#f6f7f9", "#fff"] if scheme == "light" else ["#12161c", "#1a2028"])


def contrast(first: str, second: str) -> float:
    def luminance(color: str) -> float:
        digits = color.strip().lstrip("#")
        digits = "".join(digit * 2 for digit in digits) if len(digits) == 3 else digits
        shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_it_prints_with_charts_and_without_controls(page: Any) -> None:
    emulate(page, media="print")
    assert not page.find_element("id", "controls").is_displayed()
    assert page.find_element("css selector", "svg.chart").is_displayed()
    assert page.find_element("css selector", "#rows tbody").is_displayed()
    for name in (".tile", "figure"):
        assert page.find_element("css selector", name).value_of_css_property("padding-left") == "12.8px"
    emulate(page, media="")
    assert page.execute_cdp_cmd("Page.printToPDF", {})["data"]


# How it looks


WIDTHS = (1280, 400)


def resize(page: Any, width: int) -> None:
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


@pytest.fixture
def resized(page: Any) -> Iterator[Any]:
    yield page
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_texts_of_charts_have_one_size_in_every_section(resized: Any) -> None:
    """A section of one chart, of two and of three, on a wide page and a narrow one, also after it is made narrower."""
    for width in WIDTHS:
        resize(resized, width)
        charts = run(
            resized,
            """[...document.querySelectorAll('svg.chart')].map((chart) => {
              const scale = chart.getBoundingClientRect().width / chart.viewBox.baseVal.width;
              const size = (text) => parseFloat(getComputedStyle(text).fontSize);
              return [...chart.querySelectorAll('text')].map((text) => size(text) * scale);
            })""",
        )
        sections = run(resized, "[...document.querySelectorAll('.charts')].map((section) => section.children.length)")
        assert {2, 3} <= set(sections)
        sizes = [size for chart in charts for size in chart]
        assert len(sizes) > 5 * len(charts)
        assert min(sizes) == pytest.approx(11, rel=0.01)
        assert max(sizes) == pytest.approx(11, rel=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_page_does_not_scroll_sideways(resized: Any, scheme: str) -> None:
    emulate(resized, features=[{"name": "prefers-color-scheme", "value": scheme}])
    resize(resized, 400)
    assert run(resized, "document.documentElement.scrollWidth") <= 400
    texts = run(
        resized, "[...document.querySelectorAll('#rows .text')].map((text) => text.getBoundingClientRect().right)"
    )
    assert max(texts) <= 400
    others = "[...document.querySelectorAll('figure, table, td')].map((each) => each.getBoundingClientRect().right)"
    assert max(run(resized, others)) <= 400
    emulate(resized, features=[])


def test_axis_labels_do_not_overlap(resized: Any) -> None:
    for width in WIDTHS:
        resize(resized, width)
        overlapping = run(
            resized,
            """[...document.querySelectorAll('svg.chart')].flatMap((chart) => {
              const boxes = [...chart.querySelectorAll('text')].map((text) => text.getBoundingClientRect());
              const beside = (a, b) => a.right <= b.left || b.right <= a.left;
              const met = (a, b) => !beside(a, b) && a.top < b.bottom - 2 && b.top < a.bottom - 2;
              const some = boxes.some((a, i) => boxes.slice(i + 1).some((b) => met(a, b)));
              return some ? [chart.getAttribute('aria-label')] : [];
            })""",
        )
        assert overlapping == []


def marks(page: Any, name: str) -> str:
    """The marks drawn in a text of the first row: 0 is the prompt, 1 the sampled and 2 the greedy response."""
    drawn = run(
        page,
        f"""[...document.querySelectorAll('#rows .text')[{name}].querySelectorAll('.blank')].map((blank) =>
          JSON.parse(getComputedStyle(blank, '::before').content))""",
    )
    return "".join(drawn)


def test_blanks_around_a_text_are_visible(browser: Any, tmp_path: Path) -> None:
    tokens = {"response": " so ", "tokens": [" so", " ", ""], "token_kl": [0.1] * 3, "token_advantages": [0.1] * 3}
    write_samples(tmp_path, [sample(0, prompt="\n\tone two \n", greedy_response="\n", **tokens)])
    open_report(browser, main([str(tmp_path)]))
    assert marks(browser, "0") == "↵→·↵"
    assert marks(browser, "1") == "··"
    assert marks(browser, "2") == "↵"
    [row] = shown(browser)
    assert (row["prompt"], row["response"], row["greedy"]) == ("\n\tone two \n", " so ", "\n")  # what is copied
    write_samples(tmp_path, [sample(0, greedy_response="\u200b\ufeff", prompt="", **tokens)])
    open_report(browser, main([str(tmp_path)]))
    assert marks(browser, "2") == "◌◌"
    assert shown(browser)[0]["prompt"] == "empty"


def test_the_policy_before_training_has_rows_of_its_own(page: Any, browser: Any, tmp_path: Path) -> None:
    offered = "[...document.querySelectorAll('[name=stage] option:not([hidden])')].map((option) => option.textContent)"
    assert run(page, offered) == ["all", "train", "validation"]
    curves = {"train/reward": [(1, 0.5), (2, 0.6)], "train/grad_norm": [(1, 1.0)], "val/reward": [(0, 0.25), (2, 0.75)]}
    write_events(tmp_path, curves)
    write_samples(
        tmp_path, [sample(i, stage="validation", step=step) for step in (0, 2) for i in range(2)], "validation"
    )
    open_report(browser, main([str(tmp_path)]))
    put(browser, "stage", "before training")
    assert [(row["step"], row["stage"]) for row in shown(browser)] == [("0", "before training")] * 2
    assert "from 0.25 before training" in browser.find_element("css selector", ".tiles").text
    assert run(browser, "stepName(0)") == "step 0, before training"
    # what never trained may be any checkpoint
    other = tmp_path / "validated"
    write_samples(other, [sample(0, stage="validation", step=0)], "validation")
    open_report(browser, main([str(other)]))
    assert [row["stage"] for row in shown(browser)] == ["validation"]
    assert run(browser, "stepName(0)") == "step 0"


@pytest.mark.parametrize("steps", [1, 2, 40, 999])
def test_steps_on_the_axis_are_whole_and_begin_before_training(browser: Any, tmp_path: Path, steps: int) -> None:
    points = [(step, 0.5 + step / 1e4) for step in range(1, steps + 1)]
    curves = {"train/reward": points, "train/grad_norm": points, "val/reward": [(0, 0.1), (steps, 0.9)]}
    write_events(tmp_path, curves)
    open_report(browser, main([str(tmp_path)]))
    charts = run(
        browser,
        """[...document.querySelectorAll('svg.chart')].map((chart) =>
          [...chart.querySelectorAll('text[text-anchor=middle]')].slice(0, -1).map((text) => text.textContent))""",
    )
    assert len(charts) == 2
    assert charts[0][0] == charts[1][0] == "0"  # the norm of the gradient has no step 0 of its own
    assert all(label.replace(",", "").isdecimal() for chart in charts for label in chart)
    assert max(int(label.replace(",", "")) for label in charts[0]) >= 0.7 * steps
