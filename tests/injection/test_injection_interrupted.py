"""Ctrl-C at any line of a change of a model: all of it is made, or nothing."""

import itertools
import os
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from computed_hosts import WAYS
from core_toys import perceptron, snapshot, stir
from torch import nn

import peftcore
from peftcore.forward.state.host_state import state_of
from peftcore.layers.layer import GRAFTED
from peftcore.testing.fault_points import ends_of_blocks

X = torch.linspace(-1, 1, 12).view(3, 4)
CORE = Path(peftcore.__file__).parent
FILES = {
    *(str(each) for each in (CORE / "injection").glob("*.py")),
    *(str(CORE / each) for each in ("surgery/installation.py", "forward/class_swap.py", "utils/journal.py")),
    *(str(CORE / each) for each in ("forward/state/host_state.py", "libraries/instance_methods.py")),
}
assert all(map(os.path.exists, FILES))
OFTEN = 3
"""How often each line is tried: at its first runs."""


class Interrupted:
    """Runs a function and raises KeyboardInterrupt at its n-th line in some files, where a line counts a few times."""

    def __init__(self, n: int, files: Collection[str] = FILES) -> None:
        self.left, self.files, self.runs, self.at = n, files, dict[tuple[str, int], int](), ""

    def __call__(self, function: Callable[[], object]) -> bool:
        """Returns whether it was interrupted."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            function()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        """Follow functions of these files, except the ends of blocks: Python guards no `__exit__` from an interrupt and
        calls it at the line of the block's begin."""
        file, last = frame.f_code.co_filename, 0
        if file not in self.files or frame.f_code.co_name == "__exit__":
            return None
        ends = ends_of_blocks(file)

        def line(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal last
            if event == "line":
                before, last = last, frame.f_lineno
                if before not in ends.get(last, ()):
                    self._count(file, last)
            return line

        return line

    def _count(self, file: str, line: int) -> None:
        if self.runs.setdefault((file, line), 0) < OFTEN:
            self.runs[file, line] += 1
            self.left -= 1
            if not self.left:
                sys.settrace(None)
                self.at = f"{Path(file).name}:{line}"
                raise KeyboardInterrupt


def look(model: nn.Module) -> dict[str, Any]:
    """All of a model that is to be as before, or as after; with what it computes."""
    found, state = peftcore.injections(model), state_of(model)
    return snapshot(model) | {
        "parameters": [(name, id(value), value.requires_grad) for name, value in model.named_parameters()],
        "injections": [(name, each.active, each.merged) for name, each in found.items()],
        "merged": state and state.merged,
        "frozen": state and [id(each) for each in state.frozen],
        "layers": [type(graft.operator.layer) for each in found.values() for graft in each.grafts],
        "config": [each.config for each in found.values()],
        "output": model(X).tolist(),
    }


def plainly(seen: dict[str, Any]) -> dict[str, Any]:
    """The same without what another copy of the model has otherwise."""
    seen = {key: value for key, value in seen.items() if key not in ("frozen", "merged")}
    modules = [(path, cls.__name__, GRAFTED in vars(cls)) for path, _, cls in seen["modules"]]  # torch makes some anew
    parameters = [(name, trains) for name, _, trains in seen["parameters"]]
    hooks = [(path, len(after), len(before)) for path, after, before in seen["hooks"]]
    return seen | {"modules": modules, "parameters": parameters, "hooks": hooks}


def host(*names: str, way: str = "", method: str = "dora") -> nn.Module:
    model = perceptron()
    if way:
        WAYS[way](model.first)
    for index, name in enumerate(names):
        stir(peftcore.apply(model, method, name=name, target=["first", "second"]), seed=index + 1)
    return model


def packed(*names: str) -> nn.Module:
    return peftcore.quantize(host(*names), "int8", target=["first", "second"])


def merged(model: nn.Module, **how: Any) -> nn.Module:
    a(model).merge(**how)
    return model


def a(model: nn.Module) -> peftcore.Injection:
    return peftcore.injections(model)["a"]


def swap(model: nn.Module) -> None:
    a(model).swap({key: value + 1 for key, value in a(model).state_dict().items()})


def swap_with(model: nn.Module) -> None:
    a(model).swap(a(host("another", "a")))


Run = Callable[[nn.Module], object]
CHANGES: dict[str, tuple[Callable[[], nn.Module], Run]] = {
    "merge": (lambda: host("a", "b"), lambda model: a(model).merge()),
    "merge for good": (lambda: host("a"), lambda model: a(model).merge(None)),
    "merge, the original in a record": (lambda: host("a", method="lora"), lambda model: a(model).merge("record")),
    "merge into a weight norm": (lambda: host("a", way="weight_norm"), lambda model: a(model).merge()),
    "merge into what is pruned": (lambda: host("a", way="pruned"), lambda model: a(model).merge()),
    "merge into what is parametrized": (lambda: host("a", way="without an inverse"), lambda model: a(model).merge()),
    "merge into what is packed": (lambda: packed("a"), lambda model: a(model).merge()),
    "merge and pack": (lambda: packed("a"), lambda model: a(model).merge(into="same")),
    "unmerge": (lambda: merged(host("a", "b")), lambda model: a(model).unmerge()),
    "unmerge from a record": (
        lambda: merged(host("a", method="lora"), keep="record"),
        lambda model: a(model).unmerge(),
    ),
    "unmerge what is pruned": (lambda: merged(host("a", way="pruned")), lambda model: a(model).unmerge()),
    "unmerge what was packed": (lambda: merged(packed("a")), lambda model: a(model).unmerge()),
    "quantize": (lambda: host("a"), lambda model: peftcore.quantize(model, "int8", target=["first", "second"])),
    "quantize what is computed": (
        lambda: host(way="weight_norm"),
        lambda model: peftcore.quantize(model, "int8", target="first"),
    ),
    "quantize for an adapter that says what is packed": (
        lambda: host("a", method="loftq"),
        lambda model: peftcore.quantize(model, "nf4", target=["first", "second"]),
    ),
    "dequantize": (lambda: packed("a"), peftcore.dequantize),
    "apply": (host, lambda model: peftcore.apply(model, "lora", name="b", target=["first"])),
    "apply another": (lambda: host("a"), lambda model: peftcore.apply(model, "lora", name="b", target=["first"])),
    "freeze": (lambda: host("a"), lambda model: a(model).trainable(False)),
    "remove": (lambda: host("a", "b"), lambda model: a(model).remove()),
    "remove the last one": (lambda: host("a"), lambda model: a(model).remove()),
    "remove what is merged": (lambda: merged(host("a")), lambda model: a(model).remove()),
    "bake": (lambda: host("a", "b"), lambda model: a(model).bake()),
    "bake the last one": (lambda: host("a"), lambda model: a(model).bake()),
    "bake into what is packed": (lambda: packed("a"), lambda model: a(model).bake()),
    "swap": (lambda: host("a"), swap),
    "swap with options": (lambda: host("a"), swap_with),
}


@pytest.mark.parametrize("change", CHANGES)
def test_all_of_a_change_is_made_or_nothing(change: str) -> None:
    make, run = CHANGES[change]
    model = make()
    before, stops = look(model), 0
    after = None
    for n in itertools.count(1):
        interrupted = Interrupted(n)
        if not interrupted(partial(run, model)):
            break
        stops += 1
        now = look(model)
        if now == before:
            continue
        if after is None:  # from here on it is all done
            other = make()
            run(other)
            after = plainly(look(other))
        assert plainly(now) == after, (interrupted.at, [key for key in after if plainly(now)[key] != after[key]])
        model = make()
        before = look(model)
    assert stops > 30 and plainly(look(model)) != plainly(before)


@pytest.mark.parametrize("names", [(), ("a",)], ids=["the first one", "a second one"])
def test_a_failed_install_leaves_nothing(names: tuple[str, ...]) -> None:
    model, stops = host(*names), 0
    before = look(model)
    for n in itertools.count(1):
        interrupted = Interrupted(n, {str(CORE / "surgery/installation.py"), str(CORE / "forward/class_swap.py")})
        if not interrupted(partial(peftcore.apply, model, "lora", name="b", target=["first"])):
            break
        stops += 1
        assert look(model) == before, interrupted.at
    assert stops > 30
