"""Tensors of which several processes hold parts, to and from safetensors files.

    model.safetensors                    all of it, written by one process
    model-00002-of-00004.safetensors     what the second of four held: rows (first axis) of the tensors in shards
    metadata "rows"                      JSON: tensor name -> [its first row here, its rows in all]

Hugging Face names the parts of a large model alike, with whole tensors in each and no "rows". Reading joins all, so how
many processes wrote is of no concern to anybody else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .atomic import CheckpointError
from .ranks import Ranks
from .tensors import read_tensors, to_store


def part_names(name: str, size: int) -> list[str]:
    """The files of `size` processes that stand for file `name`."""
    stem, suffix = name.rsplit(".", 1)
    return [f"{stem}-{rank + 1:05d}-of-{size:05d}.{suffix}" for rank in range(size)]


def files_of(name: str, there: Iterable[str]) -> list[str]:
    """Which of the files `there` hold what `name` stands for: itself, or all parts; [name] where neither is."""
    there = set(there)
    if name in there:
        return [name]
    stem, suffix = map(re.escape, name.rsplit(".", 1))
    sizes = {int(m[1]) for entry in there if (m := re.fullmatch(rf"{stem}-\d{{5}}-of-(\d{{5}})\.{suffix}", entry))}
    return part_names(name, max(sizes)) if sizes else [name]


def in_shards(tensor: Tensor) -> bool:
    """Whether it is a DTensor; torch.distributed.tensor, which takes a second to import, is left alone."""
    return hasattr(tensor, "device_mesh")


def write_part(
    directory: Path, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str], ranks: Ranks
) -> None:
    """Write this process's part. Whole tensors are the first process's to write; without shards `name` is all."""
    sharded = any(map(in_shards, tensors.values()))
    own, rows = {}, {}
    for key, tensor in tensors.items():
        if in_shards(tensor):
            local = tensor.to_local()
            chunk = -(-tensor.shape[0] // ranks.size)
            if local.numel():
                own[key], rows[key] = local, [ranks.rank * chunk, tensor.shape[0]]
        elif ranks.is_first:
            own[key] = tensor
    if not sharded and not ranks.is_first:
        return
    if sharded:
        name, metadata = part_names(name, ranks.size)[ranks.rank], metadata | {"rows": json.dumps(rows)}
    save_file(to_store(own), directory / name, metadata={"format": "pt"} | metadata)


def read_whole(directory: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of `name`, or of all of its parts.

    Raises:
        CheckpointError: a part is missing or damaged, or the parts do not make up whole tensors.
    """
    files = files_of(name, (entry.name for entry in directory.iterdir()))
    if files == [name]:
        return read_tensors(directory / name)
    whole: dict[str, Tensor] = {}
    pieces: dict[str, list[tuple[int, int, Tensor]]] = {}
    about: dict[str, str] = {}
    for file in files:
        tensors, metadata = read_tensors(directory / file)
        try:
            rows = json.loads(metadata.get("rows", "{}"))
            for key, tensor in tensors.items():
                if key in rows:
                    first, total = rows[key]
                    pieces.setdefault(key, []).append((first, total, tensor))
                else:
                    whole[key] = tensor
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{directory / file} is no part of ours ({error!r}); use another checkpoint"
            ) from error
        about = about or metadata
    for key, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        expected = 0
        for first, _, tensor in parts:
            if first != expected:
                break
            expected += len(tensor)
        if expected != parts[0][1]:
            raise CheckpointError(
                f"{directory}: the parts of {key} hold rows up to {expected} of {parts[0][1]}; use another checkpoint"
            )
        whole[key] = torch.cat([tensor for *_, tensor in parts])
    return whole, {key: value for key, value in about.items() if key != "rows"}


def spread_like(value: Tensor, target: Tensor) -> Tensor:
    """`value`, which every process has whole, in shards where `target` is."""
    if not in_shards(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
