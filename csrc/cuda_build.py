"""Builds the CUDA library ``_cuda.so`` out of ``csrc/*_cuda.cu``: nvcc, called by ninja.

Not by torch's CUDAExtension, which refuses beside a torch without CUDA: here the toolkit decides, not the torch of the
machine that builds. The library uses PyTorch's stable ABI and no Python, so one binary serves torch 2.10 and later.
No flag may relax IEEE arithmetic: contraction, approximate division, flushing to zero make and destroy ties.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import ptxas_report

LIBRARY = "_cuda.so"
OLDEST = (12, 4)
REMEDY = "install the CUDA toolkit, nvcc 12.4 or later"
DEFAULT_HOME = Path("/usr/local/cuda")
MACHINE_CODE = ("80", "90")
PTX = "90"  # for every later GPU, compiled by its driver

HOST = (
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",  # torch's own headers
    "-Wno-psabi",
)
COMPILE = (
    "-std=c++20",
    "-O3",
    "-fmad=false",
    "--expt-relaxed-constexpr",
    "-Werror=all-warnings",
    *(f"-Xcompiler={flag}" for flag in HOST),
    *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in MACHINE_CODE),
    f"-gencode=arch=compute_{PTX},code=compute_{PTX}",
    "-Xptxas=-v",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DUSE_CUDA",  # declares the current stream in torch's stable headers
)
LINK = (
    "-shared",
    "-cudart=static",
    "-nodlink",  # else an empty image for a GPU nobody named is added
    "-Xlinker=--exclude-libs=ALL",
    # libtorch.so holds no code of its own, but brings libtorch_cuda.so where torch has one.
    "-Xlinker=--no-as-needed",
)
LIBRARIES = ("-ltorch", "-ltorch_cpu", "-lc10")
# nvcc adds the flags in these variables to every command.
NVCC_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
RELAXED = re.compile(r"fast.math|Ofast|unsafe-math|ftz|fmad|prec-div|prec-sqrt|fp-contract")


class CudaBuildError(Exception):
    """The CUDA library cannot be built; says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Nvcc:
    """The CUDA compiler: where it is and what it calls itself, e.g. ``13.0.88``."""

    path: Path
    version: str

    @property
    def release(self) -> tuple[int, int]:
        major, minor, *_ = self.version.split(".")
        return int(major), int(minor)


@dataclasses.dataclass(frozen=True)
class Torch:
    """What the build needs to know of torch; ``cuda`` is the CUDA it was built with, if any."""

    version: str
    cuda: str | None
    include: tuple[Path, ...]
    library: Path


