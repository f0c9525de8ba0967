"""The contract of a parameterization as checks. It is shipped, so that any method can prove itself.

from adaptrank.testing import check_parameterization
check_parameterization(MyMethod)
"""

from adaptrank.testing.bases import (
    LEADING,
    Build,
    Sample,
    builder,
    conv1d,
    defined,
    example_bases,
    first_tensor,
    merges,
    normal_input,
    output,
    perturb,
    trainable,
    whole_numbers,
)
from adaptrank.testing.contract import (
    check_contract,
    check_conv1d_twin,
    check_parameterization,
    check_refusal,
)
from adaptrank.testing.costs import (
    check_cost,
    measure_cost,
)
from adaptrank.testing.emptying import check_emptying
from adaptrank.testing.forward import (
    check_definition,
    check_exact_gradients,
    check_gradients,
    check_identity,
    check_low_precision,
    check_penalty,
    check_switch,
    check_training,
)
from adaptrank.testing.storage import (
    check_arguments,
    check_copies,
    check_factors,
    check_indices,
    check_merged,
    check_state_dict,
)
from adaptrank.testing.units import (
    check_gate_gradient,
    check_gates,
    check_growth,
    check_limits,
    check_parameter_count,
    check_pruning,
)

__all__ = [
    "LEADING",
    "Build",
    "Sample",
    "builder",
    "check_arguments",
    "check_contract",
    "check_conv1d_twin",
    "check_copies",
    "check_cost",
    "check_definition",
    "check_emptying",
    "check_exact_gradients",
    "check_factors",
    "check_gate_gradient",
    "check_gates",
    "check_gradients",
    "check_growth",
    "check_identity",
    "check_indices",
    "check_limits",
    "check_low_precision",
    "check_merged",
    "check_parameter_count",
    "check_parameterization",
    "check_penalty",
    "check_pruning",
    "check_refusal",
    "check_state_dict",
    "check_switch",
    "check_training",
    "conv1d",
    "defined",
    "example_bases",
    "first_tensor",
    "measure_cost",
    "merges",
    "normal_input",
    "output",
    "perturb",
    "trainable",
    "whole_numbers",
]
