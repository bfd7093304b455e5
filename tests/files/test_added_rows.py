"""Rows that were added to token tables of the base travel with the adapter, whatever acts on the tables."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftcore
from peftcore.errors import ExportError, HostMismatch, PeftcoreError
from peftcore.files.formats.native import TENSORS

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[3, 33, 1, 32], [5, 2, 33, 33]])
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA = {**SIZES, "head_dim": 8, "num_key_value_heads": 2}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "untied": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, "tie_word_embeddings": False}),
    "tied": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, "tie_word_embeddings": True}),
    "scaled": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA),
    "classifier": ("LlamaForSequenceClassification", "LlamaConfig", {**SIZES, "num_labels": 3, "pad_token_id": 0}),
    "with-bias": ("BertForMaskedLM", "BertConfig", SIZES),
    "encoder-decoder": ("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 0}),
}


@pytest.fixture(scope="module")
def base_at(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Bases in folders, by kind."""

    @functools.cache
    def made(kind: str) -> Path:
        cls, config, sizes = KINDS[kind]
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(1)
        model = getattr(transformers, cls)(getattr(transformers, config)(**sizes))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
        model.save_pretrained(folder)
        return folder

    return made


def opened(folder: Path, kind: str, rows: int = 34, seed: int = 0) -> nn.Module:
    """The base with added rows that are drawn anew."""
    torch.manual_seed(seed)
    model = getattr(transformers, KINDS[kind][0]).from_pretrained(folder).eval()
    if rows:
        resize(model, rows, seed)
    return model


def resize(model: Any, rows: int, seed: int = 0) -> None:
    before = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(rows, mean_resizing=False)
    torch.manual_seed(seed)
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        if (module := get()) is not None and len(module.weight) == rows:
            for parameter in module.parameters():
                nn.init.normal_(parameter.data[before:])


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
        return model(IDS, **more)[0]


def moved(injection: peftcore.Injection) -> peftcore.Injection:
    torch.manual_seed(7)
    for parameter in injection.parameters():
        nn.init.normal_(parameter, std=0.1)
    return injection


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "beside": ("lora", {"rank": 2}),
    "in the table": ("lora", {"rank": 2, "target": ["re:.*(embed_tokens|word_embeddings|shared)", "attn.q"]}),
    "on its weight": ("dora", {"rank": 2, "target": ["re:.*(embed_tokens|word_embeddings|shared)", "attn.q"]}),
}


CASES = [(kind, method, "before") for kind in KINDS for method in METHODS]
CASES += [(kind, "beside", "after") for kind in ("untied", "tied")]  # a table that is replaced loses its adapter


@pytest.mark.parametrize(("kind", "method", "when"), CASES, ids=map("-".join, CASES))
def test_rows_travel_with_the_adapter(kind: str, method: str, when: str, base_at: Any, tmp_path: Path) -> None:
    folder = base_at(kind)
    name, options = METHODS[method]
    model = opened(folder, kind, 34 if when == "before" else 0)
    injection = moved(peftcore.apply(model, name, **options))
    if when == "after":
        resize(model, 34)
    injection.save(tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / TENSORS)
    assert all(value.shape[0] == 2 for key, value in held.items() if ":rows." in key)
    other = opened(folder, kind, seed=5)
    own = run(other)
    loaded = peftcore.load(other, tmp_path / "adapter")
    torch.testing.assert_close(run(other), run(model))
    assert not loaded.trained_along
    loaded.trainable()
    training = {name for name, parameter in other.named_parameters() if parameter.requires_grad}
    assert training == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert loaded.summary().parameters == injection.summary().parameters
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / "adapter" / TENSORS).read_bytes()
    with loaded.disabled():
        assert torch.equal(run(other), own)
    if kind in ("untied", "classifier") or (kind == "tied" and method == "beside"):  # a merge would break other ties
        loaded.merge()
        torch.testing.assert_close(run(other), run(model), atol=1e-5, rtol=1e-5)
        loaded.unmerge()
    loaded.remove()
    assert torch.equal(run(other), own)


def test_new_tokens_that_train_beside_others_that_do_not(base_at: Any, tmp_path: Path) -> None:
    model = opened(base_at("untied"), "untied", 35)
    moved(peftcore.apply(model, "trainable_tokens", token_indices=[3, 33])).save(tmp_path / "adapter")
    other = opened(base_at("untied"), "untied", 35, seed=5)
    peftcore.load(other, tmp_path / "adapter")
    torch.testing.assert_close(run(other), run(model))


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_adapter_is_saved_as_if_it_were_not(method: str, base_at: Any, tmp_path: Path) -> None:
    name, options = METHODS[method]
    model = opened(base_at("untied"), "untied")
    injection = moved(peftcore.apply(model, name, **options))
    for format in ("peftcore", "peft"):
        injection.save(tmp_path / format, format=format)
    injection.merge()
    merged = run(model)
    for format in ("peftcore", "peft"):
        injection.save(tmp_path / f"{format}-merged", format=format)
        (one,), (two,) = ((tmp_path / each).glob("*.safetensors") for each in (format, f"{format}-merged"))
        assert one.read_bytes() == two.read_bytes()
    assert injection.merged
    assert torch.equal(run(model), merged)
    other = opened(base_at("untied"), "untied", seed=5)
    loaded = peftcore.load(other, tmp_path / "peftcore")
    loaded.merge()
    loaded.save(tmp_path / "again", format=["peftcore", "peft"])
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / "peftcore" / TENSORS).read_bytes()


