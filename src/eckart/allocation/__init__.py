"""Allocation: which site gets which rank, within which budget."""

from collections.abc import Callable

from eckart.allocation.budget import Budget
from eckart.allocation.curves import Curve
from eckart.allocation.effective_rank import effective_rank
from eckart.allocation.file_size import weight_bytes
from eckart.allocation.global_loss import global_
from eckart.allocation.rank_plan import RankPlan, settle, stored_params
from eckart.allocation.rules import Rule, plan
from eckart.allocation.slow import slow_settings
from eckart.allocation.summary import PlanSummary, linear_macs, summarise
from eckart.allocation.uniform import per_role, uniform

# {name: f(sites, units or curves, numbers, *, layout, rank_multiple, ...) -> RankPlan}.
ALLOCATIONS: dict[str, Callable[..., RankPlan]] = {
    "uniform": uniform,
    "per-role": per_role,
    "effective-rank": effective_rank,
    "global": global_,
}
# Those that read losses, and not only which sites there are.
NEED_CURVES = frozenset({"effective-rank", "global"})

__all__ = [
    "ALLOCATIONS",
    "NEED_CURVES",
    "Budget",
    "Curve",
    "PlanSummary",
    "RankPlan",
    "Rule",
    "effective_rank",
    "global_",
    "linear_macs",
    "per_role",
    "plan",
    "settle",
    "slow_settings",
    "stored_params",
    "summarise",
    "uniform",
    "weight_bytes",
]
