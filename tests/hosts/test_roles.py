"""The static rules against the hand-made truth of the surveyed hosts, weight by weight."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from host_truth import TRUTH
from host_zoo import EXTRA, SURVEY, build
from torch import nn

from peftcore.roles import HostEntry, HostMap, derive, probe

torch.set_num_threads(1)

MODULE_ROLES = frozenset({"block", "attn", "cross", "mlp", "ssm"})
CORE = ("attn", "cross", "mlp", "experts", "ssm", "attn_mlp")

# What static rules cannot know: the same module of the same name stands before the layers in wav2vec2 and behind them
# here.
KNOWN_ERRORS = {"wav2vec2_stable": {"wav2vec2.encoder.layer_norm"}}


@dataclass(frozen=True)
class Verdict:
    path: str
    truth: str
    found: str
    right: bool
    core: bool


def collapse(path: str) -> str:
    """`h.0.attn` -> `h.*.attn`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", path)


def owners(model: nn.Module) -> Iterator[str]:
    """Every path that must have a role: modules with a weight, and bare parameters that act as weights or positions."""
    for path, module in model.named_modules():
        own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
        prefix = f"{path}." if path else ""
        if isinstance(module, nn.MultiheadAttention):
            yield f"{prefix}in_proj_weight"
            continue
        if "weight" in own or "parametrizations" in module._modules:
            yield path
        bare = {name for name, parameter in own.items() if parameter.dim() >= 2 and name not in ("weight", "bias")}
        if "expert" in type(module).__name__.lower():
            yield from (prefix + name for name in bare if "bias" not in name)
        else:
            positions = {name for name in bare if re.search("pos|bias|rel", name) and "token" not in name}
            yield from (prefix + name for name in sorted(positions))


def predicted(host: HostMap) -> dict[str, set[str]]:
    """Path to roles, in the words of the truth."""
    roles: dict[str, set[str]] = {}
    for entry in host.entries:
        roles.setdefault(entry.path, set()).add(in_words_of_truth(entry))
    return roles


def in_words_of_truth(entry: HostEntry) -> str:
    family, _, part = entry.role.partition(".")
    projection = part and family in ("attn", "cross") and entry.stream == "context"
    return f"{family}.ctx_{part}" if projection else entry.role


def judge(name: str, probed: bool = False) -> set[Verdict]:
    """One verdict for each distinct combination of collapsed path, truth and answer."""
    model, inputs = build(name)
    host = derive(model)
    if probed:
        host = probe(model, inputs, host)
    roles, truth = predicted(host), TRUTH[name]
    verdicts = set()
    for path in owners(model):
        expected = truth.get(collapse(path), "other")
        found = roles.get(path, {"other"})
        right = bool(found & set(expected.split("|")))
        core = any(part.partition(".")[0] in CORE for part in expected.split("|"))
        verdicts.add(Verdict(collapse(path), expected, "|".join(sorted(found)), right, core))
    return verdicts | judge_modules(model, roles, truth)


def judge_modules(model: nn.Module, roles: dict[str, set[str]], truth: dict[str, str]) -> set[Verdict]:
    """One verdict for each collapsed path that is, or was taken for, a block, an attention, an MLP or a state-space
    mixer.
    """
    groups: dict[str, list[set[str]]] = {}
    for path, _ in model.named_modules():
        groups.setdefault(collapse(path), []).append(roles.get(path, set()) & MODULE_ROLES)
    verdicts = set()
    for path, found in groups.items():
        accepted = set(truth.get(path, "other").split("|"))
        if not accepted & MODULE_ROLES:
            accepted = {"other"}
        if accepted != {"other"} or any(found):
            right = all(bool(one & accepted) if one else "other" in accepted for one in found if one or len(found) == 1)
            missed = not any(found) and "other" not in accepted
            answer = "|".join(sorted(set().union(*found)))
            verdicts.add(Verdict(f"module {path}", "|".join(sorted(accepted)), answer, right and not missed, False))
    return verdicts


@cache
def verdicts_of(name: str) -> set[Verdict]:
    return judge(name)


@pytest.mark.parametrize("name", SURVEY)
def test_every_weight_and_module_has_its_role(name: str) -> None:
    wrong = {verdict for verdict in verdicts_of(name) if not verdict.right}
    assert {verdict.path for verdict in wrong} == KNOWN_ERRORS.get(name, set()), wrong


def test_total_score() -> None:
    verdicts = [verdict for name in SURVEY for verdict in verdicts_of(name)]
    core = [verdict for verdict in verdicts if verdict.core]
    assert (len(SURVEY), len(core), len(verdicts)) == (89, 768, 2304)
    assert sum(verdict.right for verdict in core) == 768
    assert sum(verdict.right for verdict in verdicts) >= 2303


@pytest.mark.parametrize("name", ["wav2vec2", "wav2vec2_stable"])
def test_a_probe_settles_what_names_cannot(name: str) -> None:
    assert all(verdict.right for verdict in judge(name, probed=True))


