"""The hooks, in the order in which they run for an injection.

A hook is called in all plugins. For hooks with ``firstresult=True`` the calls stop at the first result that is not
None. The core has its own implementation of these, which runs last, so a plugin can return a result before it or wrap
it. For a step of one method (inject, select, merge) the core's implementation calls the code of the method. No hook
runs while the host runs forward or backward. An implementation may accept fewer arguments than are listed here.
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
"""The version of the hooks in this file. A plugin declares in ``PEFTCORE_API`` the version that it was written for."""


@dataclass(frozen=True)
class ForcedAttributes:
    """The forced attributes of modules of one class: attributes that have other values while the host is adapted."""

    attributes: Mapping[str, Any]
    """The forced attributes by name. They are set on the view (the stand-in object on which forward runs) instead of
    the module."""
    always: bool = True
    """True if the attributes are forced while any injection is on the host; False if only while an injection acts
    inside the module."""
    wanted: Callable[[nn.Module], bool] = lambda module: True
    """Returns whether a given module of the class needs the forced attributes."""
    ready: Callable[[nn.Module], None] = lambda module: None
    """Prepares a module so that the forced attributes work on it. It does not change the module's weights."""


hookspec = pluggy.HookspecMarker("peftcore")
hookimpl = pluggy.HookimplMarker("peftcore")


@hookspec
def peftcore_methods() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Name the methods of a plugin.

    Runs once for each plugin, on the first use of the catalogue of methods. Returns method names mapped to
    ``"module:Class"``. They are strings, so that a method's module is imported only on its first use.
    """


@hookspec
def peftcore_presets() -> Mapping[str, Preset]:  # type: ignore[empty-body]
    """Name the presets of a plugin. A preset is a named set of options of a method; the method may belong to another
    plugin.

    Runs once for each plugin, on the first use of the catalogue of methods. Returns names mapped to `Preset`.
    """


@hookspec(firstresult=True)
def peftcore_map(model: nn.Module) -> HostMap | None:
    """Map the modules of a host to their roles.

    Runs at the start of `apply` and `plan`, unless the user passed a map. Gets the host. Returns the host's map, or
    None if the plugin cannot map this host. Stops at the first result that is not None. If no plugin returns a map, the
    core derives one from structure and names.
    """


@hookspec(firstresult=True)
def peftcore_layer(module: nn.Module, tensor: str) -> Layer | None:
    """Return the `Layer` of a module's tensor: it describes the logical layout and the linear map, and reads and writes
    the tensor.

    Runs when sites are chosen, once for all modules with the same structure: modules of one class, with equal
    attributes, and with plain tensors of equal shapes and dtypes. The `Layer` is plain data; later it reads and writes
    tensors without hooks. Gets the module and the path of the tensor below it ("weight" for most). Returns a `Layer`,
    or None; the core returns the layers of dense tensors, a quantizing plugin those of quantized tensors.
    Stops at the first result that is not None.
    """


@hookspec(firstresult=True)
def peftcore_forced_attributes(cls: type[nn.Module]) -> ForcedAttributes | None:
    """Return the attributes that modules of a class must have while their host is adapted.

    Runs once for each class of modules in an adapted host. Gets the class. Returns `ForcedAttributes`, or None. The
    core returns the forced attributes of classes of torch. Stops at the first result that is not None.
    """


@hookspec
def peftcore_schemes() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Name the quantization schemes of a plugin, for `quantize`.

    Runs when a scheme is first looked up. Returns names mapped to ``"module:Class"``, where each class is a `Scheme`.
    They are strings, so that the packages are imported only on first use. The plugin also implements `peftcore_layer`,
    which recognizes the quantized modules.
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

    Runs when a file of another library is read or written. Returns ``"format/name"`` mapped to ``"module:Class"``, for
    example with the key ``"peft/LORA"``. The name after the slash is the name of the method in that format. The format
    defines the interface of the class.
    """


@hookspec
def peftcore_tasks() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Name the tasks that a plugin adds to ``peftcore train``, ``compare`` and ``search``. A task defines its examples
    and the scores of a model's answers.

    Runs in the distribution peftcore-lab, when it looks up the task of a run by name. Returns names mapped to
    ``"module:Class"``, each a `peftcore_lab.tasks.task.Task`.
    """


@hookspec
def peftcore_commands(app: typer.Typer) -> None:
    """Add commands to the command line ``peftcore``.

    Runs when the user calls a command that the core does not have, or lists all commands; never on ``import peftcore``.
    Gets a new typer application for this plugin: ``app.command()(function)`` adds a command to it, and
    ``app.add_typer`` a group of commands. Returns nothing. If another command already has the name of one of the
    commands, the plugin's commands are left out with a warning.
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

    Runs once in `apply` and `plan`. The host does not change before the hook returns. Gets the host, the method, the
    method's options, and the surgeon, the object that records the changes. Returns True when done. The core's
    implementation calls ``method.inject``. Stops at the first result that is not None.
    """


@hookspec(firstresult=True)
def peftcore_select(model: nn.Module, method: Method, config: MethodConfig, injection: AppliedMethod) -> bool | None:
    """Choose the parameters that train.

    Runs after the operators are in the host and the base is frozen, and when an injection is made trainable again. Runs
    in a plan too, where the operators are on the meta device and not in the host. So choose by names, shapes and
    options, not by values. Gets the host, the method, its options and the injection. For a hybrid, it runs for the
    parts too, if the hybrid's method calls the hook for them. Returns True when done. The core's implementation calls
    ``method.trainable``. Stops at the first result that is not None.
    """


@hookspec(firstresult=True)
def peftcore_merge(
    model: nn.Module, method: Method, config: MethodConfig, injection: Installed
) -> Mapping[tuple[str, str], torch.Tensor] | None:
    """Compute the tensors that a merge writes.

    Runs in `Injection.merge`, before any weight changes. Gets the host, the method, its options and the injection.
    Returns the new tensors, in the form in which modules store them, by (module path, tensor path). The core's
    implementation computes them from every operator's effective tensor. Then the core checks that all are finite, and
    writes all of them or none. Stops at the first result that is not None.
    """
