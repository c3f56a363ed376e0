"""The loss of the contrastive fine-tuning: InfoNCE on the dense side plus InfoNCE on the sparse side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.losses.gradcache import CachedLossMixin, RandContext, _create_minibatch
from sentence_transformers.util.distributed import all_gather, all_gather_with_grad, get_rank, get_world_size
from torch import Tensor, nn
from torch.nn import functional as F

from diffret_lib.models.readers import Reader


def dense_scores(queries: Tensor, passages: Tensor, query_lengths: Tensor) -> Tensor:
    """The scores that :mod:`diffret_lib.retrieval.search` ranks by, over the query's vectors; float [q, p].

    ``queries`` [q, Kq, H] and ``passages`` [p, Kp, H] are normalised vectors, missing ones zero; ``query_lengths``
    [q] counts a query's vectors.  The score is the dot product where both sides have one vector; else MaxSim, each
    maximum clamped at 0 from below, over ``query_lengths``.
    """
    if queries.shape[1] == passages.shape[1] == 1:
        return queries[:, 0] @ passages[:, 0].T
    products = queries.flatten(0, 1) @ passages.flatten(0, 1).T
    best = products.view(*queries.shape[:2], *passages.shape[:2]).amax(3).clamp(min=0)
    return best.sum(1) / query_lengths[:, None]


@dataclass(frozen=True)
class FalseNegatives:
    """The passages of a batch that are relevant to its queries, by codes of equal texts.

    ``passages``, int64 [rows, 1 + n], has the codes of each row's positive and hard negatives; ``relevant``,
    int64 [rows, m], those of what is relevant to its query, filled up with -1.
    """

    passages: Tensor
    relevant: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Passages that are no negatives of a query, for the batch of these rows; bool [b, (1 + n) * b].

        Columns are the positives, then the first hard negatives, ...; a query's own positive (column i of row i)
        is not among them.
        """
        rows = rows.to(self.passages.device)
        codes = self.passages[rows].T.flatten()
        out = (codes[None, :, None] == self.relevant[rows][:, None]).any(2)
        return out.index_put((torch.arange(len(rows)),) * 2, torch.tensor(False))


@dataclass
class Columns:
    """Collator: rows of texts (query, positive, negative_1, ...) and a ``label`` become a step's features.

    The queries are one column; all passages are another, the longest first, so that a mini-batch has little padding.
    ``passage_place``, int64 [passages], says where there the positives are, then the first negatives, ...
    """

    reader: Reader
    valid_label_columns: Sequence[str] = ("label",)  # asked for by the library's trainer

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        queries, *columns = [[row[name] for row in rows] for name in rows[0] if name != "label"]
        sides = {"query": queries, "passage": [text for column in columns for text in column]}
        batch = {"label": torch.tensor([row["label"] for row in rows])}
        for side, texts in sides.items():
            features = self.reader.preprocess(texts, task=side)
            if side == "passage":
                order = features["attention_mask"].sum(1).argsort(descending=True, stable=True)
                features = {k: v[order] if torch.is_tensor(v) else v for k, v in features.items()}
                features["place"] = order.argsort()
            batch |= {f"{side}_{name}": value for name, value in features.items()}
        return batch


