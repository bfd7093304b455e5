"""Every whole number and every list among the options of every installed method, made huge in a real file.

Run as a script in a process of its own, with the folder to work in: the memory that the process may have is limited.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hostile_files import Bench, KitCase, assembled, parsed, write

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.testing import NotApplicable
from peftcore.testing.hosts import ALL_HOSTS
from peftcore.testing.kit import fill

OPTIONS: dict[str, dict[str, Any]] = {
    "adamix": {"bottleneck": 4, "experts": 2},
    "aim": {"frames": 2},
    "adapterdrop": {"drop_first_layers": 1},
    "attempt": {"parts": [{"method": "prompt_tuning", "length": 3}] * 2, "tasks": 3},
    "boft": {"block_size": 4},
    "c3a": {"block_size": 2},
    "cartridge": {"length": 3},
    "clip_adapter": {"features": "input"},
    "ciat": {"reduction": 4},
    "coda": {"reduction": 1.5, "bottleneck": 4},
    "cocoop": {"length": 2, "init_ids": [3, 4], "reduction": 4},
    "compacter": {"bottleneck": 4},
    "config_union": {"parts": [{"method": "lora", "rank": 2}, {"method": "houlsby_adapter", "bottleneck": 4}]},
    "controlnet": {"widths": [4, 6]},
    "controlnext": {"widths": [8, 8, 16]},
    "controlnet_lora": {"widths": [4, 6], "rank": 2},
    "controlnet_xs": {"ratio": 0.5, "widths": [4, 6]},
    "coop": {"init_ids": [3, 4, 5]},
    "cpt": {"ids": [5, 9, 3, 7, 11, 2, 8, 4, 6], "types": [1, 2, 3, 4, 4, 5, 6, 7, 8]},
    "custom_diffusion": {"modifier_tokens": [3]},
    "dyt": {"complete": 0.0, "bottleneck": 4},
    "ed_lora": {"class_tokens": [3]},
    "evp": {"reduction": 2},
    "fourierft": {"n_frequency": 20},
    "hra": {"rank": 4},
    "hyperformer_pp": {"tasks": 3},
    "hypernetwork_a1111": {"structure": [1.0, 1.5, 1.0]},
    "ir_qlora": {"rank": 2},
    "k_adapter": {"layers": [0, 1], "width": 8, "heads": 4},
    "kadaptation": {"products": 4},
    "lora_xs": {"rank": 2, "iterations": 2},
    "lst": {"reduction": 2},
    "loramoe": {"experts": 2, "rank": 2},
    "maple": {"depth": 2, "init_ids": [3, 4]},
    "mixlora": {"experts": 2, "rank": 2},
    "moelora": {"experts": 2, "rank": 2, "tasks": 3},
    "mola": {"experts": 3, "rank": 2},
    "molora_moe": {"experts": 2, "rank": 2},
    "mov": {"experts": 3, "head": 8},
    "mtl_lora": {"tasks": 3, "dropout": 0.0},
    "multitask_prompt_tuning": {"tasks": 3, "length": 4, "init": "vocabulary", "init_ids": [1, 2]},
    "oft": {"block_size": 4},
    "pal": {"tasks": 3, "width": 6, "heads": 2},
    "peqa": {"bits": 2},
    "pixel_vp": {"size": 1, "picture": (8, 8)},
    "perfusion": {"tokens": [3], "initializer": 4},
    "pissa": {"rank": 2, "iterations": 2},
    "polyhistor": {"tasks": 3},
    "polytropon": {"tasks": 3, "own_skills": 1},
    "prompt_tuning": {"length": 4, "init": "vocabulary", "init_ids": [1, 2]},
    "propetl": {"bottleneck": 4},
    "qa_lora": {"group_size": 2, "scheme_options": {"group_size": 2}, "rank": 2},
    "shira": {"rank": 2},
    "sparse_adapter": {"bottleneck": 4},
    "st_adapter": {"frames": 2},
    "state_offset_tuning": {"rank": 2},
    "t2i_adapter": {"downscale": 2},
    "textual_inversion": {"tokens": [3]},
    "tiny_attention_adapter": {"width": 4, "heads": 2, "modules": 2},
    "tip_adapter": {"features": "input", "passes": 1},
    "trainable_tokens": {"token_indices": [3, 5]},
    "waveft": {"n_frequency": 20},
    "xlora": {"depth": 2, "width": 4},
    "xti": {"tokens": [3]},
}
"""What methods need to fit hosts as small as these."""
NUMBERS = (10**9, 2**62, 2**63 - 1, 10**5)
LISTS: tuple[Any, ...] = ([1] * 300_000, ["a"] * 300_000, [{"method": "lora"}] * 50_000, [10**9], list(range(300_000)))
MEMORY = 2**31
"""Bytes beyond what the process has at the start."""
GROWTH = 700
"""Mebibytes by which it may really grow: a host of its own size, 256 of what is drawn from seeds, and the file."""


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key), inside
        if isinstance(inside, dict | list):
            yield from _places(inside, (*path, key))


def _put(config: Any, path: tuple[Any, ...], value: Any) -> Any:
    config = json.loads(json.dumps(config))
    *above, key = path
    holder = config
    for step in above:
        holder = holder[step]
    holder[key] = value
    return config


def _saved(name: str, folder: Path) -> Bench | None:
    """Save an adapter of the method on the first host that has a place for it."""
    for host in ALL_HOSTS.values():
        case = KitCase(peftcore.method(name), host, OPTIONS.get(name, {}))
        try:
            model, _ = case.fresh()
            injection = case.apply(model)
        except (PeftcoreError, NotApplicable):
            continue
        fill(injection)
        injection.save(folder)
        return Bench(case)
    return None


def _huge(name: str, config: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    schema = peftcore.method(name).Config.model_json_schema()["properties"]
    for path, value in _places(config):
        kinds = json.dumps(schema.get(path[0], {})) if len(path) == 1 else ""
        if (isinstance(value, int) and not isinstance(value, bool)) or '"integer"' in kinds:
            yield from ((path, number) for number in NUMBERS)
        if isinstance(value, list) or '"array"' in kinds:
            yield from ((path, each) for each in LISTS)


def main(folder: Path) -> int:
    """Try them all.

    Returns:
        How many were wrong.
    """
    wrong = tried = 0
    for info in peftcore.methods():
        bench = _saved(info.name, folder / "good")
        if bench is None:
            print(f"{info.name} fits no host here")
            wrong += 1
            continue
        files = {each.name: each.read_bytes() for each in (folder / "good").iterdir()}
        envelope = json.loads(files["adapter.json"])
        header, values = parsed(files["adapter.safetensors"])
        for path, value in _huge(info.name, envelope["config"]):
            text = json.dumps({**envelope, "config": _put(envelope["config"], path, value)})
            file = assembled(json.dumps({**header, "__metadata__": {"peftcore": text}}).encode(), values)
            write({"adapter.safetensors": file}, folder / "bad")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            what = f"{info.name}: {'.'.join(map(str, path))} = {str(value)[:40]}"
            try:
                bench.attempt(folder / "bad")
            except (Exception, MemoryError) as error:
                print(f"{what}: {type(error).__name__}: {str(error)[:300]}")
                wrong += 1
                bench = Bench(bench.case)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
            if grown > GROWTH:
                print(f"{what}: {grown} MiB")
                wrong += 1
            tried += 1
    print(f"{tried} files, {wrong} wrong")
    return wrong


if __name__ == "__main__":
    sizes = Path("/proc/self/statm").read_text().split()
    limit = int(sizes[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.exit(min(main(Path(sys.argv[1])), 1))
