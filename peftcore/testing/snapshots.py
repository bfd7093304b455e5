"""Records the state of an adapted model, of the files in a folder and of the process. Two records can be compared: of
one model at two times, or of two copies of a model."""

from __future__ import annotations

import contextvars
import gc
import os
import random
import sys
import tempfile
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import _len_torch_function_stack  # type: ignore[attr-defined]
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, is_traceable_wrapper_subclass

from peftcore.forward.choice.active_adapters import Choice
from peftcore.forward.context.context import HERE, drop_interrupted
from peftcore.forward.context.taps import Tap
from peftcore.forward.state.host_state import HostState
from peftcore.forward.state.slot import Slot
from peftcore.forward.tensors.view import TORCHS
from peftcore.injection.injection import Injection, injections, installed
from peftcore.layers.adapter_modules import IDLE
from peftcore.layers.layer import GRAFTED
from peftcore.surgery.watched_sites import WatchedSites

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, Path)
DEPTH = 3
"""The depth to which nested attributes of objects are compared."""
FILE = "file "
"""The prefix of the names of files in `Snapshot.values`."""


@dataclass
class Scene:
    """A model and other objects, on which an operation runs and whose state is compared before and after it.

    Attributes:
        model: the model.
        outputs: a function that computes outputs of the model, which are compared too; None to compare no outputs.
        folder: a folder whose files are compared.
        optimizers: optimizers of the model's or the adapter's parameters.
        others: other models that the operation uses, or that share modules with `model`.
        needs: any other object that the operation uses; it is not compared.
    """

    model: nn.Module
    outputs: Callable[[nn.Module], Any] | None = None
    folder: Path | None = None
    optimizers: Sequence[Optimizer] = ()
    others: Sequence[nn.Module] = ()
    needs: Any = None


@dataclass
class Snapshot:
    """The recorded state of a scene (a model and other objects) at one time.

    Attributes:
        values: the recorded values, by the place where they are in the scene. They are equal for equal scenes.
        objects: the objects whose identity is compared if both records are of one scene, by place. References to the
            objects are stored, because a new object may get the id of a deleted one.
    """

    values: dict[str, Any] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)

    def differences(self, other: Snapshot, *, same_scene: bool = False, leave: Sequence[str] = ()) -> list[str]:
        """Return the names of the places at which two snapshots differ.

        Args:
            other: the other snapshot.
            same_scene: True if both snapshots are of the same scene, so that its objects must be identical too.
            leave: prefixes of places that are not compared.
        """
        places = [place for place in dict.fromkeys((*self.values, *other.values)) if not place.startswith(tuple(leave))]
        found = [place for place in places if not _same(self.values, other.values, place)]
        if same_scene:
            found += [
                f"object at {place}"
                for place in dict.fromkeys((*self.objects, *other.objects))
                if not place.startswith(tuple(leave)) and self.objects.get(place) is not other.objects.get(place)
            ]
        return found

    def files(self) -> dict[str, bytes]:
        """Return the files of the folder, by path."""
        return {place: each for place, each in self.values.items() if place.startswith(FILE)}


def _same(one: Mapping[str, Any], other: Mapping[str, Any], place: str) -> bool:
    return place in one and place in other and bool(one[place] == other[place])


def snapshot(scene: Scene) -> Snapshot:
    """Return a snapshot of a scene (a model and other objects). It records tensors bit by bit, and classes, attributes,
    hooks, `requires_grad`, training modes, injections and active adapters of the models. It also records optimizers,
    files and outputs."""
    found = Snapshot()
    for index, model in enumerate((scene.model, *scene.others)):
        _of_model(found, f"other {index}: " if index else "", model)
    for index, optimizer in enumerate(scene.optimizers):
        _of_optimizer(found, f"optimizer {index}", optimizer)
    if scene.folder is not None:
        for path in sorted(scene.folder.rglob("*")):
            content = path.read_bytes() if path.is_file() else b"a folder"
            found.values[f"{FILE}{path.relative_to(scene.folder)}"] = content
    if scene.outputs is not None:
        try:
            found.values["outputs"] = described(scene.outputs(scene.model))
        except Exception as error:
            found.values["outputs"] = f"{type(error).__name__}: {error}"
    return found


