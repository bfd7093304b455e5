"""Diagrams of methods: each is drawn, and what is marked in it is what the method says of itself."""

import functools
import importlib
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import peftcore

sys.path.append(str(Path(__file__).parents[2] / "docs" / "generate"))
diagram = importlib.import_module("diagram")
places = importlib.import_module("diagram_places")

svg = functools.cache(diagram.svg)

SVG = "{http://www.w3.org/2000/svg}"


def boxes(name: str) -> list[tuple[str, set[str]]]:
    """From top to bottom: the role of each box, and how it is marked."""
    found = ElementTree.fromstring(svg(name)).iter(f"{SVG}rect")
    return [(box.attrib["data-role"], set(box.attrib["class"].split())) for box in found if "data-role" in box.attrib]


def marked(name: str, *kinds: str) -> set[str]:
    """The roles of the boxes that carry a mark."""
    return {role for role, found in boxes(name) if found & set(kinds or ("trains", "acts"))}


@pytest.mark.slow
def test_every_method_is_drawn_and_marked() -> None:
    """In one test: the models are built once."""
    for info in peftcore.methods():
        name = f"{info.plugin}/{info.name}"
        assert marked(name), name
        root = ElementTree.fromstring(svg(name))
        assert info.name in root.findtext(f"{SVG}title", "")
        described, texts = root.findtext(f"{SVG}desc", ""), list(root.iter(f"{SVG}text"))
        told = {str(text.text) for text in texts}
        for mark in places.drawn(name).marks:
            assert mark.name in described, name
            assert mark.kind == "reads" or any(text.startswith(mark.name[:20]) for text in told), name
        height = float(root.attrib["viewBox"].split()[3])
        assert all(float(text.attrib["y"]) < height for text in texts), name
        assert max(len(text.text or "") for text in texts if text.get("x") == str(diagram.NOTES)) <= 29, name


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "hydralora", "glora", "galore", "custom_diffusion"])
def test_roles_of_the_target_are_marked(name: str) -> None:
    """Of those that the host has."""
    target, drawn = peftcore.method(name).target, places.drawn(name)
    wanted = [target] if isinstance(target, str) else target
    roles = {role for each in wanted for entry, _ in drawn.map.select(each) for role in places.parts(entry)}
    assert roles and marked(name) == roles


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("prompt_tuning", {"sequence"}),
        ("prefix_tuning", {"attn", "sequence", "shared"}),
        ("houlsby_adapter", {"attn.out", "mlp.down", "norm", "norm.final"}),
        ("lst", {"block", "shared"}),
        ("linear_probe", {"head"}),
        ("textual_inversion", {"embed"}),
        ("controlnet", {"mid_block", "up_blocks", "shared"}),
        ("unipelt", {"attn", "attn.q", "attn.v", "mlp.down", "shared"}),
        ("trainable_tokens", {"embed"}),
    ],
)
def test_acts_that_no_role_names(name: str, expected: set[str]) -> None:
    assert marked(name) - {"norm.final"} == expected - {"norm.final"}


def test_what_a_bypass_reads_is_marked_as_read() -> None:
    assert marked("parallel_adapter", "reads") == {"mlp.gate"}
    assert "in parallel to the branch" in diagram.svg("parallel_adapter")


def test_some_blocks_of_many() -> None:
    assert "block × 32, 1 of them changed" in diagram.svg("partial_k")


def test_norms_stand_where_the_model_has_them() -> None:
    """Behind the branches of BERT, in front of those of Llama."""

    llama, bert = ([role for role, _ in boxes(name)] for name in ("lora", "bitfit"))
    assert llama.index("norm") < llama.index("attn.q") < llama.index("attn") < llama.index("attn.out")
    assert bert.index("attn.out") < bert.index("norm") < bert.index("mlp.up")
