"""The positions on which LoReFT's authors intervene, for prompts of each length:
``python -m peftcore.testing.freeze loreft.py CHECKOUT``.

Only the two functions that find them are run: the file that has them imports pyvene, which does not run beside the
transformers versions that this project is for.
"""

import ast
from pathlib import Path
from typing import Any

from peftcore.registry.evidence import Source

SOURCE = Source("authors", "stanfordnlp/pyreft", "dafd099", "pyreft/dataset.py")
VERSIONS = ()
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


def numbers(checkout: Path) -> list[dict[str, Any]]:
    """Returns the positions for each pair of ends and each length of a prompt."""
    theirs = functions((checkout / SOURCE.script).read_text(encoding="utf-8"))
    return [
        {"first": first, "last": last, "length": length, "positions": positions(theirs, first, last, length)}
        for first, last in ENDS
        for length in LENGTHS
    ]
