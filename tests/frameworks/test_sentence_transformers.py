"""The Trainer of sentence-transformers, which saves the model in a way of its own: adapters are in its checkpoints, and
a run that goes on from one ends where the uninterrupted one does."""

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import peftcore
from peftcore.errors import CheckpointError, TrainingError
from peftcore.training import PeftcoreCallback

PORTS = Path(__file__).resolve().parents[2] / "examples" / "ports"
TEXTS = ["red one", "zwei blau"]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("sentence_transformers")
    monkeypatch.syspath_prepend(str(PORTS))
    return importlib.import_module("small")


@pytest.fixture
def trainer(small: Any, tmp_path: Path) -> Callable[..., Any]:
    """A Trainer of a small encoder with an adapter; the method and its options, and options of the run."""
    import sentence_transformers as st
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    folder = small.save_encoder(str(tmp_path / "base"))

    def made(
        run: str = "run",
        method: Any = "lora",
        adapter: Any = None,
        dropout: float = 0.0,
        given: bool = False,
        **options: Any,
    ) -> Any:
        torch.manual_seed(0)
        model = st.SentenceTransformer(folder, device="cpu")
        model[0].auto_model.config.hidden_dropout_prob = dropout
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        injection = peftcore.apply(model, method, seed=0, **(adapter or {"target": "all-linear"}))
        plain = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 5e-3, "logging_steps": 1}
        data = Dataset.from_dict(small.pairs())
        own = (injection.optimizer(torch.optim.AdamW, lr=5e-3), None)  # which saves state between steps itself
        return st.SentenceTransformerTrainer(
            model=model,
            args=st.SentenceTransformerTrainingArguments(
                str(tmp_path / run),
                **{"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 8, **plain, **options},
            ),
            train_dataset=data,
            eval_dataset=data.select(range(16)),
            loss=MultipleNegativesRankingLoss(model),
            optimizers=own if given else (None, None),
            callbacks=[PeftcoreCallback()],
        )

    return made


def values(run: Any) -> dict[str, torch.Tensor]:
    (injection,) = peftcore.injections(run.model).values()
    return {name: value.clone() for name, value in injection.state_dict().items()}


def test_checkpoints_hold_the_adapter(trainer: Callable[..., Any], tmp_path: Path) -> None:
    import sentence_transformers as st

    run, folder = trainer(), str(tmp_path / "base")
    run.train()
    fresh = st.SentenceTransformer(folder, device="cpu")
    untrained = fresh.encode(TEXTS, convert_to_tensor=True)
    peftcore.load(fresh, tmp_path / "run" / "checkpoint-6")
    found = fresh.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, run.model.encode(TEXTS, convert_to_tensor=True), rtol=0, atol=1e-6)
    assert not torch.allclose(found, untrained, atol=1e-2)
    first, last = (
        peftcore.load(st.SentenceTransformer(folder), tmp_path / "run" / f"checkpoint-{step}") for step in (3, 6)
    )
    assert all(not torch.equal(value, last.state_dict()[key]) for key, value in first.state_dict().items())


@pytest.mark.parametrize(
    ("method", "adapter", "options"),
    [
        ("lora", {"target": "all-linear", "dropout": 0.1}, {"dropout": 0.1}),
        ("lora", {"target": "all-linear"}, {"batch_sampler": "no_duplicates", "gradient_accumulation_steps": 2}),
        ("adalora", {"target": "all-linear", "orthogonality": 0.0, "rank": 4, "target_rank": 1}, {}),
        ("adalora", {"target": "all-linear", "orthogonality": 0.0, "rank": 4, "target_rank": 1}, {"given": True}),
        ("lora", {"target": ["query"], "train": ["embeddings.word_embeddings"]}, {"optim": "sgd"}),
    ],
)
def test_a_run_that_goes_on_ends_as_the_uninterrupted_one(
    method: str, adapter: Any, options: Any, trainer: Callable[..., Any], tmp_path: Path
) -> None:
    """AdaLoRA's schedule has a state between steps, which is in no state dict."""
    wishes = {"method": method, "adapter": adapter, **options}
    whole = trainer(**wishes)
    whole.train()
    expected, losses = values(whole), [each.get("loss") for each in whole.state.log_history][3:6]
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    resumed = trainer(**wishes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert [each.get("loss") for each in resumed.state.log_history][3:6] == losses
    found = values(resumed)
    assert found.keys() == expected.keys() and all(torch.equal(value, expected[key]) for key, value in found.items())


def test_the_best_checkpoint_is_loaded_at_the_end(trainer: Callable[..., Any], tmp_path: Path) -> None:
    import sentence_transformers as st

    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "greater_is_better": True}
    run = trainer(**options, metric_for_best_model="eval_loss")  # the worst, which is not the last one
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-3")
    saved = peftcore.load(st.SentenceTransformer(str(tmp_path / "base")), tmp_path / "run/checkpoint-3").state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in values(run).items())


def test_a_checkpoint_of_another_run_is_refused(trainer: Callable[..., Any], tmp_path: Path) -> None:
    trainer().train()
    trainer("other", learning_rate=1e-3).train()
    for step in ("checkpoint-3", "moved"):  # the one of this step in its folder is of another run, or there is none
        if step == "moved":
            (tmp_path / "other/checkpoint-3").rename(tmp_path / "moved")
            shutil.rmtree(tmp_path / "run/checkpoint-3")
        where = tmp_path / "moved" if step == "moved" else tmp_path / "other" / step
        with pytest.raises(TrainingError, match="has to stay in output_dir"):
            trainer().train(resume_from_checkpoint=str(where))
    with pytest.raises(CheckpointError, match="rank was 8 and is 2"):
        (tmp_path / "moved").rename(tmp_path / "other/checkpoint-3")
        trainer("other", adapter={"target": "all-linear", "rank": 2}, optim="sgd").train(
            resume_from_checkpoint=str(tmp_path / "other/checkpoint-3")
        )
