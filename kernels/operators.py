"""Which function makes the plan of an operator: ``PLANS[operator](case, device, config=None, **options)``.

``config`` None is the table's (launch_table.py). The operators of focal modulation take ``precision`` too.
"""

from __future__ import annotations

from . import focal_modulation, gated_aggregation, gated_aggregation_bwd

PLANS = {
    "gated_aggregation": gated_aggregation.forward_plan,
    "gated_aggregation_bwd": gated_aggregation_bwd.backward_plan,
    "focal_modulation": focal_modulation.forward_plan,
    "focal_modulation_bwd": focal_modulation.backward_plan,
}
