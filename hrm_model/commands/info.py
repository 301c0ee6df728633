"""hrm info: what a checkpoint is, what it costs to run, and whether its files are whole.

hrm info runs/tiny
hrm info runs/tiny --json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .shared import CKPT_HELP

HELP = "what a checkpoint is: parameters, cost, memory, losses, whether its files are whole"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hrm info`."""
    parser.add_argument("ckpt", metavar="CKPT", help=CKPT_HELP)
    parser.add_argument("--device", default="auto", help="whose free memory is looked at (default: auto)")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the facts.

    Raises:
        ValueError, OSError: the checkpoint cannot be read, or there is no such device.
    """
    found = facts(args.ckpt, args.device)
    print(json.dumps(found, indent=2) if args.json else "\n".join(_lines(found)))
    return 0


def facts(path: str, device: str = "auto") -> dict[str, Any]:
    """What is known about a checkpoint, as plain JSON values.

    Returns:
        name, path, files (what was verified), parameters (by part, total), quantization (None or how), config, halting,
        flops_per_token (forward, in a full window, by depth), cache (bytes per token and window by dtype, how many
        windows fit), training (step and losses of a training run, else None).

    Raises:
        ValueError, OSError: as load_model() and choose_device().
    """
    from ..checkpoint import load_model
    from ..quantization import quantization_of
    from ..training.device import choose_device

    chosen = choose_device(device)
    directory, files = _files(Path(path))
    model, config = load_model(path if directory is None else directory)
    return {
        "name": Path(path).resolve().name,
        "path": str(path),
        "files": files,
        "parameters": _parameters(model),
        "quantization": None if (how := quantization_of(model)) is None else how.to_dict(),
        "config": config.to_dict(),
        "halting": _halting(config),
        "flops_per_token": _flops(config),
        "cache": _cache(config, chosen),
        "training": _training(directory),
    }


def _files(path: Path) -> tuple[Path | None, str]:
    """(the directory that holds the model, None for a .pt; what is known about its files)."""
    from ..atomic import MANIFEST, read_manifest
    from ..checkpoint import ROLES, latest_checkpoint, role_checkpoint, verify_checkpoint

    directory = path if path.is_dir() else path.parent if path.suffix == ".safetensors" else None
    if directory is None:
        return None, "one published file, nothing to hold it against"
    if (directory / "checkpoints").is_dir() and not (directory / "config.json").exists():
        directory = latest_checkpoint(directory) or directory
    elif any((directory / role).is_dir() for role in ROLES):
        directory = role_checkpoint(directory)
    if not (directory / MANIFEST).exists():
        return directory, f"no {MANIFEST}, nothing to hold them against"
    verify_checkpoint(directory)
    n = len(read_manifest(directory))
    return directory, f"whole: size and sha256 of {n} files are those of {MANIFEST}"


def _parameters(model) -> dict[str, int]:
    core = model.hrm_core

    def count(*modules) -> int:
        return sum(p.numel() for m in modules for p in m.parameters())

    parts = {
        "embedding": count(model.wte, *([] if model.config.use_rotary else [model.wpe])),
        "input blocks": count(model.input_blocks),
        "H level": count(core.H_level),
        "L level": count(core.L_level),
        "halting head": count(core.q_head),
        "initial states": core.H_init.numel() + core.L_init.numel(),
        "output blocks": count(model.output_blocks),
        "final norm": count(model.ln_f),
        "output head": 0 if model.config.tie_embeddings else count(model.lm_head),
    }
    return parts | {"total": model.num_parameters()}


def _halting(config) -> dict[str, Any]:
    return {
        "objective": config.halting,
        "trained": config.head_is_trained,
        "bias": config.halt_bias,
        "max_steps": config.hrm_max_steps,
    }


def _flops(config) -> dict[str, float]:
    """Forward FLOPs of a token in a full window, by the steps it takes."""
    from ..training.flops import block_flops

    block = block_flops(config, config.block_size)
    outside = block * (config.n_input_layers + config.n_output_layers) + 2.0 * config.n_embd * config.vocab_size
    depths = {1, config.hrm_max_steps} | {2**k for k in range(10) if 2**k < config.hrm_max_steps}
    return {str(depth): outside + block * config.blocks_per_step * depth for depth in sorted(depths)}


def _cache(config, device) -> dict[str, Any]:
    import torch

    from ..cache import bytes_per_token, free_bytes

    free = free_bytes(device)
    result: dict[str, Any] = {"device": str(device), "free_bytes": free}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        at_most = bytes_per_token(config, dtype=dtype)
        window = at_most * config.block_size
        result[name] = {
            "bytes_per_token": at_most,
            "bytes_per_token_and_step": bytes_per_token(config, 2, dtype) - bytes_per_token(config, 1, dtype),
            "bytes_per_window": window,
            "windows_that_fit": None if free is None else free // window,
        }
    return result


def _training(directory: Path | None) -> dict[str, Any] | None:
    from ..atomic import read_json

    if directory is None or not (directory / "state.json").exists():
        return None
    state = read_json(directory / "state.json")
    options = state.get("run") if isinstance(state.get("run"), dict) else {}
    return {
        "checkpoint": directory.name,
        "step": state.get("step"),
        "steps": options.get("steps"),
        "recipe": options.get("recipe"),
        "losses": {key: value for key, value in state.items() if "loss" in key},
    }


def _lines(found: dict[str, Any]) -> list[str]:
    parameters, halting, cache = found["parameters"], found["halting"], found["cache"]
    total = parameters["total"]
    lines = [f"{found['name']}: {total:,} parameters", f"files: {found['files']}"]
    if how := found["quantization"]:
        from ..quantization import Quantization

        lines.append(f"quantised: {Quantization.from_dict(how).describe()}")
    if training := found["training"]:
        of = f" of {training['steps']}" if training["steps"] else ""
        recipe = f", recipe {training['recipe']}" if training["recipe"] else ""
        losses = "".join(f", {k.replace('_', ' ')} {_loss(v)}" for k, v in training["losses"].items())
        lines.append(f"training: step {training['step']}{of}{recipe}{losses}")
    lines += ["", "parameters"]
    for part, n in parameters.items():
        note = " (the embedding's own)" if part == "output head" and not n else ""
        lines.append(f"  {part:<15} {n:>13,} {n / total:>7.1%}{note}")
    head = f"trained with {halting['objective']!r}" if halting["trained"] else f"not trained ({halting['objective']!r})"
    lines += ["", f"halting: head {head}, bias {halting['bias']:g}, 1 to {halting['max_steps']} steps"]
    lines += ["", "forward FLOPs of a token in a full window, by steps"]
    lines += [
        f"  {depth:>3} {_unit(n, 1000, ('', 'k', 'M', 'G', 'T')):>9}FLOP"
        for depth, n in found["flops_per_token"].items()
    ]
    free = cache["free_bytes"]
    lines += ["", f"cache ({'free memory unknown' if free is None else _bytes(free) + ' free'} on {cache['device']})"]
    for name in ("float32", "bfloat16"):
        c = cache[name]
        fit = "" if c["windows_that_fit"] is None else f", {c['windows_that_fit']:,} fit now"
        lines.append(
            f"  {name:<9} {_bytes(c['bytes_per_token'])} a token at {halting['max_steps']} steps, "
            f"{_bytes(c['bytes_per_token_and_step'])} of it a step; a full window {_bytes(c['bytes_per_window'])}{fit}"
        )
    lines += ["", "config"]
    shown = {k: v for k, v in found["config"].items() if k not in ("architectures", "torch_dtype")}
    shown = {k: v for k, v in shown.items() if not k.endswith("_token_id")}
    lines += [f"  {key:<20} {'null' if value is None else value}" for key, value in shown.items()]
    return lines


def _loss(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _bytes(n: int) -> str:
    return _unit(n, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _unit(value: float, base: int, names: tuple[str, ...]) -> str:
    for name in names:
        if value < base or name == names[-1]:
            return f"{value:.0f} {name}" if name == names[0] else f"{value:.1f} {name}"
        value /= base
    raise AssertionError
