"""How a host's modules are found by the names of files of kohya."""

import pytest
from torch import nn

from peftcore.errors import HostMismatch
from peftcore.files.formats.kohya_spelling import Spelling
from peftcore.files.formats.original_names import OriginalModule


def test_a_spelling_takes_underscores_for_dots_and_original_names_first() -> None:
    model = nn.ModuleDict({"a_b": nn.ModuleDict({"norm2": nn.Linear(2, 2), "norm3": nn.Linear(2, 2)}), "a": nn.ReLU()})
    modules = dict(model.named_modules())
    assert Spelling(modules).only("a.b.norm2") == OriginalModule(("a_b.norm2",))
    names = {"a_b.norm2": OriginalModule(("a_b.norm3",)), "a.both": OriginalModule(("a_b.norm2", "a_b.norm3"))}
    original = Spelling(modules, names)
    assert original.only("a_b_norm2").paths == ("a_b.norm3",) and not original.only("a_both").whole
    assert original.places["a.both"] == "a_b.norm2"
    assert original.has_weight("a_b.norm2") and not original.has_weight("a")
    with pytest.raises(HostMismatch, match="have the same name"):
        Spelling({"x_y": nn.Linear(2, 2), "x.y": nn.Linear(2, 2)}).only("x.y")
