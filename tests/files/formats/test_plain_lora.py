"""Adapters as factors alone: with them the weights are what the adapter makes of them, and everything else is
refused."""

import pytest
import torch
from exported_hosts import llama, logits, noisy

from peftcore.errors import ExportError
from peftcore.files.formats.plain_lora import plain_lora


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_the_products_are_the_updates(method: str) -> None:
    model, other = llama(), llama()
    injection = noisy(model, method, rank=3, alpha=5.0, overrides={"*.v_proj": {"rank": 2, "alpha": 7.0}})
    pairs = plain_lora(injection, "a server")
    assert {len(pair.A) for pair in pairs.values()} == {2, 3}
    with torch.no_grad():
        for path, pair in pairs.items():
            A, B = pair.filled(4)
            assert len(A) == 4 and torch.allclose(B @ A, pair.B @ pair.A, rtol=1e-6, atol=1e-7)
            assert not B[:, len(pair.A) :].any() and A[len(pair.A) :].norm(dim=1).gt(0.1).all()  # who goes on trains B
            assert torch.equal(pair.filled(4)[0], A)
            other.get_submodule(path).weight += (pair.B @ pair.A).double()
    assert torch.allclose(logits(other), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dora", "vera", "ia3"])
def test_other_methods_are_refused(method: str) -> None:
    with pytest.raises(ExportError, match=r"a server reads only low-rank factors of matrices.*peftcore\.to_lora"):
        plain_lora(noisy(llama(), method), "a server")


def test_what_trains_along_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match="lm_head"):
        plain_lora(noisy(llama(), "lora", train=["lm_head"]), "a server")
