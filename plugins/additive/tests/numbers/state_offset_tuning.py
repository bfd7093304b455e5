"""What the Mamba mixer of state-offset tuning's authors gives, on tensors of sines:
``python -m peftcore.testing.freeze state_offset_tuning.py CHECKOUT``."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import peft
import torch
from torch import Tensor

from peftcore.registry.evidence import Source
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


def numbers(checkout: Path) -> dict[str, dict[str, list[float]]]:
    """Returns outputs ``[2, 5, 6]`` flat of each kind, and gradients of inputs and of what is trained."""
    torch.Tensor.float = torch.Tensor.double  # their scan computes in float32, for the sake of kernels
    peft.peft_model.PEFT_TYPE_TO_MODEL_MAPPING = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING = {}  # since moved
    package("modules", checkout / "modules")
    package("mamba_ssm", checkout / "src/mamba/mamba_ssm")
    package("mamba_ssm.ops", checkout / "src/mamba/mamba_ssm/ops")
    mixers = load(checkout / "modules/mamba_peft.py", root=checkout, absent=ABSENT)
    tuning = importlib.import_module("modules.suffix_tuning")
    found = {}
    for kind, (bias, rank) in KINDS.items():
        mixer = mixers.MambaPeft(6, d_state=3, dt_rank=2, layer_idx=0, backend="ref").double().eval()
        with torch.no_grad():
            for index, name in enumerate(sorted(dict(mixer.named_parameters()))):
                mixer.get_parameter(name).copy_(wave(tuple(mixer.get_parameter(name).shape), 0.37 + 0.11 * index))
        place = mixer.parameter_processors["x_after_ssm"]
        place.dtype, place.device = torch.float64, "cpu"
        options = {"bias_type": bias, "bias_init": tuning.SuffixTuningBiasInit.ZERO, "r": rank}
        offset = tuning.SuffixTuningBiasProcessor(place, "default", **options)
        mixer.parameter_processors["x_after_ssm"] = offset
        trained = {name: p for name, p in offset.named_parameters() if "bias" in name}
        with torch.no_grad():
            for index, name in enumerate(sorted(trained)):
                trained[name].copy_(wave(tuple(trained[name].shape), 0.71 + 0.13 * index))
        x = wave((2, 5, 6), 0.23).requires_grad_()
        y = mixer(x)
        (y * wave((2, 5, 6), 0.3)).sum().backward()
        found[kind] = {"output": y.flatten().tolist(), "x": x.grad.flatten().tolist()}
        found[kind] |= {f"trained {i}": trained[name].grad.flatten().tolist() for i, name in enumerate(sorted(trained))}
    return found
