"""The mutants lie beside the tests and are found by name, also when a host that carries one is unpickled."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
