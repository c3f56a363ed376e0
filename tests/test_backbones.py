from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from diffret_lib.addresses import address
from diffret_lib.cache import cache_dir
from diffret_lib.models import backbones, gguf
from diffret_lib.models.backbones import Backbone, BackboneError, adapter_sha, get_backbone, load_backbone, with_adapter
from diffret_lib.retrieval import workers
from diffret_lib.retrieval.systems import DiffRetriever
from diffret_lib.training.lora import add_lora
from tests.tiny import tiny_backbone, tiny_folder, tiny_model, tiny_spec, tiny_tokenizer

#: Before the tests set their own.
OWN_CACHE, FAST_DTYPE = cache_dir(), backbones.fast_dtype
MEMBER = "package/model.gguf"
CONTENT = b"GGUF: not really"


@pytest.fixture(autouse=True)
def _alone(own_cache, monkeypatch):
    monkeypatch.delenv("DIFFRET_GGUF", raising=False)
    monkeypatch.setattr(backbones, "fast_dtype", lambda device: "float32")


# -- registry


def test_registry_holds_the_embedded_pair():
    names = "smollm2-135m-diffusion", "smollm2-135m-diffusion-text", "smollm2-135m-instruct"
    child, text, parent = map(get_backbone, names)
    assert (child.source.parent, text.source.parent) == (text.name, parent.name)
    for diffusion in (child, text):
        assert (diffusion.family, diffusion.mask_token, diffusion.prediction_shift) == ("diffusion", "<file_sep>", True)
    assert parent.family == "autoregressive" and not parent.prediction_shift
    assert parent.source.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert backbones.adapter_path("smollm2-135m-diffusion").parts[-2:] == ("adapters", "smollm2-135m-diffusion")
    with pytest.raises(ValidationError):
        parent.name = "other"
    for unknown in ("gpt", 5, ["smollm2-135m-instruct"]):
        with pytest.raises(ValueError, match=r"no backbone .*smollm2-135m-instruct"):
            load_backbone(unknown)


@pytest.mark.parametrize(("entry", "message"), [
    ("{family: diffuse, source: {hub: a/b}}", "family"),
    ("{family: autoregressive}", "source"),
    ("{family: autoregressive, source: {url: a}}", "url"),
    ("{family: autoregressive, source: {hub: a/b, path: c}}", "a source is {wheel, member, sha256}"),
    ("{family: autoregressive, source: {parent: a}}", "a source is {wheel, member, sha256}"),
    ("{family: autoregressive, source: {hub: a/b}, colour: red}", "colour"),
    ("&x {family: autoregressive, source: {hub: a/b}}\nmine: *x", "'mine' is given twice"),
    ("{family: autoregressive, source: {wheel: a==1, member: b, sha256: zz}}", "sha256"),
    ("{family: diffusion, source: {hub: a/b}}", "needs a mask_token"),
    ("{family: autoregressive, source: {hub: a/b}, prediction_shift: true}", "neither"),
    ("{family: diffusion, mask_token: m, source: {parent: nobody, adapter: a}}", "no parent 'nobody'"),
    ("{family: diffusion, mask_token: m, source: {parent: mine, adapter: a}}", "no parent 'mine'"),
    ("{family: autoregressive, source: {parent: two, adapter: a}}", "two, stays a diffusion one"),
    ("[1]", "dict"),
    ("\xe9", "not readable"),
])  # fmt: skip
def test_registry_errors_name_file_backbone_and_field(tmp_path, entry, message):
    path = tmp_path / "own.yaml"
    content = f"mine: {entry}\ntwo: {{family: diffusion, mask_token: m, source: {{hub: a/b}}}}\n"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as error:
        backbones.read_registry(path)
    assert "own.yaml" in str(error.value) and (message == "not readable" or "mine" in str(error.value))


# -- loading


def test_load_from_a_folder(folder):
    loaded = tiny_backbone(folder, "autoregressive")
    assert loaded.mask_id is None and loaded.dtype == torch.float32 and loaded.device.type == "cpu"
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer.padding_side == "left" and loaded.tokenizer.pad_token_id is not None
    diffusion = tiny_backbone(folder)
    assert diffusion.tokenizer.convert_ids_to_tokens(diffusion.mask_id) == "<file_sep>"
    with pytest.raises(ValueError, match="no mask token '<nowhere>'"):
        load_backbone(tiny_spec(folder).model_copy(update={"mask_token": "<nowhere>"}))
    with pytest.raises(BackboneError, match=r"has no config\.json"):
        load_backbone(tiny_spec(folder / "nowhere"))


