"""A report's page in Chromium, where it is installed: nothing is fetched, said or cut off.

The browser is spoken to by its own protocol through two pipes: no port, and nothing to install.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toys
from conftest import ROOT

from mpsl_dist.__main__ import main

sys.path.append(str(ROOT / "launch"))
import in_one_process

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
OPTIONS = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
OPTIONS += " disable-component-update disable-sync remote-debugging-pipe"


class Browser:
    """One page of a browser: asks by a pipe, answers and events by another."""

    def __init__(self, profile: Path) -> None:
        (taken, self.asks), (self.told, gives) = os.pipe(), os.pipe()
        pipes = f'exec "$@" 3<&{taken} 4>&{gives}'
        options = [*(f"--{word}" for word in OPTIONS.split()), f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            ["bash", "-c", pipes, "-", str(CHROMIUM), *options],
            pass_fds=(taken, gives),
            stderr=subprocess.DEVNULL,
        )
        for end in (taken, gives):
            os.close(end)
        self.buffer, self.number, self.events = b"", 0, list[dict[str, Any]]()
        self.session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        self.number += 1
        asked = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.asks, json.dumps(asked).encode() + b"\0")
        while (message := self._next()).get("id") != self.number:
            self.events.append(message)
        return message["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            got = os.read(self.told, 1 << 20)
            assert got, "the browser ended"
            self.buffer += got
        first, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(first)

    def value(self, expression: str) -> Any:
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        return self.call("Runtime.evaluate", **asked)["result"].get("value")

    def open(self, page: Path, width: int, scheme: str) -> None:
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=page.as_uri())
        self.value("new Promise(r => document.readyState == 'complete' ? r() : onload = r)")

    def close(self) -> None:
        self.process.kill()
        self.process.wait(20)
        for end in (self.asks, self.told):
            os.close(end)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two runs whose names and settings are long."""
    folder = tmp_path_factory.mktemp("report")
    for n in (1, 2):
        experiment = toys.experiment(
            name=f"a-name-without-a-blank-{n}" * 3,
            output=str(folder),
            method="centralized",
            model={"encoder": toys.ENCODER | {"depth": n}},
        )
        in_one_process.train(experiment)
    runs = [str(path.parent) for path in folder.glob("*/summary.json")]
    assert main(["report", *runs, "--out", str(folder / "page")]) == 0
    return folder / "page" / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_report_fits_its_window_and_says_nothing_to_the_console(
    page: Path, browser: Browser, width: int, scheme: str
) -> None:
    browser.events.clear()
    browser.open(page, width, scheme)
    browser.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert browser.value("document.querySelectorAll('figure, table').length") > 3
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("[...document.images].every(e => e.naturalWidth > 0)")
    by = {event["method"]: event["params"] for event in browser.events}
    assert not by.keys() & {
        "Runtime.consoleAPICalled",
        "Runtime.exceptionThrown",
        "Log.entryAdded",
    }
    asked = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]


def test_the_keyboard_reaches_all_that_scrolls_and_shows_where_it_is(
    page: Path, browser: Browser
) -> None:
    browser.open(page, 390, "light")
    inside = "document.querySelectorAll('a, .box, .scroll, summary').length"
    key = {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}
    for _ in range(browser.value(inside)):
        for event in ("keyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=event, **key)
        assert browser.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert browser.value("document.activeElement.tagName") == "SUMMARY"  # the last on the page
