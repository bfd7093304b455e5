"""Writes injections as folders of peft: options, patterns, targets and names of tensors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import starmap
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from peftcore.contract.installed_methods import AppliedMethod
from peftcore.contract.surgeon_protocol import Graft
from peftcore.errors import ExportError
from peftcore.files.added_rows import added_rows
from peftcore.files.envelope import base_name, base_revision
from peftcore.files.formats.peft_method import PeftMethod, peft_methods
from peftcore.files.formats.peft_module_names import WRAPPER
from peftcore.files.formats.peft_tying import tying
from peftcore.files.formats.translated_operators import Place, places_of
from peftcore.injection.injection import Injection
from peftcore.layers.layer import plain_class
from peftcore.registry.plugins import imported
from peftcore.targets.sites import BesideSite, Site


def module_key(site: Site) -> str:
    """Returns the path of the module that peft wraps for a site.

    Raises:
        ExportError: the site is a part of a tensor, and peft adapts only whole tensors.
    """
    if site.slices is not None:
        raise ExportError(
            f"{site.path} is a part of a fused projection; peft adapts only whole modules: pass the module's name as "
            "target=, or save in peftcore's own format"
        )
    if site.tensor == "out_proj.weight":  # the attention around it is
        return site.module_path
    path = f"{site.module_path}.{site.tensor}".lstrip(".")
    return path if is_parameter(site) else path.rpartition(".")[0]


def is_parameter(site: Site) -> bool:
    """True if peft can adapt the site only with its option `target_parameters`, since peft does not treat the module as
    a layer."""
    name, module = site.tensor.rpartition(".")[2], site.module
    if site.slices is not None or site.layer.batch_dims or name not in ("weight", "bias", "in_proj_weight"):
        return site.slices is None
    own = (
        isinstance(module, nn.Linear | nn.Embedding | nn.MultiheadAttention | _ConvNd)
        or site.layer.called
        or site.layer.one_hot
    )
    return site.tensor in module._parameters and not own and len(site.weight_shape) > 1


def stem_of(site: Site, all_sites: Iterable[Site]) -> str:
    """Returns the prefix of the names of a site's tensors. If several parameters of one module are adapted, peft nests
    their wrappers, so that their prefixes differ."""
    if not is_parameter(site):
        inside = [WRAPPER, "out_proj"] if site.tensor == "out_proj.weight" else []
        return ".".join([module_key(site), *inside])
    beside = {each.tensor for each in all_sites if is_parameter(each) and each.module is site.module}
    order = [name for name in site.module._parameters if name in beside]
    return ".".join([site.module_path, *[WRAPPER] * (len(order) - 1 - order.index(site.tensor))])


def common(
    options: Mapping[str, Mapping[str, Any]],
    patterns: Mapping[str, str],
    name_of: Callable[[str, Collection[str]], str],
) -> dict[str, Any]:
    """Returns peft's options for the whole file. `options` has the options of each place, keyed by path. Values that
    differ between places are written as patterns.

    Args:
        name_of: returns a pattern that matches only one of the paths.

    Raises:
        ExportError: an option for which peft has no pattern differs between places.
    """
    names = {name for each in options.values() for name in each}
    found: dict[str, Any] = {}
    by_option = {option: pattern for pattern, option in patterns.items()}
    for name in sorted(names):
        values = {path: each[name] for path, each in options.items() if name in each}
        (most, _), *others = Counter(json.dumps(value) for value in values.values()).most_common()
        found[name] = json.loads(most)
        if others and name not in by_option:
            raise ExportError(
                f"peft has one {name} for all modules, this adapter has {', '.join([most, *map(str, others)])}"
            )
        if name in by_option:
            other = {path: value for path, value in values.items() if value != found[name]}
            found[by_option[name]] = {name_of(path, options): value for path, value in other.items()}
    return found


def targets(applied: AppliedMethod, grafts: Iterable[Graft]) -> dict[str, Any]:
    """Returns peft's option `target_modules`: the last parts of the adapted modules' paths, if they match no other
    modules; otherwise the whole paths. Adapted parameters are in `target_parameters`."""
    sites = [graft.site for graft in grafts]
    parameters = sorted({f"{s.module_path}.{s.tensor}".lstrip(".") for s in sites if is_parameter(s)})
    paths = {module_key(site) for site in sites if not is_parameter(site)}
    leaves = {path.rpartition(".")[2] for path in paths}
    everywhere = {path for path, _ in applied.model.named_modules() if path.rpartition(".")[2] in leaves}
    everywhere = {path for path in everywhere if ".peft." not in f".{path}."}
    beside = {"target_parameters": parameters} if parameters else {}
    return {"target_modules": sorted(leaves if everywhere == paths else paths), **beside}


def _adapted(injection: Injection) -> set[str]:
    """Returns the paths of the modules that the method changes."""
    grafts = [graft for graft in injection.grafts if graft.by_method]
    return {graft.site.module_path for graft in grafts if not isinstance(graft.site, BesideSite)}


def along(injection: Injection, method: PeftMethod) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns peft's options `modules_to_save` and `bias` for the modules and biases that train with the adapter, and
    the tensors of these modules and biases, keyed by peft's names.

    Raises:
        ExportError: only a part of a module or only some biases are trained, or peft would untie modules.
    """
    only, stem = method.bias, method.stem
    grafts = [graft for graft in injection.grafts if graft.trained_along]
    replaced = {(site.module_path, site.tensor): graft for graft in grafts for site in graft.holders}
    adapted = _adapted(injection)
    modules = {site.module_path: site.module for graft in grafts for site in graft.holders}
    own = {path: [name for name, value in module._parameters.items() if value is not None]
           for path, module in modules.items()}  # fmt: skip
    whole = {path for path, names in own.items() if path and all((path, name) in replaced for name in names)}
    partly = {key for key in replaced if key[0] not in whole}
    everywhere = {(path.rpartition(".")[0], "bias") for path, _ in injection.model.named_parameters() if
                  path.endswith(".bias") and ".peft." not in path}  # fmt: skip
    beside = {key for key in everywhere if key[0] in adapted}
    mode = "none" if not partly else only if partly == beside else "all" if partly == everywhere else ""
    if (not only and mode != "none") or not mode:
        shown = ", ".join(".".join(key) for key in sorted(partly)[:4])
        raise ExportError(f"with an adapter, peft trains whole modules or all biases, not {shown}")
    copied = {id(graft): graft for (path, _), graft in replaced.items() if path in whole}.values()
    tied = tying(injection.model, copied, injection.ties, method.ties)
    tensors = {}
    for (path, name), graft in replaced.items():
        inside = f".{WRAPPER}" if path in adapted else ""
        tensors[f"{stem}{path}{inside}.{name}"] = graft.operator.state_dict()["value"]
    for path in whole:  # peft wants a norm's statistics, too
        module = injection.model.get_submodule(path)
        held = {name: each for name, each in module._buffers.items() if name not in module._non_persistent_buffers_set}
        tensors |= {f"{stem}{path}.{name}": each for name, each in held.items() if each is not None}
    return {"modules_to_save": sorted(whole) or None, **({"bias": mode} if only else {}), **tied}, tensors


