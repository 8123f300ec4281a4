"""The file format of certificates: one uncompressed zip of ``certificate.json`` and ``arrays/<n>.npy``.

Everything read is bounded before it is used and checked field by field. Nothing is compressed, so a file
never grows in memory beyond its own size; there is no pickle and no name from the file ever becomes a path.
"""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
import zipfile
from dataclasses import asdict
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adcert.certificate import RULES, Block, Certificate, Column, Combination, LayerReport, Verdict
from adcert.errors import CertificateError
from adcert.fields import count, digits, integer, keys, mapping, proof, proof_fields, refuse, sequence, text

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

FORMAT, VERSION = "adcert certificate", 3
MAX_BYTES = 1 << 30  # of a whole file
MAX_TEXT = 1 << 28  # of certificate.json
MAX_ENTRIES = 200_000  # of the zip
_MANIFEST = "certificate.json"
_FIELDS = """format version verdict reasons layers blocks system claim theorem shapes scales assumptions
    fingerprints seconds combination"""
_ARRAY = re.compile(r"arrays/(0|[1-9][0-9]{0,6})\.npy")
_DTYPES = tuple(np.dtype(name) for name in ("<f4", "<f8", "<i8", "|u1"))


def write(certificate: Certificate, path: str | os.PathLike[str]) -> None:
    """Writes next to ``path`` first and renames: a crash never leaves half a certificate under its name."""
    arrays: list[Array] = []
    try:
        text = json.dumps(_manifest(certificate, arrays), allow_nan=False, default=_plain).encode()
    except (TypeError, ValueError, AttributeError) as error:
        raise CertificateError(f"the certificate cannot be written: {error}") from error
    total = len(text) + sum(array.nbytes + 256 for array in arrays)
    if len(text) > MAX_TEXT or total > MAX_BYTES or len(arrays) >= MAX_ENTRIES:
        raise CertificateError(
            f"the certificate needs {total} bytes in {len(arrays)} arrays, more than a file may hold"
        )
    target = Path(path)
    handle, partial = tempfile.mkstemp(prefix=target.name, suffix=".partial", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_MANIFEST, text)
            for number, array in enumerate(arrays):
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
                archive.writestr(f"arrays/{number}.npy", buffer.getvalue())
        os.replace(partial, target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _plain(value: Any) -> int | float:
    if isinstance(value, np.integer | np.floating):
        return value.item()
    raise TypeError(f"{type(value).__name__} is neither a number nor a text")


def _manifest(certificate: Certificate, arrays: list[Array]) -> dict[str, Any]:
    def put(array: Array | None, dtypes: tuple[str, ...] = ("<f4", "<f8")) -> int | None:
        if array is None:
            return None
        chosen = next((d for d in dtypes if np.asarray(array).dtype == np.dtype(d)), dtypes[-1])
        arrays.append(np.ascontiguousarray(array, dtype=chosen))
        return len(arrays) - 1

    blocks = []
    for block in certificate.blocks:
        if not set(block.rules) <= set(RULES):
            raise CertificateError(f"unknown rules {sorted(set(block.rules) - set(RULES))}")
        codes = np.array([RULES.index(rule) for rule in block.rules], dtype=np.uint8)
        columns = [{"parameter": c.parameter, "indices": put(c.indices, ("<i8",))} for c in block.columns]
        blocks.append(
            {
                "layer": block.layer,
                "rank": block.rank,
                "columns": columns,
                "rows": put(block.rows),
                "minus": put(block.minus),
                "radius": put(block.radius),
                "rules": put(codes, ("|u1",)),
                "reason": block.reason,
                "direction": None if block.direction is None else [digits(x) for x in block.direction],
                "proof": proof_fields(block.proof),
            }
        )
    whole = certificate.combination
    combination = whole and {
        "elements": put(whole.elements, ("<f8",)),
        "target": put(whole.target, ("<f8",)),
        "weights": [digits(w) for w in whole.weights],
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "verdict": certificate.verdict.value,
        "reasons": list(certificate.reasons),
        "layers": [asdict(report) for report in certificate.layers],
        "blocks": blocks,
        "system": certificate.system,
        "claim": certificate.claim,
        "theorem": certificate.theorem,
        "shapes": {name: list(shape) for name, shape in certificate.shapes.items()},
        "scales": certificate.scales,
        "assumptions": list(certificate.assumptions),
        "fingerprints": certificate.fingerprints,
        "seconds": certificate.seconds,
        "combination": combination,
    }


def read(path: str | os.PathLike[str]) -> Certificate:
    """The certificate in the file; see :meth:`adcert.certificate.Certificate.load`."""
    try:
        with open(path, "rb") as stream, zipfile.ZipFile(stream) as archive:
            size = os.fstat(stream.fileno()).st_size
            return _Reader(archive, _entries(archive, size)).certificate()
    except CertificateError as error:
        raise CertificateError(f"{os.fspath(path)}: {error}") from error
    except (
        zipfile.BadZipFile,
        OSError,
        EOFError,
        KeyError,
        ValueError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        raise CertificateError(f"{os.fspath(path)}: not a readable certificate ({error})") from error


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    entries: dict[str, zipfile.ZipInfo] = {}
    if size > MAX_BYTES or len(archive.infolist()) > MAX_ENTRIES:
        raise CertificateError(f"{size} bytes in {len(archive.infolist())} entries, more than a certificate may hold")
    for info in archive.infolist():
        if info.filename in entries or not (info.filename == _MANIFEST or _ARRAY.fullmatch(info.filename)):
            raise CertificateError(f"unexpected or repeated entry {info.filename[:80]!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise CertificateError(f"entry {info.filename} is compressed or encrypted")
        entries[info.filename] = info
    if sum(info.file_size for info in entries.values()) > size:
        raise CertificateError("the entries claim more bytes than the file has")
    if _MANIFEST not in entries or entries[_MANIFEST].file_size > MAX_TEXT:
        raise CertificateError(f"{_MANIFEST} is missing or too large")
    return entries


class _Reader:
    """Turns the validated entries into records; every method checks what it returns."""

    def __init__(self, archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> None:
        self.archive = archive
        self.entries = entries
        self.used: set[str] = {_MANIFEST}

    def certificate(self) -> Certificate:
        try:
            data = json.loads(self.archive.read(_MANIFEST), parse_constant=refuse)
        except RecursionError as error:
            raise CertificateError(f"{_MANIFEST} is nested too deeply") from error
        if isinstance(data, dict) and data.get("version") == 1 and "theorem" not in data:
            data = {"theorem": "", **data, "version": 2}  # the first format does not name it
        if isinstance(data, dict) and data.get("version") == 2 and "combination" not in data:
            data = {**data, "combination": None, "version": VERSION}  # the second one had none
        keys(data, _FIELDS, "certificate")
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise CertificateError(
                f"format {data['format']!r} version {data['version']!r}; {FORMAT!r} version {VERSION} is read"
            )
        if data["verdict"] not in [verdict.value for verdict in Verdict]:
            raise CertificateError(f"unknown verdict {data['verdict']!r}")
        result = Certificate(
            Verdict(data["verdict"]),
            reasons=sequence(data["reasons"], text),
            layers=sequence(data["layers"], _layer),
            blocks=sequence(data["blocks"], self.block),
            system=text(data["system"]),
            claim=text(data["claim"]),
            theorem=text(data["theorem"]),
            shapes=mapping(data["shapes"], lambda shape: sequence(shape, count)),
            scales=mapping(data["scales"], count),
            assumptions=sequence(data["assumptions"], text),
            fingerprints=mapping(data["fingerprints"], text),
            seconds=mapping(data["seconds"], _seconds),
            combination=self.combination(data["combination"]),
        )
        if self.used != self.entries.keys():
            raise CertificateError("there are arrays that no block uses")
        return result

    def block(self, data: Any) -> Block:
        keys(data, "layer rank columns rows minus radius rules direction proof reason", "block")
        codes = self.array(data["rules"], 1, ("|u1",))
        if codes.size and int(codes.max()) >= len(RULES):
            raise CertificateError("unknown rule")
        shape = (rows := self.array(data["rows"], 2)).shape
        minus, radius = (None if data[k] is None else self.array(data[k], 2) for k in ("minus", "radius"))
        if any(array is not None and array.shape != shape for array in (minus, radius)) or len(codes) != shape[0]:
            raise CertificateError("the arrays of a block differ in shape")
        direction = None if data["direction"] is None else sequence(data["direction"], integer)
        return Block(
            text(data["layer"]),
            count(data["rank"]),
            sequence(data["columns"], self.column),
            rows,
            minus,
            radius,
            tuple(RULES[code] for code in codes),
            direction,
            proof(data["proof"]),
            text(data["reason"]),
        )

    def combination(self, data: Any) -> Combination | None:
        if data is None:
            return None
        keys(data, "elements target weights", "combination")
        elements, target = self.array(data["elements"], 2, ("<f8",)), self.array(data["target"], 1, ("<f8",))
        return Combination(elements, target, sequence(data["weights"], integer))

    def column(self, data: Any) -> Column:
        keys(data, "parameter indices", "column")
        return Column(text(data["parameter"]), self.array(data["indices"], 1, ("<i8",)))

    def array(self, number: Any, dimensions: int, dtypes: tuple[str, ...] = ("<f4", "<f8")) -> Array:
        name = f"arrays/{count(number)}.npy"
        if name not in self.entries or name in self.used:
            raise CertificateError(f"{name} is missing or used twice")
        self.used.add(name)
        data = self.archive.read(name)
        stream = io.BytesIO(data)
        if np.lib.format.read_magic(stream) != (1, 0):
            raise CertificateError(f"{name} is not a version 1.0 npy file")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        start = stream.tell()
        if (
            dtype not in [np.dtype(d) for d in dtypes]
            or fortran
            or len(shape) != dimensions
            or min(shape, default=0) < 0
        ):
            raise CertificateError(f"{name} holds {dtype} of shape {shape}, which does not belong there")
        if prod(shape) * dtype.itemsize != len(data) - start:
            raise CertificateError(f"{name}: {len(data) - start} bytes for {dtype} of shape {shape}")
        return np.frombuffer(data, dtype=dtype, offset=start).reshape(shape).copy()


def _seconds(data: Any) -> float:
    if not isinstance(data, int | float) or isinstance(data, bool) or not isfinite(data):
        raise CertificateError("a finite number is needed")
    return float(data)


def _layer(data: Any) -> LayerReport:
    keys(data, "name parameters bias rank windows ties touches exemptions differing rows blocks", "layer")
    counts = {key: count(data[key]) for key in ("rank", "windows", "ties", "touches", "differing", "rows", "blocks")}
    return LayerReport(
        name=text(data["name"]),
        parameters=sequence(data["parameters"], text),
        bias=text(data["bias"]),
        exemptions=mapping(data["exemptions"], count),
        **counts,
    )
