"""Documents into chunks of work, and chunks into token ids: what `prepare` does in any process."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from deep_delta.data.inputs import Source
from deep_delta.data.parquet import RowGroup
from deep_delta.data.tokenizer import TextTokenizer

CHUNK_DOCUMENTS = 256
CHUNK_CHARACTERS = 2_000_000


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents: their texts, or the row group that has them.

    source, document: the position after the last of them.
    """

    content: list[str] | RowGroup
    source: int
    document: int


@dataclass(frozen=True)
class Encoded:
    """The tokens of n consecutive documents.

    ids: of all of them, 1-d, each document followed by the end-of-text id.
    lengths: tokens of each, the end-of-text id included; int64, (n,); 0 for white space only.
    text_bytes: of each as UTF-8; int64, (n,).
    val: which of them belong to the validation split; bool, (n,).
    """

    ids: npt.NDArray[np.unsignedinteger]
    lengths: npt.NDArray[np.int64]
    text_bytes: npt.NDArray[np.int64]
    val: npt.NDArray[np.bool_]

    def first(self, documents: int) -> "Encoded":
        """The same for the first documents only."""
        lengths = self.lengths[:documents]
        ids = self.ids[: lengths.sum()]
        return Encoded(ids, lengths, self.text_bytes[:documents], self.val[:documents])


def chunks(sources: Sequence[Source], source: int, document: int) -> Iterator[Chunk]:
    """The documents from number `document` of source number `source` on, in bounded chunks.

    Errors: those of the sources.
    """
    texts: list[str] = []
    characters = 0
    number = document
    for index in range(source, len(sources)):
        number = document if index == source else 0
        for piece in sources[index].pieces(number):
            if isinstance(piece, RowGroup):
                if texts:
                    yield Chunk(texts, index, number)
                    texts, characters = [], 0
                number = piece.stop
                yield Chunk(piece, index, number)
                continue
            texts.append(piece)
            characters += len(piece)
            number += 1
            if len(texts) == CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
                yield Chunk(texts, index, number)
                texts, characters = [], 0
    if texts:
        yield Chunk(texts, len(sources) - 1, number)


def encode(chunk: Chunk, tokenizer: TextTokenizer, val_fraction: float) -> Encoded:
    """Read the chunk if need be, and tokenize it. Errors: UserError from reading.

    val_fraction: share of the documents for "val", by a hash of the text.
    """
    content = chunk.content
    remaining = content.texts() if isinstance(content, RowGroup) else iter(content)
    ids: list[npt.NDArray[np.unsignedinteger]] = [np.empty(0, dtype=tokenizer.dtype)]
    lengths: list[int] = []
    text_bytes: list[int] = []
    val: list[bool] = []
    # The tokenizer needs a hundred times the memory of the ids: no more texts at once than here.
    while texts := list(islice(remaining, CHUNK_DOCUMENTS)):
        encoded = iter(tokenizer.encode([text for text in texts if text.strip()]))
        for text in texts:
            document = next(encoded) if text.strip() else ids[0]
            data = text.encode()
            ids.append(document)
            lengths.append(len(document))
            text_bytes.append(len(data))
            val.append(_hash_fraction(data) < val_fraction)
    return Encoded(
        np.concatenate(ids), np.array(lengths, dtype=np.int64), np.array(text_bytes), np.array(val)
    )


def _hash_fraction(data: bytes) -> float:
    """A number in [0, 1) from the SHA-256 of UTF-8 text; 53 bits, which a float holds exactly."""
    return (int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 11) / 2**53
