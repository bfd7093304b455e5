"""LyCORIS's networks and their files, for tests of formats."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lycoris import LycorisNetwork, create_lycoris_from_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from peftcore.files.formats.kohya import TENSORS
from peftcore.testing import HOSTS

PRESET: dict[str, Any] = {"target_module": [], "target_name": [".*to_[qkv]", ".*conv[12]", ".*proj_in", ".*net.0.proj"],
          "name_algo_map": {}, "module_algo_map": {}, "use_fnmatch": False}  # fmt: skip
"""What gets a module: attention, convolutions with kernels of 3x3 and of one point, and a wide linear map."""


def unet() -> tuple[nn.Module, dict[str, Any]]:
    """A small UNet, and its inputs."""
    model, inputs = HOSTS["unet"].build()
    return model.eval(), inputs


def network(model: nn.Module, names: Sequence[str] = (), **options: Any) -> Any:
    """Their network for a model, at modules of these patterns, or of the preset's."""
    LycorisNetwork.apply_preset(PRESET | {"target_name": list(names or PRESET["target_name"])})
    return LycorisNetwork(model, 1.0, warn_on_unmatched=False, **options)


def of_inputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """The output of a model, and the gradients of its inputs that have some."""
    given = {name: value.clone() for name, value in inputs.items()}
    floats = [value.requires_grad_() for value in given.values() if value.is_floating_point()]
    result: Tensor = model(**given)[0]
    weights = torch.linspace(-1, 1, result.numel()).view(result.shape)
    return [result.detach(), *torch.autograd.grad((result * weights).sum(), floats)]


@torch.no_grad()
def theirs(model: nn.Module, path: Path, std: float, **options: Any) -> nn.Module:
    """A copy of the model with their network, filled with noise and saved."""
    host = deepcopy(model)
    made = network(host, **options)
    made.apply_to()
    torch.manual_seed(5)
    for name, parameter in made.named_parameters():
        if name.endswith("dora_scale"):
            parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
        else:
            parameter.normal_(0, std)
    save_file({name: value.contiguous() for name, value in made.state_dict().items()}, path)
    return host.eval()


@torch.no_grad()
def read_by_them(model: nn.Module, folder: Path) -> nn.Module:
    """A copy of the model with what their loader makes of our file."""
    host = deepcopy(model)
    made, _ = create_lycoris_from_weights(1.0, str(folder / TENSORS), host)
    assert made.loras
    made.apply_to()
    return host.eval()


@torch.no_grad()
def read_into_their_network(model: nn.Module, folder: Path, **options: Any) -> nn.Module:
    """A copy of the model with their network of these options, which gets the tensors of our file."""
    host = deepcopy(model)
    made = network(host, **options)
    made.apply_to()
    assert made.load_weights(str(folder / TENSORS)) == {}
    return host.eval()
