"""The build of the CUDA library: what nvcc is told, which nvcc, what is compiled again, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_build
import pytest
import torch
from cuda_build import CudaBuildError, Nvcc, Torch
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

ROOT = Path(__file__).resolve().parent.parent
TORCH = Torch(torch.__version__, torch.version.cuda, tuple(map(Path, include_paths())), Path(TORCH_LIB_PATH))
SOURCES = [Path("csrc/a_cuda.cu")]


def _script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def _fake(folder: Path, version: str = "12.4.131") -> Path:
    """An nvcc that only says its version."""
    release = version.rpartition(".")[0]
    said = f"Cuda compilation tools, release {release}, V{version}"
    return _script(folder / "nvcc", f"#!/bin/sh\necho '{said}'\n")


# Flags


def test_flags_keep_ieee_arithmetic() -> None:
    relaxing = [flag for flag in cuda_build.COMPILE if cuda_build.RELAXED.search(flag)]
    assert relaxing == ["-fmad=false", "-Xcompiler=-ffp-contract=off"]


def test_flags_fix_abi_targets_and_warnings() -> None:
    flags = " ".join(cuda_build.COMPILE)
    for flag in ("-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Werror=all-warnings", "-Xptxas=-v"):
        assert flag in cuda_build.COMPILE
    assert "-Xcompiler=-fvisibility=hidden" in flags and "-Xcompiler=-fPIC" in flags
    assert [flag for flag in cuda_build.COMPILE if "arch" in flag] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_commands_hold_these_flags_and_include_directories_only(tmp_path: Path) -> None:
    text = cuda_build.ninja_file(
        Nvcc(Path("/opt/my cuda/nvcc"), "12.4.1"), TORCH, [tmp_path / "csrc/a_cuda.cu"], tmp_path
    )
    (command,) = (line for line in text.splitlines() if "-c $in" in line)
    command = command.partition("=")[2]
    head, _, tail = command.partition(cuda_build.COMPILE[0])
    assert head.strip() == "'/opt/my cuda/nvcc'"
    words = (cuda_build.COMPILE[0] + tail).partition(" > ")[0].split()
    expected = [*cuda_build.COMPILE, "-Icsrc"]
    expected += [word for path in TORCH.include for word in ("-isystem", str(path))]
    assert words == [*expected, "-MD", "-MF", "$out.d", "-c", "$in", "-o", "$out"]


@pytest.mark.parametrize("name", cuda_build.NVCC_VARIABLES)
@pytest.mark.parametrize("flag", ["--use_fast_math", "-ftz=true", "-fmad=true", "-Xcompiler -Ofast", "-prec-div=false"])
def test_flags_from_outside_may_not_relax_arithmetic(tmp_path: Path, name: str, flag: str) -> None:
    with pytest.raises(CudaBuildError, match=name):
        cuda_build.build(Nvcc(Path("nvcc"), "13.0.88"), TORCH, SOURCES, tmp_path, {name: f"-ccbin g++ {flag}"})


# Which nvcc


def test_find_goes_path_then_homes_then_default(tmp_path: Path) -> None:
    on_path = _fake(tmp_path / "path")
    home, other, default = (_fake(tmp_path / name / "bin") for name in ("home", "other", "default"))
    environ = {
        "PATH": str(tmp_path / "path"),
        "CUDA_HOME": str(tmp_path / "home"),
        "CUDA_PATH": str(tmp_path / "other"),
    }
    for expected, gone in ((on_path, "PATH"), (home, "CUDA_HOME"), (other, "CUDA_PATH"), (default, "")):
        assert cuda_build.find_nvcc(environ, tmp_path / "default") == expected
        environ.pop(gone, None)
    assert cuda_build.find_nvcc({"CUDA_HOME": str(tmp_path / "nowhere")}, tmp_path / "nowhere") is None


def test_identify(tmp_path: Path) -> None:
    nvcc = cuda_build.identify(_fake(tmp_path, "12.4.131"))
    assert (nvcc.version, nvcc.release) == ("12.4.131", (12, 4))
    with pytest.raises(CudaBuildError, match=r"11\.8\.89 is too old.*12\.4 or later"):
        cuda_build.identify(_fake(tmp_path, "11.8.89"))
    with pytest.raises(CudaBuildError, match="names no release"):
        cuda_build.identify(_script(tmp_path / "nvcc", "#!/bin/sh\necho unknown\n"))
    with pytest.raises(CudaBuildError, match="does not run"):
        cuda_build.identify(_script(tmp_path / "nvcc", "#!/bin/sh\nexit 3\n"))


def test_unset_builds_if_it_can(tmp_path: Path) -> None:
    environ = {"PATH": str(tmp_path)}
    without = cuda_build.choose(environ, SOURCES, tmp_path)
    assert isinstance(without, str) and without.startswith("no nvcc on the PATH, in CUDA_HOME")
    path = _fake(tmp_path)
    assert cuda_build.choose(environ, SOURCES, tmp_path) == Nvcc(path, "12.4.131")
    assert cuda_build.choose({**environ, "ADCERT_CUDA": ""}, SOURCES, tmp_path) == Nvcc(path, "12.4.131")
    _fake(tmp_path, "12.3.107")
    assert "too old" in str(cuda_build.choose(environ, SOURCES, tmp_path))


def test_0_never_builds(tmp_path: Path) -> None:
    _fake(tmp_path)
    assert cuda_build.choose({"ADCERT_CUDA": "0", "PATH": str(tmp_path)}, SOURCES) == "ADCERT_CUDA=0"


def test_1_must_build(tmp_path: Path) -> None:
    environ = {"ADCERT_CUDA": "1", "PATH": str(tmp_path)}
    with pytest.raises(CudaBuildError, match=r"ADCERT_CUDA=1, but no nvcc.*install the CUDA toolkit, nvcc 12\.4"):
        cuda_build.choose(environ, SOURCES, tmp_path)
    _fake(tmp_path, "12.3.107")
    with pytest.raises(CudaBuildError, match=r"ADCERT_CUDA=1, but .*too old"):
        cuda_build.choose(environ, SOURCES, tmp_path)
    path = _fake(tmp_path)
    assert cuda_build.choose(environ, SOURCES, tmp_path) == Nvcc(path, "12.4.131")
    with pytest.raises(CudaBuildError, match=r"ADCERT_CUDA=1, but csrc holds no \*_cuda\.cu"):
        cuda_build.choose(environ, [], tmp_path)


@pytest.mark.parametrize("value", ["2", "yes", "on", " 1"])
def test_other_values_are_errors(value: str) -> None:
    with pytest.raises(CudaBuildError, match=f"ADCERT_CUDA={value}: use 0"):
        cuda_build.choose({"ADCERT_CUDA": value}, SOURCES)


def test_the_message_compares_toolkit_and_torch() -> None:
    def told(cuda: str | None) -> str:
        return cuda_build.summary(Nvcc(Path("nvcc"), "13.0.88"), Torch("2.13.0", cuda, (), Path()))

    assert told("13.2") == "the CUDA library _cuda.so (nvcc 13.0.88; sm_80, sm_90, PTX of compute_90)"
    assert "needs a driver for CUDA 13, while this torch brings CUDA 12.8" in told("12.8")
    assert "without CUDA" in told(None)


# What is compiled, by an nvcc that writes down its calls and prints numbers of its own

FAKE = r"""#!{python}
import pathlib, re, sys
words = sys.argv[1:]
out = pathlib.Path(words[words.index("-o") + 1])
with open({calls!r}, "a") as calls:
    calls.write(out.name + "\n")
