"""Every page of the site in Chromium, on a wide screen and on a phone."""
import functools
import http.server
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest
from chromium import CHROMIUM

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "docs/_build/html"
INPUTS = ("docs", "nbs", "mlops_nb", "conf", "resources", "README.md", "databricks.yml")
SIZES = {"wide": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def needed_tools():
    for package in ("furo", "playwright"):
        if importlib.util.find_spec(package) is None: pytest.skip(f"{package} is missing: make install-docs")
    if CHROMIUM is None: pytest.skip("no Chromium: apt-get install chromium")


def is_current() -> bool:
    "Whether `make docs` has built the site after the last change of what it is made from."
    if not (BUILT / "index.html").exists(): return False
    built = (BUILT / "index.html").stat().st_mtime
    files = [file for name in INPUTS for file in [ROOT / name, *(ROOT / name).rglob("*")] if file.is_file()]
    generated = (ROOT / "docs/_build", ROOT / "docs/pages")
    return all(file.stat().st_mtime <= built for file in files if "__pycache__" not in file.parts
               and not any(file.is_relative_to(folder) for folder in generated))


def build(state: Path, folder: Path) -> Path:
    "Build the site from the runs of a state; a warning is an error."
    arguments = ["-q", "-W", "--keep-going", "-j", "2", "-d", folder / "doctrees", "docs", folder / "html"]
    environment = os.environ | {"MLOPS_STATE": str(state)}
    built = subprocess.run([sys.executable, "-m", "sphinx", *arguments], cwd=ROOT, env=environment, text=True,
                           capture_output=True, timeout=300)
    assert built.returncode == 0, built.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def site(request, tmp_path_factory) -> Path:
    "The folder of the built site: that of `make docs` if it is current, otherwise one from the trained state."
    if is_current(): return BUILT
    return build(request.getfixturevalue("trained"), tmp_path_factory.mktemp("site"))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *details): ...


@pytest.fixture(scope="module")
def address(site) -> str:
    "The address of a server with the site."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


FACTS = """() => ({
    heading: document.querySelector("article h1, article h2")?.textContent ?? "",
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    empty: [...document.images].filter(i => !i.complete || i.naturalWidth === 0).map(i => i.src),
    without_text: [...document.querySelectorAll("article img")].filter(i => !i.alt).map(i => i.src),
    links: [...document.querySelectorAll("a[href]")].map(a => a.getAttribute("href")),
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    executed: document.querySelectorAll("div.execution").length,
    pictures: document.querySelectorAll("article img").length,
    folded: document.querySelectorAll("details.hide:not([open])").length,
})"""


@pytest.fixture(scope="module")
def opened(browser, address, site) -> tuple[dict[str, dict], list[str]]:  # size -> page -> facts; faults
    "Open every page of the site, in one size and then in the other."
    page, faults = browser.new_context(viewport=SIZES["wide"]).new_page(), []
    facts = {size: {} for size in SIZES}

    def fault(text: str, is_fault: bool = True) -> None:
        if is_fault: faults.append(f"{page.url}: {text}")

    page.on("console", lambda message: fault(message.text, message.type == "error"))
    page.on("pageerror", lambda error: fault(str(error)))
    page.on("request", lambda request: fault(f"requests {request.url}", not request.url.startswith((address, "data:"))))
    page.on("response", lambda response: fault(f"{response.status} {response.url}", response.status >= 400))
    for name in sorted(file.relative_to(site).as_posix() for file in site.rglob("*.html")):
        if name.startswith("_"): continue  # files of Sphinx
        page.goto(address + name, wait_until="load")
        for size in SIZES:
            page.set_viewport_size(SIZES[size])
            facts[size][name] = page.evaluate(FACTS)
    page.context.close()
    return facts, faults


@pytest.fixture(params=list(SIZES))
def pages(request, opened) -> dict[str, dict]:  # page -> facts
    "What every page holds in one size."
    return opened[0][request.param]


def test_no_page_has_an_error_or_asks_another_site(opened):
    assert opened[1] == []


def test_every_page_has_a_heading_fits_and_shows_its_pictures(pages):
    assert len(pages) > 40
    without_heading = {name for name, page in pages.items() if not page["heading"]}
    assert without_heading <= {"search.html"}  # it gets its heading with the results
    assert {name: page["overflow"] for name, page in pages.items() if page["overflow"] > 0} == {}
    assert {name: page["empty"] for name, page in pages.items() if page["empty"]} == {}
    assert {name: page["without_text"] for name, page in pages.items() if page["without_text"]} == {}


def test_links_inside_the_site_lead_to_a_page_and_a_place_on_it(opened, address):
    pages, broken = opened[0]["wide"], set()
    for name, page in pages.items():
        for link in page["links"]:
            target, anchor = urldefrag(urljoin(address + name, link))
            if not target.startswith(address): continue
            other = unquote(urlsplit(target).path).lstrip("/")
            if other.endswith(".html") and other not in pages: broken.add((name, link))
            elif anchor and unquote(anchor) not in pages.get(other, {"ids": []})["ids"]: broken.add((name, link))
    assert not broken


def test_notebooks_show_results_of_runs_with_their_code_folded(opened):
    train, ingest = (opened[0]["wide"][f"pages/notebooks/{name}.html"] for name in ("06_train", "02_ingest"))
    assert train["pictures"] >= 2 and train["folded"] >= 3 and train["executed"]
    assert ingest["folded"] > 5 and ingest["executed"]


def test_a_person_gets_from_the_landing_page_to_a_function(browser, address):
    for size, viewport in SIZES.items():
        page = browser.new_context(viewport=viewport).new_page()
        page.goto(address)
        if size == "phone": page.click("label.nav-overlay-icon, .nav-overlay-icon label")
        page.locator(".sidebar-tree").get_by_role("link", name="Reference", exact=True).click()
        page.locator("article").get_by_role("link", name="workflow", exact=False).first.click()
        page.locator("dt.sig", has_text="trigger_day").first.wait_for(timeout=10_000)
        page.goto(f"{address}search.html?q=trigger_day")
        page.locator("#search-results a", has_text="trigger_day").first.wait_for(timeout=10_000)
        page.context.close()
