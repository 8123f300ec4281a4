"""Certificates: what verify accepts and rejects, the file format, and files meant to do harm."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import struct
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adcert import _certificate_file as files
from adcert.certificate import Block, Certificate, Column, LayerReport, Verdict
from adcert.errors import CertificateError
from adcert.feasibility import Proof


def column(parameter: str, *indices: int) -> Column:
    return Column(parameter, np.array(indices, dtype=np.int64))


def certified() -> Certificate:
    """Two layers, three blocks: a split difference, a radius, and an empty block without rows."""
    first = Block(
        "conv1",
        1,
        (column("conv1.weight", 0, 1), column("conv1.bias", 0)),
        rows=np.array([[2.0, 1.0, 0.0], [-1.0, 2.0, 0.0]], dtype=np.float32),
        minus=np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=np.float32),
        rules=("tie", "touch"),
        direction=(1, 1, 0),
        reason="sum of rows",
    )
    second = Block(
        "conv1",
        1,
        (column("conv1.weight", 2, 3),),
        rows=np.array([[1.0, -1.0]]),
        radius=np.array([[0.25, 0.25]]),
        rules=("touch",),
        direction=(3, -1),
        reason="highs",
    )
    third = Block("fc", 2, (column("fc.weight", 5),), rows=np.zeros((0, 1)), direction=(0,), reason="no rows")
    layers = (
        LayerReport(
            "conv1",
            ("conv1.weight", "conv1.bias"),
            "shared",
            1,
            windows=9,
            ties=2,
            touches=1,
            exemptions={"congruent": 4},
            differing=1,
            rows=3,
            blocks=2,
        ),
        LayerReport("fc", ("fc.weight",), "none", 2, blocks=1),
    )
    return Certificate(
        Verdict.CERTIFIED,
        (),
        layers,
        (first, second, third),
        "lexicographic",
        "bouligand",
        {"conv1.weight": (2, 2), "conv1.bias": (1,), "fc.weight": (2, 3), "scalar": ()},
        {"conv1.weight": 1, "conv1.bias": 1, "fc.weight": 2, "scalar": 1},
        ("values under no_grad are constants",),
        {"relu1": "ab" * 32},
        {"forward": 0.5, "rows": 0.0},
        "Theorem E4",
    )


def touched(bias: str) -> LayerReport:
    return dataclasses.replace(certified().layers[0], bias=bias, ties=0, differing=0)


def uncertified() -> Certificate:
    base = certified()
    empty = dataclasses.replace(
        base.blocks[0],
        rows=np.array([[2.0, 1.0, 0.0], [-3.0, 0.0, 0.0]], dtype=np.float32),
        direction=None,
        proof=Proof((0, 1), (3, 1)),
        reason="opposite rows",
    )
    return dataclasses.replace(
        base,
        verdict=Verdict.UNCERTIFIED,
        reasons=("conv1: the system is empty",),
        claim="",
        theorem="",
        blocks=(empty, *base.blocks[1:]),
    )


def undecided() -> Certificate:
    base = certified()
    open_block = dataclasses.replace(base.blocks[0], direction=None, reason="out of time")
    return dataclasses.replace(
        base,
        verdict=Verdict.UNDECIDED,
        reasons=("aten::sort was not recorded",),
        claim="",
        theorem="",
        blocks=(open_block, *base.blocks[1:]),
    )


ALL = {"certified": certified, "uncertified": uncertified, "undecided": undecided}


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_verify_accepts(make: Callable[[], Certificate]) -> None:
    make().verify()


def test_reasons_are_a_list_empty_iff_certified() -> None:
    assert certified().reasons == []
    assert uncertified().reasons == ["conv1: the system is empty"]


def test_verdict_is_a_string() -> None:
    assert Verdict("certified") is Verdict.CERTIFIED
    assert Verdict.CERTIFIED == "certified"
    assert f"{Verdict.UNDECIDED}" == str(Verdict.UNDECIDED) == "undecided"
    assert json.dumps(Verdict.UNCERTIFIED) == '"uncertified"'


def test_directions_by_hand() -> None:
    directions = certified().directions
    assert directions["conv1.weight"].tolist() == [[0.5, 0.5], [0.75, -0.25]]
    assert directions["conv1.bias"].tolist() == [0.0]
    assert directions["fc.weight"].tolist() == [[0.0] * 3] * 2
    assert directions["scalar"].shape == ()
    assert all(tensor.dtype == torch.float64 for tensor in directions.values())


def test_directions_of_integers_no_float_holds() -> None:
    base = certified()
    block = dataclasses.replace(base.blocks[0], direction=(3**2000, 3**2000 + 1, 1))
    directions = dataclasses.replace(base, blocks=(block,)).directions
    assert directions["conv1.weight"][0, 0].item() == pytest.approx(directions["conv1.weight"][0, 1].item())
    assert 0.5 <= directions["conv1.weight"][0, 0].item() <= 1.0


def changed(block: int = 0, make: Callable[[], Certificate] = certified, **fields: Any) -> Certificate:
    base = make()
    blocks = list(base.blocks)
    blocks[block] = dataclasses.replace(blocks[block], **fields)
    return dataclasses.replace(base, blocks=tuple(blocks))


BAD: dict[str, tuple[Callable[[], Certificate], str]] = {
    "wrong direction": (
        lambda: changed(direction=(1, -1, 0)),
        "block 0 of layer 'conv1'.*every row positive",
    ),
    "boundary direction": (lambda: changed(direction=(2, 1, 0)), "every row positive"),
    "direction inside the radius": (lambda: changed(1, direction=(5, 3)), "block 1 of layer 'conv1'"),
    "short direction": (lambda: changed(direction=(1, 1)), "every row positive"),
    "float direction": (lambda: changed(direction=(1.0, 1.0, 0.0)), "every row positive"),
    "missing direction": (lambda: changed(direction=None), "block 0 of layer 'conv1' has no direction"),
    "missing direction of no rows": (
        lambda: changed(2, direction=None),
        "block 2 of layer 'fc' has no direction",
    ),
    "direction and proof": (lambda: changed(proof=Proof((0, 1), (1, 1))), "both"),
    "wrong weights": (
        lambda: changed(make=uncertified, proof=Proof((0, 1), (3, 2))),
        "proof of emptiness does not",
    ),
    "negative weights": (lambda: changed(make=uncertified, proof=Proof((0, 1), (-3, -1))), "does not hold"),
    "proof of a missing row": (
        lambda: changed(make=uncertified, proof=Proof((0, 2), (3, 1))),
        "does not hold",
    ),
    "proof by a rounded row": (
        lambda: changed(make=uncertified, radius=np.array([[0, 0, 1e-9], [0, 0, 0]], dtype=np.float32)),
        "does not",
    ),
    "no proof": (lambda: changed(make=uncertified, proof=None), "no block has a proof"),
    "NaN row": (lambda: changed(rows=np.full((2, 3), np.nan, dtype=np.float32)), "block 0.*NaN"),
    "integer overflow row": (lambda: changed(rows=np.full((2, 3), 2**62)), "block 0"),
    "object rows": (lambda: changed(rows=np.full((2, 3), "x", dtype=object)), "block 0"),
    "missing rows": (lambda: changed(rows=None), "block 0"),
    "minus of another shape": (lambda: changed(minus=np.zeros((2, 2))), "block 0.*shape"),
    "rows narrower than columns": (lambda: changed(rows=np.ones((2, 2))), "block 0.*columns"),
    "unknown parameter": (lambda: changed(columns=(column("other", 0, 1, 2),)), "unknown parameter 'other'"),
    "column outside": (
        lambda: changed(columns=(column("conv1.weight", 0, 4), column("conv1.bias", 0))),
        "outside",
    ),
    "negative column": (
        lambda: changed(columns=(column("conv1.weight", 0, -1), column("conv1.bias", 0))),
        "outside",
    ),
    "repeated column": (
        lambda: changed(columns=(column("conv1.weight", 1, 1), column("conv1.bias", 0))),
        "twice",
    ),
    "overlapping blocks": (lambda: changed(1, columns=(column("conv1.weight", 1, 2),)), "block 1.*twice"),
    "float columns": (lambda: changed(1, columns=(Column("conv1.weight", np.array([2.0, 3.0])),)), "int64"),
    "another rank": (lambda: changed(rank=2), "rank"),
    "unknown rule": (lambda: changed(rules=("tie", "magic")), "rules"),
    "a rule missing": (lambda: changed(rules=("tie",)), "rules"),
    "unknown layer": (lambda: changed(layer="conv9"), "without a report"),
    "reason of a certified step": (lambda: dataclasses.replace(certified(), reasons=("but",)), "reasons"),
    "no reason": (lambda: dataclasses.replace(undecided(), reasons=()), "reasons"),
    "claim without certificate": (lambda: dataclasses.replace(undecided(), claim="clarke"), "claim"),
    "unknown claim": (lambda: dataclasses.replace(certified(), claim="frechet"), "claim"),
    "theorem without certificate": (lambda: dataclasses.replace(undecided(), theorem="Theorem 6"), "theorem"),
    "unknown theorem": (lambda: dataclasses.replace(certified(), theorem="Theorem 7"), "theorem"),
    "a theorem on biases without a bias": (
        lambda: dataclasses.replace(certified(), theorem="Theorem 6", layers=(touched("none"), certified().layers[1])),
        "no bias, which Theorem 6 needs",
    ),
    "a theorem without poolings over ties": (
        lambda: dataclasses.replace(certified(), theorem="Theorem 6"),
        "ties, which Theorem 6 excludes",
    ),
    "certified without claim": (lambda: dataclasses.replace(certified(), claim=""), "claim"),
    "unknown system": (lambda: dataclasses.replace(certified(), system="guess"), "system"),
    "joint with ranks": (lambda: dataclasses.replace(certified(), system="joint"), "rank"),
    "text for a verdict": (lambda: dataclasses.replace(certified(), verdict="surely"), "verdict"),
    "block dropped": (
        lambda: dataclasses.replace(certified(), blocks=certified().blocks[:1]),
        "reports 3 rows in 2",
    ),
    "layer dropped": (
        lambda: dataclasses.replace(certified(), layers=certified().layers[:1]),
        "without a report",
    ),
    "layer twice": (lambda: dataclasses.replace(certified(), layers=certified().layers * 2), "same name"),
    "scale of nothing": (
        lambda: dataclasses.replace(certified(), scales={**certified().scales, "x": 1}),
        "scale",
    ),
    "rank zero": (
        lambda: dataclasses.replace(certified(), scales={**certified().scales, "scalar": 0}),
        "scale",
    ),
    "more ties than windows": (
        lambda: dataclasses.replace(
            certified(), layers=(dataclasses.replace(certified().layers[0], ties=10), certified().layers[1])
        ),
        "impossible counts",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_verify_rejects(make: Callable[[], Certificate], message: str) -> None:
    with pytest.raises(CertificateError, match=message):
        make().verify()


def test_uncertified_step_may_list_fewer_blocks_but_not_more() -> None:
    base = uncertified()
    dataclasses.replace(base, blocks=base.blocks[:1]).verify()
    layers = (dataclasses.replace(base.layers[0], rows=1), base.layers[1])
    with pytest.raises(CertificateError, match="reports 1 rows"):
        dataclasses.replace(base, layers=layers).verify()


def test_a_false_claim_of_emptiness_is_caught() -> None:
    """Rows [1], [-1] are empty; rows [1], [1] are not, whatever the certificate says."""
    honest = Block(
        "l", 1, (column("w", 0),), np.array([[1.0], [-1.0]]), rules=("tie",) * 2, proof=Proof((0, 1), (1, 1))
    )
    report = LayerReport("l", ("w",), "none", 1, rows=2, blocks=1)
    step = Certificate(Verdict.UNCERTIFIED, ("empty",), (report,), (honest,), shapes={"w": (1,)}, scales={"w": 1})
    step.verify()
    lie = dataclasses.replace(honest, rows=np.array([[1.0], [1.0]]))
    with pytest.raises(CertificateError):
        dataclasses.replace(step, blocks=(lie,)).verify()
    with pytest.raises(CertificateError, match="no direction"):
        dataclasses.replace(step, verdict=Verdict.CERTIFIED, reasons=(), claim="bouligand").verify()


def same(a: Any, b: Any) -> bool:
    """Deep equality including dtypes."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_round_trip(make: Callable[[], Certificate], tmp_path: Path) -> None:
    make().save(tmp_path / "step.adcert")
    loaded = Certificate.load(tmp_path / "step.adcert")
    assert same(loaded, make())
    loaded.verify()
    assert [path.name for path in tmp_path.iterdir()] == ["step.adcert"]


