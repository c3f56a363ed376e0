"""Backbones, the retrieval prompt, and the positions that are read; importing it registers Dream and LLaDA."""

from diffret_lib.models.architectures import DreamForCausalLM, LLaDAForCausalLM

__all__ = ["DreamForCausalLM", "LLaDAForCausalLM"]
