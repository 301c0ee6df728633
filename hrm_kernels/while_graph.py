"""A loop that the device drives: a CUDA graph whose WHILE node goes on while a counter on the device is above 0.

    WhileGraph(step, n_active).run()      while n_active > 0: step()

The host launches once and neither counts steps nor waits. torch has no such nodes, so csrc/while_graph.cu makes them:
a plain C interface over pointers and a stream, compiled by nvcc on first use, cached and called through ctypes. One
library serves every torch and Python; `python -m hrm_kernels.while_graph` builds it and says whether it can run here.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_void_p
from pathlib import Path

import torch
from torch import Tensor

OLDEST = (8, 0)
"""Compute capability from which the library has code."""

CUDA = "/usr/local/cuda"
"""Where toolkits install themselves: looked at last."""

SOURCE = Path(__file__).parent / "csrc" / "while_graph.cu"
if not SOURCE.is_file():  # a checkout keeps it beside the package, an installed package inside
    SOURCE = Path(__file__).parents[1] / "csrc" / "while_graph.cu"

FUNCTIONS = {
    "hrm_while_runtime_version": (c_int,),
    "hrm_while_driver_version": (c_int,),
    "hrm_while_error": (c_char_p, c_int),
    "hrm_while_probe": (c_int,),
    "hrm_while_open": (c_int, c_void_p, c_void_p, POINTER(c_void_p)),
    "hrm_while_close": (c_int, c_void_p),
    "hrm_while_run": (c_int, c_void_p, c_void_p),
    "hrm_while_free": (None, c_void_p),
}
"""The library's interface: name -> type of the result, types of the arguments."""

_OLD_DRIVER = (35, 36, 222)
"""cudaErrorInsufficientDriver, cudaErrorCallRequiresNewerDriver, cudaErrorUnsupportedPtxVersion."""


class WhileGraphError(RuntimeError):
    """The library could not be built or loaded, or CUDA refused; the message says which and why."""


def _output(*command: str | Path) -> str:
    """What a command of the toolkit prints; if it fails, an error of one line in its own words."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return done.stdout
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    # the code that an error is about is printed after it: the last lines that say "error" tell more than the last lines
    words = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()] or lines
    raise WhileGraphError(f"{command[0]} failed (status {done.returncode}): {' | '.join(words[-3:])}")


def _nvcc() -> str:
    homes = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*homes, os.environ.get("PATH", os.defpath), f"{CUDA}/bin"]
    if found := shutil.which("nvcc", path=os.pathsep.join(places)):
        return found
    raise WhileGraphError(
        f"nvcc is in none of $CUDA_HOME/bin, $CUDA_PATH/bin, $PATH, {CUDA}/bin; install the CUDA toolkit 12.4 or later"
        " or set CUDA_HOME to where it is"
    )


def _architectures(nvcc: str) -> list[str]:
    """The GPUs that get machine code: the first of each generation from 8.0 on that this nvcc knows. The others of a
    generation run the same code; later ones compile the PTX of the oldest when they load it."""
    known = _output(nvcc, "--list-gpu-code").split()
    return [number for number in ("80", "90", "100") if f"sm_{number}" in known]


def _flags(architectures: list[str]) -> list[str]:
    # The static runtime keeps its symbols to itself. A shared one's would be looked up among what the process shows to
    # everyone, and torch shows its own runtime, perhaps of another version with other arguments.
    flags = ["-O2", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"]
    flags += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    return [*flags, f"-gencode=arch=compute_{architectures[0]},code=compute_{architectures[0]}"]


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("HRM_KERNELS_CACHE") or os.path.join(base, "hrm_kernels"))


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="hrm_kernels-")  # goes when the process does


def _writable(folder: Path) -> Path:
    """`folder`, made if need be, or a temporary one of this process where that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except OSError as error:
        what = f"{folder} cannot be written ({error.strerror}), so every process compiles {SOURCE.name} for itself"
        warnings.warn(f"{what}; HRM_KERNELS_CACHE names another folder", stacklevel=3)
        return Path(_own_folder().name)


def build() -> Path:
    """Compile csrc/while_graph.cu, unless the cache holds it already, and return the library's path.

    The cache is $HRM_KERNELS_CACHE, $XDG_CACHE_HOME/hrm_kernels or ~/.cache/hrm_kernels; the file's name is a hash of
    source, compiler and flags. It appears there whole or not at all, so any number of processes may build at once.

    Raises:
        WhileGraphError: no source, no nvcc, or nvcc failed; the message has its own words.
    """
    if not SOURCE.is_file():
        raise WhileGraphError(f"{SOURCE} is not there; install hrm-kernels anew")
    nvcc = _nvcc()
    flags = _flags(_architectures(nvcc))
    parts = [SOURCE.read_text(encoding="utf-8"), _output(nvcc, "--version"), platform.machine(), *flags]
    name = f"while_graph-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    library = _cache() / name
    if not library.is_file():
        library = _writable(library.parent) / name
    if not library.is_file():
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".building-") as beside:
            made = Path(beside, name)
            _output(nvcc, *flags, "-o", made, SOURCE)
            with made.open("rb") as file:
                os.fsync(file.fileno())  # after a power cut, no name without its content
            made.replace(library)
    return library