def test_big_integers_survive(tmp_path: Path) -> None:
    big = 3**20000 + 1  # 9,543 digits, more than Python converts by default
    direction = changed(direction=(big, big - 1, -big))
    direction.save(tmp_path / "a")
    assert Certificate.load(tmp_path / "a").blocks[0].direction == (big, big - 1, -big)
    Certificate.load(tmp_path / "a").verify()
    weights = changed(make=uncertified, proof=Proof((0, 1), (3 * big, big)))
    weights.save(tmp_path / "b")
    Certificate.load(tmp_path / "b").verify()
    with pytest.raises(CertificateError, match="digits"):
        changed(direction=(10**200_001, 1, 1)).save(tmp_path / "c")
    assert not (tmp_path / "c").exists()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(), min_size=3, max_size=3), st.text(max_size=20), st.floats(0, 1e9))
def test_round_trip_of_anything(direction: list[int], text: str, seconds: float) -> None:
    base = changed(direction=tuple(direction), reason=text)
    step = dataclasses.replace(base, assumptions=(text,), seconds={text: seconds})
    path = Path(_scratch.name) / "any"
    step.save(path)
    assert same(Certificate.load(path), step)


@pytest.fixture(scope="module", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> None:
    _scratch.name = str(tmp_path_factory.mktemp("certificates"))


_scratch = types.SimpleNamespace(name="")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "step.adcert"
    uncertified().save(path)
    return path


def test_every_truncation_is_rejected(saved: Path) -> None:
    data = saved.read_bytes()
    for length in [*range(0, len(data), 37), len(data) - 1]:
        saved.write_bytes(data[:length])
        with pytest.raises(CertificateError):
            Certificate.load(saved)


def test_flipped_bits_are_rejected_or_harmless(saved: Path) -> None:
    """A flip raises, or hit bytes that mean nothing (a time stamp): then the content is the same."""
    data = saved.read_bytes()
    rng = random.Random(3)
    raised = 0
    for _ in range(800):
        position, bit = rng.randrange(len(data)), rng.randrange(8)
        altered = bytearray(data)
        altered[position] ^= 1 << bit
        saved.write_bytes(bytes(altered))
        try:
            assert same(Certificate.load(saved), uncertified()), (position, bit)
        except CertificateError:
            raised += 1
    assert raised > 400


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None], **options: Any) -> None:
    """The archive again with other entries and correct checksums: what a forger would make."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    def apply(entries: dict[str, bytes]) -> None:
        data = json.loads(entries["certificate.json"])
        change(data)
        entries["certificate.json"] = json.dumps(data).encode()

    rewrite(path, apply)


FORGED_FIELDS: list[tuple[list[Any], Any]] = [
    (["format"], "pickle"),
    (["version"], 1),  # which knows no theorem
    (["version"], 2),  # which knows no combination
    (["version"], 4),
    (["combination"], []),
    (["combination"], {}),
    (["theorem"], 6),
    (["version"], "1"),
    (["verdict"], "surely"),
    (["verdict"], None),
    (["reasons"], "text"),
    (["reasons"], [1]),
    (["layers"], {}),
    (["layers", 0, "rows"], -1),
    (["layers", 0, "rows"], 1.5),
    (["layers", 0, "rows"], True),
    (["layers", 0, "windows"], 1 << 63),
    (["layers", 0, "exemptions"], {"x": "1"}),
    (["blocks"], None),
    (["blocks", 0, "rows"], 99),
    (["blocks", 0, "rows"], "0"),
    (["blocks", 0, "rows"], -1),
    (["blocks", 0, "rows"], None),
    (["blocks", 0, "minus"], 0),
    (["blocks", 0, "rules"], 0),
    (["blocks", 0, "columns", 0, "indices"], 2),
    (["blocks", 0, "columns", 0, "parameter"], 7),
    (["blocks", 1, "direction"], [1, 2]),
    (["blocks", 1, "direction"], ["1e3", "2"]),
    (["blocks", 1, "direction"], ["0x1", "2"]),
    (["blocks", 1, "direction"], ["", "2"]),
    (["blocks", 1, "direction"], [" 1", "2"]),
    (["blocks", 1, "direction"], ["\u0661", "2"]),
    (["blocks", 1, "direction"], ["9" * 200_001, "2"]),
    (["blocks", 0, "proof"], []),
    (["blocks", 0, "proof", "rows"], [0, -1]),
    (["blocks", 0, "proof", "weights"], [3, 1]),
    (["shapes"], [["w", 1]]),
    (["shapes", "fc.weight"], [2, -3]),
    (["shapes", "fc.weight"], 6),
    (["scales", "fc.weight"], "2"),
    (["seconds", "rows"], float("nan")),
    (["seconds", "rows"], float("inf")),
    (["seconds", "rows"], "fast"),
    (["fingerprints", "relu1"], 3),
    (["assumptions"], {"a": 1}),
    (["extra"], 1),
    (["layers", 0, "extra"], 1),
    (["blocks", 0, "extra"], 1),
]


def test_a_file_of_the_first_format_names_no_theorem(saved: Path) -> None:
    def change(data: Any) -> None:
        data["version"] = 1
        del data["theorem"], data["combination"]

    rewrite_json(saved, change)
    assert Certificate.load(saved).theorem == ""


def test_a_file_of_the_second_format_has_no_combination(saved: Path) -> None:
    def change(data: Any) -> None:
        data["version"] = 2
        del data["combination"]

    rewrite_json(saved, change)
    assert Certificate.load(saved).combination is None


@pytest.mark.parametrize(("path", "value"), FORGED_FIELDS, ids=lambda x: str(x)[:40])
def test_forged_fields_are_rejected(saved: Path, path: list[Any], value: Any) -> None:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    rewrite_json(saved, change)
    with pytest.raises(CertificateError):
        Certificate.load(saved)


def test_missing_fields_are_rejected(saved: Path) -> None:
    original = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        keys = list(json.loads(archive.read("certificate.json")))
    for key in keys:
        saved.write_bytes(original)
        rewrite_json(saved, lambda data, key=key: data.pop(key))  # type: ignore[misc]
        with pytest.raises(CertificateError, match="exactly the fields"):
            Certificate.load(saved)


def test_forged_numbers_load_but_do_not_verify(saved: Path) -> None:
    rewrite_json(saved, lambda data: data["blocks"][0]["proof"].update(weights=["3", "2"]))
    with pytest.raises(CertificateError, match="block 0"):
        Certificate.load(saved).verify()


def test_forged_verdict_does_not_verify(saved: Path) -> None:
    rewrite_json(saved, lambda data: data.update(verdict="certified", reasons=[], claim="bouligand"))
    with pytest.raises(CertificateError, match="no direction"):
        Certificate.load(saved).verify()


def npy(array: np.ndarray[Any, Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


def header(shape: str, dtype: str = "<f8", body: bytes = b"") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (117 - len(text)) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + body


FORGED_ARRAYS: dict[str, bytes] = {
    "nothing": b"",
    "garbage": b"\x00" * 300,
    "pickle": npy(np.array([{"a": 1}], dtype=object), allow_pickle=True),
    "text": npy(np.array([["abc"]])),
    "half": npy(np.ones((2, 3), dtype=np.float16)),
    "big endian": npy(np.ones((2, 3), dtype=">f4")),
    "column major": npy(np.asfortranarray(np.ones((2, 3), dtype=np.float32))),
    "one dimension": npy(np.ones(6, dtype=np.float32)),
    "version 2": npy(np.ones((2, 3), dtype=np.float32), version=(2, 0)),
    "too short": npy(np.ones((2, 3), dtype=np.float32))[:-1],
    "too long": npy(np.ones((2, 3), dtype=np.float32)) + b"\x00",
    "huge shape": header("(4611686018427387904, 4)"),
    "overflowing shape": header("(4294967296, 4294967296)"),
    "negative shape": header("(-2, 3)", body=b"\x00" * 48),
    "code in the header": header("(__import__('os').getpid(), 3)"),
    "complex": header("(2, 3)", "<c16", b"\x00" * 96),
}


@pytest.mark.parametrize("content", FORGED_ARRAYS.values(), ids=FORGED_ARRAYS)
def test_forged_arrays_are_rejected(saved: Path, content: bytes) -> None:
    with zipfile.ZipFile(saved) as archive:
        rows = json.loads(archive.read("certificate.json"))["blocks"][0]["rows"]
    rewrite(saved, lambda entries: entries.update({f"arrays/{rows}.npy": content}))
    with pytest.raises(CertificateError):
        Certificate.load(saved)


@pytest.mark.parametrize(
    "name",
    [
        "../evil.npy",
        "/etc/passwd",
        "arrays/../x.npy",
        "arrays/00.npy",
        "arrays/1.npy/",
        "x.pkl",
        "arrays/99999999.npy",
        "certificate.json.bak",
        "arrays/\u0661.npy",
    ],
)
def test_unexpected_names_are_rejected(saved: Path, name: str) -> None:
    rewrite(saved, lambda entries: entries.update({name: b"x"}))
    with pytest.raises(CertificateError, match="unexpected"):
        Certificate.load(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["step.adcert"]


def test_unused_arrays_are_rejected(saved: Path) -> None:
    rewrite(saved, lambda entries: entries.update({"arrays/777.npy": npy(np.ones((1, 1)))}))
    with pytest.raises(CertificateError, match="no block uses"):
        Certificate.load(saved)


def test_repeated_entries_are_rejected(saved: Path) -> None:
    with zipfile.ZipFile(saved, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("certificate.json", b"{}")
    with pytest.raises(CertificateError, match="repeated"):
        Certificate.load(saved)


def test_compressed_bombs_are_rejected(saved: Path) -> None:
    rewrite(
        saved,
        lambda entries: entries.update({"arrays/0.npy": b"\x00" * (1 << 24)}),
        compression=zipfile.ZIP_DEFLATED,
    )
    assert saved.stat().st_size < 1 << 20
    with pytest.raises(CertificateError, match="compressed"):
        Certificate.load(saved)


def test_claimed_sizes_are_bounded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(saved.read_bytes())
    central = data.index(b"PK\x01\x02")
    data[central + 20 : central + 28] = struct.pack("<II", 0x7FFFFFFF, 0x7FFFFFFF)
    saved.write_bytes(bytes(data))
    with pytest.raises(CertificateError, match=r"more bytes than the file|missing or too large"):
        Certificate.load(saved)
    monkeypatch.setattr(files, "MAX_BYTES", 100)
    with pytest.raises(CertificateError, match="more than a"):
        Certificate.load(saved)
    with pytest.raises(CertificateError, match="more than a file may hold"):
        certified().save(saved)


def test_deep_nesting_is_rejected(saved: Path) -> None:
    rewrite(saved, lambda entries: entries.update({"certificate.json": b"[" * 200_000}))
    with pytest.raises(CertificateError):
        Certificate.load(saved)


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip", b"\x80\x04K\x01.", bytes(22)])
def test_other_files_are_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(CertificateError, match="other"):
        Certificate.load(path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CertificateError):
            Certificate.load(path)


def test_failed_save_leaves_the_old_file(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(CertificateError, match="unknown rules"):
        changed(rules=("tie", "no such rule")).save(saved)
    with pytest.raises(CertificateError, match="cannot be written"):
        dataclasses.replace(certified(), seconds={"x": float("nan")}).save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["step.adcert"]


def test_numpy_numbers_are_written_as_plain_ones(tmp_path: Path) -> None:
    base = dataclasses.replace(certified(), seconds={"rows": np.float64(0.5)})
    base.save(tmp_path / "step")
    assert Certificate.load(tmp_path / "step").seconds == {"rows": 0.5}


def test_summary_names_verdict_layers_and_reasons() -> None:
    assert str(certified()).startswith("certified (bouligand subgradient, Theorem E4), lexicographic system, 3 rows")
    assert "conv1: 9 windows, 2 tied, 1 touches, 3 rows in 2 blocks (exempt: 4 congruent)" in certified().summary()
    assert "because aten::sort was not recorded" in undecided().summary()


def test_replay_delegates(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("adcert.replay")
    module.replay = lambda *arguments, **options: (arguments, options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "adcert.replay", module)
    step, model = certified(), torch.nn.Identity()
    arguments, options = step.replay(None, model, samples=3)  # type: ignore[arg-type]
    assert arguments == (step, None, model)
    assert options == {"samples": 3}
