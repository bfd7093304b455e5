"""The Trainer of sentence-transformers, which saves the model in a way of its own: adapters are in its checkpoints."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import peftcore
from peftcore.errors import TrainingError
from peftcore.training import PeftcoreCallback

PORTS = Path(__file__).resolve().parents[2] / "examples" / "ports"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_checkpoints_hold_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    st: Any = pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    monkeypatch.syspath_prepend(str(PORTS))
    small = importlib.import_module("small")
    folder = small.save_encoder(str(tmp_path / "base"))

    def trainer() -> Any:
        model = st.SentenceTransformer(folder, device="cpu")
        peftcore.apply(model, "lora", target="all-linear", seed=0)
        options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 5e-3}
        return st.SentenceTransformerTrainer(
            model=model,
            args=st.SentenceTransformerTrainingArguments(
                str(tmp_path / "run"), max_steps=6, save_steps=3, per_device_train_batch_size=8, **options
            ),
            train_dataset=Dataset.from_dict(small.pairs()),
            loss=MultipleNegativesRankingLoss(model),
            callbacks=[PeftcoreCallback()],
        )

    run = trainer()
    run.train()
    fresh = st.SentenceTransformer(folder, device="cpu")
    texts = ["red one", "zwei blau"]
    untrained = fresh.encode(texts, convert_to_tensor=True)
    peftcore.load(fresh, tmp_path / "run" / "checkpoint-6")
    found = fresh.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(found, run.model.encode(texts, convert_to_tensor=True), rtol=0, atol=1e-6)
    assert not torch.allclose(found, untrained, atol=1e-2)
    first, last = (
        peftcore.load(st.SentenceTransformer(folder), tmp_path / "run" / f"checkpoint-{step}") for step in (3, 6)
    )
    assert all(not torch.equal(value, last.state_dict()[key]) for key, value in first.state_dict().items())
    with pytest.raises(TrainingError, match="saves models in a way of its own"):  # what it reads has no adapter
        trainer().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
