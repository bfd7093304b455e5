"""VeRA beside peft's and beside its equation; the matrices that sites share and files do not hold."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import torch
from equation_in_float64 import KINDS, adapted, assert_equation, fill
from peft_pairs import ADAPTER, Both, Pair
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import against, conformance
from peftcore_reparameterized._kernels import projections

RANK = 5


@conformance("vera")
def test_conformance(check: Callable[[], None]) -> None:
    check()


def drawn(seed: int, width: int, rows: int) -> tuple[Tensor, Tensor]:
    """A and B for the largest width and number of rows."""
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.rand(RANK, width, generator=generator), torch.rand(rows, RANK, generator=generator)
    return (2 * A.double() - 1) * (6 / width) ** 0.5, (2 * B.double() - 1) * (6 / RANK) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    operator = adapted(kind, "vera", rank=RANK)[2]
    A, B = (t.clone() for t in (operator.basis.module.A, operator.basis.module.B))
    for ours, expected in zip((A, B), drawn(0, A.shape[1], len(B)), strict=True):
        assert (ours - expected).abs().max() <= 1e-6  # drawn in float32
    assert not operator.b.any()
    assert (operator.d - 0.1).abs().max() <= 1e-6

    def scaled(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        update = torch.diag(tensors["b"]) @ B @ torch.diag(tensors["d"]) @ A
        return weight + update.view(weight.shape)

    assert_equation(kind, "vera", scaled, rank=RANK)


class Three(nn.Module):
    """Layers of several sizes: no site is as large as the matrices both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 7), Conv1D(9, 7), nn.Linear(9, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


TARGET = ["first", "second", "third"]


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(f"{site.path}.d", operator.d, layer.vera_lambda_d[ADAPTER], lambda t: t)
    yield Pair(f"{site.path}.b", operator.b, layer.vera_lambda_b[ADAPTER], lambda t: t)


@pytest.mark.filterwarnings("ignore:::peft")
@against("peft 0.21", "vera")
def test_beside_peft() -> None:
    """The random matrices too are those of peft, to the bit: so files without them mean the same."""
    torch.manual_seed(0)
    config = peft.VeraConfig(r=RANK, projection_prng_key=3, target_modules=TARGET)
    options = {"target": TARGET, "rank": RANK, "projection_seed": 3}
    both = Both(Three(), "vera", options, config, pairs)
    (basis,) = both.injection.shared.values()
    assert torch.equal(basis.A, both.tuner.vera_A[ADAPTER])
    assert torch.equal(basis.B, both.tuner.vera_B[ADAPTER])
    x = torch.randn(4, 12)
    both.assert_same(lambda model: model(x))


def test_files_hold_what_trains_and_the_seed(tmp_path: Path) -> None:
    """An adapter that was made under another seed of `apply` comes back the same: its matrices are drawn again."""
    base, x = nn.Sequential(nn.Linear(300, 1500), nn.Linear(1500, 2000)), torch.randn(3, 300)
    model = deepcopy(base)
    injection = peftcore.apply(model, "vera", target="all-linear", rank=64, projection_seed=7, seed=5)
    for operator in injection.operators.values():
        fill(operator)
    injection.save(tmp_path / "adapter")
    trained = sum(p.numel() * p.element_size() for p in injection.parameters())
    assert trained == 4 * (64 + 1500 + 64 + 2000)
    assert (tmp_path / "adapter" / "adapter.safetensors").stat().st_size <= 1.1 * trained
    assert not [key for key in model.state_dict() if "basis" in key]
    expected = model(x)
    peftcore.load(base, tmp_path / "adapter")
    assert torch.equal(base(x), expected)


def test_sites_share_one_pair_unless_their_options_differ() -> None:
    host = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 3))
    assert list(peftcore.apply(deepcopy(host), "vera", target="all-linear").shared) == ["basis_0_256"]
    overrides = {"1": {"projection_seed": 1}, "2": {"rank": 3}}
    injection = peftcore.apply(host, "vera", target="all-linear", rank=RANK, overrides=overrides)
    shapes = {name: (basis.A.shape, basis.B.shape) for name, basis in injection.shared.items()}
    pair = ((RANK, 8), (8, RANK))
    assert shapes == {"basis_0_5": pair, "basis_1_5": pair, "basis_0_3": ((3, 8), (8, 3))}
    first, second = (injection.shared[f"basis_{seed}_5"].A for seed in (0, 1))
    assert not torch.isclose(first, second).any()


def test_dropout_is_of_inputs() -> None:
    host = adapted("linear", "vera", rank=RANK, dropout=0.5)[0].train()
    fill(host)
    x = torch.randn(4, 12).double()
    assert not torch.equal(host(x), host(x))
    with pytest.raises(UnsupportedSite, match="dropout"):
        adapted("experts", "vera", dropout=0.5)


def test_a_step_of_a_host_whose_sites_share_their_inputs_is_that_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs large enough for a layer and its update to be one function; q, k and v project one input once."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    ours, ids = LlamaForCausalLM(config), torch.randint(0, 64, (2, 96))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs: Any = peft.get_peft_model(deepcopy(ours), peft.VeraConfig(r=16, target_modules=names))
    injection = peftcore.apply(ours, "vera", target=names, rank=16)
    [basis] = injection.shared.values()
    basis.A.copy_(theirs.base_model.vera_A["default"]), basis.B.copy_(theirs.base_model.vera_B["default"])
    pairs = []
    for path, operator in injection.operators.items():
        layer = theirs.base_model.model.get_submodule(path)
        pairs += [(operator.d, layer.vera_lambda_d["default"]), (operator.b, layer.vera_lambda_b["default"])]
    for mine, other in pairs:
        other.data.copy_(nn.init.normal_(mine.data, std=0.3))

    monkeypatch.setattr(projections._Project, "forward", project := Mock(wraps=projections._Project.forward))
    outputs = [model.train()(input_ids=ids, labels=ids) for model in (ours, theirs)]
    # once for q, k, v; o; gate and up; down: but what the first block gets nothing has computed, so q, k, v each do it
    assert project.call_count == (3 + 3) + 4
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-5, rtol=1e-4)
    for output in outputs:
        output.loss.backward()
    for mine, other in pairs:
        assert (mine.grad - other.grad).norm() <= 1e-4 * other.grad.norm()
