"""What the module of lucidrains/perfusion-pytorch, whose author is not the paper's, makes of texts in three steps of
training, in evaluation, and of two concepts at once, in float64 with waves for all numbers:
``python -m peftcore.testing.freeze perfusion.py CHECKOUT``.

Its `parameters` are not asked: of keys and values they have the wrong ones.
"""

import importlib
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source

SOURCE = Source("others", "lucidrains/perfusion-pytorch", "9032150", "perfusion_pytorch/perfusion.py")
VERSIONS = ("torch",)
WIDTH, OUTPUTS, BATCH, TOKENS = 6, 5, 2, 5
DAMPING = 0.1
OPTIONS = {"beta": 0.6, "tau": 0.3, "beta_eval": 0.2, "tau_eval": 0.4, "ema": 0.8, "text_gradient": 0.3}
"""By our names."""
THEIRS = {
    "beta": "train_beta", "tau": "train_temperature", "beta_eval": "eval_beta", "tau_eval": "eval_temperature",
    "ema": "input_decay", "text_gradient": "frac_gradient_concept_embed",
}  # fmt: skip
CONCEPTS, STEPS = (0, 1), (0, 1, 2)
WHERE = {0: torch.tensor([1, 4]), 1: torch.tensor([3, 0])}
"""Where each concept stands in each text."""


def wave(k: float, *shape: int) -> Tensor:
    """Numbers that everybody can make again."""
    size = torch.Size(shape).numel()
    return torch.sin(torch.arange(1, size + 1, dtype=torch.float64) ** 1.5 * k + k).view(shape)


def weight(kind: str) -> Tensor:
    """The matrix that makes keys, or values."""
    return wave({"cross.k": 0.7, "cross.v": 1.3}[kind], OUTPUTS, WIDTH)


def captions(without: int | None = None) -> Tensor:
    """Texts, among them those that have the class of one concept or the other."""
    classes = [superclass(concept, 0) for concept in CONCEPTS if concept != without]
    return torch.cat([wave(0.31, 9, TOKENS, WIDTH), *classes])


def covariance() -> Tensor:
    """E[e e'] of all texts, damped."""
    e = captions().flatten(0, 1)
    C = e.T @ e / len(captions())
    return C + DAMPING * C.diagonal().mean() * torch.eye(WIDTH, dtype=C.dtype)


def text(concept: int, step: int) -> Tensor:
    """A batch of texts with the concept, whose word is that of the class at first."""
    return superclass(concept, 0) if step == 0 else wave(0.9 + concept + 0.2 * step, BATCH, TOKENS, WIDTH)


def superclass(concept: int, step: int) -> Tensor:
    """The same texts with the class in its place."""
    return wave(0.4 + concept + 0.3 * step, BATCH, TOKENS, WIDTH)


def noise(concept: int, step: int) -> Tensor:
    """By what a step changes the output that trains: N(0, 0.1)."""
    generator = torch.Generator().manual_seed(10 * concept + step)
    return 0.1 * torch.randn(OUTPUTS, generator=generator, dtype=torch.float64)


def direction(like: Tensor) -> Tensor:
    return wave(0.17, *like.shape)


STANDING_IN: dict[str, dict[str, Any]] = {
    "beartype": {"beartype": lambda function: function},
    "beartype.typing": {name: getattr(typing, name) for name in ("Union", "List", "Optional", "Tuple")},
    "opt_einsum": {"contract": torch.einsum},
    "perfusion_pytorch.open_clip": {"OpenClipAdapter": object},
}
"""For packages that check types, order products and make encodings."""


def theirs(checkout: Path) -> ModuleType:
    """Their module, without the package around it."""
    for name, held in STANDING_IN.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(held)
    package = sys.modules["perfusion_pytorch"] = ModuleType("perfusion_pytorch")
    package.__path__ = [str(checkout / "perfusion_pytorch")]
    return importlib.import_module("perfusion_pytorch.perfusion")


def trained(module: Any, kind: str, concept: int, found: dict[str, Any]) -> Any:
    """Their edit of a matrix after three steps, with what came out and the gradients."""
    linear = nn.Linear(WIDTH, OUTPUTS, bias=False).double()
    linear.weight.data.copy_(weight(kind))
    options = {THEIRS[name]: value for name, value in OPTIONS.items()}
    edit = module.Rank1EditModule(
        linear, C=covariance(), text_seq_len=TOKENS, is_key_proj=kind == "cross.k", **options
    ).double()
    for step in STEPS:
        e = text(concept, step).requires_grad_()
        y = edit(e, concept_indices=WHERE[concept], text_enc_with_superclass=superclass(concept, step))
        y.mul(direction(y)).sum().backward()
        found[f"{kind} {concept} {step}"] = {"output": y.tolist(), "text": e.grad.tolist()}
        if kind == "cross.v":
            found[f"{kind} {concept} {step}"]["v"] = edit.concept_outputs.grad[0].tolist()
            edit.concept_outputs.grad = None
            edit.concept_outputs.data += noise(concept, step)
    return edit.eval()


def numbers(checkout: Path) -> dict[str, dict[str, Any]]:
    """Returns outputs and gradients, by matrix, concept and step; in evaluation; and of both concepts at once."""
    found: dict[str, dict[str, Any]] = {}
    module = theirs(checkout)
    for kind in ("cross.k", "cross.v"):
        edits = [trained(module, kind, concept, found) for concept in CONCEPTS]
        both = module.merge_rank1_edit_modules(*edits)
        cases = {"0": (edits[0], 0), "1": (edits[1], 0), "both": (both, CONCEPTS)}
        for name, (edit, concepts) in cases.items():
            e = text(0, 3).requires_grad_()
            y = edit(e, concept_id=concepts)
            y.mul(direction(y)).sum().backward()
            found[f"{kind} {name} eval"] = {"output": y.tolist(), "text": e.grad.tolist()}
    return found
