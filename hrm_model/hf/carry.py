"""The model's source as flat files for a folder on the hub, for those who load it without this package.

transformers copies, of a folder whose config.json has auto_map, the file that is named there and all that it imports by
`from .name import`: files beside it. So every module that the model needs becomes one file, hrm_model/core.py becomes
hrm_model_core.py, and only its import lines change. Kernels, which need a compiler, stay with the package: the carried
code runs the reference, cache and all.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

CONFIGURATION, MODELING = "configuration_cosmicfish_hrm", "modeling_cosmicfish_hrm"
AUTO_MAP = {
    "AutoConfig": f"{CONFIGURATION}.CosmicFishHRMConfig",
    "AutoModelForCausalLM": f"{MODELING}.CosmicFishHRMForCausalLM",
}
_NAMES = {"hrm_model.hf.configuration": CONFIGURATION, "hrm_model.hf.modeling": MODELING}
_STAYS = ("hrm_kernels.kernels", "hrm_kernels.while_graph", "hrm_model.generate")
"""Modules that are left behind, with all below them."""
_INSTALLED = '_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None'


def carried_files() -> dict[str, str]:
    """File name -> source of every module that the model with Hugging Face's interface needs."""
    waiting, sources = ["hrm_model.hf.modeling"], {}
    while waiting:
        module = waiting.pop()
        if module not in sources:
            sources[module], needed = _flat(module)
            waiting += needed
    files = {f"{_file(module)}.py": source for module, source in sources.items()}
    kernels = files["hrm_kernels_backend.py"]
    assert kernels.count(_INSTALLED) == 1
    files["hrm_kernels_backend.py"] = kernels.replace(
        _INSTALLED, "_TRITON_INSTALLED = False  # kernels are not carried"
    )
    # transformers finds files by lines of this form alone, and not `from . import name`
    named = sorted(name.removesuffix(".py") for name in files if name != f"{MODELING}.py")
    finds = "\n".join(f"    from .{name} import __doc__ as _  # noqa: F401" for name in named)
    files[f"{MODELING}.py"] += (
        "\n\nfrom typing import TYPE_CHECKING  # noqa: E402\n\n"
        f"if TYPE_CHECKING:  # by these lines transformers finds the files to copy\n{finds}\n"
    )
    return files


def _file(module: str) -> str:
    return _NAMES.get(module, module.replace(".", "_"))


def _flat(module: str) -> tuple[str, list[str]]:
    """(source with flat imports, modules of ours that it imports)."""
    path = Path(importlib.util.find_spec(module).origin)
    source = path.read_text(encoding="utf-8")
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    lines, needed = source.splitlines(keepends=True), []
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in sorted(found, key=lambda node: -node.lineno):
        replacement = _flat_import(node, package, needed)
        if replacement is not None:
            indent = " " * node.col_offset
            lines[node.lineno - 1 : node.end_lineno] = [f"{indent}{line}\n" for line in replacement]
    return "".join(lines), needed


def _flat_import(node: ast.Import | ast.ImportFrom, package: str, needed: list[str]) -> list[str] | None:
    """The statements in place of one; None where it stays as it is."""
    if isinstance(node, ast.Import):
        ours = [alias for alias in node.names if alias.name.split(".")[0] in ("hrm_model", "hrm_kernels")]
        if not ours:
            return None
        assert len(node.names) == 1 and ours[0].asname, ast.unparse(node)
        return _whole_module(ours[0].name, ours[0].asname, needed)
    target = node.module or ""
    if node.level:
        base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
        target = f"{base}.{target}".rstrip(".")
    if target.split(".")[0] not in ("hrm_model", "hrm_kernels"):
        return None
    statements, rest = [], []
    for alias in node.names:
        submodule = f"{target}.{alias.name}"
        if node.module is None and importlib.util.find_spec(submodule) is not None:
            statements += _whole_module(submodule, alias.asname or alias.name, needed)
        else:
            rest.append(ast.unparse(alias))
    if rest and target.startswith(_STAYS):
        statements.append(_missing(target))
    elif rest:
        needed.append(target)
        statements.append(f"from .{_file(target)} import {', '.join(rest)}")
    return statements


def _whole_module(module: str, name: str, needed: list[str]) -> list[str]:
    if module.startswith(_STAYS):
        return [_missing(module)]
    needed.append(module)
    return [f"from . import {_file(module)} as {name}"]


def _missing(module: str) -> str:
    return f'raise ImportError("{module} is not carried with the model; pip install hrm-kernels")'
