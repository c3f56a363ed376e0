from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
import threading
import warnings
import zipfile
from collections import namedtuple
from pathlib import Path

import peft
import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_backbone, tiny_folder, tiny_model, tiny_spec, tiny_tokenizer

from diffret_lib import backbones
from diffret_lib.backbones import (
    AdapterSource,
    Backbone,
    BackboneError,
    adapter_path,
    backbone_names,
    converted_folder,
    get_backbone,
    load_backbone,
    read_registry,
)
from diffret_lib.cache import cache_dir

#: Before the tests set their own.
OWN_CACHE = cache_dir()
MEMBER = "package/model.gguf"
CONTENT = b"GGUF: not really"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFRET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DIFFRET_GGUF", raising=False)


# -- registry


def test_registry_holds_the_embedded_pair():
    assert {"smollm2-135m-instruct", "smollm2-135m-diffusion"} <= set(backbone_names())
    child = get_backbone("smollm2-135m-diffusion")
    assert (child.family, child.mask_token, child.prediction_shift) == ("diffusion", "<file_sep>", True)
    assert isinstance(child.source, AdapterSource) and child.source.parent == "smollm2-135m-instruct"
    parent = get_backbone(child.source.parent)
    assert parent.family == "autoregressive" and not parent.prediction_shift
    assert parent.source.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert adapter_path("smollm2-135m-diffusion").parts[-2:] == ("adapters", "smollm2-135m-diffusion")


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="no backbone 'gpt'.*smollm2-135m-instruct"):
        load_backbone("gpt")


def test_a_backbone_is_frozen():
    with pytest.raises(ValidationError):
        get_backbone("smollm2-135m-instruct").name = "other"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{family: diffuse, source: {hub: a/b}}", "family"),
        ("{family: autoregressive}", "source"),
        ("{family: autoregressive, source: {url: a}}", "wheel, parent, hub, path"),
        ("{family: autoregressive, source: {hub: a/b}, colour: red}", "colour"),
        ("{family: autoregressive, source: {wheel: a==1, member: b, sha256: zz}}", "sha256"),
        ("{family: diffusion, source: {hub: a/b}}", "needs a mask_token"),
        ("{family: autoregressive, source: {hub: a/b}, prediction_shift: true}", "neither"),
        ("{family: diffusion, mask_token: m, source: {parent: nobody, adapter: a}}", "no parent 'nobody'"),
        ("[1]", "must be a mapping"),
    ],
)
def test_registry_errors_name_file_backbone_and_field(tmp_path, entry, message):
    path = tmp_path / "own.yaml"
    path.write_text(f"mine: {entry}\n")
    with pytest.raises(ValueError, match=message) as error:
        read_registry(path)
    assert "own.yaml" in str(error.value) and "mine" in str(error.value)


# -- loading


def test_load_from_a_folder(folder):
    loaded = tiny_backbone(folder, "autoregressive")
    assert loaded.mask_id is None and loaded.dtype == torch.float32 and loaded.device.type == "cpu"
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer.padding_side == "left" and loaded.tokenizer.pad_token_id is not None
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        expected = loaded.model(ids).logits
        found = loaded.head(loaded.body(ids).last_hidden_state)
    torch.testing.assert_close(found, expected)


def test_diffusion_has_its_mask_token(folder):
    loaded = tiny_backbone(folder)
    assert loaded.tokenizer.convert_ids_to_tokens(loaded.mask_id) == "<file_sep>"
    spec = tiny_spec(folder).model_copy(update={"mask_token": "<nowhere>"})
    with pytest.raises(ValueError, match="no mask token '<nowhere>'"):
        load_backbone(spec)