def _of_model(found: Snapshot, prefix: str, model: nn.Module) -> None:
    values, objects = found.values, found.objects
    for path, module in model.named_modules(remove_duplicate=False):
        place = f"{prefix}{path or 'the model'}"
        cls = type(module)
        values[f"class of {place}"] = (cls.__module__, cls.__qualname__, GRAFTED in vars(cls))
        values[f"training of {place}"] = module.training
        objects[place] = module
        for name, value in vars(module).items():
            if name in TORCHS and name not in ("_parameters", "_buffers"):
                continue
            if isinstance(value, dict) and name.endswith("_hooks"):
                continue
            if name in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    values[f"{place}.{key}"] = name, described(tensor)
                    objects[f"{place}.{key}"] = tensor
            elif isinstance(value, HostState):
                values |= {f"state, {key}": each for key, each in _state(value).items()}
            elif name == IDLE:
                values[f"{place}.{name}"] = type(value).__name__
            else:
                values[f"{place}.{name}"] = described(value)
        for name, hooks in vars(module).items():
            if isinstance(hooks, dict) and "hooks" in name and hooks:
                values[f"{name} of {place}"] = [described(each) for each in hooks.values()]
    values[f"{prefix}order of tensors"] = [name for name, _ in _tensors(model)]
    values[f"{prefix}order of modules"] = [path for path, _ in model.named_modules()]
    values[f"{prefix}order of injections"] = list(injections(model))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _of_optimizer(found: Snapshot, place: str, optimizer: Optimizer) -> None:
    numbers: dict[int, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            found.values[f"{place}, group {index}, {key}"] = len(value) if key == "params" else described(value)
        for parameter in group["params"]:
            number = numbers[id(parameter)] = len(numbers)
            found.objects[f"{place}, parameter {number}"] = parameter
            found.values[f"{place}, parameter {number}"] = described(parameter)
    for parameter, state in optimizer.state.items():
        found.values[f"{place}, state of parameter {numbers.get(id(parameter))}"] = described(state)
    for name, hooks in vars(optimizer).items():
        if name.endswith("_hooks") and isinstance(hooks, dict):
            found.values[f"{place}, {name}"] = [described(each) for each in hooks.values()]


def described(value: Any, depth: int = DEPTH) -> Any:
    """Return a description of a value, which is equal for equal copies of the value. Tensors are described by their
    bytes, functions by their names, and other objects by their class and attributes."""
    if isinstance(value, PLAIN):
        return value if value == value else "nan"
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, HostState):
        return _state(value)
    if isinstance(value, Slot):
        return _slot(value)
    if isinstance(value, Tap):  # its key is a number of the process
        return type(value).__name__, value.until_backward, value.learns
    if isinstance(value, nn.Module | Injection | threading.Thread) or depth == 0:
        return type(value).__name__
    if isinstance(value, partial):
        return "partial", described(value.func, depth - 1), [described(each, depth - 1) for each in value.args]
    if isinstance(value, types.FunctionType | types.MethodType | types.BuiltinFunctionType | type):
        return value.__qualname__
    if isinstance(value, Mapping):
        return type(value).__name__, [
            (described(key, depth - 1), described(each, depth - 1)) for key, each in list(value.items())
        ]
    if isinstance(value, list | tuple):
        return type(value).__name__, [described(each, depth - 1) for each in value]
    if isinstance(value, set | frozenset):
        return type(value).__name__, sorted(repr(described(each, depth - 1)) for each in value)
    own = getattr(value, "__dict__", None)
    if not own:
        return type(value).__name__
    return type(value).__name__, {key: described(each, depth - 1) for key, each in own.items()}


def _tensor(tensor: Tensor) -> Any:
    told = (
        type(tensor).__name__, str(tensor.dtype), tuple(tensor.shape), str(tensor.device), tensor.requires_grad
    )  # fmt: skip
    if is_traceable_wrapper_subclass(tensor):
        names = tensor.__tensor_flatten__()[0]
        return told, [(name, described(getattr(tensor, name))) for name in names]
    grad = _bytes(tensor.grad) if tensor.is_leaf and tensor.grad is not None else None
    return told, _bytes(tensor.detach()), grad


def _bytes(tensor: Tensor) -> bytes:
    if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter):
        return b""
    flat = tensor.cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _choice(choice: Choice) -> Any:
    route = choice.route and (choice.route.names, choice.route.positions, choice.route.copies, choice.route.since)
    return choice.active, route, repr(choice.composition), sorted(choice.context)


