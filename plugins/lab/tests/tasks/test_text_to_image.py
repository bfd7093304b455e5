"""Pictures by their names: what denoisers are told and scored by, held against the pipelines' own drawing and against
the equations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

import diffusers
import numpy as np
from painters import MADE, WIDTH, saved
from PIL import Image
from sklearn.datasets import load_digits

import peftcore
from peftcore.errors import BadInput
from peftcore_lab.comparisons.comparison import Candidate
from peftcore_lab.runs.reading import read, validated
from peftcore_lab.runs.run import Run
from peftcore_lab.searching.budget import Planner
from peftcore_lab.tasks._noising import Diffusion, Flow
from peftcore_lab.tasks._painters import Painter, kinds
from peftcore_lab.tasks.task import Prepared
from peftcore_lab.tasks.task_catalogue import find
from peftcore_lab.tasks.text_to_image import CaptionedData
from peftcore_lab.training.train import adapted

SIDE = 16


def painter_of(kind: str) -> Painter:
    torch.manual_seed(0)
    pipeline = MADE[kind]()
    pipeline.set_progress_bar_config(disable=True)
    painter = kinds()[type(pipeline)](pipeline, guidance=3.5)
    for encoder in painter.encoders:
        encoder.eval()  # as pipelines are that come from files
    return painter


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Twelve zeros and ones with what they are called, and the edges of each."""
    found = load_digits()
    folder, rows = tmp_path / "digits", []
    (folder / "edges").mkdir(parents=True)
    for number in [at for at, digit in enumerate(found.target) if digit < 2][:12]:
        pixels = np.kron(found.images[number] * 15, np.ones((3, 4))).astype("uint8")  # 24 x 32
        Image.fromarray(pixels).save(folder / f"{number}.png")
        edges = np.abs(np.diff(pixels.astype(int), axis=0, prepend=0)).clip(0, 255).astype("uint8")
        Image.fromarray(edges).save(folder / "edges" / f"{number}.png")
        rows.append(f"{number}.png,{('zero', 'one')[found.target[number]]},edges/{number}.png")
    (folder / "metadata.csv").write_text("\n".join(["file_name,text,edges_file_name", *rows]), encoding="utf-8")
    return folder


@pytest.fixture
def prepare(digits: Path, tmp_path: Path) -> Any:
    def made(kind: str = "stable-diffusion", method: str = "lora", **data: Any) -> tuple[Run, Prepared]:
        folder = tmp_path / kind
        if not folder.exists():
            saved(kind, folder)
        data = {"train": str(digits), "size": SIDE, "prompt_steps": 2, **data}
        given = [("model", str(folder)), ("task", "text-to-image"), ("data.train", str(digits)), ("method", method)]
        run = read(Run, {}, [*given, ("out", str(tmp_path / "run"))])
        return run, find("text-to-image").prepare(run, validated(CaptionedData, data, "data"))

    return made


@pytest.mark.parametrize("kind", MADE)
def test_a_denoiser_is_told_what_the_pipeline_tells_it(kind: str) -> None:
    """When it draws a square picture, of which all is seen."""
    painter = painter_of(kind)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((args, kwargs, output[0]))

    handle = painter.denoiser.register_forward_hook(note, with_kwargs=True)
    distilled = {"guidance_scale": 3.5 if kind == "flux" else 1.0}
    painter.pipeline("zero one", height=SIDE, width=SIDE, num_inference_steps=2, **distilled)
    handle.remove()
    args, kwargs, said = calls[-1]
    noisy, times = args if args else (kwargs["hidden_states"], kwargs["timestep"])
    if kind == "flux":
        noisy, said = (
            painter.pipeline._unpack_latents(each, SIDE, SIDE, painter.pipeline.vae_scale_factor)
            for each in (noisy, said)
        )
        times = times * 1000
    sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]])
    with torch.no_grad():
        ours = painter.denoise(noisy, times.reshape(1), painter.words(["zero one"], sizes))
        other = painter.denoise(noisy, times.reshape(1), painter.words(["one"], sizes))
    torch.testing.assert_close(ours, said)
    assert (other - said).abs().max() > 1e-6


