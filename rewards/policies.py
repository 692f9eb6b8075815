"""All weighting policies: importing this fills the registry, `build` makes one of them from a spec.

    policy = build({"policy": "lagrange", "kind": "xi", "thresholds": {"right": 0.6, "brief": -0.1}}, names)

| policy | decides by | module |
|---|---|---|
| static | nothing | weighting |
| lagrange | multipliers that hold each objective at its threshold | constrained |
| hypervolume, gradient | progress of the Pareto front; agreement of gradients | dynamic |
| recap | which objectives still move | recap |
| trust | whether a judge of the reasoning likes the right answers better | trust |
| cv, softmin, tchebycheff, covariance | spread; the worst objective; the objective left behind | neighbours |
"""

import rewards.constrained
import rewards.dynamic
import rewards.neighbours
import rewards.recap
import rewards.trust  # noqa: F401  (importing registers)
from rewards.weighting import Policy, build, weightings

__all__ = ["Policy", "build", "weightings"]
