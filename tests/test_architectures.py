"""Dream and LLaDA from checkpoints in the hub's layout: names, settings, shards, tokenizers, adapters and errors."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from torch.nn import functional as F

from diffret_lib.addresses import fingerprint
from diffret_lib.models.architectures import LLADA_FIXED, LLaDAConfig
from diffret_lib.models.backbones import Backbone, BackboneError, get_backbone, load_backbone
from diffret_lib.models.prompts import encode_plain
from diffret_lib.models.readers import MaskedPositions
from diffret_lib.models.released import RELEASED, released_adapter
from diffret_lib.retrieval.systems import DiffRetriever
from tests.tiny import CHATML, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")
HIDDEN, HEADS, KV_HEADS, MLP, LAYERS = 32, 4, 2, 48, 2
TEXTS = ["heap", "Return a sorted copy of an array along the given axis, 2048 bytes.", "A heap is a binary tree"]

# -- checkpoints as the hub has them --------------------------------------------------------------------------

#: Names of the tensors by role; "{}" is the layer.
NAMES = {
    "dream": {
        "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
        "norm_1": "model.layers.{}.input_layernorm", "norm_2": "model.layers.{}.post_attention_layernorm",
        **{x: f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkvo"},
        **{x: f"model.layers.{{}}.mlp.{x}_proj" for x in ("gate", "up", "down")},
    },
    "llada": {
        "embed": "model.transformer.wte", "norm": "model.transformer.ln_f", "head": "model.transformer.ff_out",
        "norm_1": "model.transformer.blocks.{}.attn_norm", "norm_2": "model.transformer.blocks.{}.ff_norm",
        **{x: f"model.transformer.blocks.{{}}.{x}_proj" for x in "qkv"}, "o": "model.transformer.blocks.{}.attn_out",
        "gate": "model.transformer.blocks.{}.ff_proj", "up": "model.transformer.blocks.{}.up_proj",
        "down": "model.transformer.blocks.{}.ff_out",
    },
}  # fmt: skip
ROWS = 420  # of the embeddings; the vocabularies are smaller
SHAPES = {
    "embed": (ROWS, HIDDEN), "norm": (HIDDEN,), "head": (ROWS, HIDDEN), "norm_1": (HIDDEN,), "norm_2": (HIDDEN,),
    "q": (HIDDEN, HIDDEN), "k": (HIDDEN // 2, HIDDEN), "v": (HIDDEN // 2, HIDDEN), "o": (HIDDEN, HIDDEN),
    "gate": (MLP, HIDDEN), "up": (MLP, HIDDEN), "down": (HIDDEN, MLP),
}  # fmt: skip
CONFIGS = {
    "dream": {
        "architectures": ["DreamModel"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel",
                     "AutoModelForCausalLM": "modeling_dream.DreamModel"},
        "hidden_act": "silu", "hidden_size": HIDDEN, "initializer_range": 0.02, "intermediate_size": MLP,
        "mask_token_id": 151666, "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "Dream",
        "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "num_key_value_heads": KV_HEADS,
        "pad_token_id": 5, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.46.2", "use_cache": True, "use_sliding_window": False, "vocab_size": ROWS,
    },
    "llada": {
        "activation_type": "silu", "architectures": ["LLaDAModelLM"], "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM",
                     "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
        "alibi_bias_max": 8.0, "attention_layer_norm_with_affine": True, "embedding_dropout": 0.0, "d_model": HIDDEN,
        "embedding_size": ROWS, "eos_token_id": 126081, "flash_attention": False, "init_cutoff_factor": None,
        "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02, "layer_norm_with_affine": True,
        "mask_token_id": 126336, "max_sequence_length": 4096, "mlp_hidden_size": MLP, "mlp_ratio": 4,
        "model_type": "llada", "multi_query_attention": None, "n_heads": HEADS, "n_kv_heads": KV_HEADS,
        "n_layers": LAYERS, "pad_token_id": 5, "precision": "amp_bf16", "residual_dropout": 0.0,
        "rms_norm_eps": 1e-5, "rope_full_precision": True, "rope_theta": 500000.0, "transformers_version": "4.46.3",
        "use_cache": False, "vocab_size": ROWS - 10, "weight_tying": False, **LLADA_FIXED,
    },
}  # fmt: skip
LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ADDED = {
    "dream": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"],
    "llada": ["<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|start_header_id|>", "<|end_header_id|>",
              "<|eot_id|>"],
}  # fmt: skip
TOKENIZER_CONFIGS = {
    "dream": {
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}, "tokenizer_class": "DreamTokenizer",
        "bos_token": "<|beginoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": None,
        "mask_token": "<|mask|>", "chat_template": CHATML, "add_prefix_space": False, "errors": "replace",
    },
    "llada": {
        "add_bos_token": False, "add_eos_token": False, "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>", "fast_tokenizer": True, "trust_remote_code": True, "chat_template": LLAMA_3,
        "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"],
    },
}  # fmt: skip
MASKS = {"dream": "<|mask|>", "llada": "<|mdm_mask|>"}
KINDS = list(CONFIGS)


def write_tokenizer(kind: str, folder: Path) -> None:
    """Dream: vocab.json and merges.txt.  LLaDA: tokenizer.json, which would put the start token before every text."""
    bpe = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    first = len(bpe["model"]["vocab"])
    added = {first + i: {"content": token, "special": True} for i, token in enumerate(ADDED[kind])}
    added = {i: t | dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False) for i, t in added.items()}
    if kind == "dream":
        (folder / "vocab.json").write_text(json.dumps(bpe["model"]["vocab"]))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, bpe["model"]["merges"])]))
    else:
        bpe["added_tokens"] = [{"id": i} | token for i, token in added.items()]
        tokenizer = Tokenizer.from_str(json.dumps(bpe))
        start = ("<|startoftext|>", first)
        tokenizer.post_processor = processors.TemplateProcessing("<|startoftext|> $A", special_tokens=[start])
        tokenizer.save(str(folder / "tokenizer.json"))
    config = TOKENIZER_CONFIGS[kind] | {"added_tokens_decoder": {str(i): token for i, token in added.items()}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def random_tensors(kind: str) -> dict[str, torch.Tensor]:
    random, tensors = torch.Generator().manual_seed(7), {}
    for role, shape in SHAPES.items():
        for layer in range(LAYERS) if "{}" in NAMES[kind][role] else [0]:
            name = NAMES[kind][role].format(layer)
            noise = torch.randn(shape, generator=random)
            tensors[f"{name}.weight"] = 1 + 0.1 * noise if len(shape) == 1 else 0.3 * noise
            if kind == "dream" and role in "qkv":
                tensors[f"{name}.bias"] = torch.randn(shape[0], generator=random)
    return tensors


def write_checkpoint(kind: str, folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config) -> Path:
    """A model folder with two shards and their index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind] | config))
    generation = {"_from_model_config": True, "eos_token_id": 5, "mask_token_id": 6, "steps": 512, "alg": "entropy"}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    write_tokenizer(kind, folder)
    tensors = random_tensors(kind) if tensors is None else tensors
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in sorted(set(places.values())):
        save_file({n: t for n, t in tensors.items() if places[n] == shard}, folder / shard, {"format": "pt"})
    index = {"metadata": {"total_size": sum(4 * t.numel() for t in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def spec(kind: str, **source) -> Backbone:
    shift = kind == "dream"
    return Backbone(name=kind, family="diffusion", source=source, mask_token=MASKS[kind], prediction_shift=shift)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: write_checkpoint(kind, tmp_path_factory.mktemp("hub") / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def loaded(folders):
    return {k: load_backbone(spec(k, path=folders[k]), dtype="float32", device="cpu") for k in KINDS}


# -- the independent computation ------------------------------------------------------------------------------


def plain_forward(kind: str, tensors: dict[str, torch.Tensor], ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states after the last norm and logits, both float64 [length, ...]; every position sees every other."""
    theta, eps = CONFIGS[kind]["rope_theta"], CONFIGS[kind]["rms_norm_eps"]
    size = HIDDEN // HEADS

    def weight(role, layer=0):
        return tensors[NAMES[kind][role].format(layer) + ".weight"].double()

    def linear(x, role, layer):
        bias = tensors.get(NAMES[kind][role].format(layer) + ".bias")
        return x @ weight(role, layer).T + (0 if bias is None else bias.double())

    def norm(x, role, layer=0):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight(role, layer)

    def rotate(x):  # [heads, length, size]; the first half of a head goes with the second
        angles = torch.arange(len(ids)).double()[:, None] * theta ** (-torch.arange(0, size, 2).double() / size)
        first, second = x[..., : size // 2], x[..., size // 2 :]
        turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
        return torch.cat(turned, -1)

    x = weight("embed")[ids]
    for layer in range(LAYERS):
        h = norm(x, "norm_1", layer)
        q, k, v = (linear(h, role, layer).view(len(ids), -1, size).transpose(0, 1) for role in "qkv")
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 0) for t in (rotate(k), v))
        seen = (rotate(q) @ k.transpose(1, 2) / math.sqrt(size)).softmax(-1) @ v
        x = x + linear(seen.transpose(0, 1).reshape(len(ids), HIDDEN), "o", layer)
        h = norm(x, "norm_2", layer)
        gate = linear(h, "gate", layer)
        x = x + linear(gate * gate.sigmoid() * linear(h, "up", layer), "down", layer)
    x = norm(x, "norm")
    return x, x @ weight("head").T


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def reader(backbone, k: int = 4) -> MaskedPositions:
    shift = backbone.spec.prediction_shift
    more = {"mask_id": backbone.mask_id, "prediction_shift": shift, "k_query": k, "k_passage": k}
    return MaskedPositions(backbone.model, backbone.tokenizer, **more).eval()


# -- loading --------------------------------------------------------------------------------------------------


def test_states_and_logits_are_those_of_a_plain_computation(loaded, kind):
    """Also of a text that is padded beside a longer one."""
    own = reader(loaded[kind])
    features = own.preprocess(TEXTS, task="query")
    with torch.no_grad():
        hidden = own.body(features["input_ids"], features["attention_mask"])
        logits = loaded[kind].model.get_output_embeddings()(hidden)
        out = own(features)
    for i, mask in enumerate(features["attention_mask"].bool()):
        ids = features["input_ids"][i, mask].tolist()
        expected = plain_forward(kind, random_tensors(kind), ids)
        assert relative(hidden[i, mask], expected[0]) < 1e-4 and relative(logits[i, mask], expected[1]) < 1e-4
        first = len(ids) - 3 - 4 - own.prediction_shift  # the tail, the masks
        vectors = out["token_embeddings"][i][out["attention_mask"][i].bool()]
        assert relative(vectors, F.normalize(expected[0][first : first + len(vectors)], dim=-1)) < 1e-4


def test_no_code_but_ours_runs(loaded, kind):
    model, tokenizer = loaded[kind].model, loaded[kind].tokenizer
    assert type(model).__module__ == "diffret_lib.models.architectures" and model.config.auto_map
    assert not model.config.is_causal and loaded[kind].mask_id == tokenizer.convert_tokens_to_ids(MASKS[kind])
    text = "Ärger, 2048 <heap>"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.tokenize("2048") == list("2048") or kind == "llada"  # Qwen2 splits digits, and it has no file
    assert loaded[kind].mask_id not in encode_plain(tokenizer, [MASKS[kind]])[0]  # spelled out in a text
    for name in ("dream-v0-instruct-7b", "llada-8b-instruct", "llada-1.5"):
        assert get_backbone(name).mask_token in MASKS.values()
        assert get_backbone(name).prediction_shift == name.startswith("dream")


def test_padding_changes_no_representation(loaded, kind):
    retriever = DiffRetriever(loaded[kind], k_query=4, k_passage=4)
    together = retriever.encode_passages(TEXTS, progress=False)
    for i, text in enumerate(TEXTS):
        alone = retriever.encode_passages([text], progress=False)
        assert alone.lengths[0] == together.lengths[i]
        cosines = (alone.dense[0] * together.dense[i]).sum(-1)[: alone.lengths[0]]
        assert cosines.min() >= 0.9999
        np.testing.assert_allclose(alone.sparse.toarray()[0], together.sparse.toarray()[i], atol=1e-4)


def test_llada_begins_with_its_start_token_once(loaded):
    own = reader(loaded["llada"])
    row = own.preprocess(["priority queue"], task="query")["input_ids"][0].tolist()
    text = own.tokenizer.decode(row)
    assert text.startswith(
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nYou are an AI assistant that can understand "
        'human language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQuery: "priority queue". Use a few words'
    )
    assert row.count(own.tokenizer.bos_token_id) == 1 and row.count(loaded["llada"].mask_id) == 4
    assert text.endswith('The words are: "' + 4 * "<|mdm_mask|>" + '"<|eot_id|><|endoftext|>')


def test_a_saved_reader_loads_again(loaded, kind, tmp_path):
    own = reader(loaded[kind])
    own.save(str(tmp_path))
    assert set(load_file(tmp_path / "model.safetensors")) == set(random_tensors(kind))  # the names of the hub
    again = MaskedPositions.load(str(tmp_path))
    outputs = [r(r.preprocess(TEXTS[:1]))["token_embeddings"] for r in (own, again.eval())]
    assert type(again.model) is type(own.model) and torch.equal(*outputs)


# -- errors ---------------------------------------------------------------------------------------------------


#: What is done to the tensors and the name of one of them, and what is said.
FAULTS = {
    "missing": (lambda t, name: t.pop(name), r"fit its config.json: .*layers\.1\.mlp\.down_proj\.weight is missing"),
    "unexpected": (lambda t, name: t.update({"more.weight": t[name].clone()}), r"more\.weight is unexpected"),
    "shape": (lambda t, name: t.update({name: t[name][:8].clone()}), r"weight has the shape \(8, 48\), not \(32, 48\)"),
    "of another model": (lambda t, name: [t.update({f"x.{n}": t.pop(n)}) for n in list(t)],
                         r"x\.\S+ is unexpected|is missing.*, and \d+ more"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_whose_tensors_do_not_fit(kind, fault, tmp_path):
    change, message = FAULTS[fault]
    tensors = random_tensors(kind)
    change(tensors, NAMES[kind]["down"].format(1) + ".weight")
    with pytest.raises(BackboneError, match=message):
        load_backbone(spec(kind, path=write_checkpoint(kind, tmp_path / "bad", tensors)))


def test_a_shard_is_cut_or_not_there(tmp_path):
    folder = write_checkpoint("llada", tmp_path / "bad")
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(BackboneError, match=r"llada: cannot load .*bad"):
        load_backbone(spec("llada", path=folder))
    shard.unlink()
    with pytest.raises(BackboneError, match=r"model-00002-of-00002\.safetensors"):
        load_backbone(spec("llada", path=folder))


@pytest.mark.parametrize("name", LLADA_FIXED)
def test_settings_that_llama_does_not_have(name):
    with pytest.raises(ValueError, match=f"LLaDA is loaded with {name} "):
        LLaDAConfig(**{name: "other"})
    assert LLaDAConfig(**{name: None, "d_model": 64}).head_dim == 2


def test_mask_token_and_chat_template_are_there(folders, tmp_path):
    with pytest.raises(ValueError, match=r"the vocabulary has no mask token '<\|mask\|>'"):
        load_backbone(spec("llada", path=folders["llada"]).model_copy(update={"mask_token": "<|mask|>"}))
    folder = write_checkpoint("llada", tmp_path / "bare")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": None}))
    with pytest.raises(ValueError, match="chat_template is not set"):
        DiffRetriever(load_backbone(spec("llada", path=folder)))


# -- the hub --------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(folders, monkeypatch, tmp_path):
    """A server that answers as the hub does: one repository with the branch main, one that is gated."""
    paths = list(folders["llada"].iterdir())
    files = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name} for p in paths]

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
            repository, _, rest = path.partition("/llada/")
            revision, _, name = rest.partition("/")[2].partition("/")
            fault = None if revision in ("main", COMMIT) else "RevisionNotFound"
            fault = "GatedRepo" if repository == "gated" else fault
            path, about = folders["llada"] / name, files if "tree" in rest else {"id": "open/llada", "sha": COMMIT}
            if not fault and name and not path.is_file():
                fault = "EntryNotFound"
            body = b"" if fault else path.read_bytes() if name else json.dumps(about).encode()
            self.send_response({None: 200, "GatedRepo": 401}.get(fault, 404))
            more = {"X-Error-Code": fault, "X-Error-Message": fault} if fault else {"ETag": f'"{name}"'}
            for header, value in {**more, "X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    yield
    server.shutdown()
    server.server_close()


def test_a_model_of_the_hub_and_its_errors(hub, loaded):
    found = load_backbone(spec("llada", hub="open/llada"), dtype="float32", device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(found.model(ids).logits, loaded["llada"].model(ids).logits)
    pinned = load_backbone(spec("llada", hub="open/llada", revision=COMMIT), dtype="float32", device="cpu")
    assert pinned.weights == fingerprint(f"open/llada@{COMMIT}")
    with pytest.raises(BackboneError, match=r"llada: cannot load gated/llada: .*gated repo.*"):
        load_backbone(spec("llada", hub="gated/llada"))
    with pytest.raises(BackboneError, match=r"v9 is not a valid git identifier"):
        load_backbone(spec("llada", hub="open/llada", revision="v9"))


def test_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(BackboneError, match=r"(?s)cannot load other/llada.*can be downloaded elsewhere"):
        load_backbone(spec("llada", hub="other/llada"))
    with pytest.raises(BackboneError, match=r"llada-8b-single: cannot load the adapter ielabgroup/"):
        released_adapter("llada-8b-single")


# -- released adapters ----------------------------------------------------------------------------------------

LORA = ("head", "q", "k", "v", "o", "gate", "up", "down")


def write_adapter(kind: str, folder: Path, **settings) -> dict[str, torch.Tensor]:
    """An adapter of the authors' code, on every linear layer; returns the weights into which it is merged."""
    folder.mkdir()
    random, merged, adapter = torch.Generator().manual_seed(9), random_tensors(kind), {}
    for role in LORA:
        for layer in range(LAYERS) if "{}" in NAMES[kind][role] else [0]:
            name, (rows, columns) = NAMES[kind][role].format(layer), SHAPES[role]
            a, b = (0.2 * torch.randn(shape, generator=random) for shape in ((2, columns), (rows, 2)))
            adapter |= {f"base_model.model.{name}.lora_{x}.weight": t for x, t in (("A", a), ("B", b))}
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + 8 / 2 * b @ a
    modules = sorted({NAMES[kind][role].rpartition(".")[2] for role in LORA})
    origin = {"base_model_class": "LLaDAModelLM", "parent_library": "modeling_llada"}
    config = {"peft_type": "LORA", "task_type": None, "r": 2, "lora_alpha": 8, "target_modules": modules}
    save_file(adapter, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config | {"auto_mapping": origin} | settings))
    return merged


def test_a_released_adapter_is_merged_under_our_names(loaded, kind, tmp_path):
    tensors = write_adapter(kind, tmp_path / "adapter")
    name = {"dream": "dream-7b-single", "llada": "llada-8b-single"}[kind]
    folder = released_adapter(name, tmp_path / "adapter")
    assert (folder == tmp_path / "adapter") == (kind == "dream")
    assert released_adapter(name, tmp_path / "adapter") == folder  # from the cache
    adapted = DiffRetriever(loaded[kind]).with_adapter(folder).backbone
    ids = [7, 8, 9, 10, 7]
    with torch.no_grad():
        logits = adapted.model(torch.tensor([ids]), use_cache=False, is_causal=False).logits[0]
    assert relative(logits, plain_forward(kind, tensors, ids)[1]) < 1e-4
    assert relative(logits, plain_forward(kind, random_tensors(kind), ids)[1]) > 0.1


def test_a_released_adapter_that_does_not_fit(loaded, tmp_path):
    for entry in RELEASED.values():
        retriever = DiffRetriever(loaded["dream"], **entry.options)
        assert get_backbone(entry.backbone).family == "diffusion" and not retriever.reader.prediction_shift
        assert tuple(map(retriever.vectors, ("query", "passage"))) == entry.pair
    with pytest.raises(ValueError, match=r"no released adapter 'mine'.*llada-8b-multi"):
        released_adapter("mine")
    with pytest.raises(BackboneError, match="adapter_config"):
        released_adapter("llada-8b-multi", tmp_path)
    write_adapter("llada", tmp_path / "patterns", alpha_pattern={"q_proj": 4})
    with pytest.raises(BackboneError, match="sets alpha_pattern, which cannot be renamed"):
        released_adapter("llada-8b-multi", tmp_path / "patterns")
    write_adapter("llada", tmp_path / "deep")
    weights = tmp_path / "deep" / "adapter_model.safetensors"
    tensors = {key.replace("blocks.1", "blocks.7"): tensor for key, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(BackboneError, match=r"does not fit llada.*layers\.7"):
        DiffRetriever(loaded["llada"]).with_adapter(released_adapter("llada-8b-multi", tmp_path / "deep"))
