"""The helper modules of this folder are importable, here and in fresh processes that a test starts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
