"""Checkpoints of models whose tensors transformers calls otherwise in files: resumed, and the best restored, to the
bit; adapters in files of their own, beside what the Trainer writes."""

import functools
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from host_zoo import build
from safetensors.torch import load_file
from torch import Tensor, nn
from training_hosts import Bare, Squares, arguments, host, rows, tensors, trainer

import peftcore
from peftcore.errors import CheckpointError, TrainingError
from peftcore.testing.hosts import HOSTS
from peftcore.trainers.trainer_checkpoints import SavesAdapters, digest, frozen_keys
from peftcore.training import PeftcoreCallback, PeftcoreTrainer

VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def classifier(family: str, **sizes: Any) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, num_labels=3)
    model = getattr(transformers, f"{family}ForImageClassification")(config)
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    **{name: functools.partial(build, name) for name in ("vit", "detr", "llava", "gemma3", "qwen2_vl")},
    "deit": functools.partial(classifier, "DeiT", **VIT, image_size=32, patch_size=8),
    "beit": functools.partial(classifier, "Beit", **VIT, image_size=32, patch_size=8),
    "segformer": functools.partial(
        classifier,
        "Segformer",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    ),
    "mixtral": HOSTS["moe"].build,
}

TARGETS = {"mixtral": ["attn.q", "experts.gate", "experts.up", "experts.down"]}
"""What `all-linear` leaves out."""