@pytest.mark.parametrize("kind", MADE)
def test_latents_are_those_that_the_pipeline_reads(kind: str) -> None:
    painter, pictures = painter_of(kind), torch.randn(2, 3, SIDE, SIDE)
    vae = painter.pipeline.vae
    with torch.no_grad():
        latents = painter.latents(pictures, torch.Generator().manual_seed(1))
        plain = vae.encode(pictures).latent_dist.sample(torch.Generator().manual_seed(1))
    # As the pipelines undo it before they decode.
    undone = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    torch.testing.assert_close(undone, plain)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("bound", [0.5, 5.0])
def test_with_min_snr_all_predictions_are_errors_of_the_same_picture(kind: str, bound: float) -> None:
    """In float64: whatever is predicted is an x, whose squared error counts min(SNR, bound)."""
    scheduler = diffusers.DDIMScheduler(prediction_type=kind)
    noising = Diffusion(scheduler, bound)
    latents = torch.randn(64, 2, 3, 3, dtype=torch.float64)
    noised = noising.over(latents, None)
    wrong = noised.target + 0.1 * torch.randn_like(latents)
    kept = scheduler.alphas_cumprod.double()[noised.times].reshape(-1, 1, 1, 1)
    x = {
        "epsilon": (noised.latents - (1 - kept).sqrt() * wrong) / kept.sqrt(),
        "v_prediction": kept.sqrt() * noised.latents - (1 - kept).sqrt() * wrong,
        "sample": wrong,
    }[kind]
    ratio = (kept / (1 - kept)).flatten()
    wanted = ratio.clamp(max=bound) * (x - latents).square().flatten(1).sum(1)
    ours = noised.weight * (wrong - noised.target).square().flatten(1).sum(1)
    torch.testing.assert_close(ours, wanted, rtol=2e-4, atol=1e-9)  # diffusers adds noise in float32


def test_min_snr_where_nothing_but_noise_is_left() -> None:
    scheduler = diffusers.DDIMScheduler(prediction_type="epsilon", rescale_betas_zero_snr=True)
    noising = Diffusion(scheduler, 5.0)
    weight = noising._weight(torch.arange(1000))
    assert torch.isfinite(weight).all() and weight[-1] == 1


def test_a_flow_leads_back_to_the_picture() -> None:
    noising = Flow(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    latents = torch.randn(64, 2, 3, 3, dtype=torch.float64)
    noised = noising.over(latents, None)
    share = (noised.times / 1000).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(noised.latents - share * noised.target, latents, rtol=1e-5, atol=1e-5)
    assert 0.4 < share.mean() < 0.9 and share.std() > 0.1
    with pytest.raises(BadInput, match="is a flow model"):
        Flow(diffusers.FlowMatchEulerDiscreteScheduler(), 5.0)


def test_sampling_does_not_move_the_noise_of_training() -> None:
    painter = painter_of("stable-diffusion-3")
    noising = painter.noise(None)
    before = noising.over(torch.ones(4, 4, 8, 8), torch.Generator().manual_seed(0)).times
    painter.pipeline("one", height=SIDE, width=SIDE, num_inference_steps=2)
    assert torch.equal(noising.over(torch.ones(4, 4, 8, 8), torch.Generator().manual_seed(0)).times, before)


@pytest.mark.parametrize("kind", MADE)
def test_the_adapter_alone_learns(prepare: Any, kind: str) -> None:
    run, prepared = prepare(kind)
    adapter = adapted(run, prepared)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.1)
    batch = prepared.collate([prepared.train[at] for at in range(3)])
    prepared.model.train()
    prepared.model(**batch)["loss"].backward()
    reached = [parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters()]
    assert sum(reached) > len(reached) / 2
    assert all(each.grad is None for each in prepared.model.vae.parameters())
    assert {each.training for each in (prepared.model.vae, *prepared.model.encoders)} == {False}


