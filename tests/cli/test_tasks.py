"""The tasks of ``peftcore train`` beyond texts and their classes, each from a file or folder to an adapter."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

import peftcore
from peftcore.cli.commands import app
from peftcore.comparing.data.sources import splits
from peftcore.comparing.errors import BadInput
from peftcore.comparing.models.loading import from_pretrained
from peftcore.comparing.runs.reading import read
from peftcore.comparing.runs.run import Run
from peftcore.comparing.tasks.catalogue import TASKS, find
from peftcore.comparing.tasks.token_classification import scores


def trained(*arguments: object) -> dict[str, Any]:
    options = ("--method", "lora", "--set", "method.target=all-linear", "--batch-size", 16, "--json")
    result = CliRunner().invoke(app, ["train", *map(str, (*arguments, *options))])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def configured(model: Path, name: str, source: object) -> Run:
    return read(Run, {}, [("model", str(model)), ("task", name), ("data.train", str(source)), ("method", "lora")])


@pytest.fixture
def tagged(rows: list[dict[str, str]], tmp_path: Path) -> Path:
    """Words that say how it was are tagged."""
    path = tmp_path / "tagged.jsonl"
    told = ("fine", "lovely", "happy", "great", "awful", "sad", "broken", "late")
    lines = [
        {"tokens": (words := row["text"].split()), "ner_tags": ["SAID" if word in told else "O" for word in words]}
        for row in rows
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def test_words_and_tags(encoder: Path, tagged: Path) -> None:
    outcome = trained(
        "--model", encoder, "--task", "token-classification", "--data", tagged, "--steps", 40, "--lr", "3e-2"
    )
    assert outcome["after"]["f1"] > outcome["before"]["f1"] + 0.3


def test_the_first_token_of_a_word_speaks_for_it(encoder: Path, tmp_path: Path) -> None:
    """A word that the vocabulary has not is one token, a dash makes three of two words."""
    path = tmp_path / "tagged.jsonl"
    line = json.dumps({"tokens": ["my-phone", "is", "fine"], "ner_tags": ["A", "O", "B"]})
    path.write_text("\n".join([line] * 5), encoding="utf-8")
    run = configured(encoder, "token-classification", path)
    prepared = find("token-classification").prepare(run, find("token-classification").Data(train=str(path)))
    assert prepared.train[0]["labels"] == [-100, 0, -100, -100, 2, 1, -100]


def test_f1_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, f1_score

    draw = np.random.default_rng(0)
    truth, predicted = draw.integers(-1, 4, (9, 7)), draw.integers(0, 4, (9, 7))
    truth[truth == -1] = -100
    found, counted = scores(predicted, truth, ("A", "B", "C", "O")), truth != -100
    assert found["accuracy"] == pytest.approx(accuracy_score(truth[counted], predicted[counted]))
    expected = f1_score(truth[counted], predicted[counted], labels=[0, 1, 2], average="micro")
    assert found["f1"] == pytest.approx(expected)


@pytest.fixture
def translator(decoder: Path, tmp_path: Path) -> Path:
    """A T5 with the words of the tests."""
    folder = tmp_path / "t5"
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_texts_and_what_becomes_of_them(translator: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    lines = [f"{a} phone,{b}" for a, b in [("my", "fine"), ("the", "lovely"), ("so", "awful")] * 15]
    path.write_text("\n".join(["source,target", *lines]), encoding="utf-8")
    options = ("--steps", 40, "--lr", "3e-2", "--set", 'data.prompts=["my phone"]', "--set", "data.max_length=8")
    outcome = trained("--model", translator, "--task", "seq2seq", "--data", path, *options)
    assert outcome["after"]["perplexity"] < 0.7 * outcome["before"]["perplexity"]
    assert len(outcome["samples"]) == 1


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Zeros and ones, in a folder each."""
    found = load_digits()
    for number, (pixels, digit) in enumerate(zip(found.images, found.target, strict=True)):
        if digit < 2:
            folder = tmp_path / "pictures" / ("zero", "one")[digit]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15).astype("uint8")).save(folder / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    folder = tmp_path / "vit"
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def test_pictures_in_folders(vit: Path, pictures: Path) -> None:
    outcome = trained(
        "--model", vit, "--task", "image-classification", "--data", pictures, "--steps", 20, "--lr", "1e-2"
    )
    assert outcome["after"]["accuracy"] > outcome["before"]["accuracy"] + 0.15


@pytest.fixture
def painter(tmp_path: Path) -> Path:
    """Stable Diffusion with tiny random parts, and a tokenizer that knows the words of digits."""
    diffusers = pytest.importorskip("diffusers")
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        "zero</w>",
        "one</w>",
        *"zero",
        "n",
        "ze",
        "zer",
        "on",
        "e</w>",
        "o</w>",
    ]
    words = list(dict.fromkeys(words))
    tokenizer = transformers.CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[("z", "e"), ("ze", "r"), ("zer", "o</w>"), ("o", "n"), ("on", "e</w>")],
        model_max_length=6,
    )
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    plain = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(latent_channels=4, **plain, **blocks),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            sample_size=8, cross_attention_dim=16, attention_head_dim=4, **kinds, **blocks
        ),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(tmp_path / "painter")
    return tmp_path / "painter"


