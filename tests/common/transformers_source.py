"""transformers' own tests as a package `tests`, from its source distribution, unpatched.

`make transformers-source` unpacks it into the virtual environment. Its common tests import three
modules that the distribution leaves out; empty ones stand in, and what they would test is not run.
"""

import sys
import types
from pathlib import Path

import transformers

FOLDER = Path(sys.prefix) / f"transformers-{transformers.__version__}"


def _module(name: str, **contents) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    sys.modules[name] = module
    return module


def install() -> bool:
    """Make `import tests.test_modeling_common` mean transformers'; False if it is not there."""
    if not (FOLDER / "tests" / "test_modeling_common.py").is_file():
        return False
    _module("tests", __path__=[str(FOLDER / "tests")])
    _module("tests.exporters", __path__=[])
    _module("tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _module("tests.generation", __path__=[])
    mixin = type("GenerationTesterMixin", (), {})
    _module("tests.generation.test_utils", GenerationTesterMixin=mixin)
    _module("tests.utils", __path__=[])
    # Fields that every configuration takes, each with another value than its default.
    fields = {
        "return_dict": False,
        "output_hidden_states": True,
        "output_attentions": True,
        "dtype": "float16",
        "chunk_size_feed_forward": 5,
        "architectures": ["BertModel"],
        "id2label": {0: "label"},
        "label2id": {"label": "0"},
        "problem_type": "regression",
    }
    _module("tests.utils.test_configuration_utils", config_common_kwargs=fields)
    return True
