"""Every K from one pass over a text: what stands in a packed sequence, and who sees whom in it (not in the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffret_lib.models.prompts import RetrievalPrompt


class Branches:
    """What follows a shared text: the rest of the prompt for one and for a few words, and a branch for each K.

    A branch is the quote that opens the answer, K masks and the tail, at the positions that it has where it stands
    alone after the text.  The text, with what is before it, sees itself; the rest of a prompt sees the text and itself;
    a branch sees the text, the rest of its prompt, and itself.  So a text's states do not depend on what follows.

    ``prompts`` are those for a few words (True) and for one (False).  ``ids`` come after the text; ``first_mask``
    counts the tokens from a K's first mask to the end of the sequence.
    """

    def __init__(self, prompts: Mapping[bool, RetrievalPrompt], counts: Sequence[int], mask_id: int) -> None:
        self.ids: list[int] = []
        self._positions: list[int] = []  # after the text's last token
        self._blocks: list[int] = []  # the block of each id; 0 is the text
        self._sees: list[set[int]] = [{0}]
        starts = {}
        rest = {few: self._add(prompts[few].right[:-1], 0) for few in sorted({k > 1 for k in counts})}
        for k in counts:
            prompt, starts[k] = prompts[k > 1], len(self.ids) + 1
            self._add([prompt.right[-1], *[mask_id] * k, *prompt.tail], len(prompt.right) - 1, rest[k > 1])
        self.first_mask = {k: len(self.ids) - start for k, start in starts.items()}

    def _add(self, ids: Sequence[int], position: int, *seen: int) -> int:
        block = len(self._sees)
        self._sees.append({0, block, *seen})
        self.ids += ids
        self._positions += range(position, position + len(ids))
        self._blocks += [block] * len(ids)
        return block

    def mask_and_positions(self, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What attention adds to its scores, ``dtype`` [batch, 1, length, length]; positions, int64 [batch, length].

        ``mask`` is that of left-padded sequences, int64 [batch, length] (1: a token).
        """
        width = mask.shape[1] - len(self.ids)
        sees = torch.tensor([[block in row for block in range(len(self._sees))] for row in self._sees])
        blocks = torch.tensor([0] * width + self._blocks)
        seen = sees[blocks][:, blocks].to(mask.device) & mask[:, None, None].bool()
        positions = torch.tensor([*range(-width, 0), *self._positions], device=mask.device)
        positions = (positions + mask[:, :width].sum(1, keepdim=True)).clamp(min=0)
        return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype), positions
