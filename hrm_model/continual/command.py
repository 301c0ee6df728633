"""train/continual.py's command: which model, which text, what would happen; errors on one line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..atomic import read_json
from ..training.flags import add_flags
from ..training.rundir import RunLock
from .options import ContinualConfig
from .store import ModelDirectory, describe, models_in
from .text import check_length, read
from .training import KEPT, AlreadyLearned, ContinualTraining, Lesson

FIRST = "model"
"""Name of a model that was given none."""


def parser(description: str) -> argparse.ArgumentParser:
    """The flags; those that are not given leave no trace."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--list", action="store_true", help="list the models and what they have seen, and leave")
    made.add_argument("--gui", action="store_true", help="choose text and settings in a window")
    add_flags(made, ContinualConfig, {"fused": {"nargs": "?", "const": "auto"}}, ContinualConfig.NO_FLAG)
    return made


def run(given: dict[str, Any]) -> int:
    """Do what the flags ask for; returns the process's exit status."""
    from ..training.command import explained

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        return _run(given)
    except KeyboardInterrupt:
        print("\nstopped before or after training; nothing was lost", file=sys.stderr)
        return 130
    except AlreadyLearned as told:
        print(told)
        return 0
    except Exception as error:
        message = explained(error, "continual")
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1


def _run(given: dict[str, Any]) -> int:
    listing, gui = given.pop("list", False), given.pop("gui", False)
    if listing:
        found = models_in(Path(given.get("models", ContinualConfig.models)))
        print("\n".join(map(describe, found)) or "no models yet")
        return 0
    if gui:
        from .settings_window import ask

        given = ask(given)
        if given is None:
            print("nothing was chosen")
            return 0
    lesson = prepare(given)
    options, directory = lesson.options, lesson.directory
    if options.dry_run:
        print(lesson.plan() + "\ndry run: nothing was written")
        return 0
    existed = directory.path.exists()
    lock = RunLock(directory.path, "--model")
    try:
        if directory.history() != lesson.before:
            raise ValueError(f"another process taught {directory.path} while this one started; run the command again")
        # A growth that memory cannot hold is refused before anything is written.
        print(lesson.plan(), flush=True)
        return ContinualTraining(lesson)()
    finally:
        lock.close()
        if not existed and not directory.has_checkpoint():
            _remove_if_bare(directory)


def prepare(given: dict[str, Any]) -> Lesson:
    """The lesson that the flags ask for; nothing is written.

    Raises:
        ValueError, OSError: something about the options, the text or the model is wrong; AlreadyLearned.
    """
    given = dict(given)
    recipe = given.pop("recipe", "base")
    options = ContinualConfig.of_recipe(recipe, **given)
    if not options.text:
        raise ValueError("no text is given; give one with --text FILE, or in a window with --gui; --list shows models")
    text = read(options.text)
    directory = choose(options, text.sha256)
    options = ContinualConfig.of_recipe(recipe, **kept(directory) | given)
    check_length(text, options.seq_length)
    return Lesson(options, text, directory)


def kept(directory: ModelDirectory) -> dict[str, Any]:
    """Options that a model keeps where the flags do not say otherwise (and are told then, or set how it halts anew)."""
    if not directory.has_checkpoint():
        return {}
    checkpoint = directory.checkpoint()
    config, run = read_json(checkpoint / "config.json"), read_json(checkpoint / "state.json")["run"]
    return {flag: config[key] for flag, key in KEPT.items()} | {name: run[name] for name in ("halting", "depth")}


def _remove_if_bare(directory: ModelDirectory) -> None:
    """A new model that came to nothing leaves nothing."""
    if not any((directory.path / "runs").glob("*/checkpoints")) and directory.path.is_dir():
        import shutil

        shutil.rmtree(directory.path)


def choose(options: ContinualConfig, sha256: str) -> ModelDirectory:
    """The model that learns the text.

    Raises:
        ValueError: --model names none, or --fresh one that exists.
    """
    folder, name = Path(options.models), options.model
    if name and (Path(name).name != name or name.startswith(".")):  # ".." is a name too, and not one in the folder
        raise ValueError(
            f"--model {name!r} is no name of a directory in --models {folder}; give the name alone, without a first dot"
        )
    there = models_in(folder)
    if options.fresh:
        return ModelDirectory(_unused(folder / (name or FIRST)))
    if name:
        named = ModelDirectory(folder / name)
        if not named.has_checkpoint() and (foreign := named.foreign()):
            raise ValueError(
                f"--model {name!r}: {named.path} holds no model of characters but {', '.join(foreign[:5])}; choose "
                "another name"
            )
        return named
    if not there:
        # what a first lesson left that was killed before its first checkpoint is no model that could be overwritten
        begun = ModelDirectory(folder / FIRST)
        return ModelDirectory(_unused(begun.path)) if begun.foreign() else begun
    if len(there) > 1 and sys.stdin and sys.stdin.isatty() and sys.stdout.isatty():
        return _asked(folder, there, sha256)
    return there[0]


def _unused(path: Path) -> Path:
    """The path, or the first of path-2, path-3, .. that is not taken: a fresh start never overwrites."""
    candidate, n = path, 1
    while candidate.exists():
        n += 1
        candidate = path.with_name(f"{path.name}-{n}")
    return candidate


def _asked(folder: Path, there: list[ModelDirectory], sha256: str) -> ModelDirectory:
    """Ask which model goes on; those that have not learned this text first."""
    there = sorted(there, key=lambda m: _has_learned(m, sha256))
    for number, model in enumerate(there, 1):
        print(f"{number}. {describe(model)}")
    print(f"{len(there) + 1}. a fresh model")
    try:
        answer = input(f"which model learns this text, 1 to {len(there) + 1} (default 1): ").strip() or "1"
    except EOFError:
        raise ValueError("no model was chosen; give one with --model NAME, or --fresh for a new one") from None
    if not answer.isdecimal() or not 1 <= int(answer) <= len(there) + 1:
        raise ValueError(f"{answer!r} is none of 1 to {len(there) + 1}")
    return there[int(answer) - 1] if int(answer) <= len(there) else ModelDirectory(_unused(folder / FIRST))


def _has_learned(model: ModelDirectory, sha256: str) -> bool:
    try:
        return any(seen.sha256 == sha256 and seen.status == "learned" for seen in model.history().texts)
    except ValueError:  # all of its checkpoints are damaged: the listing says so
        return False