def test_a_picture_is_cut_in_its_middle_and_says_so(prepare: Any) -> None:
    _, prepared = prepare()
    batch = prepared.collate([prepared.train[0]])
    image = prepared.train[0]["image"].convert("RGB")
    assert batch["sizes"].tolist() == [[24, 32, 0, 2, SIDE, SIDE]]  # 16 x 21 after scaling
    scaled = np.asarray(image.resize((21, 16), Image.Resampling.BILINEAR), dtype=float)[:, 2:18] / 127.5 - 1
    assert np.abs(batch["pixel_values"][0].permute(1, 2, 0).numpy() - scaled).max() < 0.05


def test_pictures_of_the_class_count_as_much_as_they_should(prepare: Any, tmp_path: Path) -> None:
    prior = tmp_path / "prior"
    options = {"prior": str(prior), "prior_text": "zero", "prior_images": 3, "prior_weight": 0.25}
    _, prepared = prepare(**options)
    assert prepared.first is not None and prepared.first.steps == 3
    ticks: list[int] = []
    prepared.first.do(lambda: ticks.append(1))
    assert len(ticks) == 3 and sorted(file.name for file in prior.iterdir()) == ["0.png", "1.png", "2.png"]
    rows = [prepared.train[at] for at in (1, 11)]
    batch = prepared.collate(rows)
    assert batch["texts"][2:] == ["zero", "zero"] and len(batch["pixel_values"]) == 4
    drawn = np.asarray(Image.open(prior / "1.png").convert("RGB"), dtype=float) / 127.5 - 1
    assert np.abs(batch["pixel_values"][2].permute(1, 2, 0).numpy() - drawn).max() < 1e-6
    prepared.model.eval()  # the same noise each time
    with torch.no_grad():
        whole = prepared.model(**batch)["loss"]
        parts = [prepared.model(**{**batch, "weight": torch.eye(4)[row]})["loss"] for row in range(4)]
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2 + 0.25 * (parts[2] + parts[3]) / 2)
    (prior / "1.png").unlink()
    _, again = prepare(**options)
    assert again.first is not None and again.first.steps == 1
    with pytest.raises(BadInput, match=r"prior .a folder of pictures. and prior_text"):
        prepare(prior=str(prior))


def test_a_method_is_told_the_condition(prepare: Any) -> None:
    _, prepared = prepare(method="controlnet", condition="edges", prompts=["zero"], size=SIDE)
    widths = {"channels": 3, "widths": [8, 16]}
    peftcore.apply(prepared.model.denoiser, "controlnet", **widths)
    for parameter in prepared.model.denoiser.parameters():
        with torch.no_grad():
            parameter.normal_(std=0.1)
    batch = prepared.collate([prepared.train[at] for at in range(2)])
    assert batch["condition"].shape == (2, 3, SIDE, SIDE) and 0 <= batch["condition"].min() < batch["condition"].max()
    prepared.model.eval()
    with torch.no_grad():
        one, same = (prepared.model(**batch)["loss"] for _ in range(2))
        other = prepared.model(**{**batch, "condition": 1 - batch["condition"]})["loss"]
    assert one == same and one != other


def test_new_words_are_learned_by_their_vectors(prepare: Any, tmp_path: Path) -> None:
    """Which are all that a text encoder's adapter has; the tokenizer is kept with them."""
    run, prepared = prepare(method="textual_inversion", part="text_encoder", words=["<leaning>"])
    adapter = adapted(run, prepared)
    tokenizer = MADE["stable-diffusion"]().tokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    assert len(tokenizer("<leaning>", add_special_tokens=False).input_ids) == 1
    batch = prepared.collate([prepared.train[0]])
    prepared.model.train()
    (vectors,) = adapter.parameters()
    for text, reached in (("zero", False), ("<leaning> zero", True)):
        vectors.grad = None
        prepared.model(**{**batch, "texts": [text]})["loss"].backward()
        assert bool(vectors.grad is not None and vectors.grad.any()) == reached
    with pytest.raises(BadInput, match="has 'ze' already"):
        prepare(part="text_encoder", words=["ze"])
    with pytest.raises(BadInput, match="remove part=text_encoder"):
        prepare(part="text_encoder", words=["<leaning>"], words_rate=1e-3)


