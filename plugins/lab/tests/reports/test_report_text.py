"""What a comparison found, in words."""

from made_up import report, trial

from peftcore_lab.reports.report_text import findings


def test_the_smallest_within_the_error_of_the_best_is_a_finding():
    found = findings(report(trial("lora", 0.900, 500), trial("dora", 0.905, 900), trial("ia3", 0.6, 10)))
    assert [(each.name, each.label) for each in found] == [
        ("Best", "dora"),
        ("Smallest within one ± of the best", "lora"),
    ]
