"""Runs the command line ``peftcore``, as ``python -m peftcore``."""

from peftcore.cli.entry import main

if __name__ == "__main__":
    main()