def load(path: Path) -> ctypes.CDLL:
    """The library at `path`, its functions' types set. Needs no GPU and no driver.

    Raises:
        WhileGraphError: it cannot be loaded.
    """
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, *arguments) in FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise WhileGraphError(f"{path} cannot be loaded ({error}); delete it to have it built anew") from error
    return library


_lock = threading.Lock()
_loaded: ctypes.CDLL | str | None = None


def _library() -> ctypes.CDLL:
    """Built and loaded once a process; what went wrong the first time is the answer from then on."""
    global _loaded
    with _lock:
        if _loaded is None:
            try:
                _loaded = load(build())
            except (WhileGraphError, OSError) as error:
                _loaded = str(error)
    if isinstance(_loaded, str):
        raise WhileGraphError(_loaded)
    return _loaded


def why_not(device: torch.device) -> str | None:
    """None if a WhileGraph can run on `device`, else the reason in words. The first call for a GPU builds."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}, a CUDA graph needs a CUDA device"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "this torch is not built for CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
    return _why_not(torch.cuda.current_device() if device.index is None else device.index)


@functools.lru_cache(maxsize=64)
def _why_not(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        found, least = (".".join(map(str, c)) for c in (capability, OLDEST))
        return f"the GPU has compute capability {found}, the loop needs {least} or later"
    try:
        library = _library()
    except WhileGraphError as error:
        return str(error)
    with torch.cuda.device(index):
        code = library.hrm_while_probe()
    if code in _OLD_DRIVER:
        driver, runtime = map(_dotted, (library.hrm_while_driver_version(), library.hrm_while_runtime_version()))
        remedy = "update the driver, or point CUDA_HOME at a toolkit (12.4 or later) that is no newer than the driver"
        return f"the driver is for CUDA {driver}, the library was built with {runtime}; {remedy}"
    return _text(library, code) if code else None


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _text(library: ctypes.CDLL, code: int) -> str:
    return f"CUDA says {library.hrm_while_error(code).decode()!r} (error {code})"


def _free(library: ctypes.CDLL, loop: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        library.hrm_while_free(loop)


class WhileGraph:
    """`while n_active > 0: body()` as one CUDA graph: no rows run no step, and no step is run in vain.

    `body` is called once, here, and what it launches on the current stream is recorded, not run. So it
      - brings n_active to 0 after finitely many runs, or the GPU never finishes;
      - has run before with the same shapes: kernels must not be compiled, loaded or timed while they are recorded;
      - works in place on tensors that stay where they are for as long as the graph is run, and allocates nothing;
      - launches kernels, copies and memsets only, and never waits for the device (.item(), printing a tensor).

    `close()` frees the graph, which otherwise goes with the object; a run under way is finished first.

    Args:
        body: one step.
        n_active: int32 on a CUDA device, one element; read before the first step and after each.

    Raises:
        ValueError: n_active is something else.
        WhileGraphError: the device cannot run it (`why_not` says so beforehand), or CUDA refused to record it.
        Whatever body raises; the recording is undone.
    """

    def __init__(self, body: Callable[[], None], n_active: Tensor):
        self._device = n_active.device
        if self._device.type != "cuda" or n_active.dtype != torch.int32 or n_active.numel() != 1:
            found = f"{n_active.numel()} of {n_active.dtype} on {self._device}"
            raise ValueError(f"n_active is {found}; it must be 1 of torch.int32 on a CUDA device")
        if reason := why_not(self._device):
            raise WhileGraphError(f"no loop on {self._device}: {reason}")
        self._library = _library()
        stream, loop = torch.cuda.Stream(self._device), c_void_p()
        with torch.cuda.stream(stream):  # makes its device current, too
            self._kept = n_active
            self._check(self._library.hrm_while_open(n_active.data_ptr(), stream.cuda_stream, ctypes.byref(loop)))
            self._loop = loop.value
            # A finalizer runs once, and at exit before torch is taken apart.
            self.close = weakref.finalize(self, _free, self._library, self._loop, self._device)
            try:
                body()
                self._check(self._library.hrm_while_close(self._loop))
            except BaseException:
                self.close()
                raise

    def _check(self, code: int) -> None:
        if code:
            raise WhileGraphError(_text(self._library, code))

    def run(self) -> None:
        """Launch on the current stream of n_active's device, behind this graph's earlier runs; does not wait."""
        if not self.close.alive:
            raise WhileGraphError("this WhileGraph is closed")
        with torch.cuda.device(self._device):
            self._check(self._library.hrm_while_run(self._loop, torch.cuda.current_stream().cuda_stream))


def main() -> int:
    """Build, load, and print where the library is, what is in it, and whether it can run here."""
    try:
        path = build()
        library = load(path)
        architectures = _architectures(_nvcc())
    except (WhileGraphError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    reason = why_not(torch.device("cuda"))
    print(f"library        {path}")
    print(f"CUDA runtime   {_dotted(library.hrm_while_runtime_version())}")
    print(f"architectures  {', '.join(f'sm_{n}' for n in architectures)}; later GPUs take PTX of sm_{architectures[0]}")
    print(f"runs here      {'no: ' + reason if reason else 'yes'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
