"""Loading the tokenizer that turns text into ids, and keeping a copy beside the shards."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from deep_delta.data.files import write_atomically, write_json_atomically
from deep_delta.data.inputs import looks_like_path
from deep_delta.data.sample import bundled_tokenizer
from deep_delta.data.texts import one_line
from deep_delta.errors import UserError

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer ready to encode documents.

    name: "bundled", the hub name, or the last part of a path (no machine's folders are recorded).
    data: the bytes of tokenizer.json.
    vocab_size: largest id plus one.
    """

    name: str
    data: bytes
    tokenizer: Tokenizer
    vocab_size: int
    eot_token: str
    eot_id: int

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of tokenizer.json."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Little-endian type that holds every id: uint16 up to 65,536 of them, else uint32."""
        return np.dtype("<u2") if self.vocab_size <= 2**16 else np.dtype("<u4")

    def encode(self, texts: list[str]) -> list[npt.NDArray[np.unsignedinteger]]:
        """Ids of each text followed by the end-of-text id, as 1-d arrays of `dtype`."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, self.eot_id], dtype=self.dtype) for encoding in encodings]

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled Tokenizer forgets that special tokens in a text are plain text: build it again.
        config = json.dumps({"eos_token": self.eot_token}).encode()
        return _build, (self.name, self.data, config)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, byte for byte, and a config that transformers loads with it."""
        write_atomically(folder / TOKENIZER_NAME, self.data)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eot_token}
        write_json_atomically(folder / CONFIG_NAME, config)


def load_tokenizer(name: str | None) -> TextTokenizer:
    """Load the bundled tokenizer (None), a folder, a tokenizer.json file, or one from the hub.

    Errors: UserError when it can't be had or read, or has no end-of-text token.
    """
    if name is None:
        return _from_file("bundled", bundled_tokenizer() / TOKENIZER_NAME)
    path = Path(name)
    if path.is_dir():
        if not (path / TOKENIZER_NAME).is_file():
            raise UserError(f"the tokenizer folder {name} has no {TOKENIZER_NAME}")
        return _from_file(path.resolve().name, path / TOKENIZER_NAME)
    if path.is_file():
        return _from_file(path.name, path)
    if looks_like_path(name):
        raise UserError(f"no such tokenizer: {name}")
    return _from_hub(name)


def _from_file(name: str, path: Path) -> TextTokenizer:
    config = path.with_name(CONFIG_NAME)
    try:
        data = path.read_bytes()
        config_data = config.read_bytes() if config.is_file() else b"{}"
    except OSError as error:
        raise UserError(f"can't read the tokenizer {path}: {error.strerror}") from error
    return _build(name, data, config_data)


def _from_hub(name: str) -> TextTokenizer:
    try:
        tokenizer = Tokenizer.from_pretrained(name)
        config_data = b"{}"
        if tokenizer.token_to_id(END_OF_TEXT) is None:
            from huggingface_hub import hf_hub_download

            config_data = Path(hf_hub_download(name, CONFIG_NAME)).read_bytes()
    except Exception as error:  # the hub client and the network below it raise dozens of kinds
        raise UserError(f"can't load the tokenizer {name}: {one_line(error)}") from error
    return _build(name, tokenizer.to_str().encode(), config_data)


def _build(name: str, data: bytes, config_data: bytes) -> TextTokenizer:
    try:
        tokenizer = Tokenizer.from_buffer(data)
        config = json.loads(config_data)
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"the tokenizer {name} can't be read: {one_line(error)}") from error
    # Settings of the model the tokenizer was made for, such as 512 tokens, would cut documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A document that spells out "<|endoftext|>" must not end early: that text is plain text.
    tokenizer.encode_special_tokens = True

    eot_token = END_OF_TEXT
    if tokenizer.token_to_id(eot_token) is None:
        entry = config.get("eos_token") or ""
        # Some configs hold the whole description of the token.
        eot_token = entry["content"] if isinstance(entry, dict) else entry
    eot_id = tokenizer.token_to_id(eot_token)
    if eot_id is None:
        raise UserError(
            f"the tokenizer {name} has no end-of-text token: it needs {END_OF_TEXT} or an "
            f"eos_token in {CONFIG_NAME}"
        )
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return TextTokenizer(name, data, tokenizer, vocab_size, eot_token, eot_id)
