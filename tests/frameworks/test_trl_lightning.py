"""TRL and Lightning train an adapted model as they train any other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_hosts import arguments, host
from training_toys import ByRow, Steps, batch, toy

import peftcore
from peftcore.training import PeftcoreCallback


def moved(injection: peftcore.Injection, before: dict[str, Tensor]) -> bool:
    return all(not torch.equal(value, before[key]) for key, value in injection.state_dict().items())


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if ".peft." not in key}


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_supervised_fine_tuning_of_trl(method: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets, which TRL reads, is not installed")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(37))])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )
    texts = [" ".join(f"w{(start + step) % 37}" for step in range(6)) for start in range(12)]
    model = host("llama")
    injection = peftcore.apply(model, method, seed=0)
    base, start = copied(model), {key: value.clone() for key, value in injection.state_dict().items()}
    given = arguments(tmp_path).to_dict()
    names = ("output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "save_steps", "report_to")
    config = trl.SFTConfig(**{name: given[name] for name in names}, use_cpu=True, disable_tqdm=True, max_length=16)
    run = trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        callbacks=[PeftcoreCallback()],
    )
    assert run.model is model
    run.train()
    assert moved(injection, start)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())
    assert (tmp_path / "checkpoint-3" / "model.safetensors").stat().st_size < 25_000  # with statistics


@pytest.mark.parametrize("method", [ByRow, Steps])
def test_lightning(method: Any, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")

    class Classifier(lightning.LightningModule):
        """As Lightning's documentation has it, with an adapted model inside."""

        def __init__(self) -> None:
            super().__init__()
            self.model = toy()
            self.injection = [peftcore.apply(self.model, method, seed=0)]

        def training_step(self, given: dict[str, Tensor], index: int) -> Tensor:
            return self.model(**given)["loss"]

        def configure_optimizers(self) -> Any:
            optimizer = self.injection[0].optimizer(torch.optim.AdamW, lr=0.05, total_steps=6)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def fit(steps: int, checkpoint: str | None = None) -> tuple[Classifier, Any]:
        torch.manual_seed(0)
        module = Classifier().eval()
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(tmp_path),
        )
        data = torch.utils.data.DataLoader([batch()] * 6, batch_size=None)  # Lightning resumes at any of them
        trainer.fit(module, data, ckpt_path=checkpoint)
        return module, trainer

    whole, _ = fit(6)
    base = toy().state_dict()
    assert all(torch.equal(whole.model.state_dict()[key], value) for key, value in base.items())
    half, trainer = fit(3)
    trainer.save_checkpoint(str(tmp_path / "half.ckpt"))
    resumed, _ = fit(6, str(tmp_path / "half.ckpt"))
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    assert any(not torch.equal(half.state_dict()[key], value) for key, value in whole.state_dict().items())
