"""TensorBoard in a headless browser, for tests of what people see."""

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import pytest

WAIT = 60_000  # milliseconds, for a slow machine


def chromium():
    """The path of the browser; the test is skipped where it or its driver is missing."""
    pytest.importorskip("playwright.sync_api", reason="there is no playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium")
    return path


@contextmanager
def open_board(logdir):
    """TensorBoard of a folder of events.

    Yields:
        A page of a browser, and the address of TensorBoard without a tab: ``page.goto(f"{address}/#scalars")``.
    """
    path = chromium()
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=WAIT)
    with _tensorboard(logdir) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            page = browser.new_page(viewport={"width": 1600, "height": 1200})
            page.set_default_timeout(WAIT)
            yield page, address
        finally:
            browser.close()


@contextmanager
def _tensorboard(logdir):
    """A server that shows what the folder holds now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--load_fast", "false", "--reload_interval", "5"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + WAIT / 1000
        while not _has_runs(address):
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                raise RuntimeError(f"TensorBoard shows nothing of {logdir}: {server.communicate()[0]}")
            time.sleep(0.2)
        yield address
    finally:
        server.kill()
        server.communicate()


def _has_runs(address):
    try:
        with urllib.request.urlopen(f"{address}/data/runs", timeout=5) as answer:
            return answer.read().strip() != b"[]"
    except (urllib.error.URLError, OSError):
        return False


def pixels_of(screenshot, colour):
    """How many pixels of a screenshot have a colour, given as ``"rgb(66, 80, 102)"``."""
    from PIL import Image

    pixels = np.asarray(Image.open(BytesIO(screenshot)).convert("RGB")).astype(int)
    wanted = [int(number) for number in re.findall(r"\d+", colour)[:3]]
    return int((np.abs(pixels - wanted).max(-1) <= 2).sum())


def coordinates(path):
    """The points of an SVG path of straight lines, shape (points, 2)."""
    numbers = [float(number) for number in re.findall(r"-?[\d.]+(?:e-?\d+)?", path)]
    return np.array(numbers).reshape(-1, 2)
