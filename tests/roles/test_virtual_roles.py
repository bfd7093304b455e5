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
    jamba = {entry.role for entry, _ in host_of("jamba").select("all-linear")}
    assert jamba >= {"ssm.in", "ssm.x", "ssm.out"} and not jamba & {"ssm.conv", "ssm.dt", "router"}
    assert not {entry.role for entry, _ in host_of("sd3").select("all-linear")} & {"mod", "head", "patch"}
    assert not [path for path in paths(host_of("siglip"), "all-linear") if ".head." in path]
    assert paths(host_of("timm_resnet18"), "all-linear") == []


ATTENTION = {"attn.q", "attn.k", "attn.v", "attn.out"}
STACKED = {"experts.gate_up", "experts.down"}
DENSE = {"mlp.up", "mlp.down"}


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("mixtral", ATTENTION | STACKED),
        ("qwen2_moe", ATTENTION | STACKED | {"mlp.gate", "mlp.up", "mlp.down"}),
        ("gpt_oss", ATTENTION | STACKED),
        ("llama4", ATTENTION | STACKED | {"mlp.gate", "mlp.up", "mlp.down"}),
        ("switch", ATTENTION | {"cross.q", "cross.k", "cross.v", "cross.out"} | DENSE),  # each is a feed-forward
        ("dbrx", {"attn.qkv", "attn.out", "experts.gate", "experts.up", "experts.down"}),
        ("jetmoe", {"attn.kv", "attn.q", "attn.out", "experts.gate_up", "experts.down"}),
        ("nemotron_h", ATTENTION | {"ssm.in", "ssm.out", "experts.up", "experts.down", "mlp.up", "mlp.down"}),
    ],
)
def test_all_linear_takes_the_experts_of_any_mixture(name: str, roles: set[str]) -> None:
    """Stacked or one by one, in feed-forwards or in attention; no biases of them, and no router."""
    found = host_of(name).select("all-linear")
    assert {entry.role for entry, _ in found} == roles
    assert not [entry.path for entry, _ in found if "bias" in entry.path]


# all-layers
def test_all_layers_are_matrices_and_convolutions_that_mix_channels() -> None:
    assert paths(host_of("llama"), "all-layers") == paths(host_of("llama"), "all-linear")
    resnet = paths(host_of("timm_resnet18"), "all-layers")
    assert len(resnet) == 20 and "layer2.0.downsample.0" in resnet and not {"conv1", "fc"} & set(resnet)
    mobile = paths(host_of("timm_mobilenetv3"), "all-layers")
    assert mobile and not [path for path in mobile if "dw" in path or ".se." in path]


def test_all_layers_without_blocks_leave_out_the_head_alone() -> None:
    class Net(nn.Sequential):
        def get_classifier(self) -> nn.Module:
            return self[-1]

    model = Net(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 8), nn.Linear(8, 2))
    assert paths(derive(model), "all-layers") == ["0", "1", "3"]
    assert paths(derive(nn.Sequential(nn.Conv2d(1, 4, 3))), "all-layers") == ["0"]
    assert paths(derive(nn.Linear(2, 3)), "all-layers") == [""]


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


def test_outputs_of_other_blocks_are_those_of_their_last_matrix() -> None:
    assert paths(host_of("mamba"), "ssm.output") == [f"backbone.layers.{i}.mixer.out_proj" for i in (0, 1)]
    resnet = paths(host_of("timm_resnet50"), "conv.output")
    assert len(resnet) == 16 and all(path.endswith(".conv3") for path in resnet)
    assert all(
        path.endswith(("conv_pwl", "conv_pw", "conv")) for path in paths(host_of("timm_mobilenetv3"), "conv.output")
    )
    unet = paths(host_of("sd15_unet"), "conv.output")
    assert unet and all(".resnets." in path for path in unet)  # the other blocks have branches of their own
    assert paths(host_of("timm_convnext"), "conv.output") == paths(host_of("llama"), "conv.output") == []


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
