"""transformers' common model tests: what Qwen3 passes, we pass.

A test that skips itself for our model ("not supported") is run on Qwen3 there and then, and fails
if Qwen3 does not skip it too. The exceptions stand in `SKIPPED`, each with its reason. (Lfm2, a
convolution model, passes no test that Qwen3 does not.)
"""

import functools
import inspect
import types
import unittest
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import transformers_source

pytest.importorskip("parameterized", reason="needs the extra ecosystem")
if not transformers_source.install():
    pytest.skip("needs `make transformers-source`", allow_module_level=True)

from model_tester import SmallModelTester
from tests.test_configuration_common import ConfigTester
from tests.test_training_mixin import TrainingTesterMixin
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification, Qwen3Model

from deep_delta import (
    DeepDeltaConfig,
    DeepDeltaForCausalLM,
    DeepDeltaForSequenceClassification,
    DeepDeltaModel,
)
from deep_delta.model.presets import PARAMETERIZATIONS, SIZES, preset_fields
from tests import test_modeling_common as common

pytestmark = pytest.mark.slow

SKIPPED = {
    "test_generation_tester_mixin_inheritance": (
        "transformers' generation tests are not in its source distribution; ours are in "
        "tests/model/test_decoding.py"
    ),
    "test_tp_plan_matches_params": "tensor parallelism is not offered",
    "test_sliding_window_mask": "the family has no sliding window (nor has Lfm2)",
    "test_can_capture_specific_layers_hidden_states": (
        "asks first whether a hook records hidden states: here they are made from the state that "
        "blocks hand on (tests/model/test_calls.py asks for some of them by number)"
    ),
}
MEAN_OF_CHANNELS = {
    "test_retain_grad_hidden_states_attentions": (
        "with several channels, hidden states are their mean: made beside the path, so that no "
        "gradient comes to them"
    )
}


class CommonTests(common.ModelTesterMixin, TrainingTesterMixin):
    all_model_classes: tuple[type, ...]
    config_class: type
    options: ClassVar[dict[str, Any]]
    exceptions: ClassVar[dict[str, str]]

    def setUp(self):
        if self._testMethodName in self.exceptions:
            raise unittest.SkipTest(self.exceptions[self._testMethodName])
        causal_lm_class = self.all_model_classes[1]
        self.model_tester = SmallModelTester(self.config_class, causal_lm_class, self.options)

    def test_config(self):
        ConfigTester(self, config_class=self.config_class).run_common_tests()


class Qwen3(CommonTests, unittest.TestCase):
    __test__ = False  # run where one of ours skips itself
    all_model_classes = (Qwen3Model, Qwen3ForCausalLM, Qwen3ForSequenceClassification)
    config_class = Qwen3Config
    options: ClassVar[dict[str, Any]] = {}
    exceptions: ClassVar[dict[str, str]] = {}


@functools.cache
def skipped_by_qwen3(test: str) -> bool:
    result = unittest.TestResult()
    Qwen3(test).run(result)
    assert not result.failures + result.errors, f"Qwen3 fails {test}: {result}"
    return bool(result.skipped)


class Ours(CommonTests):
    all_model_classes = (DeepDeltaModel, DeepDeltaForCausalLM, DeepDeltaForSequenceClassification)
    config_class = DeepDeltaConfig

    def test_can_init_all_missing_weights(self):
        """With the two things that transformers cannot know of ours.

        It asks the test only of files that begin with a year, 2023 or later. And residuals draw
        from generators of their own, seeded by one draw when the model is made: here the same one.
        """
        read = types.SimpleNamespace(**vars(inspect))
        read.getfile = lambda _: inspect.getfile(Qwen3Config)
        prepare = DeepDeltaModel._prepare_initialisation

        def seeded(model):
            torch.manual_seed(0)
            prepare(model)

        with (
            mock.patch.object(common, "inspect", read),
            mock.patch.object(DeepDeltaModel, "_prepare_initialisation", seeded),
        ):
            super().test_can_init_all_missing_weights()

    def skipTest(self, reason: str):  # noqa: N802 - unittest's name
        if not skipped_by_qwen3(self._testMethodName):
            self.fail(f"Qwen3 does not skip this: {reason}")
        raise unittest.SkipTest(reason)


def case(variant: str, parameterization: str) -> type:
    """A test class of that model. (Of a preset, only the sizes are the tester's instead.)"""
    fields = preset_fields(variant, "tiny", parameterization)
    contents = {
        "options": {name: value for name, value in fields.items() if name not in SIZES["tiny"]},
        "exceptions": SKIPPED | (MEAN_OF_CHANNELS if fields["value_channels"] > 1 else {}),
        "__test__": True,
        "__module__": __name__,
    }
    return type(f"Test_{variant}_{parameterization}", (Ours, unittest.TestCase), contents)


for variant in ("additive", "ddl-scalar", "ddl-cc", "ddl-tc"):
    for parameterization in PARAMETERIZATIONS:
        made = case(variant, parameterization)
        globals()[made.__name__] = made
del made  # a class under two names would be tested twice
