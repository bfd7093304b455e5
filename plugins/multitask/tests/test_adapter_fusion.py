"""AdapterFusion: the kit; numbers of the adapters package, three adapters in a `Fuse`, over adapters of the host and as
parts; the equation where that cannot go."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_package import assert_same, waves
from adapters_package import host as package_host
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftcore
from peftcore import Fuse, Injection, Stack
from peftcore.errors import CompositionError, ConfigError, TargetError, UnknownInjection, UnsupportedSite
from peftcore.testing import against, conformance, frozen
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "adapter_fusion.json"
PART = {"method": "pfeiffer_adapter", "bottleneck": 4}
LARGE = {"method": "pfeiffer_adapter", "placement": "branch", "init_std": 0.5, "up_init_std": 0.5}


@conformance(
    "adapter_fusion",
    options={
        "unet": {"parts": [LARGE] * 2}
    },  # what the default ones add there is too little for dropped scores to show
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def own(injection: Injection) -> list[list[nn.Parameter]]:
    """Q, q, K and V of each module."""
    return [
        [p for p in (each.query, each.bias, each.key, each.value) if p is not None]
        for each in injection.operators.values()
    ]


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("over", ["adapters", "parts"])
@pytest.mark.parametrize("name", ["llama", "bert"])
@against(
    "adapters 1.3",
    "adapter_fusion",
    repository="adapter-hub/adapters",
    commit="88f18eb",
    script="src/adapters/methods/modeling.py",
)
def test_the_numbers_of_the_adapters_package(name: str, over: str, value: bool) -> None:
    """With V and without, and the first adapter trains. In a BERT inputs of norms are mixed. The package's K has a bias
    too: no number depends on it."""
    model, numbers = package_host(name), frozen(NUMBERS)[name]["dynamic" if value else "static"]
    if over == "parts":
        options = {"parts": [PART] * 3, "train_parts": False, "value": value}
        fusion = peftcore.apply(model, "adapter_fusion", dtype="float64", **options)
        adapters = list(fusion.parts.values())
    else:
        adapters = [peftcore.apply(model, **PART, name=each, dtype="float64") for each in "abc"]
        options = {"adapters": ["a", "b", "c"], "value": value, "dtype": "float64"}
        fusion = peftcore.apply(model, "adapter_fusion", name="by", **options)
        for adapter in adapters:
            adapter.trainable(False)
        peftcore.activate(model, Fuse("c", "a", "b", by="by"))
    for k, adapter in enumerate(adapters):
        waves(adapter.parameters(), 0.2 + k)
    for layer, tensors in enumerate(own(fusion)):
        waves(tensors, 0.7 + layer, 0.31)
    trained = [p for tensors in own(fusion) for p in tensors] + [p.requires_grad_() for p in adapters[0].parameters()]
    assert {each.mixes_inputs for each in fusion.operators.values()} == {name == "bert"}
    assert_same(model, package_host(name), trained, numbers)
    assert {p for p in model.parameters() if p.grad is not None} == {*trained}
    loss, penalty = fusion.method.aux_loss(fusion), numbers["penalty"]
    assert (loss if loss is None else loss.item()) == (penalty if penalty is None else pytest.approx(penalty))


class Layers(nn.Module):
    """A convolution, and a matrix on its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 5, 2), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).tanh().flatten(2).mT)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Layers().double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 5, 5, dtype=torch.float64)


def apply(model: nn.Module, method: str, name: str, seed: int = 1, **options: Any) -> Injection:
    injection = peftcore.apply(model, method, name=name, dtype="float64", **options)
    fill(injection, seed)
    return injection


def equation(h: Tensor, outputs: list[Tensor], fusion: Any, drop: float = 0.0) -> Tensor:
    """As the authors compute it: keys and values of every adapter; features last."""
    z = torch.stack([y - h for y in outputs], -2)
    scores = torch.einsum("...d,...td->...t", h @ fusion.query.T + fusion.bias, z @ fusion.key.T)
    shares = nn.functional.dropout(scores, drop).softmax(-1)
    return h + torch.einsum("...t,...td->...d", shares, z @ fusion.value.T)


