"""Folders of peft from our injections: options, patterns, targets and names of tensors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from peftcore.envelope import base_name
from peftcore.errors import ExportError
from peftcore.injection import Injection
from peftcore.interop.peft_names import PREFIXES, WRAPPER
from peftcore.surgery import Graft
from peftcore.targets import Site

STEM = PREFIXES[0]


def module_key(site: Site) -> str:
    """The path of the module that peft wraps for a site.

    Raises:
        ExportError: peft adapts whole tensors only.
    """
    if site.rows is not None:
        raise ExportError(
            f"{site.path} is a part of a fused projection; peft adapts whole modules only, so apply with target= the "
            "module's name, or keep our own format"
        )
    path = f"{site.module_path}.{site.tensor}".lstrip(".")
    return site.module_path if site.tensor == "in_proj_weight" else path.removesuffix(".weight")


def is_parameter(site: Site) -> bool:
    """Whether peft reaches the site by `target_parameters` only."""
    return site.rows is None and site.layer.batch_dims > 0


def stem_of(site: Site, all_sites: Iterable[Site]) -> str:
    """What stands in front of a site's tensors: peft wraps the parameters of one module one round the other."""
    if not is_parameter(site):
        steps = module_key(site).split(".")
        inside = site.tensor == "out_proj.weight"  # the attention around it is wrapped as well
        return STEM + ".".join([*steps[:-1], WRAPPER, steps[-1]] if inside else steps)
    beside = {each.tensor for each in all_sites if is_parameter(each) and each.module is site.module}
    order = [name for name in site.module._parameters if name in beside]
    return STEM + ".".join([site.module_path, *[WRAPPER] * (len(order) - 1 - order.index(site.tensor))])


def common(
    options: Mapping[str, Mapping[str, Any]],
    patterns: Mapping[str, str],
    name_of: Callable[[str, Collection[str]], str],
) -> dict[str, Any]:
    """Peft's options for all places, from those of each, by path: what differs goes into patterns.

    Args:
        name_of: how a pattern means one path of all of them.

    Raises:
        ExportError: something differs that peft has no pattern for.
    """
    names = {name for each in options.values() for name in each}
    found: dict[str, Any] = {}
    by_option = {option: pattern for pattern, option in patterns.items()}
    for name in sorted(names):
        values = {path: each[name] for path, each in options.items()}
        (most, _), *others = Counter(json.dumps(value) for value in values.values()).most_common()
        found[name] = json.loads(most)
        if others and name not in by_option:
            raise ExportError(
                f"peft has one {name} for all modules; here they are {', '.join([most, *map(str, others)])}"
            )
        if name in by_option:
            other = {path: value for path, value in values.items() if value != found[name]}
            found[by_option[name]] = {name_of(path, options): value for path, value in other.items()}
    return found


def targets(injection: Injection, grafts: Iterable[Graft]) -> dict[str, Any]:
    """`target_modules` by the last names, where these mean no other module, and by whole paths elsewhere."""
    sites = [graft.site for graft in grafts]
    parameters = sorted({f"{s.module_path}.{s.tensor}".lstrip(".") for s in sites if is_parameter(s)})
    paths = {module_key(site) for site in sites if not is_parameter(site) and site.tensor != "out_proj.weight"}
    leaves = {path.rpartition(".")[2] for path in paths}
    everywhere = {path for path, _ in injection.model.named_modules() if path.rpartition(".")[2] in leaves}
    everywhere = {path for path in everywhere if ".peft." not in f".{path}."}
    return {"target_modules": sorted(leaves if everywhere == paths else paths), "target_parameters": parameters or None}


def along(injection: Injection, only: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What was trained along, as peft's `modules_to_save` and `bias`, and the tensors by peft's names.

    Args:
        only: peft's word for biases of adapted modules alone, where the type has one.

    Raises:
        ExportError: it was a part of a module, or some biases.
    """
    replaced = {(g.site.module_path, g.site.tensor): g for g in injection.grafts if not g.by_method}
    adapted = {graft.site.module_path for graft in injection.grafts if graft.by_method}
    own = {path: [name for name, value in graft.site.module._parameters.items() if value is not None]
           for (path, _), graft in replaced.items()}  # fmt: skip
    whole = {path for path, names in own.items() if path and all((path, name) in replaced for name in names)}
    partly = {key for key in replaced if key[0] not in whole}
    everywhere = {(path.rpartition(".")[0], "bias") for path, _ in injection.model.named_parameters() if
                  path.endswith(".bias") and ".peft." not in path}  # fmt: skip
    beside = {key for key in everywhere if key[0] in adapted}
    mode = "none" if not partly else only if partly == beside else "all" if partly == everywhere else ""
    if (not only and mode != "none") or not mode:
        shown = ", ".join(".".join(key) for key in sorted(partly)[:4])
        raise ExportError(f"peft trains along whole modules, or all biases, and not {shown}")
    tensors = {}
    for (path, name), graft in replaced.items():
        inside = f".{WRAPPER}" if path in adapted else ""
        tensors[f"{STEM}{path}{inside}.{name}"] = graft.operator.state_dict()["value"]
    return {"modules_to_save": sorted(whole) or None, **({"bias": mode} if only else {})}, tensors


def whole(injection: Injection, kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options, with what every type of peft has."""
    return {
        "peft_type": kind,
        "base_model_name_or_path": base_name(injection.model),
        "task_type": None,
        "inference_mode": True,
        **options,
    }


def text_of(options: Mapping[str, Any]) -> str:
    """The text of ``adapter_config.json``."""
    return json.dumps(options, indent=2, sort_keys=True) + "\n"