def tables(injection: Injection, stem: str) -> dict[str, Tensor]:
    """Returns the whole token tables to which rows were added, keyed by peft's names. peft saves such tables with any
    adapter."""
    adapted = _adapted(injection)
    found = {}
    for path, rows in added_rows(injection).items():
        inside = f".{WRAPPER}" if path in adapted else ""
        found[f"{stem}{path}{inside}.weight"] = rows.weight
        if rows.bias is not None:
            found[f"{stem}{path}{inside}.bias"] = rows.bias
    return found


def whole(injection: AppliedMethod, kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all options of the file: `options`, and the options that every adapter type of peft has."""
    return {
        "peft_type": kind,
        "base_model_name_or_path": base_name(injection.model),
        "task_type": None,
        "auto_mapping": None,
        "inference_mode": True,
        **options,
    }


def with_class(options: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Returns the options, with the class of the base and the commit from which the base was loaded. peft's
    ``AutoPeftModel`` needs the class if the options have no task type."""
    cls = plain_class(model)
    named = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    commit = base_revision(model)
    beside = {"revision": commit} if commit else {}
    return {**options, "auto_mapping": None if options["task_type"] else named, **beside}


def text_of(options: Mapping[str, Any]) -> str:
    """Returns the text of ``adapter_config.json``."""
    return json.dumps(options, indent=2, sort_keys=True) + "\n"


@dataclass
class WrittenPeftType:
    """An injection, or a part of one, translated into one adapter type of peft."""

    kind: str
    method: PeftMethod
    places: list[Place]
    options: dict[str, Any]
    shared: Mapping[str, nn.Module]

    @property
    def modules(self) -> set[str]:
        """The paths of the modules that the type adapts."""
        return {place.site.module_path for place in self.places}

    def tensors(self, *, beside: bool = False) -> dict[str, Tensor]:
        """Returns the tensors, keyed by peft's names. With `beside`, the names are those for a file whose main type is
        another one."""
        method, sites, found = self.method, [place.site for place in self.places], {}
        for place in self.places:
            stem = f"{method.stem}{stem_of(place.site, sites)}." if method.below else ""
            for name, value in method.write(place).items():
                found[f"{stem}{method.beside.get(name, name) if beside else name}"] = value.detach()
        for each in (method.write_all(self.places), *starmap(method.write_shared, self.shared.items())):
            found |= {name: value.detach() for name, value in each.items()}
        return found


def _written(applied: AppliedMethod) -> WrittenPeftType:
    """Returns one applied method, translated into an adapter type of peft.

    Raises:
        ExportError: peft cannot store it, or only a part of it.
    """
    kind, method = _writer_of(applied)
    places = places_of(applied)
    by_path: dict[str, dict[str, Any]] = {}
    for place in places:
        key, here = module_key(place.site), method.write_options_at(place)
        method.check(place, ExportError)
        if by_path.setdefault(key, here) != here:
            raise ExportError(f"peft has the same options for all of {key}, this adapter has several")
    options = common(by_path, method.patterns, method.pattern)
    if method.below:
        options |= targets(applied, [place.graft for place in places])
    options |= method.write_options_of_all(places, applied.model)
    return WrittenPeftType(kind, method, places, options, applied.shared)


def _writer_of(applied: AppliedMethod) -> tuple[str, PeftMethod]:
    for kind, where in peft_methods().items():
        method: PeftMethod = imported(where)()
        if applied.method.name in method.methods and method.holds(applied.config):
            return kind, method
    raise ExportError(f"peft has no method that computes what {applied.method.name} does with these options")


def written(injection: Injection) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the contents of the two files of a peft folder: the options, and the tensors.

    Raises:
        ExportError: peft cannot store this injection.
    """
    each = [_written(applied) for applied in (injection.parts.values() if _apart(injection) else [injection])]
    main, options = _joined(each)
    tensors = main.tensors()
    for other in each:
        if other is not main:
            tensors |= other.tensors(beside=True)
            if both := sorted(main.modules & other.modules):
                raise ExportError(f"peft cannot have {main.kind} and {other.kind} at one module: {both[0]}")
    trained, values = along(injection, main.method)
    values |= tables(injection, main.method.stem)
    if not main.method.trained_beside:
        if values:
            raise ExportError(f"peft's {main.kind} cannot hold {min(values)}, which trains with the adapter")
        trained = {}
    return whole(injection, main.kind, options | trained), tensors | values


def written_parts(injection: Injection) -> tuple[str, dict[str, tuple[dict[str, Any], dict[str, Tensor]]]]:
    """Returns the name of the option that lists the folders of other adapters, and the contents of the two files in
    each folder, keyed by the adapter's name. Both are empty for methods whose files list no folders.

    Raises:
        ExportError: peft cannot store a part.
    """
    folders: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {}
    _, method = _writer_of(injection) if injection.parts and not _apart(injection) else ("", None)
    if method is None or not method.folders:
        return "", folders
    for name, part in injection.parts.items():
        each = _written(part)
        if each.kind not in method.part_kinds:
            raise ExportError(
                f"part {name} is {part.method.name}, and peft only allows {' and '.join(method.part_kinds)}"
            )
        if other := method.part_differs(each.options):
            raise ExportError(f"part {name}: peft computes something else with {other}")
        folders[name] = whole(part, each.kind, each.options), each.tensors()
    return method.folders, folders


def _apart(injection: Injection) -> bool:
    """Whether an injection is a hybrid whose operators all belong to its parts."""
    return bool(injection.parts) and all(graft.part for graft in injection.grafts if graft.by_method)


def _joined(each: list[WrittenPeftType]) -> tuple[WrittenPeftType, dict[str, Any]]:
    """Returns the main type of a file that contains all types in `each`, and the options of the file."""
    if len(each) == 1:
        return each[0], each[0].options
    for main in each:
        others = [(other.kind, other.options) for other in each if other is not main]
        if (held := main.method.joined(others)) is not None:
            return main, main.options | held
    kinds = " and ".join(sorted({one.kind for one in each}))
    raise ExportError(f"peft cannot hold several parts of the types {kinds} in one file")