class Noted(transformers.TrainerCallback):
    """Notes the adapter at each checkpoint, and what the model then gives."""

    def __init__(self, injection: peftcore.Injection, inputs: dict[str, Any]) -> None:
        self.injection, self.inputs = injection, inputs
        self.at: dict[int, tuple[dict[str, Tensor], list[Tensor]]] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at[state.global_step] = self.now()

    def now(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        model = self.injection.model
        training = model.training
        with torch.no_grad():
            found = tensors(model.eval()(**self.inputs))
        model.train(training)
        return {key: value.clone() for key, value in self.injection.state_dict().items()}, found


def assert_same(one: tuple[dict[str, Tensor], list[Tensor]], other: tuple[dict[str, Tensor], list[Tensor]]) -> None:
    """To the bit."""
    assert one[0].keys() == other[0].keys()
    assert [key for key, value in one[0].items() if not torch.equal(value, other[0][key])] == []
    assert len(one[1]) == len(other[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.share(3)
@pytest.mark.parametrize("name", MODELS)
def test_a_run_resumes_and_ends_with_the_best_where_files_have_other_names(name: str, tmp_path: Path) -> None:
    built, inputs = MODELS[name]()
    built.save_pretrained(tmp_path / "base")

    def run(resume: bool) -> tuple[Noted, transformers.Trainer]:
        model = type(built).from_pretrained(tmp_path / "base")
        injection = peftcore.apply(model, "lora", target=TARGETS.get(name, "all-linear"), rank=2, seed=0)
        noted = Noted(injection, inputs)
        options = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "label_names": []}
        options |= {"load_best_model_at_end": not resume, "metric_for_best_model": "loss", "greater_is_better": True}
        made = Squares(
            model,
            arguments(tmp_path / "run", **options, remove_unused_columns=False, learning_rate=1e-2),
            train_dataset=[{}] * 12,
            eval_dataset=[{}] * 2,
            data_collator=lambda _: dict(inputs),
            callbacks=[PeftcoreCallback(), noted],
        )
        made.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2") if resume else None)
        return noted, made

    whole, made = run(resume=False)
    assert Path(made.state.best_model_checkpoint).name == "checkpoint-2"
    assert not torch.equal(whole.at[2][1][0], whole.at[4][1][0])
    assert_same(whole.now(), whole.at[2])
    resumed, _ = run(resume=True)
    assert_same(resumed.now(), whole.at[4])
    keys = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors").keys()
    assert keys <= resumed.injection.model.state_dict().keys()


def test_a_model_that_trains_whole_resumes_too(tmp_path: Path) -> None:
    """The callback is there, and no adapter: as in a comparison with full fine-tuning."""
    built, inputs = MODELS["vit"]()
    built.save_pretrained(tmp_path / "base")
    ends = []
    for checkpoint in (None, str(tmp_path / "run" / "checkpoint-2")):
        model = type(built).from_pretrained(tmp_path / "base")
        made = Squares(
            model,
            arguments(tmp_path / "run", max_steps=4, save_steps=2, label_names=[], remove_unused_columns=False),
            train_dataset=[{}] * 12,
            data_collator=lambda _: dict(inputs),
            callbacks=[PeftcoreCallback()],
        )
        made.train(resume_from_checkpoint=checkpoint)
        ends.append({key: value.clone() for key, value in model.state_dict().items()})
    assert [key for key, value in ends[0].items() if not torch.equal(value, ends[1][key])] == []


def test_tensors_of_one_storage_are_saved_all(tmp_path: Path) -> None:
    """As `vector_to_parameters` leaves them."""
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        model, injection = adapted()
        vector = torch.nn.utils.parameters_to_vector(injection.parameters())
        torch.nn.utils.vector_to_parameters(vector, injection.parameters())
        trainer(model, "bert", tmp_path, [PeftcoreCallback()]).train(resume_from_checkpoint=checkpoint)
        ends.append({key: value.clone() for key, value in injection.state_dict().items()})
    assert [key for key, value in ends[0].items() if not torch.equal(value, ends[1][key])] == []


def batch() -> dict[str, Tensor]:
    return {key: value[None] for key, value in rows("bert")[0].items()}


def adapted(method: Any = "lora", name: str = "bert", **options: Any) -> tuple[nn.Module, peftcore.Injection]:
    model = host(name)
    return model, peftcore.apply(model, method, seed=0, **options)


def test_what_the_trainer_saves_has_the_adapter_beside_the_clean_base(tmp_path: Path) -> None:
    """At the end, in each checkpoint, and before anything has trained."""
    model, injection = adapted(train=["classifier"])
    run = trainer(model, "bert", tmp_path / "run", [PeftcoreCallback()])
    run.save_model(str(tmp_path / "early"))
    fresh = {key: value.clone() for key, value in injection.state_dict().items()}
    run.train()
    run.save_model(str(tmp_path / "out"))
    run.save_model()
    plain = dict(host("bert").state_dict())
    for folder, values in (
        ("early", fresh),
        ("out", injection.state_dict()),
        ("run", injection.state_dict()),
        ("run/checkpoint-6", injection.state_dict()),
    ):
        place = tmp_path / folder
        base = type(model).from_pretrained(place) if "checkpoint" not in folder else host("bert")
        assert all(torch.equal(value, plain[key]) for key, value in base.state_dict().items())
        has_adapter = any(".peft." in key for key in load_file(place / "model.safetensors"))
        assert has_adapter == ("checkpoint" in folder)  # for the Trainer, which reads that file
        loaded = peftcore.load(base, place)
        assert all(torch.equal(value, values[key]) for key, value in loaded.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(base.eval()(**batch()).logits, model.eval()(**batch()).logits)


def test_users_own_saving_writes_the_base_alone(tmp_path: Path) -> None:
    model, injection = adapted()
    trainer(model, "bert", tmp_path / "run", [PeftcoreCallback()]).train()
    model.save_pretrained(tmp_path / "base")
    assert not list((tmp_path / "base").glob("adapter*"))
    assert not any(".peft." in key for key in load_file(tmp_path / "base" / "model.safetensors"))
    assert isinstance(vars(model)["save_pretrained"], SavesAdapters)
    injection.remove()
    assert "save_pretrained" not in vars(model)


def test_a_state_dict_that_is_handed_over_is_saved_without_adapters(tmp_path: Path) -> None:
    """As the Trainer does it where it has gathered one from several processes."""
    model, _ = adapted()
    trainer(model, "bert", tmp_path / "run", [PeftcoreCallback()]).train()
    model.save_pretrained(tmp_path / "out", state_dict=model.state_dict())
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == host("bert").state_dict().keys()
    assert (tmp_path / "out" / "adapter.safetensors").exists()
    model.save_pretrained(tmp_path / "other", state_dict=model.state_dict(), is_main_process=False)
    assert not (tmp_path / "other" / "adapter.safetensors").exists()


def test_of_several_adapters_those_that_train_get_folders_of_their_names(tmp_path: Path) -> None:
    model, first = adapted(name="bert")
    second = peftcore.apply(model, "ia3")
    waiting = peftcore.apply(model, "bitfit")
    waiting.trainable(False)
    run = trainer(model, "bert", tmp_path / "run", [PeftcoreCallback()])
    run.save_model(str(tmp_path / "out"))
    found = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("adapter.safetensors"))
    assert [str(path.parent) for path in found] == sorted([first.name, second.name])
    first.merge()
    run.save_model(str(tmp_path / "merged"))  # its effect is in the base that is saved
    assert [path.parent.name for path in (tmp_path / "merged").rglob("adapter.safetensors")] == ["merged"]


def test_the_folder_that_is_pushed_has_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        def upload_folder(self, folder_path: str, **_: Any) -> Any:
            pushed.append(sorted(path.name for path in Path(folder_path).glob("adapter.*")))
            done: Future[None] = Future()
            done.set_result(None)
            return done

    pushed: list[list[str]] = []
    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)

    def init_hf_repo(self: transformers.Trainer, **_: Any) -> None:
        self.hub_model_id, self.push_in_progress = "a/b", None

    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", init_hf_repo)
    monkeypatch.setattr(transformers.Trainer, "create_model_card", lambda self, **_: None)
    model, _ = adapted()
    run = trainer(model, "bert", tmp_path / "run", [PeftcoreCallback()], push_to_hub=True, hub_model_id="a/b")
    run.train()
    run.push_to_hub()
    assert pushed == [["adapter.json", "adapter.safetensors"]] * len(pushed)
    assert len(pushed) >= 2


def test_models_that_are_not_of_transformers_are_saved_alike_by_our_trainer(tmp_path: Path) -> None:
    model = Bare()
    injection = peftcore.apply(model, "lora", target=["up", "down"], rank=2)
    data = [{"x": torch.randn(4), "labels": torch.tensor(index % 3)} for index in range(12)]
    run = PeftcoreTrainer(model, arguments(tmp_path / "run", label_names=["labels"]), train_dataset=data)
    run.train()
    run.save_model(str(tmp_path / "out"))
    base = Bare()
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == base.state_dict().keys()
    for folder in (tmp_path / "out", tmp_path / "run" / "checkpoint-6"):
        base = Bare()
        if folder.name == "out":
            base.load_state_dict(load_file(folder / "model.safetensors"))
        loaded = peftcore.load(base, folder)
        assert all(torch.equal(value, injection.state_dict()[key]) for key, value in loaded.state_dict().items())


STATEFUL = {
    "adalora": {"target_rank": 2, "warmup": 1, "interval": 1, "final": 1},
    "adapterdrop": {"robust": True, "drop_first_layers": 1},
    "vera": {},
    "randlora": {},
    "fourierft": {"n_frequency": 50},
}


@pytest.mark.parametrize("method", STATEFUL)
def test_the_trainers_own_optimizer_resumes_exactly_too(method: str, tmp_path: Path) -> None:
    """Statistics and counters are in the checkpoint, and draws that come out the same each time are not."""
    results = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        model, injection = adapted(method, **STATEFUL[method])
        trainer(model, "bert", tmp_path, [PeftcoreCallback()]).train(resume_from_checkpoint=checkpoint)
        results.append({key: value.clone() for key, value in injection.state_dict().items()})
    assert [key for key, value in results[0].items() if not torch.equal(value, results[1][key])] == []
    size = (tmp_path / "checkpoint-3" / "model.safetensors").stat().st_size
    held = sum(value.nbytes for value in injection.state_dict().values())
    assert size < (6 if method == "adalora" else 1) * held + 10_000


def test_checkpoints_that_lack_the_adapter_are_refused(tmp_path: Path) -> None:
    """Those of other adapters, and those that a bare Trainer wrote under other names, or without statistics."""
    model, _ = adapted("adalora", target_rank=4)
    trainer(model, "bert", tmp_path / "bare", []).train()
    model, _ = adapted("adalora", target_rank=4)
    with pytest.raises(TrainingError, match=r"the checkpoint lacks 28 tensors"):
        trainer(model, "bert", tmp_path, [PeftcoreCallback()]).train(str(tmp_path / "bare" / "checkpoint-3"))
    model, _ = adapted("lora")
    trainer(model, "bert", tmp_path / "lora", [PeftcoreCallback()]).train()
    model, _ = adapted("lora", target=["attn.q", "attn.k"])
    with pytest.raises(CheckpointError, match=r"target modules: 2 are missing, .* and 2 are new"):
        trainer(model, "bert", tmp_path, [PeftcoreCallback()]).train(str(tmp_path / "lora" / "checkpoint-3"))


def test_weights_that_the_user_loads_are_no_checkpoint(tmp_path: Path) -> None:
    model, _ = adapted()
    run = trainer(model, "bert", tmp_path, [PeftcoreCallback()])
    model.load_state_dict(host("bert").state_dict(), strict=False)
    run.train()
    assert run.state.global_step == 6


def test_frozen_keys_are_those_of_the_base_that_does_not_train() -> None:
    model, _ = adapted()
    assert frozen_keys(model) == set(dict(host("bert").named_parameters()))
    model.classifier.requires_grad_(True)
    assert set(dict(host("bert").named_parameters())) - frozen_keys(model) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_a_digest_tells_values_apart(dtype: torch.dtype) -> None:
    values = torch.tensor([1, 0, 1, 0]).to(dtype)
    assert digest(values) == digest(values.clone()) == digest(values.repeat_interleave(2)[::2])
    assert digest(values) != digest(values.flip(0))
    assert len(digest(torch.tensor(1, dtype=dtype))) == 64


def weaker_base(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.get_submodule("bert.encoder.layer.1.attention.self.value").weight.mul_(0.99)
    return model


@pytest.mark.parametrize("kind", ["callback", "elsewhere", "trainer"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 99}, "alpha was 8.0 and is 99.0"),
        ({"dropout": 0.5}, "dropout was 0.0 and is 0.5"),
        ({}, "the weights of the base have other values"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_adapter_is_refused(
    options: dict[str, Any], words: str, kind: str, tmp_path: Path
) -> None:
    """Wherever the checkpoint lies; `PeftcoreTrainer` refuses it before anything is read."""
    model, _ = adapted()
    trainer(model, "bert", tmp_path, [PeftcoreCallback()]).train()
    checkpoint = tmp_path / "checkpoint-3"
    if kind == "elsewhere":
        checkpoint = checkpoint.rename(tmp_path / "moved")
    other, injection = adapted(**options) if options else adapted()
    if not options:
        weaker_base(other)
    before = {key: value.clone() for key, value in injection.state_dict().items()}
    run = trainer(other, "bert", tmp_path, [PeftcoreCallback()])
    if kind == "trainer":
        run = PeftcoreTrainer(other, run.args, train_dataset=run.train_dataset)
    with pytest.raises(CheckpointError, match=words):
        run.train(resume_from_checkpoint=str(checkpoint))
    if kind == "trainer":
        assert all(torch.equal(value, before[key]) for key, value in injection.state_dict().items())
    again, injection = adapted()
    trainer(again, "bert", tmp_path, [PeftcoreCallback()]).train(resume_from_checkpoint=str(checkpoint))


def test_other_target_modules_are_named_before_shapes_are_compared(tmp_path: Path) -> None:
    model, _ = adapted()
    trainer(model, "bert", tmp_path, [PeftcoreCallback()]).train()
    other, _ = adapted(target=["query"], rank=3)
    run = PeftcoreTrainer(other, arguments(tmp_path), train_dataset=rows("bert"))
    with pytest.raises(CheckpointError, match="rank was 8 and is 3; target modules: 2 are missing, such as bert"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_fresh_head_is_not_the_base(tmp_path: Path) -> None:
    """It starts otherwise each time, and the checkpoint has its values."""
    for seed, checkpoint in ((0, None), (1, str(tmp_path / "checkpoint-3"))):
        model, _ = adapted(train=["classifier"])
        with torch.no_grad():
            model.get_submodule("classifier").weight.normal_(generator=torch.Generator().manual_seed(seed))
        trainer(model, "bert", tmp_path, [PeftcoreCallback()]).train(resume_from_checkpoint=checkpoint)
