"""``python -m peftcore.testing.freeze SCRIPT CHECKOUT``: runs reference code, such as code of a paper's authors, by
SCRIPT. It compares the resulting numbers with the frozen numbers, which are in the JSON file next to SCRIPT. With
``--write`` it writes the new numbers into that file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from peftcore.testing.declared_evidence import MADE, freeze


def close(one: Any, other: Any) -> bool:
    """True if two JSON values have the same structure, and their numbers are equal up to the rounding of float32."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, float | int) and isinstance(other, float | int):
        return torch.isclose(torch.tensor(float(one)), torch.tensor(float(other)), rtol=1e-5, atol=1e-7).item() is True
    return bool(one == other)


def parts(text: str) -> dict[str, Any]:
    """Returns the parts that contain numbers, by name, from the text of a file of frozen numbers."""
    return {key: value for key, value in json.loads(text).items() if key in MADE.values()}


def kept(text: str, before: str) -> str:
    """Returns the text of a new file of frozen numbers. Parts of `text` that equal those in the old text `before`, up
    to rounding, are replaced by the old ones, so that they do not change."""
    old, new = parts(before), parts(text)
    same = {key: old[key] for key in old.keys() & new.keys() if close(old[key], new[key])}
    return json.dumps({**json.loads(text), **same}, indent=1) + "\n"


def main(arguments: list[str]) -> int:
    """Runs the command and returns the exit status: 1 if the numbers differ from those in the file."""
    parser = argparse.ArgumentParser("python -m peftcore.testing.freeze", description=__doc__)
    parser.add_argument("script", type=Path, help="has SOURCE, VERSIONS and functions such as numbers(checkout)")
    parser.add_argument(
        "checkout", type=Path, help="the folder with the authors' code, at the commit that SOURCE names"
    )
    parser.add_argument("--write", action="store_true", help="write the file instead of comparing with it")
    asked = parser.parse_args(arguments)
    file = asked.script.with_suffix(".json")
    if not asked.write and not file.exists():
        parser.error(f"there is no {file} to compare with: pass --write to create it")
    text = freeze(asked.script, asked.checkout)
    if asked.write:
        before = file.read_text(encoding="utf-8") if file.exists() else "{}"
        file.write_text(kept(text, before), encoding="utf-8")
        print(f"{file.name}: written")
        return 0
    same = close(parts(text), parts(file.read_text(encoding="utf-8")))
    print(f"{file.name}: " + ("the same numbers" if same else "other numbers come out; --write would put them there"))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
