"""Departures from the authors' code, and what each changes: tables of notebooks 01 and 02.

Every row compares a choice as the reference has it with another one, on the same queries: columns choice, reference,
other, ours (which of the two is the default here), collection, system, mode, queries, ndcg_reference, ndcg_other
(nDCG@10) and difference (other - reference).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from diffret_lib.experiments.study import CutBM25, Study, System, macro
from diffret_lib.models.prompts import RetrievalPrompt
from diffret_lib.retrieval.metrics import METRIC
from diffret_lib.retrieval.systems import BM25, DiffEmbed

#: Tokens of text and prompt in the authors' scripts.
REFERENCE_LENGTH = 256
COLUMNS = ["choice", "reference", "other", "ours", "collection", "system", "mode", "queries"]
COLUMNS += ["ndcg_reference", "ndcg_other", "difference"]


def departures(study: Study) -> pd.DataFrame:
    """Each choice of reading and encoding, on the profile's ``departures`` sample of the training collection."""
    p, n = study.profile, study.profile.promptreps_vectors
    collection = study.sampled(p.train_collection, p.departures)
    pairs = {"DiffRetriever single": (1, 1), "DiffRetriever multi": study.selected}
    masked = {name: study.diffretriever(*pair) for name, pair in pairs.items()}
    prompted, several = masked | {"PromptReps single": study.promptreps()}, {"PromptReps multi": study.promptreps(n)}
    here = prompted | {"DiffEmbed": study.retriever(DiffEmbed)}
    shifted = study.backbone("diffusion").spec.prediction_shift
    # the reference's length has no room for the masks and the tail
    prompt = RetrievalPrompt(study.backbone("diffusion").tokenizer, "passage", few_words=False)
    length = REFERENCE_LENGTH - len(prompt.left) - len(prompt.right)
    choices = [
        ("words of the sparse side", "of the whole text", "of the text that is read", "reference",
         prompted, _changed(prompted, content_from="read text")),
        ("end of PromptReps' answer", 'the token " alone', "any token that holds a quote", "reference",
         several, _changed(several, stop="any quote")),
        ("vectors of PromptReps", f"N = {n}, the prompt's among them", f"N = {n} besides the prompt's", "reference",
         several, {"PromptReps multi": study.promptreps(n + 1)}),
        ("token i is read at", "position i", "position i - 1 (shifted)", "other" if shifted else "reference",
         _changed(masked, shifted=False), _changed(masked, shifted=True)),
        ("length of a passage", f"{REFERENCE_LENGTH} tokens with the prompt ({length} of text)",
         f"{p.max_passage_tokens} tokens of text", "other", _changed(here, max_passage_tokens=length), here),
        ("text of BM25", "whole", "what the others read", "reference",
         {"BM25": BM25()}, {"BM25": CutBM25(here["DiffRetriever single"])}),
    ]  # fmt: skip
    frames = []
    for *labels, reference, other in choices:
        for name, retriever in reference.items():
            sides = (study.evaluate(System(name, r), [collection]) for r in (retriever, other[name]))
            frames.append(_compared(*sides, collection.name, labels, name))
    return pd.concat(frames, ignore_index=True)


def shared_text_table(study: Study) -> pd.DataFrame:
    """The grid's one pass for all numbers of masks, against a pass for each, on every test collection; or no rows."""
    if not study.profile.shared_text_grid:
        return pd.DataFrame(columns=COLUMNS)
    labels, frames = ("pass over a text", "one for each number of masks", "one for all", "reference"), []
    for name, pair in {"DiffRetriever single": (1, 1), "DiffRetriever multi": study.selected}.items():
        own = study.evaluate(System(name, study.diffretriever(*pair)), study.grid_collections)
        shared = study.test_grid[(study.test_grid["k_query"] == pair[0]) & (study.test_grid["k_passage"] == pair[1])]
        for c, of_c in own.groupby("collection", sort=False):
            frames.append(_compared(of_c, shared[shared["collection"] == c], c, labels, name))
    return pd.concat(frames, ignore_index=True)


def dtype_table(study: Study) -> pd.DataFrame:
    """What bfloat16 changes in the macro nDCG@10 of every system, on the profile's ``dtype_sample``; or no rows."""
    found = {}
    for dtype, other in dtype_studies(study).items():
        systems = [system for system in other.systems(study.selected) if not isinstance(system.retriever, BM25)]
        found[dtype] = pd.concat([other.evaluate(system, other.test_collections) for system in systems])
    if not found:
        return pd.DataFrame(columns=COLUMNS)
    ours = "other" if study.backbone("diffusion").dtype == torch.bfloat16 else "reference"
    name = f"macro of {found['float32']['collection'].nunique()}"
    parts = zip(*(frame.groupby("system", sort=False) for frame in found.values()), strict=True)
    labels = "arithmetic", "float32", "bfloat16", ours
    frames = [_compared(one, other, name, labels, system) for (system, one), (_, other) in parts]
    return pd.concat(frames, ignore_index=True)


def dtype_studies(study: Study) -> dict[str, Study]:
    """The study on the profile's ``dtype_sample``, once in float32 and once in bfloat16; empty without a sample."""
    sample, studies = study.profile.dtype_sample, {}
    for dtype in ("float32", "bfloat16") if sample else ():
        profile = study.profile.model_copy(update={"dtype": dtype, "sample": sample, "samples": {}})
        taken = study.backbone("diffusion").dtype == getattr(torch, dtype)
        studies[dtype] = Study(profile, study._backbones if taken else {})
    return studies


def departures_summary(table: pd.DataFrame) -> str:
    """The largest effect of each choice, a line each (Markdown)."""
    lines = []
    for choice, rows in table.groupby("choice", sort=False):
        row = rows.loc[rows["difference"].abs().idxmax()]
        kept = row["reference"] if row["ours"] == "reference" else row["other"]
        lines.append(
            f"- {choice}: the largest effect is **{row['difference']:+.3f}** ({row['system']}, {row['mode']}), of "
            f"*{row['other']}* in place of *{row['reference']}*; used here: *{kept}*."
        )
    return "\n".join(lines)


def _changed(retrievers: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    return {name: retriever.on(**options) for name, retriever in retrievers.items()}


def _compared(
    one: pd.DataFrame, other: pd.DataFrame, collection: str, labels: Sequence[str], system: str
) -> pd.DataFrame:
    """The rows of two sides' per-query values, one a mode that both have."""
    sides = [frame[frame["metric"] == METRIC] for frame in (one, other)]
    means = [macro(frame, ["mode"]).set_index("mode")["value"] for frame in sides]
    table = pd.DataFrame({"ndcg_reference": means[0], "ndcg_other": means[1]}).dropna()
    table = table.rename_axis("mode").reset_index()
    table["difference"] = table["ndcg_other"] - table["ndcg_reference"]
    queries = len(sides[0][["collection", "query_id"]].drop_duplicates())
    about = dict(zip(COLUMNS, labels, strict=False))
    return table.assign(**about, collection=collection, system=system, queries=queries)[COLUMNS]
