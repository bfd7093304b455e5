"""Random histories of models whose input and output tables are one tensor, or two: adapters that train one of them or
both are trained, merged, saved in both formats, and opened by peft and by us, on models that are tied and that are not.
What opens a file computes what the model did that wrote it, or refuses it."""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import peft
import torch
import transformers
from history_world import Wrong
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor, nn

import peftcore
from peftcore import compat
from peftcore.errors import PeftcoreError
from peftcore.testing.hosts import stir
from peftcore.testing.kit import fill

CLOSE = 1e-6
"""How far outputs may be apart, relative to the largest entry: all is float64."""
WORDS = 30
_TOKENS = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        build: makes one, tied or not.
        tables: the names of the input's and the output's.
        target: where adapters go.
        loose: whether there are some that are not tied.
    """

    build: Callable[[bool], nn.Module]
    tables: tuple[str, str]
    target: list[str]
    loose: bool = True


def _llama(tied: bool) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**_TOKENS, **sizes, initializer_range=0.3, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def _gpt2(tied: bool) -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    config = transformers.GPT2Config(**_TOKENS, **sizes, initializer_range=0.3, tie_word_embeddings=tied)
    return transformers.GPT2LMHeadModel(config)


def _bart(tied: bool) -> nn.Module:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 16}
    options = {"init_std": 0.3, "tie_word_embeddings": tied, "decoder_start_token_id": 2}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**_TOKENS, **layers, **sizes, **options))


def _t5(_: bool) -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**_TOKENS, **sizes))


KINDS = {
    "llama": Kind(_llama, ("embed_tokens", "lm_head"), ["q_proj", "v_proj"]),
    "gpt2": Kind(_gpt2, ("wte", "lm_head"), ["c_attn"]),
    "bart": Kind(_bart, ("shared", "lm_head"), ["q_proj", "v_proj"]),
    "t5": Kind(_t5, ("shared", "lm_head"), ["q", "v"], loose=False),
}
WHICH: dict[str, tuple[int, ...]] = {"input": (0,), "output": (1,), "both": (0, 1), "neither": ()}


class TableWorld:
    """An adapted model, and fresh ones with the same weights, tied as it is and otherwise."""

    def __init__(self, kind: str, tied: bool, which: str) -> None:
        self.name, self.kind, self.which = kind, KINDS[kind], which
        self.tied = tied or not self.kind.loose
        self.folder, self.count, self.refused = Path(tempfile.mkdtemp()), 0, 0
        self.trained = [self.kind.tables[each] for each in WHICH[which]]
        ids = torch.randint(3, WORDS, (2, 5), generator=torch.Generator().manual_seed(0))
        self.inputs = {"input_ids": ids}
        self.model = self.fresh(self.tied)
        if self.model.config.is_encoder_decoder:
            self.inputs["decoder_input_ids"] = ids[:, :3]
        self.injection: peftcore.Injection | None = None

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def fresh(self, tied: bool) -> Any:
        """The model as it was; one that is not tied computes the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = stir(self.kind.build(True)).double().eval()
            if tied or not self.kind.loose:
                return model
            loose: Any = self.kind.build(False).double().eval()
        loose.load_state_dict(model.state_dict())
        return loose

    def place(self) -> Path:
        self.count += 1
        return self.folder / str(self.count)

    def output(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            found: Tensor = model.eval()(**self.inputs).logits
            return found

    def compare(self, model: nn.Module, expected: Tensor, what: str) -> None:
        """Compare what a model computes.

        Raises:
            Wrong: it is something else.
        """
        found = self.output(model)
        off = float((found - expected).abs().max() / expected.abs().max())
        if not off <= CLOSE:
            raise Wrong(f"{what}: off by {off:.2e}; {self}")

    def opened(self, what: str, make: Callable[[], nn.Module], expected: Tensor) -> None:
        """Compare what opens a file, unless that is refused."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = make()
            except PeftcoreError:
                self.refused += 1
                return
        self.compare(model, expected, what)

    def config(self) -> peft.PeftConfig:
        return peft.LoraConfig(r=2, target_modules=self.kind.target, modules_to_save=self.trained or None)

    def of_peft(self, seed: int) -> Any:
        """peft's model with the same tables, whose values have moved."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.get_peft_model(self.fresh(self.tied), self.config()).double().eval()
        drawn = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for each in theirs.parameters():
                if each.requires_grad:
                    each += 0.3 * torch.randn(each.shape, generator=drawn, dtype=each.dtype)
        return theirs

    def __repr__(self) -> str:
        return f"{self.name}, {'tied' if self.tied else 'not tied'}, with train={self.trained}"


class TableHistory(RuleBasedStateMachine):
    """One random history of tables."""

    world: TableWorld

    @initialize(kind=st.sampled_from([*KINDS]), tied=st.booleans(), which=st.sampled_from([*WHICH]))
    def begin(self, kind: str, tied: bool, which: str) -> None:
        self.world = world = TableWorld(kind, tied, which)
        try:
            world.injection = peftcore.apply(
                world.model, "lora", rank=2, target=world.kind.target, train=world.trained, dtype="float64"
            )
        except PeftcoreError:
            world.refused += 1
            return
        fill(world.injection, 1)
        self.expected = world.output(world.model)

    @rule(seed=st.integers(1, 3))
    def write(self, seed: int) -> None:
        world = self.world
        if world.injection is not None and not world.injection.merged:
            fill(world.injection, seed)
            self.expected = world.output(world.model)

    @rule()
    def merge(self) -> None:
        if self.world.injection is not None:
            self.world.injection.merge()

    @rule()
    def unmerge(self) -> None:
        if self.world.injection is not None:
            self.world.injection.unmerge()

    @rule(tied=st.booleans())
    def save_and_load(self, tied: bool) -> None:
        """In our format, on a model that is tied or not."""
        world = self.world
        if world.injection is None or world.injection.merged:
            return
        place = world.place()
        world.injection.save(place)

        def load() -> nn.Module:
            model: nn.Module = world.fresh(tied)
            peftcore.load(model, place)
            return model

        world.opened(f"our file on a model that is {'tied' if tied else 'not tied'}", load, self.expected)

    @rule(tied=st.booleans())
    def save_for_peft(self, tied: bool) -> None:
        """peft opens it, and so do we."""
        world = self.world
        if world.injection is None or world.injection.merged:
            return
        place = world.place()
        try:
            world.injection.save(place, format="peft")
        except PeftcoreError:
            world.refused += 1
            return

        def of_peft() -> nn.Module:
            model: nn.Module = peft.PeftModel.from_pretrained(world.fresh(world.tied), str(place)).double()
            return model

        def ours() -> nn.Module:
            model: nn.Module = world.fresh(tied)
            peftcore.load(model, place)
            return model

        world.opened("our file in peft", of_peft, self.expected)
        world.opened(f"it again on a model that is {'tied' if tied else 'not tied'}", ours, self.expected)

    @rule(seed=st.integers(1, 3), compatible=st.booleans())
    def open_a_file_of_peft(self, seed: int, compatible: bool) -> None:
        """Here, and as a model of peft that is ours."""
        world = self.world
        theirs, place = world.of_peft(seed), world.place()
        theirs.save_pretrained(str(place))

        def ours() -> nn.Module:
            model: nn.Module = world.fresh(world.tied)
            if compatible:
                return compat.PeftModel.from_pretrained(model, place)
            peftcore.load(model, place)
            return model

        world.opened("a file of peft", ours, world.output(theirs))

    @rule()
    def train_as_peft(self) -> None:
        """Three steps with a configuration of peft, which starts where peft starts, in both."""
        world, losses = self.world, []
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.get_peft_model(world.fresh(world.tied), world.config()).double().eval()
        torch.manual_seed(3)
        try:
            ours = compat.get_peft_model(world.fresh(world.tied), world.config()).double().eval()
        except PeftcoreError:
            world.refused += 1
            return
        for model in (ours, theirs):
            optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
            for _ in range(3):
                loss = model(**world.inputs).logits.square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        world.compare(ours, world.output(theirs), f"what was trained as peft trains it, with losses {losses}")

    @rule()
    def bake_and_save_the_model(self) -> None:
        """A copy: baked, saved by transformers, and opened again."""
        world = self.world
        if world.injection is None:
            return
        copied: Any = copy.deepcopy(world.model)
        (injection,) = peftcore.injections(copied).values()
        try:
            injection.bake()
        except PeftcoreError:
            world.refused += 1
            return
        world.compare(copied, self.expected, "what was baked")
        place = world.place()

        def again() -> nn.Module:
            copied.save_pretrained(place)
            model: nn.Module = type(copied).from_pretrained(place, dtype=torch.float64)
            return model

        world.opened("what was baked and saved", again, self.expected)

    @invariant()
    def outputs_stay(self) -> None:
        if hasattr(self, "world") and self.world.injection is not None:
            self.world.compare(self.world.model, self.expected, "output")

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()
