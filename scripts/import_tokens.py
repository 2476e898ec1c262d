"""Make a data folder from files of token ids, for `data:` of a recipe.

    python3 scripts/import_tokens.py train.uint16.xz val.uint16.xz --tokenizer gpt2 --out data/text

A file holds little-endian uint16 ids without a header (nanoGPT's train.bin and val.bin do too),
plain or compressed with xz, each document followed by the tokenizer's end-of-text id. The tokenizer
is a byte-level BPE: the bytes of text, for losses per byte, are counted from it.
"""

import argparse
import lzma
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where nothing is installed

import numpy as np

from deep_delta.data.manifest import Manifest
from deep_delta.data.tokenizer import TextTokenizer, load_tokenizer
from deep_delta.data.writer import ShardWriter, WriterState
from deep_delta.errors import UserError

SHARD_TOKENS = 10**8


def read_ids(path: Path) -> np.ndarray:
    try:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        return np.frombuffer(data, dtype="<u2")
    except (OSError, lzma.LZMAError, ValueError) as error:
        raise UserError(f"{path} cannot be read as ids of 16 bits: {error}") from None


def text_bytes(ids: np.ndarray, tokenizer: TextTokenizer) -> int:
    """Of the text that the ids stand for: in a byte-level vocabulary a character is a byte."""
    lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for token, number in tokenizer.tokenizer.get_vocab(with_added_tokens=False).items():
        lengths[number] = len(token)
    lengths[tokenizer.eot_id] = 0
    return int((np.bincount(ids, minlength=tokenizer.vocab_size) * lengths).sum())


def import_tokens(files: dict[str, Path], out: Path, tokenizer: TextTokenizer) -> Manifest:
    """Shards of the files, by split, a copy of the tokenizer and the manifest, in folder `out`."""
    given = {split: read_ids(path) for split, path in files.items()}
    for split, ids in given.items():
        if not len(ids) or int(ids.max()) >= tokenizer.vocab_size:
            raise UserError(
                f"{files[split]} has no ids, or some that {tokenizer.name} does not know"
            )
    out.mkdir(parents=True)
    splits = {}
    for split, ids in given.items():
        writer = ShardWriter(out, split, tokenizer.dtype, SHARD_TOKENS, WriterState())
        writer.add(ids, int((ids == tokenizer.eot_id).sum()), text_bytes(ids, tokenizer))
        splits[split] = writer.finish()
    tokenizer.save(out)
    manifest = Manifest(
        dtype=tokenizer.dtype.name,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        tokenizer_name=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        settings={"inputs": [path.name for path in files.values()]},
        empty_documents=0,
        splits=splits,
    )
    manifest.save(out)
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("val", type=Path)
    parser.add_argument(
        "--tokenizer", required=True, help="folder with tokenizer.json, or its name"
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    options = parser.parse_args()
    try:
        if options.out.exists():
            raise UserError(f"{options.out} exists already: name another folder")
        files = {"train": options.train, "val": options.val}
        made = import_tokens(files, options.out, load_tokenizer(options.tokenizer))
    except UserError as error:
        sys.exit(f"error: {error}")
    for name, split in made.splits.items():
        print(
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, "
            f"{split.text_bytes:,} bytes of text"
        )


if __name__ == "__main__":
    main()
