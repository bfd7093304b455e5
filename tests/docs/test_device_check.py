"""What `docs/check/device.py` says of methods on a device."""

import sys
from pathlib import Path

import pytest

import snippets

sys.path.append(str(Path(__file__).parents[2] / "docs/check"))


def test_a_method_works_and_what_does_not_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from device import wrong

    monkeypatch.chdir(tmp_path)
    assert wrong("lora", "cpu") is None
    assert "UnknownMethod" in str(wrong("no_such_method", "cpu"))
    for code, said in {
        "model = torch.nn.Linear(2, 2, device='meta')": "weight is not on cpu",
        "model = torch.nn.Linear(2, 2); model.weight.data.fill_(torch.nan)": "weight is not finite",
    }.items():
        monkeypatch.setattr(snippets, "snippet", lambda method, code=code: f"import torch\n{code}")
        assert wrong("lora", "cpu") == said
