"""DiffFit: numbers of an unofficial implementation for diffusers (`numbers/difffit.json`: mkshing/DiffFit-pytorch at
78dc2d1, run once), in blocks of a DiT and of a UNet; what trains and what does not, and merged weights."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import TargetError
from peftcore.testing import conformance, frozen
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "difffit.json"
SCRIPT = run_path(str(NUMBERS.with_suffix(".py")))
GAMMAS = {
    "to_out.0": "gamma_attn{}",
    "to_q": "attn{}.processor.gamma_q",
    "to_k": "attn{}.processor.gamma_k",
    "to_v": "attn{}.processor.gamma_v",
}
"""What scales a matrix of an attention there, in its block."""


NOTHING = "the first and the last module of a llama have neither bias nor norm, and no branch ends there: it is refused"


@conformance("difffit", expected_failures={"options_come_back_as_written-llama": NOTHING})
def test_conformance(check: Callable[[], None]) -> None:
    check()


class Blocks(nn.Module):
    """A host of nothing but blocks of diffusers."""

    def __init__(self, name: str) -> None:
        super().__init__()
        attention = pytest.importorskip("diffusers.models.attention")
        width = SCRIPT["WIDTH"]
        sizes = SCRIPT["SIZES"][name]
        self.blocks = nn.ModuleList(
            attention.BasicTransformerBlock(width, 2, width // 2, **sizes).double() for _ in range(2)
        )
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, **SCRIPT["given"](self.name))
        return x


def theirs(path: str) -> str:
    """The name there of what an operator at a path trains."""
    number, _, rest = path.removeprefix("blocks.").partition(".")
    part, _, inside = rest.partition(".")
    if inside in GAMMAS:
        return f"{number}.{GAMMAS[inside].format(part[-1])}"
    if part == "ff" and inside == "net.2":
        return f"{number}.gamma_ff"
    return f"{number}.{rest}" if rest.endswith("bias") else f"{number}.{rest}.weight"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("scales", ["branches", "matrices"])
@pytest.mark.parametrize("name", SCRIPT["SIZES"])
def test_numbers_of_an_unofficial_implementation(name: str, scales: str, training: bool) -> None:
    """Outputs, and gradients of all that trains and of what comes in."""
    numbers = frozen(NUMBERS)[name][scales]
    model = Blocks(name)
    gammas = {key: torch.ones(SCRIPT["WIDTH"]).double() for key in numbers["gradients"] if "gamma" in key}
    of_blocks = {key: value for key, value in gammas.items() if "processor" not in key}
    SCRIPT["waves"]({**of_blocks, **dict(model.blocks.named_parameters())}, 0.1)  # all that blocks have there
    for path, module in model.named_modules():
        if path.endswith("class_embedder"):
            module.dropout_prob = 0.0
    injection = peftcore.apply(model.train(training), "difffit", scales=scales, dtype="float64")
    own = {theirs(path): parameter for path, op in injection.operators.items() for parameter in op.parameters()}
    ones = ("gamma_fnn",) if scales == "matrices" else ("gamma_fnn", "gamma_q", "gamma_k", "gamma_v")
    assert set(own) == {key for key in numbers["gradients"] if not key.endswith(ones)}
    SCRIPT["waves"](gammas, 0.2)  # also of those that are one there, for the same waves
    with torch.no_grad():
        for key, value in gammas.items():
            if key in own:
                own[key].copy_(value)
    x = SCRIPT["wave"]((2, 4, SCRIPT["WIDTH"]), 0.9).requires_grad_()
    y = model(x)
    (y * SCRIPT["wave"](y.shape, 0.3)).sum().backward()
    near: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(y.flatten(), torch.tensor(numbers["output"]).double(), **near)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.flatten(), torch.tensor(numbers["input"]).double(), **near)
    for key, parameter in own.items():
        expected = torch.tensor(numbers["gradients"][key]).double()
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.flatten(), expected, **near, msg=key)
    assert max(torch.tensor(each).abs().max() for each in numbers["gradients"].values()) > 1e-2
    merged = deepcopy(model.eval())
    peftcore.injections(merged)["difffit"].bake()
    torch.testing.assert_close(merged(x), model(x), rtol=1e-10, atol=1e-10)


def test_what_trains_in_a_dit() -> None:
    """Biases, each block's table of classes and two scale factors; no modulation, which has norm in its name."""
    model, _ = HOSTS["dit"].build()
    injection = peftcore.apply(model, "difffit")
    biases = {path for path, _ in model.named_parameters() if path.endswith("bias") and "peft" not in path}
    tables = {f"transformer_blocks.{n}.norm1.emb.class_embedder.embedding_table" for n in (0, 1)}
    ends = {f"transformer_blocks.{n}.{end}" for n in (0, 1) for end in ("attn1.to_out.0", "ff.net.2")}
    assert set(injection.operators) == biases | tables | ends
    without = peftcore.plan(HOSTS["dit"].build()[0], "difffit", classes=False)
    assert injection.summary().trainable - without.trainable == 2 * 11 * 16


def test_scale_factors_in_the_first_blocks() -> None:
    model, _ = HOSTS["dit"].build()
    injection = peftcore.apply(model, "difffit", blocks=1, scales="matrices")
    scaled = {path for path, op in injection.operators.items() if "gamma" in dict(op.named_parameters())}
    names = ("to_q", "to_k", "to_v", "to_out.0")
    assert scaled == {*(f"transformer_blocks.0.attn1.{name}" for name in names), "transformer_blocks.0.ff.net.2"}


def test_a_table_of_tokens_is_none_of_classes() -> None:
    """In language models: biases, norms, and scale factors where branches end."""
    model, _ = HOSTS["bert"].build()
    operators = peftcore.apply(model, "difffit").operators
    assert "bert.embeddings.word_embeddings" not in operators
    assert {path for path, op in operators.items() if "gamma" in dict(op.named_parameters())} == {
        f"bert.encoder.layer.{n}.{end}.dense" for n in (0, 1) for end in ("attention.output", "output")
    }


def test_a_target_takes_all_of_it() -> None:
    model, _ = HOSTS["bert"].build()
    injection = peftcore.apply(model, "difffit", target="re:.*layer\\.1\\..*")
    assert all(".layer.1." in path for path in injection.operators) and len(injection.operators) == 12
    with pytest.raises(TargetError):
        peftcore.apply(HOSTS["bert"].build()[0], "difffit", target="nothing")


def test_the_combination_of_language_models_is_a_preset() -> None:
    model, inputs = HOSTS["llama"].build()
    injection = peftcore.apply(model, "diffit_combo")
    fill(injection)
    assert injection.method.name == "difffit"
    before = model(**inputs).logits
    injection.merge()
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-4, atol=1e-5)
