"""A small text, and checkpoints of untrained models whose every parameter has been shaken."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import shaken
from train.micro import make_data

from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("audit"))


@pytest.fixture
def checkpoint(tmp_path: Path, text: Path) -> Callable[..., Path]:
    """Write a checkpoint of a variant; returns its folder."""

    def write(variant: str, **fields: Any) -> Path:
        config = DeepDeltaConfig.from_preset(
            variant, "tiny", hidden_size=16, num_hidden_layers=2, num_attention_heads=1,
            head_dim=16, max_position_embeddings=32, **fields,
        )  # fmt: skip
        torch.manual_seed(0)
        model: Any = shaken(DeepDeltaForCausalLM(config), 0.1)
        folder = tmp_path / variant
        model.save_pretrained(folder)
        shutil.copyfile(text / "tokenizer.json", folder / "tokenizer.json")
        return folder

    return write
