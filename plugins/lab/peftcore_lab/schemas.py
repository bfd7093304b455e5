"""The JSON schemas of the files that commands read, for editors that complete and check such files. The keys under
`data` depend on the task, and the keys next to a method's name depend on the method."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import peftcore
from peftcore_lab.comparisons.comparison import Candidate, Comparison
from peftcore_lab.runs.run import FULL, MethodChoice, Options, Run
from peftcore_lab.searching.search import Search
from peftcore_lab.tasks import task_catalogue

FILES: Mapping[str, type[Options]] = {"train": Run, "compare": Comparison, "search": Search}
"""The schema class of the files that each command reads."""
PLACES = {
    "target": "Target modules: a role, a glob, the end of a path, or several; the method's own when left out.",
    "exclude": "Target modules that are left out.",
    "train": "Modules or parameters that are trained too.",
}
CHOICES = {kind.__name__ for kind in (MethodChoice, Candidate)}
"""Names of the definitions in a schema that describe the choice of a method."""
JSON = dict[str, Any]
BY_NAME: JSON = {"type": "string", "description": "Name of a method, with its own options."}


def schema(command: str) -> JSON:
    """Return the schema of the files of a command: "train", "compare" or "search"."""
    found = FILES[command].model_json_schema()
    defs: JSON = found.setdefault("$defs", {})
    names = [*task_catalogue.places()]
    found["properties"]["task"]["enum"] = names
    kinds = {name: _hoisted(task_catalogue.kind(name).Data.model_json_schema(), f"data.{name}", defs) for name in names}
    found["allOf"] = [_when("task", name, {"data": kind}) for name, kind in kinds.items()]
    if default := found["properties"]["task"].get("default"):
        found["allOf"].append({"if": {"not": {"required": ["task"]}}, "then": {"properties": {"data": kinds[default]}}})
    for name in CHOICES & defs.keys():
        defs[name] = {"anyOf": [BY_NAME, _of_methods(defs[name], defs)]}
    if several := found["properties"].get("methods"):
        found["properties"]["methods"] = {
            "description": several.pop("description"),
            "anyOf": [{"type": "string"}, {"type": "array", "items": BY_NAME}, several],
        }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def train() -> JSON:
    """Return the schema of the files of ``peftcore train``."""
    return schema("train")


def compare() -> JSON:
    """Return the schema of the files of ``peftcore compare``."""
    return schema("compare")


def search() -> JSON:
    """Return the schema of the files of ``peftcore search``."""
    return schema("search")


def _of_methods(choice: JSON, defs: JSON) -> JSON:
    """Return the schema of the choice of a method, with the options of each method."""
    infos = peftcore.methods(presets=True)
    choice["properties"]["name"]["examples"] = [*(info.name for info in infos), FULL]
    choice["properties"] |= {name: {"description": text} for name, text in PLACES.items()}
    choice["allOf"] = []
    for info in infos:
        kind = peftcore.method(f"{info.plugin}/{info.name}").Config.model_json_schema()
        kind["properties"].pop("method", None)
        kind.pop("additionalProperties", None)
        kind["required"] = [each for each in kind.get("required", ()) if each != "method"]
        choice["allOf"].append(
            {
                "if": {"properties": {"name": {"const": info.name}}},
                "then": _hoisted(kind, f"method.{info.name}", defs),
            }
        )
    return choice


def _hoisted(kind: JSON, name: str, defs: JSON) -> JSON:
    """Add a schema and its own definitions to `defs`, and return a reference to the schema."""
    inner = kind.pop("$defs", {})
    text = json.dumps({"whole": kind, "inner": inner})
    for each in inner:
        text = text.replace(f'"#/$defs/{each}"', f'"#/$defs/{name}.{each}"')
    found = json.loads(text)
    defs.update({f"{name}.{each}": value for each, value in found["inner"].items()})
    defs[name] = found["whole"]
    return {"$ref": f"#/$defs/{name}"}


def _when(key: str, value: str, properties: JSON) -> JSON:
    """Return the schema rule that `properties` apply if a key has a certain value."""
    return {
        "if": {"properties": {key: {"const": value}}, "required": [key]},
        "then": {"properties": properties},
    }
