"""PSOFT beside peft's and beside its equation; what it keeps of the weight, and its directions."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, adapted, assert_equation, logical
from one_layer import One
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn

import peftcore
from peftcore.testing import HOSTS, against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
RANK = 4


# The default rank is that of the weights of these hosts, of which everything would turn.
@conformance("psoft", options={"*": {"rank": 4}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def equation(**options: Any) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    def turned(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        matrix = weight.flatten(1)
        U, S, V = torch.linalg.svd(matrix, full_matrices=False)
        signs = torch.stack([u[u.abs().argmax()].sign() for u in U.T])
        U, S, V = (U * signs)[:, :RANK], S[:RANK], (V * signs[:, None])[:RANK]
        K = tensors["K"]
        if options.get("orthogonal", True):
            upper = torch.zeros(RANK, RANK, dtype=K.dtype)
            upper[*torch.triu_indices(RANK, RANK, 1)] = K
            K = upper - upper.T
            if "eps" in options:
                K = K * (options["eps"] / K.square().sum().sqrt()).clamp(max=1)
            eye = torch.eye(RANK).double()
            if "series" in options:
                last = options["series"] - 1
                R = eye + sum((1 if n == last else 2) * torch.linalg.matrix_power(K, n) for n in range(1, last + 1))
            else:
                R = (eye + K) @ torch.linalg.inv(eye - K)
        else:
            R = K
        R = torch.diag(tensors["b"]) @ R if "b" in tensors else R
        R = R @ torch.diag(tensors["a"]) if "a" in tensors else R
        if options.get("singular_values") == "both":
            update = U @ torch.diag(S.sqrt()) @ (R - torch.eye(RANK).double()) @ torch.diag(S.sqrt()) @ V
        else:
            update = U @ torch.diag(S) @ (R - torch.eye(RANK).double()) @ V
        return weight + update.view(weight.shape)

    return turned


FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "free": {"orthogonal": False},
    "without vectors": {"scale_outputs": False, "scale_inputs": False},
    "outputs alone": {"scale_inputs": False},
    "both sides": {"singular_values": "both"},
    "series": {"series": 5},
    "short": {"series": 6, "eps": 0.1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    assert_equation(kind, "psoft", equation(), rank=RANK)


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    assert_equation("linear", "psoft", equation(**FORMS[form]), rank=RANK, **FORMS[form])


def test_a_rotation_keeps_what_is_between_the_principal_columns() -> None:
    """Their lengths and angles, while there are no vectors."""
    options: dict[str, Any] = {
        "rank": RANK,
        "scale_outputs": False,
        "scale_inputs": False,
        "singular_values": "outputs",
    }
    host, _, operator = adapted("linear", "psoft", **options)
    weight = logical("linear", host)
    part = operator.B @ operator.A
    torch.testing.assert_close(part @ part.T, operator.B @ operator.B.T)  # A has orthonormal rows
    nn.init.normal_(operator.K)
    R = operator.rotation()
    torch.testing.assert_close(R @ R.T, torch.eye(RANK).double())
    after = operator.merged(weight) - (weight - part)
    assert difference(after, part) > 0.1
    torch.testing.assert_close(after @ after.T, operator.B @ operator.B.T)


def test_start_and_rank() -> None:
    model = One(nn.Linear(12, 7))
    x = torch.randn(5, 12)
    expected = model(x)
    injection = peftcore.apply(model, "psoft", target="layer", rank=64)  # of which there are 7
    assert torch.equal(model(x), expected)
    assert sum(p.numel() for p in injection.parameters()) == 7 * 6 // 2 + 2 * 7
    (operator,) = injection.operators.values()
    assert difference(operator.B @ operator.A, model.layer.weight.detach()) <= 1e-5


def test_an_approximation_is_near() -> None:
    operator = adapted("convolution", "psoft", rank=2, iterations=500)[2]
    exact = adapted("convolution", "psoft", rank=2)[2]
    assert difference(operator.A, exact.A) <= 1e-6
    assert difference(operator.B, exact.B) <= 1e-6


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    """With our singular vectors, whose signs are up to the machine."""
    layer: Any = theirs.get_submodule(site.module_path)
    A, B, scale = layer._psoft_A_cache, layer._psoft_B_cache, layer.scaling[ADAPTER]
    assert difference(B[ADAPTER] @ A[ADAPTER] * scale, operator.B @ operator.A) <= 1e-5
    power = 1 if (A[ADAPTER] @ A[ADAPTER].T).diagonal().sub(1).abs().max() < 1e-4 else 0.5
    A[ADAPTER], B[ADAPTER] = operator.A / scale ** (1 - power), operator.B / scale**power
    R = layer.psoft_R[ADAPTER]
    yield Pair(f"{site.path}.K", operator.K, R.weight, lambda t: t)
    for name in ("b", "a"):
        if operator.get_tensor(name) is not None:
            yield Pair(f"{site.path}.{name}", operator.get_tensor(name), getattr(R, f"vector_{name}"), lambda t: t)


THEIRS: dict[str, dict[str, Any]] = {
    "default": {},
    "free": {"psoft_orth": False},
    "without vectors": {"psoft_mag_a": False, "psoft_mag_b": False},
    "outputs alone": {"psoft_mag_a": False},
    "both sides": {"ab_svd_init": "pissa_init"},
    "series": {"use_cayley_neumann": True},
    "short": {"use_cayley_neumann": True, "num_cayley_neumann_terms": 6, "cayley_neumann_eps": 0.1},
}


def both(base: nn.Module, target: list[str], form: str, alpha: int = 8, **options: Any) -> Both:
    config = peft.PsoftConfig(target_modules=target, r=RANK, psoft_alpha=alpha, **THEIRS[form], **options)
    return Both(base, "psoft", {"target": target, "rank": RANK, **FORMS[form]}, config, pairs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", FORMS)
@against("peft 0.21", "psoft")
def test_beside_peft(form: str, training: bool) -> None:
    """Outputs, gradients, merged weights, and as many parameters; in float32, since peft refuses float64. Its scale has
    no effect."""
    torch.manual_seed(0)
    compared = both(One(nn.Linear(12, 7)).train(training), ["layer"], form)
    count = sum(p.numel() for p in compared.tuner.model.parameters() if p.requires_grad)
    square, vectors = (16 if form == "free" else 6), {"without vectors": 0, "outputs alone": 1}.get(form, 2)
    assert count == sum(p.numel() for p in compared.injection.parameters()) == square + vectors * RANK
    x = torch.randn(2, 3, 12)
    compared.assert_same(lambda model: model(x))


@against("peft 0.21", "psoft")
def test_a_model_beside_peft() -> None:
    model, inputs = HOSTS["llama"].build()
    both(model.eval(), ["q_proj", "v_proj"], "default").assert_same(lambda adapted: adapted(**inputs).logits)


def test_shortest_series() -> None:
    """From four terms on the powers end one below their number, as in peft; the length of K is that of all entries."""
    _, _, operator = adapted("linear", "psoft", rank=RANK, series=4, eps=0.5)
    nn.init.constant_(operator.K, 10.0)
    R = operator.rotation()
    skew = (R - R.T) / 2  # odd powers
    assert skew.square().sum().sqrt() <= 2 * 0.5 + 0.5**3
    assert math.isclose(R.trace().item(), RANK - 2 * 0.25, rel_tol=1e-6)  # 2 K^2 has the trace -2 |K|^2