def test_over_any_methods_at_any_layers(model: Any, x: Tensor) -> None:
    for seed, (name, method) in enumerate({"a": "lora", "b": "ia3", "c": "dora"}.items()):
        apply(model, method, name, seed, target=["conv", "head"])
    fusions = apply(model, "adapter_fusion", "by", adapters=["a", "c"]).operators
    assert list(fusions) == ["conv", "head"]

    def alone(module: nn.Module, inputs: Tensor, *names: str) -> Tensor:
        with peftcore.activate(model, *([Stack(*names)] if names else [])):
            output = module(inputs)
        return output.movedim(1, -1) if module is model.conv else output

    def fused(name: str, inputs: Tensor, *behind: str) -> Tensor:
        module = model.get_submodule(name)
        outputs = [alone(module, inputs, each, *behind) for each in "ac"]
        return equation(alone(module, inputs, *behind), outputs, fusions[name])

    with peftcore.activate(model):
        base = model(x)
    with peftcore.activate(model, "by"):
        assert torch.equal(model(x), base)
    for composition, behind in ((Fuse("a", "c", by="by"), ()), (Stack(Fuse("a", "c", by="by"), "b"), ("b",))):
        expected = fused("head", fused("conv", x, *behind).flatten(1, 2).tanh(), *behind)
        with peftcore.activate(model, composition):
            torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        assert (expected - base).abs().max() > 1e-3


def test_over_rows_and_hybrids_as_parts() -> None:
    """The queries of a fused projection; the second part is two methods, one after the other."""
    host, _ = HOSTS["gpt2"].build()
    host = host.double().eval()
    union = {"method": "config_union", "parts": [{"method": "lora"}, {"method": "ia3"}]}
    fusion = apply(host, "adapter_fusion", "fusion", parts=[{"method": "lora"}, union], target="attn.q")
    operator: Any = next(iter(fusion.operators.values()))
    site, inputs = fusion.sites[0], torch.randn(2, 3, 16, dtype=torch.float64)
    (one,), (two, gain) = operator.parts
    with torch.no_grad():
        got = site.module(inputs)
        with fusion.disabled():
            base = site.module(inputs)
        h = base[..., :16]
        first, second = (h + each.scale * inputs @ each.A.T @ each.B.T for each in (one, two))
        expected = equation(h, [first, second * gain.gain], operator)
    torch.testing.assert_close(got[..., :16], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(got[..., 16:], base[..., 16:])
    assert (expected - h).abs().max() > 1e-3


def test_over_adapters_of_rows() -> None:
    """A module has one output, so it has one fusion, of all its rows."""
    host, _ = HOSTS["gpt2"].build()
    for name, target in (("a", "attn.q"), ("b", ["attn.q", "attn.v"])):
        apply(host.double().eval(), "lora", name, ord(name), target=target)
    fusion = apply(host, "adapter_fusion", "by", adapters=["a", "b"])
    assert list(fusion.operators) == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    module, inputs = fusion.sites[0].module, torch.randn(2, 3, 16, dtype=torch.float64)
    outputs = []
    for names in ((), ("a",), ("b",), (Fuse("a", "b", by="by"),)):
        with peftcore.activate(host, *names):
            outputs.append(module(inputs))
    h, *each, got = outputs
    torch.testing.assert_close(got, equation(h, each, fusion.operators[fusion.sites[0].path]), rtol=1e-12, atol=1e-12)
    assert (got - h).abs().max() > 1e-3


def test_parts_are_what_adapters_are_behind_a_norm_too() -> None:
    """Adapters that stand beside what they are named for, in a host that normalizes behind its blocks."""
    outputs = []
    for over in ("parts", "adapters"):
        torch.manual_seed(0)
        host, inputs = HOSTS["bert"].build()
        if over == "parts":
            fusion = apply(host.double().eval(), "adapter_fusion", "by", parts=[PART] * 2)
            adapters = list(fusion.parts.values())
        else:
            adapters = [apply(host.double().eval(), **PART, name=name) for name in "ab"]
            fusion = apply(host, "adapter_fusion", "by", adapters=["a", "b"])
            peftcore.activate(host, Fuse("a", "b", by="by"))
        for index, adapter in enumerate(adapters):
            waves(adapter.parameters(), 0.2 + index)
        assert [site.form for site in fusion.grafts[0].holders] == ["activation", "stream"]
        with torch.no_grad():
            outputs.append(host(**inputs).logits)
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)


