"""Equations of docstrings, which are plain text, as MathML: it needs no script and no font file.

How to write them. An equation stands indented in the docstring of a method's module.

* Letters are variables, longer words are upright (``s = alpha / rank``), Greek ones by name (``alpha``, ``Sigma``), and
  digits behind a letter are an index (``W2``). A blank multiplies (``B A x``), ``*`` does too, entry by entry or not;
  ``(o)`` is the product entry by entry, ``(x)`` Kronecker's, `` . `` the inner one. ``dW`` and ``dtheta`` are
  changes.
* ``W'`` ``x_t`` ``x_{t-1}`` ``W_up`` ``d^2`` ``R^-1`` ``R^T`` ``tau~`` ``tau^_t`` (a hat) ``sum_i`` ``prod_i``
  ``sqrt(d)`` ``|x|`` ``||V||`` ``1e-5``: without blanks inside.
* ``<=`` ``>=`` ``!=`` ``->`` ``<-`` ``+-`` ``...`` ``A ~ N(0, 1)`` are what they look like; ``A [rank, in]`` is the
  shape of A.
* Two blanks or more part statements. Words between or behind statements are words; options of a method, and all that is
  to stay as it is, stand in backticks.

What is not known is shown as it stands: nothing fails, and no sign gets lost.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from notation_nodes import Node, read, row

GAP = "\u2003\u2003 "
"""Between statements of a line; the line may break behind it."""


def mathml(equation: str) -> str:
    """The lines of an equation, as HTML: one ``<div>`` a line, in it formulas and words. Lines of Python stay code.

    Args:
        equation: the indented lines of a docstring, see above.
    """
    lines = [line.strip() for line in equation.splitlines() if line.strip()]
    if is_code(equation):
        code = "\n".join(line.removeprefix("    ").rstrip() for line in equation.splitlines() if line.strip())
        return f'<pre class="equation"><code>{escape(code, quote=False)}</code></pre>'
    return f'<div class="equation">{"".join(f"<div>{typeset(line)}</div>" for line in lines)}</div>'


def is_code(block: str) -> bool:
    """Whether indented lines of a docstring are an example in Python: calls, and blocks with a context."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of Python that it is not
            body = ast.parse("\n".join(line.strip() for line in block.splitlines())).body
    except (SyntaxError, ValueError):
        return False
    return bool(body) and all(isinstance(each, ast.With) or is_call(each) for each in body)


def is_call(statement: ast.stmt) -> bool:
    """Whether it calls something, or takes something of what is returned; ``f(x)`` alone is mathematics."""
    value = getattr(statement, "value", None)
    while isinstance(value, ast.Attribute):
        value = value.value
    called = isinstance(statement, ast.Expr) and isinstance(value, ast.Call)
    return called and (isinstance(value.func, ast.Attribute) or bool(value.keywords))


def typeset(line: str) -> str:
    """A line: what is prose as text, what is not as formulas."""
    nodes = list(read(line))
    if not nodes:
        return ""
    prose = words_of_a_text(nodes)
    pieces, run = [], [nodes[0]]
    for i, (before, node) in enumerate(pairwise(nodes), start=1):
        parted = node.blanks > 1 and node.depth == 0 and not (node.kind == "operator" and before.ends)
        if parted or prose[i] != prose[i - 1]:
            pieces += [formula(run) if not prose[i - 1] else plain(run), GAP if parted else " " * node.blanks]
            run = []
        run.append(node)
    pieces.append(plain(run) if prose[-1] else formula(run))
    return "".join(pieces)


def words_of_a_text(nodes: Sequence[Node]) -> list[bool]:
    """Which nodes are prose: words outside of brackets that no sign makes part of a formula, numbers and the article
    among them, and the punctuation behind them."""

    def word(i: int) -> bool:
        return 0 <= i < len(nodes) and nodes[i].kind in ("word", "code") and nodes[i].depth == 0

    def operator(i: int) -> bool:
        return 0 <= i < len(nodes) and nodes[i].kind == "operator"

    def close(i: int, j: int) -> bool:
        return word(j) and nodes[max(i, j)].blanks < 2

    prose = []
    for i, node in enumerate(nodes):
        beside = close(i, i - 1) or close(i, i + 1)
        bare = not operator(i - 1) and not operator(i + 1)
        small = (node.text == "a" and word(i - 1) and word(i + 1)) or (node.text[:1].isdigit() and beside and bare)
        follows = node.kind == "punctuation" and bool(prose) and prose[-1]
        prose.append(node.depth == 0 and (follows or (word(i) and (beside or bare)) or (node.kind == "atom" and small)))
    return prose


def plain(nodes: Sequence[Node]) -> str:
    """Prose."""
    shown = (node.xml if node.kind == "code" else escape(node.text, quote=False) for node in nodes)
    return "".join(
        " " * (i > 0 and node.blanks > 0) + each for i, (node, each) in enumerate(zip(nodes, shown, strict=True))
    )


def formula(nodes: Sequence[Node]) -> str:
    return f"<math>{row(nodes)}</math>"
