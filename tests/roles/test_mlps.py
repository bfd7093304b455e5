"""Feed-forward branches and experts."""

from __future__ import annotations

import torch
from host_zoo import build

from peftcore.roles import derive

torch.set_num_threads(1)


def test_listed_experts_make_one_branch() -> None:
    """Switch keeps its experts as a dictionary of MLPs beside a router."""
    host = derive(build("switch")[0])
    assert [entry.role for entry in host.at("encoder.block.1.layer.1.mlp")] == ["mlp"]
    assert [entry.role for entry in host.at("encoder.block.1.layer.1.mlp.router.classifier")] == ["router"]
