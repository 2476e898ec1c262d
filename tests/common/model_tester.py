"""What transformers' common tests ask of a model: a small configuration, and a batch."""

from typing import Any

import torch
from tests.test_modeling_common import ids_tensor
from transformers import PreTrainedConfig


class SmallModelTester:
    """With the sizes of transformers' own tester of causal language models."""

    batch_size = 13
    seq_length = 7
    is_training = True
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 2
    num_key_value_heads = 2
    intermediate_size = 37

    def __init__(
        self,
        config_class: type[PreTrainedConfig],
        causal_lm_class: type,
        options: dict[str, Any],
    ):
        self.config_class = config_class
        self.causal_lm_class = causal_lm_class
        self.options = options

    def get_config(self) -> PreTrainedConfig:
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
            head_dim=self.hidden_size // self.num_attention_heads,
            max_position_embeddings=512,
            initializer_range=0.02,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **self.options,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = torch.tril(torch.ones_like(input_ids))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": mask}