out.write_text("made")
if "-c" in words:
    source = pathlib.Path(words[words.index("-c") + 1])
    text = source.read_text()
    if "error" in text:
        sys.exit(f"{{source}}: error: wrong")
    headers = [f"{{source.parent}}/{{name}}" for name in re.findall(r'#include "(.*)"', text)]
    read = " ".join(path.replace(" ", "\\ ") for path in (str(source), *headers))
    pathlib.Path(words[words.index("-MF") + 1]).write_text(f"{{out}}: {{read}}\n")
    spill = re.search(r"spill (\d+)", text)
    print("ptxas info    : Compiling entry function 'kernel' for 'sm_90'")
    print("ptxas info    : Function properties for kernel")
    print(f"    0 bytes stack frame, {{spill[1] if spill else 0}} bytes spill stores, 0 bytes spill loads")
    print("ptxas info    : Used 20 registers, used 0 barriers")
    print("a.cu:1: warning: shown all the same")
"""


class Project:
    """Two sources, one of which reads a header, and the fake compiler."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        self.nvcc = _script(folder / "nvcc", FAKE.format(python=sys.executable, calls=str(self.calls)))
        self.version = "13.0.88"
        self.environ = dict(os.environ)
        self.write("a_cuda.cu", '#include "a.cuh"\n')
        self.write("b_cuda.cu", "b\n")
        self.write("a.cuh", "1\n")

    def write(self, name: str, text: str) -> None:
        path = self.folder / "with space/csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def build(self) -> list[str]:
        """Builds; the outputs that were made."""
        self.calls.write_text("")
        sources = sorted((self.folder / "with space/csrc").glob("*_cuda.cu"))
        nvcc = Nvcc(self.nvcc, self.version)
        built = cuda_build.build(nvcc, TORCH, sources, self.folder / "build/cuda", self.environ)
        assert built == self.folder / "build/cuda/_cuda.so"
        return sorted(self.calls.read_text().split())


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_only_what_changed_is_compiled(project: Project) -> None:
    assert project.build() == ["_cuda.so", "a_cuda.o", "b_cuda.o"]
    assert project.build() == []
    project.write("a.cuh", "2\n")
    assert project.build() == ["_cuda.so", "a_cuda.o"]
    project.write("b_cuda.cu", "c\n")
    assert project.build() == ["_cuda.so", "b_cuda.o"]
    project.write("c_cuda.cu", "c\n")
    assert project.build() == ["_cuda.so", "c_cuda.o"]


