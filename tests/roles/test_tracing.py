"""What one forward tells: it restores maps that were spoiled on purpose, and finds what names do not say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from host_zoo import EXTRA, SURVEY, build
from torch import Tensor, nn

from peftcore.roles import HostEntry, HostMap, derive, probe

torch.set_num_threads(1)

ROTATED = {"q": "v", "k": "q", "v": "k"}
FUSED = ("qkv", "kv", "kv_b", "gate_up")

# Between the product and the down matrix stands a norm: the branch is linear in neither half.
UNDECIDED_GATES = {"timm_eva02_base"}


def spoil(entry: HostEntry) -> HostEntry:
    """Queries, keys and values by turns, gates and ups exchanged, no layout."""
    family, _, part = entry.role.partition(".")
    if family in ("attn", "cross") and part in ROTATED and entry.kind in ("linear", "conv"):
        return replace(entry, role=f"{family}.{ROTATED[part]}")
    if family in ("attn", "cross", "mlp") and part in FUSED:
        return replace(entry, layout=None)
    return entry


def exchange_gates(host: HostMap) -> HostMap:
    gated = {entry.path.rpartition(".")[0] for entry in host.entries if entry.role == "mlp.gate"}
    exchanged = {"mlp.gate": "mlp.up", "mlp.up": "mlp.gate"}
    return HostMap(
        tuple(
            replace(entry, role=exchanged.get(entry.role, entry.role))
            if entry.path.rpartition(".")[0] in gated
            else entry
            for entry in host.entries
        )
    )


def roles_and_layouts(host: HostMap) -> dict[str, tuple[object, ...]]:
    return {
        entry.path: (entry.role, entry.layout)
        for entry in host.entries
        if entry.role.partition(".")[0] in ("attn", "cross", "mlp") and "." in entry.role
    }


@pytest.mark.share(3)
@pytest.mark.parametrize("name", [*SURVEY, *EXTRA])
def test_a_spoiled_map_is_restored(name: str) -> None:
    """The static map and the forward agree on every query, key, value and row order; neither knows of the other."""
    model, inputs = build(name)
    host = probe(model, inputs, derive(model))
    spoiled = HostMap(tuple(map(spoil, host.entries)))
    if name not in UNDECIDED_GATES:
        spoiled = exchange_gates(spoiled)
    assert roles_and_layouts(probe(model, inputs, spoiled)) == roles_and_layouts(host)


ATTENTION = "stages.0.blocks.0.attn_block.attn"
READ_NOT_CALLED = {
    "timm_beit": set(),  # known without a forward
    "timm_eva02": set(),
    "timm_swinv2": set(),
    "mamba": set(),
    "mamba2": set(),
    "t5": {"shared"},
    "bart": {"model.shared"},
    "deberta_v2": set(),
    "detr": set(),
    "sam": {f"prompt_encoder.point_embed.{index}" for index in range(4)},
    "llama": set(),
    "gpt2": set(),
    "sd15_unet": set(),
}


@pytest.mark.parametrize("name", READ_NOT_CALLED)
def test_weights_that_are_read_and_not_called(name: str) -> None:
    model, inputs = build(name)
    host = derive(model)
    probed = probe(model, inputs, host)
    before = {entry.path for entry in host.entries if not entry.called}
    assert {entry.path for entry in probed.entries if not entry.called} - before == READ_NOT_CALLED[name]


@pytest.mark.parametrize(
    ("name", "path", "reader"),
    [
        ("sam", "prompt_encoder.point_embed.2", "prompt_encoder"),
        ("timm_swinv2", "layers.0.blocks.0.attn.qkv", "layers.0.blocks.0.attn"),
        ("timm_maxvit_tf", f"{ATTENTION}.rel_pos.relative_position_bias_table", ATTENTION),
        ("t5", "shared", ""),
    ],
)
def test_who_reads_a_weight_is_the_nearest_that_runs(name: str, path: str, reader: str) -> None:
    """Neither a list of modules runs nor a module that has more methods than forward."""
    model, inputs = build(name)
    assert [entry.reader for entry in probe(model, inputs, derive(model)).at(path)] == [reader]


def test_what_never_runs_is_not_called_read() -> None:
    """SAM without a mask prompt leaves its mask embedding alone: nothing is known about it."""
    model, inputs = build("sam")
    del inputs["input_masks"]
    probed = probe(model, inputs, derive(model))
    assert probed.at("prompt_encoder.mask_embed.conv1")[0].called


def test_two_part_matrices_get_their_role_and_rows() -> None:
    """GCViT's global blocks call a matrix qkv that makes keys and values only."""
    model, inputs = build("timm_gcvit")
    host = derive(model)
    path = "stages.0.blocks.1.attn.qkv"
    assert (host.at(path)[0].role, host.at(path)[0].layout) == ("attn.qkv", None)
    (entry,) = probe(model, inputs, host).at(path)
    assert entry.role == "attn.kv"
    assert entry.layout is not None and entry.layout.parts == (("k", ((0, 64),)), ("v", ((64, 128),)))


