"""The static rules against the hand-made truth of the surveyed hosts, weight by weight."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from statistics import median

import pytest
import torch
from host_truth import TRUTH
from host_zoo import SURVEY, build
from torch import nn

from peftcore.roles import HostEntry, HostMap, derive, probe

torch.set_num_threads(1)


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
