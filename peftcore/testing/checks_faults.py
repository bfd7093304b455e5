"""The check that an operation which fails is undone, and the operations (apply, merge, save and so on) in which the
check raises errors."""

from __future__ import annotations

import functools
import random
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import peftcore
from peftcore.injection.injection import Injection
from peftcore.testing.fault_points import KINDS
from peftcore.testing.faults import FaultReport, Make, Operation, inject_faults
from peftcore.testing.kit import Case, check
from peftcore.testing.snapshots import Scene
from peftcore.testing.tools import findable

FEW = {"apply": 2}
"""The number of faults (artificial errors) that the check tries in an operation; 1 for operations that are not
listed."""


class LifeStep(NamedTuple):
    """An operation on a model, such as apply or merge, and the function that builds the objects for it.

    Attributes:
        make: builds a `Scene`, the model and other objects that the operation needs.
        operation: runs the operation on a scene.
    """

    make: Make
    operation: Operation


def life(case: Case) -> dict[str, LifeStep]:
    """Return, by name, the operations of a method that are tested with faults (artificial errors)."""
    steps = {
        "apply": LifeStep(_scene(case), lambda scene: case.apply_alone(scene.model, name="new")),
        "load": LifeStep(_saved(case), lambda scene: peftcore.load(scene.model, _adapter(scene), name="new")),
        "remove": LifeStep(_scene(case, "a"), _on_a(lambda injection: injection.remove())),
        "freeze": LifeStep(_scene(case, "a"), _on_a(lambda injection: injection.trainable(False))),
        "activate": LifeStep(_scene(case, "a"), lambda scene: peftcore.activate(scene.model)),
        "disabled": LifeStep(_scene(case, "a"), _disabled),
        "save": LifeStep(_scene(case, "a"), lambda scene: _a(scene).save(_adapter(scene))),
        "swap": LifeStep(_scene(case, "a"), lambda scene: _a(scene).swap(_other_values(_a(scene)))),
    }
    if case.tags.mergeable:
        steps |= {
            "merge": LifeStep(_scene(case, "a"), _on_a(lambda injection: injection.merge())),
            "merge for good": LifeStep(_scene(case, "a"), _on_a(lambda injection: injection.merge(None))),
            "unmerge": LifeStep(
                _scene(case, "a", then=lambda injection: injection.merge()),
                _on_a(lambda injection: injection.unmerge()),
            ),
            "bake": LifeStep(_scene(case, "a"), _on_a(lambda injection: injection.bake())),
        }
    return steps


def break_step(case: Case, name: str, **options: Any) -> FaultReport:
    """Run one of the operations of `life` with faults (artificial errors). `options` are passed to `inject_faults`."""
    step = life(case)[name]
    leave = ("state, choice",) if case.context is not None else ()  # every call of the model tells the context anew
    with findable(case.method):
        with TemporaryDirectory() as folder:
            step.make(Path(folder))  # what it makes once draws its uuids now
        return inject_faults(
            step.operation, step.make, name=f"{name} {case.label}", packages=_package(case), leave=leave, **options
        )


def _package(case: Case) -> list[str]:
    """Return the folders of the package that contains the method; empty if the method is not in a package."""
    package = sys.modules[case.method.__module__.partition(".")[0]]
    return [str(Path(each)) for each in getattr(package, "__path__", ())]


def _scene(case: Case, *names: str, then: Callable[[Injection], object] = lambda injection: None) -> Make:
    def make(folder: Path) -> Scene:
        model, inputs = case.fresh()
        for index, name in enumerate(names):
            then(case.filled(model, index + 1, name=name))
        return Scene(model, _outputs(case, inputs), folder, needs=inputs)

    return make


def _saved(case: Case) -> Make:
    files = functools.cache(lambda: dict(_files(case)))

    def make(folder: Path) -> Scene:
        (folder / "adapter").mkdir()
        for name, content in files().items():
            (folder / "adapter" / name).write_bytes(content)
        return _scene(case)(folder)

    return make


def _files(case: Case) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each file of a saved adapter."""
    with TemporaryDirectory() as folder:
        model, _ = case.fresh()
        case.filled(model, name="a").save(folder)
        for path in Path(folder).iterdir():
            yield path.name, path.read_bytes()


def _outputs(case: Case, inputs: Mapping[str, Any]) -> Callable[[nn.Module], Tensor]:
    return lambda model: case.quiet(model, inputs)


def _adapter(scene: Scene) -> Path:
    assert scene.folder is not None
    return scene.folder / "adapter"


def _a(scene: Scene) -> Injection:
    return peftcore.injections(scene.model)["a"]


def _on_a(change: Callable[[Injection], object]) -> Operation:
    return lambda scene: change(_a(scene))


@torch.no_grad()
def _disabled(scene: Scene) -> None:
    with _a(scene).disabled():
        scene.model(**scene.needs)


def _other_values(injection: Injection) -> dict[str, Tensor]:
    """Return the tensors of an injection with every floating-point value halved. Integer tensors are unchanged."""
    with torch.no_grad():
        return {
            key: value * 0.5 if value.is_floating_point() else value.clone()
            for key, value in injection.state_dict().items()
        }


def _shallow(case: Case) -> Case:
    """Return the case with the one-layer version of its host, if the method can be applied to that."""
    if case.host.shallow is None:
        return case
    found = replace(case, host=replace(case.host, build=case.host.shallow))
    return found if found.inapplicable is None else case


@check(
    "a fault in the middle of an operation (an error of torch or of the disk, no memory, Ctrl-C) leaves the model and "
    "its files as before or as after it, and the next try succeeds",
    cause="`inject`, `trainable` or an operator changes the host, a random state or a file by itself, and a fault "
    "between two changes leaves one of them",
    remedy="change the host by the surgeon's verbs alone; see `peftcore.testing.inject_faults` for all points",
    hosts=("mlp", "llama"),
)
def faults_leave_nothing_half_done(case: Case) -> None:
    """Raise a few faults (artificial errors) in `apply` and in one other operation. The method's name determines which
    operation. ``make faults`` tries all faults in all operations."""
    case = _shallow(case)
    drawn = random.Random(zlib.crc32(case.method.name.encode()))
    other = drawn.choice([name for name in life(case) if name != "apply"])
    kind = drawn.choice(KINDS if other in ("load", "save") else ("tensor", "line"))
    for name, kinds in (("apply", ["line"]), (other, [kind])):
        report = break_step(case, name, kinds=kinds, most=FEW.get(name, 1))
        case.expect(not report.found, str(report))
