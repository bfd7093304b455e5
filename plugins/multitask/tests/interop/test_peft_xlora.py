"""X-LoRA in folders of peft, there XLORA, both ways: the classifier's file, and the folders of LoRAs that it names."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_folders import assert_same, fill
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import peftcore
from peftcore.cli.commands import app
from peftcore.errors import CheckpointError, ExportError
from peftcore.files.formats.hub import FILES
from peftcore.files.save_load import describe
from peftcore_multitask import gather

pytestmark = [pytest.mark.filterwarnings("ignore:::peft"), pytest.mark.filterwarnings("ignore:`enable_softmax_topk`")]
TARGET = ["q_proj", "down_proj"]
IDS = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(4))
DEEP = {"xlora_depth": 3, "xlora_size": 5}
CASES: dict[str, dict[str, Any]] = {
    "one": {},
    "layerwise": {"layerwise_scalings": True},
    "deep": {**DEEP, "softmax_temperature": 0.5},
    "deep, layerwise": {**DEEP, "layerwise_scalings": True, "xlora_dropout_p": 0.0},
    "raw": {"enable_softmax": False, "global_scaling_weight": 0.7},
    "top": {"top_k_lora": 2, "xlora_depth": 2, "xlora_size": 6},
    "top, softmax": {"top_k_lora": 2, "enable_softmax_topk": True, "softmax_temperature": 2.0},
    "trains": {"use_trainable_adapters": True},
}
LORAS: list[dict[str, Any]] = [
    {"r": 3, "lora_alpha": 8, "target_modules": TARGET},
    {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    {"r": 4, "target_modules": TARGET, "rank_pattern": {"layers.1.mlp.down_proj": 2}},
]


def host() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, use_cache=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def noise(parameters: Any, seed: int) -> None:
    """Large enough that shares of tokens differ."""
    torch.manual_seed(seed)
    for _ in range(3):
        fill(parameters)


def saved_loras(path: Path) -> dict[str, str]:
    """LoRAs with noise, each saved by peft."""
    folders = {}
    for number, options in enumerate(LORAS):
        folders[str(number)] = str(path / f"lora{number}")
        model = peft.get_peft_model(host(), peft.LoraConfig(**options, task_type="CAUSAL_LM")).double()
        noise([each for each in model.parameters() if each.requires_grad], number)
        model.save_pretrained(folders[str(number)])
    return folders


def saved(path: Path, **options: Any) -> tuple[Any, Path]:
    """Peft's model with noise in the classifier, and its folder, of which the tensors are written as versions before
    0.21 did: all of the classifier's, by their names in the model."""
    config = peft.XLoraConfig(**{"hidden_size": 16, "adapters": saved_loras(path), "task_type": "CAUSAL_LM", **options})
    model = peft.get_peft_model(host(), config).double()
    noise(list(model.base_model.internal_xlora_classifier.parameters()), 9)
    model.save_pretrained(str(path / "theirs"))
    tensors = {name: each for name, each in model.state_dict().items() if "internal_xlora_classifier" in name}
    save_file(tensors, path / "theirs/adapter_model.safetensors", {"format": "pt"})
    for number in config.adapters:  # folders that peft writes beside it have no LoRAs in them
        shutil.rmtree(path / "theirs" / number)
    return model, path / "theirs"


