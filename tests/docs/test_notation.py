"""Equations of docstrings as MathML: read as they are meant, and nothing of them gets lost."""

import importlib
import inspect
import re
import sys
import unicodedata
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import peftcore

sys.path.append(str(Path(__file__).parents[2] / "docs" / "generate"))
notation = importlib.import_module("notation")

BACK = {
    "∑": "sum",
    "∏": "prod",
    "√": "sqrt",
    "⊗": "(x)",
    "⊙": "(o)",
    "\u2217": "*",
    "−": "-",
    "±": "+-",
    "≤": "<=",
    "≥": ">=",
}
BACK |= {"≠": "!=", "←": "<-", "→": "->", "\u223c": "~", "⋅": ".", "‖": "||", "\u2032": "'", "×": "x"}
"""What signs are written as. Written once more, so that a wrong sign does not translate itself back."""


def parsed(equation: str) -> ElementTree.Element:
    """Fails where it is not well-formed."""
    return ElementTree.fromstring(notation.mathml(equation))


def written(root: ElementTree.Element) -> str:
    """What a reader sees, in the signs of a docstring."""
    for radical in root.iter("msqrt"):
        radical.text = "√"
    return "".join(BACK.get(sign, letter(sign)) for sign in "".join(root.itertext()))


def letter(sign: str) -> str:
    """The name of a Greek one."""
    name = unicodedata.name(sign, "").replace("LAMDA", "LAMBDA")
    if not name.startswith("GREEK"):
        return sign
    return name.split()[-1].lower() if "SMALL" in name else name.split()[-1].title()


def signs(text: str) -> list[str]:
    """All but blanks, dots, and what only says where signs stand. Sorted: indices stand before primes or behind."""
    return sorted(re.sub(r"[\s_^{}`().·…]", "", re.sub(r"\b1e(-?\d)", r"10\1", text)))


def blocks() -> Iterator[tuple[str, str]]:
    """Indented lines of the docstrings of all methods."""
    for info in peftcore.methods():
        text = inspect.cleandoc(inspect.getmodule(peftcore.method(f"{info.plugin}/{info.name}")).__doc__ or "")
        for indented, lines in groupby(text.splitlines(), lambda line: line.startswith(" ")):
            if indented:
                yield info.name, "\n".join(lines)


