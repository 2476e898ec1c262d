"""The text and the tokenizer that ship with the package, to try things without a download."""

from importlib.resources import files
from pathlib import Path

# Gives 125,092 validation tokens of the 1.48 million in the sample. There is no test split:
# its documents would be missing in training, and every loss on the sample would change.
SAMPLE_VAL_FRACTION = 0.06


def bundled_text() -> Path:
    """The sample, .jsonl.xz of {"text", "source"}; NOTICE beside it states the licences."""
    return _bundled() / "text.jsonl.xz"


def bundled_tokenizer() -> Path:
    """The folder with tokenizer.json (byte-level BPE, 4,096 ids) and tokenizer_config.json."""
    return _bundled()


def prepare_bundled(out: Path) -> Path:
    """Prepare the sample into `out` with the bundled tokenizer and return `out`.

    Costs a few seconds the first time and next to nothing when it is already done. Errors: those of
    `prepare`.
    """
    # Not at the top: prepare needs this module to find the tokenizer.
    from deep_delta.data.prepare import prepare

    if (out / "manifest.json").is_file():  # written last: the folder is complete
        return out
    prepare([str(bundled_text())], out, val_fraction=SAMPLE_VAL_FRACTION)
    return out


def _bundled() -> Path:
    return Path(str(files("deep_delta.data") / "bundled"))
