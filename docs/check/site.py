"""`make docs-check`: opens every page of site/ in headless Chromium, from the folder, as a reader without a network.

Fails when a page has an error in its console, asks a network for something, or is wider than a phone; when a filter of
the methods does not filter, or search does not find. Screenshots are written to build/docs-check, to be looked at.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from browser import Page

ROOT = Path(__file__).parents[2]
SITE = ROOT / "site"
PICTURES = ROOT / "build/docs-check"
PHONE, DESK = (390, 844), (1280, 900)
SEEN = (
    "index",
    "start",
    "recipes",
    "moving-from-peft",
    "concepts",
    "choose",
    "methods/index",
    "methods/lora",
    "methods/unipelt",
    "api/peftcore",
)
"""Pages of which pictures are taken."""
WIDTH = "document.scrollingElement.scrollWidth"
SHOWN = "[...document.querySelectorAll('.methods > li:not([hidden])')].filter(each => each.offsetParent).length"

FIRST_HIT = """new Promise(done => {
  let tries = 0;
  (function look() {
    const hit = document.querySelector(".md-search-result__link")?.href;
    hit || tries++ > 600 ? done(hit) : setTimeout(look, 100);
  })();
})"""
"""The address of what search finds first, once it has; nothing after a minute."""


def pages() -> list[str]:
    """Addresses inside the site, without the ending; but for the one that a server shows for what it has not."""
    found = [path.relative_to(SITE).as_posix().removesuffix(".html") for path in sorted(SITE.rglob("*.html"))]
    return [page for page in found if page != "404"]


def address(page: str) -> str:
    return f"{(SITE / page).as_uri()}.html"


def quiet_and_narrow(tab: Page) -> Iterator[str]:
    """What is wrong with single pages."""
    tab.size(*PHONE)
    for page in pages():
        tab.heard.clear()
        tab.open(address(page))
        width = tab.run(WIDTH)
        if width > PHONE[0]:
            yield f"{page} is {width} pixels wide on a phone of {PHONE[0]}"
        yield from (f"{page}: {each}" for each in tab.heard)


def filters(tab: Page) -> Iterator[str]:
    """Whether the figure of methods shows what is chosen, by keyboard too, and keeps it in the address."""
    tab.size(*DESK)
    tab.open(address("methods/index"))
    every = tab.run(SHOWN)
    counts = {}
    for name in ("category", "mergeable", "per_row", "needs_data", "mark", "host", "budget"):
        tab.run(f"document.forms['method-filter'].elements['{name}'].focus()")
        tab.press("ArrowDown", 40)
        counts[name] = tab.run(SHOWN)
        tab.run("document.forms['method-filter'].reset(), new Promise(done => setTimeout(done, 50))")
    yield from (f"the filter {name} shows {n} of {every}" for name, n in counts.items() if not 0 < n < every)
    if tab.run(SHOWN) != every:
        yield "reset does not show all methods again"
    tab.run("document.forms['method-filter'].elements['name'].focus()")
    tab.type("lora")
    found = tab.run(SHOWN)
    if not 0 < found < every:
        yield f"the name lora shows {found} of {every}"
    kept = tab.run("location.href")
    tab.open("about:blank")
    tab.open(kept)
    if tab.run(SHOWN) != found:
        yield "a filtered page does not come back from its address"


FOUND = {
    "Kronecker": "/methods/",
    "quantized model": "/quantization.html",
    "LoraConfig": "/moving-from-peft.html",
    "ComfyUI": "/recipes.html",
    "serving": "/serving.html",
    "target modules": "/(start|roles|concepts|moving-from-peft).html",
    "merge": "/(index|start|several|serving|moving-from-peft|quantization|files).html",
}
"""Words, and a pattern of the page that search is to find first: guides, before methods and records."""


def search(tab: Page) -> Iterator[str]:
    """Whether search finds first what a reader of these words wants."""
    tab.size(*DESK)
    for words, wanted in FOUND.items():
        tab.open("about:blank")
        tab.open(address("index"))
        tab.run("document.querySelector('[data-md-component=search-query]').focus()")
        tab.type(words)
        found = tab.run(FIRST_HIT) or ""
        if not re.search(wanted, found):
            yield f"search for {words} finds {found or 'nothing'} first"
    tab.picture(PICTURES / "search.png")


def pictures(tab: Page) -> None:
    """For people: each in light and dark, on a desk and a phone."""
    for page in [each for each in SEEN if each in pages()]:
        for scheme in ("light", "dark"):
            for device, size in (("desk", DESK), ("phone", PHONE)):
                tab.size(*size)
                tab.run("localStorage.clear()")  # the theme keeps what it showed last
                tab.open("about:blank")
                tab.scheme(scheme)
                tab.open(address(page))
                tab.run("new Promise(done => setTimeout(done, 500))")  # the theme looks at the scheme late
                tab.picture(PICTURES / f"{page.replace('/', '-')}-{scheme}-{device}.png", whole=device == "phone")


def main() -> int:
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None:
        print("docs-check needs Chromium: apt-get install chromium")
        return 1
    tab = Page(executable)
    try:
        wrong = [*quiet_and_narrow(tab), *filters(tab), *search(tab)]
        tab.open(address("index"))
        pictures(tab)
    finally:
        tab.close()
    print("\n".join(wrong) or f"{len(pages())} pages, filters and search: nothing wrong.")
    print(f"Pictures to look at are in {PICTURES.relative_to(ROOT)}.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
