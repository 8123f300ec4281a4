"""Everything adcert raises on purpose derives from :class:`AdcertError`."""

from __future__ import annotations


class AdcertError(Exception):
    """Base class: says what was wrong, where, and what to do."""


class CertificateError(AdcertError):
    """A certificate file or object does not hold what it claims."""


class UncertifiedError(AdcertError):
    """Raised by ``Monitor(on_fail="raise")`` when a step is not certified."""


class BuildError(AdcertError, ImportError):
    """The compiled library is missing or was built for another torch."""
