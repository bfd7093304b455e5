"""Operations of the core, each with the scene on which it runs with a fault at every point."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from computed_hosts import WAYS
from core_toys import stir, token_ids, transformer
from torch import Tensor, nn

import peftcore
from peftcore.algebra.exporting import export
from peftcore.files.readers.reader import reader_named
from peftcore.testing import HOSTS
from peftcore.testing.faults import Make, Operation
from peftcore.testing.snapshots import Scene

AT = {"target": ["attn.q", "attn.v"]}
OPTIONS: dict[str, dict[str, Any]] = {"lora": {"rank": 2, **AT}, "dora": {"rank": 2, **AT}, "bitfit": {}, "ia3": {}}


class Case(NamedTuple):
    """An operation and its scene.

    Attributes:
        make: builds the scene.
        operation: runs on it.
        leave: places that may differ, by how they begin.
        ends: operations that lead to further states in which a fault may leave the scene, if a note says so.
    """

    make: Make
    operation: Operation
    leave: tuple[str, ...] = ()
    ends: tuple[Operation, ...] = ()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(token_ids())


def adapt(model: nn.Module, name: str, method: str = "lora", seed: int = 1, **options: Any) -> peftcore.Injection:
    injection = peftcore.apply(model, method, name=name, **OPTIONS.get(method, AT), **options)
    stir(injection, seed=seed)
    return injection


def host(*names: str, method: str = "lora", way: str = "") -> nn.Module:
    """A transformer of one layer with adapters."""
    model = transformer(1)
    if way:
        WAYS[way](model.layers[0].self_attn.q_proj)
    for index, name in enumerate(names):
        adapt(model, name, method, seed=index + 1)
    return model


def scene(
    *names: str,
    method: str = "lora",
    way: str = "",
    then: Callable[[nn.Module], object] | None = None,
    saved: Mapping[str, Any] | None = None,
    trains: bool = False,
) -> Make:
    """Returns a function that makes a scene.

    Args:
        names: names of adapters on the model.
        then: what is done to the model afterwards.
        saved: options of an adapter that is in the folder "saved", and its format.
        trains: whether an optimizer has the parameters of the first adapter, and has made a step.
    """

    def make(folder: Path) -> Scene:
        model = host(*names, method=method, way=way)
        optimizers = [_stepped(model, names[0])] if trains else []
        if then is not None:
            then(model)
        if saved is not None:
            shutil.copytree(_saved(**saved), folder / "saved", dirs_exist_ok=True)
        return Scene(model, outputs, folder, optimizers)

    return make


def _stepped(model: nn.Module, name: str) -> torch.optim.Optimizer:
    optimizer = a(model, name).optimizer(torch.optim.AdamW, lr=0.01)
    model(token_ids()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


BY_PARAMETRIZATION = {name for name in WAYS if not name.startswith(("old", "pruned"))}
"""Ways to compute a weight that keep no value in the module; hooks keep that of the last forward."""
FOLDER = tempfile.TemporaryDirectory(prefix="fault-scenes-")
_SAVED: dict[str, Path] = {}


def _saved(method: str = "lora", format: str = "peftcore", **options: Any) -> Path:
    """Returns a folder with an adapter, which is saved once."""
    key = repr((method, format, sorted(options.items())))
    if key not in _SAVED:
        model = transformer(1)
        folder = Path(tempfile.mkdtemp(dir=FOLDER.name))
        adapt(model, "a", method, seed=9, **options).save(folder, format=format)
        _SAVED[key] = folder
    return _SAVED[key]


def a(model: nn.Module, name: str = "a") -> peftcore.Injection:
    return peftcore.injections(model)[name]


def on_model(function: Callable[[nn.Module], object]) -> Operation:
    return lambda scene: function(scene.model)


def on_a(function: Callable[[peftcore.Injection], object]) -> Operation:
    return lambda scene: function(a(scene.model))


def loading(**options: Any) -> Operation:
    return lambda scene: peftcore.load(scene.model, scene.folder / "saved", name="new", **options)


def packed(scheme: str, model: nn.Module) -> None:
    peftcore.quantize(model, scheme, target=AT["target"])


def packed_and_run(scheme: str, model: nn.Module) -> None:
    """Packs the model, and runs it once: some libraries prepare a layer in its first forward."""
    packed(scheme, model)
    outputs(model)


def merged(model: nn.Module, **how: Any) -> None:
    a(model).merge(**how)


def entered(enter: Callable[[nn.Module], Any]) -> Operation:
    """Enters a block, runs the model in it, and leaves it."""

    def run(scene: Scene) -> None:
        with enter(scene.model):
            outputs(scene.model)

    return run


def _applying() -> dict[str, Case]:
    loss = {"data": [lambda model: model(token_ids()).square().mean()]}
    return {
        "apply, the first": Case(scene(), on_model(lambda m: peftcore.apply(m, "dora", **OPTIONS["dora"]))),
        "apply, a second": Case(
            scene("a", trains=True), on_model(lambda m: peftcore.apply(m, "ia3", name="new", target="attn.v"))
        ),
        "apply a hybrid": Case(
            scene("a"), on_model(lambda m: peftcore.apply(m, [{"method": "lora", "rank": 2}, "bitfit"], name="new"))
        ),
        "apply, and train the head": Case(
            scene(), on_model(lambda m: peftcore.apply(m, "lora", train="classifier", **OPTIONS["lora"]))
        ),
        "apply with data": Case(
            scene("a"),
            on_model(lambda m: peftcore.apply(m, "fish_mask", name="new", target="attn.q", **loss)),
        ),
        "remove the only one": Case(scene("a"), on_a(lambda i: i.remove())),
        "remove one of two": Case(scene("a", "b"), on_a(lambda i: i.remove())),
        "remove, merged": Case(scene("a", "b", then=merged), on_a(lambda i: i.remove())),
        "bake": Case(scene("a", "b"), on_a(lambda i: i.bake())),
        "bake the only one": Case(scene("a"), on_a(lambda i: i.bake())),
        "freeze": Case(scene("a", "b"), on_a(lambda i: i.trainable(False))),
        "train again": Case(scene("a", then=lambda m: a(m).trainable(False)), on_a(lambda i: i.trainable(True))),
        "low_memory": Case(scene("a"), on_a(lambda i: setattr(i, "low_memory", True))),
    }


def _merging() -> dict[str, Case]:
    found = {}
    for keep in ("cpu", "device", "record", None):
        how = {"keep": keep}
        found[f"merge, keep={keep!r}"] = Case(scene("a", "b"), on_a(partial(_merge, **how)))
        if keep is not None:
            then = partial(merged, **how)
            found[f"unmerge, keep={keep!r}"] = Case(scene("a", "b", then=then), on_a(lambda i: i.unmerge()))
    found["merge half of it"] = Case(scene("a", "b"), on_a(partial(_merge, weight=0.5)))
    for way in WAYS:
        left = () if way in BY_PARAMETRIZATION else ("layers.0.self_attn.q_proj.weight",)  # of the last forward
        found[f"merge where {way} computes the weight"] = Case(scene("a", way=way), on_a(lambda i: i.merge()), left)
    schemes = ("int8", "nf4", "hqq-8", "nf4-icq", "bnb-nf4", "bnb-fp4", "bnb-int8", "torchao-int8", "torchao-float8")
    for scheme in filter(peftcore.schemes().__contains__, schemes):
        for into in ("float", "same"):
            how = {"into": into, "max_error": 10.0}
            begun = partial(packed_and_run, scheme)

            def then(model: nn.Module, begun: Any = begun, how: Any = how) -> None:
                begun(model)
                merged(model, **how)
                outputs(model)

            found[f"merge into {scheme}, into={into!r}"] = Case(scene("a", then=begun), on_a(partial(_merge, **how)))
            found[f"unmerge from {scheme}, into={into!r}"] = Case(scene("a", then=then), on_a(lambda i: i.unmerge()))
    return found


def _merge(injection: peftcore.Injection, **how: Any) -> None:
    injection.merge(**how)


def _packing() -> dict[str, Case]:
    found = {}
    for scheme in ("int8", "nf4", "hqq-8", "nf4-icq", "torchao-int8", "bnb-nf4", "bnb-int8"):
        if scheme in peftcore.schemes():
            found[f"quantize to {scheme}"] = Case(scene("a"), on_model(partial(packed, scheme)))
            found[f"dequantize from {scheme}"] = Case(
                scene("a", then=partial(packed_and_run, scheme)), on_model(peftcore.dequantize)
            )
    found["quantize for loftq"] = Case(scene("a", method="loftq"), on_model(partial(packed, "nf4")))
    return found


def _choosing() -> dict[str, Case]:
    def two() -> Make:
        return scene("a", "b")

    return {
        "activate": Case(two(), on_model(lambda m: peftcore.activate(m, "a"))),
        "activate in a block": Case(two(), entered(lambda m: peftcore.activate(m, "a"))),
        "activate a composition": Case(two(), on_model(lambda m: peftcore.activate(m, peftcore.Average("a", "b")))),
        "a composition in a block": Case(two(), entered(lambda m: peftcore.activate(m, peftcore.Sum("a", "b")))),
        "route": Case(two(), on_model(lambda m: peftcore.route(m, ["a", None]))),
        "route in a block": Case(two(), entered(lambda m: peftcore.route(m, ["a", "b"]))),
        "using": Case(two(), on_model(lambda m: peftcore.using(m, "a")(outputs, m))),
        "call in a block": Case(two(), entered(lambda m: peftcore.call(m, some=1))),
        "enabled in a block": Case(two(), entered(lambda m: a(m).enabled())),
        "disabled in a block": Case(two(), entered(lambda m: a(m).disabled())),
        "disabled in a block, merged": Case(
            scene("a", "b", then=merged), entered(lambda m: a(m).disabled()), ends=(on_a(lambda i: i.unmerge()),)
        ),
        "cache_weights": Case(two(), entered(peftcore.cache_weights)),
        "a forward": Case(two(), on_model(outputs)),
    }


def _swapping() -> dict[str, Case]:
    return {
        "swap with a folder": Case(scene("a", saved={}), lambda s: a(s.model).swap(s.folder / "saved")),
        "swap with another one": Case(scene("a", "b"), on_a(lambda i: i.swap(a(i.model, "b")))),
        "swap with a state dict": Case(
            scene("a", trains=True), on_a(lambda i: i.swap({key: each + 1 for key, each in _first(i).items()}))
        ),
    }


def _first(injection: peftcore.Injection) -> dict[str, Tensor]:
    """The adapter's tensors as they were at first, whatever they are now."""
    with torch.no_grad():
        return {key: torch.zeros_like(each) for key, each in injection.state_dict().items()}


