"""Reparameterized methods of peftcore: low-rank and other structured updates of frozen weights."""

from collections.abc import Mapping

from peftcore.author import Preset, hookimpl
from peftcore_reparameterized._presets import PRESETS

PEFTCORE_API = 2


@hookimpl
def peftcore_methods() -> Mapping[str, str]:
    """Map the names of this plugin's methods to their import paths."""
    return {
        "adalora": "peftcore_reparameterized.adalora:AdaLoRA",
        "adamss": "peftcore_reparameterized.adamss:AdaMSS",
        "alora": "peftcore_reparameterized.alora:ALoRA",
        "bd_lora": "peftcore_reparameterized.bd_lora:BDLoRA",
        "boft": "peftcore_reparameterized.boft:BOFT",
        "c3a": "peftcore_reparameterized.c3a:C3A",
        "corda": "peftcore_reparameterized.corda:CorDA",
        "deft": "peftcore_reparameterized.deft:DEFT",
        "delora": "peftcore_reparameterized.delora:DeLoRA",
        "dora": "peftcore_reparameterized.dora:DoRA",
        "dylora": "peftcore_reparameterized.dylora:DyLoRA",
        "eva": "peftcore_reparameterized.eva:EVA",
        "fourierft": "peftcore_reparameterized.fourierft:FourierFT",
        "frod": "peftcore_reparameterized.frod:FRoD",
        "galore": "peftcore_reparameterized.galore:GaLore",
        "gralora": "peftcore_reparameterized.gralora:GraLoRA",
        "hira": "peftcore_reparameterized.hira:HiRA",
        "hra": "peftcore_reparameterized.hra:HRA",
        "kasa": "peftcore_reparameterized.kasa:KaSA",
        "lily": "peftcore_reparameterized.lily:Lily",
        "loha": "peftcore_reparameterized.loha:LoHa",
        "lokr": "peftcore_reparameterized.lokr:LoKr",
        "longlora": "peftcore_reparameterized.longlora:LongLoRA",
        "lora": "peftcore_reparameterized.lora:LoRA",
        "lora_ga": "peftcore_reparameterized.lora_ga:LoRAGA",
        "lora_one": "peftcore_reparameterized.lora_one:LoRAOne",
        "lora_plus": "peftcore_reparameterized.lora_plus:LoRAPlus",
        "lora_xs": "peftcore_reparameterized.lora_xs:LoRAXS",
        "mica": "peftcore_reparameterized.mica:MiCA",
        "miss": "peftcore_reparameterized.miss:MiSS",
        "monteclora": "peftcore_reparameterized.monteclora:MonteCLoRA",
        "oft": "peftcore_reparameterized.oft:OFT",
        "olora": "peftcore_reparameterized.olora:OLoRA",
        "osf": "peftcore_reparameterized.osf:OSF",
        "peanut": "peftcore_reparameterized.peanut:PEANuT",
        "pissa": "peftcore_reparameterized.pissa:PiSSA",
        "psoft": "peftcore_reparameterized.psoft:PSOFT",
        "pvera": "peftcore_reparameterized.pvera:PVeRA",
        "randlora": "peftcore_reparameterized.randlora:RandLoRA",
        "road": "peftcore_reparameterized.road:RoAd",
        "tinylora": "peftcore_reparameterized.tinylora:TinyLoRA",
        "uni_lora": "peftcore_reparameterized.uni_lora:UniLoRA",
        "vb_lora": "peftcore_reparameterized.vb_lora:VBLoRA",
        "velora": "peftcore_reparameterized.velora:VeLoRA",
        "vera": "peftcore_reparameterized.vera:VeRA",
        "waveft": "peftcore_reparameterized.waveft:WaveFT",
    }


@hookimpl
def peftcore_presets() -> Mapping[str, Preset]:
    """Map the names of presets to a method and its options."""
    return PRESETS


@hookimpl
def peftcore_translations() -> Mapping[str, str]:
    """Map other libraries' adapter formats to the import paths of their translations for this plugin's methods."""
    here = "peftcore_reparameterized.interop"
    return {
        "adapterhub/lora": f"{here}.adapterhub_lora:HubLoRA",
        "kohya/boft": f"{here}.kohya_oft:KohyaBOFT",
        "kohya/dora": f"{here}.kohya_lora:KohyaDoRA",
        "kohya/loha": f"{here}.kohya_loha:KohyaLoHa",
        "kohya/lokr": f"{here}.kohya_lokr:KohyaLoKr",
        "kohya/lora": f"{here}.kohya_lora:KohyaLoRA",
        "kohya/oft": f"{here}.kohya_oft:KohyaOFT",
        "kohya/tlora": f"{here}.kohya_tlora:KohyaTLoRA",
        "peft/ADALORA": f"{here}.peft_adalora:PeftAdaLoRA",
        "peft/ADAMSS": f"{here}.peft_adamss:PeftAdaMSS",
        "peft/BOFT": f"{here}.peft_boft:PeftBOFT",
        "peft/C3A": f"{here}.peft_c3a:PeftC3A",
        "peft/DEFT": f"{here}.peft_deft:PeftDEFT",
        "peft/DELORA": f"{here}.peft_delora:PeftDeLoRA",
        "peft/FOURIERFT": f"{here}.peft_fourierft:PeftFourierFT",
        "peft/FROD": f"{here}.peft_frod:PeftFRoD",
        "peft/GRALORA": f"{here}.peft_gralora:PeftGraLoRA",
        "peft/HIRA": f"{here}.peft_hira:PeftHiRA",
        "peft/HRA": f"{here}.peft_hra:PeftHRA",
        "peft/LILY": f"{here}.peft_lily:PeftLily",
        "peft/LOHA": f"{here}.peft_loha:PeftLoHa",
        "peft/LOKR": f"{here}.peft_lokr:PeftLoKr",
        "peft/LORA": f"{here}.peft_lora.translation:PeftLoRA",
        "peft/MISS": f"{here}.peft_miss:PeftMiSS",
        "peft/OFT": f"{here}.peft_oft:PeftOFT",
        "peft/OSF": f"{here}.peft_osf:PeftOSF",
        "peft/PEANUT": f"{here}.peft_peanut:PeftPEANuT",
        "peft/PSOFT": f"{here}.peft_psoft:PeftPSOFT",
        "peft/PVERA": f"{here}.peft_pvera:PeftPVeRA",
        "peft/RANDLORA": f"{here}.peft_randlora:PeftRandLoRA",
        "peft/ROAD": f"{here}.peft_road:PeftRoAd",
        "peft/TINYLORA": f"{here}.peft_tinylora:PeftTinyLoRA",
        "peft/UNILORA": f"{here}.peft_unilora:PeftUniLoRA",
        "peft/VBLORA": f"{here}.peft_vblora:PeftVBLoRA",
        "peft/VERA": f"{here}.peft_vera:PeftVeRA",
        "peft/WAVEFT": f"{here}.peft_waveft:PeftWaveFT",
    }
