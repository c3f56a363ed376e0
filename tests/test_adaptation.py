from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from diffret_lib.config import load_profile
from diffret_lib.experiments import stages
from diffret_lib.experiments.stages import in_words
from diffret_lib.models.backbones import load_backbone, make_bidirectional
from diffret_lib.models.prompts import RetrievalPrompt
from diffret_lib.training import adaptation, masked_diffusion
from diffret_lib.training.adaptation import UNADAPTED, adapt, adaptation_table, layers, read_curves
from diffret_lib.training.lora import add_lora, export_adapter, last_checkpoint, save_adapter
from diffret_lib.training.masked_diffusion import TARGETS, MaskedRows, Recipe, held_out_cross_entropy, pack, train
from scripts import publish_backbone
from tests.tiny import tiny_folder, tiny_spec

MASK = 5
RECIPE = Recipe(
    "text", tokens=8 * 2 * 16, sequence_length=16, batch_size=2, rank=2, alpha=4, warmup_steps=2, learning_rate=2e-2,
    final_learning_rate=1e-2,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"), seed=1)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Rows with something to learn: the same few tokens again and again."""
    rng = np.random.default_rng(0)
    return np.tile(np.array([50, 60, 70, 80]), (64, 4))[:, :16] + 100 * rng.integers(0, 2, (64, 1))


def parent(folder) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder)


def loaded(folder, dtype: str = "float32"):
    return load_backbone(tiny_spec(folder, "autoregressive"), dtype=dtype, device="cpu")


def adapted(folder, recipe: Recipe):
    backbone = loaded(folder)
    make_bidirectional(backbone.model)
    options = {"rank": recipe.rank, "alpha": recipe.alpha, "seed": recipe.seed}
    return add_lora(backbone, **options, trainable_token_indices={"embed_tokens": [MASK]})


def masked_rows(rows, *, batch_size: int, seed: int, answers=()) -> MaskedRows:
    """As many sequences as take every row once."""
    length = len(rows) * (2 if answers else 1)
    return MaskedRows(rows, MASK, length=length, batch_size=batch_size, seed=seed, answers=answers)


def answers(n: int = 6) -> list[masked_diffusion.Answer]:
    rng = np.random.default_rng(0)
    out = []
    for i in range(n):
        probs, ids = rng.random((1 + i, TARGETS)), rng.integers(100, 400, 1 + i)
        soft_probs = np.float32(probs / probs.sum(1, keepdims=True))
        soft = {"soft_ids": rng.integers(100, 400, probs.shape), "soft_probs": soft_probs}
        prompt, tail = np.array([1, *range(20, 24 + i)]), np.array([12, 2, 2])
        out.append(masked_diffusion.Answer(prompt=prompt, ids=ids, tail=tail, **soft))
    return out


# -- the loss --------------------------------------------------------------------------------------------------


