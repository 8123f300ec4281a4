"""What the compiler was told, and what happens when the library is missing."""

from __future__ import annotations

import ast
import re
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
    for path in (ROOT / "csrc").iterdir():
        text = path.read_text()
        assert not re.search(r"fast-math|_MM_SET_(FLUSH|DENORMALS)|STDC FP_CONTRACT ON", text), path.name


def test_stable_abi_only() -> None:
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in _flags()
    for path in (ROOT / "csrc").iterdir():
        for header in re.findall(r"#include <((?:torch|ATen|c10|Python)[^>]*)>", path.read_text()):
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