def changed(folder: Path, **options: Any) -> None:
    """Change options of a folder."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


@pytest.mark.share(3)
@pytest.mark.filterwarnings("ignore:.*use_trainable_adapters")
@pytest.mark.parametrize("case", CASES)
def test_both_ways(case: str, tmp_path: Path) -> None:
    """Made by peft, read here; written here, opened by peft."""
    theirs, folder = saved(tmp_path, **CASES[case])
    reopened = peft.PeftModel.from_pretrained(host(), str(folder)).eval()
    ours = host()
    injection = peftcore.load(ours, folder)
    assert torch.equal(run(reopened), run(theirs))
    assert_same(run(host()), run(ours), run(theirs))
    assert (run(ours) - run(theirs)).abs().max() < 1e-10
    assert injection.config.train_parts == (case == "trains")
    injection.save(tmp_path / "written", format="peft")
    again = peft.PeftModel.from_pretrained(host(), str(tmp_path / "written")).eval()
    assert (run(again) - run(theirs)).abs().max() < 1e-10
    written = json.loads((tmp_path / "written/adapter_config.json").read_text())
    given = json.loads((folder / "adapter_config.json").read_text())
    left = {"adapters", "peft_version", "task_type", "auto_mapping", "inference_mode", "revision"}
    assert {key: written[key] for key in given.keys() - left} == {key: given[key] for key in given.keys() - left}
    injection.save(tmp_path / "native")
    native = host()
    peftcore.load(native, tmp_path / "native")
    assert torch.equal(run(native), run(ours))


def applied(**options: Any) -> Any:
    loras = [{"method": "lora", "rank": rank, "target": [f"*{name}" for name in TARGET]} for rank in (3, 2)]
    injection = peftcore.apply(host(), "xlora", dtype="float64", **{"parts": loras, **options})
    noise(list(injection.parameters()), 1)
    return injection


def test_gathered_loras_are_written(tmp_path: Path) -> None:
    """LoRAs that were trained apart, with the classifier that was trained on them."""
    folders = saved_loras(tmp_path)
    ours = host()
    injection = gather(ours, "xlora", dict.fromkeys(folders.values(), 2.0), train_parts=False, layerwise=True)
    noise(list(injection.shared["classifier"].parameters()), 3)
    injection.save(tmp_path / "written", format="peft")
    theirs = peft.PeftModel.from_pretrained(host(), str(tmp_path / "written")).eval()
    assert_same(run(host()), run(ours), run(theirs))
    assert theirs.peft_config["default"].global_scaling_weight == 2.0
    one, other = host(), host()
    peftcore.load(one, tmp_path / "written/1")
    peftcore.load(other, folders["1"])
    assert torch.equal(run(one), run(other))


@pytest.mark.filterwarnings("ignore:.*torch_dtype")
def test_peft_opens_it_by_its_auto_class(tmp_path: Path) -> None:
    """The base, whose config has caches on, is named by the file; peft's X-LoRA has none."""
    model = host()
    model.config.use_cache = True
    model.save_pretrained(tmp_path / "base")
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64).eval()
    injection = peftcore.apply(ours, "xlora", parts=applied().config.parts, dtype="float64")
    noise(list(injection.parameters()), 1)
    injection.save(tmp_path / "written", format="peft")
    for opener in (peft.AutoPeftModelForCausalLM, peft.AutoPeftModel):
        theirs = opener.from_pretrained(str(tmp_path / "written"), dtype=torch.float64, use_cache=False).eval()
        assert (run(theirs) - run(ours)).abs().max() < 1e-10
    assert (run(ours) - run(host())).abs().max() > 1e-3
    again = peftcore.load_base(tmp_path / "written", dtype=torch.float64).eval()
    assert (run(again) - run(ours)).abs().max() < 1e-10


