"""``python -m peftcore`` is the command line ``peftcore``."""

from peftcore.cli.entry import main

if __name__ == "__main__":
    main()
