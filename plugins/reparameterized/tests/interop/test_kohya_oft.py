"""OFT and BOFT in files of LyCORIS, both ways, with the real LyCORIS on a small UNet, and in those of sd-scripts."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris_files import of_inputs, read_by_them, read_into_their_network, theirs, unet
from pipeline_models import assert_same, out
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, ExportError
from peftcore.files.formats.kohya import TENSORS

TARGET = ["to_q", "to_k", "to_v", "conv1", "conv2", "proj_in", "net.0.proj"]
READ: dict[str, tuple[str, str, dict[str, Any]]] = {
    "diag-oft": ("diag-oft", "oft", {"lora_dim": 2, "conv_lora_dim": 4}),
    "rescaled": ("diag-oft", "oft", {"lora_dim": 2, "conv_lora_dim": 4, "rescaled": True}),
    "constrained": ("diag-oft", "oft", {"lora_dim": 4, "conv_lora_dim": 4, "constraint": 0.01}),
    "boft": ("boft", "boft", {"lora_dim": 2, "conv_lora_dim": 4}),
    "boft-wide": ("boft", "boft", {"lora_dim": 4, "conv_lora_dim": 8, "rescaled": True}),
}
"""Their algorithm, our method, their options."""


@pytest.mark.parametrize("form", READ)
def test_what_they_wrote(form: str, tmp_path: Path) -> None:
    algorithm, method, options = READ[form]
    model, inputs = unet()
    base, file = deepcopy(model), tmp_path / "their.safetensors"
    expected = theirs(model, file, 0.1, network_module=algorithm, **options)
    injection = peftcore.load(model, file)
    assert injection.method.name == method
    for ours, its, before in zip(*(of_inputs(each, inputs) for each in (model, expected, base)), strict=True):
        assert_same(ours, its, before)
    injection.save(tmp_path / "ours")
    again = deepcopy(base)
    assert peftcore.load(again, tmp_path / "ours").config == injection.config
    assert torch.equal(out(again, inputs), out(model, inputs))
    injection.save(tmp_path / "back", format="kohya/lycoris")
    before, after = load_file(file), load_file(tmp_path / "back" / TENSORS)
    assert before.keys() <= after.keys()  # gains of one are written, too
    for name, value in before.items():
        skew = (lambda X: X - X.mT) if name.endswith("oft_blocks") else lambda X: X
        torch.testing.assert_close(skew(after[name]), skew(value), check_dtype=False)


WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "oft": ("oft", {"block_size": 2}),
    "coft": ("oft", {"block_size": 2, "eps": 0.01}),
    "shared": ("oft", {"block_size": 2, "block_share": True}),
    "rescaled": ("oft", {"block_size": 2, "rescaled": True}),
    "constrained": ("oft", {"block_size": 2, "constraint": 0.01, "block_share": True}),
    "one factor": ("boft", {"block_size": 2, "factors": 1}),
    "two factors": ("boft", {"block_size": 4, "factors": 2}),
}


@pytest.mark.share(3)
@pytest.mark.parametrize("reads", [read_by_them, read_into_their_network])
@pytest.mark.parametrize("form", WRITTEN)
def test_what_they_read(form: str, reads: Any, tmp_path: Path) -> None:
    method, options = WRITTEN[form]
    model, inputs = unet()
    base = deepcopy(model)
    injection = peftcore.apply(model, method, target=TARGET, side="outputs", **options)
    for operator in injection.operators.values():
        for name, parameter in operator.named_parameters():
            nn.init.normal_(parameter, float(name == "gain"), 0.1)
    injection.save(tmp_path, format="kohya/lycoris")
    size = options["block_size"]
    theirs = {
        "network_module": "diag-oft" if method == "oft" or options["factors"] == 1 else "boft",
        "lora_dim": size, "conv_lora_dim": size, "rescaled": method == "boft" or "rescaled" in options,
        "constraint": options.get("constraint", 0.0),
    }  # fmt: skip
    expected = reads(base, tmp_path, **(theirs if reads is read_into_their_network else {}))
    for ours, its, before in zip(*(of_inputs(each, inputs) for each in (model, expected, unet()[0])), strict=True):
        assert_same(ours, its, before)


def test_a_constraint_of_butterflies_is_read_into_the_rotations(tmp_path: Path) -> None:
    model, inputs = unet()
    base, file = deepcopy(model), tmp_path / "their.safetensors"
    sizes = {"lora_dim": 4, "conv_lora_dim": 4, "constraint": 0.01}
    expected = theirs(model, file, 0.1, network_module="boft", **sizes)
    with pytest.warns(UserWarning, match=r"trained with a constraint \(alpha = 0.01\)"):
        peftcore.load(model, file)
    assert_same(out(model, inputs), out(expected, inputs), out(base, inputs))


def sd_scripts(weight: Tensor, blocks: Tensor, alpha: float) -> Tensor:
    """The weight that networks/oft.py of sd-scripts makes, as of 48d368f."""
    Q = blocks - blocks.mT
    limit, norm = alpha * len(weight), Q.norm()
    Q = Q * ((norm.clamp(max=limit) + 1e-8) / (norm + 1e-8))
    eye = torch.eye(Q.shape[-1]).expand_as(Q)
    R = torch.block_diag(*(eye + Q) @ torch.linalg.inv(eye - Q))
    return (R.T @ weight.flatten(1)).view(weight.shape)


@pytest.mark.parametrize("alpha", [0.0, 0.02, 10.0])
def test_what_sd_scripts_wrote(alpha: float, tmp_path: Path) -> None:
    model, inputs = unet()
    base, expected, tensors = deepcopy(model), deepcopy(model), {}
    for path, module in expected.named_modules():
        if path.endswith(("to_q", "to_k", "to_v")):
            blocks = 0.1 * torch.randn(4, len(module.weight) // 4, len(module.weight) // 4)
            tensors |= {f"oft_unet_{path}".replace(".", "_") + ".oft_blocks": blocks}
            tensors |= {f"oft_unet_{path}".replace(".", "_") + ".alpha": torch.tensor(alpha)}
            module.weight.data = sd_scripts(module.weight.data, blocks, alpha)
    save_file(tensors, tmp_path / TENSORS)
    injection = peftcore.load(model, tmp_path)
    assert_same(out(model, inputs), out(expected, inputs), out(base, inputs) if alpha > 0 else torch.zeros(()))
    with pytest.raises(ExportError, match="peftcore only reads oft_unet"):
        injection.save(tmp_path / "back", format="kohya/oft_unet")


@pytest.mark.parametrize(
    ("method", "layer", "options", "message"),
    [
        ("oft", nn.Linear(8, 16), {"block_size": 4}, r"0 rotates inputs; set side='outputs'"),
        ("boft", nn.Linear(8, 16), {"block_size": 4}, r"0 rotates inputs; set side='outputs'"),
        ("oft", nn.Linear(8, 16), {"block_size": 8, "side": "outputs"}, "set a smaller block_size"),
        ("oft", nn.Linear(8, 16), {"block_size": 4, "side": "outputs", "series": 5}, "series=None"),
        ("boft", nn.Linear(8, 24), {"block_size": 4, "side": "outputs"}, r"butterflies of 2\^n blocks, .* 24 .* in 6"),
    ],
)
def test_not_written(method: str, layer: nn.Module, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    injection = peftcore.apply(nn.Sequential(layer), method, target="0", **options)
    with pytest.raises(ExportError, match=message):
        injection.save(tmp_path / "adapter", format="kohya")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"oft_blocks": torch.ones(16, 1, 1)}, "blocks of width 1 cannot rotate"),
        ({"oft_blocks": torch.ones(2, 4, 4)}, r"\(2, 4, 4\), expected \(4, 4, 4\)|has 8 outputs"),
        ({"oft_blocks": torch.ones(4, 4, 4), "rescale": torch.ones(8, 1)}, r"rescale has shape \(8, 1\)"),
        ({"oft_blocks": torch.ones(4, 4)}, "no installed plugin reads"),
        ({"rescale": torch.ones(16, 1)}, "no installed plugin reads"),
    ],
)
def test_refused(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file({f"lycoris_0.{name}": value for name, value in tensors.items()}, tmp_path / TENSORS)
    model = nn.Sequential(nn.Linear(8, 16))
    with pytest.raises(CheckpointError, match=message):
        peftcore.load(model, tmp_path)


@pytest.mark.parametrize("method", ["oft", "boft"])
def test_peft_turns_inputs_alone(method: str, tmp_path: Path) -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(8, 16)), method, target="0", block_size=4, side="outputs")
    with pytest.raises(ExportError, match="it rotates only inputs"):
        injection.save(tmp_path / "adapter", format="peft")
