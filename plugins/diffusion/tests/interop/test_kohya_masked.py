"""T-LoRA written for LyCORIS and for what reads LoRA, with the real LyCORIS and its masks on a small UNet."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules import tlora
from lycoris_files import read_by_them, unet
from pipeline_models import assert_same, out
from safetensors.torch import load_file
from torch import nn

import peftcore
from peftcore.files.formats.kohya import TENSORS

TARGET = ["to_q", "to_k", "to_v", "proj_in", "net.0.proj"]
TOLD = pytest.warns(UserWarning, match="do not store a rank for each timestep")


def adapted(**options: Any) -> tuple[nn.Module, nn.Module, dict[str, Any], peftcore.Injection]:
    """A base, a copy with noise in T-LoRA's tensors, and inputs."""
    base, inputs = unet()
    model = deepcopy(base)
    injection = peftcore.apply(model, "tlora", target=TARGET, rank=4, min_rank=1, alpha=3.0, **options)
    for parameter in injection.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return base, model, inputs, injection


def test_lycoris_masks_what_it_reads(tmp_path: Path) -> None:
    base, model, inputs, injection = adapted(start="weight", part="principal")
    with TOLD:
        injection.save(tmp_path, format="kohya/lycoris")
    theirs = read_by_them(base, tmp_path)
    try:
        for step in (0, 400, 999):
            tlora.set_timestep_mask(tlora.compute_timestep_mask(step, 1000, 4, 1))
            given = inputs | {"timestep": torch.tensor([step, step])}
            assert_same(out(model, given), out(theirs, given), out(base, given))
    finally:
        tlora.clear_timestep_mask()


@pytest.mark.parametrize(
    ("options", "rank"), [({}, 8), ({"start": "zero"}, 4), ({"start": "weight", "part": "last"}, 8)]
)
def test_any_other_start_is_written_as_lora(options: dict[str, Any], rank: int, tmp_path: Path) -> None:
    base, model, inputs, injection = adapted(**options)
    with TOLD:
        injection.save(tmp_path, format="kohya/lycoris")
    names = {name.partition(".")[2] for name in load_file(tmp_path / TENSORS)}
    assert names == {"lora_down.weight", "lora_up.weight", "alpha"}
    given, again = inputs | {"timestep": torch.tensor([0, 0])}, deepcopy(base)
    read = peftcore.load(again, tmp_path)
    assert (read.method.name, read.config.rank) == ("lora", rank)
    for other in (again, read_by_them(base, tmp_path)):
        assert_same(out(model, given), out(other, given), out(base, given))


def test_nothing_is_told_where_all_ranks_always_act(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    base, _ = unet()
    peftcore.apply(base, "tlora", target="to_q", rank=4, min_rank=4).save(tmp_path, format="kohya")
    assert not [each for each in recwarn if "timestep" in str(each.message)]
