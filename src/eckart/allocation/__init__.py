"""Allocation: which site gets which rank, within which budget."""

from eckart.allocation.budget import Budget
from eckart.allocation.catalogue import ALLOCATIONS, Allocation, Allocator
from eckart.allocation.curves import Curve
from eckart.allocation.effective_rank import effective_rank
from eckart.allocation.file_size import weight_bytes
from eckart.allocation.global_loss import global_
from eckart.allocation.rank_plan import Ranking, RankPlan, settle, stored_params
from eckart.allocation.rules import Rule, plan
from eckart.allocation.slow import slow_settings
from eckart.allocation.speed import Speed, SpeedTable
from eckart.allocation.summary import PlanSummary, linear_macs, summarise
from eckart.allocation.uniform import per_role, uniform

__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "Allocator",
    "Budget",
    "Curve",
    "PlanSummary",
    "RankPlan",
    "Ranking",
    "Rule",
    "Speed",
    "SpeedTable",
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