def _algebra() -> dict[str, Case]:
    def mixed(how: str, **options: Any) -> Operation:
        return on_model(lambda m: peftcore.combine(m, {"a": 0.5, "b": 0.5}, how=how, name="new", **options))

    return {
        "combine, linear": Case(scene("a", "b"), mixed("linear")),
        "combine, cat": Case(scene("a", "b"), mixed("cat")),
        "combine, svd": Case(scene("a", "b"), mixed("svd", rank=2)),
        "combine with a folder": Case(
            scene("a", saved={}),
            lambda s: peftcore.combine(s.model, {"a": 1.0, str(s.folder / "saved"): 1.0}, how="cat", name="new"),
        ),
        "to_lora": Case(scene("a", method="dora"), on_a(lambda i: peftcore.to_lora(i, 2, name="new"))),
        "gather": Case(
            scene("a", "b"), on_model(lambda m: peftcore.gather(m, "task_arithmetic", {"a": 1.0, "b": 2.0}))
        ),
        "deltas": Case(scene("a"), on_a(peftcore.deltas)),
        "replicate_layers": Case(
            scene(), on_model(lambda m: peftcore.replicate_layers(m, [(0, 1), (0, 1)], path="layers"))
        ),
    }


def llama(folder: Path, saved: str = "", names: tuple[str, ...] = ("a",)) -> Scene:
    """A small Llama, for the formats of other libraries."""
    torch.manual_seed(0)
    model, inputs = HOSTS["llama"].build()
    model.eval()
    for index, name in enumerate(names):
        adapt(model, name, seed=index + 1)
    if saved:
        _of_llama(saved, folder / "saved")

    def computed(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return HOSTS["llama"].output(model(**inputs))

    return Scene(model, computed, folder)


def _of_llama(format: str, folder: Path) -> None:
    key = f"llama in {format}"
    if key not in _SAVED:
        _SAVED[key] = Path(tempfile.mkdtemp(dir=FOLDER.name))
        torch.manual_seed(0)
        adapt(HOSTS["llama"].build()[0].eval(), "a", seed=9).save(_SAVED[key], format=format)
    shutil.copytree(_SAVED[key], folder, dirs_exist_ok=True)


FORMATS = ("peftcore", "peft", "kohya", "diffusers", "mlx", "gguf")


def _files() -> dict[str, Case]:
    found = {
        "load": Case(scene(saved={}), loading()),
        "load a second one": Case(scene("a", trains=True, saved={}), loading()),
        "load to train": Case(scene(saved={}), loading(trainable=True)),
        "load with room": Case(scene("a", saved={}), loading(room={"rank": 4})),
        "load, not active": Case(scene("a", saved={}), loading(active=False)),
        "load dora": Case(scene(saved={"method": "dora"}), loading()),
    }
    for format in FORMATS:
        if format not in ("mlx", "gguf"):  # which are written alone
            found[f"load {format}"] = Case(partial(llama, saved=format, names=()), loading())
        found[f"save {format}"] = Case(llama, lambda s, f=format: a(s.model).save(s.folder / "new", format=f))
        found[f"save {format} over another one"] = Case(
            partial(llama, saved=format), lambda s, f=format: a(s.model).save(s.folder / "saved", format=f)
        )
    found["save one file"] = Case(llama, lambda s: a(s.model).save(s.folder / "new.safetensors"))
    found["save_composition"] = Case(
        partial(llama, names=("a", "b")),
        lambda s: peftcore.save_composition(s.model, peftcore.Average("a", "b"), s.folder / "new"),
    )
    found["export to vllm"] = Case(llama, lambda s: export(a(s.model), s.folder / "new", reader_named("vllm")))
    return found


def limited(*, restless: bool) -> Make:
    """A scene whose adapters are within a limit, of which one is idle if `restless`."""

    def make(folder: Path) -> Scene:
        model = host("a", "b")
        for name in ("a", "b"):
            a(model, name).trainable(False)
        peftcore.activate(model)
        pool = peftcore.keep_within(model, "1MB", idle=folder / "idle")
        if restless:
            pool.rest("a")
        return Scene(model, tensors, folder, needs=pool)

    return make


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model, those of idle adapters too, which stay idle."""
    return dict(model.state_dict())


def _idle() -> dict[str, Case]:
    def quiet(folder: Path) -> Scene:
        made = replace(scene("a", "b")(folder), outputs=tensors)
        for name in ("a", "b"):
            a(made.model, name).trainable(False)
        peftcore.activate(made.model)
        return made

    operations: dict[str, tuple[Make, Operation]] = {
        "keep_within": (quiet, lambda s: peftcore.keep_within(s.model, 0, idle=s.folder / "idle")),
        "rest": (limited(restless=False), lambda s: s.needs.rest("a")),
        "wake": (limited(restless=True), lambda s: s.needs.wake("a")),
        "activate an idle one": (limited(restless=True), on_model(lambda m: peftcore.activate(m, "a"))),
        "end a limit": (limited(restless=True), lambda s: s.needs.end()),
        "remove an idle one": (limited(restless=True), on_a(lambda i: i.remove())),
        "save an idle one": (limited(restless=True), lambda s: a(s.model).save(s.folder / "new")),
        "swap into an idle one": (limited(restless=True), on_a(lambda i: i.swap(a(i.model, "b")))),
    }
    # Names of folders are drawn. An adapter may be back when that fails for which it came back, or away.
    of_adapters = [f"{kind}layers.0.self_attn.peft" for kind in ("", "class of ", "training of ")]
    leave = ("file idle", "state, idle", "optimizer", *of_adapters)
    return {name: Case(*each, leave) for name, each in operations.items()}


CASES: dict[str, Case] = {
    **_applying(),
    **_merging(),
    **_packing(),
    **_choosing(),
    **_swapping(),
    **_algebra(),
    **_files(),
    **_idle(),
}
