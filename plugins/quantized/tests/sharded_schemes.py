"""What each process of test_sharded.py does: ``torchrun sharded_schemes.py OUT.json``. Each scheme packs a host, which
is adapted, then sharded by torch itself (FSDP2) and run forward and backward; what came of it is written."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from optimum import quanto
from torch import nn
from torch.distributed.fsdp import fully_shard

import peftcore
from peftcore.errors import UnsupportedHost
from peftcore.injection.quantization import schemes
from peftcore_lab.training.processes import check_cut


def host() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def of_quanto() -> nn.Sequential:
    model = host()
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


PACKED: Mapping[str, Callable[[], nn.Sequential]] = {
    **{name: lambda name=name: peftcore.quantize(host(), name) for name in schemes()},  # type: ignore[misc]
    "quanto": of_quanto,
}


def differs(model: nn.Sequential) -> float:
    """By how much outputs and gradients differ from those before the model was sharded."""
    injection = peftcore.apply(model, "lora", rank=2, target=["0", "2"])
    with torch.no_grad():
        for value in injection.parameters():
            value.normal_(0, 0.1)
    inputs = torch.randn(4, 64)

    def run() -> list[torch.Tensor]:
        for value in injection.parameters():
            value.grad = None
        out = model(inputs)
        out.square().sum().backward()
        return [out.detach(), *(value.grad for value in injection.parameters())]

    before = run()
    for each in (model[0], model[2], model):
        fully_shard(each)
    after = [each.full_tensor() if isinstance(each, torch.distributed.tensor.DTensor) else each for each in run()]
    return max(float((one - two).abs().max()) for one, two in zip(before, after, strict=True))


def verdict(model: nn.Sequential) -> str:
    try:
        check_cut(model)
        refused = ""
    except UnsupportedHost as error:
        refused = str(error)
    try:
        difference = differs(model)
    except Exception as error:
        return f"refused: {refused}" if refused else f"not refused: {error}"
    return "refused, and could be" if refused else "same" if difference < 1e-5 else f"differs by {difference}"


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    found = {name: verdict(make()) for name, make in PACKED.items()}
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
