"""The HRM controller over a frozen language model."""

from __future__ import annotations

from .config import HybridConfig
from .generate import generate
from .language_model import LanguageModel, load_language_model, load_tokenizer
from .model import HybridModel

__all__ = ["HybridConfig", "HybridModel", "LanguageModel", "generate", "load_language_model", "load_tokenizer"]
