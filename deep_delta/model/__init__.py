"""The model family, in Hugging Face conventions; importing it registers the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto import modeling_auto

from deep_delta.model.classification import DeepDeltaForSequenceClassification
from deep_delta.model.configuration import DeepDeltaConfig
from deep_delta.model.modeling import DeepDeltaBlock, DeepDeltaForCausalLM, DeepDeltaModel
from deep_delta.model.published import load_published
from deep_delta.model.versions import warn_if_untested

AutoConfig.register(DeepDeltaConfig.model_type, DeepDeltaConfig, exist_ok=True)
AutoModel.register(DeepDeltaConfig, DeepDeltaModel, exist_ok=True)
AutoModelForCausalLM.register(DeepDeltaConfig, DeepDeltaForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    DeepDeltaConfig, DeepDeltaForSequenceClassification, exist_ok=True
)
# The tables by name, which Trainer (whether to shift labels), pipelines and lm-eval look into.
modeling_auto.MODEL_MAPPING_NAMES[DeepDeltaConfig.model_type] = DeepDeltaModel.__name__
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[DeepDeltaConfig.model_type] = (
    DeepDeltaForCausalLM.__name__
)
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[DeepDeltaConfig.model_type] = (
    DeepDeltaForSequenceClassification.__name__
)
warn_if_untested()

__all__ = [
    "DeepDeltaBlock",
    "DeepDeltaConfig",
    "DeepDeltaForCausalLM",
    "DeepDeltaForSequenceClassification",
    "DeepDeltaModel",
    "load_published",
]
