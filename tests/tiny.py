"""Small random backbones for the tests: real architecture, tokenizer and chat template, no network."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from diffret_lib.models.backbones import Backbone, LoadedBackbone, load_backbone

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = [
    "You are an AI assistant that can understand human language.",
    "Use a few words to represent the passage in a retrieval task. Make sure your words are in lowercase.",
    'Query: "priority queue". Use one word to represent the query. The words are: "heap"',
    "A heap is a binary tree for which every parent has a value less than or equal to its children.",
    "Compute the eigenvalues and right eigenvectors of a square array.",
    "Return a sorted copy of an array along the given axis.",
    "system user assistant Passage Query The word is",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens with the special tokens and the template of ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[3:],
    )
    wrapped.chat_template = CHATML
    return wrapped


def tiny_model(vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama: 2 layers, hidden size 32, tied embeddings; far enough from zero to predict varied tokens."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def tiny_folder(folder: Path, seed: int = 0) -> Path:
    """A model folder of transformers."""
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def tiny_spec(folder: Path, family: str = "diffusion") -> Backbone:
    """The registry entry of a model folder."""
    more = {"mask_token": "<file_sep>", "prediction_shift": True} if family == "diffusion" else {}
    return Backbone(name=f"tiny-{family}", family=family, source={"path": folder}, max_length=512, **more)


def tiny_backbone(folder: Path, family: str = "diffusion", seed: int = 0) -> LoadedBackbone:
    """A tiny random backbone, saved to ``folder`` and loaded from it as any other is; float32 on the CPU."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        tiny_folder(folder, seed)
    return load_backbone(tiny_spec(folder, family), dtype="float32", device="cpu")
