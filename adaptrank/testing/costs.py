"""Count the operations of a method, and the numbers that it keeps for the backward pass."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from adaptrank import layers
from adaptrank.parameterizations import Parameterization
from adaptrank.testing.assertions import describe
from adaptrank.testing.bases import Build, Sample, normal_input, output, perturb


def check_cost(build: Build, sample: Sample = normal_input) -> None:
    """Check that `cost()` is the cost over a layer like the example.

    Operations of products are counted and tensors that autograd keeps are measured, at two numbers
    of tokens.
    """
    layer = build()
    assert not isinstance(layer.base, Parameterization), "A cost is counted over a plain layer."
    perturb(layer)
    want = layer.cost()
    if want is None:
        return
    measured = measure_cost(layer, sample)
    stated = (want.flops, want.flops_once, want.kept)
    for field, have, say in zip(("flops", "flops_once", "kept"), measured, stated, strict=True):
        assert have == say, f"{describe(layer)}.cost().{field} is {say}, and {have} were measured."


def measure_cost(
    layer: Parameterization, sample: Sample = normal_input
) -> tuple[float, float, float]:
    """Return (flops, flops_once, kept) of a wrapper over its frozen layer, as in `Cost`.

    They are measured in a run with few tokens and one with many.
    """
    points = []
    for leading in ((4,), (10,)):
        x = sample(layer, leading)
        y = layers.channels_last(layer.innermost, output(layer.base, x))
        flops, kept = _run_cost(layer, x)
        base_flops, base_kept = _run_cost(layer.base, x)
        points.append((y.shape[:-1].numel(), flops - base_flops, kept - base_kept))
    (few, flops, kept), (many, more_flops, more_kept) = points
    slope = (more_flops - flops) / (many - few)
    return slope, flops - slope * few, (more_kept - kept) / (many - few)


def _run_cost(module: nn.Module, x: Tensor) -> tuple[int, int]:
    """Return the operations of products, and the numbers kept for backward, of one forward pass.

    Parameters and buffers are not counted as kept.
    """
    tensors = [*module.parameters(), *module.buffers()]
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, int] = {}
    # Held until the end, because the address of a freed storage may be reused.
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
            held.append(tensor)
        return tensor

    x = x.detach().requires_grad_() if x.is_floating_point() else x
    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return counter.get_total_flops(), sum(kept.values())
