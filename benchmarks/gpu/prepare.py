"""Before the run: what must be importable, from wheels beside this if need be, and the compiled libraries.

    python -m gpu.prepare FOLDER

FOLDER, which the caller has put on PYTHONPATH, takes the packages that are not installed. It fails if the run cannot
begin, and says why. Nothing is fetched, and nothing outside FOLDER and this checkout is written.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from gpu.paths import ROOT

WHEELS = ROOT / "benchmarks" / "wheels"
PACKAGES = {"highspy": "highspy", "flint": "python-flint"}  # module, distribution
PLATFORMS = ("2_28", "2_27", "2_24", "2_17")


def missing(modules: Sequence[str] = tuple(PACKAGES)) -> list[str]:
    return [module for module in modules if importlib.util.find_spec(module) is None]


def hint(modules: Sequence[str]) -> str:
    """What to do about modules that are neither installed nor among the wheels."""
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "requirements" / "run.txt").read_text(), re.MULTILINE))
    names = [f"{PACKAGES[module]}=={pins[PACKAGES[module]]}" for module in modules]
    python = ".".join(platform.python_version_tuple()[:2])
    platforms = " ".join(f"--platform manylinux_{tag}_{platform.machine()}" for tag in PLATFORMS)
    return (
        f"missing here: {', '.join(modules)}. On a machine with a network, in this checkout, run\n"
        f"    python3 -m pip download --no-deps --only-binary=:all: --python-version {python} --implementation cp "
        f"{platforms} -d benchmarks/wheels {' '.join(names)}\n"
        "and bring benchmarks/wheels along (git ignores it)."
    )


def install(folder: Path, wheels: Sequence[Path]) -> None:
    """Put wheels into a folder, by pip, which looks whether they fit; where there is no pip they are unpacked."""
    if importlib.util.find_spec("pip") is None:
        for wheel in wheels:
            zipfile.ZipFile(wheel).extractall(folder)
        return
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), *map(str, wheels)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def packages(folder: Path, wheels: Path = WHEELS) -> None:
    """
    Raises:
        SystemExit: if something is missing and there is no wheel that fits.
    """
    needed = missing()
    chosen = []
    for module in needed:
        chosen += sorted(wheels.glob(f"{PACKAGES[module].replace('-', '_')}-*.whl"))[-1:]
    if needed and chosen:
        try:
            install(folder, chosen)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"gpu.sh: the wheels in benchmarks/wheels do not fit: {error}", file=sys.stderr)
        importlib.invalidate_caches()
    if left := missing():
        raise SystemExit(f"gpu.sh: {hint(left)}")


# In a process of its own: a library that does not fit may end it.
PROBE = """
import sys
from pathlib import Path
import torch
from adcert import _load
sys.path.insert(0, "benchmarks")
from gpu.prepare import other_schemas
if problem := other_schemas(Path("csrc/library.cpp").read_text()):
    sys.exit(problem)
if sys.argv[1] == "cuda":
    if problem := _load.cuda_problem():
        sys.exit(problem)
    found = torch.ops.adcert.touches(torch.zeros(3, device="cuda"), 0.0, 4)[1].tolist()
    if found != [0, 3, 0]:
        sys.exit(f"a first kernel counted {found}")
"""


def other_schemas(text: str) -> str:
    """The first operator that is registered otherwise than the sources have it, by a library of another version."""
    import torch

    for literals in re.findall(r'm\.def\(((?:\s*"[^"]*")+)', text):
        wanted = torch._C.parse_schema("adcert::" + "".join(re.findall(r'"([^"]*)"', literals)))
        try:
            found = torch._C._get_schema(wanted.name, wanted.overload_name)
        except RuntimeError:
            return f"{wanted.name} is not registered"
        if str(found) != str(wanted):
            return f"{found} is registered, the sources have {wanted}"
    return ""


def library_problem(device: str) -> str:
    """Why the compiled libraries cannot be used as they are; empty if they can."""
    command = [sys.executable, "-c", PROBE, device]
    done = subprocess.run(command, cwd=ROOT, env=_environ(), capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"


def libraries(device: str = "cuda") -> str:
    """Uses the libraries that came along or builds them in place; says which.

    Raises:
        SystemExit: if they can neither be used nor built.
    """
    problem = library_problem(device)
    if not problem:
        newest = max(path.stat().st_mtime for path in (ROOT / "csrc").iterdir() if path.is_file())
        if any(path.stat().st_mtime + 60 < newest for path in (ROOT / "adcert").glob("_*.so")):
            print("gpu.sh: a source is newer than the libraries; delete adcert/*.so to build anew", file=sys.stderr)
            return "found, older than a source"
        return "found"
    print(f"gpu.sh: building the libraries ({problem})", file=sys.stderr, flush=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=_environ(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{(done.stdout + done.stderr)[-6000:]}\ngpu.sh: the libraries were not built")
    if problem := library_problem(device):
        raise SystemExit(f"gpu.sh: the libraries were built, but: {problem}")
    return "built"


def _environ() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    jobs = str(os.cpu_count() or 2)
    return os.environ | {"PYTHONPATH": path, "ADCERT_CUDA": "1", "MAX_JOBS": os.environ.get("MAX_JOBS", jobs)}


def greet(dry: bool) -> None:
    """Say what the run is on.

    Raises:
        SystemExit: if torch sees no GPU.
    """
    import torch

    from gpu.machine import describe

    if not dry and not torch.cuda.is_available():
        raise SystemExit(f"gpu.sh: torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU")
    print("\n".join(f"{key}: {value}" for key, value in describe(dry).items()), file=sys.stderr, flush=True)


def main() -> None:
    folder, *rest = sys.argv[1:]
    dry = "--dry" in rest
    greet(dry)
    packages(Path(folder))
    print(libraries("cpu" if dry else "cuda"))


if __name__ == "__main__":
    main()
