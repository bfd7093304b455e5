"""Benchmarks of peftcore side by side with peft: ``python -m benchmarks`` (or ``make bench``)."""
