"""The model family, in Hugging Face conventions; importing it registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from deep_delta.model.configuration import DeepDeltaConfig
from deep_delta.model.modeling import DeepDeltaBlock, DeepDeltaForCausalLM, DeepDeltaModel
from deep_delta.model.published import load_published

AutoConfig.register(DeepDeltaConfig.model_type, DeepDeltaConfig, exist_ok=True)
AutoModel.register(DeepDeltaConfig, DeepDeltaModel, exist_ok=True)
AutoModelForCausalLM.register(DeepDeltaConfig, DeepDeltaForCausalLM, exist_ok=True)

__all__ = [
    "DeepDeltaBlock",
    "DeepDeltaConfig",
    "DeepDeltaForCausalLM",
    "DeepDeltaModel",
    "load_published",
]
