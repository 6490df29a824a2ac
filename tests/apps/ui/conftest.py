"""One page and one browser for all tests of this folder. Without Chromium they are skipped, and say so."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from miniflux.apps.ui.launch import Page, served
from miniflux.apps.ui.site import opened

T = TypeVar("T")
PATIENCE = 60.0  # seconds; what takes that long has failed, on however busy a machine


def found(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page, served from this process."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        with opened(folder, waiting=3) as site, served(site, port=None) as page:
            yield page


def browser() -> webdriver.Chrome:
    """Headless Chromium that can reach nothing but this machine, and knows nobody yet."""
    chromium, chromedriver = found("chromium", "chromium-browser", "google-chrome"), found("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("needs Chromium and its driver (Debian, Ubuntu: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,1000"),
        *("--disable-background-networking", "--disable-component-update", "--no-first-run"),
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(chromedriver))


class Tab:
    """A tab with the page in it, and what people do there."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver, self.url = driver, url
        driver.set_script_timeout(PATIENCE)

    def open(self) -> Tab:
        self.driver.get(self.url)
        return self.ready()

    def ready(self) -> Tab:
        self.until(lambda: all(map(self.all, (".mf-figure", "#mf-draw", ".mf-lora", "#mf-lock input"))), "the page")
        return self

    def resized(self, width: int, height: int = 900) -> Tab:
        """The window as large as that; below 600 pixels it is a phone's."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        return self

    def box(self, selector: str) -> dict[str, float]:
        """Where an element is in the window."""
        self.one(selector)
        return self.js("return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", selector)

    def in_view(self, selector: str) -> bool:
        """Whether the middle of an element is in the window, and nothing lies over it."""
        return self.js(
            """const found = document.querySelector(arguments[0]); if (!found) return false;
            const box = found.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
            const top = box.width && box.height ? document.elementFromPoint(x, y) : null;
            return Boolean(top) && found.contains(top);""",
            selector,
        )

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.until(lambda: self.all(selector), selector)[0]

    def until(self, what: Callable[[], T], name: str = "") -> T:
        """Wait for something to be there, or true."""
        end = time.monotonic() + PATIENCE
        while True:
            value = what()
            if value:
                return value
            assert time.monotonic() < end, f"waited {PATIENCE} s for {name}; the page says {self.message!r}"
            time.sleep(0.03)

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    @property
    def message(self) -> str:
        return self.js("return document.querySelector('.mf-message')?.textContent ?? ''")

    @property
    def pictures(self) -> list[str]:
        """Ids in the history, newest first."""
        return self.js("return [...document.querySelectorAll('.mf-tiles > [data-id]')].map((tile) => tile.dataset.id)")

    @property
    def jobs(self) -> list[str]:
        return self.js("return [...document.querySelectorAll('.mf-job')].map((job) => job.innerText)")

    def value(self, name: str) -> str:
        return self.js(
            "return document.querySelector(`#mf-${arguments[0]} textarea, #mf-${arguments[0]} input[type=number], "
            "#mf-${arguments[0]} input`).value",
            name,
        )

    def fill(self, name: str, text: str | float) -> Tab:
        """Write into a control, as typing would, but at once."""
        self.type_into(f"#mf-{name} textarea, #mf-{name} input[type=number], #mf-{name} input", str(text))
        return self

    def type_into(self, selector: str, text: str) -> None:
        self.one(selector)
        self.js(
            """const field = document.querySelector(arguments[0]);
            const kind = field.tagName === "TEXTAREA" ? HTMLTextAreaElement : HTMLInputElement;
            field.focus();
            Object.getOwnPropertyDescriptor(kind.prototype, "value").set.call(field, arguments[1]);
            for (const event of ["input", "change"]) field.dispatchEvent(new Event(event, {bubbles: true}));
            field.blur();""",
            selector,
            text,
        )

    def choose(self, name: str, option: str) -> Tab:
        """Take an option of a list."""
        field = self.one(f"#mf-{name} input")
        self.js("arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus()", field)
        field.click()
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(option)
        field.send_keys(Keys.ENTER)
        return self

    def press(self, selector: str) -> Tab:
        button = self.one(selector)
        self.js("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", button)
        return self

    def when_loaded(self, selector: str, act: str = "target.click()") -> Tab:
        """Load the page again, and do something in the moment in which an element comes into being."""
        source = f"""window.acted = 0;
        new MutationObserver(() => {{
          const target = document.querySelector({json.dumps(selector)});
          if (!target || window.acted++) return;
          {act};
        }}).observe(document, {{childList: true, subtree: true}});"""
        added = self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
        self.driver.get(self.url)
        self.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
        self.until(lambda: self.js("return window.acted"), selector)
        return self

    @property
    def asked(self) -> int:
        """How many events the server has answered since the page was loaded."""
        return self.js("return performance.getEntriesByType('resource').filter((x) => /predict$/.test(x.name)).length")

    def drop(self, *files: Path) -> Tab:
        """Give the page files, as its field for files does."""
        self.js("document.querySelector('.mf-message').textContent = ''")
        field = self.until(lambda: self.all("#mf-files input[type=file]"), "the field for files")[0]
        field.send_keys("\n".join(map(str, files)))
        self.until(lambda: self.message, "an answer to the files")
        return self

    def draw(self, button: str = "#mf-draw", more: int = 1) -> list[str]:
        """Press a button and wait for so many new pictures; their ids, newest first."""
        before = self.pictures
        self.press(button)
        self.until(lambda: len(self.pictures) >= len(before) + more and not self.jobs, f"{more} pictures")
        return [id for id in self.pictures if id not in before]

    def details(self) -> dict[str, str]:
        """The settings of the chosen picture."""
        return self.until(
            lambda: self.js(
                "return Object.fromEntries([...document.querySelectorAll('.mf-facts dt')].map((name) => "
                "[name.textContent, name.nextSibling.textContent]))"
            ),
            "the settings",
        )

    def fetch(self, url: str) -> bytes:
        """What the browser gets from an address, with its cookies."""
        data: list[int] = self.driver.execute_async_script(
            "const done = arguments[1]; fetch(arguments[0]).then((reply) => reply.arrayBuffer()).then((data) => "
            "done([...new Uint8Array(data)]), (error) => done([]))",
            url,
        )
        return bytes(data)

    def console(self) -> list[str]:
        """Errors in the browser's console since it was last asked."""
        return [line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]

    def requests(self) -> list[str]:
        """Addresses that were asked for since this was last asked."""
        told = [json.loads(line["message"])["message"] for line in self.driver.get_log("performance")]
        return [one["params"]["request"]["url"] for one in told if one["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="session")
def opened_tab(page: Page) -> Iterator[Tab]:
    driver = browser()
    yield Tab(driver, page.url).open()
    driver.quit()


@pytest.fixture
def tab(opened_tab: Tab) -> Tab:
    """The tab that the tests share, with quick settings and a seed that stays."""
    opened_tab.js("document.querySelectorAll('.mf-lora input:checked').forEach((box) => box.click())")
    if not opened_tab.js("return document.querySelector('#mf-lock input').checked"):
        opened_tab.press("#mf-lock input")
    return opened_tab.fill("prompt", "a red circle on a blue background").fill("steps", 2).fill("images", 1)


@pytest.fixture
def stranger(page: Page) -> Iterator[Tab]:
    """The page in the browser of somebody else."""
    driver = browser()
    yield Tab(driver, page.url).open()
    driver.quit()


@pytest.fixture
def gate(page: Page) -> Iterator[threading.Event]:
    """While it is closed, runs stay after their first step, until they are cancelled; opened at the end."""
    draw, event = page.site.queue.draw, threading.Event()

    def held(request: Any, step: Any) -> Any:
        def told(*arguments: Any) -> None:
            step(*arguments)
            while not event.wait(0.02):
                step(*arguments)

        return draw(request, told)

    page.site.queue.draw = held
    yield event
    event.set()
    page.site.queue.draw = draw