def test_the_start() -> None:
    host = nn.Sequential(nn.Linear(300, 300)).double()
    parts = [{"method": "houlsby_adapter", "train_layer_norm": False, "up_init_std": 0.1}] * 3
    injection = peftcore.apply(host, "adapter_fusion", target="0", parts=parts, train_parts=False, dtype="float64")
    operator: Any = injection.operators["0"]
    assert operator.query.std().item() == pytest.approx(0.02, rel=0.02)
    assert operator.key.std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(operator.value, torch.full((300, 300), 1e-6).fill_diagonal_(1.0).double())
    trains = {name for name, p in operator.named_parameters() if p.requires_grad}
    assert trains == {"query", "bias", "key", "value"}
    h = torch.randn(4, 300, dtype=torch.float64)
    outputs = [h + 0.05 * z for z in torch.randn(3, 4, 300, dtype=torch.float64)]
    torch.testing.assert_close(operator.combine(outputs, h), torch.stack(outputs).mean(0), rtol=0, atol=0.02)
    both = peftcore.apply(host, "adapter_fusion", name="both", target="0", parts=parts)
    assert all(p.requires_grad for p in both.parameters())


def test_scores_are_dropped_in_training_only(model: Any) -> None:
    apply(model, "lora", "a", target="head")
    operator: Any = apply(model, "adapter_fusion", "by", adapters=["a"], dropout=0.5).operators["head"]
    h, *outputs = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    for training, drop in ((True, 0.5), (False, 0.0)):
        operator.train(training)
        torch.manual_seed(3)
        got = operator.combine(outputs, h)
        torch.manual_seed(3)
        torch.testing.assert_close(got, equation(h, outputs, operator, drop), rtol=1e-12, atol=1e-12)


def test_saved_with_its_adapters(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    for name in "ab":
        apply(model, "lora", name, ord(name), target=["conv", "head"])
    assert list(apply(model, "adapter_fusion", "by", adapters=["b", "a"], exclude="conv").operators) == ["head"]
    fuse = Fuse("a", "b", by="by")
    peftcore.save_composition(model, fuse, tmp_path)
    with peftcore.activate(model, fuse):
        expected = model(x)
    for injection in list(peftcore.injections(model).values()):
        injection.remove()
    with pytest.raises(UnknownInjection, match="'b'"):
        peftcore.load(model, tmp_path / "by")
    assert peftcore.load_composition(model, tmp_path) == fuse
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)  # what trains is rounded otherwise


def test_what_cannot_be_fused_is_refused(model: nn.Module) -> None:
    def refused(error: type[Exception], match: str, host: nn.Module = model, **options: Any) -> None:
        with pytest.raises(error, match=match):
            peftcore.apply(host, "adapter_fusion", **options)

    refused(UnknownInjection, "'zzz'", adapters=["zzz"])
    refused(ConfigError, "at least 1", adapters=[])
    refused(ConfigError, "adalora cannot be a part", parts=[{"method": "adalora"}], target="head")
    refused(UnsupportedSite, "dora acts on a tensor", parts=[{"method": "dora"}], target="head")
    llama, _ = HOSTS["llama"].build()
    refused(UnsupportedSite, "different modules", llama, parts=[PART, {**PART, "placement": "branch"}])
    peftcore.apply(llama, "prefix_tuning")
    refused(CompositionError, "prefix_tuning", llama, adapters=["prefix_tuning"])
    attention = nn.TransformerEncoderLayer(8, 2, 16)
    peftcore.apply(attention, "lora")
    refused(UnsupportedSite, "in_proj_weight is a tensor that is read", attention, adapters=["lora"])
    peftcore.apply(model, "bitfit")
    refused(TargetError, "nothing", adapters=["bitfit"])
    assert list(peftcore.injections(model)) == ["bitfit"]


