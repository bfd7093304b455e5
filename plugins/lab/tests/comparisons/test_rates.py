"""The rate of each method is the one that was best on the tuning set."""

import pytest
from made_up import report, trial

from peftcore.errors import TrainingError
from peftcore_lab.comparisons.comparison import Comparison
from peftcore_lab.comparisons.rates import chosen

COMPARISON = Comparison.model_validate(
    {"model": "m", "data": {"train": "t"}, "methods": "lora,ia3", "tune_lr": "1e-4,1e-3,1e-2"}
)


@pytest.mark.parametrize("greater", [True, False])
def test_the_best_of_each(greater: bool) -> None:
    """Of scores of which more is better, or less; of equal ones the first; at an end of the range it is said."""
    scores = {"lora": (0.5, 0.7, 0.6), "ia3": (0.4, 0.3, 0.4)}
    trials = [
        trial(f"{name} at {rate:g}", score if greater else 1 - score, 10, metric="own")
        for name, each in scores.items()
        for rate, score in zip(COMPARISON.tune_lr, each, strict=True)
    ]
    methods, said = chosen(COMPARISON, report(*trials, metric="own", greater=greater))
    assert [(each.name, each.learning_rate) for each in methods] == [("lora", 1e-3), ("ia3", 1e-4)]
    assert said.endswith("The best was the smallest or the largest for ia3 (0.0001).")


def test_a_rate_that_failed_is_not_chosen() -> None:
    found = report(trial("lora at 0.001", 0.2, 10), trial("ia3 at 0.01", 0.2, 10), failed={"lora at 0.01": "nan"})
    methods, _ = chosen(COMPARISON, found)
    assert [each.learning_rate for each in methods] == [1e-3, 1e-2]
    with pytest.raises(TrainingError, match="ia3: it went wrong"):
        chosen(COMPARISON, report(trial("lora at 0.001", 0.2, 10), failed={"ia3 at 0.0001": "it went wrong"}))
