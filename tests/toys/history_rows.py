"""Random routes over batches with as many rows as something else has entries: tokens, heads, a head's width, the
model's width. Each row is what it is by itself, under its own adapter, in forwards, with caches, and in `generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch
from history_world import Adapter, World, case_of, snapshot
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from sequence_toys import PATHS
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.testing import Case, NotApplicable
from peftcore.testing.hosts import VOCABULARY
from peftcore.testing.kit import fill

GENERATED = 1e-6
"""How far logits of generated tokens may be apart: `generate` keeps them in float32."""
HOSTS_HERE = ("llama", "gpt2", "mistral", "moe", "t5", "bert", "encoder", "mlp", "vit", "unet", "dit", "convnet")
CACHED = ("llama", "gpt2", "mistral", "moe")
"""Hosts whose forward goes on from a cache."""
LENGTHS = (1, 2, 3, 4, 5, 8, 16)
"""Of rows and of tokens: these have 2 heads of width 8, are 16 wide, and have 3 to 5 labels, channels, experts."""
NAMES = ("a", "b", "c")
METHODS = sorted(each.name for each in peftcore.methods() if each.tags.per_row)
INVOCATION = [7, 5, 7]
"""Tokens from which on a method acts that wants some; each row has them somewhere."""
OF_TOKENS = (
    "loreft",
    "alora",
    "shadow",
    "llama_adapter",
    "cartridge",
    "prefix_tuning",
    "p_tuning_v2",
    "apt",
    "longlora",
)
"""Methods for which it matters which tokens came before; drawn more often."""
WHOLE_PROMPTS: dict[str, str] = {}
"""Methods whose prompt in pieces is another one, with the reason."""


class RowWorld(World):
    """A model in float64 with adapters of which each row of a batch may have its own."""

    def __init__(self, host: str, rows: int, tokens: int, seed: int) -> None:
        super().__init__(host)
        self.given, self.models = dict(self.inputs), dict[str | None, nn.Module]()
        self.another_batch(rows, tokens, seed)

    def another_batch(self, rows: int, tokens: int, seed: int) -> None:
        """Draw a batch of so many rows; of so many tokens, where the host takes any number."""
        drawn = torch.Generator().manual_seed(seed)
        cut = {"input_ids", "attention_mask", "decoder_input_ids", "x", "padding"}
        for key, value in self.given.items():
            shape = [rows, *value.shape[1:]]
            if key in cut and value.dim() < 4:
                shape[1] = tokens
            if key in ("attention_mask", "padding"):
                kept = torch.randint(1, shape[1] + 1, (rows, 1), generator=drawn)
                self.inputs[key] = (torch.arange(shape[1]) < kept).to(value.dtype)
                if key == "padding":
                    self.inputs[key] = ~self.inputs[key]
            elif value.is_floating_point():
                self.inputs[key] = torch.randn(shape, generator=drawn, dtype=value.dtype)
            else:
                top = VOCABULARY if value.dim() > 1 else 9
                self.inputs[key] = torch.randint(3, top, shape, generator=drawn)
        ids, count = self.inputs.get("input_ids"), len(INVOCATION)
        if ids is not None and count <= ids.shape[1]:
            for row in ids:
                at = int(torch.randint(0, len(row) - count + 1, (), generator=drawn))
                row[at : at + count] = torch.tensor(INVOCATION)

    def apply(self, model: nn.Module, name: str, case: Case) -> peftcore.Injection:
        """As everywhere; a method that begins to act at some tokens does so here."""
        changes = {"invocation": INVOCATION} if "invocation" in case.method.Config.model_fields else {}
        return case.apply(model, name=name, dtype="float64", seed=7, **changes)

    def add(self, name: str, method: str, seed: int) -> None:
        """Apply a method and move its values, where it goes here."""
        try:
            case = case_of(method, self.host.name)
            with peftcore.activate(self.model):
                injection = self.apply(self.model, name, case)
                context = injection.state.now().context  # the case's, such as a timestep, which ends with the block
            peftcore.call(self.model, **context)
        except (PeftcoreError, NotApplicable):
            return
        fill(injection, seed)
        self.adapters[name] = Adapter(case, snapshot(injection.state_dict()))
        self.models.clear()

    def alone(self, name: str | None) -> nn.Module:
        """A fresh model with one adapter alone."""
        if name not in self.models:
            self.models[name] = self.baked(() if name is None else (name,))
        return self.models[name]

    def each_row(self, names: list[str | None], run: Callable[[nn.Module, slice], Tensor]) -> Tensor:
        """What each row gives by itself."""
        return torch.cat([run(self.alone(name), slice(row, row + 1)) for row, name in enumerate(names)])

    def pieces(self, model: nn.Module, rows: slice, cuts: list[int]) -> Tensor:
        """Logits of the prompt in pieces, each of which goes on from the cache of the one before."""
        ids, found, cache = self.inputs["input_ids"][rows], [], DynamicCache()
        with torch.no_grad():
            for piece in ids.tensor_split([cut for cut in cuts if 0 < cut < ids.shape[1]], 1):
                output = model.eval()(input_ids=piece, past_key_values=cache, use_cache=True)
                found.append(output.logits)
                cache = output.past_key_values
        return torch.cat(found, 1)

    def generate(self, model: nn.Module, rows: slice, path: str, beams: int) -> Tensor:
        """The logits of three generated tokens."""
        assert isinstance(model, GenerationMixin)
        found = model.eval().generate(
            input_ids=self.inputs["input_ids"][rows],
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            num_beams=beams,
            pad_token_id=0,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
            **{"use_cache": True, **PATHS[path]},
        )
        return torch.stack(found.logits, 1)


def named(world: RowWorld, drawn: list[int]) -> list[str | None]:
    """The adapter of each row."""
    chosen: list[str | None] = [None, *world.adapters]
    rows = world.rows
    return [chosen[drawn[row % len(drawn)] % len(chosen)] for row in range(rows)]


routes = st.lists(st.integers(0, 3), min_size=2, max_size=16)
method = st.sampled_from(METHODS) | st.sampled_from(OF_TOKENS)
methods = st.lists(method, min_size=1, max_size=3)
lengths = st.sampled_from(LENGTHS)
cuts = st.lists(st.integers(1, 7), max_size=3, unique=True).map(sorted)


class RowHistory(RuleBasedStateMachine):
    """One random history of routes."""

    world: RowWorld

    @initialize(
        host=st.sampled_from(CACHED) | st.sampled_from(HOSTS_HERE), methods=methods, rows=lengths, tokens=lengths
    )
    def begin(self, host: str, methods: list[str], rows: int, tokens: int) -> None:
        self.world = RowWorld(host, rows, tokens, 1)
        for name, method in zip(NAMES, methods, strict=False):
            self.world.add(name, method, 1)
        self.world.another_batch(rows, tokens, 2)

    @rule(rows=lengths, tokens=lengths, equal=st.booleans(), seed=st.integers(1, 5))
    def another_batch(self, rows: int, tokens: int, equal: bool, seed: int) -> None:
        """In half of all cases with as many rows as tokens."""
        self.world.another_batch(rows, rows if equal else tokens, seed)

    @rule(name=st.sampled_from(NAMES), method=method)
    def another_adapter(self, name: str, method: str) -> None:
        world = self.world
        if name in world.adapters:
            world.injection(name).remove()
            world.without(name)
        world.add(name, method, 2)

    @rule(drawn=routes)
    def forward(self, drawn: list[int]) -> None:
        world = self.world
        names = named(world, drawn)
        if world.adapters:
            with world.allowed():
                expected = world.each_row(names, world.output)
                with peftcore.route(world.model, names):
                    world.compare(world.output(world.model), expected, f"output of rows {names}")

    @precondition(lambda self: self.world.host.name in CACHED)
    @rule(drawn=routes, cuts=cuts)
    def from_caches(self, drawn: list[int], cuts: list[int]) -> None:
        world = self.world
        names = named(world, drawn)
        if world.adapters:
            with world.allowed():
                expected = world.each_row(names, lambda model, rows: world.pieces(model, rows, cuts))
                with peftcore.route(world.model, names):
                    found = world.pieces(world.model, slice(None), cuts)
                    world.compare(found, expected, f"output of rows {names} in pieces cut at {cuts}")

    @precondition(lambda self: self.world.host.name in CACHED)
    @rule(which=st.integers(0, 2), cuts=cuts)
    def a_prompt_in_pieces(self, which: int, cuts: list[int]) -> None:
        """It is the prompt at once, or refused."""
        world = self.world
        names = [name for name, each in world.adapters.items() if each.case.method.name not in WHOLE_PROMPTS]
        if names:
            model = world.alone(names[which % len(names)])
            with world.allowed():
                expected = world.pieces(model, slice(None), [])
                found = world.pieces(model, slice(None), cuts)
                world.compare(found, expected, f"output under {names[which % len(names)]!r} in pieces cut at {cuts}")

    @precondition(lambda self: self.world.host.name in (*CACHED, "t5"))
    @rule(drawn=routes, path=st.sampled_from(["cached", "uncached", "static"]), beams=st.integers(1, 2))
    def generate(self, drawn: list[int], path: str, beams: int) -> None:
        world = self.world
        names = named(world, drawn)
        if world.adapters:
            with world.allowed():
                expected = world.each_row(names, lambda model, rows: world.generate(model, rows, path, beams))
                with peftcore.route(world.model, names, copies=beams):
                    found = world.generate(world.model, slice(None), path, beams)
                    world.compare(found, expected, f"logits generated for rows {names} ({path})", GENERATED)

    @precondition(lambda self: self.world.host.name in CACHED)
    @rule(which=st.integers(0, 2), size=st.integers(1, 5), static=st.booleans())
    def a_prompt_in_chunks(self, which: int, size: int, static: bool) -> None:
        """`generate` gives what it gives without chunks, or refuses."""
        world = self.world
        names = [name for name, each in world.adapters.items() if each.case.method.name not in WHOLE_PROMPTS]
        if names:
            model: Any = world.alone(names[which % len(names)])
            path = "static" if static else "cached"
            with world.allowed():
                expected = world.generate(model, slice(None), path, 1)
                before, model.generation_config.prefill_chunk_size = model.generation_config.prefill_chunk_size, size
                try:
                    found = world.generate(model, slice(None), path, 1)
                finally:
                    model.generation_config.prefill_chunk_size = before
                world.compare(found, expected, f"logits generated under {names[which % len(names)]!r}", GENERATED)
