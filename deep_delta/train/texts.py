"""The texts of a run: for training, for validation, and for one look at the end."""

from dataclasses import dataclass
from pathlib import Path

from deep_delta.data import Manifest, PackedSequences, TokenShards, check_tokenizer, prepare_bundled
from deep_delta.errors import UserError
from deep_delta.train.processes import in_main, on_each, processes, rank
from deep_delta.train.recipe import Recipe


@dataclass(frozen=True)
class Texts:
    """Sequences of the recipe's length; `test` is None where there is no such text.

    folder: of the training data, with the tokenizer of all of them.
    """

    folder: Path
    train: PackedSequences
    val: PackedSequences
    test: PackedSequences | None

    @property
    def manifest(self) -> Manifest:
        return self.train.shards.manifest


def open_texts(recipe: Recipe, vocab_size: int) -> Texts:
    """The recipe's texts, their shards checked, of which every process reads its part.

    UserError for folders that are missing, damaged, too small, or of a tokenizer that does not fit
    the model's vocabulary or the other texts.
    """
    folder = find_data(recipe)
    test = folder if recipe.test_data is None else Path(recipe.test_data)
    train, val, *tests = on_each(lambda: _opened(folder, test))
    check_tokenizer(train.manifest, vocab_size)
    for shards in tests:
        if shards.manifest.tokenizer_sha256 != train.manifest.tokenizer_sha256:
            raise UserError(
                f"{shards.folder} was prepared with another tokenizer than {folder}: prepare it "
                "with the same"
            )
    sequences = [
        PackedSequences(shards, recipe.seq_len, mask_documents=recipe.mask_documents)
        for shards in (train, val, *tests)
    ]
    if len(sequences[0]) < recipe.batch_size:
        raise UserError(
            f"{folder} has {len(sequences[0])} sequences of {recipe.seq_len} tokens, fewer than "
            f"one batch of {recipe.batch_size}"
        )
    return Texts(folder, sequences[0], sequences[1], sequences[2] if tests else None)


@in_main
def find_data(recipe: Recipe) -> Path:
    """The prepared data of a recipe; the bundled text is prepared in OUT/data."""
    if recipe.data == "bundled":
        return prepare_bundled(Path(recipe.out) / "data")
    return Path(recipe.data)


def _opened(folder: Path, test: Path) -> list[TokenShards]:
    splits = [TokenShards.open(folder, split, verify=False) for split in ("train", "val")]
    has_test = "test" in Manifest.load(test).splits
    if has_test or test != folder:
        splits.append(TokenShards.open(test, "test" if has_test else "val", verify=False))
    for shards in splits:  # large data takes minutes
        shards.verify(rank(), processes())
    return splits
