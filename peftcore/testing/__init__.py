"""The conformance kit for authors of methods, which is installed with peftcore, and the tiny hosts on which its checks
run.

    @conformance("mymethod", expected_failures={"check-host": "why"})
    def test_conformance(check):
        check()

or, without pytest, ``for result in check_method("mymethod"): print(result)``. `quantizer_conformance` and
`check_quantizer` do the same for schemes that quantize weights. `plugged` registers hooks for a block, to try them
without a package.

It may import all of peftcore but `comparing` and `cli`. In the order of reading:

- `failures`: the message of a failed check.
- `copies`: many copies of one model.
- `kit`: cases, checks, and the registration of checks.
- `hosts`: tiny models on which checks run.
- `tools`: helpers of several checks.
- `probes`: tiny models and tools for single checks.
- `trained_once`: tensors that are trained beforehand, cached on disk.
- `learning_tasks`: small tasks that a method has to learn.
- `plugging`: registers hooks for a block, without a package.
- `compiling`: a backend of torch.compile for checks.
- `snapshots`: records the state of models, files and the process, for comparisons.
- `fault_points`: the points of an operation at which an error can be raised.
- `faults`: runs an operation with an error at each of its points.
- `doors`: `conformance` and `check_method`.
- `declared_evidence`: tests declare the code whose numbers they compare with, and it is checked that they did.
- `starts`: records initial values of reference code, and compares ours with them.
- `default_options`: compares our default options with those of other code.
- `checkouts`: imports the authors' code, for scripts that compute frozen numbers.
- `freeze`: the command that computes frozen numbers again.
- `gathering`: a plugin of pytest that records the reference code with which tests compare.
- `quantizers`: the kit for schemes that quantize weights.
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
