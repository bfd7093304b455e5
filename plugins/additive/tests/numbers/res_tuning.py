"""What the bypass of Res-Tuning's authors makes of the states of an encoder, and the derivatives by its tensors, on
tensors of cosines: ``python -m peftcore.testing.freeze res_tuning.py CHECKOUT``."""

import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "modelscope/ms-swift", "3602360", "swift/tuners/restuning.py")
VERSIONS = ("torch",)


def wave(shape: Sequence[int], key: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


def fill(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        parameter.data.copy_(wave(parameter.shape, name))


def encoder() -> nn.TransformerEncoder:
    """Three blocks 8 wide, in training, without dropout."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
    made = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(8), enable_nested_tensor=False).double().train()
    fill(made)
    return made


class Acting:
    """Their mark of an adapter that is switched on."""

    def __init__(self, *_: Any) -> None:
        pass

    def is_activated(self, name: str) -> bool:
        return True

    def mark_all_sub_modules_as_plugin(self) -> None:
        pass


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the encoder's output behind its last norm, and derivatives of a weighted sum of it."""
    package, helpers = ModuleType("tuners"), ModuleType("tuners.utils")
    package.__path__ = [str(checkout / "swift/tuners")]
    for name in ("SwiftAdapter", "SwiftConfig", "SwiftOutput"):
        setattr(helpers, name, object)
    helpers.ActivationMixin = Acting  # type: ignore[attr-defined]
    sys.modules |= {"tuners": package, "tuners.utils": helpers}
    module = load(checkout / SOURCE.script, root=checkout / "swift", absent=("swift", "swift.utils"))
    bypass = module.ResTuningBypassModule(
        8,
        3,
        "default",
        tuner_cfg={
            "lateral_cfg": {"res_adapter": {"adapter_length": 4}},
            "vertical_cfg": {"res_adapter": {"adapter_length": 4}},
        },
    ).double()
    fill(bypass)
    model, states = encoder(), [wave((2, 5, 8), "states")]
    for layer in model.layers:
        states.append(layer(states[-1]))
    output = model.norm(bypass(states, states[-1]))
    (output * wave((2, 5, 8), "direction")).sum().backward()
    gradients = {name: parameter.grad.flatten().tolist() for name, parameter in bypass.named_parameters()}
    return {"output": output.tolist(), "gradients": gradients}
