"""ModuleWrapper: a method that wraps a module whole, or has no dense weight."""

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from adaptrank.parameterizations.base import Parameterization
from adaptrank.parameterizations.formula import formula


class ModuleWrapper(Parameterization):
    """A method that changes what a module computes, rather than the weight of a single matrix.

    The module may be a norm, an attention, a transformer's body, or a linear layer with something
    nonlinear beside it. A method overrides `forward_adapted`, which passes on the arguments of the
    module, or `delta`, as for a single matrix. It says in `wraps` which modules it fits. With
    `mergeable = False` it writes its paper's definition in `definition`. Otherwise it names the
    changed parameters in `merged`, or defines `weight`. Layers inside of the module may carry
    wrappers of their own.
    """

    @abstractmethod
    def __init__(self, base: nn.Module) -> None:
        """Wrap the module. A method adds its tensors after `super().__init__(base)`."""
        super().__init__(base)

    @formula
    def weight(self) -> Tensor:
        """The weight of what this wraps, unchanged."""
        return self.base_weight

    def forward_adapted(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward_adapted(*args, **kwargs)
