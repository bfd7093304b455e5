"""Dropout of methods that change weights: with peft's numbers for the same draws, in training only, never in what is
merged, the same when a forward is repeated, and refused where it cannot act."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from one_layer import One
from peft.tuners.oft.layer import OFTRotationModule
from peft_pairs import ADAPTER, GRADIENTS, MOVED, OUTPUTS, PAIRINGS, Both, Pair, difference
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore.errors import TrainingError, UnsupportedSite
from peftcore.layers import kernels
from peftcore_reparameterized._dropped import ChangeDropout, replaced_blocks

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
SEEDS = range(6)
LINEAR = (lambda: nn.Linear(12, 8), (2, 3, 12))
CONV = (lambda: nn.Conv2d(4, 8, 3, padding=1), (2, 4, 5, 5))


@pytest.fixture(autouse=True)
def masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks that torch's own dropout draws, in the same order."""
    for module in (kernels.fused_dropout, kernels.low_rank):
        monkeypatch.setattr(module, "dropout_mask", lambda x, p: (F.dropout(torch.ones_like(x), p) > 0, 1 / (1 - p)))


def named(*names: tuple[str, str]) -> Any:
    """Pairs of tensors by their names in both."""

    def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
        layer: Any = theirs.get_submodule(site.module_path)
        for ours, other in names:
            held = getattr(layer, other)[ADAPTER]
            shape = operator.get_parameter(ours).shape
            held = held.weight if isinstance(held, nn.Module) else held
            yield Pair(f"{site.path}.{ours}", operator.get_parameter(ours), held, lambda t, shape=shape: t.view(shape))

    return pairs


LORA = named(("A", "lora_A"), ("B", "lora_B"))
LOHA = named(("A1", "hada_w1_b"), ("B1", "hada_w1_a"), ("A2", "hada_w2_b"), ("B2", "hada_w2_a"))
LOKR = named(("w1", "lokr_w1"), ("w2a", "lokr_w2_a"), ("w2b", "lokr_w2_b"))
FULL = named(("w1", "lokr_w1"), ("w2", "lokr_w2"))
DROPS = {"rank_dropout": 0.4, "module_dropout": 0.3}
T = {"target": "layer"}


def lora(**options: Any) -> peft.PeftConfig:
    return peft.LoraConfig(target_modules=["layer"], r=3, lora_alpha=5, lora_dropout=0.4, **options)


CASES: dict[str, tuple[Any, str, dict[str, Any], peft.PeftConfig, Any]] = {
    "dora": (LINEAR, "dora", {"rank": 3, "alpha": 5.0, "dropout": 0.4}, lora(use_dora=True), PAIRINGS["dora"]),
    "dora-conv": (CONV, "dora", {"rank": 3, "alpha": 5.0, "dropout": 0.4}, lora(use_dora=True), PAIRINGS["dora"]),
    "pissa": (LINEAR, "pissa", {"rank": 3, "alpha": 5.0, "dropout": 0.4}, lora(init_lora_weights="pissa"), LORA),
    "olora": (LINEAR, "olora", {"rank": 3, "alpha": 5.0, "dropout": 0.4}, lora(init_lora_weights="olora"), LORA),
    "hira": (
        LINEAR, "hira", {"rank": 3, "dropout": 0.4},
        peft.HiraConfig(target_modules=["layer"], r=3, hira_dropout=0.4), named(("A", "hira_A"), ("B", "hira_B")),
    ),
    "hira-conv": (
        CONV, "hira", {"rank": 3, "dropout": 0.4},
        peft.HiraConfig(target_modules=["layer"], r=3, hira_dropout=0.4), named(("A", "hira_A"), ("B", "hira_B")),
    ),
    "loha": (
        LINEAR, "loha", {"rank": 3, "alpha": 6.0, "rank_dropout_scale": True, **DROPS},
        peft.LoHaConfig(target_modules=["layer"], r=3, alpha=6, **DROPS), LOHA,
    ),
    "loha-conv": (
        CONV, "loha", {"rank": 3, "alpha": 6.0, "rank_dropout_scale": True, **DROPS},
        peft.LoHaConfig(target_modules=["layer"], r=3, alpha=6, **DROPS), LOHA,
    ),
    "loha-wide": (
        (lambda: nn.Linear(40, 48), (2, 3, 40)), "loha",
        {"rank": 2, "alpha": 6.0, "rank_dropout_scale": True, **DROPS},
        peft.LoHaConfig(target_modules=["layer"], r=2, alpha=6, **DROPS), LOHA,
    ),
    "lokr": (
        LINEAR, "lokr", {"rank": 1, "alpha": 6.0, "factor": 2, "factor_first": True, **DROPS},
        peft.LoKrConfig(target_modules=["layer"], r=1, alpha=6, decompose_factor=2, **DROPS), LOKR,
    ),
    "lokr-scaled": (
        LINEAR, "lokr",
        {"rank": 1, "alpha": 6.0, "factor": 2, "factor_first": True, "rank_dropout_scale": True, **DROPS},
        peft.LoKrConfig(target_modules=["layer"], r=1, alpha=6, decompose_factor=2, rank_dropout_scale=True, **DROPS),
        LOKR,
    ),
    "lokr-conv": (
        CONV, "lokr", {"rank": 1, "alpha": 6.0, "factor": 2, "factor_first": True, **DROPS},
        peft.LoKrConfig(target_modules=["layer"], r=1, alpha=6, decompose_factor=2, **DROPS), LOKR,
    ),
    "oft": (
        LINEAR, "oft", {"block_size": 3, "block_dropout": 0.5},
        peft.OFTConfig(target_modules=["layer"], r=0, oft_block_size=3, use_cayley_neumann=False, module_dropout=0.5),
        named(("K", "oft_R")),
    ),
    "oft-shared": (
        LINEAR, "oft", {"block_size": 3, "block_dropout": 0.5, "block_share": True},
        peft.OFTConfig(target_modules=["layer"], r=0, oft_block_size=3, use_cayley_neumann=False, module_dropout=0.5,
                       block_share=True),
        named(("K", "oft_R")),
    ),
}  # fmt: skip


