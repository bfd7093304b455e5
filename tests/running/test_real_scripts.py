"""Scripts of other libraries with lines of ours: each line has one place, and a base that changed is found."""

import re
from pathlib import Path

import pytest
import torch
from real_scripts import MOST, PORTS, Change, changed, compared

SCRIPT = "import torch\n\ndef main():\n    model = make()\n    step(model)\n    step(model)\n"


def test_a_line_stands_before_or_behind_another_or_in_its_place() -> None:
    behind = changed(SCRIPT, (Change("behind", "import torch", "import peftcore"),))
    assert behind == SCRIPT.replace("import torch\n", "import torch\nimport peftcore\n")
    assert changed(SCRIPT, (Change("before", r"model = .*", "x = 1"),)) == SCRIPT.replace("    m", "    x = 1\n    m")
    assert changed(SCRIPT, (Change("instead of", r"model = .*", "x = 1"),)) == SCRIPT.replace("model = make()", "x = 1")
    for line, count in ((r"step\(model\)", 2), ("gone", 0)):
        with pytest.raises(LookupError, match=f"{count} lines are"):
            changed(SCRIPT, (Change("behind", line, "x = 1"),))


def test_no_script_changes_in_many_lines_and_the_page_says_how_many() -> None:
    page = (Path(__file__).parents[2] / "examples/ports/README.md").read_text("utf-8")
    for name, port in PORTS.items():
        assert len(port.changes) <= MOST
        row = rf"\| {name}, [^|]*`{Path(port.script).stem}[^|]*\| `\w+` \| {len(port.changes)} \|"
        assert re.search(row, page)
        assert all(each.ours in page for each in port.changes)


def test_a_base_that_changed_is_found() -> None:
    base = {"a": torch.ones(2), "b": torch.zeros(3)}
    assert compared(base, {**base, "adapter": torch.ones(1)}).startswith("2 tensors")
    for wrong in ({"a": base["a"]}, {**base, "b": torch.tensor([0.0, 0.0, 1e-9])}):
        with pytest.raises(AssertionError, match=r"the base changed: \['b'\]"):
            compared(base, wrong)
