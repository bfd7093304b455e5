"""The semantic segmentation task: a head on any segmentation model of transformers."""

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
    """Options of the data: a column of pictures and a column of masks. A mask is a grayscale picture of class numbers
    (0 to 254; 255 means no class)."""

    image: str | None = None
    """Column of the pictures. By default it is detected by its name."""
    mask: str | None = None
    """Column of the masks. By default it is detected by its name."""
    classes: tuple[str, ...] = ()
    """Names of the classes, from 0 on. By default all masks of the training examples are read to count the classes."""


class Segmentation(Task[SegmentedData]):
    """The segmentation task, scored by mean IoU: the mean over classes of the intersection of prediction and truth,
    divided by their union."""

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
    """Return a batch of pictures and masks. They are read and scaled only now, since all pictures would not fit in
    memory.

    Raises:
        BadInput: a pixel has an unknown class.
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
    """Return for each class the numbers of pixels in the intersection and in the union of prediction and truth, [rows,
    2, classes]. The logits of all pictures would not fit in memory."""
    scores = logits[0] if isinstance(logits, tuple) else logits  # [rows, classes, height, width]
    whole = nn.functional.interpolate(scores.float(), labels.shape[-2:], mode="bilinear", align_corners=False)
    count, counts = whole.shape[1], labels != NOTHING
    said, true = (
        torch.where(counts, each, count).flatten(1).unsqueeze(1) == torch.arange(count, device=labels.device)[:, None]
        for each in (whole.argmax(1), labels)
    )
    return torch.stack([(said & true).sum(-1), (said | true).sum(-1)], 1)


def _mean_iou(prediction: transformers.EvalPrediction) -> dict[str, float]:
    """Return the mean IoU over the classes that occur in a prediction or a mask."""
    shared, either = np.asarray(prediction.predictions).sum(0)
    there = either > 0
    return {"mean_iou": float((shared[there] / either[there]).mean())}