def test_converted_it_names_its_folders_where_they_are_at_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    host().save_pretrained("base")
    injection = applied()
    injection.save("native")
    arguments = ["convert", "native", "--to", "peft", "--out", "there", "--model", "base"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    theirs = peft.PeftModel.from_pretrained(host(), "there").eval()
    assert (run(theirs) - run(injection.model)).abs().max() < 1e-10


def test_where_folders_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the path as it stands, from the file or from the working directory; by the last step where all was moved."""
    injection = applied()
    expected = run(injection.model)

    def loads(folder: Path) -> bool:
        model = host()
        peftcore.load(model, folder)
        return torch.equal(run(model), expected)

    injection.save(tmp_path / "blend", format="peft")
    held = json.loads((tmp_path / "blend/adapter_config.json").read_text())["adapters"]
    assert held == {number: str(tmp_path / "blend" / number) for number in "01"} and loads(tmp_path / "blend")
    (tmp_path / "blend").rename(tmp_path / "moved")
    assert loads(tmp_path / "moved")
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "moved"))
    config.adapters = {number: str(tmp_path / "moved" / number) for number in "01"}  # as the documentation says
    theirs = peft.PeftModel.from_pretrained(host(), str(tmp_path / "moved"), config=config).eval()
    assert (run(theirs) - expected).abs().max() < 1e-10
    changed(tmp_path / "moved", adapters={"0": "0", "1": "../moved/1"})
    assert loads(tmp_path / "moved")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "moved/0").rename(elsewhere / "a")
    monkeypatch.chdir(elsewhere)
    changed(tmp_path / "moved", adapters={"0": "a", "1": "1"})
    assert loads(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved/1", elsewhere / "1")
    with pytest.raises(CheckpointError, match=r"'1', which matches .*moved/1 and .*elsewhere/1: write the full path"):
        loads(tmp_path / "moved")


def test_it_is_described_with_its_loras(tmp_path: Path) -> None:
    injection = applied()
    injection.save(tmp_path / "blend", format="peft")
    about = describe(tmp_path / "blend")
    assert about.methods == ("xlora",) and not about.problem and len(about.files) == 3 and len(about.sites) == 4
    assert about.values == sum(each.numel() for each in injection.state_dict().values())
    shutil.rmtree(tmp_path / "blend/1")
    assert "no such folder" in describe(tmp_path / "blend").problem


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("owner/name", r"hf download owner/name --local-dir FOLDER"),
        ("gone", "no such folder"),
        ("", "no such folder"),
        (".", "'XLORA', but has to be LORA"),
        ("..", "not an adapter of peft"),
        ("/etc", "not an adapter of peft"),
        ("/etc/passwd", "no such folder"),
        ("../../etc/passwd", "no such folder"),
        ("file:///etc/passwd", "no such folder"),
        ("os:system", "no such folder"),
        ("a\0b", "no such folder"),
        ("\ud800", "no such folder"),
        ("x" * 20_000, "no such folder"),
        (3, "3, which is not a path"),
        (None, "None, which is not a path"),
        (["0"], "which is not a path"),
    ],
)
def test_names_that_are_no_folders_of_loras(
    name: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied().save(tmp_path / "blend", format="peft")
    monkeypatch.chdir(tmp_path / "blend")
    changed(tmp_path / "blend", adapters={"0": str(tmp_path / "blend/0"), "1": name})
    with pytest.raises(CheckpointError, match=why):
        peftcore.load(host(), tmp_path / "blend")


def test_pickles_are_refused(tmp_path: Path) -> None:
    applied().save(tmp_path / "blend", format="peft")
    (tmp_path / "blend/1/adapter_model.safetensors").rename(tmp_path / "blend/1/adapter_model.bin")
    with pytest.raises(CheckpointError, match="a pickle"):
        peftcore.load(host(), tmp_path / "blend")


def test_a_file_from_a_hub_names_no_folders_here(tmp_path: Path) -> None:
    """But those that came with it: all that they need is fetched."""
    injection = applied()
    injection.save(tmp_path / "blend", format="peft")
    snapshot = tmp_path / "models--owner--name/snapshots" / ("a" * 40)
    shutil.copytree(tmp_path / "blend", snapshot)
    (snapshot / "1").rename(tmp_path / "1")
    assert (tmp_path / "blend/1").exists()
    with pytest.raises(CheckpointError, match="no such folder"):
        peftcore.load(host(), snapshot)
    (tmp_path / "1").rename(snapshot / "1")
    for path in snapshot.rglob("*.*"):
        if not any(path.relative_to(snapshot).match(pattern) for pattern in FILES):
            path.unlink()
    model = host()
    peftcore.load(model, snapshot)
    assert torch.equal(run(model), run(injection.model))
    with pytest.raises(ExportError, match='push in the format "peftcore"'):
        injection.push_to_hub("owner/name", format="peft")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"scaling_pass_value": 0.5}, "'scaling_pass_value' is 0.5"),
        ({"top_k_lora": 4}, "'top_k_lora' is 4, but there are 3 LoRAs"),
        ({"adapters": {}}, "has no names"),
        ({"adapters": {"a": "a", "b": "b"}}, "call the LoRAs '0', '1'"),
        ({"adapters": {"1": "1", "0": "0"}}, "call the LoRAs '0', '1'"),
        ({"adapters": {str(number): str(number) for number in range(11)}}, "10 at most"),
        ({"new_option": 1}, "new_option"),
    ],
)
def test_options_that_peft_computes_otherwise(options: dict[str, Any], why: str, tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    changed(folder, **options)
    with pytest.raises(CheckpointError, match=why):
        peftcore.load(host(), folder)


def test_loras_that_peft_computes_otherwise(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    for number, (options, why) in enumerate(
        [
            ({"use_dora": True}, "adapter 1 is dora"),
            ({"modules_to_save": ["lm_head"]}, "values of other modules, such as lm_head"),
        ]
    ):
        path = tmp_path / f"other{number}"
        model = peft.get_peft_model(host(), peft.LoraConfig(**{**LORAS[0], **options}, task_type="CAUSAL_LM"))
        model.save_pretrained(str(path))
        changed(folder, adapters={"0": str(tmp_path / "lora0"), "1": str(path)})
        with pytest.raises(CheckpointError, match=why):
            peftcore.load(host(), folder)
    changed(folder, adapters={number: str(tmp_path / f"lora{number}") for number in "012"})
    changed(tmp_path / "lora1", lora_dropout=0.1)
    with pytest.warns(UserWarning, match="the LoRAs' dropout"):
        peftcore.load(host(), folder)


@pytest.mark.parametrize("depth", [1, 2])
def test_what_peft_leaves_out_is_missed(depth: int, tmp_path: Path) -> None:
    """peft 0.21 saves no first layer of the classifier; its own output is another one when it opens the file."""
    theirs, folder = saved(tmp_path, xlora_depth=depth)
    theirs.save_pretrained(str(folder))
    assert (run(peft.PeftModel.from_pretrained(host(), str(folder)).eval()) - run(theirs)).abs().max() > 1e-6
    with pytest.raises(CheckpointError, match=r"save_pretrained of peft 0.21 drops.*safetensors.torch.save_file"):
        peftcore.load(host(), folder)
    peftcore.load(host(), folder, strict=False)


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    lora = {"method": "lora", "rank": 2, "target": ["*q_proj"]}
    for options, why in (
        ({"weights": [1.0, 2.0]}, "one weight for all LoRAs"),
        ({"parts": [lora] * 11}, "more than 10 LoRAs"),
        ({"parts": [lora, {"method": "lora_xs", "rank": 2, "target": ["*q_proj"]}], "train": []}, ""),
        ({"train": ["lm_head"]}, "cannot hold base_model.model.lm_head.weight"),
    ):
        injection = applied(**options)
        if why:
            with pytest.raises(ExportError, match=why):
                injection.save(tmp_path / "refused", format="peft")
            assert not (tmp_path / "refused").exists()
        else:
            injection.save(tmp_path / "written", format="peft")
            theirs = peft.PeftModel.from_pretrained(host(), str(tmp_path / "written")).eval()
            assert (run(theirs) - run(injection.model)).abs().max() < 1e-10
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, use_cache=False)
    parts = [{"method": "lora", "target": ["*c_attn"]}] * 2
    injection = peftcore.apply(GPT2LMHeadModel(config), "xlora", parts=parts)
    with pytest.raises(ExportError, match="not a linear layer"):
        injection.save(tmp_path / "gpt2", format="peft")
    bare = peftcore.apply(host().model, "xlora", parts=[lora, lora])
    with pytest.raises(ExportError, match="below a module `model`"):
        bare.save(tmp_path / "bare", format="peft")
    peft.get_peft_model(host().model, peft.LoraConfig(**LORAS[0])).save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(ValueError, match="unexpected keys"):
        peft.get_peft_model(host().model, peft.XLoraConfig(hidden_size=16, adapters={"0": str(tmp_path / "lora")}))
