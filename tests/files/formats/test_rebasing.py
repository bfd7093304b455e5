"""The adapter of an encoder goes into a host with a head and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from file_toys import host
from torch import Tensor, nn

import peftcore
from peftcore.errors import HostMismatch
from peftcore.files.formats.native import ENVELOPE, TENSORS
from peftcore.testing.kit import fill
from peftcore.testing.tools import differences, trace


class WithHead(nn.Module):
    """An encoder below a name, and a head."""

    def __init__(self, *towers: str) -> None:
        super().__init__()
        for tower in towers:
            self.add_module(tower, host("encoder")[0])
        self.classifier = nn.Linear(5, 2)

    def forward(self, **inputs: Tensor) -> Tensor:
        towers = [module(**inputs) for name, module in self.named_children() if name != "classifier"]
        logits: Tensor = self.classifier(sum(towers))
        return logits


@pytest.mark.parametrize("method", ["lora", "ia3", "bitfit", "houlsby_adapter", "vera", "loreft", "shira"])
def test_the_adapter_of_an_encoder_goes_into_a_host_with_a_head_and_back(method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"shira": {"rank": 1}}.get(method, {})
    encoder, inputs = host("encoder")
    path = peftcore.plan(encoder, method, **options).sites[0].path
    injection = peftcore.apply(encoder, method, overrides={path: {}}, train=["head"] * (method != "bitfit"), **options)
    fill(injection)
    injection.save(tmp_path / "bare")
    base, expected = host("encoder")[0](**inputs), encoder(**inputs)
    assert (expected - base).abs().max() > 0.01
    whole = WithHead("bert").eval()
    inside = peftcore.load(whole, tmp_path / "bare")
    assert all(site.module_path.startswith("bert.") for site in inside.sites)
    torch.testing.assert_close(whole.bert(**inputs), expected)
    assert list(inside.config.overrides) == [f"bert.{path}"]
    inside.save(tmp_path / "whole")
    again, _ = host("encoder")
    peftcore.load(again, tmp_path / "whole").save(tmp_path / "again")
    torch.testing.assert_close(again(**inputs), expected)
    for name in (ENVELOPE, TENSORS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "bare" / name).read_bytes()


def test_an_adapter_that_fits_two_towers_fits_none(tmp_path: Path) -> None:
    encoder, _ = host("encoder")
    peftcore.apply(encoder, "lora").save(tmp_path / "adapter")
    two = WithHead("text", "image")
    before = trace(two)
    with pytest.raises(HostMismatch, match="several places of this host: 'text', 'image'"):
        peftcore.load(two, tmp_path / "adapter")
    assert not differences(before, trace(two))
    peftcore.load(two.image, tmp_path / "adapter")  # as the message says


def test_an_adapter_of_one_tower_does_not_end_in_another(tmp_path: Path) -> None:
    peftcore.apply(WithHead("text"), "lora", target="linear1").save(tmp_path / "adapter")
    other = WithHead("image")
    before = trace(other)
    with pytest.raises(HostMismatch, match=r"this model has no text\.encoder"):
        peftcore.load(other, tmp_path / "adapter")
    assert not differences(before, trace(other))
