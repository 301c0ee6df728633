"""The loop that the device drives: its library is built, kept and loaded on any machine with nvcc; it runs on a GPU."""

from __future__ import annotations

import ctypes
import multiprocessing
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from parity import COMPILING

from hrm_kernels import while_graph
from hrm_kernels.while_graph import FUNCTIONS, WhileGraph, WhileGraphError, build, load, why_not

ROOT = Path(__file__).parents[1]

try:
    NVCC = while_graph._nvcc()
except WhileGraphError:
    NVCC = None

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
needs_gpu = pytest.mark.skipif(NVCC is None or not torch.cuda.is_available(), reason="no GPU, or no nvcc")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One for all tests here; the user's own is left alone."""
    folder = tmp_path_factory.mktemp("cache") / "made on first use"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HRM_KERNELS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def library(cache) -> Path:
    return build()


def prototypes() -> dict[str, int]:
    """Name -> number of arguments of each function that the source exports."""
    source = while_graph.SOURCE.read_text(encoding="utf-8")
    found = re.findall(r"^[\w* ]+\b(hrm_\w+)\(([^()]*)\) \{", source, re.MULTILINE)
    return {name: 0 if arguments == "void" else arguments.count(",") + 1 for name, arguments in found}


def test_the_interface_is_the_sources_own():
    assert {name: len(types) - 1 for name, types in FUNCTIONS.items()} == prototypes()


@needs_nvcc
def test_the_library_loads_without_torch_or_a_driver(library, cache):
    assert library.parent == cache and list(cache.iterdir()) == [library]
    code = "import ctypes, sys\nprint(ctypes.CDLL(sys.argv[1]).hrm_while_runtime_version(), 'torch' in sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", code, library], capture_output=True, text=True, check=True)
    version, torch_loaded = done.stdout.split()
    assert int(version) >= 12040 and torch_loaded == "False"


@needs_nvcc
def test_it_has_code_for_every_gpu_from_8_0_on(library):
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else Path("cuobjdump")
    tool = shutil.which("cuobjdump") or shutil.which(bundled)
    if tool is None:
        pytest.skip("cuobjdump is not installed")
    elf, ptx = (subprocess.run([tool, o, library], capture_output=True, text=True).stdout for o in ("-lelf", "-lptx"))
    assert {"80", "90"} <= set(re.findall(r"sm_(\d+)\w*\.cubin", elf)), elf
    assert re.findall(r"sm_(\d+)\w*\.ptx", ptx) == ["80"], ptx


@needs_nvcc
def test_a_second_build_takes_the_file_that_is_there(library):
    before = library.stat()
    assert build() == library
    after = library.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def build_with(barrier) -> None:
    barrier.wait()
    build()


