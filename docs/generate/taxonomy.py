"""The page of all methods, as the survey has them: category, way of acting, method; with filters that a script serves.

The survey is arXiv 2410.19878. Its categories are ours; inside them, what a method acts on groups the methods, and that
is read off what they would do. Without the script, the page is the whole figure.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from itertools import groupby

import facts
from facts import Facts
from method_pages import MARKS, badge
from peftcore.cli.inspection.show import TAGS
from peftcore.contract.method import CATEGORIES

TITLES = {
    "additive": "New modules or vectors, added to those of the model",
    "reparameterized": "Updates of weights in a form with few parameters",
    "selective": "Some of the model's own parameters",
    "hybrid": "Several ways together",
    "quantized": "For quantized models",
    "multitask": "For several tasks, or from several adapters",
    "vision": "For models of images",
    "diffusion": "For models that make images",
}
FLAGS = {"mergeable": "merges", "per_row": "per sample", "needs_data": "needs data"}
"""Tags that can be filtered, and what stands on the method."""
SHARES = {"0.01": "0.01 %", "0.1": "0.1 %", "1": "1 %", "5": "5 %"}

INTRODUCTION = """
# Methods

The figure of the survey [arXiv 2410.19878](https://arxiv.org/abs/2410.19878), for what is installed here: its
categories, in each what the methods act on, and there the methods. The tests of methods that are *checked against*
other code compare them with its numbers; those of the others, *equation only*, have the equation alone. The number is
what trains with default options in the model that is chosen.
"""


def page() -> str:
    """The page: Markdown, with the figure in HTML."""
    return "\n\n".join([INTRODUCTION.strip(), _filters(), *map(_category, CATEGORIES), _nothing()]) + "\n"


def _filters() -> str:
    hosts = facts.sizes()
    groups = [
        _select("category", "Category", [("", "all"), *((each, each) for each in CATEGORIES)]),
        *(
            _select(name, label.capitalize(), [("", "any"), ("yes", "yes"), ("no", "no")])
            for name, label in FLAGS.items()
        ),
        _select("mark", "Mark", [("", "any"), *((mark, mark) for mark, _ in MARKS.values())]),
        _select("host", "Works on", [("", "any model"), *((each, each) for each in hosts)]),
        _select("budget", "Trains at most", [("", "any share"), *SHARES.items()]),
    ]
    search = '<label>Name <input type="search" name="name" autocomplete="off"></label>'
    lines = [search, *groups, '<button type="reset">Reset</button>']
    sizes = html.escape(json.dumps(hosts))
    status = f'<p id="method-count" role="status" aria-live="polite">{len(facts.every())} methods</p>'
    return "\n".join([f'<form id="method-filter" data-sizes="{sizes}" hidden>', *lines, "</form>", "", status])


def _select(name: str, label: str, options: Iterable[tuple[str, str]]) -> str:
    choices = "".join(f'<option value="{value}">{text}</option>' for value, text in options)
    return f'<label>{label} <select name="{name}">{choices}</select></label>'


def _category(category: str) -> str:
    members = sorted((each for each in facts.every() if each.info.category == category), key=lambda each: each.way)
    ways = [_way(way, list(found)) for way, found in groupby(members, key=lambda each: each.way)]
    body = "\n".join(ways) or '<p class="none">None is installed.</p>'
    return f'## {category} {{ #{category} }}\n\n<div class="category" data-category="{category}">\n' + (
        f"<p>{TITLES[category]}.</p>\n{body}\n</div>"
    )


def _way(way: str, members: list[Facts]) -> str:
    items = "\n".join(map(_method, members))
    return f'<div class="way">\n<p class="way-name">{way}</p>\n<ul class="methods">\n{items}\n</ul>\n</div>'


def _method(method: Facts) -> str:
    tags = vars(method.cls.tags)
    flags = {name: "yes" if tags[name] else "no" for name in FLAGS}
    data = {"name": f"{method.name} {method.title}".lower(), "category": method.info.category, **flags}
    data |= {"mark": MARKS[method.checked][0], "budgets": json.dumps(dict(method.budgets))}
    attributes = " ".join(f'data-{name.replace("_", "-")}="{html.escape(value)}"' for name, value in data.items())
    shown = [f'<span title="{TAGS[name]}">{label}</span>' for name, label in FLAGS.items() if tags[name]]
    return (
        f'<li {attributes}><a href="{method.name}.html">{html.escape(method.title)}</a> <code>{method.name}</code> '
        f'<span class="about">{html.escape(_about(method))}</span> '
        f'<span class="flags">{badge(method)} {" ".join(shown)} <span class="size"></span></span></li>'
    )


def _about(method: Facts) -> str:
    """What its first line says beside its name."""
    rest = method.heading.removeprefix(method.title).lstrip(":, ").rstrip(".")
    return rest[:1].upper() + rest[1:]


def _nothing() -> str:
    return '<p id="method-none" hidden>No method fits. Choose less, or reset.</p>'