def bert(*parts: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    host = package_host("bert").eval()
    fusion = apply(host, "adapter_fusion", "by", parts=list(parts), **options)
    return host, fusion


@torch.no_grad()
def test_what_is_mixed_in_front_of_a_norm_and_behind_it() -> None:
    """The norm of a block by hand, from what it is given."""
    for mixes in ("auto", "inputs", "outputs"):
        host, fusion = bert(PART, PART, mixes=mixes)
        operator, block = next(iter(fusion.operators.values())), host.encoder.layer[0].output
        (one,), (two,) = operator.parts
        h, x = torch.randn(2, 3, 12, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
        s, norm = block.dense(h) + x, block.LayerNorm
        with fusion.disabled():
            u = norm(s)
            given = [s + each.added(u) for each in (one, two)]
            outputs = [norm(each) for each in given]
        expected = equation(u, outputs, operator)
        if mixes != "outputs":
            shares = ((u @ operator.query.T + operator.bias) @ operator.key)[..., None, :]
            z = torch.stack(given, -2) - s[..., None, :]
            z = ((shares * z).sum(-1).softmax(-1)[..., None] * z).sum(-2) @ operator.value.T
            with fusion.disabled():
                expected = norm(s + z)
        torch.testing.assert_close(block(h, x), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_inputs_are_mixed_only_where_adapters_give_a_module_nothing_else() -> None:
    branch = {**PART, "placement": "branch"}
    _, fusion = bert(branch, branch)
    assert not any(each.mixes_inputs for each in fusion.operators.values())
    host = package_host("bert")
    with pytest.raises(UnsupportedSite, match='mixes="outputs" to fuse what modules return'):
        peftcore.apply(host, "adapter_fusion", parts=[branch] * 2, mixes="inputs")
    assert not peftcore.injections(host)
    last = "encoder.layer.1.output.LayerNorm"
    peftcore.apply(host, **PART, name="a", train=[last])
    peftcore.apply(host, **PART, name="b")
    fusion = peftcore.apply(host, "adapter_fusion", name="by", adapters=["a", "b"])
    assert [each.mixes_inputs for each in fusion.operators.values()] == [True, False]
    peftcore.activate(host, Fuse("a", "b", by="by"))
    peftcore.apply(host, **PART, name="c", train=["encoder.layer.0.output.LayerNorm"])
    with pytest.raises(CompositionError, match="'c' changes more than the input there"):
        peftcore.activate(host, Fuse("a", "c", by="by"))


@torch.no_grad()
def test_rows_of_a_route_have_fusions_of_their_own() -> None:
    host, _ = bert(PART, PART)
    apply(host, "adapter_fusion", "other", 2, parts=[PART] * 3, value=False)
    apply(host, "lora", "lora", 3)
    ids, names = torch.tensor([[1, 5, 3, 9], [4, 4, 10, 7], [2, 3, 1, 1], [8, 2, 2, 5]]), ["by", "other", None, "lora"]
    with peftcore.route(host, names):
        routed = host(input_ids=ids).last_hidden_state
    for row, name in enumerate(names):
        with peftcore.activate(host, *([name] if name else [])):
            alone = host(input_ids=ids).last_hidden_state[row]
        torch.testing.assert_close(routed[row], alone, rtol=1e-11, atol=1e-11)
    assert (routed[0] - routed[1]).abs().max() > 1e-3


@torch.no_grad()
def test_files_of_before_mix_outputs(tmp_path: Path) -> None:
    ids = torch.tensor([[1, 5, 3, 9]])
    for mixes in ("outputs", "auto"):
        host, fusion = bert(PART, PART, mixes=mixes)
        expected = host(input_ids=ids).last_hidden_state
        fusion.save(tmp_path / mixes)
        file = tmp_path / mixes / "adapter.safetensors"
        with safe_open(file, "pt") as opened:
            header = json.loads(opened.metadata()["peftcore"])
        assert header["config"]["mixes"] == mixes
        del header["config"]["mixes"]
        save_file(load_file(file), file, {"peftcore": json.dumps({**header, "config_version": 1})})
        again = package_host("bert").eval()
        assert peftcore.load(again, tmp_path / mixes).config.mixes == "outputs"
        assert torch.equal(again(input_ids=ids).last_hidden_state, expected) == (mixes == "outputs")


@pytest.mark.slow
@torch.no_grad()
def test_compiled() -> None:
    ids, host = torch.tensor([[1, 5, 3, 9]]), package_host("bert").eval()
    for name in "ab":
        apply(host, **PART, name=name, seed=ord(name))
    apply(host, "adapter_fusion", "by", adapters=["a", "b"])
    peftcore.activate(host, Fuse("a", "b", by="by"))
    expected = host(input_ids=ids).last_hidden_state
    torch.compiler.reset()
    compiled = torch.compile(host, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(input_ids=ids).last_hidden_state, expected, rtol=1e-12, atol=1e-12)
