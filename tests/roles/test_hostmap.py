"""Asking and correcting a host map."""

from __future__ import annotations

import pytest
import torch
from host_zoo import SURVEY
from torch import nn
from zoo_maps import host_of, paths

from peftcore.errors import TargetError
from peftcore.roles import ROLES, HostEntry, HostMap, Layout, derive

torch.set_num_threads(1)


def test_a_role_finds_whole_matrices() -> None:
    found = host_of("llama").select("attn.q")
    assert [(entry.path, rows) for entry, rows in found] == [
        ("model.layers.0.self_attn.q_proj", None),
        ("model.layers.1.self_attn.q_proj", None),
    ]
    assert [entry.layer for entry, _ in found] == [0, 1]
    assert [entry.block for entry, _ in found] == ["model.layers.0", "model.layers.1"]


def test_a_role_finds_rows_of_fused_matrices() -> None:
    found = host_of("gpt2_cross").select("cross.v")
    assert [(entry.role, rows) for entry, rows in found] == [("cross.kv", ((48, 96),))] * 2
    assert [rows for _, rows in host_of("phi3").select("mlp.up")] == [((80, 160),)] * 2
    assert [rows for _, rows in host_of("mixtral").select("experts.gate")] == [((0, 80),)] * 2


def test_separate_and_fused_matrices_are_found_together_in_the_order_of_the_host() -> None:
    """LeViT: fused in its blocks, a query of its own where it shrinks the map."""
    found = host_of("timm_levit").select("attn.q")
    assert {entry.role for entry, _ in found} == {"attn.q", "attn.qkv"}
    order = [entry.path for entry in host_of("timm_levit").entries]
    assert [entry.path for entry, _ in found] == sorted((e.path for e, _ in found), key=order.index)


def test_the_second_factor_of_a_low_rank_pair_is_the_operand() -> None:
    found = host_of("deepseek_v3").select("attn.q")
    assert [(entry.path.rpartition(".")[2], rows) for entry, rows in found] == [("q_b_proj", None)] * 2
    assert [len(rows or ()) for _, rows in host_of("deepseek_v3").select("attn.v")] == [4, 4]


def test_a_family_includes_itself() -> None:
    names = {entry.role for entry, _ in host_of("qwen3").select("norm.*")}
    assert names == {"norm", "norm.inner", "norm.final"}
    assert "norm.*" in host_of("qwen3").roles()
    assert paths(host_of("qwen3"), "norm")[:2] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
    ]


def test_an_absent_role_finds_nothing() -> None:
    host = host_of("llama")
    assert "cross.q" in ROLES and "cross.q" not in host.roles()
    assert host.select("cross.q") == []


@pytest.mark.parametrize("name", SURVEY)
def test_every_role_a_host_names_finds_something(name: str) -> None:
    host = host_of(name)
    assert all(host.select(role) for role in host.roles())
    assert "other" not in host.roles()


def test_both_streams_of_joint_attention_share_their_roles() -> None:
    streams = {entry.path: entry.stream for entry, _ in host_of("flux").select("attn.out")}
    assert streams["transformer_blocks.0.attn.to_out.0"] == "main"
    assert streams["transformer_blocks.0.attn.to_add_out"] == "context"
    ups = {entry.path: entry.stream for entry, _ in host_of("flux").select("mlp.up")}
    assert ups["transformer_blocks.0.ff.net.0.proj"] == "main"
    assert ups["transformer_blocks.0.ff_context.net.0.proj"] == "context"
    assert all(entry.stream == "main" for entry in host_of("llama").entries)


def test_override_sets_and_removes_roles() -> None:
    host = host_of("llama")
    path = "model.layers.0.self_attn.q_proj"
    corrected = host.override({path: "other", "lm_head": "norm.final"})
    assert paths(corrected, "attn.q") == ["model.layers.1.self_attn.q_proj"]
    assert paths(corrected, "norm.final") == ["model.norm", "lm_head"]
    assert "head" not in corrected.roles()
    assert paths(host, "attn.q")[0] == path, "the map itself stays"


def test_override_forgets_a_layout_with_its_role() -> None:
    host = host_of("gpt2")
    path = "transformer.h.0.attn.c_attn"
    assert host.override({path: "attn.qkv"}) == host
    assert host.override({path: "cross.qkv"}).at(path)[0].layout is None


def test_override_with_blocks_moves_what_they_hold() -> None:
    model = nn.ModuleDict({"first": nn.Sequential(nn.Linear(4, 4)), "second": nn.Sequential(nn.Linear(4, 4))})
    host = derive(model)
    assert not host.has_blocks
    corrected = host.override({"first": "block", "second": "block", "second.0": "attn.out"})
    (matrix,) = corrected.at("second.0")
    assert (matrix.block, matrix.layer) == ("second", 1)
    assert paths(corrected, "attn.output") == ["second.0"]
    back = corrected.override({"first": "other", "second": "other"})
    assert back.at("second.0")[0].block is None


def test_override_of_a_block_that_is_an_attention_leaves_one_role() -> None:
    host = host_of("unet2d")
    path = paths(host, "block")[1]
    path = next(entry.path for entry in host.entries if len(host.at(entry.path)) == 2)
    assert [entry.role for entry in host.at(path)] == ["block", "attn"]
    assert [entry.role for entry in host.override({path: "block"}).at(path)] == ["block"]


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        ({"model.layers.0.self_attn.q_pro": "attn.q"}, "q_proj"),
        ({"lm_head": "hed"}, "head"),
        ({"lm_head": "zzz"}, "all roles|known roles"),
    ],
)
def test_override_refuses_what_it_does_not_know(roles: dict[str, str], says: str) -> None:
    with pytest.raises(TargetError, match=says):
        host_of("llama").override(roles)


def test_maps_are_values() -> None:
    """Equal hosts have equal maps, and entries can be kept in sets: nothing in them is a module."""
    assert host_of("llama") == host_of("llama")
    assert len(set(host_of("llama").entries)) == len(host_of("llama").entries)
    layout = Layout((("q", ((0, 2),)), ("k", ((2, 3),))))
    assert layout.slices("k") == ((2, 3),) and layout.names == ("q", "k")
    assert HostMap((HostEntry("a", "a", None, "other"),)).roles() == frozenset()
