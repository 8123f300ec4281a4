"""adcert: is the gradient autodiff returned an element of the Clarke subdifferential? A proof for every step."""

from __future__ import annotations

from . import nn
from .certificate import Certificate, Verdict
from .convert import convert, unconvert
from .errors import AdcertError, CertificateError, UncertifiedError
from .monitor import Monitor, certify

__version__ = "0.1.0"

__all__ = [
    "AdcertError",
    "Certificate",
    "CertificateError",
    "Monitor",
    "UncertifiedError",
    "Verdict",
    "certify",
    "convert",
    "nn",
    "unconvert",
]
