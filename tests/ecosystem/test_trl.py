"""TRL: supervised fine-tuning in every batch layout, preferences, and reward models.

Each loss is compared with one worked out here, on texts that are fed to the model one by one.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import shaken
from small_models import FOUR, TEXTS, text_checkpoint, text_model, tokenizer
from torch import Tensor

from deep_delta import DeepDeltaForCausalLM, DeepDeltaForSequenceClassification

trl = pytest.importorskip("trl", reason="needs the extra ecosystem")
datasets = pytest.importorskip("datasets", reason="needs the extra train")

ROUNDING = 2e-5
WORDS = tokenizer()


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    """One step of the whole data set, on the CPU, reported to nobody."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    } | options


def train(trainer: Any) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def token_losses(model: DeepDeltaForCausalLM, text: str) -> Tensor:
    ids = torch.tensor([WORDS(text)["input_ids"] + [WORDS.eos_token_id]])
    with torch.no_grad():
        scores = model.eval()(ids).logits[0, :-1].log_softmax(-1)
    return -scores.gather(1, ids[0, 1:, None])


LAYOUTS = {
    "padded": {},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 48},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", FOUR)
def test_fine_tuning_has_the_loss_of_separate_texts(variant, layout, tmp_path):
    model = text_model(variant)
    expected = torch.cat([token_losses(model, text) for text in TEXTS]).mean()
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**settings(tmp_path, max_steps=4), **LAYOUTS[layout]),
        train_dataset=datasets.Dataset.from_dict({"text": list(TEXTS)}),
        processing_class=WORDS,
    )
    losses = train(trainer)
    assert losses[0] == pytest.approx(expected.item(), abs=ROUNDING)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("variant", FOUR)
def test_fine_tuning_takes_a_folder(variant, tmp_path):
    model = text_checkpoint(tmp_path / "model", variant)
    expected = torch.cat([token_losses(model, text) for text in TEXTS]).mean()
    trainer = trl.SFTTrainer(
        str(tmp_path / "model"),
        trl.SFTConfig(**settings(tmp_path / "out")),
        train_dataset=datasets.Dataset.from_dict({"text": list(TEXTS)}),
    )
    assert type(trainer.model) is DeepDeltaForCausalLM
    assert train(trainer)[0] == pytest.approx(expected.item(), abs=ROUNDING)
    trainer.save_model(tmp_path / "tuned")
    again = DeepDeltaForCausalLM.from_pretrained(tmp_path / "tuned")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


PREFERENCES = {
    "prompt": ["The river", "A light", "She said"],
    "chosen": [" sings to the moon.", " over the old stone.", " that it was quiet."],
    "rejected": [" river.", " a a a under.", " and so on, and so on, and so on."],
}


@pytest.mark.parametrize("start", ["object", "folder"])
@pytest.mark.parametrize("variant", ["ddl-cc", "ddl-tc"])
def test_preferences_start_at_ln_2_and_are_learned(variant, start, tmp_path):
    """Policy and reference are one model at first, so that every preference is even."""
    text_checkpoint(tmp_path / "model", variant)
    model: Any = str(tmp_path / "model")
    if start == "object":  # whose reference TRL loads from where it came from
        model = DeepDeltaForCausalLM.from_pretrained(model)
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**settings(tmp_path / "out", max_steps=4)),
        train_dataset=datasets.Dataset.from_dict(PREFERENCES),
        processing_class=WORDS,
    )
    losses = train(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=ROUNDING)
    assert losses[-1] < losses[0] - 0.05
    assert trainer.state.log_history[-2]["rewards/margins"] > 0.1


def reward_model(variant: str) -> DeepDeltaForSequenceClassification:
    config = text_model(variant).config
    config.num_labels = 1
    return shaken(DeepDeltaForSequenceClassification(config), 0.1)


def reward(model: DeepDeltaForSequenceClassification, text: str) -> Tensor:
    ids = torch.tensor([WORDS(text)["input_ids"] + [WORDS.eos_token_id]])
    with torch.no_grad():
        hidden = model.eval().model(ids).last_hidden_state
        # The padding token is the one that ends a text: the last other token is what is scored.
        return model.score(hidden[0, -2])


@pytest.mark.parametrize("variant", FOUR)
def test_rewards_have_the_loss_of_separate_texts_and_are_learned(variant, tmp_path):
    model = reward_model(variant)
    pairs = [
        (prompt + chosen, prompt + rejected)
        for prompt, chosen, rejected in zip(*PREFERENCES.values(), strict=True)
    ]
    margins = [reward(model, chosen) - reward(model, rejected) for chosen, rejected in pairs]
    expected = torch.nn.functional.softplus(-torch.cat(margins)).mean()
    trainer = trl.RewardTrainer(
        model,
        trl.RewardConfig(**settings(tmp_path, max_steps=4)),
        train_dataset=datasets.Dataset.from_dict(
            {"chosen": [pair[0] for pair in pairs], "rejected": [pair[1] for pair in pairs]}
        ),
        processing_class=WORDS,
    )
    losses = train(trainer)
    assert losses[0] == pytest.approx(expected.item(), abs=ROUNDING)
    assert losses[-1] < losses[0] - 0.05


def test_a_reward_model_starts_from_a_language_models_folder(tmp_path):
    """Its own head is new, everything else is what the folder holds."""
    language = text_checkpoint(tmp_path / "model", "ddl-cc")
    trainer = trl.RewardTrainer(
        str(tmp_path / "model"),
        trl.RewardConfig(**settings(tmp_path / "out")),
        train_dataset=datasets.Dataset.from_dict(PREFERENCES),
    )
    model = trainer.model
    assert type(model) is DeepDeltaForSequenceClassification
    assert model.score.weight.shape == (1, 32)
    for name, parameter in language.model.named_parameters():
        assert torch.equal(model.model.get_parameter(name), parameter), name
    assert math.isfinite(train(trainer)[0])
    trainer.save_model(tmp_path / "rewards")
    again = DeepDeltaForSequenceClassification.from_pretrained(tmp_path / "rewards")
    assert torch.equal(reward(again, TEXTS[0]), reward(model, TEXTS[0]))
