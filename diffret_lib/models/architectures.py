"""Dream and LLaDA as architectures of transformers, so that their checkpoints load without remote code.

Dream is Qwen2, and LLaDA is Llama under other names.  With the classes registered here, ``AutoConfig``,
``AutoModelForCausalLM`` and ``AutoTokenizer`` take them for the model types "Dream" and "llada", and never the code of
the hub that ``auto_map`` names.  Tensors are renamed one at a time as they are read from their shard.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

#: Modules of LLaDA's blocks, and what Llama calls them.
LLADA_BLOCK = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
#: Names of LLaDA's tensors to Llama's, as regular expressions and replacements.
LLADA_NAMES = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
} | {
    rf"^model\.transformer\.blocks\.(\d+)\.{theirs}\.": rf"model.layers.\1.{llama}."
    for theirs, llama in LLADA_BLOCK.items()
}
#: Settings of LLaDA's ``config.json`` that Llama has under another name.
LLADA_SETTINGS = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "activation_type": "hidden_act",
    "embedding_size": "vocab_size",  # of the matrix, where it has more rows than the vocabulary
    "weight_tying": "tie_word_embeddings",
    "init_std": "initializer_range",
}
#: Settings of LLaDA that Llama does not have, and the one value of each that it computes.
LLADA_FIXED = {
    "block_type": "llama", "block_group_size": 1, "layer_norm_type": "rms", "rope": True, "alibi": False,
    "attention_layer_norm": False, "input_emb_norm": False, "scale_logits": False, "include_bias": False,
    "include_qkv_bias": False, "bias_for_layer_norm": False,
}  # fmt: skip


class DreamConfig(Qwen2Config):
    """Configuration of Dream (arXiv 2508.15487): that of Qwen2."""

    model_type = "Dream"


class DreamForCausalLM(Qwen2ForCausalLM):
    """Dream, as causal as Qwen2 until :func:`~diffret_lib.models.backbones.make_bidirectional` is called."""

    config_class = DreamConfig


class DreamTokenizer(Qwen2Tokenizer):
    """Tokenizer of Dream: Qwen2's, under the name that the hub's ``tokenizer_config.json`` has."""


class LLaDAConfig(LlamaConfig):
    """Configuration of LLaDA (arXiv 2502.09992): that of Llama, from the keys of LLaDA's ``config.json``.

    ValueError: a setting asks for what Llama does not compute.
    """

    model_type = "llada"

    def __post_init__(self, **kwargs: Any) -> None:
        for theirs, llama in LLADA_SETTINGS.items():
            if (value := kwargs.pop(theirs, None)) is not None:
                setattr(self, llama, value)
        for name, value in LLADA_FIXED.items():
            if kwargs.pop(name, value) not in (value, None):
                raise ValueError(f"LLaDA is loaded with {name} {value!r} alone; its config.json has another value")
        super().__post_init__(**kwargs)


class LLaDAForCausalLM(LlamaForCausalLM):
    """LLaDA, as causal as Llama until :func:`~diffret_lib.models.backbones.make_bidirectional` is called."""

    config_class = LLaDAConfig

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does, its tensors renamed while they are read."""
        return super().from_pretrained(*args, **{"key_mapping": LLADA_NAMES} | kwargs)


def llama_name(name: str) -> str:
    """Name in Llama of a tensor or module of LLaDA; other names are returned as they are."""
    for pattern, replacement in LLADA_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


for _config, _model, _tokenizer in (
    (DreamConfig, DreamForCausalLM, DreamTokenizer),
    (LLaDAConfig, LLaDAForCausalLM, PreTrainedTokenizerFast),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
    AutoTokenizer.register(_config, _tokenizer, exist_ok=True)
