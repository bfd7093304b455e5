"""The image classification task: a head on any image model of transformers or timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import transformers

from peftcore.errors import BadInput
from peftcore.models.loading import UNREADABLE, classifier, unreadable
from peftcore.models.model_names import Use, find
from peftcore_lab.data.columns import LABEL_NAMES, choose_column, numbered
from peftcore_lab.data.task_mixtures import TASK
from peftcore_lab.runs.run import Run
from peftcore_lab.tasks._classes import accuracy, learned, predictions
from peftcore_lab.tasks.task import Prepared, RowsOfTasks, Task

IMAGES = ("image", "img", "picture", "pixel_values")


class ImageData(RowsOfTasks):
    """Options of the data: a column of pictures, and one of classes."""

    image: str | None = None
    """Column of the pictures. By default it is detected by its name."""
    label: str | None = None
    """Column of the classes. By default it is detected by its name."""


class ImageClassification(Task[ImageData]):
    """The task, scored by accuracy."""

    Data = ImageData
    packages: ClassVar[Mapping[str, str]] = {"PIL": "pillow", "torchvision": "torchvision"}
    metric, greater = "accuracy", True
    use = Use.PICTURES

    def prepare(self, run: Run, data: ImageData) -> Prepared:
        found = data.splits()
        image = choose_column(found.train.column_names, data.image, IMAGES, "image", data.train)
        label = choose_column(found.train.column_names, data.label, LABEL_NAMES, "label", data.train)
        labels = numbered(map(str, found.train[label]), learned(run), data.train)
        unseen = {str(each) for each in found.held_out[label]}.difference(labels)
        if len(labels) < 2 or unseen:
            what = f"no training picture has class {min(unseen)!r}" if unseen else "there is only one class"
            raise BadInput(f"{data.train}: {what}")
        where, options = find(run.model).origin()
        try:
            auto: Any = transformers.AutoImageProcessor
            processor = auto.from_pretrained(where, **options)
        except UNREADABLE as error:
            raise unreadable(run.model, "image processor", error) from error
        model, head = classifier(transformers.AutoModelForImageClassification, run.model, labels, run.dtype)
        kept = {image: "image", label: "label"}
        if data.task_column is not None:
            kept[data.task_column] = TASK
        train, held_out = (
            part.select_columns(list(kept)).rename_columns(kept) for part in (found.train, found.held_out)
        )
        return Prepared(
            model=model,
            head=head,
            train=train,
            held_out=held_out,
            collate=lambda rows: _batch(rows, processor, labels),
            tasks=data.names(found),
            reduce=predictions,
            metrics=accuracy,
        )


def _batch(rows: list[dict[str, Any]], processor: Any, labels: tuple[str, ...]) -> dict[str, Any]:
    """Return a batch of pictures. They are read and scaled only now, since all pictures would not fit in memory."""
    pictures = [row["image"].convert("RGB") for row in rows]
    numbers = torch.tensor([labels.index(str(row["label"])) for row in rows])
    return {**processor(pictures, return_tensors="pt"), "labels": numbers}
