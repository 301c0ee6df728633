"""Values that somebody wrote down: JSON, or YAML where PyYAML is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_values(path: Path, what: str) -> Any:
    """The content of a .json file, or of a .yaml or .yml file where PyYAML is installed.

    Args:
        what: the file is, for messages.
    Raises:
        ValueError: it cannot be read, or is of another kind.
    """
    if path.suffix.lower() not in (".json", ".yaml", ".yml"):
        raise ValueError(f"{what} {path} is neither .json nor .yaml nor .yml; save it as one of these")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path} is not UTF-8 ({error.reason} at byte {error.start})") from error
    if path.suffix.lower() == ".json":
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{what} {path} is no JSON: {error}") from error
    try:
        import yaml
    except ImportError as error:
        raise ValueError(f"{what} {path} needs PyYAML: pip install pyyaml; or save it as .json") from error
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2024-13-01
        raise ValueError(f"{what} {path} is no YAML: {' '.join(str(error).split())}") from error
