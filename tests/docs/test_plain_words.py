"""Few sentences of public docstrings and of pages are read twice, and they become fewer."""

import pytest
from plain_words import counts, docstrings, matching, sentences

AT_MOST = {"docstrings": 1.9, "pages": 3.5}
"""Percent of sentences that have one of the patterns. Lower a number after rewriting sentences; never raise it."""


@pytest.mark.parametrize("kind", AT_MOST)
def test_sentences_become_plainer(kind: str) -> None:
    found = counts()[kind]
    share = 100 * found["any"] / found["sentences"]
    assert share <= AT_MOST[kind], f"{share:.1f} % of {kind}: see python tests/docs/plain_words.py"


@pytest.mark.parametrize(
    ("sentence", "names"),
    [
        ("Returns the names of the target modules.", []),
        ("The rows of its own are read.", ["pronoun"]),
        ("It reads the values of what was saved.", ["what"]),
        ("An error says what to do.", []),
        ("Which module it is says the source.", ["inverted"]),
        ("The module is no linear layer.", ["negative"]),
        ("Somebody else changed the weight.", ["subject"]),
        ("The adapter stands beside the module.", ["metaphor"]),
    ],
)
def test_patterns_find_what_they_are_for(sentence: str, names: list[str]) -> None:
    assert matching(sentence) == names


def test_sentences_are_those_of_text() -> None:
    text = "One sentence is here. Another one follows.\n\n```python\nwhat = 'is no text'\n```\n\n"
    text += "Args:\n    a: the third one."
    assert [*sentences(text)] == ["One sentence is here.", "Another one follows.", "a: the third one."]


def test_docstrings_are_those_of_public_things() -> None:
    source = '"""Module."""\nA = 1\n"""Value."""\nclass B:\n    """Class."""\n    def c(self):\n        """Method."""\n'
    source += 'def _d():\n    """Private."""\n'
    assert [*docstrings(source)] == ["Module.", "Value.", "Class.", "Method."]