@pytest.mark.parametrize("mask", [None, [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
@pytest.mark.parametrize("family", ["diffusion", "autoregressive"])
def test_attention_is_bidirectional_in_diffusion_only(folder, family, mask):
    loaded = tiny_backbone(folder, family)
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    other = torch.tensor([[7, 8, 9, 10, 12]])
    more = {} if mask is None else {"attention_mask": torch.tensor([mask])}
    with torch.no_grad():
        a, b = (loaded.model.get_decoder()(x, use_cache=False, **more).last_hidden_state[0, 1] for x in (ids, other))
    assert ((a - b).abs().max() > 1e-3) == (family == "diffusion")


def test_dtype_and_fingerprint(folder, tmp_path):
    spec = tiny_spec(folder)
    float32, again, bfloat16 = (load_backbone(spec, dtype=d) for d in ("float32", "auto", "bfloat16"))
    assert bfloat16.dtype == torch.bfloat16
    assert float32.fingerprint == again.fingerprint
    other = tiny_backbone(tmp_path / "other", seed=1)
    unshifted = load_backbone(spec.model_copy(update={"prediction_shift": False}))
    family = tiny_backbone(folder, "autoregressive")
    assert len({b.fingerprint for b in (float32, bfloat16, other, unshifted, family)}) == 5
    assert float32.weights == bfloat16.weights == unshifted.weights == family.weights != other.weights
    # what it is called and where it lies changes nothing
    moved = tiny_spec(tiny_folder(tmp_path / "moved")).model_copy(update={"name": "b"})
    assert load_backbone(moved).fingerprint == float32.fingerprint
    for wrong in ("int8", torch.float32, None):
        with pytest.raises(ValueError, match="dtype must be one of auto, float32"):
            load_backbone(spec, dtype=wrong)
    with pytest.raises(ValueError, match="adapter must be a folder, or 'none', not 5"):
        load_backbone(spec, adapter=5)


def test_a_loaded_backbone_stays_as_it_is(folder):
    loaded = tiny_backbone(folder)
    assert load_backbone(loaded) is loaded and load_backbone(loaded, dtype="float32") is loaded
    for other in ({"dtype": "bfloat16"}, {"adapter": folder}, {"device": "cpu"}):
        with pytest.raises(ValueError, match=r"tiny-diffusion is loaded already, in torch\.float32"):
            load_backbone(loaded, **other)
    with pytest.raises(ValueError, match="a loaded backbone and a folder are needed, not 5"):
        with_adapter(5, folder)


@pytest.mark.parametrize(("seconds", "expected"), [(0.4, "bfloat16"), (0.6, "float32")])
def test_the_fast_dtype_is_measured_once(monkeypatch, seconds, expected):
    """bfloat16 where its product takes at most half the time (here: 0.4 and 0.6 of float32's)."""
    clock, products = [0.0], []

    def product(self, other):
        products.append(self.dtype)
        clock[0] += 1.0 if self.dtype == torch.float32 else seconds
        return self

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr(backbones.time, "perf_counter", lambda: clock[0])
    for _ in range(2):
        FAST_DTYPE.cache_clear()
        assert FAST_DTYPE("cpu") == expected
    assert len(products) == 12  # the second process finds it in the cache
    assert FAST_DTYPE("mps") == "float32"
    for has, name in ((True, "bfloat16"), (False, "float32")):  # of itself, not emulated as on a T4
        FAST_DTYPE.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert FAST_DTYPE("cuda") == name
    FAST_DTYPE.cache_clear()


def test_all_files_of_a_model_folder_count(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    found, template = [load_backbone(tiny_spec(tmp_path / "model")).weights], tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", "<|im_end|> "))
    found.append(load_backbone(tiny_spec(tmp_path / "model")).weights)
    (tmp_path / "model" / "model.safetensors").unlink()
    for seed in (0, 1):
        tensors = tiny_model(len(tiny_tokenizer()), seed).state_dict()
        torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
        found.append(load_backbone(tiny_spec(tmp_path / "model")).weights)
    assert len(set(found)) == 4


# -- adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A random adapter of the kind the diffusion backbone has."""
    model = tiny_model(len(tiny_tokenizer()))
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", trainable_token_indices={"embed_tokens": [5]},
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        adapted = peft.get_peft_model(model, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(path)
    backbones.make_bidirectional(adapted.get_base_model())
    return path, adapted.eval()


def test_adapter_is_merged(folder, adapter):
    path, adapted = adapter
    loaded = load_backbone(tiny_spec(folder), adapter=path)
    ids = torch.tensor([[7, 5, 9, 5, 11]])
    with torch.no_grad():
        expected = adapted(ids, use_cache=False).logits
        found = loaded.model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    bare = load_backbone(tiny_spec(folder), adapter="none")
    assert (bare.model(ids).logits - found).abs().max() > 0.1
    assert bare.fingerprint != loaded.fingerprint and bare.weights != loaded.weights
    further = with_adapter(bare, path)
    assert torch.equal(further.model(ids, use_cache=False).logits, found) and further.weights == loaded.weights
    # the embeddings stay tied, and differ at the mask alone
    embedding, before = (backbone.model.get_input_embeddings().weight for backbone in (loaded, bare))
    assert loaded.model.get_output_embeddings().weight is embedding
    assert (embedding != before).any(1).nonzero().ravel().tolist() == [loaded.mask_id]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with a C++ compiler")
def test_compiled_layers_give_the_same_vectors(folder):
    bare = load_backbone(tiny_spec(folder))
    texts = ["a heap", "a sorted copy of an array along the given axis", "eigenvalues"]
    faster = backbones.compiled(bare)
    assert (faster.weights, faster.spec) == (bare.weights, bare.spec) and faster.fingerprint != bare.fingerprint
    for batch_tokens in (1, 4096):  # alone, and together with padding
        systems = [DiffRetriever(loaded, k_passage=2, batch_tokens=batch_tokens) for loaded in (bare, faster)]
        eager, found = (system.encode_passages(texts, progress=False) for system in systems)
        torch.testing.assert_close(torch.from_numpy(found.dense), torch.from_numpy(eager.dense), atol=1e-5, rtol=0)
    layers = [loaded.model.get_decoder().layers[0] for loaded in (bare, faster)]
    assert [layer._compiled_call_impl is not None for layer in layers] == [False, True]


def test_a_compiled_backbone_is_not_copied_into_one_that_is_not(folder, adapter, monkeypatch):
    faster = backbones.compiled(load_backbone(tiny_spec(folder)))
    monkeypatch.setenv("WORKERS", "2")
    monkeypatch.setattr(workers, "_connected", lambda asked: pytest.fail("Ray was started"))
    copies = [
        lambda: with_adapter(faster, adapter[0]), lambda: add_lora(faster, rank=2, alpha=2, seed=0),
        lambda: workers.spread(DiffRetriever(faster), print, 4, 2, "texts"),
    ]  # fmt: skip
    for copied in copies:
        with pytest.raises(ValueError, match="is compiled, and a copy of it would not be: compile it last"):
            copied()


def test_adapters_of_parents_are_merged_in_order(folder, adapter, tmp_path, monkeypatch):
    """A backbone whose parent has a parent and an adapter, as one adapter after the other."""
    base = tiny_backbone(folder)
    first = with_adapter(base, changed(adapter[0], tmp_path / "first", base=base.weights, attention="bidirectional"))
    expected = with_adapter(first, changed(adapter[0], tmp_path / "second", base=first.weights))
    own = {"family": "diffusion", "mask_token": "<file_sep>", "prediction_shift": True}
    registry = {
        "root": tiny_spec(folder, "autoregressive"),
        "text": Backbone(source={"parent": "root", "adapter": str(tmp_path / "first")}, **own),
        "whole": Backbone(source={"parent": "text", "adapter": str(tmp_path / "second")}, **own),
    }
    monkeypatch.setattr(backbones, "read_registry", lambda: registry)
    ids = torch.tensor([[7, 5, 9, 5, 11]])
    for name, adapter_option, same in (("whole", None, expected), ("whole", "none", first), ("text", "none", base)):
        found = load_backbone(name, adapter=adapter_option)
        assert found.weights == same.weights
        torch.testing.assert_close(found.model(ids, use_cache=False).logits, same.model(ids, use_cache=False).logits)
    with pytest.raises(BackboneError, match=r"second does not fit root"):  # it belongs on the first one
        load_backbone("text", adapter=tmp_path / "second")


def test_missing_adapter(folder, adapter, tmp_path, monkeypatch):
    with pytest.raises(BackboneError, match=r"has no adapter_config\.json.*save_pretrained"):
        load_backbone(tiny_spec(folder), adapter=tmp_path / "nowhere")
    registry = {"parent": tiny_spec(folder, "autoregressive"), "child": Backbone(
        family="diffusion", mask_token="<file_sep>", source={"parent": "parent", "adapter": "nowhere"}
    )}  # fmt: skip
    monkeypatch.setattr(backbones, "read_registry", lambda: registry)
    with pytest.raises(BackboneError, match=r"the adapter .*nowhere has no adapter_config"):
        load_backbone("child")


def changed(adapter: Path, target: Path, change=lambda tensors: None, **metadata: str) -> Path:
    """A copy of an adapter whose tensors or metadata differ."""
    target.mkdir()
    (target / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors", {"format": "pt", **metadata})
    return target


def test_an_adapter_is_merged_into_its_base_only(folder, adapter, tmp_path, caplog):
    base, other = tiny_backbone(folder), tiny_backbone(tmp_path / "other", seed=1)
    named = changed(adapter[0], tmp_path / "named", base=base.weights, base_name="tiny-diffusion")
    assert adapter_sha(named) == adapter_sha(adapter[0])  # the metadata are no part of the model
    with caplog.at_level(logging.WARNING):
        merged = with_adapter(base, named)
        assert merged.weights == load_backbone(base.spec, adapter=named).weights and not caplog.records
        load_backbone(base.spec, adapter=adapter[0])
    assert [r.message for r in caplog.records if "unknown" in r.message] == [
        f"the base of the adapter {adapter[0]} is unknown; its tensors fit tiny-diffusion"
    ]
    for wrong in (other, merged):
        shas = f"{base.weights[:12]}.* is tiny-diffusion .*{wrong.weights[:12]}"
        with pytest.raises(BackboneError, match=f"on tiny-diffusion .*{shas}"):
            with_adapter(wrong, named)
    one_way = changed(adapter[0], tmp_path / "one", base=base.weights, base_name="tiny", attention="bidirectional")
    with_adapter(base, one_way)
    with pytest.raises(BackboneError, match=r"attention bidirectional\), and this is tiny-autoregressive .*causal"):
        load_backbone(tiny_spec(folder, "autoregressive"), adapter=one_way)


FAULTS = {
    "missing": (lambda t: t.pop(max(t)), r"1 tensors are missing.*layers\.1"),
    "unexpected": (lambda t: t.update({max(t).replace("layers.1", "layers.7"): t[max(t)].clone()}), r"1 tens.*s\.7"),
    "not finite": (lambda t: t[max(t)].view(-1)[3:4].fill_(float("nan")), r"1 tensors are .*not finite.*layers\.1"),
    "another shape": (lambda t: t.update({max(t): t[max(t)][:1].clone()}), "size mismatch"),
    "cut": (lambda t: None, "the adapter .*bad does not fit"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_whose_tensors_do_not_fit(folder, adapter, tmp_path, fault):
    change, message = FAULTS[fault]
    bad = changed(adapter[0], tmp_path / "bad", change)
    if fault == "cut":
        weights = bad / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(BackboneError, match=message):
        load_backbone(tiny_spec(folder), adapter=bad)


def test_adapter_sha_covers_weights_and_merge_settings(adapter, tmp_path):
    def scale(tensors):
        tensors[max(tensors)].mul_(2)

    same, rescaled = (changed(adapter[0], tmp_path / name) for name in "ab")
    other = changed(adapter[0], tmp_path / "c", scale)
    config = json.loads((rescaled / "adapter_config.json").read_text())
    (rescaled / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9}))
    (same / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    shas = [adapter_sha(path) for path in (adapter[0], same, other, rescaled)]
    assert shas[0] == shas[1] and len(set(shas)) == 3 and adapter_sha(None) is None


# -- fetching and converting


@pytest.fixture
def spec():
    sha = hashlib.sha256(CONTENT).hexdigest()
    return Backbone(
        name="small", family="autoregressive", source={"wheel": "package==1.0", "member": MEMBER, "sha256": sha}
    )


def make_wheel(folder: Path, content: bytes = CONTENT, member: str = MEMBER) -> Path:
    """A wheel that pip takes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "package-1.0-py3-none-any.whl"
    info = "package-1.0.dist-info"
    files = {
        member: content, f"{info}/RECORD": "",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: package\nVersion: 1.0\nRequires-Dist: nowhere\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }  # fmt: skip
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


@pytest.fixture
def conversions(monkeypatch, folder):
    """Converting writes the tiny model; counts the calls."""
    calls = []

    def convert(gguf: Path, target: Path) -> None:
        calls.append(gguf.read_bytes())
        tiny_tokenizer().save_pretrained(target)
        tiny_model(len(tiny_tokenizer())).save_pretrained(target)

    monkeypatch.setattr(gguf, "convert_gguf", convert)
    return calls


def converted(spec: Backbone) -> Path:
    return gguf.converted_model(spec.source.wheel, spec.source.member, spec.source.sha256)


def left_in_cache(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache" / "backbones").rglob("*") if not p.name.endswith(".lock"))


@pytest.fixture
def local_index(monkeypatch, tmp_path):
    """pip finds packages in a folder and nowhere else."""
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path / "index"), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def test_downloaded_once_by_pip_without_requirements(spec, local_index, conversions, tmp_path, monkeypatch):
    commands, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **more: commands.append(command) or run(command, **more))
    make_wheel(local_index)
    path = converted(spec)
    assert conversions == [CONTENT] and (path / "model.safetensors").exists()
    assert converted(spec) == path and len(conversions) == 1
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command and command[-1] == "package==1.0"
    assert load_backbone(spec).model.config.hidden_size == 32
    # neither wheel nor GGUF is kept
    assert not [n for n in left_in_cache(tmp_path) if n.endswith((".whl", ".gguf")) or n.startswith(("tmp", "."))]


def test_no_network_names_what_failed_and_the_way_out(spec, local_index, conversions, tmp_path):
    with pytest.raises(BackboneError, match=r"pip could not download package==1\.0") as error:
        converted(spec)
    assert "No matching distribution" in str(error.value) and "DIFFRET_GGUF" in str(error.value)
    assert not conversions and not left_in_cache(tmp_path)


def test_corrupt_or_foreign_wheel_shows_why_and_keeps_nothing(spec, monkeypatch, conversions, tmp_path):
    given = tmp_path / "given"
    monkeypatch.setenv("DIFFRET_GGUF", str(make_wheel(given, b"GGUF: cut")))
    with pytest.raises(BackboneError, match="corrupt") as error:
        converted(spec)
    assert spec.source.sha256 in str(error.value) and hashlib.sha256(b"GGUF: cut").hexdigest() in str(error.value)
    make_wheel(given, member="package/other.gguf")
    with pytest.raises(BackboneError, match=r"another wheel: package/model\.gguf"):
        converted(spec)
    assert not conversions and not left_in_cache(tmp_path)
    make_wheel(given)
    assert (converted(spec) / "config.json").exists()


@pytest.mark.parametrize("form", ["wheel", "gguf"])
def test_wheel_or_gguf_given_by_hand(spec, form, monkeypatch, conversions, tmp_path):
    given = make_wheel(tmp_path)
    if form == "gguf":
        given = tmp_path / "any name.gguf"
        given.write_bytes(CONTENT)
    monkeypatch.setenv("DIFFRET_GGUF", str(given))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    converted(spec)
    assert conversions == [CONTENT] and given.exists()
    monkeypatch.setenv("DIFFRET_GGUF", str(tmp_path / "nowhere"))
    monkeypatch.setenv("DIFFRET_CACHE", str(tmp_path / "cache2"))
    with pytest.raises(BackboneError, match="no such file"):
        converted(spec)


EMBEDDED = OWN_CACHE / "backbones" / address([gguf.convert_gguf], get_backbone("smollm2-135m-instruct").source.sha256)
embedded = pytest.mark.skipif(not EMBEDDED.exists(), reason="the embedded model is not cached")


@pytest.mark.slow
@embedded
def test_embedded_model_is_what_it_should_be(monkeypatch):
    monkeypatch.setenv("DIFFRET_CACHE", str(OWN_CACHE))
    loaded = load_backbone("smollm2-135m-instruct", device="cpu")
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        answer = loaded.tokenizer.decode(loaded.model(ids).logits[0, -1].argmax())
    assert answer == " Paris"
    said = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert said.endswith("<|im_start|>user\nx<|im_end|>\n")


@pytest.mark.slow
@embedded
def test_shipped_adapters_name_their_bases(monkeypatch, caplog):
    monkeypatch.setenv("DIFFRET_CACHE", str(OWN_CACHE))
    with caplog.at_level(logging.WARNING):
        load_backbone("smollm2-135m-diffusion", device="cpu")
    assert not [r for r in caplog.records if "unknown" in r.message]
    with pytest.raises(BackboneError, match="bidirectional"):
        load_backbone("smollm2-135m-instruct", device="cpu", adapter=backbones.adapter_path("smollm2-135m-diffusion"))


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 5.5, "no such"])
def test_a_device_that_is_not_here(folder, device):
    with pytest.raises(ValueError, match="device must be cpu.* here, not "):
        load_backbone(tiny_spec(folder), device=device)
