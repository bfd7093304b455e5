"""The harness of faults finds whatever an operation leaves half done, and nothing in one that is whole; a share of the
operations of the core runs in it."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from core_toys import perceptron
from fault_scenes import CASES
from fault_scenes_outside import OUTSIDE
from torch import nn

from peftcore.files.safe_io import write_text
from peftcore.testing.fault_points import Kind, Point
from peftcore.testing.faults import FaultReport, inject_faults
from peftcore.testing.snapshots import Scene, snapshot
from peftcore.utils.journal import Journal

SEED = 0
HERE = str(Path(__file__).parent)


def make(folder: Path) -> Scene:
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Scene(model, lambda model: model(torch.ones(1, 4)), folder, [optimizer])


def broken(operation: Callable[[Scene], Any], kind: Kind, **options: Any) -> FaultReport:
    return inject_faults(operation, make, kinds=[kind], packages=[HERE], **options)


def first(scene: Scene) -> nn.Linear:
    return scene.model.first


def step(scene: Scene) -> None:
    """Operations of torch, and a change after them."""
    torch.zeros(1).add(1)
    first(scene).later = 1


def two_attributes(scene: Scene) -> None:
    first(scene).one = 1
    first(scene).two = 2


def two_tensors(scene: Scene) -> None:
    with torch.no_grad():
        first(scene).weight.add_(1)
        first(scene).bias.add_(1)


def a_hook(scene: Scene) -> None:
    first(scene).register_forward_hook(lambda *_: None)
    step(scene)


def another_object(scene: Scene) -> None:
    first(scene).weight = nn.Parameter(first(scene).weight.detach().clone())
    step(scene)


def frozen(scene: Scene) -> None:
    first(scene).weight.requires_grad_(False)
    step(scene)
    first(scene).bias.requires_grad_(False)


def evaluated(scene: Scene) -> None:
    scene.model.train()
    step(scene)
    first(scene).eval()


def of_an_optimizer(scene: Scene) -> None:
    (optimizer,) = scene.optimizers
    optimizer.param_groups[0]["lr"] = 1.0
    step(scene)
    optimizer.param_groups[0]["momentum"] = 1.0


def random_numbers(scene: Scene) -> None:
    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    step(scene)
    torch.random.set_rng_state(state)


def a_mode(scene: Scene) -> None:
    torch.set_grad_enabled(False)
    step(scene)
    torch.set_grad_enabled(True)


def a_thread(scene: Scene) -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, args=(3.0,), name="left", daemon=True)
    thread.start()
    step(scene)
    end.set()
    thread.join()


KEPT: list[Any] = []


def an_open_file(scene: Scene) -> None:
    assert scene.folder is not None
    file = (scene.folder.parent / "other").open("w")
    KEPT.append(file)
    step(scene)
    file.close()


def swallowed(scene: Scene) -> None:
    try:
        torch.zeros(1).add(1)
    except KeyboardInterrupt:
        return


def another_error(scene: Scene) -> None:
    try:
        torch.zeros(1).add(1)
    except RuntimeError:
        raise LookupError("where") from None


def once_only(scene: Scene) -> None:
    if "tried" in KEPT:
        KEPT.remove("tried")
        raise LookupError("tried before")
    KEPT.append("tried")
    torch.zeros(1).add(1)
    KEPT.remove("tried")


def a_file(scene: Scene) -> None:
    assert scene.folder is not None
    (scene.folder / "file").write_text("a text")


def a_temporary_file(scene: Scene) -> None:
    assert scene.folder is not None
    (scene.folder / "part").write_text("a text")
    (scene.folder / "part").replace(scene.folder / "file")


HALF: dict[Callable[[Scene], Any], tuple[Kind, str]] = {
    two_attributes: ("line", "differs from the state before the operation: first.one"),
    two_tensors: ("tensor", "differs from the state before the operation: first.weight"),
    a_hook: ("tensor", "_forward_hooks of first"),
    another_object: ("tensor", "object at first.weight"),
    frozen: ("tensor", "first.weight"),
    evaluated: ("tensor", "training of"),
    of_an_optimizer: ("tensor", "optimizer 0, group 0, lr"),
    random_numbers: ("tensor", "torch's random numbers"),
    a_mode: ("tensor", "gradients: differs from before"),
    a_thread: ("tensor", "threads: differs from before"),
    an_open_file: ("tensor", "open files: differs from before"),
    swallowed: ("tensor", "the interrupt was swallowed"),
    another_error: ("tensor", "the error became LookupError: where"),
    once_only: ("tensor", "the next try raises LookupError: tried before"),
    a_file: ("files", "file file is half written"),
    a_temporary_file: ("files", "file part is left behind"),
}


@pytest.mark.parametrize("operation", HALF, ids=lambda operation: operation.__name__)
def test_what_is_half_done_is_found(operation: Callable[[Scene], Any]) -> None:
    kind, told = HALF[operation]
    KEPT.clear()
    report = broken(operation, kind)
    KEPT.clear()
    assert report.found and any(told in each.wrong for each in report.found), report
    assert report.operation == operation.__name__ and operation.__name__ in str(report)


def whole(scene: Scene) -> None:
    assert scene.folder is not None
    write_text(scene.folder / "file", "a text")
    with Journal() as journal:
        journal.put(first(scene), "", "one", 1)
        journal.write(first(scene).weight, first(scene).weight + 1)
        journal.put(first(scene), "_parameters", "bias", nn.Parameter(torch.ones(6)))


def test_nothing_is_found_in_what_is_whole() -> None:
    report = inject_faults(whole, make, packages=[HERE])
    assert not report.found, report
    assert report.tried["tensor"] > 10 and report.tried["files"] > 20 and report.tried["line"] > 40
    assert report.points["line"] == report.tried["line"], "one error for each line"


def test_a_thread_that_ran_before_may_end_meanwhile() -> None:
    ends = [threading.Event() for _ in range(40)]
    threads = [threading.Thread(target=each.wait, args=(60.0,), daemon=True) for each in ends]
    for thread in threads:
        thread.start()

    def operation(scene: Scene) -> None:
        ends.pop().set()
        threads.pop().join()
        whole(scene)

    report = broken(operation, "tensor")
    for each in ends:
        each.set()
    assert not report.found and report.tried["tensor"] > 10, report


def ends_elsewhere(scene: Scene, note: bool) -> None:
    first(scene).one = 1
    try:
        torch.zeros(1).add(1)
    except BaseException as error:
        if note:
            error.add_note("one stays")
        raise
    first(scene).two = 2


@pytest.mark.parametrize("note", [True, False])
def test_a_further_end_is_right_where_a_note_says_so(note: bool) -> None:
    def operation(scene: Scene) -> None:
        ends_elsewhere(scene, note)

    def only_the_first(scene: Scene) -> None:
        first(scene).one = 1

    found = [broken(operation, "tensor", ends=ends).found for ends in ([only_the_first], [two_attributes])]
    assert bool(found[0]) is not note and found[1]


def test_a_share_is_drawn_by_the_seed_and_ends_in_time() -> None:
    all_of_it = inject_faults(whole, make)
    shares = [inject_faults(whole, make, every=4, seed=seed) for seed in (1, 1, 2)]
    for kind, tried in all_of_it.tried.items():
        assert all(each.tried[kind] == tried // 4 for each in shares)
    assert sum(inject_faults(whole, make, seconds=0).tried.values()) == 0


def test_a_scene_that_is_another_one_each_time_is_refused() -> None:
    count = iter(range(100))

    def drawn(folder: Path) -> Scene:
        made = make(folder)
        made.model.number = next(count)
        return made

    with pytest.raises(ValueError, match=r"differ at the model.number"):
        inject_faults(whole, drawn)


def test_a_fault_says_where() -> None:
    report = broken(two_tensors, "tensor")
    (fault, *_) = report.found
    assert str(fault).startswith("two_tensors: RuntimeError at test_faults.py:")
    assert "in two_tensors, aten.add_.Scalar" in str(fault) or "aten.add_" in str(fault)
    assert str(Point("here", 3)) == "here, pass 3" and str(Point("here", 1)) == "here"


def test_copies_are_compared_by_their_values_and_one_scene_by_its_objects(tmp_path: Path) -> None:
    one, other = make(tmp_path), make(tmp_path)
    before = snapshot(one)
    assert before.differences(snapshot(other)) == []
    assert "object at first.weight" in before.differences(snapshot(other), same_scene=True)
    with torch.no_grad():
        other.model.second.bias[0] += 1.0
    assert before.differences(snapshot(other)) == ["second.bias", "optimizer 0, parameter 3", "outputs"]


@pytest.mark.parametrize("name", [*CASES, *OUTSIDE])
def test_a_share_of_the_core(name: str) -> None:
    """All of them: ``make faults``."""
    case = {**CASES, **OUTSIDE}[name]
    report = inject_faults(
        case.operation,
        case.make,
        name=name,
        seed=SEED,
        every=100,
        leave=case.leave,
        ends=case.ends,
        often=1,
        seconds=2.0,
    )
    assert not report.found, report
