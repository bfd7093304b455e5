"""Models from their configurations: which class, which library, and what a file cannot make them do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from looking import CONFIGS, folder_of

from peftcore.errors import BadInput
from peftcore.models.example_inputs import Size, UnknownInputs
from peftcore.models.skeletons import skeleton


def written(folder: Path, config: Any, name: str = "config.json") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder)


def llama(**changes: Any) -> dict[str, Any]:
    return {**CONFIGS["llama"](), **changes}


def reason(source: object) -> str:
    with pytest.raises(BadInput) as caught:
        skeleton(str(source))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "class_name", "library", "inputs"),
    [
        ("llama", "LlamaForCausalLM", "transformers", {"input_ids": (2, 128)}),
        ("bert", "BertForSequenceClassification", "transformers", {"input_ids": (2, 64)}),
        ("t5", "T5ForConditionalGeneration", "transformers", {"input_ids": (2, 128), "decoder_input_ids": (2, 128)}),
        ("clip", "CLIPModel", "transformers", {"input_ids": (2, 77), "pixel_values": (2, 3, 16, 16)}),
        ("wav2vec2", "Wav2Vec2ForCTC", "transformers", {"input_values": (2, 16000)}),
        ("vit", "VisionTransformer", "timm", {"x": (2, 3, 32, 32)}),
        (
            "unet",
            "UNet2DConditionModel",
            "diffusers",
            {"sample": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 77, 12)},
        ),
    ],
)
def test_each_library(
    name: str, class_name: str, library: str, inputs: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    built = skeleton(str(folder_of(name, tmp_path)))
    assert (type(built.model).__name__, built.library, built.notes) == (class_name, library, ())
    assert built.model.training and all(each.is_meta for each in built.model.parameters())
    assert {key: tuple(each.shape) for key, each in built.inputs(Size(2)).items()} == inputs
    assert torch.get_default_dtype() == torch.float32


def test_timm_by_name_and_a_pipeline_by_its_denoiser(tmp_path: Path) -> None:
    assert type(skeleton("timm:resnet10t").model).__name__ == "ResNet"
    folder = folder_of("unet", tmp_path / "pipe")
    written(folder.parent, {"_class_name": "StableDiffusionPipeline"}, "model_index.json")
    assert type(skeleton(str(folder.parent)).model).__name__ == "UNet2DConditionModel"
    assert skeleton(str(folder.parent)).source == str(folder)


def test_the_dtype_is_what_the_user_says_or_the_file(tmp_path: Path) -> None:
    folder = written(tmp_path, llama(dtype="bfloat16"))
    assert (skeleton(folder).dtype, skeleton(folder, "float16").dtype) == (torch.bfloat16, torch.float16)
    assert skeleton("timm:resnet10t", "bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("names", [["os.system"], ["AutoModel"], ["pipeline"], ["BertConfig"], ["MyLlama"], [], None])
def test_a_class_that_transformers_does_not_export_is_not_looked_for(names: Any, tmp_path: Path) -> None:
    built = skeleton(written(tmp_path, llama(architectures=names)))
    assert type(built.model) is transformers.LlamaModel
    assert built.notes == ((f"transformers exports no {names[0]}; this is its LlamaModel",) if names else ())


def test_a_file_does_not_choose_kernels(tmp_path: Path) -> None:
    evil = {"attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel"}
    vision, text = CONFIGS["clip"]()["vision_config"], CONFIGS["clip"]()["text_config"]
    inside = {**CONFIGS["clip"](), "text_config": {**text, **evil}, "vision_config": {**vision, **evil}}
    for name, config in {"plain": llama(**evil), "inside": {**inside, **evil}}.items():
        model: Any = skeleton(written(tmp_path / name, config)).model
        assert model.config._attn_implementation == "sdpa"


def test_packed_weights_are_noted(tmp_path: Path) -> None:
    config = llama(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert skeleton(written(tmp_path, config)).notes == (
        "the file says that its weights are quantized; here they are dense",
    )


def test_code_of_a_repository_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "modeling.py").write_text("raise SystemExit('it ran')")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}}
    assert "its code is in its repository, and peftcore does not run that" in reason(written(tmp_path, config))
    assert skeleton(written(tmp_path, llama(auto_map=config["auto_map"], architectures=None))).model is not None


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{oops", "config.json: cannot be read"),
        ("[1]", "does not contain a JSON object"),
        ({}, "has none of the keys _class_name, model_type, architecture"),
        ({"model_type": "unheard_of"}, "no configuration that transformers reads"),
        ({"model_type": "bert", "hidden_size": -3}, "no model can be built from its configuration"),
        ({"architecture": "vit_tiny_patch16_2244"}, "did you mean vit_tiny_patch16_224"),
        ({"architecture": "hf-hub:someone/model"}, "timm has no model 'hf-hub:someone/model'"),
        ({"architecture": "resnet10t", "model_args": {"depth": "x"}}, "no model can be built"),
        ({"_class_name": "StableDiffusionPipeline"}, "diffusers has no model 'StableDiffusionPipeline'"),
        ({"_class_name": "models.UNet2DModel"}, "diffusers has no model"),
        ({"_class_name": "UNet2DModel", "block_out_channels": [3]}, "no model can be built"),
    ],
)
def test_configurations_that_make_no_model(config: Any, says: str, tmp_path: Path) -> None:
    assert says in reason(written(tmp_path, config))


def test_places_without_a_model(tmp_path: Path) -> None:
    assert "no such folder" in reason(tmp_path / "none")
    assert "contains no model; a model is a folder with config.json" in reason(tmp_path)
    assert "no such folder, and no model that could be fetched from the Hub" in reason(
        "someone/model"
    )  # the tests are offline
    assert "timm has no model '../resnet10t'" in reason("timm:../resnet10t")


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    assert "not installed: timm. Run: pip install 'timm'" in reason("timm:resnet10t")


def test_inputs_that_no_configuration_speaks_of(tmp_path: Path) -> None:
    prior = {"_class_name": "PriorTransformer", "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4}
    with pytest.raises(UnknownInputs, match="the shape of hidden_states, proj_embedding"):
        skeleton(written(tmp_path, {**prior, "embedding_dim": 8})).inputs(Size(1))
