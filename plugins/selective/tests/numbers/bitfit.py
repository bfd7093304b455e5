"""What BitFit's authors train of a tiny BERT: ``python -m peftcore.testing.freeze bitfit.py CHECKOUT``."""

import sys
from pathlib import Path
from types import SimpleNamespace

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load
from peftcore.testing.hosts import HOSTS

SOURCE = Source("authors", "benzakenelad/BitFit", "7ead19a", "glue_evaluator.py")
VERSIONS = ("torch", "transformers")
ABSENT = (
    "matplotlib",
    "matplotlib.pyplot",
    "seaborn",
    "datasets",
    "datasets.arrow_dataset",
    "transformers.optimization",
)


def trains(checkout: Path) -> list[str]:
    """Returns the names of what trains, with the options that their script has of itself."""
    model, _ = HOSTS["bert"].build()
    evaluator = load(checkout / SOURCE.script, absent=ABSENT).GLUEvaluator
    sys.argv = ["run_glue.py", "--output-path=none", "--task-name=mrpc", "--fine-tune-type=bitfit"]
    components = load(checkout / "run_glue.py")._parse_args().bias_terms
    components = evaluator.convert_to_actual_components(components)
    evaluator._deactivate_relevant_gradients(SimpleNamespace(model=model), components)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
