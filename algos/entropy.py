"""Terms of the loss that reward or hold up the entropy of the policy."""

from __future__ import annotations

from torch import Tensor

from core.registry import Registry

entropy_terms = Registry("entropy term")


@entropy_terms
def bonus(entropy: Tensor, *, coef: float = 0.001) -> Tensor:
    """The loss falls by coef times the mean entropy over valid tokens; batch.entropy_coef goes before coef."""
    return entropy
