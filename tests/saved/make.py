"""Writes the folders beside it: an adapter of each method, and what its host computed with it.

It was run once, at the commit 1f05ddf, and is never run again for a method whose folder is there: what these folders
hold is what users have on their disks. A new method gets its folder by ``python tests/saved/make.py``, which writes
those that are missing.

Each method is applied with what its test tells the conformance kit, on the first of the kit's hosts on which it acts
and moves the output; its tensors are moved by N(0, 0.1). LoRA has a folder for each host besides, because layers of
every kind keep their weights in a way of their own.
"""

import functools
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import peftcore
from peftcore.errors import TargetError
from peftcore.testing import HOSTS, Case
from peftcore.testing.doors import TELLING, Declared
from peftcore.testing.hosts import ALL_HOSTS
from peftcore.testing.kit import fill

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "toys"))
from declared_cases import declared
from saved_adapters import HERE, Saved, difference

ROOT = HERE.parents[1]
PREFERRED = ("llama", "bert", "vit", "unet", "dit", "mlp", "convnet", "encoder", "t5", "gpt2", "clip")
SCHEMES = {"lora_int8": "int8", "qa_lora": "int4"}
"""Schemes of the methods for packed bases, where it is not nf4."""
TOLD = {
    "attempt": [1, 0],
    "hyperformer_pp": [2, 0],
    "moelora": [2, 0],
    "mtl_lora": [3, 0],
    "multitask_prompt_tuning": [2, 0],
    "pal": [2, 0],
    "pha": [2, 0],
    "polyhistor": [2, 0],
    "polytropon": [3, 0],
    "vl_adapter": [2, 0],
}
"""The task of each row, which calls are told."""
MOVES = 1e-3
"""How much an adapter moves the output at least, relative to its largest entry."""


def inputs_of(host: str) -> dict[str, Tensor]:
    """The kit's inputs for a host, in float64 where they are not whole numbers."""
    torch.manual_seed(0)
    _, inputs = ALL_HOSTS[host].build()
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


@functools.cache
def host_is_stored(host: str) -> None:
    """Write a host's state, if nobody did."""
    path = HERE / f"hosts/{host}.safetensors"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model, _ = ALL_HOSTS[host].build()
        save_file({key: value.contiguous().clone() for key, value in model.state_dict().items()}, path)


def adapted(case: Case, saved: Saved) -> tuple[nn.Module, peftcore.Injection]:
    """The host with the method, its tensors moved."""
    model = saved.base()
    # What looks at data needs gradients of the host, and is told the context.
    data = case.batches(lambda each: case.run(each, saved.inputs), saved.inputs)
    options = {"dtype": "float64", "seed": 0, **data, **case.options}
    try:
        injection = peftcore.apply(model, case.method, **options)
    except TargetError:
        if case.host.fallback is None:
            raise
        injection = peftcore.apply(model, case.method, target=case.host.fallback, **options)
    fill(injection)
    return model, injection


def context_of(case: Case, model: nn.Module) -> dict[str, Tensor]:
    """What calls are told: of a picture, or of tasks."""
    told: dict[str, Any] = {}
    if case.context is not None:
        picture = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        told |= {name: torch.as_tensor(each) for name, each in case.context(model, picture).items()}
    if case.method.name in TOLD:
        told["task"] = torch.tensor(TOLD[case.method.name])
    return told


def make(info: peftcore.MethodInfo, told: Declared, hosts: Iterable[str], folder: Path) -> str:
    """Write a folder for a method on the first of `hosts` that will do, and say what is in it."""
    scheme = SCHEMES.get(info.name, "nf4") if info.category == "quantized" else None
    reasons = []
    for host in hosts:
        host_is_stored(host)
        case = told.case(host)
        saved = Saved(host, scheme, inputs_of(host))
        try:
            saved.context = context_of(case, saved.base())
            model, injection = adapted(case, saved)
            saved.output = saved.run(model)
            moved = difference(saved.output, Saved(host, scheme, saved.inputs).run(saved.base()))
            if moved < MOVES:
                raise ValueError(f"moves by {moved:.1e} only")
            injection.save(folder)
        except Exception as error:  # whatever the reason is, another host may do
            reasons.append(f"{host}: {type(error).__name__}: {str(error)[:160]}")
            shutil.rmtree(folder, ignore_errors=True)
            continue
        (folder / "README.md").unlink(missing_ok=True)
        saved.write(folder)
        return f"{host} {scheme or ''} moved by {moved:.3f}"
    return f"no host will do: {reasons}"


def wanted() -> Iterator[tuple[peftcore.MethodInfo, Declared, Iterable[str], Path]]:
    """The folders that there are to be."""
    ours = {path.name for path in ROOT.glob("plugins/*")}
    for info in peftcore.methods():
        if info.plugin in ours:
            told = declared(info)
            first = told.telling if told.telling != TELLING else ("unet",) if info.category == "diffusion" else ()
            yield info, told, dict.fromkeys((*first, *PREFERRED)), HERE / info.name
            if info.name == "lora":
                yield from ((info, told, [host], HERE / f"lora-{host}") for host in HOSTS if host != "llama")


if __name__ == "__main__":
    for info, told, hosts, folder in wanted():
        if not folder.exists():
            print(f"{folder.name}: {make(info, told, hosts, folder)}", flush=True)
