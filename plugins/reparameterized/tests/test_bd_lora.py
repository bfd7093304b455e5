"""BD-LoRA beside peft's and beside its equation, block by block."""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, adapted, assert_equation, logical
from peft_pairs import ADAPTER, Both, Pair
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
RANK, ALPHA = 6, 9.0
OPTIONS: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}


@conformance("bd_lora", options={"*": {"rank": 6, "alpha": 12.0}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def equation(n: int, cut_inputs: bool) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    def of_blocks(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        A, B = tensors["A"].flatten(1), tensors["B"]
        each = RANK // n
        if cut_inputs:  # columns of the weight that A_i sees, channel by channel
            kernel = weight[0, 0].numel()
            width = weight.shape[1] // n * kernel
            parts = [B[:, i * each : (i + 1) * each] @ A[i * each : (i + 1) * each, :width] for i in range(n)]
            update = torch.cat(parts, 1)
        else:
            rows = B.split(B.shape[0] // n)
            update = torch.cat([rows[i] @ A[i * each : (i + 1) * each] for i in range(n)])
        return weight + ALPHA / RANK * update.view(weight.shape)

    return of_blocks


WIDTHS = {kind: logical(kind, adapted(kind, "bd_lora", **OPTIONS, blocks=1)[0]).shape for kind in KINDS}
"""The weight [out, in, ...] of each layer."""


@pytest.mark.parametrize("cut_inputs", [True, False], ids=["A", "B"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str, blocks: int, cut_inputs: bool) -> None:
    shape = WIDTHS[kind]
    width = shape[-1 if kind == "experts" else 1] if cut_inputs else shape[-2 if kind == "experts" else 0]
    if width % blocks or (kind == "embedding" and cut_inputs and blocks > 1):
        with pytest.raises(UnsupportedSite, match=r"does not divide|tokens cannot be split"):
            adapted(kind, "bd_lora", **OPTIONS, blocks=blocks, cut_inputs=["*"] * cut_inputs)
    else:
        wanted = equation(blocks, cut_inputs)
        assert_equation(kind, "bd_lora", wanted, **OPTIONS, blocks=blocks, cut_inputs=["*"] * cut_inputs)


def test_start() -> None:
    """Nothing; the blocks of A are larger than a whole A."""
    _, _, operator = adapted("wide", "bd_lora", rank=48, blocks=2, cut_inputs=["*"])
    inputs = 2 * operator.A.shape[1]
    bound = (6 * 2 / inputs) ** 0.5
    assert 0.9 * bound < operator.A.abs().max() <= bound
    assert not operator.B.any()
    _, _, whole = adapted("wide", "bd_lora", rank=48, blocks=1, cut_inputs=["*"])
    assert whole.A.abs().max() <= inputs**-0.5


def test_roles_decide() -> None:
    """What a server shards by inputs has blocks in A, all else in B; each device has its share of both."""
    model, _ = HOSTS["llama"].build()
    injection = peftcore.apply(model, "bd_lora", rank=4, blocks=2)
    cut = {path.rsplit(".")[-1]: operator.cut_A for path, operator in injection.operators.items()}
    assert cut == {name: name in ("o_proj", "down_proj") for name in cut} and len(cut) == 7
    for graft in injection.grafts:
        site, operator = graft.site, graft.operator
        assert operator.A.shape == (4, site.in_features // (2 if operator.cut_A else 1))
        assert operator.B.shape == (site.out_features, 4 if operator.cut_A else 2)


def test_blocks_divide_the_rank() -> None:
    with pytest.raises(ConfigError, match="rank=6 is not a multiple of blocks=4"):
        adapted("linear", "bd_lora", **OPTIONS, blocks=4)


class Two(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 6), nn.Linear(6, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(f"{site.path}.A", operator.A, layer.lora_A[ADAPTER].weight, lambda t: t)
    yield Pair(f"{site.path}.B", operator.B, layer.lora_B[ADAPTER].weight, lambda t: t)


def both(base: nn.Module, target: list[str], blocks: int, down: list[str], rs: bool = False) -> Both:
    cut = peft.tuners.lora.BdLoraConfig(
        target_modules_bd_a=down, target_modules_bd_b=[name for name in target if name not in down], nblocks=blocks
    )
    config = peft.LoraConfig(r=RANK, lora_alpha=9, target_modules=target, use_bdlora=cut, use_rslora=rs)
    ours = {"target": target, **OPTIONS, "blocks": blocks, "cut_inputs": [f"*{name}" for name in down]}
    ours |= {"scaling": "sqrt_rank"} if rs else {}
    return Both(base, "bd_lora", ours | {"dtype": str(next(base.parameters()).dtype)[6:]}, config, pairs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("blocks", "rs"), [(2, False), (3, True), (1, False)])
@against("peft 0.21", "bd_lora")
def test_beside_peft(blocks: int, rs: bool, training: bool) -> None:
    """Outputs, gradients, merged weights, and as many parameters."""
    torch.manual_seed(0)
    compared = both(Two().double().train(training), ["up", "down"], blocks, ["down"], rs)
    count = sum(p.numel() for p in compared.tuner.model.parameters() if p.requires_grad)
    assert count == RANK * (12 + 6 // blocks + 6 // blocks + 9)
    assert count == sum(p.numel() for p in compared.injection.parameters())
    x = torch.randn(2, 3, 12).double()
    compared.assert_same(lambda model: model(x))


@against("peft 0.21", "bd_lora")
def test_a_model_beside_peft() -> None:
    model, inputs = HOSTS["llama"].build()
    target = ["q_proj", "v_proj", "o_proj", "down_proj"]
    both(model.eval(), target, 2, ["o_proj", "down_proj"]).assert_same(lambda adapted: adapted(**inputs).logits)


def test_dropout_drops_inputs() -> None:
    host, _, operator = adapted("wide", "bd_lora", rank=4, dropout=0.5, blocks=1)
    nn.init.normal_(operator.B)
    x = torch.randn(3, operator.A.shape[1]).double()
    assert not torch.equal(host.train()(x), host(x))
    assert torch.equal(host.eval()(x), host(x))
