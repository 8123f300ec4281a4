"""adcert: is the gradient autodiff returned an element of the Clarke subdifferential? A proof for every step."""

from __future__ import annotations

from . import nn
from .certificate import Certificate, Verdict
from .convert import convert, unconvert
from .errors import AdcertError, CertificateError, UncertifiedError
from .monitor import Monitor, certify
from .theorems import Analysis, analyze

__version__ = "0.1.0"

__all__ = [
    "AdcertError",
    "Analysis",
    "Certificate",
    "CertificateError",
    "Monitor",
    "UncertifiedError",
    "Verdict",
    "analyze",
    "certify",
    "convert",
    "nn",
    "unconvert",
]
