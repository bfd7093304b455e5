"""An entry is plain data: it knows its rows, and a layout knows those of each part."""

import dataclasses

import pytest

from peftcore.roles import HostEntry, Layout

LAYOUT = Layout((("q", ((0, 4),)), ("k", ((4, 6), (8, 10)))))


def test_a_layout_tells_the_slices_of_a_part() -> None:
    assert LAYOUT.names == ("q", "k")
    assert LAYOUT.slices("k") == ((4, 6), (8, 10))
    with pytest.raises(KeyError):
        LAYOUT.slices("v")


@pytest.mark.parametrize(("shape", "rows"), [((6, 4), 6), ((3, 6, 4), 6), ((6,), 0), ((), 0)])
def test_rows_are_those_of_the_output(shape: tuple[int, ...], rows: int) -> None:
    assert HostEntry("a", "a", None, "other", shape=shape).rows == rows


def test_entries_are_values() -> None:
    entry = HostEntry("attn.qkv", "attn.qkv", None, "attn.qkv", layout=LAYOUT)
    assert entry == dataclasses.replace(entry) and hash(entry) == hash(dataclasses.replace(entry))
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.role = "other"  # type: ignore[misc]
