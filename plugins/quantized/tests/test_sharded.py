"""Quantized models in two processes (FSDP2 on gloo): the same as whole, or refused by name before anything is cut."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from peftcore.injection.quantization import schemes

REFUSED = ("bnb-int8", "torchao-int8", "torchao-int4", "torchao-float8", "quanto")


@pytest.mark.slow
def test_each_scheme_is_sharded_or_refused(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).with_name("sharded_schemes.py")
    done = subprocess.run([*launch, str(script), str(tmp_path / "found.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert {*found} == {*schemes(), "quanto"}
    for name, said in found.items():
        assert said.startswith("refused: ") if name in REFUSED else said == "same", (name, said)
