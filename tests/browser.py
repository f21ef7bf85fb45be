"""A real browser without a screen, for MLflow's UI."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = "needs Chromium and its driver (Debian: apt install chromium chromium-driver; Ubuntu: snap install chromium)"

_TIMEOUT_S = 90  # the UI is megabytes of script, and the machine may be busy with other tests


class Browser:
    """A window of Chromium."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self._driver = driver

    def open(self, address: str) -> None:
        """Go to an address; one that differs in its #... only is the same page to the browser, so it is left first."""
        self._driver.get("about:blank")
        self._driver.get(address)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self._driver.execute_script(f"return {script}")

    def wait_for(self, script: str) -> None:
        """Wait until a JavaScript expression is true."""
        try:
            WebDriverWait(self._driver, _TIMEOUT_S).until(lambda driver: driver.execute_script(f"return {script}"))
        except TimeoutException as error:
            raise AssertionError(f"{script} never came true on a page that says: {self.text()[:2000]}") from error

    def text(self) -> str:
        """All that can be read on the page."""
        return str(self.evaluate("document.body ? document.body.innerText : ''"))

    def wait_for_text(self, *texts: str) -> None:
        """Wait until all of these can be read."""
        for text in texts:
            self.wait_for(f"document.body.innerText.includes({text!r})")

    def tidy(self) -> None:
        """Close MLflow's announcements and its assistant, for good in this window."""
        self.evaluate("document.querySelectorAll('button[aria-label^=Close]').forEach(button => button.click())")

    def screenshot(self, file: Path) -> None:
        """Keep what is seen, as PNG."""
        self._driver.save_screenshot(str(file))


@contextmanager
def browsing(width: int = 1400, height: int = 1000) -> Iterator[Browser]:
    """A browser that is ended with the block."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for switch in (
        "--headless=new",
        f"--window-size={width},{height}",
        "--disable-dev-shm-usage",
        *(["--no-sandbox"] if os.getuid() == 0 else []),  # as root Chromium has none
    ):
        options.add_argument(switch)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def curves(number: int) -> str:
    """An expression that is true once a chart shows so many curves; MLflow may give two the same colour."""
    lines = "chart.querySelectorAll('.scatterlayer .js-line').length"
    return f"[...document.querySelectorAll('.js-plotly-plot')].some(chart => {lines} >= {number})"


def picture() -> str:
    """An expression that is true once a picture is shown whole."""
    return "[...document.images].some(image => image.naturalWidth > 300 && image.getBoundingClientRect().width > 100)"
