"""Several denoising steps before the masked positions are read (S > 1; the paper's results have S = 1)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from diffret_lib.data.checks import whole_number
from diffret_lib.models.readers import _HEAD_ROWS, MaskedPositions


class DenoisedPositions(MaskedPositions):
    """DiffRetriever's reader with ``steps`` forward passes, S; with one it is :class:`MaskedPositions`.

    After each pass but the last the positions whose greedy tokens have the highest probability are fixed to them; the
    last pass reads all K positions, the fixed ones as well.  The K positions are shared out among the steps as in
    LLaDA (arXiv 2502.09992): K // S a step, and one more in each of the first K mod S.  With more steps than masks
    there is one mask a step, and so one pass for K = 1.  What is fixed carries no gradient.
    """

    config_keys: ClassVar[list[str]] = [*MaskedPositions.config_keys, "steps"]

    def __init__(self, *args: Any, steps: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps = whole_number("steps", steps)

    def states(self, features: dict[str, Any]) -> dict[int, Tensor]:
        first_mask = features["first_mask"]
        passes = {k: min(self.steps, k) for k in first_mask}
        if max(passes.values()) > 1:
            features = features | {"input_ids": features["input_ids"].clone()}
        for step in range(max(passes.values()) - 1):
            with torch.no_grad():
                states = super().states(features)
            for k, hidden in states.items():
                if step < passes[k] - 1:
                    start = features["input_ids"].shape[1] - first_mask[k]
                    number = k // passes[k] + (step < k % passes[k])
                    self.fix(features["input_ids"][:, start : start + k], hidden, number)
        return super().states(features)

    @torch.no_grad()
    def fix(self, ids: Tensor, hidden: Tensor, number: int) -> None:
        """Put greedy tokens into ``ids`` (int64 [batch, K], changed) at the ``number`` most confident masks of a row.

        ``hidden`` are the states that predict them, [batch, K, H].  Of equals the leftmost counts.
        """
        size = max(1, _HEAD_ROWS // ids.shape[1])
        for row, vectors in zip(ids.split(size), hidden.split(size), strict=True):
            confidence, tokens = self.logits(vectors).float().softmax(-1).max(-1)
            confidence = confidence.masked_fill(row != self.mask_id, -1)  # a greedy token is never the mask
            chosen = confidence.argsort(dim=1, descending=True, stable=True)[:, :number]
            row.scatter_(1, chosen, tokens.gather(1, chosen))
