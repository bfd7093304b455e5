"""Words in files of kohya, beside LoRA of the same text encoder.

The vectors are taken out of the file by the rule of the webui and given to diffusers' `load_textual_inversion`, which
adds them to tokenizer and table by itself; the LoRA is given to diffusers as a file without them.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_models import assert_same, clip, clip_tokenizer, out
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, ConfigError, ExportError, HostMismatch
from peftcore.files.formats.kohya import TENSORS
from peftcore.files.save_load import describe

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:::(peft|diffusers|transformers)")

WORDS = {"<cat>": [50, 51], "<dog>": [52]}
IDS = {"input_ids": torch.tensor([[48, 3, 50, 51, 7, 49], [48, 52, 4, 51, 50, 49]])}
NAMES = ["<cat>", "<cat>", "<dog>"]
Q = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def by_the_webui(tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The words of a file by the rule of stable-diffusion-webui's `load_network` and `create_embedding_from_data`.

    Read in wkpark/stable-diffusion-webui@a5e057d, a copy of AUTOMATIC1111's, extensions-builtin/Lora/networks.py: the
    name of a word ends at the first dot, and what is left is ``string_to_param.*`` or the name of an encoder. Those of
    Nerogar/OneTrainer@1e927f0, modules/modelSaver/stableDiffusion/StableDiffusionLoRASaver.py, are ``clip_l`` and
    ``clip_l_out``.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, value in tensors.items():
        front, _, rest = name.partition(".")
        if front == "bundle_emb":
            word, kind = rest.split(".", 1)
            kind, _, below = kind.partition(".")
            found.setdefault(word, {})[kind] = {below: value} if kind == "string_to_param" else value
    return found


def grown(hidden: int = 16) -> Any:
    """A text encoder with three new tokens."""
    model = clip(hidden)
    torch.manual_seed(3)
    model.resize_token_embeddings(53, mean_resizing=False)
    return model


def adapted(**options: Any) -> tuple[Any, Any, peftcore.Injection]:
    """A text encoder, and a copy with words and LoRA, with noise in both."""
    pytest.importorskip("peftcore_hybrid")
    base = grown()
    model = deepcopy(base)
    parts = [
        {"method": "lora", "rank": 2, "alpha": 3.0},
        {"method": "textual_inversion", "tokens": [50, 51, 52], "words": NAMES, **options},
    ]
    targets = [["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], ["token_embedding"]]
    injection = peftcore.apply(
        model, "config_union", parts=[{**part, "target": target} for part, target in zip(parts, targets, strict=True)]
    )
    for parameter in injection.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return base, model, injection


def read_by_diffusers(file: Path, folder: Path, kind: str) -> nn.Module:
    """The text encoder of a pipeline that read the file: its words and its LoRA."""
    tokenizer = clip_tokenizer(folder)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=clip(16), tokenizer=tokenizer, unet=None, scheduler=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    tensors = load_file(file)
    for word, held in by_the_webui(tensors).items():
        vectors = held[kind]["*"] if kind == "string_to_param" else held[kind]
        pipeline.load_textual_inversion({word: vectors})
    assert tokenizer.convert_tokens_to_ids(["<cat>", "<cat>_1", "<dog>"]) == [50, 51, 52]
    lora = {name: value for name, value in tensors.items() if not name.startswith("bundle_emb")}
    state, alphas = diffusers.StableDiffusionPipeline.lora_state_dict(lora)
    pipeline.load_lora_into_text_encoder(state, alphas, pipeline.text_encoder)
    encoder: nn.Module = pipeline.text_encoder
    return encoder


def test_written_beside_lora_as_diffusers_reads_it(tmp_path: Path) -> None:
    base, model, injection = adapted()
    injection.save(tmp_path, format="kohya")
    held = by_the_webui(load_file(tmp_path / TENSORS))
    assert {word: value["string_to_param"]["*"].shape for word, value in held.items()} == {
        "<cat>": (2, 16), "<dog>": (1, 16),
    }  # fmt: skip
    theirs = read_by_diffusers(tmp_path / TENSORS, tmp_path / "tokenizer", "string_to_param")
    assert_same(out(model, IDS), out(theirs, IDS), out(base, IDS))
    again = grown()
    again.get_input_embeddings().weight.data[50:] = 7.0  # its own new rows do not matter
    read = peftcore.load(again, tmp_path, words=WORDS)
    assert {part.method.name for part in read.parts.values()} == {"lora", "textual_inversion"}
    assert_same(out(again, IDS), out(theirs, IDS), out(base, IDS))
    read.save(tmp_path / "again", format="kohya")
    assert load_file(tmp_path / "again" / TENSORS).keys() == load_file(tmp_path / TENSORS).keys()


def test_read_for_two_text_encoders(tmp_path: Path) -> None:
    """SDXL: by the names of the models where the file has LoRA of both, or by width; ids in any order."""
    small, large = grown(), grown(24)
    tensors = {
        "bundle_emb.cat.clip_l": torch.randn(2, 16), "bundle_emb.cat.clip_g": torch.randn(2, 24),
        "lora_unet_conv_in.alpha": torch.tensor(1.0),
    }  # fmt: skip
    save_file(tensors, tmp_path / TENSORS)
    assert describe(tmp_path).words == {"cat": 2}
    for model, name in ((small, "clip_l"), (large, "clip_g")):
        expected = deepcopy(model)
        expected.get_input_embeddings().weight.data[[52, 50]] = tensors[f"bundle_emb.cat.{name}"]
        before = out(model, IDS)
        injection = peftcore.load(model, tmp_path, words={"cat": [52, 50]})
        assert_same(out(model, IDS), out(expected, IDS), before)
        part = {"clip_l": "lora_te1", "clip_g": "lora_te2"}[name]
        injection.save(tmp_path / name, format=f"kohya/{part}")
        (written,) = load_file(tmp_path / name / TENSORS).items()
        assert written[0] == f"bundle_emb.cat.{name}"
        assert torch.equal(written[1], tensors[written[0]])


def test_a_model_of_pictures_takes_its_part(tmp_path: Path) -> None:
    base = clip(16)
    model = nn.Module()
    model.down_blocks, model.up_blocks = nn.ModuleList([nn.Linear(4, 4)]), nn.ModuleList([nn.Linear(4, 4)])
    tensors = {
        "lora_unet_down_blocks_0.lora_down.weight": torch.randn(2, 4),
        "lora_unet_down_blocks_0.lora_up.weight": torch.randn(4, 2),
        "bundle_emb.cat.clip_l": torch.randn(1, 16),
    }
    save_file(tensors, tmp_path / TENSORS)
    assert peftcore.load(model, tmp_path).method.name == "lora"
    with pytest.raises(HostMismatch, match="no token embedding"):
        peftcore.load(deepcopy(model), tmp_path, words={"cat": [1]})
    assert peftcore.load(base, tmp_path, words={"cat": [1]}).method.name == "textual_inversion"


@pytest.mark.parametrize(
    ("change", "words", "error", "message"),
    [
        ({}, None, CheckpointError, r"unknown bundle_emb\.cat\.clip_l: load words .*words=\{'cat': \[id, id\]\}"),
        ({}, {"cat": [50]}, CheckpointError, "needs one id for each vector, and has 1"),
        ({}, {"cow": [50]}, CheckpointError, "has no word 'cow'; it has: cat"),
        ({}, {"cat": [50, 53]}, HostMismatch, r"has 53 rows, none for \[53\]"),
        ({}, {"cat": [50, 50]}, HostMismatch, "has a token twice"),
        ({"bundle_emb.cat.clip_l": torch.ones(2, 15)}, {"cat": [50, 51]}, HostMismatch, "have the width 16"),
        ({"bundle_emb.cat.string_to_param.*": torch.ones(2, 16)}, {"cat": [50, 51]}, HostMismatch, "all fit"),
        ({"bundle_emb.cat.clip_l_out": torch.ones(2, 16)}, {"cat": [50, 51]}, CheckpointError, "unknown .*clip_l_out"),
        ({"bundle_emb.dog.clip_l": torch.ones(1, 16)}, {"cat": [50, 51]}, CheckpointError, "unknown bundle_emb.dog"),
        ({"bundle_emb.cat.llama": torch.ones(2, 16)}, {"cat": [50, 51]}, CheckpointError, "unknown bundle_emb.cat.ll"),
        ({"bundle_emb.cat.clip_l": torch.full((2, 16), torch.nan)}, {"cat": [50, 51]}, CheckpointError, "not finite"),
    ],
)
def test_refused(change: Any, words: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    model = grown()
    tensors = {
        f"{Q}.lora_down.weight": torch.randn(2, 16), f"{Q}.lora_up.weight": torch.randn(16, 2),
        "bundle_emb.cat.clip_l": torch.randn(2, 16),
    }  # fmt: skip
    save_file(tensors | change, tmp_path / TENSORS)
    before = out(model, IDS)
    with pytest.raises(error, match=message):
        peftcore.load(model, tmp_path, words=words)
    assert torch.equal(out(model, IDS), before)
    assert not peftcore.injections(model)


def test_a_file_without_words_takes_none(tmp_path: Path) -> None:
    model = grown()
    save_file(
        {f"{Q}.lora_down.weight": torch.randn(2, 16), f"{Q}.lora_up.weight": torch.randn(16, 2)}, tmp_path / TENSORS
    )
    with pytest.raises(CheckpointError, match="has no word 'cat'; it has: none"):
        peftcore.load(model, tmp_path, words={"cat": [50]})
    peftcore.apply(model, "lora", target=["q_proj"], rank=2).save(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="files of peftcore contain no words"):
        peftcore.load(clip(16), tmp_path / "ours", words={"cat": [50]})


def test_what_cannot_be_written(tmp_path: Path) -> None:
    def refused(message: str, method: str = "textual_inversion", part: str = "", **options: Any) -> None:
        with pytest.raises(ExportError, match=message):
            peftcore.apply(grown(), method, **options).save(tmp_path, format=f"kohya{part}")

    all_three = {"tokens": [50, 51, 52], "words": NAMES}
    refused("names of the words", tokens=[50, 51, 52])
    refused("and has no dot", tokens=[50, 51, 52], words=["a.b"] * 3)
    refused("not of 'lora_unet'", part="/lora_unet", **all_three)
    refused("no method that computes the same as xti", "xti", tokens=[50, 51, 52], target=["token_embedding"])
    with pytest.raises(ConfigError, match="has 2 names, but tokens= has 1"):
        peftcore.apply(grown(), "textual_inversion", tokens=[50], words=["a", "b"])
    model = clip(16)
    peftcore.apply(model, "lora", target=["q_proj"], name="first")
    model.resize_token_embeddings(53, mean_resizing=False)
    two = peftcore.apply(model, "textual_inversion", tokens=[50, 51], words=["a", "b"])
    with pytest.raises(ExportError, match="1 rows were added"):
        two.save(tmp_path, format="kohya")
    assert not any(tmp_path.iterdir())