def plain_loss(folder, items) -> float:
    """Each row alone, all logits, attention written out, token i read at i - 1; loops over targets."""
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    losses = []
    for item in items:
        n = len(item["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=item["input_ids"][None], attention_mask=torch.zeros(1, 1, n, n)).logits[0]
        logits = logits.double()
        targets = item["target_ids"].tolist(), item["target_probs"].tolist()
        for place, ids, probs in zip(item["masked"], *targets, strict=True):
            row = logits[place - 1]
            normaliser = math.log(sum(math.exp(x) for x in row.tolist()))
            losses.append(-sum(p * (float(row[i]) - normaliser) for i, p in zip(ids, probs, strict=True)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("with_answers", [False, True])
def test_loss_as_plainly_computed(folder, rows, with_answers):
    data = masked_rows(rows, batch_size=4, seed=3, answers=answers() if with_answers else ())
    items = [data[i] for i in range(4)]
    batch, expected = masked_diffusion.collate(items, pad_id=2), plain_loss(folder, items)
    assert with_answers != bool(batch["attention_mask"].all())  # answers make rows of different lengths
    assert all(row[-len(item["input_ids"]) :].all() for row, item in zip(batch["attention_mask"], items))  # at the end
    plain = make_bidirectional(parent(folder)).eval()
    for model in (plain, adapted(folder, RECIPE)):  # LoRA starts as no change
        with torch.no_grad():
            assert float(masked_diffusion.masked_cross_entropy(model, batch)) == pytest.approx(expected, abs=1e-4)


# -- the data --------------------------------------------------------------------------------------------------


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_an_item_is_the_same_on_every_access(rows):
    for more in ((), answers()):
        one, two = (masked_rows(rows, batch_size=4, seed=3, answers=more) for _ in range(2))
        order = list(range(len(one)))
        random.Random(0).shuffle(order)
        np.random.seed(1)
        shuffled = {i: two[i] for i in order}
        assert all(equal(one[i], shuffled[i]) for i in order)
        other = masked_rows(rows, batch_size=4, seed=4, answers=more)
        assert not all(equal(one[i], other[i]) for i in order)


def test_masking_of_documentation():
    documentation = np.random.default_rng(0).integers(10, 400, (400, 200))
    batch = 4
    data = masked_rows(documentation, batch_size=batch, seed=0)
    assert len(data) == 400
    shares = []
    for i in range(len(data)):
        item, original = data[i], documentation[i]
        ids, masked = item["input_ids"].numpy(), item["masked"].numpy()
        assert 0 not in masked and len(masked) and len(set(masked)) == len(masked)
        assert np.array_equal(np.flatnonzero(ids != original), np.sort(masked)) and (ids[masked] == MASK).all()
        assert np.array_equal(item["target_ids"][:, 0].numpy(), original[masked])
        assert (item["target_probs"][:, 0] == 1).all() and not item["target_probs"][:, 1:].any()
        shares.append(len(masked) / 199)
    shares = np.array(shares).reshape(-1, batch)
    # row b of each batch lies in its own quarter of the ratios, up to the noise of 199 draws
    for b in range(batch):
        low, high = b / batch - 0.12, (b + 1) / batch + 0.12
        assert ((shares[:, b] > low) & (shares[:, b] < high)).all()
        assert abs(shares[:, b].mean() - (b + 0.5) / batch) < 0.05
    # one offset for the whole batch
    assert np.corrcoef(shares[:, 1], shares[:, 2])[0, 1] > 0.7


def test_rows_are_taken_again_and_masked_otherwise(rows):
    data = MaskedRows(rows[:3], MASK, length=9, batch_size=4, seed=0)
    items = [data[i] for i in range(9)]
    for i, item in enumerate(items):
        ids, hidden = item["input_ids"].numpy(), item["masked"].numpy()
        assert np.array_equal(np.where(np.isin(np.arange(16), hidden), rows[i % 3], ids), rows[i % 3])
    assert not torch.equal(items[0]["masked"], items[3]["masked"])


def test_of_an_answer_only_the_answer_is_masked(rows):
    given = answers()
    data = masked_rows(rows, batch_size=4, seed=0, answers=given)
    assert len(data) == 2 * len(rows)
    full = partial = 0
    documentation = set()
    for i in range(len(data)):
        item = data[i]
        if i % 2 == 0:
            documentation.add(i // 2)
            assert len(item["input_ids"]) == 16 and 0 not in item["masked"]
            continue
        answer = given[(i // 2) % len(given)]
        start, n = len(answer.prompt), len(item["input_ids"]) - len(answer.prompt) - len(answer.tail)
        assert n in (1, 2, 4, 8, 16) and n <= len(answer.ids)
        ids = item["input_ids"].tolist()
        assert ids[:start] == answer.prompt.tolist() and ids[start + n :] == answer.tail.tolist()
        masked = item["masked"].tolist()
        assert masked and all(start <= m < start + n for m in masked)
        for m in range(n):
            assert ids[start + m] == (MASK if start + m in masked else answer.ids[m])
        for m, targets, probs in zip(masked, item["target_ids"], item["target_probs"], strict=True):
            assert targets[0] == answer.ids[m - start] and probs[0] == 0.5
            assert np.array_equal(targets[1:], answer.soft_ids[m - start, : TARGETS - 1])
            soft = answer.soft_probs[m - start, : TARGETS - 1]
            np.testing.assert_allclose(probs[1:], 0.5 * soft / soft.sum(), rtol=1e-5)
        full += len(masked) == n
        partial += len(masked) < n
    assert documentation == set(range(len(rows)))
    assert full > partial > 0


def test_pack(tokenizer):
    texts = ["a heap <|im_end|>", "sorted"] * 200
    stream = []
    for text in texts:
        stream += [0, *tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]]
    packed = pack(texts, tokenizer, 7, limit=5)
    assert packed.shape == (5, 7) and packed.dtype == np.int64 and packed.ravel().tolist() == stream[:35]
    everything = pack(texts, tokenizer, 7, limit=10**6)
    assert everything.ravel().tolist() == stream[: len(stream) // 7 * 7]
    assert 2 not in everything  # the template's token stays plain
    assert pack([], tokenizer, 7, limit=5).shape == (0, 7)


# -- the parent's answers --------------------------------------------------------------------------------------


def test_content_token_mask(tokenizer):
    keep = masked_diffusion.content_token_mask(tokenizer)
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", '"', "a", "Ġheap", "Ġthe", "Ġarray")}
    assert keep[[ids["Ġheap"], ids["Ġarray"]]].all()
    assert not keep[[ids["<|im_end|>"], ids['"'], ids["a"], ids["Ġthe"]]].any()


def test_parent_answers(tokenizer, folder, monkeypatch):
    model = parent(folder).eval()
    said = {"heap": ' Heap, the 7 tree heap" and more', "array": '"', "axis": " sorted axis"}
    texts = list(said)

    def generate(input_ids, **kwargs):
        new = []
        for row in input_ids:
            text = next(t for t in texts if f'"{t}".' in tokenizer.decode(row))
            new.append(tokenizer(said[text], add_special_tokens=False)["input_ids"])
        width = max(map(len, new))
        padded = [answer + [2] * (width - len(answer)) for answer in new]
        return torch.cat([input_ids, torch.tensor(padded)], 1)

    monkeypatch.setattr(model, "generate", generate)
    found = masked_diffusion.parent_answers(model, tokenizer, texts, side="passage", few_words=True)
    prompt = RetrievalPrompt(tokenizer, "passage", True)
    assert [tokenizer.decode(a.ids) for a in found] == ["heap tree", "sorted axis"]  # one without words is dropped
    plain = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    allowed = masked_diffusion.content_token_mask(tokenizer)
    for answer, text in zip(found, ("heap", "axis"), strict=True):
        assert list(answer.prompt) == prompt.ids([text], 64)[0] and tuple(answer.tail) == tuple(prompt.tail)
        with torch.no_grad():
            logits = plain(torch.tensor([[*answer.prompt, *answer.ids]])).logits[0].double()
        for j in range(len(answer.ids)):
            row = logits[len(answer.prompt) - 1 + j]
            weights = {i: math.exp(float(row[i])) for i in range(len(row)) if allowed[i]}
            best = sorted(weights, key=weights.get, reverse=True)[:TARGETS]
            assert answer.soft_ids[j].tolist() == best
            total = sum(weights[i] for i in best)
            np.testing.assert_allclose(answer.soft_probs[j], [weights[i] / total for i in best], atol=1e-4)
    (single, _) = masked_diffusion.parent_answers(model, tokenizer, texts, side="passage", few_words=False)
    assert tokenizer.decode(single.ids) == "heap"


def test_answer_texts():
    texts = [f"First paragraph {i}.\n\n{'rest of it ' * 30}" for i in range(200)] + ["short"] * 9
    chosen, again, other = (masked_diffusion.answer_texts(texts, 40, seed) for seed in (0, 0, 1))
    assert len(chosen["passage"]) == 40 and 1 <= len(chosen["query"]) <= 10
    assert all(q.startswith("First paragraph") and "\n" not in q for q in chosen["query"])
    without = [d for d in chosen["passage"] if not d.startswith("First")]
    assert 8 <= len(without) <= 32
    assert chosen == again != other


# -- training --------------------------------------------------------------------------------------------------


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_adapters(one, two) -> None:
    assert (one / "adapter_config.json").read_bytes() == (two / "adapter_config.json").read_bytes()
    files = [safe_open(folder / "adapter_model.safetensors", framework="pt") for folder in (one, two)]
    assert files[0].metadata() == files[1].metadata() and weights(one).keys() == weights(two).keys()
    assert all(torch.equal(tensor, weights(two)[name]) for name, tensor in weights(one).items())


def start(folder, rows, recipe: Recipe, work, model=None, **options):
    size = recipe.batch_size
    data = MaskedRows(rows, MASK, length=recipe.steps * size, batch_size=size, seed=recipe.seed)
    return train(model or adapted(folder, recipe), "base", data, recipe, work, pad_id=2, **options)


def test_training_lowers_the_loss(folder, rows, tmp_path):
    before = held_out_cross_entropy(make_bidirectional(parent(folder)), rows, MASK)
    recipe = replace(RECIPE, tokens=30 * 2 * 16, schedule_tokens=60 * 2 * 16)
    model, measured = adapted(folder, recipe), {"evaluate": lambda m: {"held_out text": {"0.5": 1.0}}}
    adapter, records = start(folder, rows, recipe, tmp_path / "work", model, **measured, evaluate_every=15)
    after = held_out_cross_entropy(model, rows, MASK)
    assert all(after[r] < before[r] - 0.5 for r in before)
    # only the adapter and the mask's embedding are trained
    saved = weights(adapter)
    assert all("lora_" in k or "token_adapter" in k or "trainable_tokens" in k for k in saved)
    assert any("trainable_tokens" in k or "token_adapter" in k for k in saved)
    plain, base = parent(folder).state_dict(), model.get_base_model().state_dict()
    for name, tensor in plain.items():
        kept = next(v for k, v in base.items() if k.replace("token_adapter.", "").replace("base_layer.", "") == name)
        assert torch.equal(kept, tensor)
    # the curve, and the learning rate: warm-up, then a cosine over schedule_tokens, not over tokens
    assert [r["step"] for r in records if "held_out text" in r] == [15, 30]
    logged = {r["step"]: r for r in records if "loss" in r}
    assert sorted(logged) == [10, 20, 30]
    for step, record in logged.items():
        assert record["stage"] == "text" and record["tokens_seen"] == step * 32
        progress = (step - 1 - 2) / (60 - 2)
        expected = 1e-2 + (2e-2 - 1e-2) * 0.5 * (1 + math.cos(math.pi * progress))
        assert record["learning_rate"] == pytest.approx(expected, rel=0.02)
    assert logged[30]["learning_rate"] > 1.4e-2  # half way, not at the end


DAMAGED = ["trainer_state.json", "optimizer.pt", "adapter/adapter_model.safetensors", "manifest.json"]


@pytest.mark.parametrize("damaged", [None, *DAMAGED])
def test_interrupted_training_ends_with_the_same_weights(folder, rows, tmp_path, damaged):
    """Also where the newest checkpoint was cut while it was written: the one before it is taken."""
    whole, curve = start(folder, rows, RECIPE, tmp_path / "whole")
    steps = []

    def kill(model):
        steps.append(1)
        if len(steps) == 7:
            raise SystemExit
        return {}

    cut = tmp_path / "cut"
    with pytest.raises(SystemExit):
        start(folder, rows, RECIPE, cut, evaluate=kill, evaluate_every=1, save_every=2)
    assert last_checkpoint(cut) == cut / "checkpoint-6"
    if damaged == "manifest.json":
        (cut / "checkpoint-6" / damaged).unlink()
    elif damaged:
        path = cut / "checkpoint-6" / damaged
        path.write_bytes(path.read_bytes()[:-20])
    if damaged:
        assert last_checkpoint(cut) == cut / "checkpoint-4"
    steps.clear()
    torch.rand(7), np.random.rand(7)
    count = {"evaluate": lambda m: steps.append(1) or {}, "evaluate_every": 1}
    resumed, _ = start(folder, rows, RECIPE, cut, **count, save_every=2)
    assert len(steps) == RECIPE.steps - (4 if damaged else 6)  # on from the checkpoint, not from the start
    assert_same_adapters(resumed, whole)
    # at its end, nothing is trained
    assert start(folder, rows, RECIPE, tmp_path / "whole", evaluate=kill, evaluate_every=1) == (whole, curve)


def test_held_out_cross_entropy(folder, rows):
    model = make_bidirectional(parent(folder))
    model.train()
    first = held_out_cross_entropy(model, rows[:10], MASK)
    torch.rand(3), np.random.rand(3)
    assert held_out_cross_entropy(model, rows[:10], MASK) == first
    assert list(first) == ["0.15", "0.5", "0.9"] and model.training
    # as plainly computed with the same masks (in bfloat16: to a few per cent)
    rng = np.random.default_rng([0, 500])
    items = []
    for begin in (0, 8):
        block = rows[begin : min(begin + 8, 10)]
        chosen = rng.random(block.shape) < 0.5
        for row, mask in zip(block, chosen, strict=True):
            mask[0] = False
            ids = torch.from_numpy(np.where(mask, MASK, row))
            places = torch.from_numpy(np.flatnonzero(mask))
            items.append({"input_ids": ids, "masked": places, "target_ids": torch.from_numpy(row[mask])[:, None],
                          "target_probs": torch.ones(int(mask.sum()), 1)})  # fmt: skip
    assert first["0.5"] == pytest.approx(plain_loss(folder, items), rel=0.05)


def test_stages_and_starting_again(folder, tokenizer, own_cache, tmp_path, monkeypatch):
    answered, trained, texts = [], [], [f"Return a sorted copy of array {i} along the given axis." for i in range(60)]
    monkeypatch.setattr(adaptation, "collect_answers", lambda *args: answered.append(args[2:]) or answers())
    monkeypatch.setattr(adaptation, "train", lambda *args, **how: trained.append(args[:4:3]) or train(*args, **how))
    held_out = {"text": pack(texts, tokenizer, 16, limit=4)}
    second = replace(RECIPE, stage="annealing", tokens=4 * 2 * 16, continues=True, seed=1)
    third = replace(RECIPE, stage="answers", tokens=4 * 2 * 16, rank=3, seed=2, answered_passages=5)
    backbone = loaded(folder, "bfloat16")

    def run(*stages, texts=texts, held_out=held_out, **options):
        return adapt(backbone, MASK, texts, held_out, stages=stages, evaluate_every=2, **options)

    def stages():
        return [stage.stage for _, stage in trained]

    (first,) = run(RECIPE)
    assert run(RECIPE) == [first] and stages() == ["text"]
    work = tmp_path / "work"
    folders = run(RECIPE, second, third, work=work)
    assert folders[0] == first and stages() == ["text", "annealing", "answers"]  # the first is not made again
    assert run(RECIPE, second, third) == folders and len(trained) == 3
    found = [weights(f / "adapter") for f in folders]
    assert found[0].keys() == found[1].keys() and any(not torch.equal(v, found[0][k]) for k, v in found[1].items())
    assert json.loads((work / "answers" / "recipe.json").read_text())["answered_passages"] == 5
    assert weights(work / "answers" / "adapter").keys() == found[2].keys()
    records = read_curves(folders)
    assert list(dict.fromkeys(r["stage"] for r in records)) == ["text", "annealing", "answers"]
    assert [r["step"] for r in records if "held_out text" in r] == [2, 4, 6, 8, 2, 4, 2, 4]
    assert not list(own_cache.rglob(".*.work"))  # checkpoints are gone
    assert answered == [(texts[::-1], 5, 2)]
    # an adapter names what it is on: the parent, or the parent with the adapter of the text merged in
    metadata = [safe_open(f / "adapter" / "adapter_model.safetensors", framework="pt").metadata() for f in folders]
    assert metadata[0]["base"] == metadata[1]["base"] == backbone.weights != metadata[2]["base"]
    assert layers([RECIPE, second, third], folders) == folders[1:] and layers([RECIPE, third], folders) == folders[:2]
    # the second stage starts where the first ended, the third as no change to what the second left
    kept = adaptation._staged(backbone, MASK, folders[1:2]).model
    ids = torch.tensor([[7, MASK, 9]])
    model, _ = trained[2]
    with torch.no_grad(), model.disable_adapter():
        assert torch.allclose(model.get_base_model()(ids).logits[0, 0], kept(ids).logits[0, 0], atol=0.02)
    # other texts, rows or parents are another run
    for other in ({"texts": [*texts[:-1], "other"]}, {"held_out": {"text": held_out["text"][:2]}}):
        assert run(RECIPE, **other) != [first]
    with pytest.raises(ValueError, match="no sequence of 16 tokens"):
        run(RECIPE, texts=["a heap"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_held_out_losses_are_in_the_dtype_of_the_backbone(folder, tokenizer, own_cache, monkeypatch, dtype):
    """Before, after and during a training: bfloat16 is slow on a processor that has no products of it."""
    found, plain = [], masked_diffusion.masked_cross_entropy

    def noted(model, batch):
        if not model.training:
            found.append(torch.is_autocast_enabled("cpu"))
        return plain(model, batch)

    monkeypatch.setattr(masked_diffusion, "masked_cross_entropy", noted)
    texts, backbone = ["Return a sorted copy of an array along the given axis."] * 60, loaded(folder, dtype)
    held_out = {"text": pack(texts, tokenizer, 16, limit=4)}
    adaptation.held_out_table({"parent": replace(backbone, mask_id=MASK)}, held_out)
    before = len(found)
    adapt(backbone, MASK, texts, held_out, stages=[RECIPE], evaluate_every=2)
    assert len(found) > before > 0 and set(found) == {dtype == "bfloat16"}


def test_what_the_stages_add_in_words():
    names = ["parent", "text", "prompt"]
    losses = pd.DataFrame({"backbone": names, "text": "English", "50% masked": [8.0, 4.0, 3.25]})
    rows = [(name, "DiffRetriever", k, 0.125 * k + i / 10) for i, name in enumerate(names) for k in (1, 4)]
    table = pd.DataFrame([("", "BM25", 1, 0.9), *rows], columns=["backbone", "system", "K", "dense"])
    text = in_words(losses, table)
    assert "at 50% masked its held-out cross-entropy goes from 8.00 to 3.25 nats on English" in text
    assert "from 0.125 to 0.225 by plain text, and to 0.325 after the prompt (K = 1); from 0.500 to 0.600" in text
    assert "from 0.125 to 0.325 after the prompt (K = 1)" in in_words(losses, table[table["backbone"] != "text"])


def test_exported_adapter(folder, rows, tmp_path):
    backbone = loaded(folder)
    model = adapted(folder, RECIPE)
    start(folder, rows, RECIPE, tmp_path / "work", model)
    source, target = tmp_path / "adapter", tmp_path / "package" / "adapter"
    save_adapter(model, source, backbone.weights)
    size = export_adapter(source, target)
    assert size == (target / "adapter_model.safetensors").stat().st_size
    before, after = weights(source), weights(target)
    assert before.keys() == after.keys()
    assert all(v.dtype == torch.bfloat16 and torch.equal(v, before[k].to(torch.bfloat16)) for k, v in after.items())
    assert size < sum(v.numel() for v in after.values()) * 2 + 10_000
    for path in (source, target):
        with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
            metadata = file.metadata()
        assert metadata == {
            "format": "pt", "base": backbone.weights, "base_name": "tiny-autoregressive", "attention": "bidirectional"
        }  # fmt: skip
        config = (path / "adapter_config.json").read_text()
        assert json.loads(config)["base_model_name_or_path"] == "tiny-autoregressive"
        assert str(tmp_path) not in config and str(folder) not in config
    assert sorted(p.name for p in target.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_same_seed_gives_the_same_adapter(folder):
    one, two, other = (add_lora(loaded(folder), rank=2, alpha=4, seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(one[k], two[k]) for k in one) and any(not torch.equal(one[k], other[k]) for k in one)


def test_steps_of_a_recipe():
    assert Recipe("text", tokens=10_240, sequence_length=256, batch_size=4).steps == 10
    assert Recipe("text", tokens=1).steps == 1


# -- tables ----------------------------------------------------------------------------------------------------

CURVE = [
    {"stage": "text", "step": 10, "tokens_seen": 100, "loss": 5.0},
    {"stage": "text", "step": 10, "tokens_seen": 100, "held_out English": {"0.15": 4.0, "0.5": 6.0}},
    {"stage": "text", "step": 20, "tokens_seen": 200, "loss": 4.0},
    {"stage": "annealing", "step": 5, "tokens_seen": 30, "loss": 4.0},
    {"stage": "answers", "step": 10, "tokens_seen": 50, "held_out English": {"0.15": 3.0, "0.5": 5.0}},
]


def test_adaptation_table():
    table = adaptation_table(CURVE)
    assert list(table) == ["stage", "tokens_seen", "text", "mask_ratio", "cross_entropy"]
    points = ("text", 100, 0.15, 4.0), ("text", 100, 0.5, 6.0), ("answers", 280, 0.15, 3.0), ("answers", 280, 0.5, 5.0)
    assert table.drop(columns="text").to_numpy().tolist() == list(map(list, points))
    assert set(table["text"]) == {"English"}


def test_published_backbone(folder, tmp_path, monkeypatch):
    """Both adapters, their cards and the log, of the folder that a run leaves."""
    work, target = tmp_path / "work", tmp_path / "package"
    backbone = loaded(folder)
    for stage in adaptation.STAGES:
        save_adapter(adapted(folder, RECIPE), work / stage.stage / "adapter", backbone.weights)
        (work / stage.stage / "recipe.json").write_text(json.dumps({"stage": stage.stage, "tokens": 512}))
        (work / stage.stage / "curve.json").write_text(json.dumps([r for r in CURVE if r["stage"] == stage.stage]))
    monkeypatch.setattr(publish_backbone, "adapter_path", lambda name: target / name)
    publish_backbone.publish(work)
    assert sorted(p.name for p in target.iterdir()) == [publish_backbone.ANSWERS, publish_backbone.TEXT]
    for name in (publish_backbone.ANSWERS, publish_backbone.TEXT):
        card = (target / name / "README.md").read_text()
        assert "license: apache-2.0" in card and f"# {name}" in card and "6.00" in card and "{" not in card
        assert all(v.dtype == torch.bfloat16 for v in weights(target / name).values())
    assert adaptation.read_log(target / publish_backbone.ANSWERS)["curve"] == CURVE


def test_stages_begin_with_the_autoregressive_parent(monkeypatch):
    """Whether or not the profile names the text-only backbone: no stage stands in for the parent."""
    loaded = []
    monkeypatch.setattr(stages, "load_backbone", lambda name, **options: loaded.append((name, options.get("adapter"))))
    for profile in map(load_profile, ("study", "embedded")):
        found = stages.stage_backbones(SimpleNamespace(profile=profile, backbone=lambda role: None))
        assert list(found) == [UNADAPTED, "smollm2-135m-diffusion-text", "smollm2-135m-diffusion"]
        assert loaded == [("smollm2-135m-diffusion-text", None), ("smollm2-135m-diffusion-text", "none")]
        loaded.clear()
