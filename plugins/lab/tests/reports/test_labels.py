"""Names beside points: shortened, and spread."""

from peftcore_lab.reports.labels import shorten, spread


def test_shortened_names_keep_both_ends():
    assert shorten("lora, rank 8, on queries", 40) == "lora, rank 8, on queries"
    assert shorten("lora\nrank\t8\x00", 40) == "lora rank 8"
    assert shorten("lora, rank 8, on queries", 12) == "lora,…ueries"


def test_heights_are_spread_no_more_than_needed():
    assert spread([5, 50], 10, 0, 100) == [5, 50]
    assert spread([50, 50, 52], 10, 0, 100) == [50, 60, 70]
    assert spread([98, 99, 100], 10, 0, 100) == [80, 90, 100]
