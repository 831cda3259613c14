"""A headless Chromium for tests of pages: opened from disk, with what it complained about."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --force-prefers-reduced-motion"
).split()

# Notes in each new page when the thread that draws it was busy for long, in ms.
_WATCH = """
window.busy = [];
new PerformanceObserver((list) => list.getEntries().forEach((entry) => busy.push(entry.duration)))
    .observe({ type: "longtask", buffered: true });
"""


def require() -> None:
    """Skip where there is no browser; in CI there has to be one."""
    if shutil.which("chromium") and shutil.which("chromedriver"):
        return
    if os.environ.get("CI") == "true":
        pytest.fail("there is no chromium: run tools/browser")
    pytest.skip("there is no chromium; tools/browser installs it on Debian")


class Browser:
    """One window."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, path: Path, *, ready: bool = True) -> None:
        """Show the file *path*, and wait until it says that it is complete."""
        self.driver.get(path.as_uri())
        if ready:
            self.wait("return document.documentElement.dataset.ready === 'true'")

    def run(self, script: str, *values: Any) -> Any:
        """What *script* returns."""
        return self.driver.execute_script(script, *values)

    def wait(self, script: str, seconds: float = 20) -> Any:
        """What *script* returns, once that is true."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"{script} stays {found}; {self.complaints()}"
            time.sleep(0.05)
        return found

    def size(self, width: int, height: int) -> None:
        """Give the page *width* by *height* CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def scheme(self, name: str) -> None:
        """Let the system prefer the colour scheme *name*."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def keys(self, *keys: str) -> None:
        """Press *keys*, one after the other, wherever the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def picture(self) -> bytes:
        """What is to be seen, as PNG."""
        return self.driver.get_screenshot_as_png()

    def complaints(self) -> list[str]:
        """What the console says, errors and warnings."""
        entries = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [str(entry["message"]) for entry in entries]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A new browser that keeps its files in *profile*."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    try:
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _WATCH})
        one = Browser(driver)
        one.size(1280, 800)
        yield one
    finally:
        driver.quit()
