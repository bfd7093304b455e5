"""Row orders of fused weights, checked by what the rows do: zeroed query rows change the query and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from host_zoo import EXTRA, SURVEY, build
from torch import Tensor, nn

import peftcore
from peftcore.errors import TargetError
from peftcore.roles import HostEntry, HostMap, Layout, Slices, derive
from peftcore.roles.layouts import grouped
from peftcore.roles.recording import Recording, record

torch.set_num_threads(1)

OPERANDS = frozenset({"q", "k", "v"})


def weight_of(model: nn.Module, entry: HostEntry) -> nn.Parameter:
    owner = model.get_submodule(entry.module)
    return owner.get_parameter(entry.tensor or "weight")


def by_row(model: nn.Module, entry: HostEntry) -> Tensor:
    """A view of the stored weight with the logical rows first."""
    weight, owner = weight_of(model, entry).data, model.get_submodule(entry.module)
    if weight.dim() == 3:  # experts
        stored_by_input = getattr(owner, "is_transposed", weight.shape != entry.shape)
        return weight.movedim(2 if stored_by_input else 1, 0)
    return weight.movedim(1 if type(owner).__name__ == "Conv1D" else 0, 0)


@contextmanager
def scaled(model: nn.Module, entry: HostEntry, rows: Slices, factor: float) -> Iterator[None]:
    """The model with some rows of one weight scaled."""
    weight = weight_of(model, entry)
    original = weight.detach().clone()
    for start, stop in rows:
        by_row(model, entry)[start:stop] *= factor
    yield
    weight.data.copy_(original)


def run(model: nn.Module, inputs: dict[str, Any], downs: frozenset[str] = frozenset()) -> Recording:
    """One forward with the operands of all attentions. Without the grad mode a softmax cannot be followed, so it
    stays on.
    """
    return record(model, inputs, frozenset(), downs)


def operands_within(recording: Recording, module: str) -> dict[str, Tensor]:
    """The operands of the first attention inside a module."""
    inside = (e for e in recording.attentions if any(f.path == module for f in e.frames))
    return {name: operand.detach() for name, operand in next(inside).operands.items()}


def fused(host: HostMap, *parts: str) -> list[HostEntry]:
    """One entry for each distinct fused weight of a host."""
    distinct = {}
    for entry in host.entries:
        family, _, part = entry.role.partition(".")
        if part in parts and family != "pool" and entry.kind != "container":
            distinct.setdefault((entry.role, entry.shape, entry.layout), entry)
    return list(distinct.values())


ATTENTION_HOSTS = [
    *("phi3", "gpt_neox", "falcon_old", "falcon_mq", "falcon_new", "bloom", "mpt", "gpt2", "gpt2_cross", "modernbert"),
    *("deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "sam", "qwen2_vl", "timm_vit", "timm_vit_qknorm_ls"),
    *("timm_deit_dist", "timm_beit", "timm_eva02", "timm_swin", "timm_swinv2", "timm_maxvit", "timm_maxvit_tf"),
    *("timm_levit", "timm_tiny_vit", "timm_gcvit", "codegen", "bigcode_mq", "bigcode_mha", "persimmon"),
]


GATED_HOSTS = [
    *("phi3", "modernbert", "timm_eva02", "sd15_unet", "sdxl_unet", "controlnet", "glm4", "llama4"),
    *("qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "jamba", "qwen2_moe"),
]


@pytest.mark.share(3)
@pytest.mark.parametrize("name", ATTENTION_HOSTS)
def test_zeroed_rows_change_their_operand_alone(name: str) -> None:
    model, inputs = build(name)
    host = derive(model)
    entries = [entry for entry in fused(host, "qkv", "kv", "kv_b") if entry.layout is not None]
    assert entries
    before = run(model, inputs)
    for entry in entries:
        assert entry.layout is not None
        module = attention_around(host, entry)
        for part in entry.layout.names:
            with scaled(model, entry, entry.layout.slices(part), 0.0):
                after = operands_within(run(model, inputs), module)
            changed = {key for key, old in operands_within(before, module).items() if not torch.equal(old, after[key])}
            assert changed == {part}, entry


def attention_around(host: HostMap, entry: HostEntry) -> str:
    path = entry.module
    while not any(found.role in ("attn", "cross") for found in host.at(path)):
        path = path.rpartition(".")[0]
    return path


@pytest.mark.slow
def test_every_fused_weight_of_the_zoo_is_checked_or_unknown() -> None:
    """The lists above are complete, and only GCViT's two-part matrices have no static layout."""
    unknown = set()
    for name in SURVEY | EXTRA:
        host = derive(build(name)[0])
        entries = fused(host, "qkv", "kv", "kv_b")
        assert not entries or name in ATTENTION_HOSTS, name
        assert not fused(host, "gate_up") or name in [*GATED_HOSTS, "gpt_oss"], name
        unknown |= {name for entry in entries if entry.layout is None}
    assert unknown == {"timm_gcvit"}


@pytest.mark.parametrize("name", GATED_HOSTS)
def test_the_branch_is_linear_in_the_up_rows(name: str) -> None:
    """Doubled up rows double what the branch gives, doubled gate rows do not."""
    model, inputs = build(name)
    entries = fused(derive(model), "gate_up")
    assert entries
    for entry in entries:
        assert entry.layout is not None and set(entry.layout.names) == {"gate", "up"}
        remove_bias(model, entry)
        stand_out(model, entry)
        plain = gated_output(model, inputs, entry)
        with scaled(model, entry, entry.layout.slices("up"), 2.0):
            torch.testing.assert_close(gated_output(model, inputs, entry), 2 * plain)
        with scaled(model, entry, entry.layout.slices("gate"), 2.0):
            assert not torch.allclose(gated_output(model, inputs, entry), 2 * plain, rtol=1e-3)


