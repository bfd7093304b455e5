"""A model as rows of boxes, from its map: what stands in front of its blocks, one block of each kind, what follows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from diagram_places import FRAME, SEQUENCE, Drawn, Key, keys_of, parts
from peftcore.roles import HostEntry
from peftcore.roles.vocabulary import OTHER

STAGES = {"down_blocks": 1, "mid_block": 2, "up_blocks": 3}
"""Of a UNet, which has them in another order."""
FAMILIES = ("conv", "attn", "ssm", "cross", "mlp")
"""Branches of a block in their order; what several roles belong to is named by the first."""
RELATED = {"mod": "conv", "experts": "mlp", "router": "mlp", "se": "mlp", "pool": "attn"}
ORDER = (
    "q",
    "q_a",
    "q_b",
    "kv_a",
    "kv_b",
    "k",
    "v",
    "router",
    "gate",
    "up",
    "attn",
    "ssm",
    "cross",
    "conv",
    "mod",
    "out",
    "down",
)
"""Of the boxes of a branch, by the last part of their role."""
LABELS = {
    **{"embed": "tokens", "embed.pos": "positions", "embed.type": "segments", "patch": "input", "head": "head"},
    **{
        "attn": "attention",
        "cross": "cross-attention",
        "ssm": "state space",
        "out": "o",
        "mod": "time",
        "down": "resampling",
    },
    **{"conv": "convolutions", SEQUENCE: "the sequence"},
}


@dataclass(frozen=True)
class Row:
    """Boxes side by side, by key."""

    boxes: tuple[Key, ...]
    begins: bool = False
    """Whether a branch begins in front of it."""
    joins: bool = False
    """Whether it ends one, which is added to the stream behind it."""


@dataclass(frozen=True)
class Frame:
    """A block, which stands for those of its kind."""

    title: str
    rows: tuple[Row, ...]
    changed: bool


def batched(keys: list[Key], size: int) -> Iterator[list[Key]]:
    yield from (keys[i : i + size] for i in range(0, len(keys), size))


def label(key: Key) -> str:
    """What a box is called."""
    if key.path:
        return key.path.rpartition(".")[2].replace("_", " ")
    role = key.role.removeprefix("attn.").removeprefix("cross.").removeprefix("mlp.").removeprefix("ssm.")
    return LABELS.get(key.role) or LABELS.get(
        role if role == "out" else "", role.partition(".")[0] if "norm" in role else role
    )


def rows(drawn: Drawn) -> list[Row | Frame]:
    """The picture from top to bottom."""
    marked = frozenset(key for mark in drawn.marks for key in mark.keys)
    blocks = sorted(drawn.blocks, key=lambda path: "attn" in {e.role for e in inside(drawn, path)})
    entries = drawn.map.entries
    first = next((i for i, entry in enumerate(entries) if entry.block is not None), len(entries))
    split = [entry for entry in entries[:first] if not entry.path.startswith(tuple(STAGES))]
    before, after = (list(around(drawn, each, marked)) for each in (split, [e for e in entries if e not in split]))
    if Key(SEQUENCE) in marked:
        before.append(Row((Key(SEQUENCE),)))
    frames = [frame(drawn, path) for path in blocks]
    taken = {each for row in before for each in row.boxes}
    return [*before, *frames, *(row for row in after if not taken.issuperset(row.boxes))]


def around(drawn: Drawn, entries: Iterable[HostEntry], marked: frozenset[Key]) -> Iterator[Row]:
    """What is in no block, of the main tower and what is in none: each role once."""
    keys, towers = keys_of(drawn.map), {drawn.map.main_tower(), ""}
    own = [entry for entry in entries if entry.block is None and entry.tower in towers and entry.role != FRAME]
    plain = {keys[e.path, e.role]: None for e in own if e.role != OTHER and e.kind != "container" and e.role != "norm"}
    extra = {keys[entry.path, entry.role]: None for entry in own if keys[entry.path, entry.role] in marked}
    found = [key for key in dict.fromkeys(keys[e.path, e.role] for e in own) if key in plain or key in extra]
    tables = [key for key in found if key.role.startswith(("embed", "patch"))]
    nameless = sorted((key for key in found if key.role == OTHER), key=lambda key: STAGES.get(key.path, 0))
    rest = [key for key in found if key not in tables and key not in nameless]
    yield from (Row(tuple(each)) for each in [tables, *batched(nameless, 2)] if each)
    yield from (Row((key,)) for key in rest)


def inside(drawn: Drawn, path: str) -> list[HostEntry]:
    return [entry for entry in drawn.map.entries if entry.block == path and entry.role not in (OTHER, FRAME)]


def frame(drawn: Drawn, path: str) -> Frame:
    """A block: its branches, each with a norm in front of it or behind it."""
    keys, post = keys_of(drawn.map), drawn.post.get(path, False)
    own = inside(drawn, path)
    norms = [keys[entry.path, entry.role] for entry in own if entry.role == "norm"]
    boxes = dict.fromkeys(Key(role) for entry in own if entry.role != "norm" for role in parts(entry))
    marked = frozenset(key for mark in drawn.marks for key in mark.keys)
    branches = [found for family in FAMILIES if (found := branch(boxes, family, marked))]
    lines: list[Row] = []
    for number, each in enumerate(branches):
        mine = norms[number : number + 1] if number < len(branches) - 1 else norms[number:]
        norm = [Row(tuple(mine))] if mine else []
        body = [*([] if post else norm), *(Row(each_row) for each_row in each)]
        body[0] = Row(body[0].boxes, begins=True)
        body[-1] = Row(body[-1].boxes, body[-1].begins, joins=True)
        lines += [*body, *(norm if post else [])]
    changed, number_of = drawn.blocks[path]
    words = "block" if any(entry.role in ("attn", "ssm") for entry in own) else "convolutional block"
    part = f", {changed} of them changed" if 0 < changed < number_of else ""
    whole = any(Key(FRAME) in mark.keys for mark in drawn.marks)
    return Frame(f"{words} × {number_of}{part}", tuple(lines), whole and "conv" not in words)


def branch(boxes: Iterable[Key], family: str, marked: frozenset[Key]) -> list[tuple[Key, ...]]:
    """The boxes of a branch: what reads, what computes, what ends it. A whole feed-forward, or all experts, are a box
    where they are `marked` themselves."""

    def of(key: Key) -> str:
        start = key.role.partition(".")[0]
        return RELATED.get(start, start)

    def rank(key: Key) -> int:
        last = key.role.rpartition(".")[2]
        return ORDER.index(last) if last in ORDER else 0

    own = sorted((key for key in boxes if of(key) == family), key=rank)
    ends = [key for key in own if key.role.endswith((".out", ".down"))]
    core = [key for key in own if key.role in ("attn", "ssm", "cross")]
    first = [
        key
        for key in own
        if key not in ends and key not in core and (key.role not in ("mlp", "experts") or key in marked)
    ]
    return [tuple(each) for each in (first, core, ends) if each]
