"""What the prompted transformer of E2VPT's authors gives for images, the derivatives of their loss by its masks, what
their trainer prunes by them, on tensors of cosines, how their prompts start, and what trains:
``python -m peftcore.testing.freeze e2vpt.py CHECKOUT``."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vpt import ABSENT, BACKBONES, SIZES, named, wave

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "ChengHan111/E2VPT", "7a66e75", "src/models/vit_prompt/vit_prompt_VK.py")
VERSIONS = ("torch",)
GRAPHICS = ("matplotlib", "matplotlib.pyplot", "matplotlib.colors", "cv2", "captum", "captum.attr")
GRAPHICS += ("pytorch_grad_cam", "pytorch_grad_cam.utils", "pytorch_grad_cam.utils.image")
TRAINING = ("fvcore", "fvcore.common", "fvcore.common.config", "fvcore.common.checkpoint", "src.engine.evaluator")
TRAINING += ("src.solver.lr_scheduler", "src.solver.optimizer", "src.solver.losses", "src.utils.train_utils")
OPTIONS = {"LOCATION": "prepend", "INITIATION": "random", "NUM_DEEP_LAYERS": None, "DEEP_SHARED": False}
OPTIONS |= {"DEEP": True, "DEEP_P": True, "VIT_POOL_TYPE": "original", "REWIND_STATUS": False, "SHARED_ACCROSS": False}
OPTIONS |= {"NUM_TOKENS": 2, "NUM_TOKENS_P": 3, "DROPOUT": 0.0, "DROPOUT_P": 0.0, "LAYER_BEHIND": True}
OPTIONS |= {"CLS_TOKEN_MASK": True, "CLS_TOKEN_MASK_PIECES": True, "CLS_TOKEN_P_PIECES_NUM": 4}
OPTIONS |= {"QUERY_PROMPT_MODE": 0, "ORIGIN_INIT": 2}


def built(module: Any, shared: bool, projection: int | None, **options: int) -> Any:
    """The authors' model of three layers."""
    told = OPTIONS | options
    prompt = SimpleNamespace(**told, SHARE_PARAM_KV=shared, PROJECT=-1 if projection is None else projection)
    prompt.MASK_CLS_TOKEN = projection is None  # their masks have the width of what is projected
    return module.PromptedVisionTransformer_Prompt_VK(prompt, "tiny", img_size=8, num_classes=3).double().eval()


def filled(module: Any, shared: bool, projection: int | None) -> Any:
    """The authors' model with numbers that depend on the names in timm."""
    model = built(module, shared, projection)
    known = named()
    for name, parameter in model.named_parameters():
        if name.endswith("prompt_embeddings"):
            first = int("deep" in name)
            prompts = [wave(each.shape, f"prompt.{first + number}") for number, each in enumerate(parameter)]
            parameter.data.copy_(torch.stack(prompts))
        elif "prompt_proj" in name:
            parameter.data.copy_(wave(parameter.shape, f"projection.{name.rpartition('.')[2]}"))
        elif "QKV" in name:
            part = "value" if name.endswith("_V") else "key"
            parameter.data.copy_(wave(parameter.shape, f"{part}.{name.split('.')[3]}"))
        elif "mask" not in name:
            value = known.pop(name)
            parameter.data.copy_(value if isinstance(value, Tensor) else wave(parameter.shape, value[0]))
    assert not known
    return model


def pruned(trainer: Any, model: Any) -> dict[str, Any]:
    """Returns the scores of two batches, and the logits when two segments of each token and one token are off."""
    stack, scores = model.transformer, []
    masks = [stack.prompt_soft_tokens_mask_cls_token, stack.prompt_soft_tokens_pieces_mask_cls_token]
    for number in range(2):
        loss = torch.nn.functional.cross_entropy(model(wave((2, 3, 8, 8), f"batch.{number}")), torch.tensor([0, 2]))
        scores.append(torch.autograd.grad(loss, masks))
    tokens, pieces = (torch.stack(each).mean(0) for each in zip(*scores, strict=True))
    sizes = {"n_pieces_token": 4, "n_soft_tokens": 3}
    off = trainer.what_tokens_to_mask(None, tokens, 1, set(), 1, **sizes)
    off_pieces = trainer.what_tokens_pieces_to_mask(None, pieces, 2, {}, 1, **sizes)
    stack.mask_soft_tokens(off)
    stack.mask_soft_tokens_pieces(off_pieces)
    logits = model(wave((2, 3, 8, 8), "images"))
    return {"tokens": tokens.tolist(), "segments": pieces.tolist(), "logits": logits.tolist()}


