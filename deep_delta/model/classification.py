"""A class or a reward for a whole text: the decoder, and a linear map of its last token."""

from transformers.modeling_layers import GenericForSequenceClassification

from deep_delta.model.modeling import DeepDeltaPreTrainedModel


class DeepDeltaForSequenceClassification(
    GenericForSequenceClassification, DeepDeltaPreTrainedModel
):
    """`DeepDeltaModel` and a head of `config.num_labels` scores, read at the last token of a text.

    transformers' own class for this, as Qwen3 has it: losses by `config.problem_type`, and padding
    found by `config.pad_token_id`, which batches need. One label makes it a reward model.
    """
