"""The conformance kit: checks that authors of methods run on their methods, and the tiny hosts on which the checks run.
It is installed with peftcore.

    @conformance("mymethod", expected_failures={"check-host": "why"})
    def test_conformance(check):
        check()

Without pytest: ``for result in check_method("mymethod"): print(result)``. `quantizer_conformance` and `check_quantizer`
do the same for schemes that quantize weights. `plugged` registers hooks within a ``with`` block, to try them without a
package.

It may import all of peftcore but `comparing` and `cli`. In the order of reading:

- `failures`: the message of a failed check.
- `copies`: makes many copies of one model, fast.
- `kit`: the base classes `Host`, `Case` and `Check`, and the list of checks.
- `hosts`: tiny models on which checks run.
- `tools`: helpers that several checks use.
- `probes`: tiny models and tools for single checks.
- `trained_once`: a cache on disk for trained tensors.
- `learning_tasks`: small tasks that a method has to learn.
- `plugging`: registers hooks within a ``with`` block, without a package.
- `compiling`: a backend of torch.compile for checks.
- `snapshots`: records the state of models, files and the process, for comparisons.
- `fault_points`: finds the points of an operation at which an error can be raised.
- `faults`: runs an operation with an error at each of its points.
- `doors`: `conformance` and `check_method`, which run the checks.
- `declared_evidence`: a decorator by which a test declares the reference code that it compares with; the test fails if
  it does not.
- `starts`: compares the initial values of a method with those of reference code.
- `default_options`: compares the default options of a method with those of reference code.
- `checkouts`: imports code of a paper's authors, for scripts that compute frozen numbers (reference numbers in a file).
- `freeze`: the command that computes frozen numbers again.
- `gathering`: a plugin of pytest that records the reference code with which tests compare.
- `quantizers`: the conformance kit for schemes that quantize weights.
- `checks_injection`, `checks_declared`, `checks_training`, `checks_forward`, `checks_around_training`,
  `checks_switching`, `checks_lifecycle`, `checks_calls`, `checks_routers`, `checks_merge`, `checks_files`,
  `checks_refused_files`, `checks_faults`, `checks_packed`, `checks_learning`, `checks_quantizers`,
  `checks_adapted_quantizers`: the checks, one module for each subject.
"""

import importlib

from peftcore.testing.declared_evidence import against, frozen
from peftcore.testing.default_options import same_defaults
from peftcore.testing.doors import Result, check_method, conformance
from peftcore.testing.failures import CheckFailed
from peftcore.testing.faults import Fault, FaultReport, inject_faults
from peftcore.testing.hosts import APART, HOSTS
from peftcore.testing.kit import CHECKS, Case, Check, Host, NotApplicable
from peftcore.testing.plugging import plugged
from peftcore.testing.quantizers import QUANTIZER_CHECKS, check_quantizer, quantizer_conformance
from peftcore.testing.snapshots import Scene
from peftcore.testing.starts import drawn, same_start

for _name in (
    "injection",
    "declared",
    "forward",
    "training",
    "around_training",
    "switching",
    "lifecycle",
    "calls",
    "routers",
    "merge",
    "files",
    "refused_files",
    "faults",
    "packed",
    "learning",
    "quantizers",
    "adapted_quantizers",
):  # as they run
    importlib.import_module(f"{__name__}.checks_{_name}")

__all__ = [
    "APART",
    "CHECKS",
    "HOSTS",
    "QUANTIZER_CHECKS",
    "Case",
    "Check",
    "CheckFailed",
    "Fault",
    "FaultReport",
    "Host",
    "NotApplicable",
    "Result",
    "Scene",
    "against",
    "check_method",
    "check_quantizer",
    "conformance",
    "drawn",
    "frozen",
    "inject_faults",
    "plugged",
    "quantizer_conformance",
    "same_defaults",
    "same_start",
]
