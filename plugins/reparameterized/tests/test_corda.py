"""CorDA beside peft's and beside its equation: what it starts from, and what it computes once it has trained."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.corda import preprocess_corda
from peft_folders import assert_same, fill
from peft_pairs import difference
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from two_layers import Two

import peftcore
from peftcore.errors import CalibrationError, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
SAME = "the kit's batches differ in what counts of the output; the inputs, which is what this looks at, are the same"
RANK = 3


SEEN = "what a host in half precision shows of its inputs is rounded, so the factors are others"
ROUNDED = ("mlp", "llama", "bert", "t5", "gpt2", "moe", "mistral", "vit", "unet", "dit")


@conformance(
    "corda",
    options={"*": {"rank": 3, "alpha": 3.0}},
    expected_failures={
        **{f"data_counts_where_it_is_asked_for-{each}": SAME for each in ("mlp", "llama")},
        **{f"merging_rounds_once-{each}": SEEN for each in ROUNDED},
        **{f"low_precision_hosts_keep_their_dtype-{each}": SEEN for each in ("t5", "moe")},
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def two() -> Two:
    """Layers stored one way and the other."""
    return Two(nn.Linear(12, 7), Conv1D(9, 7))


def host() -> nn.Module:
    torch.manual_seed(0)
    return two()


def batches() -> list[tuple[Tensor]]:
    """Of one sequence each, which is all that peft takes."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randn(12, generator=generator).exp()
    return [(torch.randn(1, n, 12, generator=generator) * sizes,) for n in (30, 40, 50)]


def decomposed(weight: Tensor, data: list[Tensor], mode: str, scale: float) -> tuple[Tensor, Tensor]:
    """A and B in float64, up to the signs of directions, by the eigenvectors of W C' C' W'."""
    parts = [x.double() / x.max().abs() for x in data]
    C = sum(x.T @ x for x in parts) / len(parts)
    C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C))
    values, U = torch.linalg.eigh(weight.double() @ C @ C @ weight.double().T)
    none = max(0, weight.shape[0] - weight.shape[1])  # so many are zero by the shape of the weight
    last = len(values) if mode == "ipm" else none + RANK
    chosen = range(last - 1, last - 1 - RANK, -1)
    S, U = values[list(chosen)].clamp(min=0).sqrt(), U[:, list(chosen)]
    return (U.T @ weight.double()) * (scale * S).rsqrt().unsqueeze(1), U * (S / scale).sqrt()


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_start(mode: str) -> None:
    """By another algorithm: inv(C') cancels against the C' of the decomposition, so A is U' W by the root of S."""
    model = host().double()
    data = [(x.double(),) for (x,) in batches()]
    options: dict[str, Any] = {"rank": RANK, "alpha": 5.0, "mode": mode, "dtype": "float64"}
    injection = peftcore.apply(model, "corda", target=["first", "second"], data=data, **options)
    inputs = {"first": [x[0] for (x,) in data], "second": [torch.tanh(host().double().first(x[0])) for (x,) in data]}
    weights = {"first": model.first.weight, "second": model.second.weight.T}
    for path, operator in injection.operators.items():
        assert torch.equal(operator.A, operator.A0) and torch.equal(operator.B, operator.B0)
        A, B = decomposed(weights[path].detach(), [x.detach() for x in inputs[path]], mode, 5.0 / RANK)
        assert difference(operator.B @ operator.A, B @ A) <= 1e-8
        assert difference(operator.B.abs(), B.abs()) <= 1e-8
        assert (operator.B.gather(0, operator.B.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@against("peft 0.21", "corda")
def test_beside_peft(mode: str) -> None:
    """The same start from the same batches, up to signs; then, with noise in both, outputs and gradients. peft keeps
    the rest of the weight in the base, and knows float32 alone."""
    base, data = host(), batches()
    target = ["first", "second"]
    model, theirs = deepcopy(base), deepcopy(base)
    injection = peftcore.apply(model, "corda", target=target, data=data, rank=RANK, alpha=6.0, mode=mode)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=6,
        target_modules=target,
        init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=mode),
    )

    def run() -> None:
        for (x,) in data:
            theirs(x)

    preprocess_corda(theirs, config, run_model=run)
    tuner = peft.LoraModel(theirs, config, "default")
    x = data[0][0]
    assert difference(theirs(x), base(x)) <= 1e-5
    count = sum(p.numel() for p in tuner.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in injection.parameters()) == RANK * (12 + 7 + 7 + 9)
    pairs, generator = [], torch.Generator().manual_seed(4)
    for path, operator in injection.operators.items():
        layer: Any = theirs.get_submodule(path)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        signs = (operator.B.detach() * B.detach()).sum(0).sign()
        assert difference(operator.B * signs, B) <= 1e-3 and difference(operator.A * signs.unsqueeze(1), A) <= 1e-3
        for own, given, sign in ((operator.A, A, signs.unsqueeze(1)), (operator.B, B, signs)):
            noise = torch.randn(own.shape, generator=generator) * 0.1
            own.data.add_(noise)
            given.data.add_(noise * sign)
            pairs.append((own, given, sign))
    ours, expected = model.train()(x), theirs.train()(x)
    assert difference(ours, base(x)) >= 1e-2 and difference(ours, expected) <= 1e-4
    direction = torch.randn_like(ours)
    (ours * direction).sum().backward()
    (expected * direction).sum().backward()
    assert all(difference(own.grad, given.grad * sign) <= 1e-3 for own, given, sign in pairs)


