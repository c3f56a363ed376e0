"""diffret: a reproducibility study of retrieval with diffusion language models (DiffRetriever, arXiv 2605.07210)."""