def test_pictures_of_words(painter: Path, pictures: Path) -> None:
    """The denoiser alone gets the adapter, and the adapter fits the denoiser alone."""
    named = [f"{file.relative_to(pictures)},{file.parent.name}" for file in sorted(pictures.rglob("*.png"))]
    (pictures / "metadata.csv").write_text("\n".join(["file_name,text", *named]), encoding="utf-8")
    outcome = trained(
        *("--model", painter, "--task", "text-to-image", "--data", pictures, "--steps", 20, "--lr", "1e-2"),
        *("--set", 'data.prompts=["zero"]', "--set", "data.prompt_steps=2", "--out", "run"),
    )
    assert outcome["after"]["loss"] < outcome["before"]["loss"]
    assert outcome["samples"] == [["run/samples/0-0.png", "run/samples/0-1.png"]]
    before, after = (np.asarray(Image.open(file), dtype=float) for file in outcome["samples"][0])
    assert np.abs(before - after).max() > 0
    unet = pytest.importorskip("diffusers").UNet2DConditionModel.from_pretrained(painter / "unet")
    assert peftcore.load(unet, "run/adapter").summary().sites > 4
    saved = [path.stat().st_size for path in Path("run/checkpoints").glob("*/model.safetensors")]
    assert saved and max(saved) < 100_000


def test_parquet_and_saved_datasets_say_the_same_as_a_table(csv_file: Path, rows: list[Any], tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    saved = Dataset.from_list([{"text": row["text"], "label": row["label"]} for row in rows], features=features)
    saved.save_to_disk(tmp_path / "saved")
    Dataset.from_list(rows).to_parquet(tmp_path / "table.parquet")
    expected = splits(str(csv_file), None, 20)
    for path in (tmp_path / "saved", tmp_path / "table.parquet"):
        found = splits(str(path), None, 20)
        assert found.train["text"][:] == expected.train["text"][:]
        assert found.held_out["label"][:] == expected.held_out["label"][:]


def test_a_dataset_has_splits_of_its_own(rows: list[Any], tmp_path: Path) -> None:
    DatasetDict(train=Dataset.from_list(rows[:90]), validation=Dataset.from_list(rows[90:])).save_to_disk(
        tmp_path / "d"
    )
    found = splits(str(tmp_path / "d"), None, None)
    assert (len(found.train), len(found.held_out)) == (90, 30)


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.xlsx").write_bytes(b"")
    for name in ("bad.parquet", "empty", "table.xlsx", "nothing/there"):
        with pytest.raises(BadInput, match=name):
            splits(str(tmp_path / name), None, None)


def test_every_task_is_named_and_described() -> None:
    for name in TASKS:
        found = find(name)
        assert found.__doc__ and all(field.description for field in found.Data.model_fields.values())


def test_a_configuration_that_asks_for_code_of_the_hub_gets_attention_of_transformers(
    decoder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(decoder, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    wish = {"attn_implementation": "kernels-community/flash-attn", "experts_implementation": "someone/experts"}
    (folder / "config.json").write_text(json.dumps({**settings, **wish}))
    model = from_pretrained(transformers.AutoModelForCausalLM, folder)
    assert model.config._attn_implementation == "sdpa"
