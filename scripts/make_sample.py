"""Make the sample that ships with the package: text, tokenizer and NOTICE.

    python scripts/make_sample.py CORPUS_DIR

CORPUS_DIR holds `train/*.jsonl.xz`, one {"text", "source"} object a line. Only sources in the
public domain or under CC BY are taken. The same input gives the same bytes: documents are chosen
and ordered by a SHA-256 key, and nothing depends on time or file order.
"""

import hashlib
import json
import lzma
import sys
from collections import defaultdict
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BUNDLED = Path(__file__).resolve().parent.parent / "deep_delta" / "data" / "bundled"
END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096

# UTF-8 bytes of text to take from each source; None takes every document that is left.
BYTES_BY_SOURCE: dict[str, int | None] = {
    "classics-nonfiction": 1_800_000,
    "classics-fiction": 1_500_000,
    "medquad": 1_600_000,
    "plos": None,
    "opensource-guide": None,
}

# CC BY asks for the authors of each article, so only articles with a known credit are taken.
PLOS_CREDITS = {
    "Relaxed Phylogenetics and Dating with Confidence": (
        "Drummond AJ, Ho SYW, Phillips MJ, Rambaut A (2006), 10.1371/journal.pbio.0040088"
    ),
    "Why Most Published Research Findings Are False": (
        "Ioannidis JPA (2005), 10.1371/journal.pmed.0020124"
    ),
    "Preferred Reporting Items for Systematic Reviews and Meta-Analyses: The PRISMA Statement": (
        "Moher D, Liberati A, Tetzlaff J, Altman DG, The PRISMA Group (2009), "
        "10.1371/journal.pmed.1000097"
    ),
    "Neglected Diseases and Poverty in “The Other America”: The Greatest Health Disparity in the "
    "United States?": "Hotez PJ (2007), 10.1371/journal.pntd.0000149",
    "Defrosting the Digital Library: Bibliographic Tools for the Next Generation Web": (
        "Hull D, Pettifer SR, Kell DB (2008), 10.1371/journal.pcbi.1000204"
    ),
    "Complete Primate Skeleton from the Middle Eocene of Messel in Germany: Morphology and "
    "Paleobiology": (
        "Franzen JL, Gingerich PD, Habersetzer J, Hurum JH, von Koenigswald W, Smith BH (2009), "
        "10.1371/journal.pone.0005723"
    ),
}

NOTICE = """\
The text in text.jsonl.xz, and the tokenizer trained on it, come from the sources below. Each
keeps its own licence; none of them is share-alike. Changes were made to all of them: markup, code
blocks, displayed formulas, tables, figures and references were removed, duplicate documents and
boilerplate paragraphs were dropped, and a part of the documents was chosen. The field "source" of
each line names its source.

classics-nonfiction, classics-fiction
    Public domain, as the collection states of all its titles. Books are cut into parts of about
    40,000 characters, one document each; parts of one book can be in both splits.
    From https://github.com/mlschmitt/classic-books-markdown,
    commit 944882722e9a96fa6cf2739dc2ea757e101f412f.

medquad
    MedQuAD, the Medical Question Answering Dataset, by Asma Ben Abacha and Dina Demner-Fushman
    (A Question-Entailment Approach to Question Answering, BMC Bioinformatics 20, 511, 2019), made
    from web sites of the US National Institutes of Health. Licence: CC BY 4.0,
    https://creativecommons.org/licenses/by/4.0/
    From https://github.com/abachaa/MedQuAD, commit 577bd37b96c02d1833b2c9eed2de9f96964e96cb.

opensource-guide
    Open Source Guides, by GitHub and the contributors, https://opensource.guide/
    Licence: CC BY 4.0, https://creativecommons.org/licenses/by/4.0/
    From https://github.com/github/opensource.guide,
    commit ebc9678e39b55ff5e5c8801d1960904692188e90.

plos
    Articles of PLOS journals. Licence: each says that it is open access under the Creative Commons
    Attribution License (CC BY) and names no version of it; the current version is at
    https://creativecommons.org/licenses/by/4.0/. Credited here by title, authors, year and DOI.
    From https://github.com/PLOS/allofplos, commit 07fdeed848b2816a7fbf7da6418ef6e2076e1960.
{articles}
"""


def main() -> None:
    """Write the bundled files, or stop with a usage line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/make_sample.py CORPUS_DIR")
    documents = choose(Path(sys.argv[1]))
    BUNDLED.mkdir(parents=True, exist_ok=True)
    write_text(documents)
    write_tokenizer([text for _, text in documents])
    articles = "\n".join(f"    - {title}: {credit}" for title, credit in PLOS_CREDITS.items())
    (BUNDLED / "NOTICE").write_text(NOTICE.format(articles=articles), encoding="utf-8")


def choose(corpus: Path) -> list[tuple[str, str]]:
    """The chosen documents as (source, text), in the order of their keys.

    Raises SystemExit when the folder holds no shard or lacks a PLOS article that is credited.
    """
    by_source: dict[str, list[str]] = defaultdict(list)
    for path in sorted((corpus / "train").glob("*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8", newline="\n") as lines:
            for line in lines:
                record = json.loads(line)
                if record["source"] in BYTES_BY_SOURCE:
                    by_source[record["source"]].append(record["text"])
    by_source["plos"] = [text for text in by_source["plos"] if title(text) in PLOS_CREDITS]
    missing = set(PLOS_CREDITS) - {title(text) for text in by_source["plos"]}
    if missing:
        sys.exit(f"not in {corpus}/train: {sorted(missing)[0]}")

    chosen = []
    for source, budget in BYTES_BY_SOURCE.items():
        taken = 0
        for text in sorted(by_source[source], key=order_key):
            if budget is not None and taken >= budget:
                break
            taken += len(text.encode())
            chosen.append((source, text))
    return sorted(chosen, key=lambda document: order_key(document[1]))


def order_key(text: str) -> bytes:
    """Sort key of a document.

    The prefix keeps it independent of the bare hash that `ddl prepare` splits by; without it the
    documents chosen first would all be validation documents.
    """
    return hashlib.sha256(b"sample\0" + text.encode()).digest()


def title(text: str) -> str:
    """First line of a document."""
    return text.split("\n", 1)[0]


def write_text(documents: list[tuple[str, str]]) -> None:
    """Write text.jsonl.xz."""
    lines = [
        json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n"
        for source, text in documents
    ]
    packed = lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME)
    (BUNDLED / "text.jsonl.xz").write_bytes(packed)
    print(f"text.jsonl.xz: {len(documents):,} documents, {len(packed):,} bytes")


def write_tokenizer(texts: list[str]) -> None:
    """Train the byte-level BPE on `texts`; write tokenizer.json and tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        # All 256 bytes, so that text with characters unseen here still encodes without loss.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        sys.exit(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    (BUNDLED / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (BUNDLED / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
