"""Questions asked of a flow or a network: numbers out, and pictures of them."""

from continuum.analysis.compare import compare_solvers
from continuum.analysis.convergence import Convergence, deep_limit, order, scheme_errors
from continuum.analysis.cost import tolerance_sweep
from continuum.analysis.defects import scheme_defects
from continuum.analysis.dynamics import flow_dynamics
from continuum.analysis.equations import method_of, modified_rate
from continuum.analysis.gradients import compare_gradients
from continuum.analysis.memory import peak_memory
from continuum.analysis.momentum import frictions
from continuum.analysis.stochastic import limit_moment, linear_moment, strong_errors, weak_errors
from continuum.analysis.weak import weak_report

__all__ = [
    "Convergence",
    "compare_gradients",
    "compare_solvers",
    "deep_limit",
    "flow_dynamics",
    "frictions",
    "limit_moment",
    "linear_moment",
    "method_of",
    "modified_rate",
    "order",
    "peak_memory",
    "scheme_defects",
    "scheme_errors",
    "strong_errors",
    "tolerance_sweep",
    "weak_errors",
    "weak_report",
]
