"""A figure as part of a page: its colours are those of the page's theme, its text is text, its points show numbers."""

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
"""Figures are drawn in the light colours, each of which is used once."""
ENTRY = re.compile(r"entry-(\d+)-")
REFERENCE = re.compile(r"#([^)\s]+)\)?$")


def inline(figure: Figure, name: str, title: str, description: str, tips: Mapping[int, str]) -> str:
    """Return an ``<svg>`` element that fits its container.

    Args:
        name: unlike that of any other figure of the page; ids are made from it.
        title: the subject of the chart, for readers who do not see it.
        description: the content of the chart.
        tips: the texts of an entry's marks when a pointer rests on them.
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
    """Drop namespaces, of which HTML needs none."""
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
    """Drop ids unless something refers to them; those of an entry's marks become data."""
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
    """Shorten a value: hundredths of a pixel, the page's fonts, the theme's colours."""
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