def test_another_toolchain_or_command_compiles_all(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.build()
    assert project.build() == []
    project.version = "13.1.5"
    assert project.build() == ["_cuda.so", "a_cuda.o", "b_cuda.o"]
    project.environ["NVCC_APPEND_FLAGS"] = "-lineinfo"
    assert project.build() == ["_cuda.so", "a_cuda.o", "b_cuda.o"]
    monkeypatch.setattr(cuda_build, "COMPILE", (*cuda_build.COMPILE, "-lineinfo"))
    assert project.build() == ["_cuda.so", "a_cuda.o", "b_cuda.o"]


def test_report_is_printed_and_saved(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    project.build()
    shown = capfd.readouterr().err
    assert "kernel   sm_90         20" in shown
    assert "warning: shown all the same" in shown and "ptxas info" not in shown
    assert (project.folder / "build/cuda/resources.txt").read_text() in shown
    saved = json.loads((project.folder / "build/cuda/resources.json").read_text())
    assert saved["nvcc"] == "13.0.88"
    assert [(k["source"], k["kernel"], k["registers"]) for k in saved["kernels"]] == [
        ("a_cuda.cu", "kernel", 20),
        ("b_cuda.cu", "kernel", 20),
    ]


def test_a_kernel_that_spills_fails_the_build_every_time(project: Project) -> None:
    project.write("b_cuda.cu", "spill 8\n")
    for _ in range(2):  # the second time nothing is compiled
        with pytest.raises(CudaBuildError, match=r"kernel \(b_cuda\.cu, sm_90\) spills registers: 8 bytes"):
            project.build()


def test_an_error_of_the_compiler_is_shown(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    project.write("b_cuda.cu", "error\n")
    with pytest.raises(CudaBuildError, match="ADCERT_CUDA=0 does without it"):
        project.build()
    assert "b_cuda.cu: error: wrong" in "".join(capfd.readouterr())
    project.write("b_cuda.cu", "fine\n")
    assert "b_cuda.o" in project.build()


@pytest.mark.parametrize("jobs", ["0", "-1", "many"])
def test_max_jobs(project: Project, jobs: str) -> None:
    project.environ["MAX_JOBS"] = jobs
    with pytest.raises(CudaBuildError, match="MAX_JOBS"):
        project.build()


# The real compiler

CU = r"""
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

namespace {

__global__ void scale(const float* x, float* y, float a) {
  __shared__ float values[32];
  values[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = a * values[31 - threadIdx.x] + 1.0f;
}

void pool(StableIValue*, uint64_t, uint64_t) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(0, &stream) != 0) return;
  scale<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(nullptr, nullptr, 2.0f);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adcert, CUDA, m) { m.impl("max_pool2d", &pool); }
"""
# What only a torch with CUDA has, so that this torch can load the library too.
SHIM = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n'
LOAD = """
import ctypes, pathlib, sys, torch
from adcert import _load
folder = pathlib.Path(sys.argv[1])
ctypes.CDLL(str(folder / "shim.so"), ctypes.RTLD_GLOBAL)
torch.version.cuda = "13.0"
print(_load.cuda_problem(folder))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of one tiny kernel, built for all targets."""
    nvcc = cuda_build.choose({**os.environ, "ADCERT_CUDA": ""}, SOURCES)
    if isinstance(nvcc, str):
        pytest.skip(nvcc)
    folder = tmp_path_factory.mktemp("compiled")
    source = folder / "with space" / "tiny_cuda.cu"
    source.parent.mkdir()
    source.write_text(CU)
    return cuda_build.build(nvcc, TORCH, [source], folder / "build", os.environ)


def test_compiled_kernel_is_reported_for_each_target(compiled: Path) -> None:
    kernels = json.loads((compiled.parent / "resources.json").read_text())["kernels"]
    assert [(k["kernel"], k["architecture"], k["shared"]) for k in kernels] == [
        ("scale", "sm_80", 128),
        ("scale", "sm_90", 128),
    ]


def test_compiled_library_needs_no_python_and_exports_nothing_of_cuda(compiled: Path) -> None:
    symbols = subprocess.run(["nm", "-D", compiled], capture_output=True, text=True, check=True).stdout.splitlines()
    assert any(line.endswith("U aoti_torch_get_current_cuda_stream") for line in symbols)
    assert [line for line in symbols if line.split()[-1].startswith(("Py", "_Py"))] == []
    assert [line for line in symbols if " T " in line and "cuda" in line] == []
    needed = subprocess.run(["objdump", "-p", compiled], capture_output=True, text=True, check=True).stdout
    needed = [line.split()[1] for line in needed.splitlines() if "NEEDED" in line]
    assert {"libtorch.so", "libtorch_cpu.so", "libc10.so"} <= set(needed)
    assert [name for name in needed if "python" in name or "cudart" in name] == []


def test_compiled_library_holds_the_targets(compiled: Path) -> None:
    program = shutil.which("cuobjdump")
    if program is None:
        pytest.skip("no cuobjdump here")
    done = subprocess.run([program, "--list-elf", "--list-ptx", compiled], capture_output=True, text=True, check=True)
    kinds = sorted(line.split()[-1].split(".", 2)[-1] for line in done.stdout.splitlines())
    assert kinds == ["sm_80.cubin", "sm_90.cubin", "sm_90.ptx"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch loads adcert's own CUDA library")
def test_compiled_library_loads_and_registers(compiled: Path) -> None:
    folder = compiled.parent
    subprocess.run(["g++", "-shared", "-x", "c++", "-", "-o", folder / "shim.so"], input=SHIM, text=True, check=True)
    done = subprocess.run([sys.executable, "-c", LOAD, folder], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "None\n"
