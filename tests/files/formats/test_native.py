"""Our own files beside those of other libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from file_toys import adapted, bytes_of, host

import peftcore
from peftcore.errors import ExportError
from peftcore.files.formats.card import CARD


def test_peft_beside_our_own(tmp_path: Path) -> None:
    injection = adapted()
    injection.save(tmp_path / "both", format=["peftcore", "peft"])
    injection.save(tmp_path / "ours")
    injection.save(tmp_path / "theirs", format="peft")
    both = bytes_of(tmp_path / "both")
    alone = {**bytes_of(tmp_path / "ours"), **bytes_of(tmp_path / "theirs")}
    assert {name: both[name] for name in both if name != CARD} == {n: alone[n] for n in alone if n != CARD}
    assert b"library_name: peft\n" in both[CARD] and b"library_name: peftcore\n" in bytes_of(tmp_path / "ours")[CARD]
    outputs = []
    for folder in ("both", "ours", "theirs"):
        model, inputs = host()
        assert peftcore.load(model, tmp_path / folder).method.name == "lora"
        outputs.append(model(**inputs))
    for each in outputs[1:]:
        torch.testing.assert_close(each, outputs[0])
    import peft

    model, inputs = host()
    torch.testing.assert_close(peft.PeftModel.from_pretrained(model, tmp_path / "both")(**inputs), outputs[0])


def test_what_one_format_cannot_hold_is_written_in_none(tmp_path: Path) -> None:
    injection = peftcore.apply(host()[0], "compacter", bottleneck=4, target="first")
    for formats in (["peftcore", "peft"], ["peft", "peftcore"], ["peftcore", "unheard"]):
        with pytest.raises(ExportError):
            injection.save(tmp_path / "adapter", format=formats)
        assert not (tmp_path / "adapter").exists()
