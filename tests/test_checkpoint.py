"""Which data a checkpoint fits; what is wrong with its folder the commands' own tests ask."""

import shutil

import pytest
from tokenizers import Tokenizer, models
from train.micro import MODEL, make_data, user_error
from transformers import PreTrainedTokenizerFast

from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM
from deep_delta.checkpoint import check_fits
from deep_delta.data import TokenShards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return TokenShards.open(make_data(tmp_path_factory.mktemp("fits")), "val")


def model_of(vocab_size):
    config = DeepDeltaConfig.from_preset("additive", "tiny", vocab_size=vocab_size, **MODEL)
    return DeepDeltaForCausalLM(config)


def test_the_same_tokenizer_in_any_bytes_and_none(shards, tmp_path):
    model, own = model_of(4096), tmp_path / "tokenizer.json"
    vocabulary = Tokenizer.from_file(str(shards.folder / "tokenizer.json")).get_vocab()
    assert check_fits(tmp_path, model, shards).get_vocab() == vocabulary  # it has none
    shutil.copyfile(shards.folder / "tokenizer.json", own)
    assert check_fits(tmp_path, model, shards).get_vocab() == vocabulary
    before = own.read_bytes()
    PreTrainedTokenizerFast(tokenizer_file=str(own), eos_token="!").save_pretrained(tmp_path)
    assert own.read_bytes() != before
    assert check_fits(tmp_path, model, shards).get_vocab() == vocabulary


def test_another_tokenizer_is_refused(shards, tmp_path):
    assert "of 4,096 ids" in user_error(check_fits, tmp_path, model_of(4095), shards)
    own = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"one": 0, "two": 1}, "one")).save(str(own))
    line = user_error(check_fits, tmp_path, model_of(4096), shards)
    assert "has another tokenizer than the data" in line
    assert line.endswith(f"prepare the text with --tokenizer {tmp_path}")
    own.write_text("{}")
    assert "can't be read" in user_error(check_fits, tmp_path, model_of(4096), shards)
