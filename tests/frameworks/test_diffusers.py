"""Adapted parts of diffusers pipelines: attention processors, offloading, casting by layers, fused projections."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.models import attention_processor
from host_zoo import AUTOENCODER, build
from torch import Tensor, nn

import peftcore
from peftcore.errors import InactiveSite, UnsupportedSite
from peftcore.testing.kit import fill

Sample = Callable[[nn.Module], Tensor]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """Stable Diffusion with tiny random parts; prompts come as embeddings."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 2}
    text = transformers.CLIPTextConfig(**sizes, num_attention_heads=4, max_position_embeddings=16)
    found = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**AUTOENCODER).eval(),
        text_encoder=transformers.CLIPTextModel(text).eval(),
        tokenizer=None,
        unet=build("sd15_unet")[0],
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    found.set_progress_bar_config(disable=True)
    return found


def sample(pipeline: Any, unet: nn.Module | None = None) -> Tensor:
    """Two steps from fixed noise."""
    if unet is not None:
        pipeline.register_modules(unet=unet)
    words = torch.randn(1, 7, 40, generator=torch.Generator().manual_seed(1))
    noise = torch.Generator().manual_seed(0)
    options = {"guidance_scale": 1.0, "num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}
    images: Tensor = pipeline(prompt_embeds=words, generator=noise, **options).images
    return images


@pytest.fixture
def unet() -> nn.Module:
    return build("sd15_unet")[0]


@pytest.mark.parametrize("method", ["lora", "oft", "locon", "houlsby_adapter"])
def test_a_pipeline_runs_with_an_adapted_part_and_any_processor(method: str, pipeline: Any, unet: Any) -> None:
    base = sample(pipeline, unet)
    injection = peftcore.apply(unet, method)
    fill(injection)
    adapted = sample(pipeline, unet)
    assert not torch.allclose(adapted, base, rtol=1e-2)
    for processor in (attention_processor.AttnProcessor(), attention_processor.AttnProcessor2_0()):
        unet.set_attn_processor(processor)
        torch.testing.assert_close(sample(pipeline, unet), adapted, rtol=1e-3, atol=1e-4)
    with injection.disabled():
        torch.testing.assert_close(sample(pipeline, unet), base, rtol=1e-3, atol=1e-4)


def test_offloading_of_whole_models_changes_nothing(pipeline: Any, unet: Any) -> None:
    fill(peftcore.apply(unet, "lora"))
    adapted = sample(pipeline, unet)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(sample(pipeline), adapted)
    pipeline.remove_all_hooks()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_casting_by_layers_is_that_of_the_host_alone(method: str, pipeline: Any, unet: Any) -> None:
    """The host's weights are kept in eight bits and computed with in 32; the adapter's are left alone."""
    rounded = deepcopy(unet)
    for model in (rounded, unet):
        fill(peftcore.apply(model, method))
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert all(parameter.dtype == torch.float32 for parameter in peftcore.injections(unet)[method].parameters())
    few = 0
    for mine, other in zip(rounded.parameters(), unet.parameters(), strict=True):
        few += other.dtype == torch.float8_e4m3fn
        mine.data.copy_(other.data.float())
    assert few
    torch.testing.assert_close(sample(pipeline, unet), sample(pipeline, rounded), rtol=1e-3, atol=1e-4)


def test_a_host_that_is_cast_by_layers_is_adapted_first(unet: Any) -> None:
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(UnsupportedSite, match="apply peftcore first"):
        peftcore.apply(unet, "lora")


def test_fusing_adapted_projections_is_refused_and_can_be_undone(pipeline: Any, unet: Any) -> None:
    """diffusers makes one matrix of three by reading their weights, so what wraps them would silently be left out."""
    injection = peftcore.apply(unet, "lora")
    fill(injection)
    adapted = sample(pipeline, unet)
    unet.fuse_qkv_projections()
    with pytest.raises(InactiveSite, match="fuse_qkv_projections"):
        sample(pipeline, unet)
    unet.unfuse_qkv_projections()
    torch.testing.assert_close(sample(pipeline, unet), adapted)
    injection.merge()
    unet.fuse_qkv_projections()
    torch.testing.assert_close(sample(pipeline, unet), adapted, rtol=1e-3, atol=1e-4)


def test_a_projection_fused_before_is_adapted_as_one(pipeline: Any, unet: Any) -> None:
    base = sample(pipeline, unet)
    unet.fuse_qkv_projections()
    torch.testing.assert_close(sample(pipeline, unet), base, rtol=1e-3, atol=1e-4)
    fill(peftcore.apply(unet, "lora", target=["to_qkv"]))
    assert not torch.allclose(sample(pipeline, unet), base, rtol=1e-2)
