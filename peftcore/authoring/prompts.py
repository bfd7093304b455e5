"""Finds the first and last positions of the prompt among the tokens that pass through a block, and builds attention
masks. Caches, padding and labels are taken into account."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from peftcore.authoring.block_sites import BlockSite
from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.errors import MissingContext, SequenceError, UnsupportedSite
from peftcore.forward.context.context import forward_context
from peftcore.roles.stacks import TokenStack, cache_in
from peftcore.targets.sites import Site

S = TypeVar("S", bound=Site)
MASKS = ("attention_mask", "src_key_padding_mask", "tgt_key_padding_mask")
"""Names of the arguments that pass padding masks to blocks. In the masks of torch's layers (the last two), 0 or False
marks tokens that are not padding."""
IGNORED = -100
"""The label of tokens that the loss ignores."""
REMEDY = "pass the length of the prompt: with peftcore.call(model, prompt_length=...): ..."


class TokenStacks:
    """Finds the stacks of a model. A stack is a module that embeds tokens and runs blocks."""

    def __init__(self, surgeon: Surgeon) -> None:
        self.stacks, self._modules = surgeon.resolver.token_stacks(), surgeon.resolver.modules

    def of(self, site: Site) -> TokenStack | None:
        """Returns the stack that a block belongs to; None if the block is not in a stack of tokens, as in a model of
        images.

        Raises:
            UnsupportedSite: the first dimension of the block's input is tokens instead of the batch.
        """
        site.check_rows_first()
        above = [stack for stack in self.stacks if f"{site.module_path}.".startswith(f"{stack.path}.".lstrip("."))]
        return max(above, key=lambda stack: len(stack.path), default=None)

    def around(self, sites: Sequence[Site]) -> Site:
        """Returns a site at the stack that contains all the given sites, for an operator that wraps the stack.

        Raises:
            UnsupportedSite: `sites` is empty, or the sites are not in one stack, or the stack is part of an
                encoder-decoder model.
        """
        found = self.of(sites[0]) if sites else None
        for site in sites:
            stack = self.of(site)
            if stack is None or stack.reads or stack.readers or stack != found:
                raise UnsupportedSite(
                    f"{site.path} is not in the one stack of tokens that the model runs; exclude it, or use a model "
                    "without a separate encoder"
                )
        if found is None:
            raise UnsupportedSite("no module is targeted, so there is no stack of tokens: change target= or exclude=")
        return self._around(found, sites[0])

    def reading(self, sites: Sequence[Site]) -> tuple[TokenStack, Site] | None:
        """Returns the stack that gets the prompt, and a site at it for an operator that wraps it. This is the stack
        that contains the given sites; or the encoder, if that stack is a decoder that attends to an encoder. None if
        the sites are not in a stack of tokens, as in a model of images.

        Raises:
            UnsupportedSite: the sites are in several stacks that get different tokens.
        """
        every = [self.of(site) for site in sites]
        read = [stack if stack is None or not stack.reads else self._read_by(stack) for stack in every]
        if len({*read}) > 1:
            raise UnsupportedSite(
                f"{sites[0].path} and {sites[read.index(next(each for each in read if each != read[0]))].path} are in "
                "stacks that get different tokens; target only one of the stacks"
            )
        return None if not read or read[0] is None else (read[0], self._around(read[0], sites[0]))

    def _read_by(self, reader: TokenStack) -> TokenStack | None:
        return next((stack for stack in self.stacks if reader.path in stack.readers), None)

    def _around(self, stack: TokenStack, known: Site) -> Site:
        module = self._modules[stack.path]
        table = known.layer_of(module.get_submodule(stack.table), "weight")  # as wide as the stream
        return Site(module, stack.path, f"{stack.table}.weight", table, stack.role,
                    form="activation", layer_of=known.layer_of, meta=known.meta)  # fmt: skip

    def generates(self, site: Site) -> bool:
        """Whether the block is in a stack that can generate tokens: it is causal, and no other stack attends to its
        output."""
        stack = self.of(site)
        return stack is not None and stack.causal and not stack.readers

    def prompted(self, sites: list[S], strict: bool) -> list[S]:
        """Returns the blocks that process the prompt: all but the blocks of a decoder that attends to an encoder.

        Raises:
            UnsupportedSite: `strict` is True, and some blocks are in such a decoder.
        """
        reading = [site for site in sites if (stack := self.of(site)) is not None and stack.reads]
        if reading and strict:
            raise UnsupportedSite(
                f"{reading[0].path} reads the output of an encoder instead of the prompt; target the encoder"
            )
        return [site for site in sites if site not in reading]

    def answering(self, sites: list[BlockSite], strict: bool) -> list[BlockSite]:
        """Returns, in order, the blocks that lead to the model's output: all but the blocks of an encoder that a
        decoder attends to. With `strict`, all blocks are returned.

        Raises:
            UnsupportedSite: the blocks are not in one common stack. Or the first dimension of a block's input is tokens
                instead of the batch.
        """
        last = [site for site in sites if (stack := self.of(site)) is None or not stack.readers]
        chosen = sorted(sites if strict or not last else last, key=lambda site: site.depth)
        if len({(site.stack, site.width) for site in chosen}) > 1:
            raise UnsupportedSite(
                f"{chosen[0].path} and {chosen[-1].path} have no stream in common; target the blocks of one stack"
            )
        return chosen


class PromptPositions:
    """Finds the first and the last positions of the prompt in one forward.

    The user can set the length of the prompt by ``peftcore.call(model, prompt_length=...)``: one number, or one per
    row, without padding. Otherwise the prompt is the first of these that applies: the input of ``generate``; the tokens
    before the first label, in a language model that gets labels; the whole input.

    A forward that adds one token to a cache does not belong to the prompt. But if the cache has fewer tokens than the
    first positions need, that is uncertain, and an error asks the user to set the length.
    """

    def __init__(
        self,
        depth: int,
        generates: bool,
        first: int,
        last: int,
        halves: bool,
        last_wins: bool = False,
        whole: bool = False,
    ) -> None:
        """Choose the positions.

        Args:
            depth: the number of the block in its stack.
            generates: whether the block is in a stack that can generate tokens.
            first: the number of first positions.
            last: the number of last positions.
            halves: whether the first and the last positions are each limited to half of the prompt.
            last_wins: whether a position that is both a first and a last one counts as a last one; otherwise as a first
                one.
            whole: whether the method needs the whole prompt in one forward.
        """
        self.depth, self.generates, self.first, self.last, self.halves = depth, generates, first, last, halves
        self.last_wins, self.whole = last_wins, whole

    def positions(self, hidden: Tensor, given: Mapping[str, Any], training: bool) -> tuple[Tensor, Tensor] | None:
        """Returns two masks ``[batch or 1, tokens]``: of the first and of the last positions of the prompt. No position
        is in both. Returns None if no token belongs to the prompt. `hidden` is the input of the block, and `given` has
        its other arguments by name.

        Raises:
            MissingContext: the input may be longer than the prompt, and the prompt's length is unknown.
            SequenceError: the padding is unknown; or the method needs the whole prompt, and the input is only a part of
                it.
        """
        rows, new = len(hidden), hidden[0, ..., 0].numel()
        running = forward_context()
        inputs, told = running.inputs, running.told("prompt_length")
        held, prompt = cached_tokens(given, self.depth, new), running.prompt if self.generates else None
        if self.whole and prompt is not None and held < prompt.end and new < prompt.ids.shape[1]:
            raise SequenceError(
                f"the prompt has {prompt.ids.shape[1]} tokens, but a forward gets {new} of them, and this method needs "
                "the whole prompt at once; remove prefill_chunk_size="
            )
        if told is None and prompt is not None and prompt.mask is not None:
            told = (prompt.mask != 0).sum(-1)
        step = told is None and held > 0 and new == 1 and (prompt is None or held >= prompt.end)
        if step and prompt is not None:
            return None
        if told is None and held and not step and self.last:
            raise MissingContext(f"this input continues a cache, and may or may not belong to the prompt: {REMEDY}")
        real = _real([inputs, given], held + new, hidden.device)
        index = real.cumsum(-1) - 1
        length = index[:, -1:] + 1
        labels = inputs.get("labels") if self.generates else None
        if told is None and held:
            self._check_pieces(real[:, :held].sum(-1), moves=self.halves or step)
            if step:
                return None
        if told is not None:
            seen, length = length, _per_row(told, rows, hidden.device)
            if self.whole and not held and not torch.compiler.is_compiling():
                _check_seen(seen, length)
        elif isinstance(labels, Tensor) and labels.shape == (rows, new):
            length = _before_labels(labels, real, length)
        elif self.generates and not training and inputs.get("use_cache") is False:
            self._check_uncached(length)
        real, index = real[:, held : held + new], index[:, held : held + new]
        most = length // 2 if self.halves else length  # of either end
        front = real & (index < length) & (index < most.clamp_max(self.first))
        back = real & (index < length) & (index >= length - most.clamp_max(self.last))
        return (front & ~back, back) if self.last_wins else (front, back & ~front)

    @property
    def settled(self) -> int:
        """The number of tokens after which further tokens of the prompt do not change the first positions."""
        return self.first * (1 + self.halves)

    def _check_pieces(self, seen: Tensor, moves: bool) -> None:
        """Raise MissingContext if the cached tokens are so few that the positions depend on whether this input belongs
        to the prompt."""
        if moves and not torch.compiler.is_compiling() and bool((seen < self.settled).any()):
            raise MissingContext(
                f"this input continues a cache of fewer than {self.settled} tokens, which were the whole prompt or "
                f"only its start, and these two cases need different positions: {REMEDY}"
            )

    def _check_uncached(self, length: Tensor) -> None:
        """Raise MissingContext if the positions would change during generation without a cache. There each forward gets
        the whole sequence, and the end of the sequence is not the end of the prompt."""
        if self.last:
            raise MissingContext(f"with use_cache=False, generated tokens are part of the input: {REMEDY}")
        if not torch.compiler.is_compiling() and bool((length < self.settled).any()):
            raise MissingContext(f"the input has fewer than {self.settled} tokens, and may grow: {REMEDY}")


class VisibleTokens:
    """Builds the attention mask for a network in parallel with the model. In causal stacks, and if a block gets
    ``is_causal``, a token attends to earlier tokens and itself; otherwise to all tokens. Padding is masked, except that
    each token attends to itself.
    """

    def __init__(self, stack: TokenStack | None) -> None:
        self.causal = stack is not None and stack.causal
        self.reads = stack is not None and stack.reads  # then the host's masks may be those of what is read

    def mask(self, held: int, new: int, given: Mapping[str, Any], device: torch.device) -> Tensor:
        """Returns the attention mask ``[batch or 1, 1, new, held + new]`` for `new` tokens after the `held` tokens of a
        cache. It is True where a token may attend. `given` has the block's arguments by name.

        Raises:
            SequenceError: the padding is unknown.
        """
        count = held + new
        real = _real([given] if self.reads else [forward_context().inputs, given], count, device)
        seen = real[:, None, None, :count].expand(-1, 1, new, count)
        if self.causal or given.get("is_causal"):  # CLIP's text tower alone says it in the call
            seen = seen.tril(held)
        return seen | torch.ones(new, count, dtype=torch.bool, device=device).triu(held).tril(held)

    def real(self, count: int, given: Mapping[str, Any], device: torch.device) -> Tensor:
        """Returns a mask ``[batch or 1, tokens]`` of the tokens that are not padding. It is computed from the block's
        arguments by name (`given`). If these contain no mask, the result has one row of True. Raises SequenceError as
        `mask` does.
        """
        return _real([given], count, device)


def cached_tokens(given: Mapping[str, Any], depth: int, new: int) -> int:
    """Returns the number of tokens that earlier forwards have put into the cache of a block.

    Args:
        given: the arguments of the block by name; the cache is one of them.
        depth: the number of the block in its stack.
        new: the number of tokens in this forward.

    Raises:
        SequenceError: the cache does not count tokens.
    """
    cache = cache_in(given)
    if cache is None:
        return 0
    if torch.compiler.is_compiling():  # static caches count in tensors, and are compiled for decoding
        return int(new == 1)
    try:  # of this layer: those below hold the new tokens already
        return forward_context().tokens_held(cache, depth)
    except (AttributeError, ValueError) as error:  # caches of states, not of tokens: state-space layers
        raise SequenceError(
            f"this cache does not count the tokens that it holds ({error}); pass use_cache=False"
        ) from None


def _real(sources: list[Mapping[str, Any]], count: int, device: torch.device) -> Tensor:
    """Returns a mask ``[batch or 1, tokens]`` of the tokens that are not padding, for `count` tokens: cached tokens
    first, then new ones.

    It is computed from the mask that was passed to the host. If there is none, or its size does not fit, the mask that
    was passed to the block is used. With sliding-window attention that mask does not contain all cached tokens. Then
    there is no padding, provided that no mask was passed to the host.
    """
    masks = [(name, source[name]) for source in sources for name in MASKS if source.get(name) is not None]
    host_told_of_none = len(sources) > 1 and sources[0] and not any(sources[0].get(name) is not None for name in MASKS)
    for name, mask in masks:
        if isinstance(mask, Mapping):  # one for each kind of layer
            mask = mask.get("full_attention")
        if not isinstance(mask, Tensor) or (host_told_of_none and mask.dim() == 4 and mask.shape[-2] < count):
            continue
        if mask.dim() == 4:  # which tokens see which: one that nobody sees is padding
            mask = _seen(mask, count - mask.shape[-2]).flatten(1, 2).any(1)
        elif name != "attention_mask":
            mask = mask == 0
        if mask.dim() == 2 and mask.shape[-1] >= count:
            return mask != 0
    if masks and not host_told_of_none:
        raise SequenceError(
            f"none of the masks ({', '.join(name for name, _ in masks)}) separates padding from tokens: pass "
            "attention_mask= of shape [batch, tokens]"
        )
    return torch.ones(1, count, dtype=torch.bool, device=device)


def _seen(mask: Tensor, held: int) -> Tensor:
    """Returns a bool mask that is True where a token attends, from a block's mask ``[.., new, held + new or more]``. If
    the mask forbids each token to attend to itself, it is taken as a mask of hidden tokens and inverted (MPT)."""
    if mask.is_floating_point():
        return mask == 0
    seen = mask != 0
    return seen ^ ~seen.diagonal(held, -2, -1).any()


def _per_row(told: Any, rows: int, device: torch.device) -> Tensor:
    """Returns the prompt lengths as ``[batch or 1, 1]``. If ``generate`` repeats rows (beams), the lengths are repeated
    too."""
    lengths = forward_context().for_rows("prompt_length", rows, torch.as_tensor(told, device=device).view(-1, 1))
    return lengths if len(lengths) in (1, rows) else lengths.repeat_interleave(rows // len(lengths), 0)


def _check_seen(seen: Tensor, length: Tensor) -> None:
    """Verify that the input contains the whole prompt of each row. On a GPU the check runs asynchronously, because
    reading the result would be slow.

    Raises:
        SequenceError: a row has fewer tokens than its prompt. On a GPU, torch raises RuntimeError instead.
    """
    message = "tokens are fewer than those of the prompt, which this method needs in one forward"
    if seen.device.type != "cpu":
        torch._assert_async((length <= seen).all(), message)
    elif bool((length > seen).any()):
        raise SequenceError(f"{seen.flatten().tolist()} {message}; the prompt has {length.flatten().tolist()}")


def _before_labels(labels: Tensor, real: Tensor, length: Tensor) -> Tensor:
    """Returns the number of tokens before the first label, or the number of all tokens if the first token has a label
    or no token has one."""
    started = (real & (labels != IGNORED)).cumsum(-1) > 0
    before = (real & ~started).sum(-1, keepdim=True)
    return torch.where(before > 0, before, length)
