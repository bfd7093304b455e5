"""`peftcore merge`, `convert` and `export-lora`: what is written loads by its own library and computes the same, and
what is refused writes nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import peftcore
from peftcore.cli.commands import app
from peftcore.files.formats.native import TENSORS

CLASS = ("--model-class", "BertForSequenceClassification")
IDS = torch.arange(14).view(2, 7) % 20


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def done(*arguments: object) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments: object) -> str:
    """The message; nothing is written, changed or left behind."""
    before = {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*")}
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output and not result.stdout
    assert {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*")} == before
    return " ".join(result.stderr.split())


def fill(injection: peftcore.Injection) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in injection.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)


def saved(model: nn.Module, path: Path | str, method: Any, format: str = "peftcore", **options: Any) -> None:
    """A file of an adapter with values that no start would give; the model is as before."""
    injection = peftcore.apply(model, method, **options)
    fill(injection)
    injection.save(path, format=format)
    injection.remove()


@torch.no_grad()
def adapted(model: nn.Module, run: Callable[[nn.Module], Tensor], *adapters: str | Path) -> Tensor:
    """What a model returns with adapters; and that it is not what it returns without them."""
    found = []
    for index, each in enumerate(adapters):
        peftcore.activate(model)
        found.append(peftcore.load(model, each, name=f"a{index}"))
    with peftcore.activate(model, *(each.name for each in found)):
        after = run(model)
    for each in reversed(found):
        each.remove()
    assert not torch.allclose(after, run(model), atol=1e-3)
    return after


def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def denoised(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 8, generator=generator)
    return model(x, 7, text).sample


def same_tensors(first: Path, second: Path) -> bool:
    one, other = load_file(first), load_file(second)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts of a pipeline that matter: a UNet, a text encoder, and a scheduler that is no model."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(folder / "unet")  # fmt: skip
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=20, **sizes))
    text.save_pretrained(folder / "text_encoder")
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **parts}))
    return folder


@pytest.fixture
def causal(llama: Path) -> nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(llama).eval()


@pytest.fixture
def unet(pipeline: Path) -> nn.Module:
    return diffusers.UNet2DConditionModel.from_pretrained(pipeline / "unet").eval()


# merge


@pytest.mark.parametrize(("format", "second"), [("peftcore", "dora"), ("peft", "lora"), ("peft", "pissa")])
def test_a_causal_model_with_two_adapters(format: str, second: str, llama: Path, causal: nn.Module) -> None:
    """Also two of peft, whose options mean modules by the ends of their names; also one that starts from the bare
    model, which each of them was trained on."""
    saved(causal, "one", "lora", format, target=["q_proj", "up_proj"], rank=2)
    saved(causal, "two", "dora" if second == "dora" else "lora", format, target=["q_proj", "v_proj"])
    if second == "pissa":
        options = Path("two/adapter_config.json")
        options.write_text(json.dumps({**json.loads(options.read_text()), "init_lora_weights": "pissa"}))
    expected = adapted(causal, logits, "one", "two")
    report = done("merge", llama, "one", "two", "--out", "merged")
    assert [each["tensors"] for each in report["adapters"]] == [4, 4] and report["out"] == "merged"
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged").eval()
    assert type(merged) is transformers.LlamaForCausalLM
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    assert sorted(path.name for path in Path("merged").iterdir()) == sorted(path.name for path in llama.iterdir())
    assert Path("merged/config.json").read_text() == (llama / "config.json").read_text()
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in causal.named_parameters()}


def test_weights_say_how_much_of_each(llama: Path, causal: nn.Module) -> None:
    saved(causal, "one", "lora", target=["q_proj"], rank=2)
    saved(causal, "two", "ia3", target=["up_proj"])
    report = done("merge", llama, "one", "two", "--weights", "0.5,-1", "--out", "merged")
    assert [each["weight"] for each in report["adapters"]] == [0.5, -1.0]
    before, after = load_file(llama / "model.safetensors"), load_file("merged/model.safetensors")
    changes = {**peftcore.deltas(peftcore.load(causal, "one", name="one"))}
    changes |= peftcore.deltas(peftcore.load(causal, "two", name="two"))
    for key, value in before.items():
        path = key.removesuffix(".weight")
        share = 0.5 if "q_proj" in path else -1.0
        assert torch.allclose(after[key], value + share * changes.get(path, torch.zeros(())), atol=1e-6), key


@pytest.mark.parametrize(("format", "more"), [("peftcore", ()), ("peft", CLASS)])
def test_a_classifier_whose_head_came_with_the_adapter(format: str, more: tuple[str, ...], encoder: Path) -> None:
    """The folder has no head: the class is the adapter's, or the user's, and the number of labels that of the head."""
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(encoder, num_labels=3).eval()
    saved(model, "adapter", "lora", format, train=["classifier"])
    expected = adapted(model, logits, "adapter")
    done("merge", encoder, "adapter", "--out", "merged", *more)
    merged = auto.from_pretrained("merged").eval()
    assert merged.config.num_labels == 3 and torch.allclose(logits(merged), expected, atol=1e-5)
    texts = ["the plane was late", "my phone is great today"]
    before, after = (transformers.AutoTokenizer.from_pretrained(folder)(texts) for folder in (encoder, "merged"))
    assert before["input_ids"] == after["input_ids"]


def test_a_head_that_the_folder_has_is_replaced(encoder: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder).eval()
    model.save_pretrained("model")
    saved(model, "adapter", "bitfit", train=["classifier"])
    expected = adapted(model, logits, "adapter")
    done("merge", "model", "adapter", "--out", "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained("merged").eval()
    assert torch.allclose(logits(merged), expected, atol=1e-5)


def test_a_unet_alone_and_in_its_pipeline(pipeline: Path, unet: nn.Module) -> None:
    saved(unet, "adapter", "lora", "kohya", rank=2)
    expected = adapted(unet, denoised, "adapter")
    done("merge", pipeline / "unet", "adapter", "--out", "alone")
    done("merge", pipeline, "adapter", "--out", "whole")
    for folder in ("alone", "whole/unet"):
        merged = diffusers.UNet2DConditionModel.from_pretrained(folder).eval()
        assert torch.allclose(denoised(merged), expected, atol=1e-5)
    for name in ("model_index.json", "text_encoder/model.safetensors", "scheduler/scheduler_config.json"):
        assert (Path("whole") / name).read_bytes() == (pipeline / name).read_bytes()


def test_weights_stay_in_the_dtype_and_variant_in_which_they_were(pipeline: Path, unet: nn.Module) -> None:
    saved(unet, "adapter", "lora", rank=2)
    unet.half().save_pretrained("half", variant="fp16")
    done("merge", "half", "adapter", "--out", "merged")
    tensors = load_file("merged/diffusion_pytorch_model.fp16.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float16}


def test_a_timm_model(tmp_path: Path) -> None:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    timm.models.save_for_hf(model, "model", safe_serialization=True)
    saved(model, "adapter", "lora", train=["head"])
    x = torch.randn(2, 3, 16, 16)
    expected = adapted(model, lambda each: each(x), "adapter")
    done("merge", "model", "adapter", "--out", "merged")
    assert Path("merged/config.json").read_text() == Path("model/config.json").read_text()
    merged = timm.create_model("local-dir:merged", pretrained=True).eval()
    assert torch.allclose(merged(x), expected, atol=1e-5)


def test_a_packed_model_becomes_dense_or_stays_packed(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    auto = transformers.AutoModelForCausalLM
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes)).save_pretrained("dense")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = auto.from_pretrained("dense", quantization_config=config).eval()
    model.save_pretrained("model")
    saved(model, "adapter", "lora", rank=2)
    expected = adapted(model, logits, "adapter")
    floating = done("merge", "model", "adapter", "--out", "floating")
    assert len(floating["adapters"][0]["dense"]) == 2
    merged = auto.from_pretrained("floating").eval()
    assert "quantization_config" not in merged.config.to_dict()
    assert torch.allclose(logits(merged), expected, atol=2e-2)
    packed = done("merge", "model", "adapter", "--out", "packed", "--into", "same")
    errors = packed["adapters"][0]["repacked"]
    assert len(errors) == 2 and all(0 < each["error"] < 0.2 for each in errors.values())
    again = auto.from_pretrained("packed")
    assert again.config.quantization_config.load_in_4bit
    assert "--max-error" in invoke("merge", "--help").output
    assert "more than 0.01" in refused(
        "merge", "model", "adapter", "--out", "x", "--into", "same", "--max-error", "0.01"
    )


def test_the_table(llama: Path, causal: nn.Module) -> None:
    saved(causal, "adapter", "lora")
    result = invoke("merge", llama, "adapter", "--out", "merged")
    assert result.exit_code == 0
    assert "adapter" in result.stdout and "lora" in result.stdout and "merged model: merged" in result.stdout


@pytest.fixture
def adapter(causal: nn.Module, tmp_path: Path) -> str:
    saved(causal, "adapter", "lora", rank=2)
    return "adapter"


def test_where_a_model_is_not_written(llama: Path, adapter: str) -> None:
    shutil.copytree(llama, "models/llama")
    assert "is read" in refused("merge", "models/llama", adapter, "--out", "models/llama", "--overwrite")
    assert "is read" in refused("merge", "models/llama", adapter, "--out", "models", "--overwrite")
    assert "is read" in refused("merge", "models/llama", adapter, "--out", adapter, "--overwrite")
    Path("notes").mkdir()
    Path("notes/a.txt").touch()
    assert "is not empty" in refused("merge", llama, adapter, "--out", "notes")
    assert "contains other files (a.txt)" in refused("merge", llama, adapter, "--out", "notes", "--overwrite")
    assert "is not a folder" in refused("merge", llama, adapter, "--out", "notes/a.txt")
    Path("empty").mkdir()
    done("merge", llama, adapter, "--out", "empty")
    assert "--overwrite" in refused("merge", llama, adapter, "--out", "empty")
    Path("empty/model.safetensors").write_bytes(b"")
    Path("empty/old").touch()
    done("merge", llama, adapter, "--out", "empty", "--overwrite")
    assert load_file("empty/model.safetensors") and not Path("empty/old").exists()


@pytest.mark.parametrize("what", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_what_was_there(
    what: BaseException, llama: Path, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done("merge", llama, adapter, "--out", "merged")
    before = sorted(Path.cwd().rglob("*"))

    def half(self: Any, folder: Path, **options: Any) -> None:
        (folder / "config.json").write_text("{}")
        raise what

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", half)
    result = invoke("merge", llama, adapter, "--out", "merged", "--overwrite")
    if isinstance(what, OSError):
        assert result.exit_code == 2 and "No space left" in result.stderr
    assert result.exit_code != 0 and sorted(Path.cwd().rglob("*")) == before
    assert Path("merged/config.json").read_text() != "{}"
    invoke("merge", llama, adapter, "--out", "new/merged")
    assert sorted(Path.cwd().rglob("*")) == before


def test_what_cannot_be_merged(llama: Path, causal: nn.Module, encoder: Path, adapter: str) -> None:
    saved(causal, "prefix", "prefix_tuning")
    assert "prefix_tuning changes no weights" in refused("merge", llama, "prefix", "--out", "x")
    assert "belongs to another base" in refused("merge", encoder, adapter, "--out", "x")
    assert "does not exist" in refused("merge", llama, "nothing", "--out", "x")
    assert "contains no model" in refused("merge", adapter, adapter, "--out", "x")
    assert "is not a pipeline" in refused("merge", llama, adapter, "--out", "x", "--component", "unet")
    for weights in ("1,2", "a", "nan", ""):
        assert "--weights" in refused("merge", llama, adapter, "--out", "x", "--weights", weights)


@pytest.mark.slow
def test_heads_that_do_not_fit_together(encoder: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder)
    saved(model, "one", "lora", train=["classifier"])
    saved(model, "two", "lora", "peft", train=["classifier"])
    assert "two of the adapters have values of classifier" in refused("merge", encoder, "one", "two", "--out", "x")
    assert "its weight in --weights has to be 1" in refused("merge", encoder, "one", "--out", "x", "--weights", "0.5")
    options = json.loads(Path("two/adapter_config.json").read_text())
    Path("two/adapter_config.json").write_text(json.dumps({**options, "auto_mapping": None}))
    assert "--model-class" in refused("merge", encoder, "two", "--out", "x")
    saved(model, "bare", "lora")
    message = refused("merge", encoder, "bare", "--out", "x", "--model-class", "BertForSequenceClassification")
    assert "do not fit its config; missing or of another shape: classifier" in message
    assert "not a model class" in refused("merge", encoder, "one", "--out", "x", "--model-class", "pipeline")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "architectures": ["os"]}, "not a model class of transformers"),
        ({"model_type": "llama", "architectures": ["AutoModel"]}, "not a model class of transformers"),
        ({"model_type": "llama", "architectures": {"LlamaModel": 0}}, "not a model class of transformers"),
        ({"model_type": "llama", "architectures": ["LlamaModel"], "hidden_size": "x"}, "cannot load a model"),
        ({"model_type": "llama", "architectures": ["LlamaModel"], "num_attention_heads": 0}, "cannot load a model"),
        ({"_class_name": "UNet2DConditionModel", "block_out_channels": 3}, "cannot load a model"),
        ({"architecture": ["vit"]}, "timm has no model"),
        ({"_class_name": "DiffusionPipeline"}, "diffusers exports no model"),
        ({"architecture": "os"}, "timm has no model"),
        ({"hidden_size": 3}, "does not belong to a model of transformers"),
        ([], "does not contain a JSON object"),
    ],
)
def test_models_that_are_none(config: Any, message: str, adapter: str) -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(config))
    assert message in refused("merge", "model", adapter, "--out", "x")


def test_weights_that_are_damaged_or_pickled(llama: Path, adapter: str) -> None:
    shutil.copytree(llama, "model")
    Path("model/model.safetensors").write_bytes(b"garbage")
    assert "cannot load a model" in refused("merge", "model", adapter, "--out", "x")
    Path("model/model.safetensors").unlink()
    torch.save({}, "model/pytorch_model.bin")
    assert "cannot load a model" in refused("merge", "model", adapter, "--out", "x")


def test_parts_of_a_pipeline_are_told_apart(pipeline: Path, adapter: str) -> None:
    shutil.copytree(pipeline, "pipeline")
    message = refused("merge", "pipeline", adapter, "--out", "x")
    assert "fits none" in message and "unet:" in message and "text_encoder:" in message
    text = transformers.CLIPTextModel.from_pretrained("pipeline/text_encoder")
    saved(text, "text", "lora")
    shutil.copytree("pipeline/text_encoder", "pipeline/text_encoder_2")
    shutil.copytree("pipeline/text_encoder", "text_encoder")  # beside it, where nothing is looked for
    index = json.loads(Path("pipeline/model_index.json").read_text())
    Path("pipeline/model_index.json").write_text(
        json.dumps({**index, "text_encoder_2": index["text_encoder"], "../text_encoder": index["text_encoder"]})
    )
    assert "fits text_encoder and text_encoder_2; choose" in refused("merge", "pipeline", "text", "--out", "x")
    assert "has no component 'vae'" in refused("merge", "pipeline", "text", "--out", "x", "--component", "vae")
    assert "inside the pipeline" in refused(
        "merge", "pipeline", "text", "--out", "pipeline/x", "--component", "text_encoder"
    )
    done("merge", "pipeline", "text", "--out", "merged", "--component", "text_encoder_2")
    assert not same_tensors(
        Path("merged/text_encoder_2/model.safetensors"), Path("merged/text_encoder/model.safetensors")
    )


# convert


def bare(folder: Path, to: str) -> Path:
    """A copy of a model's folder without its weights."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))
    return Path(to)


