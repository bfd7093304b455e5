"""Cartridge: a trained key-value cache instead of a long text.   Eyuboglu et al. 2025, arXiv 2506.06266.

Equation:
    Attention(q, [Z_k; K], [Z_v; V])   in every layer;   Z = the keys and values of the text's first `length` tokens

``data=`` contains batches of the model's inputs; the first row of the first batch is the text. If the model uses
positions, the keys have the positions 0 to length - 1 and the tokens the positions after them, so a fresh cartridge of
a whole text has the same effect as the text.

    L = -sum_i q_i log p_i,   the mean over tokens;   q_i what the teacher says, p_i what the model with Z says

The cartridge is trained to answer like the teacher, the model with the whole text in its context. The training data are
questions and answers about parts of the text, which a model generates (self-study). Pass the teacher's predictions with
``with peftcore.call(model, teacher=logits): model(ids)``, where the logits are those of the tokens after the text,
computed under ``cartridge.disabled()``. L is then available in ``cartridge.losses()``, or is added to the model's loss
if labels are passed.

As in the authors' code, `teacher` may also be two tensors ``[batch, tokens, k]``: the logarithms of the teacher's k
largest probabilities, not rescaled to the sum 1, and their token ids. Padding does not count, nor do positions where
all values of the teacher are -inf.

If cartridges of several texts are active, tokens attend to all of them, and each further cartridge increases the
positions of tokens by its length. peft can also combine their files. Parameters: (length - frozen) * kv_heads * (key
width + value width) a layer; the frozen rows are saved too.

Start: Z starts as the model's cache of the first `length` tokens, with rotated keys. The first `frozen` tokens do not
train: the first token is an attention sink, and training it makes the model unstable. The start is not an identity,
since a fresh cartridge has the effect of the text in the context.

Differs from the authors' code: No difference is known. Numbers are compared with those of peft, which has neither
teacher nor loss, and starts with random values if it does not get a text. If attention has a window, every token still
attends to Z here, while in peft later tokens do not.

Use it: `peftcore.apply(model, "cartridge", length=8, data=[{"input_ids": ids}])`, where many questions are asked about
one long text: the cartridge takes a few percent of the memory of the text's cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import (
    AppliedMethod,
    Attend,
    AttentionSite,
    Batches,
    ForwardContext,
    LearningRate,
    Method,
    MethodConfig,
    Site,
    Surgeon,
    Tags,
    forward_context,
)
from peftcore.errors import CalibrationError, ConfigError
from peftcore_additive._prefix import Behind, FrontOperator, behind, prefix_width


class CartridgeConfig(MethodConfig):
    """Options of a cartridge."""

    method: Literal["cartridge"] = "cartridge"
    length: PositiveInt
    """Number of tokens of the cache, 128 to 8192 in the paper; more tokens represent the text better."""
    frozen: NonNegativeInt = 1
    """How many of the first tokens do not train."""

    @model_validator(mode="after")
    def _some_train(self) -> CartridgeConfig:
        if self.frozen >= self.length:
            raise ValueError(
                f"frozen={self.frozen} leaves no trainable token of length={self.length}; set frozen below length"
            )
        return self


def cross_entropy(teacher: Any, output: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Return the mean over tokens of ``-sum p_teacher log p``, as a differentiable tensor of shape ``[]`` in float32 or
    more.

    Args:
        teacher: the teacher's logits ``[batch, tokens, vocabulary]``, or two tensors ``[batch, tokens, k]``: the
            logarithms of its k largest probabilities, and their token ids. Positions where all values are -inf do not
            count.
        output: the student's output: logits ``[batch, tokens, vocabulary]``, or a mapping that contains them under
            "logits".
        inputs: the student's inputs, whose ``attention_mask`` marks padding.

    Raises:
        ConfigError: the shape of the teacher's predictions differs from that of the logits, or the output lacks logits
            of tokens.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else output
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise ConfigError(
            "teacher= needs a model that returns logits [batch, tokens, vocabulary]; this one returns "
            f"{type(output).__name__} without them"
        )
    largest = not isinstance(teacher, Tensor)
    said, places = teacher if largest else (teacher, None)
    if said.shape[:2] != logits.shape[:2] or (places is None and said.shape != logits.shape):
        raise ConfigError(
            f"teacher= has shape {tuple(said.shape)}, but the model's logits have shape {tuple(logits.shape)}; pass "
            "the teacher's logits of the same tokens"
        )
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    said = said.to(logs)
    counts = said.isfinite().any(-1)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == counts.shape:
        counts = counts & mask.bool()
    said = said.masked_fill(~counts[..., None], 0.0)
    chances = said.softmax(-1) if places is None else said.exp()
    losses = -(chances * (logs if places is None else logs.gather(-1, places.to(logs.device)))).sum(-1)
    mean: Tensor = losses.masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)
    return mean


class CartridgeOperator(FrontOperator):
    """The keys and values of one layer."""

    sink: Tensor

    def __init__(self, site: AttentionSite, config: CartridgeConfig) -> None:
        super().__init__(site)
        rows = torch.randn(config.length, prefix_width(site))
        self.register_buffer("sink", rows[: config.frozen].clone())
        self.rows = nn.Parameter(rows[config.frozen :].clone())
        self.seen: int | None = None  # while a text is shown, how many of its tokens were seen

    def flat(self) -> Tensor:
        return torch.cat([self.sink, self.rows])

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.seen is None:
            return super().forward(attend, query, key, value)
        length, mask = len(self.flat()), forward_context().inputs.get("attention_mask")
        count = key.shape[2]
        if isinstance(mask, Tensor) and mask.shape[1:] == (count,):
            count = int(mask[0].sum()) if mask[0, 0] else 0
        text = [each[0, :, : min(length, count)].transpose(0, 1).flatten(1) for each in (key, value)]
        self.seen = len(text[0])  # [tokens, kv_heads * width]
        if self.seen == length:
            rows = torch.cat(text, dim=1).to(self.rows)
            self.sink.copy_(rows[: len(self.sink)])
            self.rows.copy_(rows[len(self.sink) :])
        return attend(query, key, value)


class Cartridge(Method):
    """A trained key-value cache that starts as the cache of a text.

    Example:
        injection = peftcore.apply(model, "cartridge", length=8, data=[{"input_ids": ids}])
    """

    name = "cartridge"
    Config = CartridgeConfig
    tags = Tags(category="additive", paper="2506.06266", identity_at_init=False, needs_data=True)
    learning_rate = LearningRate(
        2e-2,
        "HazyResearch/cartridges@ff1a3fb, scripts/longhealth_train.py",
        on="Llama-3.2-3B-Instruct, LongHealth",
        optimizer="Adam",
    )
    target = ("attn.core",)

    def inject(self, model: nn.Module, config: CartridgeConfig, surgeon: Surgeon) -> None:
        sites = surgeon.sites()
        for site in sites:
            surgeon.attention(site, CartridgeOperator, config)
        behind(surgeon, sites, config)

    def calibrate(self, model: nn.Module, data: Batches, config: CartridgeConfig, injection: AppliedMethod) -> None:
        model.eval()
        fronts = {path: each for path, each in injection.operators.items() if isinstance(each, CartridgeOperator)}
        places = {each: each.length for each in injection.operators.values() if isinstance(each, Behind)}
        try:
            for behind_it in places:
                behind_it.length = 0  # the text stands behind nothing
            for front in fronts.values():
                front.seen = 0
            with torch.no_grad():
                next(iter(data)).output()
            for path, front in fronts.items():
                if (front.seen or 0) < (length := len(front.flat())):
                    raise CalibrationError(
                        f"{path} read {front.seen} tokens in the first row of data=, but length={length}: pass a "
                        "longer text without padding in front, or set a smaller length="
                    )
        finally:
            for front in fronts.values():
                front.seen = None
            for behind_it, length in places.items():
                behind_it.length = length

    def output_loss(self, injection: AppliedMethod, output: Any, call: ForwardContext) -> Tensor | None:
        teacher = call.context.get("teacher")
        return None if teacher is None else cross_entropy(teacher, output, call.inputs)

    @staticmethod
    def parameter_count(site: Site, config: CartridgeConfig) -> int:
        return (config.length - config.frozen) * prefix_width(site) if isinstance(site, AttentionSite) else 0
