"""Checks of files: a saved adapter can be loaded unchanged on any equal host, equal adapters are saved as equal bytes,
and wrong files raise errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.files.formats.card import CARD
from peftcore.files.formats.native import ENVELOPE, METADATA, TENSORS
from peftcore.files.safe_io import TensorFile
from peftcore.injection.injection import Injection
from peftcore.testing.kit import Case, NotApplicable, check, fill
from peftcore.testing.tools import default_dtype, findable

FILES = sorted([CARD, ENVELOPE, TENSORS])
ONE = ("mlp", "encoder", "llama")
"""Hosts for checks that need only one host, because they test the file itself."""


@contextmanager
def saved(case: Case, **changes: Any) -> Iterator[tuple[Path, Injection, nn.Module, dict[str, Any]]]:
    """Save an injection with random values. Yields the folder of the file, the injection, its model and the model's
    inputs."""
    model, inputs = case.fresh()
    injection = case.apply(model, seed=7, **changes)
    fill(injection)
    with TemporaryDirectory() as folder, findable(case.method):
        path = Path(folder) / "adapter"
        injection.save(path)
        yield path, injection, model, inputs


@check(
    "a saved adapter gives the same outputs on another copy of the host, whatever the seed",
    cause="what the operators compute with is neither a parameter nor a buffer nor an option, so it is not in the file",
    remedy="make it a buffer, also what was drawn or computed in `__init__`",
)
def loading_gives_the_same_outputs(case: Case) -> None:
    with saved(case) as (path, injection, model, inputs):
        expected = case.quiet(model, inputs)
        other, _ = case.fresh()
        base = case.quiet(other, inputs)
        state = torch.random.get_rng_state()
        torch.manual_seed(1234)
        loaded = peftcore.load(other, path, trainable=True)  # torch rounds otherwise with matrices that are frozen
        torch.random.set_rng_state(state)
        case.expect_moved(expected, base, "the saved adapter's output")
        case.expect_equal(case.quiet(other, inputs), expected, "output of the loaded adapter")
        case.expect(list(loaded.operators) == list(injection.operators), "it stands elsewhere")
        for key, value in injection.state_dict().items():
            case.expect_equal(loaded.state_dict()[key], value, key)


def _expect_same_tensors(case: Case, injection: Injection, expected: Injection, what: str) -> None:
    """Fail unless two adapters have equal parameters and buffers, including buffers that are not saved in files."""
    mine, theirs = (
        {f"{path}.{name}": tensor for path, module in each.modules()
         for name, tensor in (*module.named_parameters(), *module.named_buffers())}
        for each in (injection, expected)
    )  # fmt: skip
    for name, tensor in theirs.items():
        case.expect(mine[name].dtype == tensor.dtype, f"{what}: {name} became {mine[name].dtype}")
        case.expect_equal(mine[name], tensor, f"{what}: {name}")


@check(
    "whatever torch's default dtype is, the same adapter is made, and the same one is loaded",
    cause="numbers come out in the default dtype though nothing is made in it: whole numbers that are divided, or "
    "multiplied by a fraction; or `torch.get_default_dtype()` is asked",
    remedy="name the dtype, `torch.float32`",
    hosts=ONE,
)
def the_default_dtype_changes_nothing(case: Case) -> None:
    fresh = None if case.looks_at_data else case.apply(case.fresh()[0], seed=7)  # what looks at data runs the host
    with saved(case) as (path, _, _, inputs):
        there, _ = case.fresh()
        loaded = peftcore.load(there, path)
        for dtype in (torch.bfloat16, torch.float64):
            model, other = case.fresh()[0], case.fresh()[0]
            with default_dtype(dtype):
                applied = case.apply(model, seed=7) if fresh else None
                again = peftcore.load(other, path)
            if applied and fresh:
                _expect_same_tensors(case, applied, fresh, f"applied under {dtype}")
            _expect_same_tensors(case, again, loaded, f"loaded under {dtype}")
            case.expect_equal(case.quiet(other, inputs), case.quiet(there, inputs), f"output, loaded under {dtype}")


@check(
    "a file loads under any name, beside others: a site's, a method's, one that holds another",
    cause="what is computed depends on the injection's name",
    remedy="look at options, shapes and tensors alone",
    hosts=ONE,
)
def a_file_loads_under_any_name(case: Case) -> None:
    with saved(case, name="first") as (path, injection, _, inputs):
        alone, _ = case.fresh()
        peftcore.load(alone, path, name="first")
        expected = case.quiet(alone, inputs)
        leaf = injection.sites[0].module_path.rpartition(".")[2] or "self"
        names = list(dict.fromkeys(["first2", "firs", leaf, "peft", "weight", case.method.name]))
        other, _ = case.fresh()
        for name in names:
            peftcore.load(other, path, name=name)
        case.expect(list(peftcore.injections(other)) == names, f"loaded as {list(peftcore.injections(other))}")
        for name in names:
            with peftcore.activate(other, name):
                case.expect_equal(case.quiet(other, inputs), expected, f"output under the name {name!r}")
        for name in names[1:]:
            peftcore.injections(other)[name].remove()
        case.expect_equal(case.quiet(other, inputs), expected, "output once the others left")


@check(
    "another adapter's values take the place of one's own, also where these have room for more, and come back from a "
    "disk to the bit",
    cause="`padded` or `scaled` names a tensor in which zeros, or a factor, change what is computed; or values lie "
    "outside of parameters and buffers",
    remedy="name tensors over whose size only sums run, or none; keep all that differs in parameters and buffers",
    hosts=ONE,
)
def values_can_be_swapped(case: Case) -> None:
    with saved(case) as (path, injection, _, inputs), TemporaryDirectory() as folder:
        there, _ = case.fresh()
        peftcore.load(there, path)
        expected = case.quiet(there, inputs)
        model, _ = case.fresh()
        slot = case.apply(model, seed=3, name="slot")
        fill(slot, 2)
        slot.trainable(False)  # torch rounds otherwise with matrices that are frozen
        case.expect_moved(case.quiet(model, inputs), expected, "the output before")
        slot.swap(path)
        case.expect_equal(case.quiet(model, inputs), expected, "output with the other adapter's values")
        pool = peftcore.keep_within(model, "1GB", idle=folder)
        peftcore.activate(model)
        case.expect(not pool.rest("slot"), "it cannot leave the model")
        peftcore.activate(model, "slot")
        case.expect_equal(case.quiet(model, inputs), expected, "output after its values were in a file")
        pool.end()
        if not injection.parts and any(graft.operator.padded for graft in injection.grafts):
            case.expect(_has_room(case, path, injection, expected), "no option gives room to what `padded` names")


def _has_room(case: Case, path: Path, injection: Injection, expected: torch.Tensor) -> bool:
    """Whether the method has an integer option, such as a rank, that can be larger on loading than in the file
    (``room=``). Fail if the output of an adapter that is loaded so differs."""
    sizes, found = {key: value.shape for key, value in injection.state_dict().items()}, False
    for option, value in injection.config:
        if type(value) is int:
            model, inputs = case.fresh()
            try:
                roomy = peftcore.load(model, path, room={option: value + 1})
            except PeftcoreError:
                continue
            if {key: value.shape for key, value in roomy.state_dict().items()} != sizes:
                found = True
                case.expect_close(case.quiet(model, inputs), expected, f"output with room by {option}={value + 1}")
    return found


@check(
    "a loaded adapter is frozen unless asked for, and then trains what a fresh one trains",
    cause="`trainable` decides by values, and these are others once a file is loaded",
    remedy="decide by names, shapes and options",
    hosts=ONE,
)
def a_loaded_adapter_is_frozen(case: Case) -> None:
    with saved(case) as (path, _, model, _):
        training = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        other, _ = case.fresh()
        loaded = peftcore.load(other, path)
        case.expect(not any(p.requires_grad for p in other.parameters()), "something trains after load")
        loaded.trainable()
        for each in (other, case.fresh()[0]):
            if not peftcore.injections(each):
                peftcore.load(each, path, trainable=True)
            found = [name for name, parameter in each.named_parameters() if parameter.requires_grad]
            case.expect(found == training, "something else trains than after apply")


@check(
    "equal adapters are equal bytes, under any injection name",
    cause="an operator puts the injection's name, a time or a counter into its tensors, their names or the options",
    remedy="save what is computed with, and nothing else",
    hosts=ONE,
)
def equal_adapters_are_equal_bytes(case: Case) -> None:
    files = []
    for name in ("this_name", "another_name"):
        with saved(case, name=name) as (path, injection, _, _):
            again = path.parent / "again"
            injection.save(again)
            files += [{each.name: each.read_bytes() for each in folder.iterdir()} for folder in (path, again)]
            keys = [key for key in load_file(path / TENSORS) if name in key]
            case.expect(not keys, f"keys that know the injection's name: {keys[:4]}")
    for other in files[1:]:
        wrong = [name for name in files[0] if files[0][name] != other.get(name)]
        case.expect(not wrong, f"{wrong} differ between two saves of equal adapters")


@check(
    "save writes its three files, whole, and nothing else, also over an older adapter",
    cause="the method writes files of its own",
    remedy="make what is to be kept a buffer, or an option: files hold these",
    hosts=ONE,
)
def save_writes_its_files(case: Case) -> None:
    with saved(case) as (path, injection, _, _):
        with torch.no_grad():
            for parameter in injection.parameters():
                parameter.add_(0.1)
        injection.save(path)
        case.expect(sorted(each.name for each in path.iterdir()) == FILES, f"{list(path.iterdir())}")
        case.expect(sorted(each.name for each in path.parent.iterdir()) == ["adapter"], "files beside the folder")
        written, now = load_file(path / TENSORS), injection.state_dict()
        case.expect(sorted(written) == sorted(now), "the file holds other tensors")
        for key, value in now.items():
            case.expect_equal(written[key], value, f"{key} in the file saved last")


@check(
    "the file holds each tensor once: no larger than the tensors and their names",
    cause="an operator registers a shared module as its own, or writes a second copy of a tensor",
    remedy="keep what `surgeon.own` returns, and leave `_save_to_state_dict` alone",
    hosts=ONE,
)
def the_file_holds_each_tensor_once(case: Case) -> None:
    with saved(case) as (path, injection, _, _):
        held = {id(t): t for _, module in injection.modules() for t in (*module.parameters(), *module.buffers())}
        keys = injection.state_dict()
        unique = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
        header = len(TensorFile(path / TENSORS).metadata[METADATA])
        size, allowed = (path / TENSORS).stat().st_size, unique + sum(len(key) + 120 for key in keys) + 200 + 2 * header
        case.expect(size <= allowed, f"{size} bytes for {unique} bytes of tensors and {len(keys)} names")
        case.expect(len(keys) <= len(held), f"{len(keys)} entries for {len(held)} tensors")


@check(
    "parameters that share one storage are saved as any others",
    cause="the operator writes its tensors by itself, from their memory and not from their values",
    remedy="leave `_save_to_state_dict` alone",
    hosts=ONE,
)
def parameters_of_one_storage_are_saved(case: Case) -> None:
    with saved(case) as (path, injection, _, _):
        parameters: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in injection.parameters():
            parameters.setdefault(parameter.dtype, []).append(parameter)
        for each in parameters.values():
            vector_to_parameters(parameters_to_vector(each).detach().clone(), each)
        again = path.parent / "again"
        injection.save(again)
        same = (again / TENSORS).read_bytes() == (path / TENSORS).read_bytes()
        case.expect(same, "the file is another one than that of the same values with a memory each")


@check(
    "options and targets come back as the user wrote them",
    cause="options are kept in types that lose order or kind (sets, objects); targets are rewritten in `inject`",
    remedy="use lists, dicts and numbers, and take sites from `surgeon.sites()` as they come",
    hosts=ONE,
)
def options_come_back_as_written(case: Case) -> None:
    model, _ = case.fresh()
    sites = case.apply(model).main_selection
    called = [site for site in sites if not isinstance(site.module, nn.MultiheadAttention)] or sites
    paths = list(dict.fromkeys(site.module_path for site in called if site.module_path))
    overrides: dict[str, dict[str, Any]] = {f"*{paths[0]}*": {}, "*": {}}  # the first that matches counts
    for target in (paths[::-1], [f"*{paths[0]}", paths[-1]]):
        with saved(case, target=target, exclude=["*.no_such_module"], overrides=overrides) as (path, injection, _, _):
            envelope = json.loads((path / ENVELOPE).read_text(encoding="utf-8"))
            case.expect(envelope["target"] == target, f"target {target} became {envelope['target']}")
            case.expect(envelope["exclude"] == ["*.no_such_module"], f"exclude became {envelope['exclude']}")
            other, _ = case.fresh()
            loaded = peftcore.load(other, path)
            case.expect(loaded.config == injection.config, f"{injection.config} became {loaded.config}")
            case.expect(list(loaded.config.overrides) == list(overrides), "overrides come back in another order")
            case.expect(list(loaded.operators) == list(injection.operators), "it stands elsewhere")
            loaded.save(path.parent / "again")
            for name in (ENVELOPE, TENSORS):
                same = (path / name).read_bytes() == (path.parent / "again" / name).read_bytes()
                case.expect(same, f"{name} is another one when saved, loaded and saved")


@check(
    "modules named in train= travel with the adapter, and the host's own stay as they are",
    cause="`inject` forgets or replaces what the user named in train=",
    remedy="leave it to the surgeon, who sees to it after `inject`",
    hosts=ONE,
)
def trained_modules_travel_along(case: Case) -> None:
    model, _ = case.fresh()
    taken = {graft.site.module_path for graft in case.apply(model).grafts}
    model, _ = case.fresh()
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.LayerNorm)]
    chosen = next((path for path in reversed(paths) if path not in taken and "self_attn" not in path), None)
    if chosen is None:
        raise NotApplicable("every module that could train along is adapted already")
    own = {key: value.clone() for key, value in model.get_submodule(chosen).state_dict().items()}
    with saved(case, train=[chosen]) as (path, injection, _, _):
        trained = [site for site in injection.operators if f"{site}.".startswith(f"{chosen}.")]
        case.expect(bool(trained), f"{chosen} does not train")
        other, _ = case.fresh()
        loaded = peftcore.load(other, path)
        for site in trained:
            for key, value in injection.operators[site].state_dict().items():
                case.expect_equal(loaded.operators[site].state_dict()[key], value, f"the trained {site}")
        loaded.remove()
        for key, value in other.get_submodule(chosen).state_dict().items():
            case.expect_equal(value, own[key], f"the host's own {chosen}.{key}")


@check(
    "operators come back in the dtype in which they were saved",
    cause="the operator makes or saves its tensors in a dtype of its own",
    remedy="make them in torch's default dtype; the core casts, once, and files keep what is there",
    hosts=ONE,
)
def dtypes_come_back(case: Case) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        with saved(case, dtype=dtype) as (path, injection, _, _):
            other, _ = case.fresh()
            loaded = peftcore.load(other, path)
            for key, value in injection.state_dict().items():
                got = loaded.state_dict()[key]
                case.expect(
                    got.dtype == value.dtype == load_file(path / TENSORS)[key].dtype, f"{key} became {got.dtype}"
                )
                case.expect(got.dtype == dtype or not got.is_floating_point(), f"{key} is {got.dtype}, not {dtype}")


@check(
    "the state dict of an adapted host loads into another adapted host",
    cause="the operator loads in a way of its own, or computes with what is neither a parameter nor a buffer",
    remedy="leave `_load_from_state_dict` alone, and make it a buffer",
)
def the_state_dict_round_trips(case: Case) -> None:
    model, inputs = case.fresh()
    case.filled(model, 1)
    expected = case.quiet(model, inputs)
    other, _ = case.fresh()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05)
    case.filled(other, 2)
    case.expect(not torch.equal(case.quiet(other, inputs), expected), "two different hosts give the same outputs")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other.load_state_dict(state)
    case.expect_equal(case.quiet(other, inputs), expected, "output after load_state_dict")


@check(
    "a state dict that lacks the adapter of one site is refused, and one of the bare base is not",
    cause="the operator loads in a way of its own, and takes back what was noted as missing",
    remedy="leave `_load_from_state_dict` alone",
    hosts=ONE,
)
def a_state_dict_that_lacks_a_site_is_refused(case: Case) -> None:
    model, _ = case.fresh()
    injection = case.filled(model)
    paths = {id(module): path for path, module in model.named_modules(remove_duplicate=False)}
    prefixes = [f"{paths[id(module)]}." for _, module in injection.modules() if module.state_dict()]
    if len(prefixes) < 2:
        raise NotApplicable("its tensors are at one place, without which a state dict is that of the bare base")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for prefix in (prefixes[0], prefixes[-1]):
        lacking = {key: value for key, value in state.items() if not key.startswith(prefix)}
        told = model.load_state_dict(lacking, strict=False).missing_keys
        case.expect(set(told) == state.keys() - lacking.keys(), f"without {prefix} it is said to lack {told[:4]}")
        case.expect(len(set(told)) == len(told), f"{told[:4]} are named twice")
    case.expect(not model.load_state_dict(state).missing_keys, "the whole state dict is said to lack something")


@check(
    "the base keeps its names in an adapted host, whose operators a base's state dict leaves alone",
    cause="`inject` renames, moves or re-registers modules of the host, or an operator reacts to loading",
    remedy="leave the host's modules where they are: grafts keep all names",
)
def base_weights_load_into_an_adapted_host(case: Case) -> None:
    base, inputs = case.fresh()
    names = list(base.state_dict())
    model, _ = case.fresh()
    case.filled(model)
    expected = case.quiet(model, inputs)
    kept = [key for key in model.state_dict() if ".peft." not in f".{key}"]
    case.expect(kept == names, f"the base's keys became {sorted(set(kept) ^ set(names))[:4]} or another order")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.add_(0.05)
    case.expect(not torch.equal(case.quiet(model, inputs), expected), "another base gives the same outputs")
    model.load_state_dict(base.state_dict())
    case.expect_equal(case.quiet(model, inputs), expected, "output once the base is back")
