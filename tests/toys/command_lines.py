"""What each process of test_processes.py does under torchrun: ``command_lines.py LINES.json``, arguments of several
``python -m peftcore``, one after the other. To import what they need takes longer than all of them."""

import json
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        sys.argv = ["peftcore", *arguments]
        try:
            runpy.run_module("peftcore", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                raise
