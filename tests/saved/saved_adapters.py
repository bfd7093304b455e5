"""What make.py writes and test_saved.py reads: a folder for each method, and the hosts that they share.

    hosts/<host>.safetensors        state of the host before anything was adapted, float32
    <method>/adapter.safetensors    as `Injection.save` writes it, with operators in float64
    <method>/adapter.json
    <method>/expected.safetensors   the inputs ("input.<name>"), what calls are told ("call.<name>") and the output, in
                                    float64; its header names the host, and the scheme by which that was packed

Everything is computed in float64, so that other processors round to the same numbers within the tolerance.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftcore
from peftcore.testing import APART, HOSTS

HERE = Path(__file__).parent
EVERY = {**HOSTS, **APART}
GROUP = 4
"""Group size of schemes that have groups, as the test of qa_lora has it: the hosts are narrow."""


@dataclass
class Saved:
    """One adapter's surroundings.

    Attributes:
        host: name of one of `EVERY`.
        scheme: scheme by which the host's linear layers are packed before it is adapted; None leaves them dense.
        inputs: arguments of the host by name.
        context: what ``peftcore.call`` is told, by name.
        output: the adapted host's output.
    """

    host: str
    scheme: str | None
    inputs: dict[str, Tensor]
    context: dict[str, Tensor] = field(default_factory=dict)
    output: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def read(cls, folder: Path) -> "Saved":
        """What a method's folder holds besides the adapter."""
        with safe_open(folder / "expected.safetensors", "pt") as file:
            made = json.loads(file.metadata()["made"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return cls(**made, inputs=_below("input", tensors), context=_below("call", tensors), output=tensors["output"])

    def write(self, folder: Path) -> None:
        """The file that `read` reads."""
        tensors = {f"input.{key}": value for key, value in self.inputs.items()}
        tensors |= {f"call.{key}": value for key, value in self.context.items()}
        tensors = {key: value.contiguous().clone() for key, value in {**tensors, "output": self.output}.items()}
        made = {"host": self.host, "scheme": self.scheme}
        save_file(tensors, folder / "expected.safetensors", {"made": json.dumps(made)})

    def base(self) -> nn.Module:
        """The host with its stored state, in evaluation, packed where it is to be."""
        model, _ = EVERY[self.host].build()
        model.load_state_dict(load_file(HERE / f"hosts/{self.host}.safetensors"))
        if self.host == "moe":
            model.set_experts_implementation("eager")  # grouped products of torch have no float64
        model = model.double().eval().requires_grad_(False)
        return model if self.scheme is None else packed(model, self.scheme)

    def run(self, model: nn.Module) -> Tensor:
        """The host's output, with the context told."""
        peftcore.call(model, **self.context)
        with torch.no_grad():
            return EVERY[self.host].output(model(**self.inputs))


def packed(model: nn.Module, scheme: str) -> nn.Module:
    """The host with linear layers packed by a scheme in plain torch."""

    def does_not_fit(path: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and module.in_features % GROUP > 0

    options: dict[str, Any] = {"group_size": GROUP, "exclude": does_not_fit} if scheme == "int4" else {}
    return peftcore.quantize(model, scheme, **options)


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest entry of `other`."""
    return float((one - other).abs().max() / other.abs().max())


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}
