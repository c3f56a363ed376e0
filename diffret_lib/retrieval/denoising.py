"""DiffRetriever with several denoising steps."""

from __future__ import annotations

from diffret_lib.models.denoising import DenoisedPositions
from diffret_lib.retrieval.systems import DiffRetriever


class MultiStepDiffRetriever(DiffRetriever):
    """:class:`DiffRetriever` with ``steps`` forward passes a text, S, 1 by default: then it is DiffRetriever itself.

    After each pass but the last the most confident masks are fixed to their greedy tokens, as
    :class:`~diffret_lib.models.denoising.DenoisedPositions` says; the other options are DiffRetriever's.
    """

    reader_class = DenoisedPositions
