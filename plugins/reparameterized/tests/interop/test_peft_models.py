"""Each type of peft on a model of transformers, both ways, with some layers chosen by number."""

from pathlib import Path
from typing import Any

import peft
import pytest
from peft_folders import assert_reads, assert_writes
from torch import nn

from peftcore.testing import HOSTS

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
TYPES: dict[str, tuple[type[peft.PeftConfig], dict[str, Any], dict[str, Any]]] = {
    "adalora": (peft.AdaLoraConfig, {"init_r": 4, "lora_alpha": 90, "total_step": 9}, {"rank": 4, "alpha": 90.0}),
    "adamss": (peft.AdamssConfig, {"r": 4, "num_subspaces": 3}, {"components": 4, "subspaces": 3}),
    "boft": (peft.BOFTConfig, {"boft_block_size": 4}, {"block_size": 4, "factors": 1}),
    "c3a": (peft.C3AConfig, {"block_size": 4, "init_weights": "gaussian"}, {"block_size": 4, "start": "gaussian"}),
    "deft": (peft.DeftConfig, {"r": 4}, {"rank": 4}),
    "delora": (peft.DeloraConfig, {"r": 4, "delora_lambda": 3}, {"rank": 4, "strength": 3.0}),
    "dora": (peft.LoraConfig, {"r": 4, "lora_alpha": 9, "use_dora": True}, {"rank": 4, "alpha": 9.0}),
    "fourierft": (peft.FourierFTConfig, {"n_frequency": 50, "scaling": 90.0}, {"n_frequency": 50, "alpha": 90.0}),
    "frod": (peft.FrodConfig, {"sparse_rate": 0.1, "progressbar": False}, {"sparsity": 0.1}),
    "gralora": (peft.GraloraConfig, {"r": 4, "alpha": 9}, {"rank": 4, "alpha": 9.0}),
    "hira": (peft.HiraConfig, {"r": 4, "init_weights": False}, {"rank": 4}),
    "hra": (peft.HRAConfig, {"r": 4}, {"rank": 4}),
    "lily": (peft.LilyConfig, {"r": 4}, {"rank": 4}),
    "loha": (peft.LoHaConfig, {"r": 4, "alpha": 90, "init_weights": False}, {"rank": 4, "alpha": 90.0}),
    "lokr": (peft.LoKrConfig, {"r": 1, "alpha": 9, "init_weights": False}, {"rank": 1, "alpha": 9.0}),
    "lora": (peft.LoraConfig, {"r": 4, "lora_alpha": 9}, {"rank": 4, "alpha": 9.0}),
    "monteclora": (
        peft.LoraConfig,
        {"r": 4, "lora_alpha": 9, "monteclora_config": peft.tuners.lora.MontecloraConfig(buffer_size=1)},
        {"rank": 4, "alpha": 9.0},
    ),
    "miss": (peft.MissConfig, {"r": 4}, {"rank": 4}),
    "oft": (peft.OFTConfig, {"oft_block_size": 4}, {"block_size": 4, "series": 5}),
    "olora": (peft.LoraConfig, {"r": 4, "init_lora_weights": "olora"}, {"rank": 4}),
    "peanut": (peft.PeanutConfig, {"r": 4, "depth": 1}, {"rank": 4, "depth": 1}),
    "pissa": (peft.LoraConfig, {"r": 4, "init_lora_weights": "pissa"}, {"rank": 4}),
    "pvera": (peft.PveraConfig, {"r": 8}, {"rank": 8}),
    "psoft": (peft.PsoftConfig, {"r": 8}, {"rank": 8}),
    "randlora": (peft.RandLoraConfig, {"r": 4, "randlora_alpha": 9}, {"rank": 4, "alpha": 9.0}),
    "tinylora": (peft.TinyLoraConfig, {"r": 4}, {"rank": 4}),
    "uni_lora": (
        peft.UniLoraConfig,
        {"r": 4, "theta_d_length": 50},
        {"rank": 4, "theta_length": 50, "theta_bound": 2.0},
    ),
    "vb_lora": (
        peft.VBLoRAConfig,
        {"r": 4, "num_vectors": 8, "vector_length": 8},
        {"rank": 4, "num_vectors": 8, "vector_length": 8, "bank_bound": 1.0},
    ),
    "vera": (peft.VeraConfig, {"r": 8}, {"rank": 8}),
    "waveft": (peft.WaveFTConfig, {"n_frequency": 50, "scaling": 90.0}, {"n_frequency": 50, "alpha": 90.0}),
}


def larger(model: nn.Module) -> None:
    """Products of small numbers would hardly move the outputs."""
    for name, parameter in model.named_parameters():
        if "hada" in name or "lily_B" in name or "tiny" in name or "hira" in name or "bank" in name or "theta" in name:
            parameter.data.mul_(3)


@pytest.mark.share(3)
@pytest.mark.parametrize("method", TYPES)
def test_a_model(method: str, tmp_path: Path) -> None:
    kind, theirs, ours = TYPES[method]
    model, inputs = HOSTS["llama"].build()
    config = kind(target_modules=["q_proj", "v_proj"], layers_to_transform=[1], task_type="CAUSAL_LM", **theirs)

    def run(adapted: nn.Module) -> Any:
        return adapted(**inputs).logits

    injection = assert_reads(model, config, run, tmp_path, larger)
    assert injection.method.name == method
    assert {graft.site.path.rpartition(".")[2] for graft in injection.grafts} == {"q_proj", "v_proj"}
    assert len(injection.grafts) == 2
    assert_writes(model, method, {"target": ["attn.q", "attn.v"], **ours}, run, tmp_path)
