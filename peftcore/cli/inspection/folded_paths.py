"""Combines paths that differ only in numbers into one pattern: ``layers.{0..23}.self_attn.q_proj``."""

from __future__ import annotations

from collections.abc import Iterable

Numbers = tuple[frozenset[int], ...]


def fold(paths: Iterable[str]) -> dict[str, list[str]]:
    """Return a mapping from patterns to the paths that each combines. Only path components that are numbers are
    combined, and a pattern never matches a path that is not in `paths`."""
    alike: dict[tuple[str, ...], dict[tuple[int, ...], str]] = {}
    for path in paths:
        steps = path.split(".")
        frame = tuple("" if step.isdecimal() else step for step in steps)
        alike.setdefault(frame, {})[tuple(int(step) for step in steps if step.isdecimal())] = path
    return {
        _written(frame, box): [path for numbers, path in found.items() if _inside(numbers, box)]
        for frame, found in alike.items()
        for box in _boxes(list(found))
    }


def _boxes(points: list[tuple[int, ...]]) -> list[Numbers]:
    """Return products of sets that together contain each point exactly once. Points are combined along one component
    after the other, starting with the last."""
    boxes: list[Numbers] = [tuple(frozenset({number}) for number in point) for point in points]
    for place in reversed(range(len(points[0]))):
        joined: dict[Numbers, frozenset[int]] = {}
        for box in boxes:
            rest = box[:place] + box[place + 1 :]
            joined[rest] = joined.get(rest, frozenset()) | box[place]
        boxes = [(*rest[:place], numbers, *rest[place:]) for rest, numbers in joined.items()]
    return boxes


def _inside(point: tuple[int, ...], box: Numbers) -> bool:
    return all(number in numbers for number, numbers in zip(point, box, strict=True))


def _written(frame: tuple[str, ...], box: Numbers) -> str:
    numbers = iter(box)
    return ".".join(step or spans(next(numbers)) for step in frame)


def spans(numbers: Iterable[int]) -> str:
    """Format numbers: ``3``, ``{0..23}``, ``{0,2,4..6}``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(_run(run) for run in runs)
    return text if text.isdecimal() else f"{{{text}}}"


def _run(run: list[int]) -> str:
    return f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run))
