"""Hierarchical-reasoning language models: reference model, tokenizer, checkpoints.

Names are imported when they are first asked for, so that the tokenizer and the data tools start without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hrm_kernels.version import __version__

    from .checkpoint import load_model, save_model
    from .config import HRMConfig
    from .model import HRMForCausalLM
    from .tokenizer import get_tokenizer

_HOME = {
    "HRMConfig": ".config",
    "HRMForCausalLM": ".model",
    "__version__": "hrm_kernels.version",
    "get_tokenizer": ".tokenizer",
    "load_model": ".checkpoint",
    "save_model": ".checkpoint",
}
__all__ = ["HRMConfig", "HRMForCausalLM", "__version__", "get_tokenizer", "load_model", "save_model"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