@pytest.fixture
def peft_drops_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peft 0.21 makes the dropout of OFT's blocks and never calls it. Here it is called."""
    turned = OFTRotationModule._cayley_batch

    def dropped(self: Any, *args: Any) -> Tensor:
        R = turned(self, *args)
        return R if self.drop is None else self.drop(R)

    monkeypatch.setattr(OFTRotationModule, "drop", None, raising=False)
    monkeypatch.setattr(OFTRotationModule, "_cayley_batch", dropped)


@pytest.mark.parametrize("case", CASES)
def test_training_beside_peft(case: str, peft_drops_blocks: None) -> None:
    """The same draws, outputs and gradients, over several passes: with parts dropped and without."""
    (build, shape), method, options, config, pairing = CASES[case]
    x = torch.randn(shape)
    both = Both(One(build()).train(), method, {**T, **options}, config, pairing)
    if method == "oft":
        layer: Any = both.tuner.model.layer
        vars(layer.oft_R[ADAPTER])["drop"] = layer.oft_dropout[ADAPTER]
    if method in ("loha", "lokr"):
        for pair in both.pairs:  # products of four small numbers would hardly move the output
            both.change(pair.name, lambda t: t.mul_(5))
    base = both.base(x)
    outputs = []
    for seed in SEEDS:
        results = []
        for model in (both.ours, both.tuner.model):
            model.zero_grad()
            torch.manual_seed(seed)
            output = model(x)
            if output.requires_grad:  # peft leaves a module out that is dropped
                (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
            results.append(output.detach())
        ours, theirs = results
        assert difference(ours, theirs) <= OUTPUTS
        for pair in both.pairs:
            expected = torch.zeros_like(pair.theirs) if pair.theirs.grad is None else pair.theirs.grad
            assert difference(pair.ours.grad, pair.seen(expected)) <= GRADIENTS, pair.name
        outputs.append(ours)
    assert any(difference(each, base) > MOVED for each in outputs)
    assert case == "oft-shared" or any(difference(each, outputs[0]) > MOVED for each in outputs[1:])
    both.base.eval(), both.ours.eval(), both.tuner.eval()
    both.assert_same_outputs(lambda model: model(x))
    if method not in ("pissa", "olora"):
        both.ours.train()  # what is merged is whole
        both.assert_same_merged()


def test_boft_beside_the_authors_layer() -> None:
    """Blocks of one factor, chosen anew in each forward. Peft makes one factor where its kernel is not compiled, so its
    dropout is called by hand."""
    from peft.tuners.boft.layer import MultiplicativeDropoutLayer

    model = One(nn.Linear(16, 8)).train()
    options = {"block_size": 4, "factors": 2, "block_dropout": 0.5}
    operator: Any = peftcore.apply(model, "boft", target="layer", **options).operators["layer"]
    nn.init.normal_(operator.K)
    layer = MultiplicativeDropoutLayer(0.5).train()
    changed = set()
    for seed in SEEDS:
        torch.manual_seed(seed)
        ours = operator.dropped()
        torch.manual_seed(seed)
        assert torch.equal(ours, layer(operator.rotations()))
        changed.add(tuple((ours != operator.rotations()).flatten(2).any(-1).flatten().tolist()))
        assert (ours == torch.eye(4)).flatten(2).all(-1).sum() == 2
    assert len(changed) > 2
    operator.eval()
    assert torch.equal(operator.dropped(), operator.rotations())
    x = torch.randn(3, 16)
    expected = model.eval()(x)
    model.train()
    assert difference(model(x).detach(), expected.detach()) > MOVED
    peftcore.injections(model)["boft"].merge()
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", ["uniform", "sparse"])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)], ids=["narrow", "wide"])
def test_randlora_beside_peft(shape: tuple[int, int], kind: str, tmp_path: Path) -> None:
    """Whose bases come with its file."""
    base, x = nn.Sequential(nn.Linear(*shape)), torch.randn(2, 3, shape[0])
    config = peft.RandLoraConfig(target_modules=["0"], r=3, randlora_dropout=0.4, sparse=kind == "sparse")
    theirs = peft.get_peft_model(deepcopy(base), config).train()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "randlora_" in name:
                parameter.normal_(0, 0.1)
    theirs.save_pretrained(str(tmp_path))
    ours = deepcopy(base)
    injection = peftcore.load(ours.train(), tmp_path, trainable=True)
    (operator,) = injection.operators.values()
    layer: Any = theirs.base_model.model[0]
    for seed in SEEDS:
        results = []
        for model in (ours, theirs):
            model.zero_grad()
            torch.manual_seed(seed)
            output = model(x)
            (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
            results.append(output.detach())
        assert difference(*results) <= OUTPUTS
        for mine, other in (("L", layer.randlora_lambda), ("G", layer.randlora_gamma)):
            assert difference(operator.get_parameter(mine).grad, other[ADAPTER].grad) <= GRADIENTS
    assert difference(ours(x).detach(), ours.eval()(x).detach()) > MOVED


@pytest.mark.parametrize("rescale", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_training_beside_lycoris(kind: str, rescale: bool) -> None:
    base, x = nn.Linear(12, 8), torch.randn(2, 3, 12)
    model = One(deepcopy(base)).train()
    options = {"rank_dropout": 0.4, "rank_dropout_scale": rescale}
    extra = {"factor": 2} if kind == "lokr" else {}
    injection = peftcore.apply(model, kind, target="layer", rank=1, alpha=6.0, **extra, **options)
    cls = {"loha": LohaModule, "lokr": LokrModule}[kind]
    theirs = cls("", base, lora_dim=1, alpha=6.0, **extra, **options).train()
    names = {"A1": "hada_w1_b", "B1": "hada_w1_a", "A2": "hada_w2_b", "B2": "hada_w2_a", "w1": "lokr_w1",
             "w2a": "lokr_w2_a", "w2b": "lokr_w2_b"}  # fmt: skip
    for name, parameter in injection.operators["layer"].named_parameters():
        getattr(theirs, names[name]).data.copy_(nn.init.normal_(parameter))
    for seed in SEEDS:
        results = []
        for each in (model, theirs):
            torch.manual_seed(seed)
            results.append(each(x).detach())
        assert difference(*results) <= OUTPUTS
    assert difference(results[0], model.eval()(x).detach()) > MOVED


RANDOM: dict[str, dict[str, Any]] = {
    "dora": {"dropout": 0.5, "rank": 2},
    "pissa": {"dropout": 0.5, "rank": 2},
    "olora": {"dropout": 0.5, "rank": 2},
    "hira": {"dropout": 0.5, "rank": 2},
    "randlora": {"dropout": 0.5, "rank": 4},
    "frod": {"dropout": 0.5, "sparsity": 0.1},
    "loha": {"rank_dropout": 0.5, "rank": 2},
    "lokr": {"rank_dropout": 0.5, "rank": 2},
    "oft": {"block_dropout": 0.5, "block_size": 4},
    "boft": {"block_dropout": 0.5, "block_size": 4},
}


def adapted(method: str, layer: nn.Module, **options: Any) -> tuple[nn.Module, peftcore.Injection]:
    model = One(layer)
    injection = peftcore.apply(model, method, target="layer", **{**RANDOM[method], **options})
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter) / 3)
    return model, injection


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 8), (2, 3, 16)),
    "conv": (lambda: nn.Conv2d(4, 8, 2), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", RANDOM)
def test_in_training_only_and_never_in_what_is_merged(method: str, layer: str) -> None:
    build, shape = LAYERS[layer]
    model, injection = adapted(method, build())
    x = torch.randn(shape)
    whole = model.eval()(x).detach()
    model.train()
    first, second = model(x).detach(), model(x).detach()
    assert difference(second, first) > MOVED
    injection.merge()
    torch.testing.assert_close(model(x), whole, atol=1e-4, rtol=1e-4)
    injection.unmerge()
    torch.testing.assert_close(model.eval()(x), whole)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", RANDOM)
def test_what_is_repeated_drops_the_same(method: str, layer: str, reentrant: bool) -> None:
    """In a checkpoint around the model, and in the core's own around effective weights."""
    build, shape = LAYERS[layer]
    model, injection = adapted(method, build())
    model.train()
    x = torch.randn(shape, requires_grad=True)
    gradients = []
    for again in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        output = checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
        torch.manual_seed(99)
        output.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in injection.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("method", RANDOM)
def test_gradients_are_those_of_what_was_computed(method: str) -> None:
    """By finite differences, with the same draws."""
    torch.manual_seed(0)
    model, injection = adapted(method, nn.Linear(8, 8).double(), dtype="float64")
    model.double().train()
    x = torch.randn(3, 8, dtype=torch.float64)

    def loss() -> Tensor:
        torch.manual_seed(5)
        return model(x).square().sum()

    loss().backward()
    for parameter in injection.parameters():
        direction = torch.randn_like(parameter)
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(loss())
                parameter.add_(direction, alpha=-step)
        slope = (values[0] - values[1]) / 2e-6
        if method == "dora" and parameter is not injection.operators["layer"].magnitude:
            continue  # its norm counts as a constant
        torch.testing.assert_close((parameter.grad * direction).sum(), slope, rtol=1e-4, atol=1e-6)


INPUTS = ("dora", "hira", "randlora")


@pytest.mark.parametrize("method", INPUTS)
def test_where_there_is_no_input_it_is_refused(method: str) -> None:
    """Where a tensor is read, where tokens go in, and where the effective weight is computed."""
    for layer in (nn.Embedding(9, 8), nn.MultiheadAttention(8, 2)):
        target = "layer" if isinstance(layer, nn.Embedding) else "attn.q"
        with pytest.raises(UnsupportedSite, match="dropout"):
            peftcore.apply(One(layer), method, target=target, **RANDOM[method])
    model, injection = adapted(method, nn.Linear(16, 8))
    x = torch.randn(3, 16)
    injection.low_memory = True
    model.train()
    with pytest.raises(TrainingError, match="low_memory, or with dropout=0"):
        model(x)
    model.eval()(x)
    injection.low_memory = False
    model.train()(x)
    peftcore.apply(model, method, target="layer", name="other", **{**RANDOM[method], "dropout": 0.0})
    with pytest.raises(TrainingError, match="several adapters change one weight"):
        model(x)
    model.eval()(x)


def test_shares() -> None:
    like = torch.zeros(())
    torch.manual_seed(0)
    assert ChangeDropout() == ChangeDropout(0.0, 0.0)
    assert not ChangeDropout()
    drawn = torch.stack([ChangeDropout(0.3, rescales=True).shares((50,), like) for _ in range(200)])
    torch.testing.assert_close(drawn.mean(-1), torch.ones(200))
    drawn = torch.stack([ChangeDropout(0.3).shares((2, 50), like) for _ in range(200)])
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert abs(drawn.mean() - 0.7) < 0.02
    drawn = torch.stack([ChangeDropout(whole=0.3).shares((50,), like) for _ in range(500)])
    assert (drawn == drawn[:, :1]).all()
    assert abs(drawn.mean() - 0.7) < 0.06
    assert torch.isfinite(ChangeDropout(0.999, rescales=True).shares((3,), like)).all()
    assert replaced_blocks(0.5, 7, torch.device("cpu")).sum() == 3