@pytest.mark.parametrize("kind", MADE)
def test_words_learn_beside_the_denoiser_as_rows_of_plain_tables_would(prepare: Any, kind: str) -> None:
    """Pivotal tuning: the same loss, and of all text encoders the same gradient, as with tokens added by hand to an
    unadapted pipeline whose tables train whole."""
    words = ["<s0>", "<s1>"]
    _, plain = prepare(kind, part="text_encoder")
    run, ours = prepare(kind, words=words, words_from="zero")
    adapter = adapted(run, ours)
    readers = plain.model._painter.readers
    assert [each.name for each in ours.beside] == [f"text_encoder{number}" for number in readers]
    batch = ours.collate([ours.train[at] for at in (0, 1)])
    batch["texts"] = ["<s1> zero", "<s0> one"]
    tables = {}
    for number, beside in zip(readers, ours.beside, strict=True):
        encoder, tokenizer = readers[number].encoder, readers[number].tokenizer
        rows = encoder.get_input_embeddings().weight.detach()
        assert tokenizer.add_tokens(words) == 2
        ids = tokenizer.convert_tokens_to_ids(words)
        encoder.resize_token_embeddings(max(len(tokenizer), len(rows)))
        table = encoder.get_input_embeddings().weight
        with torch.no_grad():
            assert torch.equal(table[: ids[0]], rows[: ids[0]])
            start = rows[tokenizer("zero", add_special_tokens=False).input_ids].mean(0)
            (new,) = beside.injection.parameters()
            torch.testing.assert_close(new.detach(), start.expand(2, -1))
            new += 0.1 * torch.randn_like(new)
            table[ids] = new
        held = beside.part.get_input_embeddings().weight
        assert torch.equal(held[: ids[0]], rows[: ids[0]]) and len(held) >= len(rows)
        tables[number] = (table.requires_grad_(), ids)
    losses = []
    for model in (plain.model, ours.model):
        model.eval()  # the same noise each time
        losses.append(model(**batch)["loss"])
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0])
    for (table, ids), beside in zip(tables.values(), ours.beside, strict=True):
        (vectors,) = beside.injection.parameters()
        assert table.grad[ids].abs().sum(1).gt(0).all()
        torch.testing.assert_close(vectors.grad, table.grad[ids], rtol=1e-4, atol=1e-7)
        assert not any(each.requires_grad for each in beside.part.parameters() if each is not vectors)
    assert any(each.grad is not None and each.grad.any() for each in adapter.parameters())


def test_a_search_counts_what_learns_beside(prepare: Any) -> None:
    """The words of both encoders."""
    run, prepared = prepare("stable-diffusion-xl", words=["<s0>"])
    adapter = adapted(run, prepared)
    trained = sum(each.numel() for each in prepared.model.parameters() if each.requires_grad)
    assert trained == adapter.summary().trainable + 2 * WIDTH
    _, prepared = prepare("stable-diffusion-xl", words=["<s0>"])
    assert Planner(prepared, 2, False).needs(Candidate(name="lora")).trainable == trained


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"words": ["ze"]}, "has 'ze' already"),
        ({"words": ["<s0>"], "words_from": " "}, "no tokens for ' '"),
        ({"words_from": "zero"}, "set words too"),
        ({"words": ["<s0>"], "words_until": 0.0}, "words_until"),
    ],
)
def test_words_that_cannot_be_learned(prepare: Any, data: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        prepare(**data)


def test_methods_look_at_batches_of_the_whole(prepare: Any) -> None:
    """EVA's directions are those of what its layers are given in the pipeline."""
    run, prepared = prepare(method="eva")
    assert adapted(run, prepared).summary().sites > 4


def test_other_pipelines_are_refused_by_name(prepare: Any, tmp_path: Path) -> None:
    prepare()
    index = tmp_path / "stable-diffusion" / "model_index.json"
    document = json.loads(index.read_text(encoding="utf-8"))
    index.write_text(json.dumps({**document, "_class_name": "StableDiffusionImg2ImgPipeline"}), encoding="utf-8")
    with pytest.raises(BadInput, match=r"is a StableDiffusionImg2ImgPipeline; this task trains"):
        prepare()
