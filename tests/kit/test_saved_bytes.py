"""Equal adapters are equal bytes in every process, whatever order its sets have."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import peftcore
import torch
from peftcore.testing import HOSTS

torch.manual_seed(0)
model, _ = HOSTS["mlp"].build()
overrides = {"second": {"rank": 3}, "*": {"alpha": 2.0}, "first": {"rank": 5}}
wishes = {"target": ["second", "first"], "exclude": ["norm", "re:h.*", *"edcba"], "train": ["norm", "head"]}
peftcore.apply(model, "lora", seed=1, overrides=overrides, **wishes).save(sys.argv[1])
"""


@pytest.mark.slow
def test_the_hash_seed_of_the_process_does_not_show(tmp_path: Path) -> None:
    written = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder)], check=True, env=environment)
        written.append({each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in sorted(folder.iterdir())})
    assert len(written[0]) == 3
    assert written[0] == written[1]
