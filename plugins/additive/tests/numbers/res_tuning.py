"""What the bypass of Res-Tuning's authors makes of the states of an encoder, and the derivatives by its tensors, on
tensors of cosines: ``python -m peftcore.testing.freeze res_tuning.py CHECKOUT``."""

import ast
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
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


def theirs(checkout: Path) -> Any:
    """Returns the module of their tuners."""
    package, helpers = ModuleType("tuners"), ModuleType("tuners.utils")
    package.__path__ = [str(checkout / "swift/tuners")]
    for name in ("SwiftAdapter", "SwiftConfig", "SwiftOutput"):
        setattr(helpers, name, object)
    helpers.ActivationMixin = Acting  # type: ignore[attr-defined]
    sys.modules |= {"tuners": package, "tuners.utils": helpers}
    return load(checkout / SOURCE.script, root=checkout / "swift", absent=("swift", "swift.utils"))


def made(checkout: Path, width: int, blocks: int, tuner: dict[str, int]) -> Any:
    options = {f"{kind}_cfg": {"res_adapter": tuner} for kind in ("lateral", "vertical")}
    return theirs(checkout).ResTuningBypassModule(width, blocks, "default", tuner_cfg=options)


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the encoder's output behind its last norm, and derivatives of a weighted sum of it."""
    bypass = made(checkout, 8, 3, {"adapter_length": 4}).double()
    fill(bypass)
    model, states = encoder(), [wave((2, 5, 8), "states")]
    for layer in model.layers:
        states.append(layer(states[-1]))
    output = model.norm(bypass(states, states[-1]))
    (output * wave((2, 5, 8), "direction")).sum().backward()
    gradients = {name: parameter.grad.flatten().tolist() for name, parameter in bypass.named_parameters()}
    return {"output": output.tolist(), "gradients": gradients}


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the tensors of both tuners of one block are drawn from, by their names: in a stream of 16 through a
    width of 12,000, and the other way round; of those that are large enough."""
    sizes = {"through": (16, 12_000), "back": (12_000, 16)}
    modules = {name: made(checkout, width, 1, {"adapter_length": own}) for name, (width, own) in sizes.items()}
    return {
        name: {key: drawn(tensor) for key, tensor in module.named_parameters() if tensor.numel() > 16}
        for name, module in modules.items()
    }


def trains(checkout: Path) -> dict[str, list[str]]:
    """Returns the names of what trains in the encoder and in the bypass, after the statement of their code that freezes
    what a tuner is for."""
    model = encoder()
    known: dict[str, Any] = {}
    helpers = ast.parse((checkout / "swift/tuners/utils.py").read_text(encoding="utf-8"))
    (adapter,) = (each for each in helpers.body if isinstance(each, ast.ClassDef) and each.name == "SwiftAdapter")
    adapter.bases, adapter.body = [], [each for each in adapter.body if "has_additional_modules" in ast.unparse(each)]
    exec(compile(ast.Module([adapter], []), "utils.py", "exec"), known)
    code = ast.parse((checkout / "swift/tuners/base.py").read_text(encoding="utf-8"))
    told = [
        each
        for each in ast.walk(code)
        if isinstance(each, ast.If) and ast.unparse(each.test).startswith("adapter_cls.has_additional_modules()")
    ]
    assert len(told) == 1
    known |= {"adapter_cls": known["SwiftAdapter"], "model": model, "config": SimpleNamespace()}
    exec(compile(ast.Module(told, []), "base.py", "exec"), known)  # type: ignore[arg-type]
    parts = {"model": model, "bypass": made(checkout, 8, 3, {"adapter_length": 4})}
    return {part: sorted(name for name, p in of.named_parameters() if p.requires_grad) for part, of in parts.items()}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the width of their tuners where none is told, and whether the last ones start as identities."""
    module = made(checkout, 8, 1, {})
    widths = {tensor.shape[0] for name, tensor in module.named_parameters() if name.endswith("ln1.weight")}
    (width,) = widths
    return {"bottleneck": width, "zero_last": theirs(checkout).ResTuningConfig.zero_init_last}