def find_nvcc(environ: Mapping[str, str], home: Path = DEFAULT_HOME) -> Path | None:
    """nvcc on the PATH, then in CUDA_HOME, CUDA_PATH, then where the toolkit is installed by default."""
    homes = [Path(environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    for path in (environ.get("PATH", ""), *(str(folder / "bin") for folder in (*homes, home))):
        if found := shutil.which("nvcc", path=path):
            return Path(found).absolute()
    return None


def identify(path: Path) -> Nvcc:
    """Asks nvcc for its version.

    Raises:
        CudaBuildError: if it does not run, or is too old.
    """
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CudaBuildError(f"{path} does not run: {error}") from error
    match = re.search(r"release \d+\.\d+, V(\d+\.\d+\.\d+)", said)
    if not match:
        raise CudaBuildError(f"{path} --version names no release: {said.strip()!r}")
    nvcc = Nvcc(path, match[1])
    if nvcc.release < OLDEST:
        raise CudaBuildError(f"{path} {nvcc.version} is too old for C++20 device code: {REMEDY}")
    return nvcc


def choose(environ: Mapping[str, str], sources: Sequence[Path], home: Path = DEFAULT_HOME) -> Nvcc | str:
    """The compiler, or why there will be no CUDA library.

    Raises:
        CudaBuildError: if ADCERT_CUDA=1 demands the library and it cannot be built, or if its value is unknown.
    """
    setting = environ.get("ADCERT_CUDA", "")
    if setting not in {"", "0", "1"}:
        raise CudaBuildError(f"ADCERT_CUDA={setting}: use 0 (never), 1 (must) or leave it unset (if nvcc is found)")
    if setting == "0":
        return "ADCERT_CUDA=0"
    try:
        if not sources:
            raise CudaBuildError("csrc holds no *_cuda.cu")
        path = find_nvcc(environ, home)
        if path is None:
            raise CudaBuildError(f"no nvcc on the PATH, in CUDA_HOME, in CUDA_PATH or in {home}: {REMEDY}")
        return identify(path)
    except CudaBuildError as error:
        if setting == "1":
            raise CudaBuildError(f"ADCERT_CUDA=1, but {error}") from error
        return str(error)


def build(nvcc: Nvcc, torch: Torch, sources: Sequence[Path], folder: Path, environ: Mapping[str, str]) -> Path:
    """Compiles what changed and links; the objects and the report on resources stay in ``folder``.

    Raises:
        CudaBuildError: if a command fails or a kernel spills registers.
    """
    for name in NVCC_VARIABLES:
        if match := RELAXED.search(environ.get(name, "")):
            raise CudaBuildError(f"{name} holds {match[0]!r}: adcert's kernels need IEEE arithmetic; remove it")
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    _write(folder / "toolchain.txt", _toolchain(nvcc, torch, environ))
    _write(folder / "build.ninja", ninja_file(nvcc, torch, sources, folder))
    command = [*_ninja(), "-C", str(folder), "-j", str(_jobs(environ))]
    if subprocess.run(command, env=dict(environ), check=False, stdout=2).returncode:  # to the errors, as the table
        raise CudaBuildError("the CUDA library was not built, see above; ADCERT_CUDA=0 does without it")
    _report(nvcc, sources, folder)
    return folder / LIBRARY


def summary(nvcc: Nvcc, torch: Torch) -> str:
    """What was built, for one line; with what the driver must know if this torch does not promise it."""
    targets = ", ".join([*(f"sm_{arch}" for arch in MACHINE_CODE), f"PTX of compute_{PTX}"])
    text = f"the CUDA library {LIBRARY} (nvcc {nvcc.version}; {targets})"
    if torch.cuda is None:
        return f"{text}, which this torch {torch.version} without CUDA does not load"
    if int(torch.cuda.split(".")[0]) < nvcc.release[0]:
        return f"{text}; it needs a driver for CUDA {nvcc.release[0]}, while this torch brings CUDA {torch.cuda}"
    return text


def ninja_file(nvcc: Nvcc, torch: Torch, sources: Sequence[Path], folder: Path) -> str:
    """One object a source, with the headers it read (-MD) and what ptxas said (``*.txt``); then the library."""
    csrc = os.path.relpath(sources[0].resolve().parent, folder.resolve())
    include = [f"-I{csrc}", *(word for path in torch.include for word in ("-isystem", str(path)))]
    compile_ = _command([str(nvcc.path), *COMPILE, *include])
    link = f"{_command([str(nvcc.path), *LINK])} $in -o $out {_command([f'-L{torch.library}', *LIBRARIES])}"
    # What is not about resources is shown: errors, and warnings of the host compiler.
    show = "status=$$?; sed '/^ptxas info/d; /bytes stack frame/d' $out.txt; exit $$status"
    lines = [
        "ninja_required_version = 1.7",
        "rule compile",
        f"  command = {compile_} -MD -MF $out.d -c $in -o $out > $out.txt 2>&1; {show}",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
        "rule link",
        f"  command = {link}",
        "  description = nvcc -o $out",
    ]
    # Relative paths: the names of this machine's folders get into neither messages nor symbols.
    for source in sources:
        path = _escape(os.path.relpath(source.resolve(), folder.resolve()))
        lines.append(f"build {source.stem}.o | {source.stem}.o.txt: compile {path} | toolchain.txt")
    objects = " ".join(f"{source.stem}.o" for source in sources)
    lines += [f"build {LIBRARY}: link {objects} | toolchain.txt", f"default {LIBRARY}", ""]
    return "\n".join(lines)


def _report(nvcc: Nvcc, sources: Sequence[Path], folder: Path) -> None:
    """Saves and prints the table of resources; refuses a kernel that spills."""
    logs = {source.name: (folder / f"{source.stem}.o.txt").read_text() for source in sources}
    beside = nvcc.path.resolve().parent / "cu++filt"
    try:
        usages = ptxas_report.read(logs, str(beside) if beside.is_file() else None)
    except ValueError as error:
        raise CudaBuildError(f"nvcc {nvcc.version}: {error}") from error
    table = ptxas_report.table(usages)
    (folder / "resources.txt").write_text(table)
    records = [dataclasses.asdict(usage) for usage in usages]
    (folder / "resources.json").write_text(json.dumps({"nvcc": nvcc.version, "kernels": records}, indent=1) + "\n")
    print(table, end="", file=sys.stderr)
    if found := ptxas_report.problems(usages):
        remedy = "Use fewer registers, or name it with the reason in MAY_SPILL in csrc/ptxas_report.py."
        raise CudaBuildError("\n".join([*found, remedy]))


def _toolchain(nvcc: Nvcc, torch: Torch, environ: Mapping[str, str]) -> str:
    """Everything except the sources that decides what an object holds: a change compiles all of them anew."""
    variables = [f"{name}={environ.get(name, '')}" for name in (*NVCC_VARIABLES, "NVCC_CCBIN")]
    return "\n".join([f"nvcc {nvcc.version}", f"torch {torch.version}", *variables, ""])


def _write(path: Path, text: str) -> None:
    """Leaves an equal file alone: ninja goes by its time."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _ninja() -> list[str]:
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    if program := shutil.which("ninja"):
        return [program]
    raise CudaBuildError("ninja is missing: pip install ninja")


def _jobs(environ: Mapping[str, str]) -> int:
    text = environ.get("MAX_JOBS") or "2"
    if not text.isdecimal() or int(text) == 0:
        raise CudaBuildError(f"MAX_JOBS is {text!r}, expected a positive number")
    return int(text)


def _command(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _escape(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)
