"""Take the picture of a report that the README shows: the top of the page, and its table of samples.

`remax report runs/demo/logs/remax/version_0`, then `python benchmarks/draw_report.py
runs/demo/logs/remax/version_0/report.html`; needs Chromium and its driver, and selenium, which the test extras install.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

LIMIT = 300_000
"""Largest picture in bytes: it lies in the repository and is loaded with the README."""

WIDTH = 1280
TOP, TABLE, GAP = 1095, 640, 10
"""Pixels of the top of the page and of the table that are shown, and between them."""


def photograph(page: Path, sort: str) -> Any:
    """Return both parts of the page in one picture; the table is sorted by the column `sort`, downwards.

    Raises:
        SystemExit: if there is no page or no Chromium.
    """
    from PIL import Image
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    driver = shutil.which("chromedriver")
    if driver is None:
        raise SystemExit("there is no chromedriver (Debian: apt-get install chromium chromium-driver)")
    if not page.is_file():
        raise SystemExit(f"there is no page {page}; write it with remax report")
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        options.add_argument("--hide-scrollbars")
        browser = webdriver.Chrome(options=options, service=Service(driver))
        try:
            browser.get(page.resolve().as_uri())
            parts = [_part(browser, "scrollTo(0, 0)", TOP)]
            browser.find_element("css selector", f"[data-name={sort}] button").click()
            parts.append(_part(browser, "document.getElementById('samples').scrollIntoView()", TABLE))
        finally:
            browser.quit()
    picture = Image.new("RGB", (WIDTH, TOP + GAP + TABLE), "#8b95a3")
    picture.paste(parts[0], (0, 0))
    picture.paste(parts[1], (0, TOP + GAP))
    return picture


def _part(browser: Any, scroll: str, height: int) -> Any:
    from PIL import Image

    size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_script(scroll)
    return Image.open(BytesIO(browser.get_screenshot_as_png())).convert("RGB")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description="Take a picture of the page that remax report wrote.")
    parser.add_argument("page", type=Path, help="the page")
    parser.add_argument("--output", type=Path, default=Path("docs/report.png"), help="default: %(default)s")
    parser.add_argument("--sort", default="kl", help="column that the samples are sorted by (default: %(default)s)")
    options = parser.parse_args(arguments)
    picture = photograph(options.page, options.sort)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(256).save(options.output, optimize=True)  # a palette: a third of the bytes
    if options.output.stat().st_size > LIMIT:
        raise SystemExit(f"{options.output} has {options.output.stat().st_size} bytes, more than {LIMIT}")
    print(f"wrote {options.output} ({options.output.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
