"""The Auto classes of transformers that may build a base, and their tasks.

The list is closed: a class name in a file is only looked up among the models of these Auto classes, and never imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from peftcore.layers.layer import plain_class

AUTO_CLASSES: dict[str, tuple[str, str]] = {
    "AutoModelForCausalLM": ("MODEL_FOR_CAUSAL_LM_MAPPING", "text-generation"),
    "AutoModelForSeq2SeqLM": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", ""),  # translation, summaries and more
    "AutoModelForSequenceClassification": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", "text-classification"),
    "AutoModelForTokenClassification": ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING", "token-classification"),
    "AutoModelForQuestionAnswering": ("MODEL_FOR_QUESTION_ANSWERING_MAPPING", "question-answering"),
    "AutoModelForMultipleChoice": ("MODEL_FOR_MULTIPLE_CHOICE_MAPPING", ""),
    "AutoModelForMaskedLM": ("MODEL_FOR_MASKED_LM_MAPPING", "fill-mask"),
    "AutoModelForImageTextToText": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "image-text-to-text"),
    "AutoModelForVisualQuestionAnswering": (
        "MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING",
        "visual-question-answering",
    ),
    "AutoModelForImageClassification": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "image-classification"),
    "AutoModelForZeroShotImageClassification": (
        "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING",
        "zero-shot-image-classification",
    ),
    "AutoModelForSemanticSegmentation": ("MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING", "image-segmentation"),
    "AutoModelForUniversalSegmentation": ("MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING", "image-segmentation"),
    "AutoModelForObjectDetection": ("MODEL_FOR_OBJECT_DETECTION_MAPPING", "object-detection"),
    "AutoModelForDepthEstimation": ("MODEL_FOR_DEPTH_ESTIMATION_MAPPING", "depth-estimation"),
    "AutoModelForVideoClassification": ("MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING", "video-classification"),
    "AutoModelForMaskedImageModeling": ("MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING", ""),
    "AutoModelForSpeechSeq2Seq": ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", "automatic-speech-recognition"),
    "AutoModelForCTC": ("MODEL_FOR_CTC_MAPPING", "automatic-speech-recognition"),
    "AutoModelForAudioClassification": ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING", "audio-classification"),
    "AutoModel": ("MODEL_MAPPING", ""),
    "AutoModelForTextEncoding": ("MODEL_FOR_TEXT_ENCODING_MAPPING", ""),
    "AutoModelForPreTraining": ("MODEL_FOR_PRETRAINING_MAPPING", ""),
}
"""Maps the name of each Auto class of transformers to two names: that of the mapping that lists its models, and the
hub's name for their task. The latter is empty for classes of several tasks. The classes are tried in this order."""
TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The Auto class for each task type of peft."""


def auto_classes(config: Any, name: str) -> Iterator[str]:
    """Yields the names of the Auto classes that list the model class `name` for a configuration of transformers."""
    transformers = sys.modules["transformers"]
    for auto, (mapping, _) in AUTO_CLASSES.items():
        listed = getattr(transformers, mapping, {}).get(type(config), ())
        if any(each.__name__ == name for each in (listed if isinstance(listed, tuple) else (listed,))):
            yield auto


def task_of(model: nn.Module) -> str:
    """Returns the hub's name for the task of a model, such as "text-generation"; empty if the model has several tasks,
    or its task is uncertain."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return ""
    found = {AUTO_CLASSES[auto][1] for auto in auto_classes(model.config, plain_class(model).__name__)} - {""}
    return found.pop() if len(found) == 1 else ""


def peft_task_of(model: nn.Module) -> str | None:
    """Returns peft's name of the task of a model, such as "CAUSAL_LM"; None if peft has no name for it."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    named = {auto: task for task, auto in TASKS.items()}
    found = auto_classes(model.config, plain_class(model).__name__)
    return next((named[auto] for auto in found if auto in named), None)
