"""A preset says in one line what it is."""

from peftcore.author import Preset


def test_a_preset_is_written_as_a_call() -> None:
    preset = Preset("ssf", "2407.11033", {"init_std": 0.0}, target="attn.output", train=("norm",))
    assert str(preset) == "ssf(init_std=0.0, target='attn.output', train=['norm'])"
    assert str(Preset("lora", "2106.09685")) == "lora()"


def test_a_workflow_says_what_to_do() -> None:
    assert str(Preset("prompt_tuning", "2109.04332", workflow="train it on another task")) == "train it on another task"


def test_a_note_is_no_part_of_the_call() -> None:
    assert str(Preset("lora", "2106.09685", note="without its second half")) == "lora()"
