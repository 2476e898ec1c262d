"""Documents into chunks of work, and chunks into token ids: what `prepare` does in any process."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from deep_delta.data.inputs import Source
from deep_delta.data.manifest import SPLITS
from deep_delta.data.parquet import RowGroup
from deep_delta.data.texts import Document
from deep_delta.data.tokenizer import TextTokenizer

CHUNK_DOCUMENTS = 256
CHUNK_CHARACTERS = 2_000_000


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents, or the row group that has them.

    source, document: the position after the last of them.
    """

    content: list[Document] | RowGroup
    source: int
    document: int


@dataclass(frozen=True)
class Fractions:
    """Shares of the documents that go to "val" and to "test", with a sum below 1.

    A hash of its text gives a document a number in [0, 1). "val" takes the lowest and "test" the
    highest, so that neither gets or loses documents when the other's share changes.
    """

    val: float
    test: float

    def split_of(self, data: bytes) -> str:
        """The split of a document, from its UTF-8 text."""
        number = _hash_fraction(data)
        if number < self.val:
            return "val"
        return "test" if number >= 1 - self.test else "train"


@dataclass(frozen=True)
class Encoded:
    """The tokens of n consecutive documents.

    ids: of all of them, 1-d, each document followed by the end-of-text id.
    lengths: tokens of each, the end-of-text id included; int64, (n,); 0 for white space only.
    text_bytes: of each as UTF-8; int64, (n,).
    split: the one that each belongs to, by its number in SPLITS; int8, (n,).
    sources: the name of the source that each is part of; n of them, None where it has none.
    """

    ids: npt.NDArray[np.unsignedinteger]
    lengths: npt.NDArray[np.int64]
    text_bytes: npt.NDArray[np.int64]
    split: npt.NDArray[np.int8]
    sources: list[str | None]

    def first(self, documents: int) -> "Encoded":
        """The same for the first documents only."""
        lengths = self.lengths[:documents]
        ids = self.ids[: lengths.sum()]
        return Encoded(
            ids,
            lengths,
            self.text_bytes[:documents],
            self.split[:documents],
            self.sources[:documents],
        )


def chunks(sources: Sequence[Source], source: int, document: int) -> Iterator[Chunk]:
    """The documents from number `document` of source number `source` on, in bounded chunks.

    Errors: those of the sources.
    """
    documents: list[Document] = []
    characters = 0
    number = document
    for index in range(source, len(sources)):
        number = document if index == source else 0
        for piece in sources[index].pieces(number):
            if isinstance(piece, RowGroup):
                if documents:
                    yield Chunk(documents, index, number)
                    documents, characters = [], 0
                number = piece.stop
                yield Chunk(piece, index, number)
                continue
            documents.append(piece)
            characters += len(piece.text)
            number += 1
            if len(documents) == CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
                yield Chunk(documents, index, number)
                documents, characters = [], 0
    if documents:
        yield Chunk(documents, len(sources) - 1, number)


def encode(chunk: Chunk, tokenizer: TextTokenizer, fractions: Fractions) -> Encoded:
    """Read the chunk if need be, and tokenize it. Errors: UserError from reading."""
    content = chunk.content
    remaining = content.documents() if isinstance(content, RowGroup) else iter(content)
    ids: list[npt.NDArray[np.unsignedinteger]] = [np.empty(0, dtype=tokenizer.dtype)]
    lengths: list[int] = []
    text_bytes: list[int] = []
    split: list[int] = []
    sources: list[str | None] = []
    # The tokenizer needs a hundred times the memory of the ids: no more texts at once than here.
    while documents := list(islice(remaining, CHUNK_DOCUMENTS)):
        encoded = iter(tokenizer.encode([text for text, _ in documents if text.strip()]))
        for text, source in documents:
            tokens = next(encoded) if text.strip() else ids[0]
            data = text.encode()
            ids.append(tokens)
            lengths.append(len(tokens))
            text_bytes.append(len(data))
            split.append(SPLITS.index(fractions.split_of(data)))
            sources.append(source)
    return Encoded(
        np.concatenate(ids),
        np.array(lengths, dtype=np.int64),
        np.array(text_bytes),
        np.array(split, dtype=np.int8),
        sources,
    )


def _hash_fraction(data: bytes) -> float:
    """A number in [0, 1) from the SHA-256 of UTF-8 text; 53 bits, which a float holds exactly."""
    return (int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 11) / 2**53
