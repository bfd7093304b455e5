"""A figure as part of a page. Its colours follow the theme of the page, its text remains text, and its points show
numbers."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import asdict
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from peftcore_lab.reports.plots import LIGHT

THEMED = {colour: f"var(--{name})" for name, colour in asdict(LIGHT).items()}
"""The variable of the page's theme for each colour of the light palette, in which figures are drawn."""
ENTRY = re.compile(r"entry-(\d+)-")
REFERENCE = re.compile(r"#([^)\s]+)\)?$")


def inline(figure: Figure, name: str, title: str, description: str, tips: Mapping[int, str]) -> str:
    """Return an ``<svg>`` element that fits its container.

    Args:
        name: a name that is unique on the page; ids are made from it.
        title: the subject of the chart, for screen readers.
        description: the content of the chart, for screen readers.
        tips: the tooltips of the marks of entries, by number of the entry.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        _plain_names(element)
    _drop(root, {"metadata", "style"})
    wanted = {found[1] for element in root.iter() for found in map(REFERENCE.search, element.attrib.values()) if found}
    for element in list(root.iter()):
        _mark(element, wanted, tips)
        element.attrib = {key: _shorter(value) for key, value in element.attrib.items()}
    _announce(root, name, title, description)
    return ElementTree.tostring(root, encoding="unicode")


def _plain_names(element: ElementTree.Element) -> None:
    """Remove the namespaces, which HTML does not need."""
    element.tag = element.tag.rpartition("}")[2]
    element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    if element.tag not in ("text", "tspan"):
        element.text = (element.text or "").strip()
    element.tail = (element.tail or "").strip()


def _drop(element: ElementTree.Element, tags: set[str]) -> None:
    for child in list(element):
        if child.tag in tags:
            element.remove(child)
        else:
            _drop(child, tags)


def _mark(element: ElementTree.Element, wanted: set[str], tips: Mapping[int, str]) -> None:
    """Remove an element's id unless another element refers to it. The id of an entry's mark becomes a data attribute
    and a tooltip."""
    identity = element.get("id")
    if identity is None or identity in wanted:
        return
    del element.attrib["id"]
    if found := ENTRY.match(identity):
        element.set("data-entry", found[1])
        tip = ElementTree.Element("title")
        tip.text = tips[int(found[1])]
        element.insert(0, tip)


def _shorter(value: str) -> str:
    """Return a shorter value: numbers are rounded to hundredths, fonts are left to the page, and colours become
    variables of its theme."""
    value = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), value)
    value = re.sub(r"font: (\S+px) [^;]*", r"font-size: \1", value)
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: THEMED.get(colour[0], colour[0]), value)


def _announce(root: ElementTree.Element, name: str, title: str, description: str) -> None:
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", title)
    root.set("aria-describedby", f"{name}-description")
    about = ElementTree.Element("desc", {"id": f"{name}-description"})
    about.text = description
    root.insert(0, about)