@pytest.mark.parametrize("other", ["peft", "kohya", "diffusers"])
def test_there_and_back_to_the_bit_without_weights(other: str, llama: Path, causal: nn.Module) -> None:
    model = bare(llama, "model")
    saved(causal, "adapter", "lora", target="all-linear", rank=3, alpha=5.0)
    there = done("convert", "adapter", "--to", other, "--out", "there", "--model", model)
    assert (there["from"], there["to"], there["method"], there["weights_loaded"]) == ("native", other, "lora", False)
    back = done("convert", "there", "--to", "native", "--out", "back", "--model", model)
    assert back["from"] == other and same_tensors(Path("back") / TENSORS, Path("adapter") / TENSORS)
    assert torch.equal(adapted(causal, logits, "back"), adapted(causal, logits, "adapter"))


def test_a_head_goes_along(encoder: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3)
    saved(model, "adapter", "dora", train=["classifier"])
    folder = bare(encoder, "model")
    assert not done("convert", "adapter", "--to", "peft", "--out", "there", "--model", folder)["weights_loaded"]
    done("convert", "there", "--to", "native", "--out", "back", "--model", folder, *CLASS)
    assert same_tensors(Path("back") / TENSORS, Path("adapter") / TENSORS)


def test_files_of_a_pipeline(pipeline: Path, unet: nn.Module) -> None:
    saved(unet, "adapter", "lora", rank=2)
    done("convert", "adapter", "--to", "kohya", "--out", "lora.safetensors", "--model", pipeline)
    done("convert", "lora.safetensors", "--to", "diffusers", "--out", "there", "--model", pipeline)
    done("convert", "there", "--to", "native", "--out", "back.safetensors", "--model", pipeline)
    assert same_tensors(Path("back.safetensors"), Path("adapter") / TENSORS)
    assert [path.name for path in Path.cwd().glob(".*")] == []


