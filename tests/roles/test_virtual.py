"""Roles that no single weight has."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo_maps import host_of, paths

from peftcore.roles import derive

torch.set_num_threads(1)


# all-linear
def test_all_linear_takes_the_matrices_of_the_blocks() -> None:
    assert len(paths(host_of("llama"), "all-linear")) == 2 * 7
    assert len(paths(host_of("bert"), "all-linear")) == 2 * 6


def test_all_linear_leaves_out_what_a_linear_adapter_does_not_suit() -> None:
    mixtral = host_of("mixtral").select("all-linear")
    assert {entry.role for entry, _ in mixtral} == {"attn.q", "attn.k", "attn.v", "attn.out"}
    jamba = {entry.role for entry, _ in host_of("jamba").select("all-linear")}
    assert jamba >= {"ssm.in", "ssm.x", "ssm.dt", "ssm.out"} and not jamba & {"ssm.conv", "router", "experts.down"}
    assert not {entry.role for entry, _ in host_of("sd3").select("all-linear")} & {"mod", "head", "patch"}
    assert not [path for path in paths(host_of("siglip"), "all-linear") if ".head." in path]
    assert paths(host_of("timm_resnet18"), "all-linear") == []


def test_all_linear_without_blocks_takes_every_linear() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 2))
    assert paths(derive(model), "all-linear") == ["0", "2.0", "3"]
    assert "all-linear" in derive(model).roles()
    assert paths(derive(nn.Linear(2, 3)), "all-linear") == [""]


# Outputs of branches
@pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [
        ("llama", "self_attn.o_proj", "mlp.down_proj"),
        ("bert", "attention.output.dense", "output.dense"),
        ("mixtral", "self_attn.o_proj", "mlp"),
        ("qwen2_moe", "self_attn.o_proj", "mlp"),
        ("llama4", "self_attn.o_proj", "feed_forward"),
        ("timm_vit", "attn.proj", "mlp.fc2"),
    ],
)
def test_outputs_are_what_a_branch_adds(name: str, attention: str, mlp: str) -> None:
    host = host_of(name)
    first = next(entry.path for entry in host.entries if entry.role == "block")
    assert paths(host, "attn.output")[0] == f"{first}.{attention}"
    assert paths(host, "mlp.output")[0] == f"{first}.{mlp}"
    blocks = len(host.select("block"))
    assert (len(host.select("attn.output")), len(host.select("mlp.output"))) == (blocks, blocks)


def test_shared_experts_are_summed_with_the_others() -> None:
    assert paths(host_of("deepseek_v3"), "mlp.output") == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp"]


def test_listed_experts_are_summed_too() -> None:
    assert paths(host_of("switch"), "mlp.output")[:2] == [
        "encoder.block.0.layer.1.mlp.wo",
        "encoder.block.1.layer.1.mlp",
    ]


def test_single_streams_give_one_output() -> None:
    host = host_of("flux")
    assert "single_transformer_blocks.0.proj_out" in paths(host, "attn.output")
    assert not [path for path in paths(host, "mlp.output") if path.startswith("single")]


def test_attention_that_reads_its_output_matrix_is_the_place_itself() -> None:
    host = derive(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2))
    assert paths(host, "attn.output") == ["layers.0.self_attn", "layers.1.self_attn"]
    assert paths(host, "mlp.output") == ["layers.0.linear2", "layers.1.linear2"]


def test_bare_output_parameters_are_no_place() -> None:
    """XLNet's attention module adds the residual, and its bare matrix gives nothing back that could be caught."""
    assert paths(host_of("xlnet"), "attn.output") == []


def test_every_output_lies_in_a_block() -> None:
    """SigLIP's pooling head and SAM's last attention stand outside."""
    for name in ("siglip", "sam"):
        host = host_of(name)
        assert all(entry.block for role in ("attn.output", "mlp.output") for entry, _ in host.select(role))
