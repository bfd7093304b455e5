"""The page of a method."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

import facts
from facts import Facts
from peftcore.cli.inspection.show import TAGS
from prose import as_html, inline

MARKS = {
    True: ("checked against", "its tests compare it with the numbers of other code"),
    False: ("equation only", "its tests compare it with its equation, and with no other code"),
}
RELATED = "Its parts, the methods that its text names, and those of its category that act in the same way."


def page(method: Facts) -> str:
    """The page, as Markdown with tables in HTML."""
    return "\n\n".join([_front(method), *_body(method)]) + "\n"


def page_of(name: str) -> str | None:
    """The address of the page of a method, from that of another one."""
    found = facts.named(name)
    return f"{found.name}.html" if found else None


def badge(method: Facts) -> str:
    """Whether its tests compare it with other code."""
    mark, meaning = MARKS[method.checked]
    kind = mark.replace(" ", "-")
    return f'<span class="mark {kind}" title="{meaning}">{mark}</span>'


def _front(method: Facts) -> str:
    title = method.title.replace('"', "")
    return f'---\ntitle: "{title}"\ndescription: "{method.heading}"\n---'


def _body(method: Facts) -> Iterable[str]:
    sections = method.shown.sections
    lead, _, rest = sections.pop("").partition("\n\n")
    yield f"# {html.escape(method.title, quote=False)}"
    yield _identity(method)
    yield f'<div class="method-text">\n<p class="lead">{inline(_joined(lead))}</p>\n{as_html(rest, page_of)}\n</div>'
    for heading, text in sections.items():
        yield f"## {heading}"
        yield f'<div class="method-text">\n{as_html(text, page_of)}\n</div>'
    yield "## Try it"
    yield f"On {method.host}, with options that suit its size. Any model with the same roles works."
    yield f"```python\n{method.snippet}```"
    yield "## Where it acts"
    yield f'<div class="diagram">\n{method.drawing}\n</div>'
    yield _acts(method)
    yield "## Options"
    yield _options(method)
    yield "## What trains"
    yield _budgets(method)
    yield "## What it can do"
    yield _abilities(method)
    yield "## Related methods"
    yield _related(method)


def _joined(lines: str) -> str:
    return " ".join(lines.split())


def _identity(method: Facts) -> str:
    """Name, category, mark and paper, in a line."""
    link = method.shown.link
    paper = f'<a href="{link}">arXiv {method.info.paper}</a>' if link.startswith("https:") else html.escape(link)
    category = f'<a href="index.html#{method.info.category}">{method.info.category}</a>'
    also = f"<span>also called <code>{', '.join(method.cls.aliases)}</code></span>" if method.cls.aliases else ""
    parts = [
        f"<code>{method.name}</code>",
        badge(method),
        category,
        paper,
        f"<span>{method.info.distribution}</span>",
        also,
    ]
    return f'<p class="identity">{" ".join(filter(None, parts))}</p>'


def _acts(method: Facts) -> str:
    targets = ", ".join(f"<code>{each}</code>" for each in method.shown.targets) or "what its options say"
    source = f'<code class="source">{html.escape(method.source)}</code>'
    return f"<p>By default at {targets}. How it acts: {method.way}. The code: {source}.</p>"


def _options(method: Facts) -> str:
    rows = [
        (
            f"<code>{each.name}</code>",
            html.escape(each.type),
            html.escape(each.default_text) if each.required else f"<code>{html.escape(each.default_text)}</code>",
            "<br>".join(filter(None, [inline(each.description), html.escape(each.rule)])),
        )
        for each in method.shown.options
    ]
    return _table(("option", "type", "default", ""), rows, "options")


def _budgets(method: Facts) -> str:
    if not method.budgets:
        return "Its options say what it trains, or it has no place in the models that are planned here."
    total = facts.sizes()
    rows = [(host, f"{count:,}", share(count, total[host])) for host, count in method.budgets.items()]
    return "Values that train with default options, in models that people know:\n\n" + _table(
        ("model", "trained", "of the model"), rows, "numbers"
    )


def share(count: int, total: int) -> str:
    """A share in percent, with two digits that count."""
    return f"{100 * count / total:.2g} %" if count else "0"


def _abilities(method: Facts) -> str:
    tags = method.cls.tags
    rows = [(meaning, "yes" if vars(tags)[name] else "no") for name, meaning in TAGS.items()]
    return _table(("", ""), [*rows, *((meaning, html.escape(words)) for meaning, words in method.shown.remarks())])


def _related(method: Facts) -> str:
    links = [
        f'<a href="{each.name}.html" title="{html.escape(each.heading)}">{html.escape(each.title)}</a>'
        for each in facts.related(method)
    ]
    return f'<p class="related">{" ".join(links) or "None."}</p>\n\n{RELATED}'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """In HTML, since what stands in it is no Markdown."""
    heads = "".join(f"<th>{each}</th>" for each in head) if any(head) else ""
    lines = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    top = f"<thead><tr>{heads}</tr></thead>\n" if heads else ""
    return f'<div class="scrolls {kind}">\n<table>\n{top}<tbody>\n{lines}\n</tbody>\n</table>\n</div>'
