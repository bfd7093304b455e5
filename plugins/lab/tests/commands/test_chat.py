"""``peftcore chat``: a run or an adapter answers, and the bare model beside it."""

from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

import peftcore
from peftcore.cli.commands import app
from peftcore_lab.chat_session import conversation


def told(*arguments: object, said: str = "", code: int = 0) -> tuple[list[str], str]:
    result = CliRunner().invoke(app, ["chat", *map(str, arguments)], input=said)
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout.splitlines(), " ".join(result.stderr.split())


@pytest.fixture
def talker(talker: Path) -> Path:
    """One that says more than the end of its answer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(talker)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(talker)
    return talker


@pytest.fixture
def run(talker: Path, chats: Path) -> Path:
    """A run whose adapter has learned to answer."""
    options = ("--model", talker, "--task", "chat", "--data", chats, "--steps", 60, "--lr", "5e-2", "--batch-size", 16)
    arguments = ("train", *options, "--method", "lora", "--target", "all-linear", "--out", "run")
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return Path("run")


def test_a_run_answers_as_its_model_generates(run: Path, talker: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(talker)
    model = transformers.AutoModelForCausalLM.from_pretrained(talker).eval()

    def answer(*messages: tuple[str, str]) -> str:
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": said} for role, said in messages], tokenize=False, add_generation_prompt=True
        )
        read = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            found = model.generate(**read, max_new_tokens=3, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        return str(tokenizer.decode(found[0, read["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    base = answer(("user", "my phone"))
    peftcore.load(model, run / "adapter")
    first = answer(("user", "my phone"))
    second = answer(("user", "my phone"), ("assistant", first), ("user", "the phone"))
    assert first != base
    lines, _ = told(run, "--max-tokens", 3, said="my phone\n\nthe phone\n/new\nmy phone\n/base\n/quit\nmy phone\n")
    assert [line.strip() for line in lines] == [first, second, first, base]


def test_an_adapter_names_its_model_or_is_told_one(run: Path, talker: Path, decoder: Path) -> None:
    with_run, _ = told(run, "--max-tokens", 2, said="my phone\n")
    assert told(run / "adapter", "--max-tokens", 2, said="my phone\n")[0] == with_run
    assert told(run / "adapter", "--model", talker, "--max-tokens", 2, said="my phone\n")[0] == with_run
    assert "no chat template" in told(run / "adapter", "--model", decoder, code=2)[1]
    assert told(run / "adapter", "--model", decoder, "--chat-template", "chatml", said="")[0] == []


def test_what_cannot_answer_says_so(run: Path) -> None:
    assert "no question was asked yet" in told(run, said="/base\n")[1]
    assert "--dtype float8" in told(run, "--dtype", "float8", code=2)[1]
    assert told("nowhere", code=2)[1].startswith("Error: ")
    assert told(run, "--model", "nowhere/at/all", code=2)[1].startswith("Error: ")


def test_an_interrupted_answer_is_remembered_as_far_as_it_came(run: Path) -> None:
    talk = conversation(str(run), None, None, "", "float32")

    def once(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.answer("my phone", once, 3, 0.0)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]
    said: list[str] = []
    talk.answer("the phone", said.append, 3, 0.7)
    assert len(talk.messages) == 4 and talk.messages[-1]["content"] == "".join(said).strip()
