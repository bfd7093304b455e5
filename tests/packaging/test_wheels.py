"""The packages as users get them: built and checked as for a release, and installed into empty environments.

Of what is installed where the tests run, an environment sees only what the wheels' own metadata asks for, as links.
That takes no network and a second instead of minutes, and a dependency that nobody declared is missing there as it is
for a user.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import peftcore

ROOT = Path(__file__).parents[2]
METHODS = {
    folder.name: set(importlib.import_module(f"peftcore_{folder.name}").peftcore_methods())
    for folder in sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
    if folder.name != "lab"
}
"""The methods by plugin, as the plugins' own tables name them."""
NEEDS = {"hybrid": ("additive",), "multitask": ("additive", "reparameterized")}
"""The plugins whose methods a plugin puts together."""
EXAMPLES = [ROOT / "examples" / "third-party-plugin", ROOT / "examples" / "broken-plugin"]
VERSION = peftcore.__version__
pytestmark = pytest.mark.slow


# ---------------------------------------------------------------- wheels and environments


def describe(wheel: Path) -> Distribution:
    """The metadata inside a wheel."""
    name, version = wheel.name.split("-")[:2]
    return PathDistribution(zipfile.Path(wheel, f"{name}-{version}.dist-info/"))


def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every package of the repository as a wheel, by the name of its import; ours are those that a release has."""
    folder = tmp_path_factory.mktemp("wheels")
    checked([sys.executable, ROOT / "release" / "check.py", folder])
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, *EXAMPLES]
    checked([sys.executable, "-m", "pip", *build])
    return {wheel.name.split("-")[0]: wheel for wheel in folder.glob("*.whl")}


@dataclass(frozen=True)
class Environment:
    """A virtual environment without pip and without anything of ours."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def install(self, *wheels: Path) -> None:
        """Install with dependencies checked, but nothing fetched: what the metadata asks for must be there."""
        checked([sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet", "--no-index", *wheels])

    @property
    def site_packages(self) -> Path:
        [found] = self.folder.glob("lib/python*/site-packages")
        return found

    def ask(self, script: str) -> dict[str, object]:
        """Run a script that prints one JSON object."""
        answer: dict[str, object] = json.loads(checked([self.python, "-c", script], cwd=self.folder))
        return answer

    def copy(self, folder: Path) -> "Environment":
        """The same elsewhere; what is linked stays linked."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Environment(folder)


def outside() -> dict[str, str]:
    """The variables of the process, without what would let the outer environment in."""
    leaks = ("PYTHON", "PEFTCORE", "PIP_FIND", "COV_", "PYTEST")
    return {name: value for name, value in os.environ.items() if not name.startswith(leaks)}


def checked(command: Iterable[object], cwd: Path | None = None) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run([*map(str, command)], cwd=cwd, env=outside(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def made_in(folder: Path, requirements: Iterable[str]) -> Environment:
    """A new environment with what the requirements ask for."""
    made = Environment(folder)
    checked([sys.executable, "-m", "venv", "--without-pip", folder])
    for installed in closure(requirements):
        link(installed, made.site_packages)
    return made


@pytest.fixture
def environment(tmp_path: Path, wheels: dict[str, Path]) -> Callable[..., Environment]:
    """Makes an environment with what the core requires, and `extra` requirements with theirs."""

    def make(*extra: str) -> Environment:
        return made_in(tmp_path / "venv", [*plain_requirements(describe(wheels["peftcore"])), *extra])

    return make


PREPARED = """
import json, os, sys, traceback
import diffusers, pydantic, torch, transformers
diffusers.UNet2DConditionModel, transformers.BertForSequenceClassification
[own] = [path for path in sys.path if path.endswith("site-packages")]
for line in sys.stdin:
    folder, site_packages, script = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    status = 1
    try:
        os.chdir(folder)
        for stream, name in ((1, "answer"), (2, "errors")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.path[sys.path.index(own)] = site_packages
        exec(script, {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
"""
"""Imports once what takes long and is not ours, then runs each script in a fork whose installed packages are those of
another environment."""


@dataclass(frozen=True)
class Prepared:
    """An environment with the core, transformers and diffusers, and a process there that has imported the latter."""

    environment: Environment
    process: "subprocess.Popen[str]"

    def ask(self, environment: Environment, script: str) -> dict[str, object]:
        """Run a script that prints one JSON object in a copy of the environment."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps([str(environment.folder), str(environment.site_packages), script]), file=self.process.stdin)
        self.process.stdin.flush()
        status = self.process.stdout.readline().strip()
        said, errors = ((environment.folder / name).read_text(encoding="utf-8") for name in ("answer", "errors"))
        assert status == "0", f"{status}\n{said}\n{errors}"
        answer: dict[str, object] = json.loads(said)
        return answer


@pytest.fixture(scope="session")
def prepared(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    requirements = [*plain_requirements(describe(wheels["peftcore"])), "transformers", "diffusers"]
    made = made_in(tmp_path_factory.mktemp("prepared") / "venv", requirements)
    made.install(wheels["peftcore"])
    process = subprocess.Popen(
        [made.python, "-c", PREPARED],
        cwd=made.folder,
        env=outside(),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    yield Prepared(made, process)
    process.communicate(timeout=60)  # nothing more to read: it ends
    assert process.returncode == 0


def name_of(requirement: str) -> str:
    return Requirement(requirement).name


def plain_requirements(package: Distribution) -> list[str]:
    """What a package requires without any of its extras."""
    return [text for text in package.requires or [] if "extra ==" not in text]


def closure(requirements: Iterable[str]) -> Iterator[Distribution]:
    """The installed distributions that the requirements ask for, and those that these ask for."""
    queue, seen = [Requirement(text) for text in requirements], set()
    while queue:
        wanted = queue.pop()
        for extra in ("", *wanted.extras):
            if (wanted.name, extra) in seen:
                continue
            seen.add((wanted.name, extra))
            installed = distribution(wanted.name)
            asked = (Requirement(text) for text in installed.requires or [])
            queue += [each for each in asked if each.marker is None or each.marker.evaluate({"extra": extra})]
            yield installed


def link(installed: Distribution, site_packages: Path) -> None:
    """Links to the modules, packages and metadata of a distribution."""
    for top in {file.parts[0] for file in installed.files or []} - {"..", "__pycache__"}:
        if not (site_packages / top).exists():
            (site_packages / top).symlink_to(Path(str(installed.locate_file(top))))


# ---------------------------------------------------------------- what the wheels say and hold


def test_core_requires_four_packages_and_four_small_ones_for_its_command(wheels: dict[str, Path]) -> None:
    core = describe(wheels["peftcore"])
    for_import = ["pluggy>=1.5", "pydantic>=2.7", "safetensors[torch]>=0.4", "torch>=2.8"]
    for_command = ["packaging>=23", "pyyaml>=6", "rich>=13", "typer>=0.12"]
    assert sorted(plain_requirements(core)) == sorted([*for_import, *for_command])
    extras = {"all", "plugins", "train", "diffusion", "vision", "quantized", "hub", "ray", "cli", "interop", "test"}
    assert set(core.metadata.get_all("Provides-Extra") or []) == extras
    assert [(point.group, point.name) for point in core.entry_points] == [("console_scripts", "peftcore")]


def asked(package: Distribution, extra: str) -> dict[str, Requirement]:
    """What an extra of a package asks for, with the extras of the same package that it names."""
    found: dict[str, Requirement] = {}
    for each in map(Requirement, package.requires or []):
        if each.marker is not None and each.marker.evaluate({"extra": extra}):
            found[str(each)] = each
            if each.name == package.metadata["Name"]:
                found |= {key: value for inner in each.extras for key, value in asked(package, inner).items()}
    return found


def test_one_extra_of_the_core_asks_for_all_plugins_and_all_that_they_use(wheels: dict[str, Path]) -> None:
    core = describe(wheels["peftcore"])
    everything = [each for each in asked(core, "all").values() if each.name != "peftcore"]
    names = {each.name.replace("_", "-") for each in everything}
    assert names >= {f"peftcore-{each}" for each in (*METHODS, "lab")}
    assert names >= {"transformers", "diffusers", "timm", "torchvision", "huggingface-hub"}, names
    assert {extra for each in everything for extra in each.extras} >= {"bitsandbytes", "torchao"}
    ours = [each for each in everything if each.name.startswith("peftcore-")]
    assert all(each.specifier.contains(VERSION) and not each.specifier.contains("99") for each in ours)


@pytest.mark.parametrize("package", ["peftcore", *(f"peftcore_{each}" for each in (*METHODS, "lab"))])
def test_each_package_says_where_it_comes_from_and_under_which_licence(wheels: dict[str, Path], package: str) -> None:
    said = describe(wheels[package]).metadata
    assert {each.partition(",")[0] for each in said.get_all("Project-URL") or []} == {
        "Homepage",
        "Documentation",
        "Repository",
        "Changelog",
        "Issues",
    }
    assert said["License-Expression"] == "Apache-2.0" and said["Keywords"]
    assert len(said.get_all("Classifier") or []) >= 8
    assert any(name.endswith("/licenses/LICENSE") for name in contents(wheels[package]))


def test_core_wheel_holds_the_package_its_typing_marker_and_the_licence(wheels: dict[str, Path]) -> None:
    names = contents(wheels["peftcore"])
    assert {name.split("/")[0] for name in names} == {"peftcore", f"peftcore-{VERSION}.dist-info"}
    assert {"peftcore/py.typed", "peftcore/testing/__init__.py"} <= set(names)
    templates = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "peftcore").glob("**/templates/**/*") if path.is_file()
    }
    assert templates <= set(names)
    assert any(".github" in each for each in templates)
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.mark.parametrize("category", METHODS)
def test_plugin_wheel_requires_the_core_and_has_one_entry_point(wheels: dict[str, Path], category: str) -> None:
    wheel = wheels[f"peftcore_{category}"]
    plugin = describe(wheel)
    names = ["peftcore", *(f"peftcore-{each}" for each in NEEDS.get(category, ()))]
    assert sorted(map(name_of, plain_requirements(plugin))) == sorted(names)
    points = [(point.group, point.name, point.value) for point in plugin.entry_points]
    backends = sorted(path.stem for path in (ROOT / "plugins" / category).glob("*/backends/[!_]*.py"))
    wanted = [(category, f"peftcore_{category}"), *((b, f"peftcore_{category}.backends.{b}") for b in backends)]
    assert sorted(points) == sorted(("peftcore", *each) for each in wanted)
    assert {name.split("/")[0] for name in contents(wheel)} == {
        f"peftcore_{category}",
        f"peftcore_{category}-{VERSION}.dist-info",
    }


def test_lab_wheel_requires_the_core_and_what_trains_and_has_its_templates(wheels: dict[str, Path]) -> None:
    lab = describe(wheels["peftcore_lab"])
    assert {"peftcore", "transformers", "accelerate", "datasets"} <= set(map(name_of, plain_requirements(lab)))
    assert lab.metadata.get_all("Provides-Extra") == ["ray"]
    assert [(point.group, point.name, point.value) for point in lab.entry_points] == [
        ("peftcore", "lab", "peftcore_lab")
    ]
    names = contents(wheels["peftcore_lab"])
    assert {name.split("/")[0] for name in names} == {"peftcore_lab", f"peftcore_lab-{VERSION}.dist-info"}
    assert "peftcore_lab/reports/templates/compare.html" in names


# ---------------------------------------------------------------- what they do once installed

LIST = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peftcore
    names = sorted(info.name for info in peftcore.methods())
listed = {"methods": names, "warnings": [str(warning.message) for warning in caught]}
"""
LISTED = f"{LIST}print(json.dumps(listed))"

TRAIN = """
import copy, functools, torch
from torch import nn

HOSTS = ("vit", "unet", "llama")

class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
        self.classifier = nn.Linear(16, 3)

    def forward(self, input_ids):
        return self.classifier(self.encoder(self.embed(input_ids)).mean(1))

def texts(width=16, layers=2):
    x, y = torch.randint(20, (12, 5)), torch.arange(12) // 9  # most have one label, which is soon learned
    try:
        import transformers
    except ImportError:
        model, logits = Classifier(), lambda model: model(input_ids=x)
    else:
        sizes = dict(vocab_size=20, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2)
        weights = dict(initializer_range=0.2)  # a head that says little would leave little to learn
        dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        config = transformers.BertConfig(**sizes, **dropout, num_labels=3, intermediate_size=2 * width, **weights)
        model, logits = transformers.BertForSequenceClassification(config), lambda model: model(input_ids=x).logits
    return model, logits, lambda model: nn.functional.cross_entropy(logits(model), y)

def of_kit(name):
    from peftcore.testing import HOSTS
    model, inputs = HOSTS[name].build()
    outputs = lambda model: HOSTS[name].output(model(**inputs))
    return model, outputs, lambda model: (outputs(model) - 1).square().mean()

def trained(info):
    # On the first kind of host in which the method has a place.
    if any(field.is_required() for field in peftcore.method(info.name).Config.model_fields.values()):
        return "asks for options"
    deeper, wider = functools.partial(texts, layers=8), functools.partial(texts, width=80)
    for host in (texts, deeper, wider, *(functools.partial(of_kit, name) for name in HOSTS)):
        torch.manual_seed(0)
        model, logits, loss = host()
        base = copy.deepcopy(model)
        data = {"data": [loss]} if info.tags.needs_data else {}
        try:
            injection = peftcore.apply(model, info.name, **data)
            logits(model)
            break
        except (peftcore.errors.MissingContext, peftcore.errors.SequenceError, peftcore.errors.TrainingError):
            return "asks to be told more"  # of a task, or of labels
        except peftcore.errors.CalibrationError:
            return "asks to be told more"  # of the data
        except (peftcore.errors.TargetError, peftcore.errors.UnsupportedSite):
            continue
    else:
        return "has no place"
    if not any(parameter.requires_grad for parameter in injection.parameters()):
        return "trains nothing"
    optimizer = injection.optimizer(torch.optim.AdamW, lr=0.02, total_steps=STEPS)
    losses = []
    for _ in range(STEPS):
        losses.append(loss(model))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    now = model.state_dict()
    kept = all(torch.equal(value, now[key]) for key, value in base.state_dict().items())
    injection.save(info.name)
    peftcore.load(base, info.name)
    with torch.no_grad():
        loads = torch.allclose(logits(base.eval()), logits(model.eval()), atol=1e-5)
    return {"lower": (losses[-1] < losses[0]).item(), "base kept": kept, "loads": loads}

print(json.dumps({**listed, "trained": {i.name: trained(i) for i in peftcore.methods() if i.plugin == PLUGIN}}))
"""


def train(plugin: str) -> str:
    """Lists all methods, and trains those of one plugin: the others train where theirs is installed alone."""
    return f"{LIST}PLUGIN, STEPS = {plugin!r}, 8\n{TRAIN}"


TRAINED = {"lower": True, "base kept": True, "loads": True}
ELSEWHERE = {
    "aim": "has no place",
    "c3a": "has no place",
    "clip_adapter": "has no place",
    "cocoop": "has no place",
    "controlnet": "asks to be told more",
    "controlnet_lllite": "asks to be told more",
    "controlnet_lora": "asks to be told more",
    "controlnext": "asks to be told more",
    "controlnet_xs": "asks to be told more",
    "coop": "asks to be told more",
    "dyt": "asks to be told more",
    "ip_adapter": "asks to be told more",
    "ir_qlora": "has no place",
    "kadaptation": "has no place",
    "lqer": "trains nothing",
    "ominicontrol": "has no place",
    "maple": "has no place",
    "perfusion": "asks to be told more",
    "qa_lora": "has no place",
    "st_adapter": "has no place",
    "state_offset_tuning": "has no place",
    "t2i_adapter": "asks to be told more",
    "text_to_lora": "asks to be told more",
    "tip_adapter": "has no place",
    "tlora": "asks to be told more",
}
"""Methods that these hosts and calls do not suit."""


def expected(name: str) -> object:
    """What `train` says of a method of ours."""
    fields = peftcore.method(name).Config.model_fields.values()
    return "asks for options" if any(field.is_required() for field in fields) else ELSEWHERE.get(name, TRAINED)


def test_environment_holds_only_what_is_asked_for(environment: Callable[..., Environment]) -> None:
    script = """
import importlib.util, json
names = ["torch", "pydantic", "transformers", "peft", "peftcore", "peftcore_additive"]
print(json.dumps({name: importlib.util.find_spec(name) is not None for name in names}))
"""
    assert environment().ask(script) == {
        "torch": True,
        "pydantic": True,
        "transformers": False,
        "peft": False,
        "peftcore": False,
        "peftcore_additive": False,
    }


def test_core_alone_lists_no_method(wheels: dict[str, Path], environment: Callable[..., Environment]) -> None:
    made = environment()
    made.install(wheels["peftcore"])
    assert made.ask(LISTED) == {"methods": [], "warnings": []}
    said = made.ask("""
import json, torch, peftcore
try:
    peftcore.apply(torch.nn.Linear(2, 2), "lora")
except peftcore.errors.UnknownMethod as error:
    print(json.dumps({"error": str(error)}))
""")
    assert said["error"] == (
        "no method named 'lora'; no plugin is installed: pip install 'peftcore[all]'; there are: none"
    )


@pytest.mark.parametrize("category", METHODS)
def test_plugin_alone_lists_and_trains_its_methods(
    wheels: dict[str, Path], prepared: Prepared, tmp_path: Path, category: str
) -> None:
    made = prepared.environment.copy(tmp_path / "venv")
    made.install(*(wheels[f"peftcore_{each}"] for each in (*NEEDS.get(category, ()), category)))
    methods = sorted(METHODS[category].union(*(METHODS[each] for each in NEEDS.get(category, ()))))
    trained = {name: expected(name) for name in METHODS[category]}
    assert prepared.ask(made, train(category)) == {"methods": methods, "warnings": [], "trained": trained}


SAVED = """
import json, torch, peftcore
from torch import nn
model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
peftcore.apply(model, "lora", target=["0", "1"], rank=2).save("adapter")
peftcore.apply(model, "lora", target=["0", "1"], rank=2, name="other").save("other", format="peft")
print(json.dumps({}))
"""
ENCODER = """
import json, torch, transformers, peftcore
sizes = dict(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
model = transformers.BertModel(transformers.BertConfig(**sizes))
model.save_pretrained("encoder")
peftcore.apply(model, "lora", rank=2).save("adapter")
print(json.dumps({}))
"""
COMPARED = """
import json, torch, peftcore
from torch import nn
torch.manual_seed(0)
x = torch.randn(16, 4)
loss = lambda model: (model(x) - x.sin()).square().mean()

def train(model, injection):
    optimizer = injection.optimizer(torch.optim.AdamW, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

methods = [{"name": "lora", "target": ["0"]}, {"name": "dora", "target": ["0"]}]
found = peftcore.compare(nn.Sequential(nn.Linear(4, 4)), methods, train=train, score=lambda m: loss(m).item())
print(json.dumps({"compared": [line.label for line in found.lines], "listed": "compare" in dir(peftcore)}))
"""
TRAINING = ("train", "compare", "search", "chat")


def command(made: Environment, *words: str) -> subprocess.CompletedProcess[str]:
    """The command of an environment, which writes no traceback."""
    peftcore = [str(made.folder / "bin" / "peftcore"), *words]
    done = subprocess.run(peftcore, cwd=made.folder, env=outside(), capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def works(made: Environment, *lines: str) -> None:
    for line in lines:
        done = command(made, *line.split())
        assert done.returncode == 0 and not done.stderr.strip(), f"{line}: {done.stdout}{done.stderr}"


def test_core_alone_has_a_command_that_looks_and_says_where_the_others_are(
    wheels: dict[str, Path], environment: Callable[..., Environment]
) -> None:
    made = environment()
    made.install(wheels["peftcore"])
    works(made, "methods", "schema", "--help", "new my-method")
    made.install(wheels["peftcore_reparameterized"])
    made.ask(SAVED)
    works(made, "methods", "show lora", "schema lora", "doctor", "inspect adapter", "check other --for peft")
    for name in TRAINING:
        done = command(made, name, "--demo")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            f"Error: peftcore {name} is part of peftcore-lab, which is not installed. Run: pip install peftcore-lab\n"
        )
    (made.folder / "model").mkdir()
    (made.folder / "model" / "config.json").write_text('{"model_type": "bert", "hidden_size": 4}')
    for line in ("plan model lora", "merge model adapter --out merged"):
        done = command(made, *line.split())
        assert done.returncode == 2 and done.stderr.startswith("Error: not installed: transformers. Run: pip "), line
    said = made.ask("""
import json, peftcore
from peftcore import *
try:
    peftcore.compare
except peftcore.errors.MissingPackage as error:
    print(json.dumps({"error": str(error), "listed": "compare" in dir(peftcore)}))
""")
    assert said == {
        "error": "peftcore.compare is part of peftcore-lab, which is not installed. Run: pip install peftcore-lab",
        "listed": False,
    }


def test_core_plans_converts_and_exports_without_the_lab(
    wheels: dict[str, Path], environment: Callable[..., Environment]
) -> None:
    made = environment("transformers")
    made.install(wheels["peftcore"], wheels["peftcore_reparameterized"])
    made.ask(ENCODER)
    works(made, "plan encoder lora --rank 4", "tree encoder lora", "merge encoder adapter --out merged")
    works(made, "convert adapter --to peft --out peft --model encoder")
    works(made, "export peft exported --for peft --model encoder")


def test_lab_adds_its_commands_and_compare(wheels: dict[str, Path], environment: Callable[..., Environment]) -> None:
    needs = plain_requirements(describe(wheels["peftcore_lab"]))
    made = environment(*(text for text in needs if name_of(text) != "peftcore"))
    made.install(wheels["peftcore"], wheels["peftcore_reparameterized"], wheels["peftcore_lab"])
    works(made, *(f"{name} --help" for name in TRAINING), *(f"schema {name}" for name in TRAINING[:3]))
    assert made.ask(COMPARED) == {"compared": ["lora", "dora"], "listed": True}
    made.ask(ENCODER)
    rows = "".join(f"{word},{label}\n" for word, label in [("good", 1), ("bad", 0)] * 8)
    (made.folder / "rows.csv").write_text(f"text,label\n{rows}")
    done = command(made, "train", "--model", "encoder", "--data", "rows.csv", "--method", "lora")
    assert done.returncode == 2 and "task is missing" in done.stderr


def test_third_party_plugin_is_applied_by_name_and_passes_the_kit(
    wheels: dict[str, Path], environment: Callable[..., Environment]
) -> None:
    made = environment("pytest")
    made.install(wheels["peftcore"], wheels["peftcore_example_scale"])
    trained = {"diag_scale": TRAINED}
    assert made.ask(train("example_scale")) == {"methods": ["diag_scale"], "warnings": [], "trained": trained}

    shutil.copytree(EXAMPLES[0] / "tests", made.folder / "tests")
    report = checked([made.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"], cwd=made.folder)
    passed = re.search(r"(\d+) passed", report)
    assert passed and int(passed[1]) >= 40, report


def test_broken_plugin_changes_nothing_but_one_warning(
    wheels: dict[str, Path], environment: Callable[..., Environment]
) -> None:
    made = environment()
    without = {"peftcore_example_broken", "peftcore_lab"}  # which needs what is not there
    made.install(*(wheel for name, wheel in wheels.items() if name not in without))
    methods = sorted({"diag_scale"}.union(*METHODS.values()))
    assert made.ask(LISTED) == {"methods": methods, "warnings": []}

    made.install(wheels["peftcore_example_broken"])
    applied = "peftcore.apply(torch.nn.Linear(3, 3), 'lora', target='')"
    beside = made.ask(f"import torch\n{LIST}{applied}\nprint(json.dumps(listed))")
    assert beside["methods"] == methods
    [warning] = beside["warnings"]
    for part in ("peftcore-example-broken", "0.2.0", "a_dependency_that_was_never_declared"):
        assert part in warning
