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

dC f(w) is the convex hull of dB f(w), the limits of gradients at points that tend to w. Near w a piecewise polynomial f
is made of finitely many cells, one for each way to break the ties at w; ``subdifferential`` finds all of them with a
linear program each, and the limit gradient of each in rational arithmetic. ``judge`` does as much of it as one gradient
needs: True comes with a convex combination, False with a separation from every cell, and None says that neither was
found. ``replays`` walks along a witness, exactly. Values are taken as torch computed them; where f has pieces that are
no polynomials (softmax, normalisation in training, ELU) slopes are floats, ``exact`` is False, and the answer is
evidence rather than proof. An operation that is not known is an OracleError with its name.

Nothing here uses the rest of adcert, so that it can accuse it.
"""

from __future__ import annotations

from .gradients import ad_gradient
from .hull import Hull, in_hull
from .program import OracleError
from .replay import Confirmation, Replay, confirm, replays
from .subdifferential import Element, Judgement, Subdifferential, judge, subdifferential
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