EQUATIONS = [(name, block) for name, block in blocks() if not notation.is_code(block)]
X, B, S = "<mi>x</mi>", "<mi>b</mi>", '<mspace width="0.17em"/>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("b x", f"{B}{S}{X}"),
        ("x'", f"<msup>{X}<mrow><mo>\u2032</mo></mrow></msup>"),
        ("x_{t-1}", f"<msub>{X}<mrow><mi>t</mi><mo>−</mo><mn>1</mn></mrow></msub>"),
        ("x_t^T", f"<msubsup>{X}<mrow><mi>t</mi></mrow><mrow><mi>T</mi></mrow></msubsup>"),
        ("x_down", f"<msub>{X}<mrow><mi>down</mi></mrow></msub>"),
        ("x2", f"<msub>{X}<mn>2</mn></msub>"),
        ("x^-1", f'<msup>{X}<mrow><mo form="prefix" lspace="0" rspace="0em">−</mo><mn>1</mn></mrow></msup>'),
        ("tau~", '<mover accent="true"><mi>τ</mi><mo stretchy="false">~</mo></mover>'),
        ("x ~ b", f"{X}<mo>\u223c</mo>{B}"),
        ("x (x) b", f"{X}<mo>⊗</mo>{B}"),
        ("b(x)", f'{B}<mo form="prefix" stretchy="false">(</mo>{X}<mo form="postfix" stretchy="false">)</mo>'),
        ("x * b", f"{X}<mo>\u2217</mo>{B}"),
        ("x . b", f"{X}<mo>⋅</mo>{B}"),
        ("x <= b", f"{X}<mo>≤</mo>{B}"),
        ("sum_pq", "<msub><mo>∑</mo><mrow><mi>p</mi>" + S + "<mi>q</mi></mrow></msub>"),
        ("sqrt(x)", f"<msqrt>{X}</msqrt>"),
        ("1e-5", "<msup><mn>10</mn><mn>−5</mn></msup>"),
        ("dtheta", "<mi>d</mi><mi>θ</mi>"),
        ("1..x", f'<mn>1</mn><mo lspace="0" rspace="0">…</mo>{X}'),
        ("||x||", f'<mo form="prefix" stretchy="false">‖</mo>{X}<mo form="postfix" stretchy="false">‖</mo>'),
        ("x / rank", f"{X}<mo>/</mo><mi>rank</mi>"),
    ],
)
def test_one_formula(text: str, expected: str) -> None:
    assert notation.mathml(text) == f'<div class="equation"><div><math>{expected}</math></div></div>'


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("x trained, starting from b", "[x] trained, starting from [b]"),
        ("x = b / rank,   b zero", "[x=b/rank,]| [b] zero"),
        ("b [out, in] at first", "[b[out,in]] at first"),
        ("one absmax a row, 16 levels", "one absmax a row, 16 levels"),
        ("x with `option` on", "[x] with option on"),
        ("y   = x", "[y=x]"),
        ("post-norm hosts: x is the block's", "post-norm hosts: [x] is the block's"),
    ],
)
def test_words_are_no_formulas(line: str, shown: str) -> None:
    (line_,) = parsed(line)
    found = line_.text or ""
    for child in line_:
        inner = "".join(child.itertext())
        found += (f"[{inner}]" if child.tag == "math" else inner) + (child.tail or "")
    assert found.replace("\u2003\u2003", "|") == shown


def test_lines_stay_lines_and_code_stays_code() -> None:
    assert len(parsed("    x = b\n    b = x")) == 2
    code = '    with peftcore.call(model, k="a<b"): ...\n    f(x, y=1).y'
    assert parsed(code).tag == "pre"
    assert "".join(parsed(code).itertext()) == 'with peftcore.call(model, k="a<b"): ...\nf(x, y=1).y'


@pytest.mark.parametrize(("name", "block"), EQUATIONS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(EQUATIONS)])
def test_equations_of_methods(name: str, block: str) -> None:
    root = parsed(block)
    assert len(root) == len(block.splitlines())
    assert signs(written(root)) == signs(block)
    left = {word for each in root.iter("mi") for word in re.findall(r"\w+", each.text or "")}
    assert not left & {"alpha", "tau", "theta", "delta", "gamma", "beta", "Sigma", "mu", "pi", "sum", "sqrt"}
    assert not [each.text for each in root.iter() if each.tag != "code" and re.search(r"[_^`]\w", each.text or "")]
    for opening, closing in ("()", "[]", "{}"):
        assert block.count(opening) == block.count(closing), f"{name}: {opening} without {closing}"


PIECES = ["W", "x", "alpha", "lambda", "Sigma", "rank", "in", "sum_i", "12", "0.5", "1e-5", "3x3", "tau", "d", "é", "a"]
PIECES += [
    "_t",
    "_{t-1}",
    "^2",
    "^T",
    "'",
    "~",
    "sqrt(",
    "(x)",
    " (x) ",
    "||",
    "|",
    "<=",
    ">=",
    "->",
    "<-",
    "+-",
    "...",
]
PIECES += [*'()[]{}*/+-=<>.,;:&"\\#_^!?', " ", " ", "   ", "\n", "`k`"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_no_sign_gets_lost_whatever_it_says(text: str) -> None:
    """Brackets, quotes and scripts need not fit: each letter, digit and sign is shown."""
    text = re.sub(r"(\d)e(?=-?\d)", r"\1", text)
    assert signs(written(parsed(text))) == signs(text)