def test_the_base_is_the_one_that_the_file_names(llama: Path, causal: nn.Module) -> None:
    saved(causal, "adapter", "lora")
    report = done("convert", "adapter", "--to", "peft", "--out", "there")
    assert report["model"] == str(llama)
    config = json.loads(Path("there/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(llama)
    Path("there/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "meta/llama"}))
    message = refused("convert", "there", "--to", "native", "--out", "x")
    assert "pass --model" in message and "'meta/llama'" in message
    done("convert", "there", "--to", "native", "--out", "back", "--model", llama)
    assert json.loads(Path("back/adapter.json").read_text())["base"] == "meta/llama"


def test_weights_are_loaded_where_a_conversion_depends_on_them(llama: Path, causal: nn.Module) -> None:
    """What SVDiff keeps means something with the singular vectors of the weights alone."""
    saved(causal, "adapter", "svdiff", target=["q_proj"])
    assert done("convert", "adapter", "--to", "native", "--out", "there")["weights_loaded"]
    assert same_tensors(Path("there") / TENSORS, Path("adapter") / TENSORS)


def test_what_another_format_cannot_hold(llama: Path, causal: nn.Module) -> None:
    saved(causal, "adapter", "prefix_tuning")
    assert "kohya files" in refused("convert", "adapter", "--to", "kohya", "--out", "x")
    assert "does not write them" in refused("convert", "adapter", "--to", "adapterhub", "--out", "x")
    assert "there are: native, peft" in refused("convert", "adapter", "--to", "nativ", "--out", "x")
    assert "no part 'vae'" in refused("convert", "adapter", "--to", "diffusers/vae", "--out", "x")
    saved(causal, "lora", "lora")
    assert "needs a folder" in refused("convert", "lora", "--to", "peft", "--out", "x.safetensors")
    assert "is read" in refused("convert", "adapter", "--to", "peft", "--out", "adapter", "--overwrite")


# export-lora


def test_a_lora_of_full_rank_is_the_adapter(llama: Path, causal: nn.Module) -> None:
    saved(causal, "adapter", "dora", target=["q_proj", "up_proj"])
    report = done("export-lora", llama, "adapter", "--rank", 16, "--out", "lora")
    assert report["method"] == "dora" and report["format"] == "peft" and len(report["errors"]) == 4
    assert report["largest_error"] < 1e-5
    expected = adapted(causal, logits, "adapter")
    assert torch.allclose(adapted(causal, logits, "lora"), expected, atol=1e-4)


def test_an_error_above_the_bound_writes_nothing(llama: Path, causal: nn.Module) -> None:
    saved(causal, "adapter", "dora", target=["q_proj"])
    arguments = ("export-lora", llama, "adapter", "--rank", 1, "--out", "lora", "--format", "native")
    message = refused(*arguments, "--max-error", 0.01)
    assert "more than --max-error 0.01" in message and "q_proj" in message
    result = invoke(*arguments, "--max-error", 2)
    assert result.exit_code == 0 and "largest error" in result.stdout and "q_proj" in result.stdout
    assert peftcore.load(causal, "lora").method.name == "lora"


def test_methods_without_deltas_have_no_lora(llama: Path, causal: nn.Module, encoder: Path) -> None:
    saved(causal, "prefix", "prefix_tuning")
    assert "changes no weights" in refused("export-lora", llama, "prefix", "--rank", 4, "--out", "x")
    saved(causal, "norms", "ln_tuning")
    assert "vectors (biases, norms) have no low-rank form" in refused(
        "export-lora", llama, "norms", "--rank", 4, "--out", "x"
    )


def test_a_head_is_left_out_and_that_is_said(encoder: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder)
    saved(model, "adapter", "lora", train=["classifier"])
    result = invoke("export-lora", encoder, "adapter", "--rank", 8, "--out", "lora")
    assert result.exit_code == 0 and "Warning: heads belong to one task and are left out" in result.stderr
