"""Signs and words of an equation in plain text, each with its MathML: what `notation` is made of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape

LETTERS = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu"),
    *("xi", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega"),
    *("Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega"),
)
GREEK = dict(zip(LETTERS, "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ", strict=True))
BIG = {"sum": "∑", "prod": "∏"}
"""Words that are signs where an index follows."""
OPERATORS = {
    **{"(x)": "⊗", "(o)": "⊙", "*": "\u2217", "-": "−", "+-": "±", "+": "+", "/": "/", "=": "=", "<": "<", ">": ">"},
    **{"<=": "≤", ">=": "≥", "!=": "≠", "<-": "←", "->": "→", "~": "\u223c"},
}
PRIME = "\u2032"
DOTS = ("...", "..", "…")
FENCES = {"||": "‖", "|": "|"}
TOKEN = re.compile(
    rf"""
    (?P<code>`[^`]+`)
  | (?P<product>(?<![^\s(])\([xo]\)(?![^\s:,;)]))
  | (?P<size>\d+x\d+)
  | (?P<number>\d+(?:\.\d+)?(?:e-?\d+(?!\w))?)
  | (?P<change>d(?=(?:[A-Z]|{"|".join(GREEK)})(?![^\W_])))
  | (?P<word>[^\W\d_]{{2,}}\d*(?:[-'][^\W\d_]+)*)
  | (?P<letter>[^\W\d_])(?P<index>\d+[a-z]?)?
  | (?P<sign>\|\||<=|>=|!=|<-|->|\+-|\.\.\.|\.\.|.)
    """,
    re.VERBOSE | re.DOTALL,
)
SCRIPT = re.compile(
    r"(?P<prime>'+)|(?P<tilde>~)|(?P<hat>\^(?=[_\s,;)\]]|$))|(?P<kind>[_^])(?:(?P<body>-?[^\W_]+)|(?={))"
)


@dataclass(frozen=True)
class Node:
    """One sign or word, with what is written on it."""

    kind: str
    """ "atom", "word", "code", "operator", "punctuation", "open" or "close"."""
    xml: str
    text: str
    """As it was written."""
    blanks: int = 0
    """In front of it."""
    depth: int = 0
    """How many brackets it is in."""

    @property
    def ends(self) -> bool:
        """Whether a factor may end here."""
        return self.kind in ("atom", "word", "code", "close")

    @property
    def begins(self) -> bool:
        """Whether a factor may begin here."""
        return self.kind in ("atom", "word", "code", "open")


def row(nodes: Sequence[Node]) -> str:
    """Nodes side by side; what a blank multiplies has a little space between."""
    parts: list[str] = []
    for before, node in zip((None, *nodes), nodes, strict=False):
        if before is not None and node.blanks and before.ends and node.begins:
            wide = "word" in (before.kind, node.kind) or node.text in ("[", "{")
            scripts = before.xml.startswith(("<msub", "<msup"))  # these leave some space by themselves
            parts.append(f'<mspace width="{0.28 if wide else 0.08 if scripts else 0.17}em"/>')
        parts.append(f"<mtext>{node.xml}</mtext>" if node.kind == "code" else node.xml)
    return "".join(parts)


def read(text: str) -> Iterator[Node]:
    """The nodes of a formula."""
    at, depth = 0, 0
    before = Node("operator", "", "")
    while at < len(text):
        blanks = len(text) - at - len(text[at:].lstrip())
        at += blanks
        found = TOKEN.match(text, at)
        if found is None:
            return
        start, at = at, found.end()
        if found["word"] == "sqrt" and (end := closing(text, at)):
            node, at = Node("atom", f"<msqrt>{row(list(read(text[at + 1 : end - 1])))}</msqrt>", text[start:end]), end
        else:
            node = node_of(found, before)
        if node.ends and node.kind != "code":
            node, at = scripted(node, text, at)
        if node.kind == "word" and text[at : at + 1] in ("(", "[", "'") and text[at:]:
            node = replace(node, kind="atom")
        depth = max(depth - (node.kind == "close"), 0)
        before = replace(node, blanks=blanks, depth=depth)
        depth += node.kind == "open"
        yield before


def node_of(found: re.Match[str], before: Node) -> Node:
    """What a token is."""
    token = found[0]
    if found["code"]:
        return Node("code", f"<code>{escape(token[1:-1], quote=False)}</code>", token)
    if found["size"]:
        return Node("atom", f"<mn>{token.replace('x', '×')}</mn>", token)
    if found["number"]:
        return Node("atom", number(token), token)
    if found["change"]:
        return Node("atom", "<mi>d</mi>", token)
    if token in GREEK:
        return Node("atom", f"<mi>{GREEK[token]}</mi>", token)
    if found["word"]:
        behind = found.string[found.end() : found.end() + 1]
        if token in BIG and behind == "_":
            return Node("atom", f"<mo>{BIG[token]}</mo>", token)
        return Node("word", f"<mi>{token}</mi>", token)
    if found["letter"]:
        letter = f"<mi>{found['letter']}</mi>"
        return Node("atom", f"<msub>{letter}<mn>{found['index']}</mn></msub>" if found["index"] else letter, token)
    return sign(found, before)


def sign(found: re.Match[str], before: Node) -> Node:
    """Brackets, operators, punctuation; anything else as it stands."""
    token, text = found[0], found.string
    left, right = text[: found.start()][-1:].strip(), text[found.end() :][:1].strip()
    if token in FENCES and (left or right):
        closes = bool(left) and before.ends
        form = 'form="postfix"' if closes else 'form="prefix"'
        return Node("close" if closes else "open", f'<mo {form} stretchy="false">{FENCES[token]}</mo>', token)
    if token in "([{":
        return Node("open", f'<mo form="prefix" stretchy="false">{token}</mo>', token)
    if token in ")]}":
        return Node("close", f'<mo form="postfix" stretchy="false">{token}</mo>', token)
    if token in OPERATORS:
        space = 0 if right else 0.28
        alone = "" if before.ends else f' form="prefix" lspace="0" rspace="{space}em"'
        return Node("operator", f"<mo{alone}>{escape(OPERATORS[token])}</mo>", token)
    if token in DOTS:
        return Node("atom", '<mo lspace="0" rspace="0">…</mo>', token)
    if token == "." and not left and not right:
        return Node("operator", "<mo>⋅</mo>", token)
    spaces = f'lspace="{0 if left or not before.ends else 0.28}em" rspace="{0 if right else 0.28}em"'
    kind = "punctuation" if token in ",;.:" else "operator"
    return Node(kind, f"<mo {spaces}>{escape(FENCES.get(token, token), quote=False)}</mo>", token)


def number(token: str) -> str:
    """``1e-5`` is a power of ten."""
    digits, _, power = token.partition("e")
    if not power:
        return f"<mn>{digits}</mn>"
    ten = f"<msup><mn>10</mn><mn>{power.replace('-', '−')}</mn></msup>"
    return ten if digits == "1" else f"<mrow><mn>{digits}</mn><mo>·</mo>{ten}</mrow>"


def scripted(node: Node, text: str, at: int) -> tuple[Node, int]:
    """A node with the primes, indices, powers and accents that follow it without a blank; and where those end."""
    start, below, above, base = at, "", "", node.xml
    while found := SCRIPT.match(text, at):
        end = found.end()
        if found["prime"]:
            above += f"<mo>{PRIME * len(found['prime'])}</mo>"
        elif found["kind"] is None:
            base = f'<mover accent="true">{base}<mo stretchy="false">{"~" if found["tilde"] else "^"}</mo></mover>'
        else:
            if found["body"] is None:
                end = closing(text, end) or 0
            if not end or (below and found["kind"] == "_"):
                break
            inner = found["body"] or text[found.end() + 1 : end - 1]
            if node.text in BIG and inner.isalpha():
                inner = " ".join(inner)
            script = row(list(read(inner)))
            below, above = (script, above) if found["kind"] == "_" else (below, above + script)
        at = end
    tag = "msubsup" if below and above else "msub" if below else "msup"
    scripts = "".join(f"<mrow>{each}</mrow>" for each in (below, above) if each)
    xml = f"<{tag}>{base}{scripts}</{tag}>" if scripts else base
    kind = "atom" if node.kind == "word" and at > start else node.kind
    return replace(node, kind=kind, xml=xml, text=node.text + text[start:at]), at


def closing(text: str, at: int) -> int | None:
    """Where the bracket ends that opens at a place; None when none does, or it stays open."""
    pairs = {"(": ")", "{": "}"}
    open_, depth = text[at : at + 1], 0
    for i in range(at, len(text) if open_ in pairs else at):
        depth += (text[i] == open_) - (text[i] == pairs[open_])
        if not depth:
            return i + 1
    return None
