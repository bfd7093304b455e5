"""Writes `frozen_loreft.json`: the positions on which LoReFT's authors intervene, for prompts of each length.

    python plugins/additive/tests/frozen_loreft.py CHECKOUT      of stanfordnlp/pyreft at dafd099

Only the two functions that find them are run: the file that has them imports pyvene, which does not run beside the
transformers versions that this project is for.
"""

import ast
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).with_suffix(".json")
ENDS = [(3, 0), (0, 2), (1, 1), (2, 3), (7, 7)]
LENGTHS = range(1, 17)


def functions(source: str) -> dict[str, Any]:
    """Returns the functions that make positions, by name, out of the source of pyreft/dataset.py."""
    wanted = ("parse_positions", "get_intervention_locations")
    found = [each for each in ast.parse(source).body if isinstance(each, ast.FunctionDef) and each.name in wanted]
    known: dict[str, Any] = {}
    exec(compile(ast.Module(found, []), "dataset.py", "exec"), known)
    return known


def positions(theirs: dict[str, Any], first: int, last: int, length: int) -> list[list[int]]:
    """Returns the positions of both ends, without those that fill up, which lie in front of the prompt."""
    found = theirs["get_intervention_locations"](
        positions=f"f{first}+l{last}", last_position=length, num_interventions=2, pad_mode="first"
    )
    return [[position for position in end if position >= 0] for end in found]


if __name__ == "__main__":
    checkout = Path(sys.argv[1])
    theirs = functions((checkout / "pyreft/dataset.py").read_text(encoding="utf-8"))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, check=True, capture_output=True, text=True)
    numbers = [
        {"first": first, "last": last, "length": length, "positions": positions(theirs, first, last, length)}
        for first, last in ENDS
        for length in LENGTHS
    ]
    frozen = {
        "repository": "stanfordnlp/pyreft",
        "commit": commit.stdout.strip(),
        "script": Path(__file__).name,
        "versions": {"python": platform.python_version()},
    }
    rows = ",\n  ".join(json.dumps(each) for each in numbers)
    HERE.write_text(f'{json.dumps(frozen, indent=1)[:-2]},\n "numbers": [\n  {rows}\n ]\n}}\n', encoding="utf-8")
