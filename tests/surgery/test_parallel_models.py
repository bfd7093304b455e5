"""Tensor-parallel models: what would meet pieces of weights is refused."""

from pathlib import Path

import pytest
from torch import nn

import peftcore
from peftcore.errors import (
    UnsupportedHost,
)


def test_tensor_parallel_weights_are_refused(tmp_path: Path) -> None:
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})
        before = [type(module) for module in model.modules()]
        with pytest.raises(UnsupportedHost, match="tensor-parallel"):
            peftcore.apply(model, "lora", target=["1"])
        assert [type(module) for module in model.modules()] == before
    finally:
        distributed.destroy_process_group()