def _state(state: HostState) -> dict[str, Any]:
    """Return a description of the state of a model's adapters, without values that are computed only when they are
    needed."""
    _running()
    here: Any
    try:
        here = _choice(state.now())
    except Exception as error:
        here = type(error).__name__
    return {
        "injections": {name: _injection(each) for name, each in installed(state).items()},
        "merged": state.merged,
        "frozen": len(state.frozen),
        "reads tokens": state.reads_tokens,
        "tokens": state.tokens,
        "swapping": sorted(state.swapping),
        "running": sum(each.open for each in state.running.values()),
        "slots": [_slot(each) for each in state.slots],
        "tables": sorted(state.watched.tables) if isinstance(state.watched, WatchedSites) else [],
        "choice": _choice(state.choice),
        "choice here": here,
        "idle": None if state.residency is None else state.residency.names(False),
    }


def _injection(injection: Injection) -> dict[str, Any]:
    return {
        "method": injection.method.name,
        "config": injection.config.model_dump(),
        "active": injection.name in injection.state.choice.acting,
        "merged": injection.merged,
        "low memory": injection.low_memory,
        "steps taken": injection.steps_taken,
        "made of": sorted(injection.made_of),
        "chosen": injection._chosen,
        "watched": sorted(injection._ledgers),
        "ties": dict(injection.ties),
        "operators": [
            (
                graft.key,
                type(graft.operator).__name__,
                [(site.path, type(site.layer).__name__) for site in graft.holders],
            )
            for graft in injection.grafts
        ],
        "trains": [parameter.requires_grad for parameter in injection.parameters()],
    }


def _slot(slot: Slot) -> Any:
    mounts = {
        name: [(type(each.operator).__name__, each.form, each.tensor) for each in mounts]
        for name, mounts in slot.mounts.items()
    }
    forced = [(name, sorted(attributes)) for name, attributes in slot.forced_attributes]
    return slot.path, mounts, forced


def process() -> dict[str, Any]:
    """Return the parts of the process's state that an operation must not change, such as random number generators and
    modes of torch.

    Threads, open files and temporary files are counted. An operation must not leave new ones, but older ones may end
    while it runs.
    """
    return {
        "torch's random numbers": torch.random.get_rng_state().tolist(),
        "Python's random numbers": random.getstate(),
        "numpy's random numbers": repr(sys.modules["numpy"].random.get_state()) if "numpy" in sys.modules else "",
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "modes of torch": (_len_torch_function_stack(), len(_get_current_dispatch_mode_stack())),
        "fused attention": torch.backends.mha.get_fastpath_enabled(),
        "process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "garbage collection": gc.isenabled(),
        "threads": Counter(f"{each.name} {each.ident}" for each in threading.enumerate()),
        "open files": _open_files(),
        "the working folder": os.getcwd(),
        "temporary files": Counter(os.listdir(tempfile.gettempdir())),
        "variables of the context": {
            variable.name: value if isinstance(value, (*PLAIN, frozenset)) else len(value)
            for variable, value in contextvars.copy_context().items()
            if isinstance(value, (*PLAIN, frozenset, tuple, list))
        },
        "forwards that run": (_running(), HERE.calm is None, len(HERE.generating)),
    }


def _running() -> int:
    """Return the number of forwards that are running. Forwards that were ended by an interrupt are removed first, as
    the next forward would do."""
    drop_interrupted()
    return len(HERE.calls)


def put_back(before: Mapping[str, Any]) -> None:
    """Restore modes of torch and random number generators to the state that `process` has returned."""
    torch.random.set_rng_state(torch.tensor(before["torch's random numbers"], dtype=torch.uint8))
    random.setstate(before["Python's random numbers"])
    torch.set_grad_enabled(before["gradients"][0])
    torch.set_default_dtype(before["default dtype"])
    for variable, value in contextvars.copy_context().items():
        if isinstance(value, (*PLAIN, frozenset)) and value != before["variables of the context"].get(variable.name):
            with suppress(LookupError):  # it has no default
                variable.set(contextvars.Context().run(variable.get))


def _open_files() -> Counter[str]:
    """Count the open files of the process by path; empty if the system does not list them."""
    found: Counter[str] = Counter()
    for each in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        try:
            found[os.readlink(f"/proc/self/fd/{each}")] += 1
        except OSError:  # the listing's own
            continue
    return found
