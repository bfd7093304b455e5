"""``python docs/check/device.py --device cuda``: runs the code of every method's page on a device (`cuda`, `mps` ...).

Each applies the method to a small model, takes a step, saves and merges. Here the model and its inputs are made on the
device, and afterwards every tensor of the model must lie there and be finite. A line for each method that fails.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "generate"))

import peftcore
import snippets


def wrong(name: str, device: str) -> str | None:
    """What goes wrong with a method there; None when nothing does."""
    found: dict[str, Any] = {}
    try:
        code = snippets.snippet(peftcore.method(name))
        with torch.device(device):
            exec(compile(code, name, "exec"), found)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    tensors = dict(found["model"].named_parameters()) | dict(found["model"].named_buffers())
    elsewhere = [key for key, each in tensors.items() if each.device.type != torch.device(device).type]
    if elsewhere:
        return f"{elsewhere[0]} is not on {device}"
    broken = [key for key, each in tensors.items() if each.is_floating_point() and not each.isfinite().all()]
    return f"{broken[0]} is not finite" if broken else None


def main() -> int:
    default = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    parser = argparse.ArgumentParser(prog="python docs/check/device.py", description=__doc__)
    parser.add_argument("--device", default=str(default))
    parser.add_argument("--methods", nargs="+", default=[each.name for each in peftcore.methods()])
    given = parser.parse_args()
    logging.getLogger("peftcore").setLevel(logging.ERROR)
    failed = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in given.methods:
            if (said := wrong(name, given.device)) is not None:
                failed[name] = said
                print(f"{name}: {said}", flush=True)
    print(f"{len(given.methods) - len(failed)} of {len(given.methods)} methods work on {given.device}.")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
