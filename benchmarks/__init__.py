"""How fast peftcore is, side by side with peft: ``python -m benchmarks`` (or ``make bench``)."""
