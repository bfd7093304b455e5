"""State-offset tuning: the kit on a Mamba; numbers of the authors' mixer; states written out one by one in Mamba,
FalconMamba and Jamba; Mamba-2; generation; kernels; what it counts and refuses."""

from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sines import wave
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, TargetError, TrainingError, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "state_offset_tuning.json"
CODE: Any = {
    "repository": "furiosa-ai/ssm-state-tuning",
    "commit": "2cff985",
    "script": "modules/suffix_tuning.py",
}
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0, "use_cache": False}
MAMBA2 = {"state_size": 5, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4}
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
JAMBA = {"mamba_d_state": 5, "mamba_dt_rank": 3, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
KINDS: dict[str, dict[str, Any]] = {
    "Mamba": {"state_size": 5},
    "FalconMamba": {"state_size": 5},
    "Jamba": {**JAMBA, **ATTENTION, "num_hidden_layers": 3},
    "Mamba2": MAMBA2,
}
IDS = torch.tensor([[7, 3, 9, 11, 20], [5, 30, 8, 4, 39]])


@conformance(
    "state_offset_tuning",
    hosts=["mamba"],
    telling=["mamba"],
    expected_failures={"low_precision_hosts_keep_their_dtype-mamba": "the model itself makes its logits float32"},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scans in float64: `float` in them is for kernels."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


class Alone(nn.Module):
    """A mixer, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.MambaConfig(hidden_size=6, state_size=3, time_step_rank=2, num_hidden_layers=1)
        self.mixer = transformers.MambaModel(config).layers[0].mixer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mixer(x)
        return y


@against("authors", "state_offset_tuning", **CODE)
@pytest.mark.parametrize("kind", ["state", "output", "rank"])
def test_numbers_of_the_authors(kind: str, exact: None) -> None:
    numbers = frozen(NUMBERS)[kind]
    model: Any = Alone().double().eval()
    for index, name in enumerate(sorted(dict(model.mixer.named_parameters()))):
        parameter = model.mixer.get_parameter(name)
        parameter.data.copy_(wave(parameter.shape, 0.37 + 0.11 * index))
    options: dict[str, Any] = {"offset": "output"} if kind == "output" else {"rank": 2} if kind == "rank" else {}
    operator = peftcore.apply(model, "state_offset_tuning", **options, dtype="float64").operators["mixer"]
    trained = [getattr(operator, name) for name in (("down", "up") if kind == "rank" else ("offset",))]
    for index, parameter in enumerate(trained):
        parameter.data.copy_(wave(parameter.shape, 0.71 + 0.13 * index))
    x = wave((2, 5, 6), 0.23).requires_grad_()
    y = model(x)
    (y * wave((2, 5, 6), 0.3)).sum().backward()
    found = {"output": y, "x": x.grad, **{f"trained {i}": each.grad for i, each in enumerate(trained)}}
    assert found.keys() == numbers.keys()
    for name, value in found.items():
        expected = torch.tensor(numbers[name], dtype=torch.float64)
        torch.testing.assert_close(value.flatten(), expected, rtol=1e-10, atol=1e-12)


def built(kind: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | KINDS[kind], initializer_range=0.3)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    if kind == "Jamba":
        model.set_experts_implementation("eager")  # grouped products of torch have no float64
    return model.double().eval().requires_grad_(False)


def modeling(kind: str) -> Any:
    name = {"FalconMamba": "falcon_mamba"}.get(kind, kind.lower())
    return import_module(f"transformers.models.{name}.modeling_{name}")


def state_by_state(offsets: list[Tensor], calls: Any) -> Callable[..., Tensor]:
    """Mamba's scan with an offset in each state that is read, and not in the one that is carried on."""

    def scan(
        u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor, **_: Any
    ) -> Tensor:
        offset, h, read = offsets[next(calls)], torch.zeros(len(u), *A.shape, dtype=u.dtype), []
        step = torch.log1p((dt + delta_bias[:, None]).exp())
        for t in range(u.shape[-1]):
            h = (step[..., t, None] * A).exp() * h + (step[..., t] * u[..., t])[..., None] * B[:, None, :, t]
            seen = h + offset if offset.dim() == 2 else h
            y = (seen * C[:, None, :, t]).sum(-1) + D * u[..., t]
            read.append((y if offset.dim() == 2 else y + offset) * z[..., t] * torch.sigmoid(z[..., t]))
        return torch.stack(read, -1)

    return scan


@pytest.mark.parametrize("offset", ["state", "output"])
@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba", "Jamba"])
def test_equation(kind: str, offset: str, monkeypatch: pytest.MonkeyPatch, exact: None) -> None:
    base = built(kind)
    model, plain = deepcopy(base), base(IDS).logits
    injection = peftcore.apply(model, "state_offset_tuning", offset=offset, dtype="float64")
    fill(injection)
    ours, offsets = model(IDS).logits, [p.detach().clone().requires_grad_() for p in injection.parameters()]
    monkeypatch.setattr(modeling(kind), "mamba_selective_scan", state_by_state(offsets, count()))
    expected = base(IDS).logits
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max() and len(offsets) == 2
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    for output in (ours, expected):
        (output * wave(output.shape, 0.3)).sum().backward()
    for mine, theirs in zip(injection.parameters(), offsets, strict=True):
        slack = 1e-5 if kind == "Jamba" else 1e-8  # its router is in float32
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=slack, atol=slack)


def test_mamba_2_has_an_offset_in_front_of_its_gated_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    base, module = built("Mamba2"), modeling("Mamba2")
    model, plain = deepcopy(base), base(IDS).logits
    injection = peftcore.apply(model, "state_offset_tuning", offset="output", dtype="float64")
    fill(injection)
    ours, scan, offsets = model(IDS).logits, module.mamba2_chunk_scan, injection.parameters()
    monkeypatch.setattr(
        module, "mamba2_chunk_scan", lambda *args, **kwargs: scan(*args, **kwargs) + next(offsets).view(4, 8)
    )
    assert (ours - plain).abs().max() > 1e-3 * plain.abs().max()
    torch.testing.assert_close(ours, base(IDS).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache(kind: str) -> None:
    model = built(kind)
    injection = peftcore.apply(model, "state_offset_tuning", offset="output" if kind == "Mamba2" else "state")
    fill(injection)
    given = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    given |= {"return_dict_in_generate": True}
    with_cache, without = (model.generate(IDS, **given, use_cache=each) for each in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    for one, other in zip(with_cache.logits, without.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_kernel_in_the_place_of_the_mixer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in training, without a cache."""
    model = built("Mamba").train()
    peftcore.apply(model, "state_offset_tuning")
    expected = model(IDS).logits
    monkeypatch.setattr(
        modeling("Mamba"), "mamba_inner_fn", lambda xz, *_, **__: torch.zeros(len(xz), xz.shape[-1], 16).double()
    )
    with pytest.raises(TrainingError, match="use_cache=True"):
        model(IDS)
    torch.testing.assert_close(model(IDS, use_cache=True).logits, expected)
    for layer in model.backbone.layers:
        layer.mixer.eval()
    torch.testing.assert_close(model(IDS).logits, expected)


@pytest.mark.parametrize(("options", "number"), [({}, 589_824), ({"offset": "output"}, 36_864), ({"rank": 2}, 74_496)])
def test_what_it_counts_in_mamba_130m(options: dict[str, Any], number: int) -> None:
    with torch.device("meta"):
        model = transformers.MambaModel(transformers.MambaConfig(hidden_size=768, num_hidden_layers=24))
    assert peftcore.plan(model, "state_offset_tuning", **options).trainable == number


def test_dtypes_are_kept_in_bfloat16() -> None:
    """Of what a mixer returns: the model adds it up in float32."""
    base = built("Mamba").bfloat16()
    model = deepcopy(base)
    fill(peftcore.apply(model, "state_offset_tuning"))
    returned: list[Tensor] = []
    for each in (model, base, deepcopy(model).double()):
        each.backbone.layers[0].mixer.register_forward_hook(lambda module, args, output: returned.append(output))
        each(IDS)
    ours, plain, double = returned
    assert ours.dtype is torch.bfloat16 and (ours - plain).abs().max() > 0.1 * plain.abs().max()
    torch.testing.assert_close(ours.double(), double, rtol=0.05, atol=0.05 * double.abs().max().item())


@against("authors", "state_offset_tuning", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """Of offsets of 5 states, whole and in factors."""
    told, path = frozen(NUMBERS, "start"), "model.layers.0.mamba"
    whole: Any = peftcore.apply(built("Jamba"), "state_offset_tuning").operators[path]
    factors: Any = peftcore.apply(built("Jamba"), "state_offset_tuning", rank=12_000).operators[path]
    for tensor, name in ((whole.offset, "offset"), (factors.down, "down"), (factors.up, "up")):
        same_start(tensor, told[name])


@against("authors", "state_offset_tuning", **CODE, part="trains")
@pytest.mark.parametrize("kind", ["state", "output", "rank"])
def test_what_trains_is_what_the_authors_train(kind: str) -> None:
    model = Alone()
    options: dict[str, Any] = {"offset": "output"} if kind == "output" else {"rank": 2} if kind == "rank" else {}
    injection = peftcore.apply(model, "state_offset_tuning", **options)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in injection.parameters()}
    start = "parameter_processors.x_after_ssm.suffixtuning_bias"
    names = {"offset": f"{start}.default", "down": f"{start}.default.lora_A", "up": f"{start}.default.lora_B"}
    own = [names[name] for name, _ in injection.operators["mixer"].named_parameters()]
    assert sorted(own) == sorted(frozen(NUMBERS, "trains")[kind])


@against("authors", "state_offset_tuning", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(built("Jamba"), "state_offset_tuning").config, frozen(NUMBERS, "defaults"))


def test_it_starts_as_the_model() -> None:
    model = built("Jamba")
    plain = model(IDS).logits
    injection = peftcore.apply(model, "state_offset_tuning", rank=2)
    operator: Any = injection.operators["model.layers.0.mamba"]
    assert operator.down.any() and not operator.up.any()
    assert list(injection.operators) == ["model.layers.0.mamba", "model.layers.2.mamba"]
    torch.testing.assert_close(model(IDS).logits, plain)


def test_what_is_refused() -> None:
    with pytest.raises(TargetError):
        peftcore.apply(HOSTS["llama"].build()[0], "state_offset_tuning")
    with pytest.raises(UnsupportedSite, match='offset="output"'):
        peftcore.apply(built("Mamba2"), "state_offset_tuning")
    with pytest.raises(UnsupportedSite, match="not a state-space mixer"):
        peftcore.apply(built("Mamba"), "state_offset_tuning", target="backbone.layers.0")
    with pytest.raises(ConfigError, match="rank= needs offset"):
        peftcore.apply(built("Mamba"), "state_offset_tuning", rank=2, offset="output")
    layers = {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2, "n_mamba_heads": 2}
    zamba = transformers.ZambaConfig(**SIZES | ATTENTION | layers, mamba_d_state=5, mamba_dt_rank=3)
    with pytest.raises(UnsupportedSite, match="does not know where this mixer gates"):
        peftcore.apply(transformers.ZambaForCausalLM(zamba), "state_offset_tuning")