@pytest.mark.slow
def test_a_probe_makes_nothing_worse() -> None:
    wrong = [verdict for name in SURVEY for verdict in judge(name, probed=True) if not verdict.right]
    assert not wrong


def test_bare_query_key_value_parameters() -> None:
    """XLNet has no Linear in its attention."""
    host = derive(build("xlnet")[0])
    layer = "transformer.layer.0.rel_attn"
    assert {name: [e.role for e in host.at(f"{layer}.{name}")] for name in "qkvo"} == {
        "q": ["attn.q"],
        "k": ["attn.k"],
        "v": ["attn.v"],
        "o": ["attn.out"],
    }
    (query,) = host.at(f"{layer}.q")
    assert (query.module, query.tensor, query.called, query.shape) == (layer, "q", False, (48, 48))


def test_listed_experts_make_one_branch() -> None:
    """Switch keeps its experts as a dictionary of MLPs beside a router."""
    host = derive(build("switch")[0])
    assert [entry.role for entry in host.at("encoder.block.1.layer.1.mlp")] == ["mlp"]
    assert [entry.role for entry in host.at("encoder.block.1.layer.1.mlp.router.classifier")] == ["router"]


@pytest.mark.parametrize("name", EXTRA)
def test_attention_is_found_beyond_the_survey(name: str) -> None:
    host = derive(build(name)[0])
    blocks = {entry.path for entry in host.entries if entry.role == "block"}
    attending = {entry.block for entry in host.entries if entry.role.startswith("attn.")}
    convolutional = {entry.block for entry in host.entries if entry.role == "conv"}
    assert blocks and blocks - convolutional <= attending


class Tiny(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)


def test_torch_transformer() -> None:
    """Plain torch: the attention reads its matrices, the second attention of a decoder layer is cross attention."""
    host = derive(nn.Transformer(8, 2, 1, 2, 16, batch_first=True))
    layer = "decoder.layers.1"
    roles = {entry.path.removeprefix(layer): entry.role for entry in host.entries if entry.path.startswith(layer)}
    assert roles[".self_attn"] == "attn"
    assert roles[".multihead_attn"] == "cross"
    assert roles[".multihead_attn.in_proj_weight"] == "cross.qkv"
    assert (roles[".linear1"], roles[".linear2"]) == ("mlp.up", "mlp.down")
    (out,) = host.at(f"{layer}.self_attn.out_proj")
    assert (out.module, out.tensor, out.called) == (f"{layer}.self_attn", "out_proj.weight", False)


class QuantizedLayer(nn.Module):
    """Says of itself how large it is."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("packed", torch.zeros(inputs * outputs // 2, dtype=torch.uint8))


class PackedInRows(nn.Module):
    """Works out how large it is."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("packed", torch.zeros(outputs, inputs // 2, dtype=torch.uint8))

    @property
    def in_features(self) -> int:
        return 2 * self.packed.shape[1]

    @property
    def out_features(self) -> int:
        return len(self.packed)


@pytest.mark.parametrize("packed", [QuantizedLayer, PackedInRows])
def test_a_linear_by_any_other_name(packed: Callable[[int, int], nn.Module]) -> None:
    """A packed weight has no telling shape; what declares in_features and out_features is a matrix."""

    def block() -> nn.Module:
        sizes = {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 8}
        attention = nn.ModuleDict({name: packed(8, width) for name, width in sizes.items()})
        return nn.ModuleDict({"attn": attention, "up": packed(8, 32), "down": packed(32, 8)})

    host = derive(Tiny([block(), block()]))
    roles = {entry.path: entry.role for entry in host.entries}
    assert roles["blocks.1.attn.q_proj"] == "attn.q"
    assert roles["blocks.1.attn.o_proj"] == "attn.out"
    assert (roles["blocks.1.up"], roles["blocks.1.down"]) == ("mlp.up", "mlp.down")
    assert host.at("blocks.0.attn.k_proj")[0].shape == (4, 8)


def test_guests_are_no_part_of_the_host() -> None:
    """Operators live under `peft`; a parametrized weight keeps the role of its module."""
    model, _ = build("llama")
    plain = derive(model)
    attention = model.get_submodule("model.layers.0.self_attn")
    attention.add_module("peft", nn.ModuleDict({"q_proj": nn.Linear(48, 8)}))
    nn.utils.parametrize.register_parametrization(attention.get_submodule("q_proj"), "weight", nn.Identity())
    assert derive(model) == plain


def test_odd_hosts_do_not_trip_the_walk() -> None:
    """Hosts on the meta device, lazy modules and containers without parameters do not trip the walk."""
    with torch.device("meta"):
        assert derive(Tiny([])).at("head")[0].role == "head"
    assert derive(nn.Sequential(nn.LazyLinear(3), nn.ReLU())).select("all-linear") == []
    assert derive(nn.Identity()).roles() == frozenset()
