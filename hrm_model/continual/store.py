"""A model's directory: what it has seen, its checkpoints by name, its tokenizer.

    MODELS/NAME/  tokenizer.json                   characters by id; also in every checkpoint's state
                  latest/ best/ main/ pause/       newest; lowest validation loss of the newest text; end of the last
                                                   finished text; where a run was paused
                  runs/001-alice/                  a run of the common loop for each text: checkpoints, metrics, picture
                  data/001-alice/ samples/ elastic/   the text as ids, what replay knows of it, what the penalty holds
                  forgetting.json, forgetting.png

A named checkpoint is hard-linked to the run's own: it takes no room, and nothing ever changes such a file in place.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..atomic import MANIFEST, atomic_directory, read_json, read_manifest, remove_directory, write_file
from ..checkpoint import ROLES, role_checkpoint
from ..training.rundir import LOCK_FILE
from .tokenizer import CharTokenizer

TOKENIZER, PAUSE = "tokenizer.json", "pause"
_OURS = (f"{TOKENIZER}*", *ROLES, PAUSE, "runs", "data", "samples", "elastic", "forgetting.*", LOCK_FILE, ".*")


@dataclass
class Seen:
    """A text that a model has seen."""

    name: str
    sha256: str
    characters: int
    new_characters: int
    """Characters of the vocabulary that it brought."""
    steps: int = 0
    of: int = 0
    """Optimizer steps done and planned."""
    status: str = "learning"
    """learning, learned, or stopped."""
    val_loss: float | None = None


@dataclass
class Growth:
    """Layers that were added, and after how many characters."""

    at_characters: int
    L: int
    H: int
    parameters: int
    count: int = 1
    """Growths that were due at once."""


@dataclass
class History:
    """Everything a model has been through. It travels in the state of every checkpoint."""

    characters: str
    """Of the tokenizer, by id."""
    texts: list[Seen] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    """Row i: losses on texts 0..i after text i (forgetting.py)."""

    @property
    def total(self) -> int:
        """Characters of different texts."""
        return sum({t.sha256: t.characters for t in self.texts}.values())

    @property
    def n_growths(self) -> int:
        """Growths that were done."""
        return sum(g.count for g in self.growths)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> History:
        """What to_dict() gave."""
        texts, growths = [Seen(**t) for t in values["texts"]], [Growth(**g) for g in values["growths"]]
        return cls(values["characters"], texts, growths, [list(row) for row in values["losses"]])


@dataclass(frozen=True)
class ModelDirectory:
    """The directory of one model, which need not exist yet."""

    path: Path

    def run(self, number: int, name: str) -> Path:
        """Where the run of text `number` (from 1) is."""
        return self.path / "runs" / f"{number:03d}-{name}"

    def data(self, number: int, name: str) -> Path:
        """Its ids."""
        return self.path / "data" / f"{number:03d}-{name}"

    def samples(self, number: int, name: str) -> Path:
        """What replay knows of it."""
        return self.path / "samples" / f"{number:03d}-{name}.npy"

    def elastic(self, number: int, name: str) -> Path:
        """What the penalty holds while it is learned."""
        return self.path / "elastic" / f"{number:03d}-{name}.safetensors"

    def has_checkpoint(self) -> bool:
        """Whether there is a named checkpoint, intact or not."""
        return any((self.path / role).is_dir() for role in ROLES)

    def foreign(self) -> list[str]:
        """Names of what is there and no lesson wrote."""
        if self.path.is_file():
            return [self.path.name]
        there = sorted(self.path.iterdir()) if self.path.is_dir() else []
        return [entry.name for entry in there if not any(entry.match(pattern) for pattern in _OURS)]

    def checkpoint(self) -> Path:
        """The first intact one of latest, best, main. Raises CheckpointError."""
        return role_checkpoint(self.path)

    def history(self) -> History | None:
        """Of that checkpoint; None for a model without one. Raises CheckpointError where all are damaged."""
        return read_history(self.checkpoint()) if self.has_checkpoint() else None

    def tokenizer(self) -> CharTokenizer:
        """The checkpoint's characters, which tokenizer.json must begin with: it is ahead until a text's first save.

        Raises:
            ValueError: it has others, is missing or damaged; names `hrm recover`.
        """
        found = CharTokenizer.load(self.path / TOKENIZER)
        history = self.history()
        if history is None:
            return found
        made = CharTokenizer(history.characters)
        if not found.extends(made):
            raise ValueError(
                f"tokenizer {self.path / TOKENIZER} is of another model: its ids are not those of the checkpoint; "
                f"rebuild it: hrm recover {self.path}"
            )
        return made

    def link(self, role: str, checkpoint: Path) -> None:
        """Let `role` be this checkpoint."""
        with atomic_directory(self.path / role, overwrite=True) as directory:
            for name in read_manifest(checkpoint):
                try:
                    os.link(checkpoint / name, directory / name)
                except OSError:  # a file system without hard links
                    shutil.copyfile(checkpoint / name, directory / name)

    def unlink(self, role: str) -> None:
        """Let there be no such checkpoint."""
        if (self.path / role / MANIFEST).exists():
            remove_directory(self.path / role)

    def recover(self) -> tuple[CharTokenizer, Path | None]:
        """Rebuild tokenizer.json from the checkpoint and verify it.

        Returns:
            the tokenizer, and where the old file was kept, None if there was none.

        Raises:
            ValueError, OSError: no intact checkpoint, or its characters do not fit its model.
        """
        checkpoint = self.checkpoint()
        history, config = read_history(checkpoint), read_json(checkpoint / "config.json")
        made = CharTokenizer(history.characters)
        if made.n_vocab != config["n_chars"]:
            raise ValueError(
                f"{checkpoint} holds {made.n_vocab} characters and a model of {config['n_chars']}: it is no checkpoint "
                "of ours; take another with its directory's name, or learn anew"
            )
        path, kept = self.path / TOKENIZER, None
        if path.exists():
            kept = _free_name(path)
            write_file(kept, path.read_bytes(), overwrite=False)
        made.save(path)
        again = CharTokenizer.load(path)
        assert again.characters == made.characters and again.decode(again.encode(made.characters)) == made.characters
        return again, kept


def _free_name(path: Path) -> Path:
    for n in range(1, 10_000):
        candidate = path.with_name(f"{path.name}.old-{n}")
        if not candidate.exists():
            return candidate
    raise ValueError(f"{path} has 9,999 old copies beside it; remove some")


def read_history(checkpoint: Path) -> History:
    """What a checkpoint's state says of its model. Raises ValueError where it says nothing."""
    try:
        return History.from_dict(read_json(checkpoint / "state.json")["continual"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint} is no checkpoint of a continual model: no history in it ({error!r})") from error


def model_directory_of(path: str | Path) -> ModelDirectory:
    """The model that a path belongs to: its directory, a named checkpoint in it, or a checkpoint of one of its runs.

    Raises:
        ValueError: none.
    """
    path = Path(path).resolve()
    for candidate in (path, *path.parents):
        if (candidate / TOKENIZER).exists() or any((candidate / role / "state.json").exists() for role in ROLES):
            return ModelDirectory(candidate)
    raise ValueError(
        f"no tokenizer belongs to {path}: neither there nor above is a {TOKENIZER} or a checkpoint by name; give the "
        "model's directory, such as models/model"
    )


def models_in(folder: Path) -> list[ModelDirectory]:
    """Models in a folder, the one whose checkpoint is newest first."""
    if not folder.is_dir():
        return []
    found = [ModelDirectory(entry) for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    found = [model for model in found if model.has_checkpoint()]
    return sorted(found, key=lambda m: (max(_time(m.path / role) for role in ROLES), m.path.name), reverse=True)


def _time(path: Path) -> float:
    return (path / MANIFEST).stat().st_mtime if (path / MANIFEST).exists() else 0.0


def describe(model: ModelDirectory) -> str:
    """A model and what it has seen, for a listing."""
    try:
        checkpoint = model.checkpoint()
        history, config = read_history(checkpoint), read_json(checkpoint / "config.json")
    except ValueError as error:
        return f"{model.path.name}: cannot be read: {error}"
    lines = [
        f"{model.path.name}: {len(history.characters)} characters in {config['vocab_size']} rows, "
        f"{config['hrm_L_layers']} L + {config['hrm_H_layers']} H layers, {history.total:,} characters seen, "
        f"from {checkpoint.name}" + (", paused" if (model.path / PAUSE).is_dir() else "")
    ]
    for number, text in enumerate(history.texts, 1):
        loss = "" if text.val_loss is None else f", validation loss {text.val_loss:.4f}"
        lines.append(
            f"  {number}. {text.name}: {text.characters:,} characters, {text.new_characters} new, "
            f"{text.status} ({text.steps} of {text.of} steps){loss}"
        )
    lines += [f"  grown by {g.L} L + {g.H} H layers at {g.at_characters:,} characters" for g in history.growths]
    return "\n".join(lines)
