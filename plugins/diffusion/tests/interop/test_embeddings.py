"""Files of embeddings alone, beside diffusers' `load_textual_inversion` in a tiny pipeline of SDXL with tokenizers.

The files are those of pivotal tuning: huggingface/diffusers@007afd0, examples/advanced_diffusion_training/
train_dreambooth_lora_sdxl_advanced.py, `save_embeddings`, writes the new rows of both tables under these names, and the
page of its results loads them as `read_by_diffusers` does.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_models import assert_same, clip, clip_tokenizer, out
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftcore
from peftcore.errors import CheckpointError, ExportError, HostMismatch
from peftcore.files.save_load import describe

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:::(peft|diffusers|transformers)")

TOKENS = ["<s0>", "<s1>"]
WORDS = {"<s0>": [50], "<s1>": [51]}
PROMPT = "a <s1> b <s0> <s0>"
ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
FILE = "subject_emb.safetensors"
IDS = {"input_ids": torch.tensor([[48, 3, 50, 51, 7, 49]])}


def pipeline(folder: Path) -> Any:
    """The text side of SDXL, its encoders of different widths; nothing else of it sees a word."""
    config = clip(24).config
    config.projection_dim = 8
    torch.manual_seed(1)
    second = transformers.CLIPTextModelWithProjection(config).eval()
    folder.mkdir()
    tokenizers = [clip_tokenizer(folder / name) for name in ("one", "two")]
    return diffusers.StableDiffusionXLPipeline(
        vae=None, text_encoder=clip(16), text_encoder_2=second, tokenizer=tokenizers[0], tokenizer_2=tokenizers[1],
        unet=None, scheduler=None, add_watermarker=False,
    )  # fmt: skip


def grown(folder: Path) -> Any:
    """One whose tokenizers and tables have the new tokens, with rows that say nothing."""
    pipe = pipeline(folder)
    for encoder, tokenizer in ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2)):
        tokenizer.add_tokens(TOKENS)
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        encoder.get_input_embeddings().weight.data[50:] = 0.0
    return pipe


def read_by_diffusers(pipe: Any, tensors: dict[str, Tensor]) -> Any:
    pipe.load_textual_inversion(
        tensors["clip_l"], token=TOKENS, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer
    )
    pipe.load_textual_inversion(
        tensors["clip_g"], token=TOKENS, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
    )
    return pipe


@torch.no_grad()
def encoded(pipe: Any) -> Tensor:
    """What the UNet would see of a prompt: the states of both encoders, and the pooled ones of the second."""
    states, _, pooled, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, device=torch.device("cpu"))
    return torch.cat([states.flatten(), pooled.flatten()])


def test_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    tensors = {"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 24)}
    save_file(tensors, tmp_path / FILE)
    theirs, ours = read_by_diffusers(pipeline(tmp_path / "theirs"), tensors), grown(tmp_path / "ours")
    assert theirs.tokenizer.convert_tokens_to_ids(TOKENS) == [50, 51]
    base = encoded(ours)
    for name in ENCODERS:
        injection = peftcore.load(ours.components[name], tmp_path / FILE, words=WORDS)
        assert (injection.method.name, injection.config.words) == ("textual_inversion", TOKENS)
    assert_same(encoded(ours), encoded(theirs), base)
    about = describe(tmp_path / FILE)
    assert (about.format, about.methods, about.parts) == ("embeddings", ("textual_inversion",), ("clip_g", "clip_l"))


def test_written_as_diffusers_reads_it(tmp_path: Path) -> None:
    """The file of a pipeline is the union of those of its encoders; the rows are those of the tokens in their order."""
    ours = grown(tmp_path / "ours")
    base, tensors = encoded(ours), {}
    for name, part in ENCODERS.items():
        injection = peftcore.apply(ours.components[name], "textual_inversion", tokens=[50, 51])
        (vectors,) = injection.parameters()
        vectors.data.normal_()
        injection.save(tmp_path / f"{part}.safetensors", format=f"embeddings/{part}")
        tensors |= load_file(tmp_path / f"{part}.safetensors")
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {"clip_l": (2, 16), "clip_g": (2, 24)}
    assert_same(encoded(ours), encoded(read_by_diffusers(pipeline(tmp_path / "theirs"), tensors)), base)


def test_ids_are_those_of_the_rows_in_the_order_of_the_words(tmp_path: Path) -> None:
    """And a file that is read is written again as it was, by `save` into a folder too."""
    vectors = torch.randn(3, 16)
    save_file({"clip_l": vectors}, tmp_path / FILE)
    model = clip(16)
    model.resize_token_embeddings(53, mean_resizing=False)
    injection = peftcore.load(model, tmp_path / FILE, words={"b": [52, 50], "a": [51]})
    expected = clip(16)
    expected.resize_token_embeddings(53, mean_resizing=False)
    expected.get_input_embeddings().weight.data[[52, 50, 51]] = vectors
    assert torch.equal(out(model, IDS), out(expected, IDS))
    injection.save(tmp_path / "again", format="embeddings/clip_l")
    assert torch.equal(load_file(tmp_path / "again/embeddings.safetensors")["clip_l"], vectors)
    assert peftcore.load(clip(16), tmp_path / "again", words={"b": [1, 2, 3]}).config.tokens == [1, 2, 3]


def test_an_encoder_of_t5_has_two_names_for_its_table(tmp_path: Path) -> None:
    """Flux: ``t5`` beside ``clip_l``."""
    config = transformers.T5Config(vocab_size=50, d_model=12, d_ff=16, num_layers=1, num_heads=2, d_kv=6)
    model = transformers.T5EncoderModel(config).eval()
    save_file({"clip_l": torch.randn(1, 16), "t5": torch.full((1, 12), 0.5)}, tmp_path / FILE)
    peftcore.load(model, tmp_path / FILE, words={"<s0>": [7]}).bake()
    assert torch.equal(model.shared.weight[7], torch.full((12,), 0.5))
    assert torch.equal(model.encoder.embed_tokens.weight, model.shared.weight)


@pytest.mark.parametrize(
    ("change", "words", "error", "message"),
    [
        ({}, None, CheckpointError, r"words=.*<s0>.*: \[id\], ...}, one id for each row of clip_l \(2, 16\)"),
        ({}, {"<s0>": [49]}, CheckpointError, "needs one id for each row, but words= has 1"),
        ({}, {"<s0>": [48], "<s1>": [48]}, HostMismatch, "has a token twice"),
        ({}, {"<s0>": [49, 50]}, HostMismatch, r"has 50 rows, none for \[50\]"),
        ({"clip_l": torch.ones(2, 15)}, {"<s0>": [48, 49]}, HostMismatch, "none of its vectors fit .*, of width 16"),
        ({"clip_l": torch.ones(16)}, {"<s0>": [48]}, HostMismatch, "none of its vectors fit .*, of width 16"),
        ({"clip_g": torch.ones(2, 16)}, {"<s0>": [48, 49]}, HostMismatch, "clip_g and clip_l all fit"),
        ({"clip_l": torch.full((2, 16), torch.inf)}, {"<s0>": [48, 49]}, CheckpointError, "not finite"),
        ({"clip_x": torch.ones(2, 16)}, {"<s0>": [48, 49]}, CheckpointError, "not an adapter in a known format"),
    ],
)
def test_refused(change: Any, words: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    model = clip(16)
    save_file({"clip_l": torch.randn(2, 16)} | change, tmp_path / FILE)
    before = out(model, IDS | {"input_ids": IDS["input_ids"].clamp(max=49)})
    with pytest.raises(error, match=message):
        peftcore.load(model, tmp_path / FILE, words=words)
    assert torch.equal(out(model, IDS | {"input_ids": IDS["input_ids"].clamp(max=49)}), before)
    assert not peftcore.injections(model)


def test_a_model_of_pictures_has_no_place_for_it(tmp_path: Path) -> None:
    save_file({"clip_l": torch.randn(2, 16)}, tmp_path / FILE)
    with pytest.raises(HostMismatch, match="no token embedding"):
        peftcore.load(torch.nn.Linear(16, 16), tmp_path / FILE, words=WORDS)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    def refused(message: str, method: str = "textual_inversion", part: str = "/clip_l", **options: Any) -> None:
        with pytest.raises(ExportError, match=message):
            peftcore.apply(clip(16), method, **options).save(tmp_path, format=f"embeddings{part}")

    refused('pass its name: "embeddings/clip_l", "embeddings/clip_g", "embeddings/t5"', part="", tokens=[4])
    refused("no part 'clip_h'", part="/clip_h", tokens=[4])
    refused("rows of one textual inversion at one table, not lora", "lora", target=["q_proj"])
    refused("not xti", "xti", tokens=[4], target=["token_embedding"])
    refused("at 3 modules", tokens=[4], train=["final_layer_norm"])
    model = clip(16)
    peftcore.apply(model, "lora", target=["q_proj"], name="first")
    model.resize_token_embeddings(53, mean_resizing=False)
    with pytest.raises(ExportError, match="1 rows were added"):
        peftcore.apply(model, "textual_inversion", tokens=[50, 51]).save(tmp_path, format="embeddings/clip_l")
    assert not any(tmp_path.iterdir())
