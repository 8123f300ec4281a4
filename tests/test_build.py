"""What the compiler was told, and what happens when the library is missing."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
import torch

from adcert import _load
from adcert.errors import BuildError

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = re.compile(
    r"fast-math|Ofast|unsafe-math|finite-math|associative-math|reciprocal-math|no-signed-zeros|"
    r"march=native|mtune=native|ffp-contract=fast|daz|ftz|flush"
)
SOURCES = sorted(path for path in (ROOT / "csrc").iterdir() if path.suffix in {".cpp", ".h", ".cu", ".cuh"})


def _flags() -> list[str]:
    """The strings of the list COMPILE in setup.py."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "COMPILE":
            return list(ast.literal_eval(node.value))
    raise AssertionError("setup.py has no list COMPILE")


def test_flags_keep_ieee_arithmetic() -> None:
    flags = _flags()
    assert "-ffp-contract=off" in flags
    assert [flag for flag in flags if FORBIDDEN.search(flag)] == []


def test_sources_set_no_mode() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(r"fast-math|_MM_SET_(FLUSH|DENORMALS)|STDC FP_CONTRACT ON", text), path.name
        # Approximations of the GPU, and assembly that flushes to zero.
        assert not re.search(r"__fdividef|__(exp|exp10|log|log2|log10|pow|sin|cos|tan)f\b|\.ftz|\.approx", text), (
            path.name
        )


def test_stable_abi_only() -> None:
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in _flags()
    for path in SOURCES:
        for header in re.findall(r"""#include [<"]((?:torch|ATen|c10|Python)[^>"]*)""", path.read_text()):
            assert header.startswith(("torch/csrc/stable/", "torch/headeronly/")), (path.name, header)


def test_loading_does_not_flush_denormals() -> None:
    tiny = torch.tensor([1e-45])
    assert (tiny * 1.0).item() > 0


def test_missing_library(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no-build-isolation"):
        _load.load(tmp_path)


def test_two_libraries(tmp_path: Path) -> None:
    (tmp_path / "_C.abi3.so").touch()
    (tmp_path / "_C.cpython-311.so").touch()
    with pytest.raises(BuildError, match=r"_C\.abi3\.so, _C\.cpython-311\.so"):
        _load.load(tmp_path)


def test_broken_library(tmp_path: Path) -> None:
    (tmp_path / "_C.abi3.so").write_bytes(b"no library")
    with pytest.raises(BuildError, match=re.escape(torch.__version__)):
        _load.load(tmp_path)


def test_cuda_library_is_one_file(tmp_path: Path) -> None:
    assert _load.cuda_library(tmp_path) is None
    (tmp_path / "_cuda.so").touch()
    (tmp_path / "_C.abi3.so").touch()
    assert _load.cuda_library(tmp_path) == tmp_path / "_cuda.so"
    assert _load.find(tmp_path) == tmp_path / "_C.abi3.so"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_says_so_and_loads_nothing(tmp_path: Path) -> None:
    (tmp_path / "_cuda.so").write_bytes(b"no library")
    problem = _load.cuda_problem(tmp_path)
    assert problem == f"torch {torch.__version__} is built without CUDA: install one with CUDA"
    assert _load.load() in (ROOT / "adcert").iterdir()  # the CPU works


def test_missing_cuda_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    problem = _load.cuda_problem(tmp_path)
    assert problem is not None
    assert str(tmp_path) in problem and "ADCERT_CUDA=1 pip install" in problem and "nvcc 12.4" in problem


def test_broken_cuda_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    (tmp_path / "_cuda.so").write_bytes(b"no library")
    problem = _load.cuda_problem(tmp_path)
    assert problem is not None
    assert f"_cuda.so does not load into torch {torch.__version__}" in problem and "ADCERT_CUDA=1" in problem


@pytest.mark.skipif(torch.version.cuda is not None, reason="adcert's own CUDA library is loaded")
def test_cuda_library_without_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    command = ["g++", "-shared", "-x", "c++", "/dev/null", "-o", str(tmp_path / "_cuda.so")]
    subprocess.run(command, check=True)
    # Without the refusal that adcert.ops has put there meanwhile.
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    problem = _load.cuda_problem(tmp_path)
    assert problem is not None and problem.startswith("_cuda.so loaded, but registered no operators")


def test_a_cuda_tensor_without_the_library_is_refused() -> None:
    if _load.cuda_problem() is None:
        pytest.skip("the CUDA library is there")
    on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(BuildError, match=r"do not take CUDA tensors here: .*CUDA"):
        torch.ops.adcert.relu.default.redispatch(on_cuda, torch.ones(2), 4)
