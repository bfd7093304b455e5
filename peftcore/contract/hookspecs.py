"""The hooks, in the order in which they run for an injection.

A hook asks all plugins; the steps of one method are functions of its class. For every hook that stops at the first
answer, the core's own implementation runs last and calls the method's function, so a plugin can answer before it or
wrap it. No hook runs while the host runs forward or backward. An implementation may accept fewer arguments than are
listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import torch
    import typer
    from torch import nn

    from peftcore.contract.config import MethodConfig
    from peftcore.contract.installed_methods import AppliedMethod, Installed
    from peftcore.contract.method import Method
    from peftcore.contract.presets import Preset
    from peftcore.contract.surgeon_protocol import Surgeon
    from peftcore.layers.layer import Layer
    from peftcore.roles import HostMap

API = 2
"""The version of these specifications; a plugin declares in ``PEFTCORE_API`` the version that it was written for."""


@dataclass(frozen=True)
class ForcedAttributes:
    """The forced attributes of modules of one class."""

    attributes: Mapping[str, Any]
    """Attributes of the view that replace the module's own."""
    always: bool = True
    """Forced while any injection is on the host; otherwise only while one acts inside the module."""
    wanted: Callable[[nn.Module], bool] = lambda module: True
    """Returns whether a given module of the class needs the forced attributes."""
    ready: Callable[[nn.Module], None] = lambda module: None
    """Puts a module into the state that the forced attributes assume, without changing its weights."""


hookspec = pluggy.HookspecMarker("peftcore")
hookimpl = pluggy.HookimplMarker("peftcore")


@hookspec
def peftcore_methods() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Name the methods of a plugin.

    Runs when the catalogue is first asked for anything; once for each plugin. Returns method names mapped to
    ``"module:Class"``: strings, so that a method's module is imported only on its first use.
    """


@hookspec
def peftcore_presets() -> Mapping[str, Preset]:  # type: ignore[empty-body]
    """Name the presets of a plugin: named sets of options of a method, which may belong to another plugin.

    Runs when the catalogue is first asked for anything; once for each plugin. Returns names mapped to `Preset`.
    """


@hookspec(firstresult=True)
def peftcore_map(model: nn.Module) -> HostMap | None:
    """Map the modules of a host to their roles.

    Runs at the start of `apply` and `plan`, unless the user passed a map. Gets the host. Returns the host's map, or
    None if the plugin cannot map this host; the core derives one from structure and names. Stops at the first result
    that is not None.
    """


@hookspec(firstresult=True)
def peftcore_layer(module: nn.Module, tensor: str) -> Layer | None:
    """Return how a module stores one of its tensors: the logical layout, how to read and write it, the linear map.

    Runs when sites are chosen, once for all modules with the same structure: modules of one class, with equal
    attributes, and with plain tensors of equal shapes and dtypes. The `Layer` is plain data; later it reads and writes
    tensors without hooks. Gets the module and the path of the tensor below it ("weight" for most). Returns a `Layer`,
    or None; the core returns the layers of dense tensors, a quantizing plugin those of quantized tensors. Stops at the
    first result that is not None.
    """


@hookspec(firstresult=True)
def peftcore_forced_attributes(cls: type[nn.Module]) -> ForcedAttributes | None:
    """Return the attributes that modules of a class must have while their host is adapted.

    Runs once for each class of modules that an adapted host has. Gets the class. Returns `ForcedAttributes`, or None;
    the core returns those for modules of torch. Stops at the first result that is not None.
    """


@hookspec
def peftcore_schemes() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Name the quantization schemes of a plugin, for `quantize`.

    Runs when a scheme is first asked for. Returns names mapped to ``"module:Class"``, each a `Scheme`: strings, so that
    the packages are imported only on first use. `peftcore_layer` recognizes the quantized modules.
    """


@hookspec
def peftcore_formats() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Name the file formats that a plugin reads or writes.

    Runs when an adapter is loaded, or saved in a format other than peftcore's. Returns names mapped to
    ``"module:Class"``, each a `peftcore.files.formats.format.Format`.
    """


@hookspec
def peftcore_translations() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Name the classes that describe how files of other libraries store a plugin's methods.

    Runs when such a file is read or written. Returns ``"format/name"`` mapped to ``"module:Class"``, where the name is
    the format's own name for the method: ``"peft/LORA"``. The format defines the interface of the class.
    """


@hookspec
def peftcore_tasks() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Name the tasks that a plugin adds to ``peftcore train``, ``compare`` and ``search``. A task defines its examples,
    and how they are scored.

    Called by the distribution peftcore-lab, when it looks for the task of a run. Returns names mapped to
    ``"module:Class"``, each a `peftcore_lab.tasks.task.Task`.
    """


@hookspec
def peftcore_commands(app: typer.Typer) -> None:
    """Add commands to the command line ``peftcore``.

    Runs when the user calls a command that the core does not have, or lists all commands; never on ``import peftcore``.
    Gets a typer application of the plugin's own: ``app.command()(function)`` adds a command, and ``app.add_typer`` a
    group of commands. Returns nothing. If a command has a name that is taken, the plugin's commands are left out and a
    warning says why.
    """


@hookspec
def peftcore_file_schemas() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Name the JSON schemas of the files that a plugin's commands read.

    Runs in ``peftcore schema NAME``. Returns the names of the commands mapped to ``"module:function"``; the function
    takes no arguments and returns the schema.
    """


@hookspec(firstresult=True)
def peftcore_inject(model: nn.Module, method: Method, config: MethodConfig, surgeon: Surgeon) -> bool | None:
    """Put a method's operators at its sites.

    Runs once in `apply` and `plan`. The host does not change before the hook returns. Gets the host, the method, its
    options and the surgeon whose verbs record the changes. Returns True when done; the core calls ``method.inject``.
    Stops at the first result that is not None.
    """


@hookspec(firstresult=True)
def peftcore_select(model: nn.Module, method: Method, config: MethodConfig, injection: AppliedMethod) -> bool | None:
    """Choose the parameters that train.

    Runs after the operators are in the host and the base is frozen, and when an injection is made trainable again. Runs
    in a plan too, where the operators are on the meta device and not in the host: choose by names, shapes and options.
    Gets the host, the method, its options and the injection; for a hybrid also each part, if the hybrid's method calls
    the hook for its parts. Returns True when done; the core calls ``method.trainable``. Stops at the first result that
    is not None.
    """


@hookspec(firstresult=True)
def peftcore_merge(
    model: nn.Module, method: Method, config: MethodConfig, injection: Installed
) -> Mapping[tuple[str, str], torch.Tensor] | None:
    """Compute the tensors that a merge writes.

    Runs in `Injection.merge`, before any weight changes. Gets the host, the method, its options and the injection.
    Returns the new stored tensors by (module path, tensor path); the core asks every operator for its effective
    tensors. The core then checks that all are finite and writes all or none. Stops at the first result that is not
    None.
    """