def test_what_trains_as_a_whole_is_not_saved_twice(base_at: Any, tmp_path: Path) -> None:
    for kind, train in (("untied", "lm_head"), ("tied", "embed_tokens")):
        model = opened(base_at(kind), kind)
        moved(peftcore.apply(model, "lora", train=[train])).save(tmp_path / kind)
        held = load_file(tmp_path / kind / TENSORS)
        assert [key for key in held if ":rows." in key] == (
            ["model.embed_tokens:rows.value"] if kind == "untied" else []
        )
        other = opened(base_at(kind), kind, seed=5)
        peftcore.load(other, tmp_path / kind)
        torch.testing.assert_close(run(other), run(model))


def test_a_base_without_new_rows_has_none_in_the_file(base_at: Any, tmp_path: Path) -> None:
    model = opened(base_at("untied"), "untied", 0)
    peftcore.apply(model, "lora").save(tmp_path / "same")
    resize(model, 30)
    peftcore.injections(model)["lora"].save(tmp_path / "fewer")
    for name in ("same", "fewer"):
        assert not [key for key in load_file(tmp_path / name / TENSORS) if ":rows." in key]


def test_a_base_that_was_saved_with_its_new_rows_has_them(base_at: Any, tmp_path: Path) -> None:
    model: Any = opened(base_at("untied"), "untied")
    injection = moved(peftcore.apply(model, "lora", rank=2))
    for format in ("kohya", "diffusers"):
        with pytest.raises(ExportError, match=r"2 rows were added to .* files cannot hold"):
            injection.save(tmp_path / format, format=format)
        assert not (tmp_path / format).exists()
    model.save_pretrained(tmp_path / "resized")
    model.config._name_or_path = str(tmp_path / "resized")
    for format in ("kohya", "diffusers", "peftcore"):
        injection.save(tmp_path / format, format=format)
        other = type(model).from_pretrained(tmp_path / "resized").eval()
        peftcore.load(other, tmp_path / format)
        torch.testing.assert_close(run(other), run(model))
    assert not [key for key in load_file(tmp_path / "peftcore" / TENSORS) if ":rows." in key]


def test_a_base_of_another_length_is_told_what_to_do(base_at: Any, tmp_path: Path) -> None:
    model = opened(base_at("tied"), "tied")
    moved(peftcore.apply(model, "lora", rank=2)).save(tmp_path / "adapter")
    for rows in (0, 40):
        other = opened(base_at("tied"), "tied", rows)
        before = run_of_known(other)
        with pytest.raises(
            HostMismatch, match=r"had 34 when .* 2 of them: call model\.resize_token_embeddings\(34\) first"
        ):
            peftcore.load(other, tmp_path / "adapter")
        assert torch.equal(run_of_known(other), before)
        assert not peftcore.injections(other)


def test_rows_of_tables_that_a_model_lacks_are_left(base_at: Any, tmp_path: Path) -> None:
    """An adapter of a language model on the bare encoder and on a classifier, which have no such head."""
    model: Any = opened(base_at("untied"), "untied")
    moved(peftcore.apply(model, "lora", rank=2)).save(tmp_path / "adapter")
    for cls in (transformers.LlamaModel, transformers.LlamaForSequenceClassification):
        other: Any = cls.from_pretrained(base_at("untied"), pad_token_id=0).eval()
        resize(other, 34, seed=5)
        injection = peftcore.load(other, tmp_path / "adapter")
        assert sum(path.endswith(":rows") for path in injection.operators) == 1
        stack = other if cls is transformers.LlamaModel else other.model
        torch.testing.assert_close(stack(IDS)[0], model.model(IDS)[0])
        injection.save(tmp_path / "back")
        back = opened(base_at("untied"), "untied", seed=5)
        peftcore.load(back, tmp_path / "back")
        torch.testing.assert_close(back.model(IDS)[0], model.model(IDS)[0])


def run_of_known(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS % 30)[0]


def test_rows_are_of_the_first_adapter_where_no_file_tells(tmp_path: Path) -> None:
    """A base that is in no folder and in no cache is as it was when it was adapted first."""
    cls, config, sizes = KINDS["untied"]
    torch.manual_seed(1)
    model = getattr(transformers, cls)(getattr(transformers, config)(**sizes)).eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    peftcore.apply(model, "lora", name="first")
    resize(model, 34)
    injection = moved(peftcore.apply(model, "lora", target="k_proj", rank=2, name="second"))
    injection.save(tmp_path / "adapter")
    other = getattr(transformers, cls)(getattr(transformers, config)(**sizes)).eval()
    other.load_state_dict(state)
    resize(other, 34, seed=5)
    peftcore.load(other, tmp_path / "adapter")
    peftcore.injections(model)["first"].remove()
    torch.testing.assert_close(run(other), run(model))


