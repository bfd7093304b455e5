"""The tasks of ``peftcore train`` beyond texts and their classes, each from a file or folder to an adapter."""

import importlib
import importlib.util
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from slowly import quick
from typer.testing import CliRunner

import peftcore
from peftcore.cli.commands import app


def trained(*arguments: object, target: str = "all-linear") -> dict[str, Any]:
    options = ("--method", "lora", "--set", f"method.target={target}", "--batch-size", 16, "--json")
    result = CliRunner().invoke(app, ["train", *map(str, (*arguments, *options))])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


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


@pytest.fixture(params=["by transformers", "by timm"])
def timm_vit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model of timm with classes of its own, as either library saves it."""
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 7}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes)
    timm.models.save_for_hf(model, tmp_path / "timm", model_args=sizes, safe_serialization=True)
    if request.param == "by transformers":
        config = json.loads((tmp_path / "timm" / "config.json").read_text(encoding="utf-8"))
        del config["model_args"]["num_classes"]
        (tmp_path / "timm" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path / "timm"


@pytest.mark.slow
def test_pictures_for_a_model_of_timm(timm_vit: Path, pictures: Path) -> None:
    """Its head, which is inside of what transformers wraps, is new."""
    outcome = trained(
        "--model", timm_vit, "--task", "image-classification", "--data", pictures, "--steps", 40, "--lr", "3e-2"
    )
    assert outcome["after"]["accuracy"] > outcome["before"]["accuracy"] + 0.15
    saved = json.loads(Path(outcome["saved"], "adapter.json").read_text(encoding="utf-8"))
    assert "timm_model.head" in json.dumps(saved)


@pytest.fixture
def masked(pictures: Path) -> Path:
    """Each digit beside where its ink is (1 of a zero, 2 of a one), but for a border that is no class."""
    folder, rows = pictures.parent / "masked", []
    (folder / "masks").mkdir(parents=True)
    for number, file in enumerate(sorted(pictures.rglob("*.png"))[::6]):
        pixels = np.kron(np.asarray(Image.open(file)), np.ones((4, 4))).astype("uint8")
        mask = (pixels > 100).astype("uint8") * (1 if file.parent.name == "zero" else 2)
        mask[0], mask[-1] = 255, 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
        rows.append(f"{number}.png,masks/{number}.png")
    (folder / "metadata.csv").write_text("\n".join(["file_name,mask_file_name", *rows]), encoding="utf-8")
    return folder


def segformer(folder: Path) -> Path:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[2, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    )
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder)
    transformers.SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def beit(folder: Path) -> Path:
    config = transformers.BeitConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        out_indices=[0, 1, 2, 3],
        use_auxiliary_head=False,
    )
    transformers.BeitForSemanticSegmentation(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.BeitImageProcessor(size=size, crop_size=size, do_center_crop=False).save_pretrained(folder)
    return folder


def upernet_on_timm(folder: Path) -> Path:
    pytest.importorskip("timm")
    backbone = transformers.TimmBackboneConfig(
        backbone="resnet18", out_indices=[1, 2, 3, 4], use_pretrained_backbone=False
    )
    config = transformers.UperNetConfig(backbone_config=backbone, hidden_size=16, use_auxiliary_head=False)
    transformers.UperNetForSemanticSegmentation(config).save_pretrained(folder)
    transformers.SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "target", "steps"),
    [
        (segformer, "all-linear", 30),
        (beit, "all-linear", 30),
        (upernet_on_timm, "conv", 150),
    ],
)
def test_classes_of_pixels(masked: Path, tmp_path: Path, make: Any, target: str, steps: int) -> None:
    torch.manual_seed(0)
    options = ("--task", "segmentation", "--data", masked, "--steps", steps, "--lr", "1e-2")
    outcome = trained("--model", make(tmp_path / "model"), *options, target=target)
    assert outcome["after"]["mean_iou"] > outcome["before"]["mean_iou"] + 0.05


def test_a_class_that_is_none(masked: Path, tmp_path: Path) -> None:
    model = segformer(tmp_path / "model")
    command = ("train", "--model", model, "--task", "segmentation", "--data", masked, "--method", "lora")
    result = CliRunner().invoke(app, [*map(str, command), "--set", 'data.classes=["paper", "zero"]'])
    assert result.exit_code == 2 and "class 2, but the classes are 0 to 1" in " ".join(result.stderr.split())


def goes_on(*arguments: object) -> str:
    """What is said to a run that goes on from an adapter."""
    shutil.rmtree("second", ignore_errors=True)
    command = ("train", "--adapter", "first/adapter", "--steps", 1, "--out", "second", *arguments)
    result = CliRunner().invoke(app, [*map(str, command)])
    return " ".join(result.stderr.split()) if result.exit_code == 2 else f"code {result.exit_code}"


def test_a_head_for_tags_is_gone_on_from_by_their_names(encoder: Path, tagged: Path) -> None:
    options = ("--model", encoder, "--task", "token-classification", "--data", tagged)
    trained(*options, "--steps", 1, "--out", "first")
    tagged.write_text(tagged.read_text(encoding="utf-8").replace("SAID", "TOLD"), encoding="utf-8")
    assert "differ from the 2 classes of the adapter's head, 'O', 'SAID': the head lacks 'TOLD'" in goes_on(*options)


def test_a_head_for_pictures_is_gone_on_from_by_their_classes(vit: Path, pictures: Path) -> None:
    options = ("--model", vit, "--task", "image-classification", "--data", pictures)
    trained(*options, "--steps", 1, "--out", "first")
    assert goes_on(*options) == "code 0"
    (pictures / "zero").rename(pictures / "nought")
    assert "the head lacks 'nought' and no row has 'zero'" in goes_on(*options)


def test_a_head_for_pixels_is_gone_on_from_by_their_classes(masked: Path, tmp_path: Path) -> None:
    """Numbers in masks are not renamed, so that another order is another head."""
    options = ("--model", segformer(tmp_path / "model"), "--task", "segmentation", "--data", masked)
    named = "--set", 'data.classes=["paper", "zero", "one"]'
    trained(*options, *named, "--steps", 1, "--out", "first")
    assert goes_on(*options, *named) == "code 0"
    other = goes_on(*options, "--set", 'data.classes=["paper", "one", "zero"]')
    assert "for the classes paper, zero, one, in this order" in other and "mean paper, one, zero" in other


@pytest.fixture
def painter(tmp_path: Path) -> Path:
    pytest.importorskip("diffusers")
    return importlib.import_module("painters").saved("stable-diffusion", tmp_path / "painter")


@pytest.fixture
def named_pictures(pictures: Path) -> Path:
    named = [f"{file.relative_to(pictures)},{file.parent.name}" for file in sorted(pictures.rglob("*.png"))]
    (pictures / "metadata.csv").write_text("\n".join(["file_name,text", *named]), encoding="utf-8")
    return pictures


@pytest.mark.slow
def test_pictures_of_words(painter: Path, named_pictures: Path) -> None:
    """The denoiser alone gets the adapter, and the adapter fits the denoiser alone."""
    outcome = trained(
        *("--model", painter, "--task", "text-to-image", "--data", named_pictures, "--steps", 20, "--lr", "1e-2"),
        *("--set", 'data.prompts=["zero"]', "--set", "data.prompt_steps=2", "--out", "run"),
        *("--set", "data.prompts_during=true", "--set", "training.evaluate_every=10"),
    )
    assert outcome["after"]["loss"] < outcome["before"]["loss"]
    assert outcome["samples"] == [["run/samples/0-0.png", "run/samples/0-2.png"]]
    assert Image.open("run/samples.png").size == (2 + 3 * 162, 2 + 162)  # before, after ten steps, after all
    before, after = (np.asarray(Image.open(file), dtype=float) for file in outcome["samples"][0])
    assert np.abs(before - after).max() > 0
    unet = pytest.importorskip("diffusers").UNet2DConditionModel.from_pretrained(painter / "unet")
    assert peftcore.load(unet, "run/adapter").summary().sites > 4
    saved = [path.stat().st_size for path in Path("run/checkpoints").glob("*/model.safetensors")]
    assert saved and max(saved) < 100_000


@pytest.mark.slow
def test_a_pipeline_in_bfloat16_whose_tokenizer_knows_no_length(painter: Path, named_pictures: Path) -> None:
    """Pictures get the pipeline's dtype, and texts the length that the text encoder has."""
    path = painter / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    assert settings.pop("model_max_length") == 6
    path.write_text(json.dumps(settings), encoding="utf-8")
    outcome = trained(
        *("--model", painter, "--task", "text-to-image", "--data", named_pictures, "--steps", 2, "--lr", "1e-2"),
        *("--set", "dtype=bfloat16", "--set", 'data.prompts=["zero"]', "--set", "data.prompt_steps=2"),
    )
    assert np.isfinite(outcome["after"]["loss"]) and outcome["samples"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stable-diffusion-xl", "stable-diffusion-3", "flux"])
def test_pictures_of_words_by_other_pipelines(named_pictures: Path, tmp_path: Path, kind: str) -> None:
    """Beside pictures of the class, which are drawn first."""
    painters = importlib.import_module("painters")
    model = painters.saved(kind, tmp_path / kind)
    prior = (
        "--set",
        f"data.prior={tmp_path / 'prior'}",
        "--set",
        "data.prior_text=one",
        "--set",
        "data.prior_images=3",
    )
    drawn = ("--set", "data.size=16", "--set", 'data.prompts=["zero"]', "--set", "data.prompt_steps=2", "--out", "run")
    outcome = trained(
        *("--model", model, "--task", "text-to-image", "--data", named_pictures, "--steps", 30, "--lr", "1e-2"),
        *(*prior, *drawn),
    )
    assert outcome["after"]["loss"] < outcome["before"]["loss"]
    assert len([*(tmp_path / "prior").iterdir()]) == 3
    before, after = (np.asarray(Image.open(file), dtype=float) for file in outcome["samples"][0])
    assert np.abs(before - after).max() > 0
    denoiser = painters.MADE[kind]().components["unet" if kind == "stable-diffusion-xl" else "transformer"]
    assert peftcore.load(denoiser, "run/adapter").summary().sites > 4


@pytest.mark.slow
def test_a_new_word(painter: Path, named_pictures: Path) -> None:
    """Its vectors are all that is trained and saved; the tokenizer that knows it is in the folder too."""
    words = ("--set", "data.part=text_encoder", "--set", 'data.words=["<leaning>"]', "--set", "data.min_snr=5")
    table = named_pictures / "metadata.csv"
    table.write_text(table.read_text(encoding="utf-8").replace(",zero", ",<leaning> zero"), encoding="utf-8")
    result = CliRunner().invoke(
        app,
        [
            *("train", "--model", str(painter), "--task", "text-to-image", "--data", str(named_pictures)),
            *("--method", "textual_inversion", "--steps", "20", "--lr", "1e-1", "--out", "run", "--json", *words),
        ],
    )
    assert result.exit_code == 0, (result.output, result.exception)
    outcome = json.loads(result.stdout)
    assert outcome["after"]["loss"] < outcome["before"]["loss"] and outcome["trainable"] == 16
    tokenizer = transformers.CLIPTokenizer.from_pretrained("run/tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(painter / "text_encoder")
    encoder.resize_token_embeddings(len(tokenizer))
    peftcore.load(encoder, "run/adapter")


def of_the_page(**changed: str) -> list[str]:
    """The command of docs/training.md for words beside the denoiser, with other values of some flags and settings."""
    page = (Path(__file__).parents[4] / "docs" / "training.md").read_text(encoding="utf-8")
    (line,) = (line for line in page.splitlines() if line.startswith("peftcore train") and "data.words_until" in line)
    words = shlex.split(line)[1:]
    for name, value in changed.items():
        at = next((at for at, word in enumerate(words) if word.startswith(f"data.{name}=")), None)
        if at is None:
            words[words.index(f"--{name}") + 1] = value
        else:
            words[at] = f"data.{name}={value}"
    return [*words, "--out", "run", "--json", "--set", "data.prompt_steps=2", "--set", "data.size=16"]


def drawn_by_diffusers(
    folder: Path, prompt: str, tokens: list[str], words: bool = True, lora: bool = True
) -> np.ndarray:
    """A picture of the pipeline as it was, which reads what a run has left, or one half of it."""
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if words:
        for file in Path("run").glob("*.safetensors"):
            ending = "" if file.stem == "clip_l" else "_2"  # clip_g of SDXL, t5 of Flux
            encoder, tokenizer = (pipeline.components[f"{part}{ending}"] for part in ("text_encoder", "tokenizer"))
            rows = load_file(file)[file.stem]
            pipeline.load_textual_inversion(rows, token=tokens, text_encoder=encoder, tokenizer=tokenizer)
    if lora:
        pipeline.load_lora_weights("lora")
    noise = torch.Generator().manual_seed(0)
    image = pipeline(prompt, height=16, width=16, num_inference_steps=2, generator=noise).images[0]
    return np.asarray(image, dtype=float)


@pytest.mark.parametrize("kind", quick(["stable-diffusion", "stable-diffusion-xl", "flux"], ["stable-diffusion"]))
@pytest.mark.slow
def test_words_beside_the_denoiser(named_pictures: Path, tmp_path: Path, kind: str) -> None:
    """Pivotal tuning as the page has it. diffusers, which reads the rows and the LoRA into the pipeline as it was,
    draws what the run has drawn; the words rest after half of the steps, and a run that stopped goes on."""
    pytest.importorskip("peft")
    model = importlib.import_module("painters").saved(kind, tmp_path / kind)
    table, tokens = named_pictures / "metadata.csv", ["<s0>", "<s1>"]
    table.write_text(table.read_text(encoding="utf-8").replace(",zero", ",<s0><s1> zero"), encoding="utf-8")
    line = of_the_page(
        model=str(model), data=str(named_pictures), steps="4", lr="0.05", words_from="zero", words_rate="0.1",
        prompts='["<s0><s1> zero"]',
    )  # fmt: skip
    line += ["--set", "training.evaluate_every=1", "--set", "training.checkpoints=last"]
    prior = {"prior": str(tmp_path / "prior"), "prior_text": "one", "prior_images": "2"}
    line += [word for name, value in prior.items() for word in ("--set", f"data.{name}={value}")]

    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, (result.output, result.exception)
    convert = ["convert", "run/adapter", "--to", "diffusers", "--model", str(model), "--out", "lora"]
    assert (converted := CliRunner().invoke(app, convert)).exit_code == 0, converted.output
    ((_, last),) = json.loads(result.stdout)["samples"]
    ours, drawing = np.asarray(Image.open(last), dtype=float), (model, "<s0><s1> zero", tokens)
    assert np.abs(ours - drawn_by_diffusers(*drawing)).max() <= 1  # of 255
    for half in ({"words": False}, {"lora": False}):
        assert np.abs(ours - drawn_by_diffusers(*drawing, **half)).max() > 2

    ends = [ending for ending in ("", "_2") if (model / f"text_encoder{ending}").exists()]
    steps = {step: load_file(f"run/checkpoints/checkpoint-{step}/model.safetensors") for step in (2, 3, 4)}
    new = [name for name in steps[4] if name.endswith("vectors")]
    assert len(new) == len(ends) and not any("embed" in name and name not in new for name in steps[4])
    for name, tensor in steps[2].items():
        resting = name in new
        assert torch.equal(tensor, steps[4][name]) == resting or tensor.dtype == torch.int64, name
    for ending in ends:
        kind_of_encoder = transformers.T5EncoderModel if ending and kind == "flux" else transformers.CLIPTextModel
        encoder = kind_of_encoder.from_pretrained(model / f"text_encoder{ending}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(f"run/tokenizer{ending}")
        encoder.resize_token_embeddings(max(len(tokenizer), encoder.config.vocab_size))
        words = peftcore.load(encoder, f"run/adapter_text_encoder{ending}")
        assert words.config.tokens == tokenizer.convert_tokens_to_ids(tokens) and words.config.words == tokens
        start = encoder.get_input_embeddings().weight[tokenizer("zero", add_special_tokens=False).input_ids[0]]
        (vectors,) = words.parameters()
        assert 0.05 < (vectors - start).abs().max() < 0.21  # two steps of Adam

    rates = torch.load("run/checkpoints/checkpoint-4/optimizer.pt")["param_groups"]
    assert [group["initial_lr"] for group in rates] == [0.05] + [0.1] * len(ends)
    finished = {name: load_file(f"run/{name}") for name in ("clip_l.safetensors", "adapter/adapter.safetensors")}
    for step in (3, 4):
        shutil.rmtree(f"run/checkpoints/checkpoint-{step}")
    again = CliRunner().invoke(app, [*line, "--resume"])
    assert again.exit_code == 0, (again.output, again.exception)
    for name, tensors in finished.items():
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in load_file(f"run/{name}").items())


def test_nothing_trains_beside_the_whole_model(painter: Path, named_pictures: Path) -> None:
    line = of_the_page(model=str(painter), data=str(named_pictures), method="full", words_from="zero")
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2 and "the task also trains one of text_encoder" in " ".join(result.output.split())
    assert not Path("run/model").exists()


@pytest.mark.slow
def test_a_denoiser_gets_the_methods_own_loss(painter: Path, named_pictures: Path) -> None:
    """It is a part of what is trained, and its output has no loss: the Trainer takes it."""
    losses = []
    for weight in (0.0, 1000.0):
        options = ("--method", "adalora", "--set", f"method.orthogonality={weight}", "--set", "method.final=2")
        result = CliRunner().invoke(
            app,
            [
                *("train", "--model", str(painter), "--task", "text-to-image", "--data", str(named_pictures)),
                *("--steps", "8", "--lr", "1e-4", "--batch-size", "4", "--out", f"run{weight}", "--json"),
                *("--set", "training.evaluate_every=1", "--set", "method.warmup=1", *options),
            ],
        )
        assert result.exit_code == 0, (result.output, result.exception)
        losses.append(json.loads(result.stdout)["losses"][0][1])
    assert losses[1] > losses[0] + 1.0


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    """Pairs of answers, of which those in one word are preferred."""
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": f"{about} phone", "chosen": good, "rejected": f"{bad} and so {bad}"}
        for about in ("my", "the", "so")
        for good in ("fine", "lovely", "happy")
        for bad in ("awful", "sad", "late")
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def test_pairs_of_answers(talker: Path, judged: Path) -> None:
    """The share of pairs in which the preferred answer has become likelier, against the other, than it was."""
    pytest.importorskip("trl", reason="TRL is not installed")
    options = ("--steps", 60, "--lr", "1e-1", "--set", "data.beta=1")
    options += ("--set", 'data.prompts=["my phone"]', "--set", "data.answer_length=4")
    outcome = trained("--model", talker, "--task", "preference", "--data", judged, *options)
    assert len(outcome["samples"]) == 1
    assert (outcome["before"]["reward_accuracy"], outcome["after"]["reward_accuracy"]) == (0.0, 1.0)
    assert outcome["after"]["loss"] < 0.6 < 0.69 < outcome["before"]["loss"]
    model = transformers.AutoModelForCausalLM.from_pretrained(talker).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(talker)

    def likelier() -> list[float]:
        """By how much the preferred answers are."""
        found = []
        for row in map(json.loads, judged.read_text(encoding="utf-8").splitlines()):
            costs = []
            for answer in (row["chosen"], row["rejected"]):
                asked, ids = (
                    tokenizer(f"u {row['prompt']} [SEP] a{more}", add_special_tokens=False)["input_ids"]
                    for more in ("", f" {answer} [SEP]")
                )
                labels = torch.tensor([[-100] * len(asked) + ids[len(asked) :]])
                with torch.no_grad():
                    loss = model(torch.tensor([ids]), labels=labels).loss
                costs.append(loss.item() * (len(ids) - len(asked)))
            found.append(costs[1] - costs[0])
        return found

    before = likelier()
    peftcore.load(model, outcome["saved"])
    assert all(now > then for now, then in zip(likelier(), before, strict=True))


def test_pairs_without_trl(talker: Path, judged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "trl" else found(name, *more))
    command = ("train", "--model", talker, "--task", "preference", "--data", judged, "--method", "lora")
    result = CliRunner().invoke(app, [*map(str, command)])
    assert result.exit_code == 2 and not Path("peftcore-run").exists()
    assert "not installed: trl. Run: pip install 'trl'" in " ".join(result.stderr.split())


def test_a_row_that_is_no_pair(talker: Path, judged: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    (tmp_path / "same.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n', encoding="utf-8")
    command = ("train", "--model", talker, "--task", "preference", "--data", judged, "--method", "lora")
    result = CliRunner().invoke(app, [*map(str, command), "--set", f"data.held_out={tmp_path / 'same.jsonl'}"])
    assert result.exit_code == 2
    assert "same.jsonl, row 1: the preferred answer and the other one are the same" in " ".join(result.stderr.split())
