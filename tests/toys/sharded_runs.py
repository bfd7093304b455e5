"""What each process of training/test_processes.py does: ``torchrun sharded_runs.py WHAT.json``, a list of runs. Each is
trained, its model checked to lie in pieces, and gone on with from its first checkpoint as if it had been killed."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from silent import Silent

from peftcore.layers.pieces import is_cut
from peftcore_lab.runs.folder import first_process
from peftcore_lab.runs.run import Run
from peftcore_lab.training import train as job

trainers: list[Any] = []
made = job.trainer_for


def noted(*args: Any) -> Any:
    trainers.append(made(*args))
    return trainers[-1]


def is_in_pieces(model: torch.nn.Module) -> bool:
    blocks = model.bert.encoder.layer
    return all(is_cut(each) and each.to_local().numel() < each.numel() for each in blocks.parameters())


def interrupt(out: Path) -> None:
    """Leave what a run has after its first checkpoint, and the whole of it in another place."""
    out.rename(out.with_name(f"{out.name}-whole"))
    kept = out.with_name(f"{out.name}-whole")
    (first, *_) = sorted(kept.glob("checkpoints/checkpoint-*"), key=lambda each: int(each.name.rpartition("-")[2]))
    shutil.copytree(first, out / "checkpoints" / first.name)
    shutil.copy(kept / "run.json", out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    job.trainer_for = noted
    for values in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run = Run.model_validate(values)
        job.train(run, Silent())
        assert is_in_pieces(trainers[-1].model), run.method.name
        trainers[-1].injection.save(run.out / "again")
        torch.distributed.barrier()
        if first_process():
            interrupt(run.out)
        torch.distributed.barrier()
        job.train(run, Silent(), resume=True)
        torch.distributed.barrier()
