"""Builds what runs on the emulated GPU: libraries in ``build/emulation``, with g++ alone.

| library | made of |
|---|---|
| ``adcert_emulated`` | ``csrc/library.cpp`` and every ``csrc/*_cuda.cu``: the operators ``torch.ops.adcert_emulated`` |
| ``runtime`` | ``runtime.cpp``: what the emulated device of ``device.py`` has in C++ |
| ``check_emulation`` | the emulator's own checks |
| ``check_ucontext`` | the same with the switch between threads that other machines than x86-64 use |

``CFLAGS`` and ``LDFLAGS`` are added to the commands, so that a build under sanitizers is possible.
"""

from __future__ import annotations

import ast
import fcntl
import functools
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "emulation"
CHECKS = ("tests/emulation/check_emulation.cu",)
EMULATE = ("-DADCERT_EMULATION", "-Itests/emulation", "-Icsrc")


@dataclass(frozen=True)
class Library:
    """Sources relative to the root, and what their commands need besides the common flags."""

    name: str
    sources: tuple[str, ...]
    compile: tuple[str, ...] = ()
    link: tuple[str, ...] = ()


def libraries() -> tuple[Library, ...]:
    kernels = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*_cuda.cu"))
    include = [word for path in include_paths() for word in ("-isystem", path)]
    link = ("-L" + str(Path(torch.__file__).parent / "lib"), "-ltorch_cpu", "-lc10")
    return (
        Library("adcert_emulated", ("csrc/library.cpp", *kernels), tuple(include), link),
        Library("runtime", ("tests/emulation/runtime.cpp",), ("-UTORCH_TARGET_VERSION", *include), link),
        Library("check_emulation", CHECKS),
        Library("check_ucontext", CHECKS, ("-DADCERT_EMULATION_UCONTEXT",)),
    )


def flags() -> list[str]:
    """The flags of setup.py, which keep IEEE arithmetic, with less optimisation: what counts here is the build."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "COMPILE":
            return [flag for flag in ast.literal_eval(node.value) if not flag.startswith("-O")] + ["-O1", "-fPIC"]
    raise RuntimeError("setup.py has no list COMPILE")


def ninja_text() -> str:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    compile_all = [*compiler, *flags(), *EMULATE, *shlex.split(os.environ.get("CFLAGS", ""))]
    link_all = [*compiler, "-shared", "-Wl,--no-undefined", *shlex.split(os.environ.get("LDFLAGS", ""))]
    lines = [
        f"builddir = {_path(FOLDER)}",
        "rule compile",
        f"  command = {_words(compile_all)} $flags -MD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {_words(link_all)} -o $out $in $flags",
    ]
    for library in libraries():
        objects = []
        for source in library.sources:
            objects.append(_path(FOLDER / library.name / (Path(source).name + ".o")))
            lines += [f"build {objects[-1]}: compile {_path(source)}", f"  flags = {_words(library.compile)}"]
        lines += [f"build {_path(target(library.name))}: link {' '.join(objects)}", f"  flags = {_words(library.link)}"]
    return "\n".join(lines) + "\n"


def _path(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def _words(words: list[str] | tuple[str, ...]) -> str:
    return shlex.join(words).replace("$", "$$")


def target(name: str) -> Path:
    return FOLDER / f"{name}.so"


def build(*names: str) -> None:
    """Brings the libraries up to date; one process at a time.

    Raises:
        RuntimeError: with the compiler's words, if a source does not compile.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    # A sanitizer's runtime that is preloaded into this process is none of the compiler's business.
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (FOLDER / "build.ninja").write_text(ninja_text())
        command = [sys.executable, "-m", "ninja", "--quiet", "-j", "2", "-f", str(FOLDER / "build.ninja")]
        done = subprocess.run(
            [*command, *(str(target(name)) for name in names)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    if done.returncode != 0:
        raise RuntimeError(f"the emulated kernels do not build:\n{done.stdout}")


@functools.cache
def load() -> None:
    """Fills ``torch.ops.adcert_emulated``, whose operators take CPU tensors; builds the library where needed."""
    build("adcert_emulated")
    torch.ops.load_library(str(target("adcert_emulated")))


if __name__ == "__main__":
    build(*(library.name for library in libraries()))
    print("adcert: built the emulated kernels in", FOLDER.relative_to(ROOT))