def test_a_base_in_the_cache_of_the_hub_tells(base_at: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def cached(name: str, file: str, revision: str | None = None) -> str:
        asked.append((name, file, revision))
        return str(base_at("untied") / file)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    model: Any = opened(base_at("untied"), "untied")
    model.config._name_or_path, model.config._commit_hash = "someone/base", "abc"
    peftcore.apply(model, "lora").save(tmp_path / "adapter")
    assert asked == [("someone/base", "config.json", "abc")]
    assert "lm_head:rows.value" in load_file(tmp_path / "adapter" / TENSORS)


def test_on_the_meta_device(base_at: Any, tmp_path: Path) -> None:
    model = opened(base_at("tied"), "tied")
    moved(peftcore.apply(model, "lora", rank=2)).save(tmp_path / "adapter")
    real = opened(base_at("tied"), "tied", seed=5)
    with torch.device("meta"):
        other: Any = type(model)(model.config).eval()
    peftcore.load(other, tmp_path / "adapter")
    other.load_state_dict(real.state_dict(), strict=False, assign=True)
    other.tie_weights()
    other.model.rotary_emb = real.model.rotary_emb
    torch.testing.assert_close(run(other), run(model))


def test_training_goes_through_them(base_at: Any, tmp_path: Path) -> None:
    """Gradients of the adapter are those of the base that has the rows itself."""
    model = opened(base_at("untied"), "untied")
    injection = moved(peftcore.apply(model, "lora", rank=2))
    injection.save(tmp_path / "adapter")
    other = opened(base_at("untied"), "untied", seed=5)
    loaded = peftcore.load(other, tmp_path / "adapter", trainable=True)
    for each in (model, other):
        each.train()(IDS)[0].square().mean().backward()
    for one, two in zip(injection.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def of_peft(model: Any, tmp_path: Path, **options: Any) -> Any:
    """An adapter of peft, which saves tables to which rows were added."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, **options)
    theirs = peft.get_peft_model(model, config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return theirs


PEFTS: dict[str, dict[str, Any]] = {
    "beside": {"target_modules": ["q_proj"]},
    "in the table": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 33]},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", PEFTS.values(), ids=PEFTS)
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_files_of_peft_that_hold_tables_are_read(kind: str, options: Any, base_at: Any, tmp_path: Path) -> None:
    theirs = of_peft(opened(base_at(kind), kind), tmp_path, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    assert any(key.endswith("embed_tokens.weight") or "base_layer" in key
               for key in load_file(tmp_path / "theirs" / "adapter_model.safetensors"))  # fmt: skip
    other = opened(base_at(kind), kind, seed=5)
    injection = peftcore.load(other, tmp_path / "theirs")
    torch.testing.assert_close(run(other), run(theirs))
    assert {each.operator.start for each in injection.grafts if each.key.endswith(":rows")} == {32}
    injection.save(tmp_path / "ours")
    again = opened(base_at(kind), kind, seed=6)
    peftcore.load(again, tmp_path / "ours")
    assert torch.equal(run(again), run(other))
    with pytest.raises(PeftcoreError, match=r"model\.resize_token_embeddings\(34\) first"):
        peftcore.load(opened(base_at(kind), kind, 40), tmp_path / "theirs")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_a_table_that_is_another_one_as_a_whole_is_read(kind: str, base_at: Any, tmp_path: Path) -> None:
    theirs = of_peft(opened(base_at(kind), kind, 0), tmp_path, target_modules=["q_proj"])
    nn.init.normal_(theirs.get_input_embeddings().weight)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    other = opened(base_at(kind), kind, 0)
    peftcore.load(other, tmp_path / "theirs")
    ids = IDS % 30
    with torch.no_grad():
        torch.testing.assert_close(other(ids)[0], theirs(ids)[0])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["beside", "in the table", "trainable_tokens", "loaded"])
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_peft_reads_them(kind: str, method: str, base_at: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = opened(base_at(kind), kind)
    name, options = METHODS.get(method, ("lora", {"rank": 2}))
    if method == "trainable_tokens":
        name, options = method, {"token_indices": [3, 33]}
    injection = moved(peftcore.apply(model, name, **options))
    expected = run(model)
    if method == "loaded":
        injection.save(tmp_path / "native")
        model = opened(base_at(kind), kind, seed=9)
        injection = peftcore.load(model, tmp_path / "native")
    injection.save(tmp_path / "ours", format="peft")
    theirs = peft.PeftModel.from_pretrained(opened(base_at(kind), kind, seed=5), tmp_path / "ours").eval()
    torch.testing.assert_close(run(theirs), expected)
    again = opened(base_at(kind), kind, seed=6)
    peftcore.load(again, tmp_path / "ours")
    torch.testing.assert_close(run(again), expected)
