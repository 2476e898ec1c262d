"""The model family, in Hugging Face conventions; importing it registers the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from deep_delta.model.classification import DeepDeltaForSequenceClassification
from deep_delta.model.configuration import DeepDeltaConfig
from deep_delta.model.modeling import DeepDeltaBlock, DeepDeltaForCausalLM, DeepDeltaModel
from deep_delta.model.published import load_published

AutoConfig.register(DeepDeltaConfig.model_type, DeepDeltaConfig, exist_ok=True)
AutoModel.register(DeepDeltaConfig, DeepDeltaModel, exist_ok=True)
AutoModelForCausalLM.register(DeepDeltaConfig, DeepDeltaForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    DeepDeltaConfig, DeepDeltaForSequenceClassification, exist_ok=True
)
# Pipelines and tests look classes up by name, in a table beside the registered ones.
MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[DeepDeltaConfig.model_type] = (
    DeepDeltaForSequenceClassification.__name__
)

__all__ = [
    "DeepDeltaBlock",
    "DeepDeltaConfig",
    "DeepDeltaForCausalLM",
    "DeepDeltaForSequenceClassification",
    "DeepDeltaModel",
    "load_published",
]
