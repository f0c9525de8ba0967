"""Clauses about what a method computes: start, definition, gradients, switch and precision."""

import torch
from torch import Tensor

from adaptrank import layers
from adaptrank.testing.assertions import assert_close, describe, explaining, loss_of, run_backward
from adaptrank.testing.bases import (
    LEADING,
    Build,
    Sample,
    defined,
    first_tensor,
    merges,
    normal_input,
    output,
    perturb,
    trainable,
)


def check_identity(build: Build, sample: Sample = normal_input) -> None:
    """Check that training starts at the frozen layer, to the last bit."""
    layer = build()
    for leading in LEADING:
        x = sample(layer, leading)
        same = torch.equal(output(layer, x), output(layer.base, x))
        if layer.starts_at_base:
            assert same, f"{describe(layer)} does not start at what its base computes."
        else:
            assert not same or not x.numel(), (
                f"{describe(layer)} starts at its base; let it say starts_at_base = True."
            )


def check_definition(build: Build, sample: Sample = normal_input) -> None:
    """Check that the fast path computes W' x + bias, away from the start.

    It is compared for every shape of input.
    """
    layer = build()
    perturb(layer)
    for leading in LEADING:
        x = sample(layer, leading)
        y = output(layer, x)
        if defined(layer):
            with torch.no_grad():
                want = first_tensor(layer.definition(x))
            shape = tuple(x.shape)
            sentence = f"{describe(layer)}: the fast path differs from `weight` for x of {shape}."
            assert_close(y, want, sentence)
        with explaining(f"{describe(layer)}: no backward pass for x of shape {tuple(x.shape)}."):
            run_backward(y)


def check_gradients(build: Build, sample: Sample = normal_input) -> None:
    """Check gradients of the input and of every trainable tensor by finite differences."""
    layer = build()
    perturb(layer)
    names, parameters = zip(*trainable(layer).items(), strict=True)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return first_tensor(
            torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        )

    x = sample(layer, (2,))
    inputs = [
        x.requires_grad_() if x.is_floating_point() else x,
        *(p.detach().clone().requires_grad_() for p in parameters),
    ]
    with explaining(f"{describe(layer)}: a gradient is not the derivative of the forward."):
        torch.autograd.gradcheck(function, inputs)


def check_exact_gradients(build: Build, sample: Sample = normal_input) -> None:
    """Check gradients against those that autograd finds through the definition.

    They are those of the input and of every trainable tensor.
    """
    layer = build()
    if not defined(layer):
        return
    perturb(layer)
    names, parameters = zip(*trainable(layer).items(), strict=True)
    x = sample(layer, (3,))
    leaves = (*parameters, x.requires_grad_()) if x.is_floating_point() else parameters
    actual = torch.autograd.grad(loss_of(output(layer, x)), leaves, allow_unused=True)
    expected = torch.autograd.grad(
        loss_of(first_tensor(layer.definition(x))), leaves, allow_unused=True
    )
    for name, leaf, *grads in zip((*names, "x"), leaves, actual, expected, strict=False):
        zero = torch.zeros_like(leaf)
        have, want = (zero if grad is None else grad for grad in grads)
        assert_close(
            have, want, f"{describe(layer)}: the gradient of {name} is not that of the definition."
        )


def check_training(build: Build, sample: Sample = normal_input) -> None:
    """Check that a gradient reaches every trainable tensor within two steps.

    No frozen tensor may have a gradient or move.
    """
    layer = build()
    tensors = trainable(layer)
    assert tensors, f"{describe(layer)} has nothing to train."
    frozen = {n: p.detach().clone() for n, p in layer.named_parameters() if n not in tensors}
    optimizer = torch.optim.SGD(tensors.values(), lr=0.01)
    reached = set()
    for _ in range(2):
        optimizer.zero_grad()
        run_backward(output(layer, sample(layer, (5,))))
        reached |= {n for n, p in tensors.items() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    missing = sorted(set(tensors) - reached)
    assert not missing, (
        f"{describe(layer)}: no gradient reaches {', '.join(missing)} within two steps."
    )
    for name, parameter in layer.named_parameters():
        if name in frozen:
            assert parameter.grad is None, f"{describe(layer)}: frozen {name} got a gradient."
            assert torch.equal(parameter, frozen[name]), f"{describe(layer)}: frozen {name} moved."


def check_switch(build: Build, sample: Sample = normal_input) -> None:
    """Check that a wrapper that is off is transparent, in the forward pass and in the weight.

    On again, it is what it was.
    """
    layer = build()
    perturb(layer)
    x = sample(layer, (5,))
    on = output(layer, x).detach()
    layer.enabled = False
    assert torch.equal(output(layer, x), output(layer.base, x)), (
        f"{describe(layer)} is off and changes the output."
    )
    if isinstance(layer.innermost, layers.MATRICES) and merges(layer):
        assert torch.equal(layer.weight, layer.base_weight), (
            f"{describe(layer)} is off and changes the weight."
        )
    layer.enabled = True
    assert torch.equal(output(layer, x), on), (
        f"{describe(layer)} is not what it was when it is on again."
    )
    assert not torch.equal(on, output(layer.base, x)), (
        f"{describe(layer)} changes nothing when it is on."
    )


def check_penalty(build: Build) -> None:
    """Check that a penalty, if there is one, is a finite number with a gradient."""
    layer = build()
    perturb(layer)
    penalty = layer.penalty()
    if penalty is not None:
        assert penalty.dim() == 0, (
            f"{describe(layer)}.penalty() has shape {tuple(penalty.shape)}; it must be one number."
        )
        assert penalty.isfinite(), f"{describe(layer)}.penalty() is {float(penalty)}."
        assert penalty.requires_grad, f"{describe(layer)}.penalty() depends on nothing that trains."


def check_low_precision(build: Build, sample: Sample = normal_input) -> None:
    """Check a method over a half-precision layer.

    The adapter must be float32, start at the layer to the bit, and train.
    """
    layer = build()
    dtype = layers.dtype(layer.innermost)
    for name, parameter in trainable(layer).items():
        assert parameter.dtype == torch.float32, (
            f"{describe(layer)}: {name} is {parameter.dtype} over {dtype}."
        )
    x = sample(layer, (2, 3))
    x = x.requires_grad_() if x.is_floating_point() else x
    y = output(layer, x)
    assert y.dtype == dtype, f"{describe(layer)} returns {y.dtype} over {dtype}."
    if layer.starts_at_base:
        assert torch.equal(y, output(layer.base, x)), (
            f"{describe(layer)} does not start at its base in {dtype}."
        )
    perturb(layer)
    run_backward(output(layer, x))
    leaves: dict[str, Tensor] = {**({"x": x} if x.is_floating_point() else {}), **trainable(layer)}
    for name, leaf in leaves.items():
        grad = leaf.grad
        assert grad is not None, f"{describe(layer)}: no gradient reaches {name} over {dtype}."
        assert grad.isfinite().all(), (
            f"{describe(layer)}: the gradient of {name} is not finite over {dtype}."
        )
    if isinstance(layer.innermost, layers.MATRICES):
        assert layer.weight.dtype == dtype, (
            f"{describe(layer)}.weight is {layer.weight.dtype} over {dtype}."
        )
