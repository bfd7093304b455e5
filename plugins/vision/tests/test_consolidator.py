"""Consolidator: the conformance kit; numbers of the authors' code, merged ones and gradients too, its start, what
trains and its options; its equation in a ViT, written a second time as weights; and stochastic depth."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from numbers_of import module_of
from torch import Tensor, nn

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore_vision.consolidator import ConsolidatorOperator

timm = pytest.importorskip("timm")
NUMBERS = Path(__file__).parent / "numbers" / "consolidator.json"
AUTHORS: Any = {"repository": "THU-MIG/Consolidator", "commit": "545d006", "script": "model/vision_transformer_timm.py"}
CASES = {"one": ((4,), False), "dealt": ((4,), True), "several": ((6, 3), True)}


@conformance("consolidator")
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("case", CASES)
@against("authors", "consolidator", **AUTHORS)
def test_numbers_of_the_authors_code(case: str) -> None:
    wave, (groups, dealt) = module_of("consolidator").wave, CASES[case]
    host = nn.Sequential(nn.Linear(12, 24)).double().eval().requires_grad_(False)
    injection = peftcore.apply(host, "consolidator", target="0", groups=groups, reorder=dealt, dtype="float64")
    operator = injection.operators["0"]
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(host[0], name).copy_(wave(getattr(host[0], name).shape, f"fc_origin.{name}"))
        for i, G in enumerate(operator.G):
            G.copy_(wave(G.shape, f"fc_rep_branches.{i}.group_fc.weight"))
            operator.c[i].copy_(wave((24,), f"fc_rep_branches.{i}.group_fc.bias"))
    x = (4 * wave((1, 3, 12), "x")).requires_grad_()
    y = host(x)
    (y * wave(y.shape, "direction")).sum().backward()
    found = {"y": y, "x": x.grad, "G": operator.G[-1].grad}
    injection.merge()
    found |= {"weight": host[0].weight[:4], "bias": host[0].bias}
    numbers = frozen(NUMBERS)[case]
    assert found.keys() == numbers.keys()
    for name, value in found.items():
        expected = torch.tensor(numbers[name], dtype=torch.float64)
        torch.testing.assert_close(value.flatten(), expected, rtol=1e-10, atol=1e-12, msg=name)


@against("authors", "consolidator", **AUTHORS, part="start")
def test_start_is_the_authors() -> None:
    host = nn.Sequential(nn.Linear(20, 40_000))
    operator: Any = peftcore.apply(host, "consolidator", target="0", groups=(2,)).operators["0"]
    told = frozen(NUMBERS, "start")
    same_start(operator.G[0], told["G"])
    same_start(operator.c[0], told["c"])


def one_block() -> Any:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1, "num_classes": 3}
    return timm.models.VisionTransformer(**sizes)


@against("authors", "consolidator", **AUTHORS, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """With the head and the biases of the matrices, which `train` names here."""
    matrices = [f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    along = ["head", *(f"{path}.bias" for path in matrices)]
    injection, found = peftcore.apply(one_block(), "consolidator", groups=(2,), train=along), {}
    for path, operator in injection.operators.items():
        if isinstance(operator, ConsolidatorOperator):
            assert operator.c is not None
            found[f"{path}.fc_rep_branches.0.group_fc.weight"] = operator.G[0].numel()
            found[f"{path}.fc_rep_branches.0.group_fc.bias"] = operator.c[0].numel()
        else:
            layer = path.removesuffix(".bias")
            name = f"{layer}.fc_origin" if layer in matrices else layer
            found[f"{name}.{'weight' if path == layer else 'bias'}"] = operator.value.numel()
    assert found == frozen(NUMBERS, "trains")
    assert sum(each.numel() for each in injection.parameters()) == sum(found.values())


@against("authors", "consolidator", **AUTHORS, part="defaults")
def test_defaults_are_the_authors() -> None:
    config = peftcore.apply(one_block(), "consolidator").config
    why = "None stands for half of the greatest common divisor, which is theirs in a ViT-B and exists in all widths"
    same_defaults(config, frozen(NUMBERS, "defaults"), otherwise={"groups": why})


def written_out(G: Tensor, groups: int, dealt: bool) -> Tensor:
    """G P ``[out, in]``, number by number."""
    out, inputs = len(G), G.shape[1] * groups
    whole = G.new_zeros(out, inputs)
    for row in range(out):
        group = row // (out // groups)
        for j in range(G.shape[1]):
            read = group * G.shape[1] + j  # of what is dealt
            # dealt: input b of hand a lies at a + b hands
            column = (read % groups) * G.shape[1] + read // groups if dealt else read
            whole[row, column] += G[row, j]
    return whole


@pytest.mark.parametrize("dealt", [False, True])
def test_equation_in_a_vit(dealt: bool) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    base = timm.create_model("vit_tiny_patch16_224", **sizes).double().eval().requires_grad_(False)
    model, x = deepcopy(base), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    injection = peftcore.apply(model, "consolidator", reorder=dealt, dtype="float64")
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    before, matrices, norms = base(x), 0, 0
    for path, operator in injection.operators.items():
        if not isinstance(operator, ConsolidatorOperator):
            name = path if path.endswith(".bias") else f"{path}.weight"
            base.get_parameter(name).data = operator.value.detach().clone()
            norms += 1
            continue
        (groups,), layer = operator.groups, base.get_submodule(path)
        assert groups == 12
        layer.weight.data += written_out(operator.G[0].detach(), groups, dealt)
        layer.bias.data += operator.c[0]
        matrices += 1
    assert (matrices, norms) == (8, 10)
    expected = base(x)
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    injection.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_stochastic_depth_is_that_of_timm() -> None:
    """Whole rows go without a branch, c included; each branch has a draw of its own."""
    host = nn.Sequential(nn.Linear(12, 6)).double().requires_grad_(False)
    options = {"groups": (3, 2), "stochastic_depth": 0.5, "init_range": 1.0, "dtype": "float64"}
    injection = peftcore.apply(host, "consolidator", target="0", **options)
    operator, x = injection.operators["0"], torch.randn(8, 3, 12, dtype=torch.float64)
    drop = timm.layers.DropPath(0.5).train()
    torch.manual_seed(1)
    ours = host.train()(x)
    torch.manual_seed(1)
    expected = x @ host[0].weight.T + host[0].bias
    for G, c, groups in zip(operator.G, operator.c, (3, 2), strict=True):
        expected = expected + drop(x @ written_out(G.detach(), groups, False).T + c)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_defaults_in_a_vit() -> None:
    """384 groups in every matrix of ViT-B/16, as in the authors' scripts."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    injection = peftcore.apply(model, "consolidator", target=["attn.qkv", "attn.out", "mlp.up", "mlp.down"])
    branches = [each for each in injection.operators.values() if isinstance(each, ConsolidatorOperator)]
    assert {each.groups for each in branches} == {(384,)}
    assert max(p.abs().max() for p in branches[0].parameters()) <= 1e-3


def test_groups_that_divide_nothing_are_refused() -> None:
    with pytest.raises(UnsupportedSite, match="does not divide both"):
        peftcore.plan(nn.Sequential(nn.Linear(12, 8)), "consolidator", target="0", groups=(3,))
