"""A real Chromium without a window, which looks for nothing on the network: a page as people would see it."""

import json
import os
import shutil
from contextlib import contextmanager

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

BROWSER, DRIVER = "chromium", "chromedriver"
_LOAD_S_MAX = 30
_ARGUMENTS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


def why_no_browser():
    """Why there is none here; None if there is one."""
    missing = [name for name in (BROWSER, DRIVER) if shutil.which(name) is None]
    return f"there is no {' and no '.join(missing)}" if missing else None


@contextmanager
def chromium(directory):
    """A Browser with a profile of its own in a directory."""
    options = Options()
    options.binary_location = shutil.which(BROWSER)
    for argument in (*_ARGUMENTS, f"--user-data-dir={directory}"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which(DRIVER)))
    try:
        driver.set_page_load_timeout(_LOAD_S_MAX)
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    """One tab, and what it logged."""

    def __init__(self, driver):
        self._driver = driver

    def open(self, path, width, *, is_dark=False):
        """Load a file from the beginning, in a window so wide; what was logged before is forgotten."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self._driver.get("about:blank")
        self.console()
        self.requests()
        self._driver.get(path.as_uri())

    def run(self, script, *arguments):
        """What a piece of JavaScript returns in the page."""
        return self._driver.execute_script(script, *arguments)

    def console(self):
        """All that was written to the console, errors of the page and of what it may not load among them."""
        return [entry["message"] for entry in self._driver.get_log("browser")]

    def requests(self):
        """The address of everything that was asked for, but for what addresses themselves contain."""
        messages = [json.loads(entry["message"])["message"] for entry in self._driver.get_log("performance")]
        sent = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]