@pytest.mark.parametrize("mask", [None, [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
@pytest.mark.parametrize("family", ["diffusion", "autoregressive"])
def test_attention_is_bidirectional_in_diffusion_only(folder, family, mask):
    loaded = tiny_backbone(folder, family)
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    other = torch.tensor([[7, 8, 9, 10, 12]])
    more = {} if mask is None else {"attention_mask": torch.tensor([mask])}
    with torch.no_grad():
        a, b = (loaded.body(x, use_cache=False, **more).last_hidden_state[0, 1] for x in (ids, other))
    assert ((a - b).abs().max() > 1e-3) == (family == "diffusion")


def test_dtype_and_fingerprint(folder, tmp_path):
    spec = tiny_spec(folder)
    float32, again, bfloat16 = (load_backbone(spec, dtype=d) for d in ("float32", "float32", "bfloat16"))
    assert bfloat16.dtype == torch.bfloat16
    assert float32.fingerprint == again.fingerprint
    other = tiny_backbone(tmp_path / "other", seed=1)
    unshifted = load_backbone(spec.model_copy(update={"prediction_shift": False}))
    family = tiny_backbone(folder, "autoregressive")
    all_different = {b.fingerprint for b in (float32, bfloat16, other, unshifted, family)}
    assert len(all_different) == 5
    # what it is called and where it lies changes nothing
    moved = tmp_path / "moved"
    tiny_folder(moved)
    assert load_backbone(spec.model_copy(update={"source": tiny_spec(moved).source, "name": "b"})).fingerprint == (
        float32.fingerprint
    )
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_backbone(spec, dtype="int8")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(BackboneError, match=r"has no config\.json"):
        load_backbone(Backbone(name="x", family="autoregressive", source={"path": tmp_path}))


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
    assert bare.fingerprint != loaded.fingerprint


def test_merged_embeddings_stay_tied_and_differ_at_the_mask_only(folder, adapter):
    loaded = load_backbone(tiny_spec(folder), adapter=adapter[0])
    bare = load_backbone(tiny_spec(folder))
    embedding = loaded.model.get_input_embeddings().weight
    assert loaded.head.weight is embedding
    changed = (embedding != bare.model.get_input_embeddings().weight).any(1).nonzero().ravel().tolist()
    assert changed == [loaded.mask_id]


def test_missing_or_foreign_adapter(folder, adapter, tmp_path, monkeypatch):
    with pytest.raises(BackboneError, match=r"has no adapter_config\.json.*save_pretrained"):
        load_backbone(tiny_spec(folder), adapter=tmp_path / "nowhere")
    monkeypatch.setattr(backbones, "_package_folder", lambda relative: tmp_path / relative)
    with pytest.raises(BackboneError, match="00_diffusion_backbone"):
        load_backbone("smollm2-135m-diffusion")
    wider = tiny_model(320)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        foreign = peft.get_peft_model(wider, peft.LoraConfig(r=4, target_modules=["lm_head"]))
        foreign.save_pretrained(tmp_path / "foreign")
    with pytest.raises(BackboneError, match="does not fit"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_backbone(tiny_spec(folder), adapter=tmp_path / "foreign")


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
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: package\nVersion: 1.0\nRequires-Dist: nowhere\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def conversions(monkeypatch, folder):
    """Converting writes the tiny model; counts the calls."""
    calls = []

    def convert(gguf: Path, target: Path) -> None:
        calls.append(gguf.read_bytes())
        tiny_tokenizer().save_pretrained(target)
        tiny_model(len(tiny_tokenizer())).save_pretrained(target)

    monkeypatch.setattr(backbones, "convert_gguf", convert)
    return calls


def left_in_cache(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache" / "backbones").rglob("*") if not p.name.endswith(".lock"))


@pytest.fixture
def by_hand(monkeypatch, tmp_path):
    """The wheel is given by hand; returns where it lies."""
    path = make_wheel(tmp_path / "given")
    monkeypatch.setenv("DIFFRET_GGUF", str(path))
    return path


@pytest.fixture
def local_index(monkeypatch, tmp_path):
    """pip finds packages in a folder and nowhere else."""
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path / "index"), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def test_downloaded_once_with_the_users_pip_and_without_requirements(spec, local_index, conversions, tmp_path):
    make_wheel(local_index)
    path = converted_folder(spec)
    assert conversions == [CONTENT] and (path / "model.safetensors").exists()
    assert converted_folder(spec) == path and len(conversions) == 1
    assert load_backbone(spec).model.config.hidden_size == 32
    # neither wheel nor GGUF is kept
    assert not [n for n in left_in_cache(tmp_path) if n.endswith((".whl", ".gguf")) or n.startswith(".")]


def test_no_network_names_what_failed_and_the_way_out(spec, local_index, conversions, tmp_path):
    with pytest.raises(BackboneError, match=r"pip could not download package==1\.0") as error:
        converted_folder(spec)
    assert "No matching distribution" in str(error.value) and "DIFFRET_GGUF" in str(error.value)
    assert not conversions and not [n for n in left_in_cache(tmp_path) if n != f"small-{spec.source.sha256[:8]}"]


def test_corrupt_download_shows_both_hashes_and_keeps_nothing(spec, by_hand, conversions, tmp_path):
    make_wheel(by_hand.parent, b"GGUF: cut")
    with pytest.raises(BackboneError, match="corrupt") as error:
        converted_folder(spec)
    assert spec.source.sha256 in str(error.value)
    assert hashlib.sha256(b"GGUF: cut").hexdigest() in str(error.value)
    assert not conversions and not [n for n in left_in_cache(tmp_path) if n != f"small-{spec.source.sha256[:8]}"]
    make_wheel(by_hand.parent)
    assert (converted_folder(spec) / "config.json").exists()


def test_wheel_without_the_file(spec, monkeypatch, conversions, tmp_path):
    monkeypatch.setenv("DIFFRET_GGUF", str(make_wheel(tmp_path, member="package/other.gguf")))
    with pytest.raises(BackboneError, match=r"another wheel: package/model\.gguf"):
        converted_folder(spec)


@pytest.mark.parametrize("form", ["wheel", "gguf"])
def test_wheel_or_gguf_given_by_hand(spec, form, monkeypatch, conversions, tmp_path):
    given = make_wheel(tmp_path)
    if form == "gguf":
        given = tmp_path / "any name.gguf"
        given.write_bytes(CONTENT)
    monkeypatch.setenv("DIFFRET_GGUF", str(given))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    converted_folder(spec)
    assert conversions == [CONTENT] and given.exists()
    monkeypatch.setenv("DIFFRET_GGUF", str(tmp_path / "nowhere"))
    monkeypatch.setenv("DIFFRET_CACHE", str(tmp_path / "cache2"))
    with pytest.raises(BackboneError, match="no such file"):
        converted_folder(spec)


def test_pip_is_this_pythons(spec, monkeypatch, conversions):
    commands = []

    def run(command, **_):
        commands.append(command)
        make_wheel(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    converted_folder(spec)
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in commands[0] and commands[0][-1] == "package==1.0"


def test_disk_full_before(spec, monkeypatch, conversions):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(backbones.shutil, "disk_usage", lambda _: usage(10**10, 10**10 - 10**8, 10**8))
    with pytest.raises(BackboneError, match=r"needs 1\.2 GB .* 0\.1 GB are free.*DIFFRET_CACHE"):
        converted_folder(spec)


def test_disk_full_while_writing_leaves_nothing(spec, by_hand, monkeypatch, tmp_path):

    def convert(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(backbones, "convert_gguf", convert)
    with pytest.raises(BackboneError, match=r"needs 1\.2 GB"):
        converted_folder(spec)
    assert left_in_cache(tmp_path) == [f"small-{spec.source.sha256[:8]}"]


def test_what_a_killed_process_left_is_removed(spec, by_hand, conversions, tmp_path):
    folder = tmp_path / "cache" / "backbones"
    left = [folder / ".small-abcd", folder / f"small-{spec.source.sha256[:8]}" / ".v1.0123.tmp"]
    for path in left:
        path.mkdir(parents=True)
        (path / "model.gguf").write_bytes(b"half")
    converted_folder(spec)
    assert not any(path.exists() for path in left)


def test_two_at_once_convert_once(spec, by_hand, conversions):
    found = []
    threads = [threading.Thread(target=lambda: found.append(converted_folder(spec))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3 and len(set(found)) == 1 and len(conversions) == 1


def test_a_damaged_cache_says_what_to_remove(spec, by_hand, conversions):
    path = converted_folder(spec)
    (path / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="remove it and load again"):
        load_backbone(spec)


@pytest.mark.slow
@pytest.mark.skipif(
    not (OWN_CACHE / "backbones" / "smollm2-135m-instruct-b179c952").exists(), reason="the embedded model is not cached"
)
def test_embedded_model_is_what_it_should_be(monkeypatch):
    monkeypatch.setenv("DIFFRET_CACHE", str(OWN_CACHE))
    loaded = load_backbone("smollm2-135m-instruct", device="cpu")
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        answer = loaded.tokenizer.decode(loaded.model(ids).logits[0, -1].argmax())
    assert answer == " Paris"
    assert loaded.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False).endswith(
        "<|im_start|>user\nx<|im_end|>\n"
    )
