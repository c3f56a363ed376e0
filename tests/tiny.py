"""Small random backbones (real architecture, tokenizer and chat template) and texts for the tests, no network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from diffret_lib.models.backbones import Backbone, LoadedBackbone, load_backbone

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
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
WORDS = ["heap", "tree", "array", "axis", "sorted copy", "eigenvalues", "square", "parent", "children", "queue"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens with the special tokens and the template of ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet()), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, **options)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>", additional_special_tokens=SPECIAL[3:],
    )  # fmt: skip
    wrapped.chat_template = CHATML
    return wrapped


def tiny_model(vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama: 2 layers, hidden size 32, tied embeddings; far enough from zero to predict varied tokens."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
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


def tiny_backbone(folder: Path, family: str = "diffusion", seed: int = 0, dtype: str = "float32") -> LoadedBackbone:
    """A tiny random backbone, saved to ``folder`` and loaded from it as any other is, on the CPU."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        tiny_folder(folder, seed)
    return load_backbone(tiny_spec(folder, family), dtype=dtype, device="cpu")


def random_texts(seed: int, n: int) -> list[str]:
    """Different texts of random words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 6)) + f" {i}." for i in range(n)]


def write_beir(
    folder: Path, passages: Mapping[str, str], queries: Mapping[str, str], judged: Mapping[str, Mapping[str, int]]
) -> str:
    """A BEIR folder of texts and judgements by their ids."""
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", passages), ("queries", queries)):
        lines = [json.dumps({"_id": key, "text": text}) + "\n" for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    rows = [f"{query}\t{passage}\t{grade}\n" for query, row in judged.items() for passage, grade in row.items()]
    (folder / "qrels" / "test.tsv").write_text("".join(["query-id\tcorpus-id\tscore\n", *rows]))
    return str(folder)


def beir(folder, name: str, seed: int, passages: int = 8) -> str:
    """A BEIR folder: passages of random words, 5 queries out of one of them each."""
    texts = {f"p{i}": text for i, text in enumerate(random_texts(seed, passages))}
    queries = {f"q{i}": " ".join(texts[f"p{i}"].split()[:2]) for i in range(5)}
    return write_beir(folder / name, texts, queries, {f"q{i}": {f"p{i}": 1, f"p{i + 1}": 1} for i in range(5)})


def whole(path: str) -> dict:
    return {"collection": path, "queries": None, "passages": None}
