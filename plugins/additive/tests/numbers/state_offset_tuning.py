"""What the Mamba mixer of state-offset tuning's authors gives, on tensors of sines:
``python -m peftcore.testing.freeze state_offset_tuning.py CHECKOUT``."""

import ast
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "furiosa-ai/ssm-state-tuning", "2cff985", "modules/suffix_tuning.py")
VERSIONS = ("torch", "peft", "einops")
ABSENT = ("selective_scan_cuda", "causal_conv1d", "causal_conv1d_cuda", "modules.dim_extend", "modules.ssm_peft")
ABSENT += ("modules.selective_scan_cuda_torch", "modules.selective_scan_split", "modules.mamba_tuner_utils")
KINDS = {"state": ("SILU_Z_C", None), "output": ("SILU_Z", None), "rank": ("SILU_Z_C", 2)}


def wave(shape: tuple[int, ...], k: float) -> Tensor:
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * k + k).view(shape)


def package(name: str, folder: Path) -> None:
    """Let a folder be a package whose own imports, of kernels, do not run."""
    made = ModuleType(name)
    made.__path__ = [str(folder)]
    sys.modules[name] = made


def theirs(checkout: Path) -> tuple[Any, Any]:
    """Returns the modules of their mixer and of what is added to it."""
    peft.peft_model.PEFT_TYPE_TO_MODEL_MAPPING = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING = {}  # since moved
    package("modules", checkout / "modules")
    package("mamba_ssm", checkout / "src/mamba/mamba_ssm")
    package("mamba_ssm.ops", checkout / "src/mamba/mamba_ssm/ops")
    mixers = load(checkout / "modules/mamba_peft.py", root=checkout, absent=ABSENT)
    return mixers, importlib.import_module("modules.suffix_tuning")


def offset(modules: tuple[Any, Any], mixer: Any, kind: str, rank: int | None) -> Any:
    """Returns what is added to a mixer, starting as in their configurations."""
    place = mixer.parameter_processors["x_after_ssm"]
    place.dtype, place.device = torch.float64, "cpu"
    options = {"bias_type": kind, "bias_init": modules[1].SuffixTuningBiasInit.ZERO, "r": rank}
    return modules[1].SuffixTuningBiasProcessor(place, "default", **options)


def numbers(checkout: Path) -> dict[str, dict[str, list[float]]]:
    """Returns outputs ``[2, 5, 6]`` flat of each kind, and gradients of inputs and of what is trained."""
    modules, found, single = theirs(checkout), {}, torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double  # their scan computes in float32, for the sake of kernels
    for kind, (bias, rank) in KINDS.items():
        mixer = modules[0].MambaPeft(6, d_state=3, dt_rank=2, layer_idx=0, backend="ref").double().eval()
        with torch.no_grad():
            for index, name in enumerate(sorted(dict(mixer.named_parameters()))):
                mixer.get_parameter(name).copy_(wave(tuple(mixer.get_parameter(name).shape), 0.37 + 0.11 * index))
        added = offset(modules, mixer, bias, rank)
        mixer.parameter_processors["x_after_ssm"] = added
        trained = {name: p for name, p in added.named_parameters() if "bias" in name}
        with torch.no_grad():
            for index, name in enumerate(sorted(trained)):
                trained[name].copy_(wave(tuple(trained[name].shape), 0.71 + 0.13 * index))
        x = wave((2, 5, 6), 0.23).requires_grad_()
        y = mixer(x)
        (y * wave((2, 5, 6), 0.3)).sum().backward()
        found[kind] = {"output": y.flatten().tolist(), "x": x.grad.flatten().tolist()}
        found[kind] |= {f"trained {i}": trained[name].grad.flatten().tolist() for i, name in enumerate(sorted(trained))}
    torch.Tensor.float = single
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the offset of states starts from, and its factors of rank 12,000, of 6 channels and 5 states."""
    modules = theirs(checkout)
    mixer = modules[0].MambaPeft(6, d_state=5, dt_rank=2, layer_idx=0, backend="ref")
    (whole,) = offset(modules, mixer, "SILU_Z_C", None).suffixtuning_bias.parameters()
    factors = offset(modules, mixer, "SILU_Z_C", 12_000).suffixtuning_bias["default"]
    return {"offset": drawn(whole), "down": drawn(factors.lora_A), "up": drawn(factors.lora_B)}


def trains(checkout: Path) -> dict[str, list[str]]:
    """Returns the names of what trains in a mixer, by kind, as their tuner marks it."""
    modules, found = theirs(checkout), {}
    told = json.loads((checkout / "cfg/final/peft/mamba-130m/dart/state_tuning.json").read_text())
    config = SimpleNamespace(finetune_parameters=told.get("finetune_parameters"))
    (tuner,) = (
        each
        for each in ast.parse((checkout / SOURCE.script).read_text()).body
        if isinstance(each, ast.ClassDef) and each.name == "SuffixTuningModel"
    )
    wanted = ("prefix: str", "def _mark_only_adapters_as_trainable")
    known: dict[str, Any] = {"nn": torch.nn}
    tuner.bases, tuner.decorator_list = [], []  # of a peft that has moved
    tuner.body = [each for each in tuner.body if ast.unparse(each).startswith(wanted)]
    exec(compile(ast.Module([tuner], []), "suffix_tuning.py", "exec"), known)
    for kind, (bias, rank) in KINDS.items():
        mixer = modules[0].MambaPeft(6, d_state=3, dt_rank=2, layer_idx=0, backend="ref")
        mixer.parameter_processors["x_after_ssm"] = offset(modules, mixer, bias, rank)
        marks: Any = known["SuffixTuningModel"]()
        marks.peft_config, marks.active_adapter = {"default": config}, "default"
        marks._mark_only_adapters_as_trainable(mixer)
        found[kind] = [name for name, p in mixer.named_parameters() if p.requires_grad]
    return found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns what their configuration of state tuning offsets, and the rank, which it leaves to their code."""
    told = json.loads((checkout / "cfg/final/peft/mamba-130m/dart/state_tuning.json").read_text())
    kinds = {kind: name for name, (kind, rank) in KINDS.items() if rank is None}
    return {"offset": kinds[told["bias_type"]], "rank": theirs(checkout)[1].SuffixTuningConfig.r}