def test_what_has_no_vectors_is_decomposed_as_it_is() -> None:
    """As PiSSA."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv1d(3, 5, 2), nn.Linear(7, 4))
    data = [(torch.randn(2, 3, 8),)]
    ours = peftcore.apply(deepcopy(base), "corda", target=["0", "1"], data=data, rank=2, alpha=2.0)
    pissa = peftcore.apply(deepcopy(base), "pissa", target=["0", "1"], rank=2, alpha=2.0)
    torch.testing.assert_close(ours.operators["0"].A, pissa.operators["0"].A)
    assert difference(ours.operators["1"].A, pissa.operators["1"].A) > 0.1
    with pytest.raises(UnsupportedSite, match="no inputs to look at"):
        peftcore.apply(deepcopy(base), "corda", target="0", data=data)


def test_padding_does_not_count() -> None:
    model, inputs = HOSTS["llama"].build()

    def start(ids: Tensor) -> Iterator[Tensor]:
        found = {"input_ids": ids, "attention_mask": inputs["attention_mask"]}
        injection = peftcore.apply(deepcopy(model).eval(), "corda", data=[found], rank=2)
        yield from (operator.A.detach() for operator in injection.operators.values())

    other = inputs["input_ids"].clone()
    other[inputs["attention_mask"] == 0] = 5
    for one, two in zip(start(inputs["input_ids"]), start(other), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("wrong", [0.0, float("nan")])
def test_data_that_is_of_no_use(wrong: float) -> None:
    model = host()
    before = deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match="not finite, or all zero"):
        peftcore.apply(model, "corda", target="first", data=[(torch.full((1, 4, 12), wrong),)], rank=2)
    assert not peftcore.injections(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_damping_doubles_until_the_inverse_is_exact() -> None:
    from peftcore_reparameterized.corda import damped

    C = torch.zeros(6, 6)
    C[0, 0] = 1.0
    fixed, inverse = damped(C)
    assert torch.dist(fixed @ inverse, torch.eye(6)) < 0.05
    assert fixed[1, 1] == pytest.approx(0.01 / 6)


@pytest.mark.parametrize("alpha", [6.0, None])
def test_files_of_peft(alpha: float | None, tmp_path: Path) -> None:
    """Written as LoRA of twice the rank, which peft makes of its own, too."""
    base, x = host().eval(), batches()[0][0]
    ours = deepcopy(base)
    injection = peftcore.apply(ours, "corda", target=["first", "second"], data=batches(), rank=RANK, alpha=alpha)
    fill(injection.parameters())
    injection.save(tmp_path / "ours", format="peft")
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "ours")).eval()
    assert_same(base(x), ours(x), theirs(x))
    other = deepcopy(base)
    config = peft.LoraConfig(
        r=RANK,
        target_modules=["first", "second"],
        init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method="ipm"),
    )
    preprocess_corda(other, config, run_model=lambda: [other(x) for (x,) in batches()])
    model = peft.get_peft_model(other, config).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = "corda"
    fill(parameter for parameter in model.parameters() if parameter.requires_grad)
    model.save_pretrained(str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    loaded = deepcopy(base)
    assert peftcore.load(loaded, tmp_path / "theirs").config.rank == 2 * RANK
    assert_same(base(x), loaded(x), model(x))


def test_the_scale_is_one_at_every_rank() -> None:
    model, inputs = HOSTS["mlp"].build()
    data = [lambda host: host(**inputs).square().mean()]
    for rank in (1, 3):
        injection = peftcore.apply(model, "corda", rank=rank, data=data)
        assert {operator.scale for operator in injection.operators.values()} == {1.0}
        injection.remove()
