"""``import peftcore`` costs little and brings in nothing that it does not need."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODULES = 177
"""Modules of ours that ``import peftcore`` may load. Seconds depend on the machine, and are for the benchmarks."""
LIBRARIES = {"annotated_types", "pluggy", "pydantic", "pydantic_core", "safetensors", "typing_inspection"}
"""What it may load besides torch and the standard library."""
OPTIONAL = ("transformers", "timm", "diffusers", "accelerate", "peft", "typer", "rich", "matplotlib", "numpy.testing")
OPTIONAL += ("bitsandbytes", "torchao", "hqq")

SCRIPT = """
import json, sys
import torch
before = set(sys.modules)
import peftcore
added = sorted(set(sys.modules) - before)
listed = [info.name for info in peftcore.methods()]
print(json.dumps({"added": added, "listed": listed, "after": sorted(set(sys.modules) - before)}))
"""


def measure() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True, timeout=120)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_import_is_light_and_lists_methods_without_importing_them() -> None:
    run = measure()
    ours = [name for name in run["added"] if name.partition(".")[0] == "peftcore"]
    assert len(ours) <= MODULES
    masks = "torch.nn.utils.prune"  # which torch does not import itself, and by which computed weights are known
    tops = {name.partition(".")[0] for name in run["added"] if name != masks} - {"peftcore"}
    assert {top for top in tops if top not in sys.stdlib_module_names and top[0] != "_"} <= LIBRARIES
    assert not [name for name in run["added"] if name.partition(".")[0] in OPTIONAL]
    unwanted = ("peftcore_", "peftcore.testing", "peftcore.models", "peftcore.cli")
    assert not [name for name in run["added"] if name.startswith(unwanted)]
    assert {"lora", "dora", "ia3", "houlsby_adapter", "bitfit", "ln_tuning", "linear_probe"} <= set(run["listed"])
    plugins = {f"peftcore_{folder.parent.name}" for folder in ROOT.glob("plugins/*/pyproject.toml")}
    after = {name for name in run["after"] if name.partition(".")[0] in plugins}
    tables = ("peftcore_quantized.backends", *(f"{plugin}._presets" for plugin in plugins))
    assert {name for name in after if not name.startswith(tables)} == plugins
    assert not [name for name in run["after"] if name.partition(".")[0] in OPTIONAL]


def test_no_module_bears_the_name_of_a_public_function() -> None:
    """A module imported lazily under the name of a function would take the function's place in the package."""
    script = """
import pkgutil, peftcore
modules = {name for _, name, _ in pkgutil.iter_modules(peftcore.__path__)}
found = modules & set(peftcore.__all__) - {"author"}
assert not found, found
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