class Nameless(nn.Module):
    """Attention in words that no rule knows: `a` makes values, keys and queries by turns, two rows each."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        value, key, query = (part.flatten(-2) for part in self.a(x).unflatten(-1, (4, 3, 2)).unbind(-2))
        return torch.softmax(query @ key.transpose(-1, -2), -1) @ value


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.late = nn.LayerNorm(8)
        self.early = nn.LayerNorm(8)
        self.mix = Nameless()
        self.twofold = nn.Linear(8, 40)
        self.back = nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.early(x))
        up, gate = self.twofold(self.late(x)).unflatten(-1, (20, 2)).unbind(-1)
        return x + self.back(up * F.silu(20 * gate))


class Nest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_b = nn.LayerNorm(8)  # registered first, runs last
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm_a = nn.LayerNorm(8)
        self.classify = nn.Linear(8, 3)
        self.unused = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_a(x)
        for layer in self.layers:
            x = layer(x)
        return self.classify(self.norm_b(x))


@pytest.fixture
def nest() -> tuple[Nest, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Nest(), {"x": torch.randn(2, 5, 8)}


def test_attention_without_known_names_is_found(nest: tuple[Nest, dict[str, Tensor]]) -> None:
    model, inputs = nest
    host = derive(model)
    assert host.at("layers.1.mix.a")[0].role == "other"
    (entry,) = probe(model, inputs, host).at("layers.1.mix.a")
    assert entry.role == "attn.qkv"
    assert entry.layout is not None and entry.layout.names == ("v", "k", "q")
    assert entry.layout.slices("k") == ((2, 4), (8, 10), (14, 16), (20, 22))


def test_interleaved_gates_are_found(nest: tuple[Nest, dict[str, Tensor]]) -> None:
    model, inputs = nest
    host = derive(model)
    assert host.at("layers.0.twofold")[0].role == "mlp.gate_up"
    assert host.at("layers.0.twofold")[0].layout is None
    (entry,) = probe(model, inputs, host).at("layers.0.twofold")
    assert entry.layout is not None
    assert entry.layout.slices("up") == tuple((row, row + 1) for row in range(0, 40, 2))


def test_gates_that_could_be_either_stay_open() -> None:
    """A ReLU is linear where it lets through, so both halves fit."""
    model = nn.ModuleDict({"layers": nn.ModuleList(ReluGated() for _ in range(2))})
    model.forward = lambda x: model["layers"][1](model["layers"][0](x))  # type: ignore[method-assign]
    host = derive(model)
    assert host.at("layers.0.twofold")[0].role == "mlp.gate_up"
    assert probe(model, {"x": torch.randn(3, 8)}, host).at("layers.0.twofold")[0].layout is None


class ReluGated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.twofold, self.back = nn.Linear(8, 32), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.twofold(self.norm_1(x)).chunk(2, -1)
        return x + self.norm_2(self.back(F.relu(gate) * up))


def test_norms_and_head_by_the_order_of_calls(nest: tuple[Nest, dict[str, Tensor]]) -> None:
    model, inputs = nest
    host = derive(model)
    probed = probe(model, inputs, host.override({"classify": "other", "unused": "other"}))
    assert [entry.role for name in ("norm_a", "norm_b") for entry in host.at(name)] == ["norm.final", "norm.embed"]
    assert [entry.role for name in ("norm_a", "norm_b") for entry in probed.at(name)] == ["norm.embed", "norm.final"]
    assert [entry.path for entry, _ in probed.select("head")] == ["classify"]


def test_a_probe_leaves_no_trace(nest: tuple[Nest, dict[str, Tensor]]) -> None:
    """Training mode, frozen parameters, gradients, hooks, statistics and the random numbers to come are as before."""
    model, inputs = nest
    model.layers.insert(1, nn.Sequential(nn.Dropout(), nn.BatchNorm1d(5)))
    model.train()
    model.layers[0].eval()
    model.classify.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    random = torch.random.get_rng_state()
    probe(model, inputs, derive(model))
    assert torch.equal(torch.random.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_failing_forward_leaves_no_trace(nest: tuple[Nest, dict[str, Tensor]]) -> None:
    model, _ = nest
    model.requires_grad_(False).train()
    with pytest.raises(RuntimeError):
        probe(model, {"x": torch.randn(2, 5, 9)}, derive(model))
    assert model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_inputs_by_position_and_under_no_grad(nest: tuple[Nest, dict[str, Tensor]]) -> None:
    model, inputs = nest
    host = derive(model)
    with torch.no_grad():
        assert probe(model, (inputs["x"],), host) == probe(model, inputs, host)


def test_half_precision_decides_the_same() -> None:
    model, inputs = build("phi3")
    model.bfloat16()
    host = derive(model)
    assert probe(model, inputs, HostMap(tuple(map(spoil, host.entries)))) == host
