"""A tiny model and adapters of every kind, as PEFT wrote them, with PEFT's own answers: for tests of
runners."""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from engine.packing import ResidentAdapter
from engine.weights import LoadedModel, load_model
from tests.engine_driver import Driver
from tests.tiny_models import VOCAB, save_random

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, object]] = {
    "r4": {"r": 4, "lora_alpha": 4, "target_modules": ALL},
    "r8-alpha-32": {"r": 8, "lora_alpha": 32, "target_modules": ALL},
    "r8-again": {"r": 8, "lora_alpha": 32, "target_modules": ALL},
    "r16-q-v": {"r": 16, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "r16-rslora": {"r": 16, "lora_alpha": 16, "use_rslora": True, "target_modules": ALL},
    "r64-mlp": {"r": 64, "lora_alpha": 16, "target_modules": ["gate_proj", "down_proj"]},
    "r5-one-layer": {
        "r": 5,
        "lora_alpha": 10,
        "target_modules": ["up_proj", "o_proj"],
        "layers_to_transform": [1],
    },
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 16, r"layers\.2\.mlp\.up_proj": 3},
        "alpha_pattern": {"k_proj": 1, "model.layers.0.mlp.down_proj": 64},
    },
}


@dataclass
class World:
    """One tiny model, its adapters as PEFT wrote them, and PEFT's own answer for each."""

    loaded: LoadedModel
    peft: PeftModel
    folders: dict[str, Path]

    def reference(self, adapter: str | None, tokens: list[int]) -> Tensor:
        """[len, vocab]: all logits of one sequence, from PEFT or, without an adapter, from transformers."""
        ids = torch.tensor([tokens])
        with torch.inference_mode():
            if adapter is None:
                with self.peft.disable_adapter():
                    return self.peft(ids).logits[0]
            self.peft.set_adapter(adapter)
            return self.peft(ids).logits[0]

    def place(self, driver: Driver) -> dict[str | None, ResidentAdapter | None]:
        residents = {name: driver.adapter(folder, name=name) for name, folder in self.folders.items()}
        return {None: None, **residents}


def make_world(folder: Path, config: transformers.PreTrainedConfig, device: str = "cpu") -> World:
    """The served model lies on `device`, PEFT's on the CPU."""
    base = save_random(folder / "base", config)
    peft: PeftModel | None = None
    for number, (name, settings) in enumerate(ADAPTERS.items()):
        torch.manual_seed(100 + number)
        lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        if peft is None:
            peft = get_peft_model(base, lora, adapter_name=name)
        else:
            peft.add_adapter(name, lora)
    assert peft is not None
    for parameter_name, parameter in peft.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, 0, 0.15)
    peft.save_pretrained(folder / "adapters", selected_adapters=list(ADAPTERS))
    folders = {name: folder / "adapters" / name for name in ADAPTERS}
    return World(load_model(folder / "base", device=device), peft.eval(), folders)


def tokens_of(seed: int, count: int) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def worst(got: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(got).all()
    return (got.cpu() - expected).abs().max().item()
