"""A small Llama in float64, batches for it, and the plain loop that trains one adapter alone."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import peftcore
from peftcore.training import Member

VOCABULARY = 50
STEPS = 20
SGD, ADAMW = 1e-12, 1e-9
"""How far a trajectory may be from the one that a member takes alone, by optimizer."""


def llama(**options: Any) -> Any:
    """A Llama of two layers in float64 that trains, always with the same weights."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=VOCABULARY, **options)
    return transformers.LlamaForCausalLM(config).double().train()


def applied(model: nn.Module, method: Any, name: str, seed: int = 0, **options: Any) -> peftcore.Injection:
    """An injection in float64 whose parameters are not where they start, so that all of them get gradients."""
    with peftcore.activate(model):  # it starts from the base alone
        injection = peftcore.apply(model, method, name=name, dtype=torch.float64, seed=seed, **options)
    drawn = torch.Generator().manual_seed(seed + 7)
    with torch.no_grad():
        for each in injection.parameters():
            each.add_(0.05 * torch.randn(each.shape, generator=drawn, dtype=each.dtype))
    return injection


def texts(seed: int, count: int = 3, rows: int = 2, length: int = 5) -> list[dict[str, Tensor]]:
    drawn = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, VOCABULARY, (rows, length), generator=drawn) for _ in range(count)]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each), "labels": each.clone()} for each in ids]


def next_token(output: Any, batch: Any) -> Tensor:
    """The loss of a causal language model in the dtype of its logits; transformers' own is in float32."""
    logits, labels = output["logits"][:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def forever(data: list[dict[str, Tensor]]) -> Iterable[dict[str, Tensor]]:
    while True:
        yield from data


def alone(
    model: nn.Module,
    injection: peftcore.Injection,
    data: list[dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    schedule: Any = None,
    clip: float | None = None,
    accumulate: int = 1,
    steps: int = STEPS,
    loss: Callable[[Any, Any], Tensor] = next_token,
) -> list[float]:
    """What a plain loop does with one adapter; returns the losses."""
    peftcore.activate(model, injection.name)
    losses, batches = [], iter(forever(data))
    for _ in range(steps):
        optimizer.zero_grad()
        parts = []
        for _ in range(accumulate):
            batch = next(batches)
            output = model(**{key: value for key, value in batch.items() if key != "labels"})
            part = (loss(output, batch) + injection.losses()) / accumulate
            part.backward()
            parts.append(part.item())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([*injection.parameters()], clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(sum(parts))
    return losses


def expect_same(member: Member, injection: peftcore.Injection, losses: list[float], tolerance: float) -> None:
    """Compare a member with the same adapter trained alone: every loss on the way, and every value at the end."""
    assert len(member.losses) == len(losses)
    gap = max(abs(a - b) for a, b in zip(member.losses, losses, strict=True))
    assert gap <= tolerance, gap
    found, wanted = member.injection.state_dict(), injection.state_dict()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance, msg=key)
