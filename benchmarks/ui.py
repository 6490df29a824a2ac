"""The page: how soon it can be used, how soon it shows a picture, a cached answer, and what a preview costs.

The first three are measured in headless Chromium, started beforehand; they are left out where there is none.
Times depend on what else the machine does: seconds of CPU are printed beside them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from miniflux.apps.ui import form
from miniflux.apps.ui.launch import blocks
from miniflux.apps.ui.routes import COOKIE, as_url
from miniflux.apps.ui.site import opened
from miniflux.sampling import Moment

SESSION = "benchmark" * 4
ROUNDS = 3  # the first one also reads everything from the disk
USABLE = "return document.querySelectorAll('.mf-figure, #mf-draw:enabled, .mf-lora').length === 3"
DRAWN = """const image = document.querySelector('.mf-image');
return Boolean(image?.src.includes('/studio/picture/') && image.complete && image.naturalWidth);"""
torch.set_num_threads(1)


def until(what: Callable[[], Any]) -> Any:
    while not (value := what()):
        time.sleep(0.02)
    return value


def show(what: str, seconds: float, limit: str, note: str = "") -> None:
    print(f"{what:<44} {seconds:8.3f} s   {limit:<8} {note}", flush=True)


def in_a_browser() -> None:
    """`miniflux ui` from nothing to a picture."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        print("no Chromium: the page itself is not measured")
        return
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        for _ in range(ROUNDS):
            _once(browser)
    finally:
        browser.quit()


def _once(browser: Any) -> None:
    """One server, from its start to its first picture on the page."""
    note = "s of CPU, without the browser's"
    browser.get("about:blank")  # nobody asks the server for anything yet
    begin = time.monotonic()
    server = subprocess.Popen([sys.executable, "-m", "miniflux", "ui"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found is not None
        show("the server answers", time.monotonic() - begin, "", f"{_cpu(server.pid):.1f} {note}")
        browser.get(found[0])
        until(lambda: browser.execute_script(USABLE))
        show("the page can be used", time.monotonic() - begin, "< 6 s", f"{_cpu(server.pid):.1f} {note}")
        browser.execute_script("document.querySelector('#mf-draw').click()")
        until(lambda: browser.execute_script(DRAWN))
        show("the first nano picture is on it", time.monotonic() - begin, "< 8 s", f"{_cpu(server.pid):.1f} {note}")
    finally:
        server.terminate()
        server.wait()


def _cpu(pid: int) -> float:
    """Seconds of CPU that a process has used (Linux)."""
    try:
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    except OSError:
        return float("nan")
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def in_this_process() -> None:
    """A cached answer in the page's handler, and previews against steps."""
    from miniflux.apps.ui.handlers import Handlers

    web: Any = SimpleNamespace(cookies={COOKIE: SESSION})
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder)) as site:
        _, controls = blocks(site)
        handlers = Handlers(site, controls)
        given = {component: component.value for component in controls.settings.values()}
        given |= {controls.loras: form.rows(site.shelf(SESSION), "nano-dev"), controls.lock: True}
        times: list[float] = []
        for _ in range(31):
            begin = time.perf_counter()
            handlers.draw(given, web)
            times.append(time.perf_counter() - begin)
            for job in site.shelf(SESSION).jobs:
                job.wait()
        assert site.history.listed(SESSION)[0].cached
        show("a cached answer in the handler (median)", median(times[1:]), "< 0.1 s", f"slowest {max(times[1:]):.3f} s")

        moments: list[Moment] = []
        stamps: list[float] = []

        def watch(_: int, moment: Moment) -> None:
            moments.append(moment)
            stamps.append(time.perf_counter())

        request = form.request_from({**handlers.values(given), "seed": "9"}, site.shelf(SESSION), site.listed)
        with site.models.use(request) as pipe:
            for size in (128, 256):
                moments.clear()
                stamps.clear()
                pipe.generate("a red circle", seed=size, width=size, height=size, steps=20, watch=watch)
                steps = [b - a for a, b in pairwise(stamps)]
                previews: list[float] = []
                for moment in moments:
                    begin = time.perf_counter()
                    as_url(pipe.preview(moment, size, size, "table"))  # as `Models.draw` does
                    previews.append(time.perf_counter() - begin)
                step, preview = median(steps), median(previews)
                share = f"{100 * preview / step:.1f} % of a step of {1000 * step:.1f} ms"
                show(f"a preview at {size}x{size} (median)", preview, "< 5 %", share)


if __name__ == "__main__":
    in_this_process()
    in_a_browser()
