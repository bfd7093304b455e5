"""The task of pictures and the classes of their pixels: a head on any segmentation model of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from peftcore.errors import BadInput
from peftcore.models.loading import UNREADABLE, classifier, unreadable
from peftcore.models.model_names import Use, find
from peftcore_lab.data.columns import choose_column
from peftcore_lab.data.example_sources import splits
from peftcore_lab.runs.run import Run
from peftcore_lab.tasks._classes import learned
from peftcore_lab.tasks.image_classification import IMAGES
from peftcore_lab.tasks.task import Data, Prepared, Task

MASKS = ("mask", "annotation", "label", "segmentation")
NOTHING = 255
"""The class of pixels that are ignored in training and in scores, by convention."""


class SegmentedData(Data):
    """Options of the data: a column of pictures, and one of pictures of classes (gray, 0 to 254; 255 means no
    class)."""

    image: str | None = None
    """Column of the pictures; guessed when left out."""
    mask: str | None = None
    """Column of the classes of their pixels; guessed when left out."""
    classes: tuple[str, ...] = ()
    """Names of the classes, from 0 on; left out, the pictures of classes are all read to count them."""


class Segmentation(Task[SegmentedData]):
    """The task, scored by the mean over classes of the intersection of prediction and truth over their union."""

    Data = SegmentedData
    packages: ClassVar[Mapping[str, str]] = {"PIL": "pillow", "torchvision": "torchvision"}
    metric, greater = "mean_iou", True
    use = Use.PICTURES

    def prepare(self, run: Run, data: SegmentedData) -> Prepared:
        found = splits(data.train, data.held_out, data.held_out_size)
        image = choose_column(found.train.column_names, data.image, IMAGES, "image", data.train)
        mask = choose_column(found.train.column_names, data.mask, MASKS, "mask", data.train)
        kept = {image: "image", mask: "mask"}
        train, held_out = (
            part.select_columns(list(kept)).rename_columns(kept) for part in (found.train, found.held_out)
        )
        labels = data.classes or tuple(map(str, range(1 + max(_largest(row["mask"]) for row in train))))
        if len(labels) < 2:
            raise BadInput(f"{data.train}: there is only one class, and two are needed")
        if (known := tuple(learned(run))) and known != labels:
            raise BadInput(
                f"{run.adapter} has a head for the classes {', '.join(known)}, in this order, but the values of the "
                f"masks mean {', '.join(labels)}: set data.classes to the head's names, or begin with a fresh adapter"
            )
        where, options = find(run.model).origin()
        try:
            auto: Any = transformers.AutoImageProcessor
            processor = auto.from_pretrained(where, **options)
        except UNREADABLE as error:
            raise unreadable(run.model, "image processor", error) from error
        model, head = classifier(transformers.AutoModelForSemanticSegmentation, run.model, labels, run.dtype)
        if "labels" not in _batch([train[0]], processor, len(labels)):
            raise BadInput(
                f"{run.model}: its image processor ({type(processor).__name__}) does not read segmentation masks; use "
                "another model"
            )
        return Prepared(
            model=model,
            head=head,
            train=train,
            held_out=held_out,
            collate=lambda rows: _batch(rows, processor, len(labels)),
            reduce=_overlaps,
            metrics=_mean_iou,
        )


def _largest(mask: Any) -> int:
    numbers = np.asarray(mask.convert("L"))
    return int(numbers[numbers != NOTHING].max(initial=0))


def _batch(rows: list[dict[str, Any]], processor: Any, count: int) -> dict[str, Any]:
    """Read and scale pictures as batches are made: all of them would not fit in memory.

    Raises:
        BadInput: a pixel has a class that is none.
    """
    masks = [np.asarray(row["mask"].convert("L")) for row in rows]
    for mask in masks:
        if (wrong := mask[(mask >= count) & (mask != NOTHING)]).size:
            raise BadInput(
                f"a mask has the class {wrong[0]}, but the classes are 0 to {count - 1} ({NOTHING} marks pixels "
                "without a class)"
            )
    pictures = [row["image"].convert("RGB") for row in rows]
    return dict(processor(pictures, segmentation_maps=masks, return_tensors="pt"))


def _overlaps(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Return how many pixels of each class prediction and truth have in common, and how many either has, [rows, 2,
    classes]: the logits of all pictures would not fit in memory."""
    scores = logits[0] if isinstance(logits, tuple) else logits  # [rows, classes, height, width]
    whole = nn.functional.interpolate(scores.float(), labels.shape[-2:], mode="bilinear", align_corners=False)
    count, counts = whole.shape[1], labels != NOTHING
    said, true = (
        torch.where(counts, each, count).flatten(1).unsqueeze(1) == torch.arange(count, device=labels.device)[:, None]
        for each in (whole.argmax(1), labels)
    )
    return torch.stack([(said & true).sum(-1), (said | true).sum(-1)], 1)


def _mean_iou(prediction: transformers.EvalPrediction) -> dict[str, float]:
    """Return the mean over the classes that there are."""
    shared, either = np.asarray(prediction.predictions).sum(0)
    there = either > 0
    return {"mean_iou": float((shared[there] / either[there]).mean())}
