"""What a MODEL names, by how it is written and what is there."""

from pathlib import Path
from typing import Any

import pytest
from named_models import HUB, cached, made_names, names
from typer.testing import CliRunner

from peftcore.errors import BadInput
from peftcore.models.model_names import Named, Use, find

__all__ = ["made_names", "names"]


def test_each_kind(names: Any) -> None:
    folder, file = Path(names["folder"]), Path(names["gguf"])
    local: dict[str, Any] = {"local_files_only": True}
    assert find(names["folder"]).origin() == find(folder).origin() == (str(folder), local)
    in_package = folder.parent / "installed" / "holds_tiny" / "model"
    assert find(names["package"]).origin() == (str(in_package), local)
    of_file = (str(file.parent), {**local, "gguf_file": file.name})
    assert find(names["gguf"]).origin() == find(names["gguf-folder"]).origin() == of_file
    assert find(HUB).origin() == (HUB, {})
    assert find("timm:test_vit").origin() == ("timm/test_vit.r160_in1k", {})
    snapshots = folder.parent / "hub" / "models--someone--tiny" / "snapshots"
    assert find(HUB).place() == snapshots / ("0" * 40)
    assert find(names["timm"]).place() == find(names["timm-hub"]).place()
    assert find(names["gguf-folder"]).local() == (file,) and find(HUB).local() == ()


def test_a_folder_counts_before_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("someone/tiny").mkdir(parents=True)
    Path("someone/tiny/config.json").write_text("{}")
    assert find(HUB).place() == Path("someone/tiny")


def test_a_folder_around_a_model_says_which_one_to_name(names: Any, tmp_path: Path) -> None:
    package = names["package"].removesuffix("/model")
    with pytest.raises(BadInput, match=f"{package}: contains no model, but {package}/model does"):
        find(package)
    with pytest.raises(BadInput, match=r"contains no model; a model is a folder with config\.json or a GGUF file"):
        find(tmp_path)


def test_a_folder_of_several_files_wants_one_of_them(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(BadInput, match=r"pass one of these files: a\.gguf, b\.gguf"):
        find(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")  # then it is a folder of transformers that has them besides
    assert find(str(tmp_path)).place() == tmp_path


@pytest.mark.parametrize("name", ["no/such/folder", "/none", "none.gguf", "../x", "a b"])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(BadInput, match="no such folder; a model is a folder"):
        find(name)


def test_a_path_is_never_a_name_on_the_hub() -> None:
    with pytest.raises(BadInput, match="no such folder"):
        find(Path(HUB))


def test_architectures_of_timm_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("timm:test_vit").configured().config == {"architecture": "test_vit"}
    with pytest.raises(BadInput, match="Invalid pretrained tag"):
        find("timm:test_vit.nope").origin()
    monkeypatch.setattr("timm.get_pretrained_cfg", lambda name: None)
    with pytest.raises(BadInput, match="timm has no weights for it on the Hub"):
        find("timm:test_vit").origin()


def test_only_what_is_wanted_is_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a configuration no weights; of a pipeline those of its parts, of a model its own; never a pickle."""
    asked: list[Any] = []

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str] | None) -> str:
        asked.append((name, allow_patterns, ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    settings = ["*.json", "*.txt", "*.model", "*.jinja"]
    found = find(HUB).configured()
    assert (found.name, found.folder, asked.pop()) == (HUB, tmp_path, (HUB, settings, None))
    find(HUB).place()
    assert asked.pop() == (HUB, [*settings, "*.safetensors"], ["*/*.safetensors"])
    (tmp_path / "model_index.json").write_text("{}")
    find(HUB).place()
    assert asked.pop() == (HUB, [*settings, "*/*.safetensors"], None)


@pytest.mark.parametrize("use", Use)
def test_uses_that_kinds_refuse(use: Use, names: Any) -> None:
    def refuses(named: Named) -> bool:
        try:
            named.check(use)
        except BadInput as error:
            assert "name" in str(error) or "merge into" in str(error)
            return True
        return False

    found = {kind for kind in names if refuses(find(names[kind]))}
    gguf, timm = {"gguf", "gguf-folder"}, {"timm"}
    expected = {Use.TEXT: timm, Use.PICTURES: gguf, Use.PIPELINE: gguf | timm, Use.MERGE: gguf}
    assert found == expected[use]


@pytest.mark.slow
def test_a_pipeline_on_the_hub_is_planned_by_its_denoiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from looking import folder_of

    from peftcore.cli.commands import app

    folder_of("unet", tmp_path / "pipe")
    (tmp_path / "pipe" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    cached(tmp_path / "pipe", "someone/pipe", tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    result = CliRunner().invoke(app, ["plan", "someone/pipe", "lora"])
    assert result.exit_code == 0 and "lora on UNet2DConditionModel (diffusers, float32)" in result.stdout
    assert "\nsomeone/pipe\n" in "\n".join(line.strip() for line in result.stdout.splitlines())