def remove_bias(model: nn.Module, entry: HostEntry) -> None:
    bias = model.get_submodule(entry.module)._parameters.get("bias")
    if bias is not None:
        bias.data.zero_()


def stand_out(model: nn.Module, entry: HostEntry) -> None:
    """Gates at the usual initial scale are all but linear; larger ones are not."""
    weight_of(model, entry).data.mul_(20)


def gated_output(model: nn.Module, inputs: dict[str, Any], entry: HostEntry) -> Tensor:
    """What a gated branch gives: the output of the experts, or the input of the down matrix."""
    host = derive(model)
    if entry.kind == "tensor":
        return output_of(model, inputs, entry.module)
    downs = frozenset(other.path for other in host.entries if other.role == "mlp.down" and other.block == entry.block)
    return run(model, inputs, downs).downs[0].value.detach()


def output_of(model: nn.Module, inputs: dict[str, Any], path: str) -> Tensor:
    outputs: list[Tensor] = []
    module = model.get_submodule(path)
    with module.register_forward_hook(lambda _module, _args, output: outputs.append(output)), torch.no_grad():
        model(**inputs)
    return outputs[0]


def test_interleaved_experts() -> None:
    """gpt_oss: even rows gate. Its up rows get 1 added, so only zeroed gates silence the branch."""
    model, inputs = build("gpt_oss")
    path = "model.layers.0.mlp.experts"
    (entry,) = derive(model).at(f"{path}.gate_up_proj")
    assert entry.layout is not None
    experts = model.get_submodule(path)
    experts.get_parameter("gate_up_proj_bias").data.zero_()
    experts.get_parameter("down_proj_bias").data.zero_()
    assert output_of(model, inputs, path).abs().max() > 0
    with scaled(model, entry, entry.layout.slices("gate"), 0.0):
        assert output_of(model, inputs, path).abs().max() == 0
    with scaled(model, entry, entry.layout.slices("up"), 0.0):
        assert output_of(model, inputs, path).abs().max() > 0


def test_stacks_are_told_in_logical_shape() -> None:
    """Llama 4 stores (experts, in, out) and says so nowhere; Mixtral stores (experts, out, in)."""
    llama4 = derive(build("llama4")[0]).at("model.layers.0.feed_forward.experts.gate_up_proj")[0]
    mixtral = derive(build("mixtral")[0]).at("model.layers.0.mlp.experts.gate_up_proj")[0]
    assert llama4.shape == mixtral.shape == (4, 160, 48)
    assert llama4.layout == mixtral.layout == Layout((("gate", ((0, 80),)), ("up", ((80, 160),))))


@pytest.mark.parametrize("name", ["llama4", "mixtral"])
def test_operators_at_parts_of_stacks(name: str) -> None:
    """They see what the map says, and act on those rows."""
    model, inputs = build(name)
    injection = peftcore.apply(model, "lora", target=["experts.gate", "experts.up", "experts.down"], rank=2)
    sizes = {path.rpartition(":")[2]: (op.B.shape[-2], op.A.shape[-1]) for path, op in injection.operators.items()}
    assert sizes.pop("experts.gate") == sizes.pop("experts.up") == (80, 48) and set(sizes.values()) == {(48, 80)}
    for parameter in injection.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        found = model(**inputs).logits
        experts = next(module for path, module in model.named_modules() if path.endswith("experts"))
        before = experts.gate_up_proj.detach().clone()
        injection.merge()
        changed = (experts.gate_up_proj - before).abs()
        assert changed.shape == before.shape and changed.min() > 0
        torch.testing.assert_close(model(**inputs).logits, found, rtol=1e-4, atol=1e-5)


def test_columns_of_conv1d_are_rows() -> None:
    """GPT-2 stores (in, out): rows are given in the output dimension all the same."""
    (entry,) = derive(build("gpt2")[0]).at("transformer.h.0.attn.c_attn")
    assert entry.shape == (144, 48)
    assert entry.layout is not None and entry.layout.slices("v") == ((96, 144),)


def test_grouped_merges_neighbours() -> None:
    assert grouped(2, (("q", 2), ("k", 1))).parts == (("q", ((0, 2), (3, 5))), ("k", ((2, 3), (5, 6))))
    assert grouped(3, (("q", 4),)).parts == (("q", ((0, 12),)),)


class Fused(nn.Module):
    """An attention of a user's own: one fused matrix, nothing declared."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, width)
        self.proj = nn.Linear(8, 8)
        self.num_heads = 4


class Gated(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(8, 32))
        self.down = nn.Linear(16, 8)


def wrapped(width: int, name: str) -> nn.Module:
    blocks = [nn.ModuleDict({"attn": Fused(width), "mlp": Gated(name)}) for _ in range(2)]
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks)})


def test_unknown_orders_are_not_guessed() -> None:
    """Two fewer-head readings of 12 rows are possible, and a matrix called w12 may gate with either half."""
    host = derive(wrapped(12, "w12"))
    for path, role in (("blocks.0.attn.qkv", "attn.q"), ("blocks.0.mlp.w12", "mlp.gate")):
        assert host.at(path)[0].layout is None
        assert role in host.roles()
        with pytest.raises(TargetError, match="probe"):
            host.select(role)


def test_what_a_name_tells_is_used() -> None:
    host = derive(wrapped(24, "up_gate_proj"))
    assert [rows for _, rows in host.select("attn.v")] == [((16, 24),)] * 2
    assert [rows for _, rows in host.select("mlp.gate")] == [((16, 32),)] * 2
