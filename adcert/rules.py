"""The table of all rules of the partial backward engine: the kind of a node -> its vector-Jacobian product."""

from __future__ import annotations

from . import vjp, vjp_attention, vjp_kinks, vjp_losses, vjp_moves, vjp_norms, vjp_products, vjp_smooth
from .vjp import NumberedRule, Rule

#: Nodes with several outputs: the rule is told of which one the gradient is.
NUMBERED: dict[str, NumberedRule] = {**vjp_moves.NUMBERED, **vjp_norms.NUMBERED}

RULES: dict[str, Rule] = {
    **vjp.RULES,
    **vjp_moves.RULES,
    **vjp_products.RULES,
    **vjp_norms.RULES,
    **vjp_attention.RULES,
    **vjp_smooth.RULES,
    **vjp_kinks.RULES,
    **vjp_losses.RULES,
}
