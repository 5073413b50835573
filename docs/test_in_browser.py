"""The built site in a real browser: everything fits, nothing is missing, nothing complains. `make docs` runs it.

Screenshots of every page at both widths stand in `site-pictures/` afterwards, to be looked at.
"""

import functools
import http.server
import os
import shutil
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
SITE = ROOT / "site"
PICTURES = ROOT / "site-pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = (1280, 390)
ADDRESSES = sorted(path.relative_to(SITE).as_posix().removesuffix("index.html") for path in SITE.rglob("index.html"))

# What lies beyond the page or its own parent. Code may be longer than its box, which then scrolls; the frame around a
# word of code at the end of a line may stand out by 4 pixels.
TOO_WIDE = """() => {
  const page = document.documentElement.clientWidth;
  const found = document.documentElement.scrollWidth > page ? ["the page itself"] : [];
  for (const part of document.querySelectorAll("article *")) {
    const style = getComputedStyle(part);
    if (part.closest("pre, math, svg") || style.display === "inline" || style.position === "absolute") continue;
    const width = part.getBoundingClientRect().width, within = part.parentElement.getBoundingClientRect().width;
    const cut = part.tagName === "DIV" && part.scrollWidth > part.clientWidth + 4;
    if (width > 0 && (part.getBoundingClientRect().right > page + 1 || width > within + 1 || cut))
      found.push(`${part.tagName} ${part.className} ${width} in ${within}: ${part.textContent.trim().slice(0, 60)}`);
  }
  return found;
}"""


class Page(HTMLParser):
    """The anchors of a page and the addresses that it shows or links to."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.addresses = {""}, []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors.update(found[name] for name in ("id", "name") if found.get(name))
        self.addresses += [found[name] for name in ("href", "src") if found.get(name)]


@pytest.fixture(scope="module")
def server():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as control:
        if found is None and not Path(control.chromium.executable_path).exists():
            pytest.skip("no browser: install chromium, or run `.venv/bin/playwright install chromium`")
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # which Chromium does not start with as root
        running = control.chromium.launch(executable_path=found, args=sandbox)
        yield running
        running.close()


def test_there_is_a_site():
    assert len(ADDRESSES) > 30, "`make docs` builds it"


@pytest.mark.parametrize("width", WIDTHS)
def test_everything_fits_and_nothing_complains(server, browser, width):
    """Every page at the width of a laptop and of a telephone."""
    PICTURES.mkdir(exist_ok=True)
    complaints = []
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else ())
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "response", lambda answer: complaints.append(f"{answer.status} {answer.url}") if answer.status >= 400 else ()
    )
    page.on("request", lambda asked: () if asked.url.startswith((server, "data:")) else complaints.append(asked.url))
    for address in ADDRESSES:
        page.goto(server + address, wait_until="load")
        complaints += [f"{address or 'home'}: {what}" for what in page.evaluate(TOO_WIDE)]
        name = f"{address.strip('/').replace('/', '-') or 'home'}-{width}.jpg"
        page.screenshot(path=PICTURES / name, full_page=True, type="jpeg", quality=60)
    assert complaints == []


def test_every_link_within_the_site_leads_to_something():
    """To a file of the site, and to an anchor on it."""
    pages = {path: Page(path) for path in SITE.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        here = "/" + path.relative_to(SITE).as_posix().removesuffix("index.html")
        for address in page.addresses:
            there = urlsplit(urljoin(here, address))
            if there.scheme or there.netloc or path.name == "404.html":  # that one does not know where it is
                continue
            target = SITE / unquote(there.path).lstrip("/")
            target = target / "index.html" if target.is_dir() else target
            known = pages[target].anchors if target in pages else {""}
            if not target.exists() or unquote(there.fragment) not in known:
                dead.append(f"{here}: {address}")
    assert dead == []