@needs_nvcc
def test_two_processes_that_build_at_once_leave_one_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HRM_KERNELS_CACHE", str(tmp_path))
    fork = multiprocessing.get_context("fork")  # no second import of torch
    barrier = fork.Barrier(2)
    pair = [fork.Process(target=build_with, args=(barrier,)) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    assert [process.exitcode for process in pair] == [0, 0]
    (library,) = tmp_path.iterdir()
    load(library)


@needs_nvcc
def test_the_command_says_what_it_built(library, capsys):
    assert while_graph.main() == 0
    out = capsys.readouterr().out
    assert re.search(rf"^library +{library}\nCUDA runtime +\d+\.\d\narchitectures +sm_80, .*\nruns here +\w", out), out


@needs_nvcc
def test_a_source_that_does_not_compile_is_one_error_in_nvccs_words(tmp_path, monkeypatch, cache, capsys):
    broken = tmp_path / "broken.cu"
    broken.write_text('extern "C" int hrm_while_probe(void) { return no_such_name; }\n')
    monkeypatch.setattr(while_graph, "SOURCE", broken)
    before = set(cache.glob("*")) | set(cache.glob(".*"))
    assert while_graph.main() == 1
    error = capsys.readouterr().err
    assert 'identifier "no_such_name" is undefined' in error and error.count("\n") == 1, error
    assert set(cache.glob("*")) | set(cache.glob(".*")) == before


def test_without_nvcc_the_error_says_what_to_do(tmp_path, monkeypatch, capsys):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(while_graph, "CUDA", str(tmp_path))
    with pytest.raises(WhileGraphError, match=r"install the CUDA toolkit 12\.4 or later or set CUDA_HOME"):
        build()
    assert while_graph.main() == 1 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for nvcc is a shell script")
def test_cuda_home_comes_first(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal   : out of order' >&2\nexit 3\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(WhileGraphError, match=rf"^{nvcc} failed \(status 3\): nvcc fatal   : out of order$"):
        build()


@needs_nvcc
def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HRM_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="HRM_KERNELS_CACHE names another folder"):
        path = build()
    assert path.is_relative_to(tempfile.gettempdir())
    load(path)


def test_a_build_that_failed_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(while_graph, "_loaded", None)
    with monkeypatch.context() as patch:
        patch.setattr(while_graph, "SOURCE", tmp_path / "while_graph.cu")
        with pytest.raises(WhileGraphError, match="install hrm-kernels anew"):
            while_graph._library()
    with pytest.raises(WhileGraphError, match="install hrm-kernels anew"):
        while_graph._library()


def test_a_file_that_is_no_library_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "while_graph-0.so"
    path.write_bytes(b"\x7fELF and no more")
    with pytest.raises(WhileGraphError, match=rf"{path} cannot be loaded .*delete it"):
        load(path)


@needs_nvcc
def test_opening_what_cannot_be_opened_is_a_code_with_a_text(library):
    """A null pointer; here there may be no driver either."""
    functions = load(library)
    loop = ctypes.c_void_p(1)
    code = functions.hrm_while_open(None, None, ctypes.byref(loop))
    assert code > 0 and loop.value is None
    assert len(functions.hrm_while_error(code)) > 10
    functions.hrm_while_free(None)


def test_the_cpu_is_refused_by_name():
    assert "cpu" in why_not(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"n_active is 1 of torch\.int32 on cpu"):
        WhileGraph(lambda: None, torch.ones(1, dtype=torch.int32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_says_so():
    assert "CUDA" in why_not(torch.device("cuda"))


def test_a_built_package_carries_the_source(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("hrm_kernels", "hrm_model", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    built = {path.relative_to(tmp_path / "built") for path in (tmp_path / "built").rglob("*.*")}
    assert {Path("hrm_kernels/csrc/while_graph.cu"), Path("hrm_model/assets/gpt2.tiktoken")} <= built
    assert {Path("hrm_kernels/while_graph.py"), Path("hrm_kernels/kernels/halting.py")} <= built


@pytest.fixture
def counters():
    """n_active and what the steps add to."""
    return torch.zeros(1, dtype=torch.int32, device="cuda"), torch.zeros(4, device="cuda")


def count_down(n_active, total):
    def step():
        n_active.sub_(1)
        total.add_(1)

    n_active.fill_(1)
    step()  # loads the kernels
    total.zero_()
    return step


@needs_gpu
def test_it_runs_as_many_steps_as_are_needed(counters):
    n_active, total = counters
    graph = WhileGraph(count_down(n_active, total), n_active)
    assert total.tolist() == [0] * 4, "capturing ran a step"
    for n in (0, 1, 7, 0, 300, 7):
        total.zero_()
        n_active.fill_(n)
        graph.run()
        assert (total.tolist(), n_active.item()) == ([n] * 4, 0)


@needs_gpu
def test_it_runs_on_the_current_stream_behind_what_is_there(counters):
    n_active, total = counters
    graph = WhileGraph(count_down(n_active, total), n_active)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for n in (5, 6, 7):
            torch.cuda._sleep(1_000_000)
            n_active.fill_(n)
            graph.run()
        found = total.tolist()
    assert found == [18] * 4


@needs_gpu
@pytest.mark.parametrize("fault", ["raises", "waits"])
def test_a_body_that_fails_leaves_everything_usable(counters, fault):
    n_active, total = counters
    step = count_down(n_active, total)
    streams = []

    def faulty():
        streams.append(torch.cuda.current_stream())
        step()
        if fault == "waits":
            total.sum().item()
        raise KeyError("a fault of the body's own")

    with pytest.raises(KeyError if fault == "raises" else RuntimeError):
        WhileGraph(faulty, n_active)
    with torch.cuda.stream(streams[0]):
        assert not torch.cuda.is_current_stream_capturing()
        assert total.add(1).tolist() == [1] * 4
    torch.cuda.synchronize()
    n_active.fill_(7)
    WhileGraph(step, n_active).run()
    assert total.tolist() == [7] * 4


@needs_gpu
def test_other_threads_may_allocate_and_wait_while_it_is_recorded(counters):
    n_active, total = counters
    step = count_down(n_active, total)
    found = []

    def elsewhere():
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(torch.full((1 << 24,), 2.0, device="cuda").sum().item())

    def body():
        step()
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    n_active.fill_(3)
    WhileGraph(body, n_active).run()
    assert total.tolist() == [3] * 4 and found == [2.0 * (1 << 24)]


@needs_gpu
def test_a_closed_graph_runs_no_more(counters):
    n_active, total = counters
    graph = WhileGraph(count_down(n_active, total), n_active)
    n_active.fill_(7)
    graph.run()
    graph.close()
    graph.close()
    assert total.tolist() == [7] * 4, "a run under way is finished"
    with pytest.raises(WhileGraphError, match="closed"):
        graph.run()


@needs_gpu
def test_a_counter_of_another_kind_is_refused_by_name():
    assert why_not(torch.device("cuda")) is None
    for wrong in (torch.zeros(2, dtype=torch.int32, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")):
        with pytest.raises(ValueError, match=rf"n_active is {wrong.numel()} of {wrong.dtype} on cuda:0"):
            WhileGraph(lambda: None, wrong)


@needs_gpu
def test_a_process_that_leaves_its_graph_open_ends_well(cache):
    code = (
        "import torch\n"
        "from hrm_kernels.while_graph import WhileGraph\n"
        "n_active = torch.ones(1, dtype=torch.int32, device='cuda').sub_(0)\n"
        "graph = WhileGraph(lambda: n_active.sub_(1), n_active)\n"
        "graph.run()\n"
        "print(n_active.item())\n"
    )
    environment = COMPILING | {"HRM_KERNELS_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0\n") and "Exception" not in done.stderr, done.stderr