class JointInfoNCE(CachedLossMixin, nn.Module):
    r"""Dense plus sparse InfoNCE over the batch's passages, with gradient caching.

    .. math::
        -\log \frac{e^{s(q, p^+) / \tau}}{\sum_p e^{s(q, p) / \tau}}
        -\lambda \log \frac{e^{w_q \cdot w_{p^+} / \tau_s}}{\sum_p e^{w_q \cdot w_p / \tau_s}}

    with :func:`dense_scores` as s and sparse weights w; the second term only where the reader has a sparse side.
    The sums run over the query's positive, its hard negatives, and the other queries' positives and hard
    negatives, also those of other processes: several with a part of the batch each have the gradient of one that has
    all of it.  With ``false_negatives`` a passage that is relevant to the query, or has the text of one that is,
    counts in neither.

    sentence-transformers' ``CachedMultiVectorMultipleNegativesRankingLoss`` caches the gradients of one tensor and
    takes no mask.  So the library's gradient cache is used here, with a text's vectors, their validity and its
    sparse weights packed into one row: both sides come out of one forward pass.

    ``model`` has one module, a :class:`~diffret_lib.models.readers.Reader`; ``temperature`` is :math:`\tau`,
    ``sparse_temperature`` :math:`\tau_s` and ``sparse_weight`` :math:`\lambda` (the authors have 1 and 1).  A step of
    more than ``mini_batch_size`` texts takes the cache's two passes, so many texts at a time; with ``false_negatives``
    the labels are numbers of its rows.  With ``bfloat16`` the language model runs under autocast; scores and losses
    stay float32.  ``parts`` has the last batch's terms ("dense", "sparse"), without their weights.
    """

    def __init__(
        self, model: MultiVectorEncoder, *, temperature: float = 0.01, sparse_temperature: float = 1.0,
        sparse_weight: float = 1.0, mini_batch_size: int = 32, false_negatives: FalseNegatives | None = None,
        bfloat16: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.mini_batch_size, self.false_negatives = model, mini_batch_size, false_negatives
        self.temperatures = {"dense": temperature, "sparse": sparse_temperature}
        self.weights, self.bfloat16 = {"dense": 1.0, "sparse": sparse_weight}, bfloat16
        self.parts: dict[str, Tensor] = {}
        reader = model[0]
        self.hidden_size, self.sparse_size = reader.hidden_size, reader.vocab_size if reader.has_sparse else 0

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The mean over the queries; the two columns of :class:`Columns`, labels int64 [b]."""
        columns = [dict(column) for column in sentence_features]
        rows = labels, columns[1].pop("place")
        if sum(len(column["input_ids"]) for column in columns) > self.mini_batch_size:
            return self.forward_cached(columns, rows)
        return self.calculate_loss([[self.embed(column)] for column in columns], rows)

    def embed(self, features: dict[str, Any]) -> Tensor:
        """Vectors, validity and sparse weights of each text in one row; float [b, K * (H + 1) + V]."""
        with torch.autocast(features["input_ids"].device.type, torch.bfloat16, enabled=self.bfloat16):
            out = self.model(features)
        parts = [out["token_embeddings"].flatten(1), out["attention_mask"].to(out["token_embeddings"].dtype)]
        return torch.cat(parts + ([out["sentence_embedding"]] if self.sparse_size else []), 1)

    def unpack(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors [b, K, H], their number [b] and sparse weights [b, V] of packed rows."""
        k = (rows.shape[1] - self.sparse_size) // (self.hidden_size + 1)
        vectors, valid, sparse = rows.split([k * self.hidden_size, k, self.sparse_size], 1)
        return vectors.unflatten(1, (k, self.hidden_size)), valid.sum(1), sparse

    def embed_minibatch(
        self, sentence_feature: dict[str, Any], begin: int, end: int, with_grad: bool, copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:  # fmt: skip
        """Embed packed rows, without the padding that all of them have; called by the library's gradient cache."""
        part = _create_minibatch(sentence_feature, begin, end)
        longest = int(part["attention_mask"].sum(1).max())
        part |= {name: part[name][:, -longest:] for name in ("input_ids", "attention_mask")}
        with random_state or nullcontext(), nullcontext() if with_grad else torch.no_grad():
            tensors = [v for v in part.values() if torch.is_tensor(v)]
            random_state = RandContext(*tensors) if copy_random_state else None
            return self.embed(part), random_state

    def gathered(self, rows: Tensor | None, passages: Tensor) -> tuple[Tensor | None, Tensor]:
        """Rows and packed passages of all processes, in the order that one process with all of the batch has."""
        if get_world_size() == 1:
            return rows, passages
        columns = passages.unflatten(0, (-1, len(rows)))  # the positives, the first negatives, ...
        everyone = all_gather_with_grad(columns.transpose(0, 1).contiguous()).transpose(0, 1)
        return all_gather(rows.contiguous()), everyone.flatten(0, 1)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: tuple[Tensor | None, Tensor], *, with_backward: bool = False
    ) -> Tensor:
        """The loss from the packed rows of each column's mini-batches; ``labels`` are rows and passages' places."""
        rows, place = labels
        queries, passages = (torch.cat(column) for column in reps)
        query_vectors, lengths, query_weights = self.unpack(queries)
        own = slice(get_rank() * len(queries), (get_rank() + 1) * len(queries))
        rows, passages = self.gathered(rows, passages[place])
        vectors, _, weights = self.unpack(passages)
        scores = {"dense": dense_scores(query_vectors, vectors, lengths)}
        if self.sparse_size:
            scores["sparse"] = query_weights @ weights.T
        target = torch.arange(own.start, own.stop, device=queries.device)
        terms = {}
        for side, of_side in scores.items():
            logits = of_side / self.temperatures[side]
            if self.false_negatives is not None:
                logits = logits.masked_fill(self.false_negatives(rows)[own].to(logits.device), -torch.inf)
            terms[side] = F.cross_entropy(logits, target)
        self.parts = {side: term.detach() for side, term in terms.items()}
        loss = torch.stack([self.weights[side] * term for side, term in terms.items()]).sum()
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss
