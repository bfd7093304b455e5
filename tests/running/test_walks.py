"""How far `model` goes in `apply` and in `load`; the numbers of modules and climbs only fall."""

from pathlib import Path

import pytest
from walks import Tree, Walk, walk

AT_MOST = {
    ("peftcore.injection.applying", "apply"): (21, 12),
    ("peftcore.files.save_load", "load"): (24, 11),
}
"""Modules that `model` is in, and climbs, as they are: who makes them fewer writes the fewer. Installing is counted
since it is a function of `applying`; it was a method of another object, which a walk does not follow. `Batches`, which
get the model, are a module of the contract, and were one with the code that makes them. The locks of models, under
which threads change a model one after the other, are two modules more."""
TREE = Tree()


@pytest.mark.parametrize(("entry", "most"), AT_MOST.items(), ids=lambda each: each[1] if each in AT_MOST else "")
def test_a_model_goes_no_longer_way(entry: tuple[str, str], most: tuple[int, int]) -> None:
    way = walk(*entry, "model", TREE)
    assert (way.rooms, way.climbs) == most, "more is a longer way; fewer is the new number: write it into AT_MOST"


FILES = {
    "peftcore/high/door.py": "from peftcore.low.box import Box, put\n"
    "def enter(model, other):\n    put(other)\n    box = Box(model)\n    back(box)\n"
    "def back(box):\n    put(model=box)\n    put(box)\n",
    "peftcore/low/box.py": "from peftcore.low import deep\n"
    "class Box:\n    def __init__(self, module):\n        self.look(module)\n    def look(self, module): pass\n"
    "def put(model):\n    deep.down(model)\n",
    "peftcore/low/deep.py": "def down(model): pass\n",
}


@pytest.fixture
def way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Walk:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    tree = Tree(tmp_path / "peftcore")
    monkeypatch.setitem(vars(tree), "layers", {name: 2 - ("low" in name) for name in tree.modules})
    return walk("peftcore.high.door", "enter", "model", tree)


def test_a_walk_goes_where_calls_give_the_parameter(way: Walk) -> None:
    names = [each.rpartition(".")[2] for each in way.stays]
    assert names == ["door", "box", "door", "box", "deep"]  # by Box(model) and, with what is made of it, by put(model=)
    assert (way.rooms, way.climbs, way.returns) == (3, 1, 2)
