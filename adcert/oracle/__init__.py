"""The Clarke subdifferential of a small network, computed: an independent referee, and a teaching aid.

>>> import torch
>>> from adcert import oracle
>>> w = torch.zeros(1, requires_grad=True)
>>> f = lambda: (torch.relu(w) - torch.relu(-w)).sum()      # this is w: the derivative is 1
>>> known = oracle.subdifferential(f, [w])
>>> [str(x) for e in known.elements for x in e.gradient], known.complete
(['1'], True)
>>> f().backward()
>>> w.grad, known.contains([w.grad])                        # what autodiff says, and whether that is possible
(tensor([0.]), False)
"""

from __future__ import annotations

from .hull import Hull, in_hull
from .program import OracleError
from .replay import Confirmation, Replay, confirm, replays
from .subdifferential import Element, Judgement, Subdifferential, ad_gradient, judge, subdifferential
from .trace import trace

__all__ = [
    "Confirmation",
    "Element",
    "Hull",
    "Judgement",
    "OracleError",
    "Replay",
    "Subdifferential",
    "ad_gradient",
    "confirm",
    "in_hull",
    "judge",
    "replays",
    "subdifferential",
    "trace",
]