def theirs(checkout: Path) -> Any:
    """Returns the module of the authors' model, which knows the sizes of the tiny one."""
    module = load(checkout / SOURCE.script, root=checkout, absent=(*ABSENT, *GRAPHICS, *TRAINING))
    module.CONFIGS["tiny"] = SimpleNamespace(patches={"size": (4, 4)}, hidden_size=16, transformer=SIZES, classifier="")
    return module


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns logits ``[2, 3]`` by whether keys are values and by the width of prompts, and those after pruning."""
    module = theirs(checkout)
    trainer = load(checkout / "src/engine/trainer.py", root=checkout).Trainer
    images, found = wave((2, 3, 8, 8), "images"), {}
    for shared in (True, False):
        for projection in (None, 6):
            model = filled(module, shared, projection)
            found[f"{shared} {projection}"] = model(images).tolist()
    return {"logits": found, "pruned": pruned(trainer, filled(module, True, None))}


def start(checkout: Path) -> dict[str, Any]:
    """Returns what 3,000 keys, values and tokens of the last block start from, by whether keys are values."""
    module, found = theirs(checkout), {}
    for shared in (True, False):
        own = dict(built(module, shared, None, NUM_TOKENS=3000, NUM_TOKENS_P=3000).named_parameters())
        names = {"prompt": "transformer.deep_prompt_embeddings"}
        names |= {
            {"": "key", "_K": "key", "_V": "value"}[name.rpartition("embeddings")[2]]: name
            for name in own
            if "QKV" in name and ".2." in name
        }
        found[str(shared)] = {part: drawn(own[name]) for part, name in names.items()}
    return found


def trains(checkout: Path) -> dict[str, dict[str, int]]:
    """Returns the sizes of what trains in their classifier at first, and again when prompts are pruned."""
    module, found = theirs(checkout), {}
    classifier = load(checkout / "src/models/vit_models.py", root=checkout, absent=BACKBONES)
    for time in ("first", "again"):
        model = built(module, True, None)
        model.head = torch.nn.Identity()  # as theirs that builds it
        if time == "again":
            model.transformer.mask_soft_tokens({1})
            model.transformer.mask_soft_tokens_pieces({0: {2}})
        classifier.build_vit_sup_models = lambda *args, model=model, **kwargs: (model, 16)
        told = SimpleNamespace(TRANSFER_TYPE="P_VK", P_VK=SimpleNamespace(FT_PT_MIXED=False), MODEL_ROOT="", MLP_NUM=0)
        config = SimpleNamespace(MODEL=told, DATA=SimpleNamespace(FEATURE="", CROPSIZE=8, NUMBER_CLASSES=3))
        named = classifier.ViT(config).named_parameters()
        found[time] = {name: each.numel() for name, each in named if each.requires_grad}
    return found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options that their configuration has before a command changes them."""
    node = ModuleType("src.configs.config_node")
    vars(node)["CfgNode"] = SimpleNamespace
    sys.modules[node.__name__] = node
    told = load(checkout / "src/configs/config.py", root=checkout)._C.MODEL.P_VK
    found = {"length": told.NUM_TOKENS_P, "dropout": told.DROPOUT_P, "kv_length": told.NUM_TOKENS}
    found |= {"kv_dropout": told.DROPOUT, "share_kv": told.SHARE_PARAM_KV, "segments": told.CLS_TOKEN_P_PIECES_NUM}
    return found | {"projection": None if told.PROJECT == -1 else told.PROJECT}
