"""Asking and correcting a host map."""

from __future__ import annotations

import time
from functools import cache
from statistics import median

import pytest
import torch
from host_zoo import SURVEY, build
from torch import nn

from peftcore.errors import TargetError
from peftcore.roles import ROLES, HostEntry, HostMap, Layout, derive

torch.set_num_threads(1)


@cache
def host_of(name: str) -> HostMap:
    return derive(build(name)[0])


def paths(host: HostMap, role: str, tower: str | None = None) -> list[str]:
    return [entry.path for entry, _ in host.select(role, tower)]


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


# Towers


@pytest.mark.parametrize(
    ("name", "towers"),
    [
        ("llama", set()),
        ("t5", set()),
        ("bart", set()),
        ("whisper", set()),
        ("sd15_unet", set()),
        ("vae_kl", set()),
        ("flux", set()),
        ("timm_resnet50", set()),
        ("timm_levit", set()),
        ("timm_maxvit", set()),
        ("clip", {"text_model", "vision_model"}),
        ("siglip", {"text_model", "vision_model"}),
        ("llava", {"model.vision_tower", "model.language_model"}),
        ("qwen2_vl", {"model.visual", "model.language_model"}),
        ("gemma3", {"model.vision_tower", "model.language_model"}),
        ("sam", {"vision_encoder", "mask_decoder"}),
        ("detr", {"model.backbone"}),
    ],
)
def test_towers(name: str, towers: set[str]) -> None:
    assert {entry.tower for entry in host_of(name).entries} == towers | {""}


@pytest.mark.parametrize(
    ("name", "towers"),
    [
        ("clip", {"text": "text_model", "vision": "vision_model"}),
        ("llava", {"vision": "model.vision_tower", "text": "model.language_model"}),
        ("qwen2_vl", {"vision": "model.visual", "text": "model.language_model"}),
        ("sam", {"vision": "vision_encoder"}),
        ("wav2vec2", {"audio": ""}),
        ("timm_resnet50", {"vision": ""}),
        ("t5", {"text": ""}),
        pytest.param("whisper", {}, id="whisper: one tower that hears and reads"),
    ],
)
def test_towers_by_what_they_take_in(name: str, towers: dict[str, str]) -> None:
    assert host_of(name).named_towers == {sense: (path,) for sense, path in towers.items()}


def test_blocks_whose_stream_is_a_grid() -> None:
    """MaxViT mixes features by convolutions; TinyViT's are depthwise and Mamba's go over a sequence."""
    assert {name: _on_grid(name) for name in ("timm_maxvit", "timm_tiny_vit", "mamba", "timm_resnet18", "vit")} == {
        "timm_maxvit": True,
        "timm_tiny_vit": False,
        "mamba": False,
        "timm_resnet18": True,
        "vit": False,
    }


def _on_grid(name: str) -> bool:
    host = host_of(name)
    return host.on_grid(host.select("block")[-1][0].path)


def test_select_takes_one_tower() -> None:
    host = host_of("clip")
    text, both = paths(host, "attn.q", "text_model"), paths(host, "attn.q")
    assert len(text) == 2 and all(path.startswith("text_model.") for path in text)
    assert len(both) == 4
    assert len(paths(host, "all-linear", "vision_model")) == 12


def test_the_main_tower_has_most_parameters_in_its_blocks() -> None:
    assert host_of("llama").main_tower() == ""
    assert host_of("qwen2_vl").main_tower() == "model.language_model"
    assert host_of("clip").main_tower() == "vision_model"
    assert host_of("detr").main_tower() == ""
    assert derive(nn.Linear(2, 2)).main_tower() == ""


# Corrections


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


# The map as text


def test_tree_folds_what_repeats() -> None:
    text = host_of("gpt_neox").tree()
    assert text.splitlines() == [
        "gpt_neox                      stack",
        "  embed_in                    embed       99 x 48",
        "  layers.[0-1]                block",
        "    input_layernorm           norm        48",
        "    post_attention_layernorm  norm        48",
        "    attention                 attn",
        "      query_key_value         attn.qkv    144 x 48  4 x [q 12 | k 12 | v 12]",
        "      dense                   attn.out    48 x 48",
        "    mlp                       mlp",
        "      dense_h_to_4h           mlp.up      80 x 48",
        "      dense_4h_to_h           mlp.down    48 x 80",
        "  final_layer_norm            norm.final  48",
        "lm_head                       head        99 x 48",
    ]


def test_tree_tells_runs_towers_streams_and_what_is_read() -> None:
    jamba = host_of("jamba").tree()
    assert "[0,2]" in jamba and "[1,3]" in jamba
    assert any("experts" in line and "read, not called" in line for line in jamba.splitlines())
    towers = [line for line in host_of("clip").tree().splitlines() if "tower" in line]
    assert [line.split()[:3] for line in towers] == [
        ["text_model", "text", "tower"],
        ["vision_model", "vision", "tower"],
    ]
    assert "context stream" in host_of("flux").tree()
    assert "block + attn" in host_of("unet2d").tree()


def test_tree_does_not_grow_with_depth() -> None:
    lines = {len(derive(deep(layers)).tree().splitlines()) for layers in (2, 40)}
    assert len(lines) == 1


def deep(layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with torch.device("meta"):
        return nn.TransformerEncoder(layer, layers)


def test_maps_are_values() -> None:
    """Equal hosts have equal maps, and entries can be kept in sets: nothing in them is a module."""
    assert host_of("llama") == host_of("llama")
    assert len(set(host_of("llama").entries)) == len(host_of("llama").entries)
    layout = Layout((("q", ((0, 2),)), ("k", ((2, 3),))))
    assert layout.slices("k") == ((2, 3),) and layout.names == ("q", "k")
    assert HostMap((HostEntry("a", "a", None, "other"),)).roles() == frozenset()


# Speed


def llama(layers: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=layers, vocab_size=99)
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def seconds(model: nn.Module, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        derive(model)
        times.append(time.thread_time() - start)
    return median(times)


def test_derive_is_fast_and_grows_with_the_number_of_modules() -> None:
    """336 matrices in 48 layers: 7 ms when measured, 30 allowed; twice the depth takes about twice the time."""
    model = llama(48)
    assert sum(entry.kind == "linear" for entry in derive(model).entries) == 337
    assert seconds(model) < 0.030
    assert seconds(llama(96)) < 4 * seconds(model)
