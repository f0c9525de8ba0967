"""The contract of a parameterization as checks; shipped, so that a method from outside can prove itself.

    from adaptrank.testing import check_parameterization
    check_parameterization(MyMethod)

Every check is a function of a builder, raises AssertionError with a sentence, and can be called by itself. All run in
float64 on `cls.example()` unless they say otherwise.
"""

import copy
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from adaptrank import layers
from adaptrank.axes import RankAxis, Slot, cost_model, fit_ranks, generator, rank_axes
from adaptrank.parameterizations import Parameterization

Build = Callable[[], Parameterization]
"""Builds the same fresh layer at every call."""
Sample = Callable[[Parameterization, tuple[int, ...]], Tensor]
"""(layer, leading dimensions) -> an input in the dtype of the layer."""

LEADING = ((5,), (2, 3), (2, 1, 3), (0,), (1,))
"""Leading dimensions of the inputs: x of 2, 3 and 4 dimensions, none and one row."""


def check_parameterization(
    cls: type[Parameterization],
    *,
    sample: Sample | None = None,
    count: Callable[..., int] | None = None,
) -> None:
    """Run the whole contract on `cls.example()`, with its bias and without, and on a layer of every other kind it accepts.

    Args:
        cls: the method, with default arguments.
        sample: draws inputs; the default is the method's `example_input`.
        count: (m, n) -> number of trainable parameters with default arguments, the paper's closed formula; of what is no
            matrix without arguments.
    Raises:
        AssertionError: says which clause does not hold.
    """
    sample = sample or normal_input
    bases = example_bases(cls)
    for base in bases:
        build = builder(cls, base)
        check_contract(build, sample, count)
        if base is bases[0]:
            check_gradients(builder(cls, base, **cls.exact_gradient), sample)
            check_cost(builder(cls, copy.deepcopy(base).float()), sample)
        check_low_precision(builder(cls, copy.deepcopy(base).to(torch.bfloat16)), sample)
    check_conv1d_twin(cls, sample)
    check_refusal(cls)


# ---- what the checks are built from


def example_bases(cls: type[Parameterization]) -> list[nn.Module]:
    """`cls.example()` in float64; of a linear layer the same without its bias, and small embeddings and convolutions where accepted."""
    torch.manual_seed(0)
    base = cls.example().double()
    bases = [base]
    if isinstance(base, nn.Linear):
        bare = copy.deepcopy(base)
        bare.register_parameter("bias", None)
        bases.append(bare)
        others = (nn.Embedding(48, 24), nn.Conv2d(12, 24, 2, stride=2, padding=1))
        bases += [other.double() for other in others if cls.wraps(other)]
    return bases


def builder(cls: type[Parameterization], base: nn.Module, seed: int = 1, **arguments: Any) -> Build:
    """A function that wraps a copy of `base`, the same at every call; the global random state is left alone."""

    def build() -> Parameterization:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(copy.deepcopy(base), **arguments)

    return build


def conv1d(linear: nn.Linear) -> Conv1D:
    """transformers' Conv1D that computes what the linear layer computes."""
    twin: Conv1D = Conv1D(linear.out_features, linear.in_features)  # type: ignore[no-untyped-call]
    twin.to(linear.weight.dtype)
    with torch.no_grad():
        twin.weight.copy_(linear.weight.T)
        twin.bias.copy_(torch.zeros_like(twin.bias) if linear.bias is None else linear.bias)
    return twin


def perturb(module: nn.Module, std: float = 0.1, seed: int = 0) -> None:
    """Add normal noise to every trainable tensor, to leave the initialization, where most bugs cannot be seen."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_((std * torch.randn(parameter.shape, generator=random)).to(parameter))


def whole_numbers(module: nn.Module, seed: int = 0) -> None:
    """Set every tensor of a module to small whole numbers, whose sums are exact in whatever order a processor takes them."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randint(-3, 4, tensor.shape, generator=random).to(tensor))


def normal_input(layer: Parameterization, leading: tuple[int, ...]) -> Tensor:
    """What the innermost wrapper calls an input: by default a normal draw (*leading, n), the same at every call."""
    return layer.nest[0].example_input(leading, torch.Generator().manual_seed(7))


def trainable(layer: Parameterization) -> dict[str, nn.Parameter]:
    """Name -> trainable tensor, of the wrapper and of those it wraps."""
    return {
        name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad
    }


def output(module: nn.Module, x: Tensor) -> Tensor:
    """What a layer computes; of a module that returns several things the first tensor."""
    return first_tensor(module(x))


def first_tensor(y: Any) -> Tensor:
    """Of a tuple or a model's output its first entry; a tensor as it is."""
    while not isinstance(y, Tensor):
        y = next(iter(y.values() if isinstance(y, Mapping) else y))
    return y


def _loss(y: Tensor) -> Tensor:
    """A loss that no output is indifferent to."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return (y * weights).sum() + y.square().mean()


def _backward(y: Tensor) -> None:
    torch.autograd.backward(_loss(y))


def _name(layer: Parameterization) -> str:
    return " on ".join(type(wrapper).__name__ for wrapper in reversed(layer.nest))


@contextmanager
def _saying(sentence: str) -> Iterator[None]:
    """Put a sentence before what an assertion found."""
    try:
        yield
    except (AssertionError, RuntimeError, TypeError) as error:
        raise AssertionError(f"{sentence}\n{error}") from error


def _close(have: Tensor, want: Tensor, sentence: str, tolerance: float = 1e-10) -> None:
    with _saying(sentence):
        torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance)


def _without(units: int, unit: int) -> list[int]:
    return [other for other in range(units) if other != unit]


def _selected(axis: RankAxis, slot: Slot, keep: list[int]) -> Tensor:
    """The tensor of a slot with only these units, along every dimension that the axis has in it."""
    value = slot.tensor.detach()
    for dim in [other.dim for other in axis.slots() if other.tensor is slot.tensor]:
        value = value.index_select(dim, torch.tensor(keep))
    return value


def _room(axis: RankAxis, wanted: int) -> int:
    largest = axis.limits()[1]
    return wanted if largest is None else min(wanted, largest - len(axis))


def _make_room(axis: RankAxis, wanted: int) -> int:
    """Prune an axis at its ceiling, so that it can grow; returns by how much."""
    if not _room(axis, wanted) and len(axis) > 1:
        axis.resize(range(max(1, len(axis) - wanted)))
    return _room(axis, wanted)


def check_contract(
    build: Build, sample: Sample = normal_input, count: Callable[..., int] | None = None
) -> None:
    """Every clause about one wrapper, whatever its arguments and whatever it wraps, in float64."""
    check_identity(build, sample)
    check_definition(build, sample)
    check_exact_gradients(build, sample)
    check_training(build, sample)
    check_parameter_count(build, count)
    check_pruning(build, sample)
    check_growth(build, sample)
    check_limits(build)
    check_gate_gradient(build, sample)
    check_merged(build, sample)
    check_product(build)
    check_state_dict(build, sample)
    check_copies(build, sample)
    check_switch(build, sample)
    check_arguments(build)
    check_penalty(build)


# ---- the clauses


def check_identity(build: Build, sample: Sample = normal_input) -> None:
    """Training starts at the frozen layer, to the last bit."""
    layer = build()
    for leading in LEADING:
        x = sample(layer, leading)
        same = torch.equal(output(layer, x), output(layer.base, x))
        if layer.starts_at_base:
            assert same, f"{_name(layer)} does not start at what its base computes."
        else:
            assert not same or not x.numel(), (
                f"{_name(layer)} starts at its base; let it say starts_at_base = True."
            )


def check_definition(build: Build, sample: Sample = normal_input) -> None:
    """The fast path computes W' x + bias, away from the start, for every shape of input."""
    layer = build()
    perturb(layer)
    for leading in LEADING:
        x = sample(layer, leading)
        y = output(layer, x)
        if defined(layer):
            with torch.no_grad():
                want = first_tensor(layer.definition(x))
            _close(
                y,
                want,
                f"{_name(layer)}: the fast path differs from `weight` for x of shape {tuple(x.shape)}.",
            )
        with _saying(f"{_name(layer)}: no backward pass for x of shape {tuple(x.shape)}."):
            _backward(y)


def merges(layer: Parameterization) -> bool:
    """Whether every wrapper of the nest has a dense form."""
    return all(wrapper.mergeable for wrapper in layer.nest)


def defined(layer: Parameterization) -> bool:
    """Whether `definition` says what the nest computes: all of it merges, or the outermost defines itself on anything."""
    return merges(layer) or not layer.mergeable


def check_gradients(build: Build, sample: Sample = normal_input) -> None:
    """Gradients of the input and of every trainable tensor are those of the forward."""
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
    with _saying(f"{_name(layer)}: a gradient is not the derivative of the forward."):
        torch.autograd.gradcheck(function, inputs)


def check_exact_gradients(build: Build, sample: Sample = normal_input) -> None:
    """Gradients of the input and of every trainable tensor are those that autograd finds through the definition."""
    layer = build()
    if not defined(layer):
        return
    perturb(layer)
    names, parameters = zip(*trainable(layer).items(), strict=True)
    x = sample(layer, (3,))
    leaves = (*parameters, x.requires_grad_()) if x.is_floating_point() else parameters
    have = torch.autograd.grad(_loss(output(layer, x)), leaves, allow_unused=True)
    want = torch.autograd.grad(_loss(first_tensor(layer.definition(x))), leaves, allow_unused=True)
    for name, leaf, one, other in zip((*names, "x"), leaves, have, want, strict=False):
        zero = torch.zeros_like(leaf)
        sentence = f"{_name(layer)}: the gradient of {name} is not that of the definition."
        _close(zero if one is None else one, zero if other is None else other, sentence)


def check_training(build: Build, sample: Sample = normal_input) -> None:
    """Within two steps a gradient reaches every trainable tensor; nothing frozen has one or moves."""
    layer = build()
    tensors = trainable(layer)
    assert tensors, f"{_name(layer)} has nothing to train."
    frozen = {n: p.detach().clone() for n, p in layer.named_parameters() if n not in tensors}
    optimizer = torch.optim.SGD(tensors.values(), lr=0.01)
    reached = set()
    for _ in range(2):
        optimizer.zero_grad()
        _backward(output(layer, sample(layer, (5,))))
        reached |= {n for n, p in tensors.items() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    missing = sorted(set(tensors) - reached)
    assert not missing, (
        f"{_name(layer)}: no gradient reaches {', '.join(missing)} within two steps."
    )
    for name, parameter in layer.named_parameters():
        if name in frozen:
            assert parameter.grad is None, f"{_name(layer)}: frozen {name} got a gradient."
            assert torch.equal(parameter, frozen[name]), f"{_name(layer)}: frozen {name} moved."


def check_parameter_count(build: Build, count: Callable[..., int] | None = None) -> None:
    """The cost model counts what an optimizer would see, and a unit costs what it adds; both agree with the formula."""
    layer = build()
    numbers = sum(parameter.numel() for parameter in trainable(layer).values())
    if count is not None:
        want = count(*(layer.shape if isinstance(layer.innermost, layers.MATRICES) else ()))
        assert numbers == want, f"{_name(layer)} trains {numbers} numbers; its formula says {want}."
    for key in rank_axes(layer):
        layer = build()
        axis, cost = rank_axes(layer)[key], cost_model(layer)
        sizes = {k: len(a) for k, a in rank_axes(layer).items()}
        assert cost.total(sizes) == numbers, (
            f"{key}: the cost model says {cost.total(sizes)}, the tensors {numbers}."
        )
        if not _room(axis, 1):
            continue
        axis.resize(grow=1, generator=generator(0, key, 0))
        added = sum(parameter.numel() for parameter in trainable(layer).values()) - numbers
        marginal = cost.marginal(key, sizes)
        assert added == marginal, (
            f"{key}: a unit adds {added} numbers; the cost model says {marginal}."
        )
    if not rank_axes(layer):
        assert cost_model(layer).total({}) == numbers, (
            f"{_name(layer)}: the cost model misses fixed tensors."
        )


def check_pruning(build: Build, sample: Sample = normal_input) -> None:
    """Removing a unit takes away that unit: what closing it leaves, and survivors keep every bit."""
    for key, axis in rank_axes(build()).items():
        for unit in sorted({0, len(axis) // 2, len(axis) - 1}):
            if len(axis) == 1:
                continue
            layer = build()
            perturb(layer)
            x, own = sample(layer, (5,)), rank_axes(layer)[key]
            full = output(layer, x)
            with own.closed([unit]):
                closed = output(layer, x)
            assert torch.equal(output(layer, x), full), (
                f"{key}: closed() did not give every bit back."
            )
            assert not torch.allclose(closed, full), f"{key}: closing unit {unit} changes nothing."
            keep = _without(len(own), unit)
            before = {slot.label: _selected(own, slot, keep) for slot in own.slots()}
            own.resize(keep)
            assert len(own) == len(keep), f"{key}: has {len(own)} units after keeping {len(keep)}."
            _close(
                output(layer, x),
                closed,
                f"{key}: removing unit {unit} is not what closing it leaves.",
            )
            for slot in own.slots():
                assert torch.equal(slot.tensor, before[slot.label]), (
                    f"{key}: survivors of {slot.label} changed."
                )


def check_growth(build: Build, sample: Sample = normal_input) -> None:
    """Fresh units leave the output as it is to 1e-12 and the old slices to the bit, and their closing factor can learn."""
    for key in rank_axes(build()):
        layer = build()
        perturb(layer)
        axis, x = rank_axes(layer)[key], sample(layer, (5,))
        if "grow" not in axis.capabilities or not (n := _make_room(axis, 2)):
            continue
        size, before = len(axis), output(layer, x).detach()
        old = {slot.label: slot.tensor.detach().clone() for slot in axis.slots()}
        axis.resize(grow=n, generator=generator(0, key, 1))
        _close(output(layer, x), before, f"{key}: growing changed the output.", 1e-12)
        fresh = range(size, size + n)
        for slot in axis.slots():
            have = _selected(axis, slot, list(range(size)))
            assert torch.equal(have, old[slot.label]), f"{key}: old units of {slot.label} changed."
            if slot.closes:
                assert not slot.select(fresh).any(), (
                    f"{key}: {slot.label} of a fresh unit is not zero."
                )
            else:
                sizes = (
                    slot.select(fresh).double().movedim(slot.dim, 0).reshape(n, -1).abs().amax(1)
                )
                zero = slot.tensor.is_floating_point() and not sizes.all()
                assert not zero, (
                    f"{key}: {slot.label} of a fresh unit is zero; with two zero factors it is dead."
                )
        _backward(output(layer, x))
        grads = [
            slot.tensor.grad.movedim(slot.dim, 0).reshape(len(axis), -1)[size:].abs().amax(1)
            for slot in axis.closing()
            if slot.tensor.grad is not None
        ]
        learns = bool(grads) and bool(torch.stack(grads).amax(0).all())
        assert learns, f"{key}: no gradient reaches the closing factor of a fresh unit."


def check_limits(build: Build) -> None:
    """An axis refuses to lose its last unit and to grow past its ceiling, and stays as it was."""
    for key in rank_axes(build()):
        axis = rank_axes(build())[key]
        size, largest = len(axis), axis.limits()[1]
        refused: list[tuple[list[int], int]] = [([], 0), ([size], 0)]
        if largest is not None:
            assert size <= largest, (
                f"{key} starts with {size} units, above its own ceiling of {largest}."
            )
            refused.append((list(range(size)), largest - size + 1))
        for keep, grow in refused:
            try:
                axis.resize(keep, grow, generator(0, key, 0))
            except ValueError:
                assert len(axis) == size, f"{key} was resized by a call it refused."
            else:
                raise AssertionError(
                    f"{key} of {size} units let itself be resized to keep {keep} and grow {grow}."
                )


def check_gate_gradient(build: Build, sample: Sample = normal_input) -> None:
    """<theta, grad> of the closing factor is the gradient of an explicit gate on each unit."""
    for key in rank_axes(build()):
        layer = build()
        perturb(layer)
        axis, x = rank_axes(layer)[key], sample(layer, (5,))
        gate = torch.ones(len(axis), dtype=torch.float64, requires_grad=True)
        names = {
            id(tensor): name for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]
        }
        gated = {}
        for slot in axis.closing():
            shape = [
                -1 if d == slot.dim % slot.tensor.dim() else 1 for d in range(slot.tensor.dim())
            ]
            gated[names[id(slot.tensor)]] = slot.tensor.detach() * gate.view(shape)
        _backward(first_tensor(torch.func.functional_call(layer, gated, (x,))))
        _backward(output(layer, x))
        _close(
            axis.gate_grad(),
            cast(Tensor, gate.grad),
            f"{key}: gate_grad() is not the gradient of a gate.",
        )


def check_merged(build: Build, sample: Sample = normal_input) -> None:
    """A plain layer with the merged parameters computes the same."""
    layer = build()
    if not merges(layer):
        return
    perturb(layer)
    plain = copy.deepcopy(layer.innermost)
    if isinstance(plain, layers.MATRICES):
        have = tuple(layer.weight.shape)
        assert have == layer.shape, f"{_name(layer)}.weight has shape {have}, not {layer.shape}."
    with torch.no_grad():
        layers.write(plain, layer.merged())
    x = sample(layer, (2, 3))
    _close(
        output(layer, x),
        output(plain, x),
        f"{_name(layer)}: the merged layer computes something else.",
    )


def check_product(build: Build) -> None:
    """Where a method has its change as a product, U V is W' - W."""
    layer = build()
    perturb(layer)
    if (factors := layer.low_rank()) is None:
        return
    U, V = factors
    (m, n), change = (
        layer.shape,
        (layer.dense() - layers.dense(layer.innermost, layer.adapter_dtype)).detach(),
    )
    assert (U.shape[0], *V.shape) == (m, U.shape[1], n), (
        f"{_name(layer)}.product() is {tuple(U.shape)} times {tuple(V.shape)}, for {(m, n)}."
    )
    error = float((U @ V - change).norm())
    assert error <= 1e-9 * float(change.norm()) + 1e-12, (
        f"{_name(layer)}.product() is not W' - W: off by {error:.1e}."
    )


def check_state_dict(build: Build, sample: Sample = normal_input) -> None:
    """Values and ranks come back from a state dict, into a layer that was drawn otherwise."""
    layer, other = build(), build()
    perturb(layer, seed=1)
    perturb(other, seed=2)
    for number, (key, axis) in enumerate(rank_axes(layer).items()):
        grow = _room(axis, 2) if number % 2 and "grow" in axis.capabilities else 0
        axis.resize(
            range(len(axis)) if grow or len(axis) == 1 else range(1, len(axis)),
            grow,
            generator(0, key, 2),
        )
    perturb(layer, seed=3)
    x = sample(layer, (5,))
    output(other, x)  # what it caches must not survive
    state = layer.state_dict()
    fit_ranks(other, state)
    with _saying(f"{_name(layer)} does not load its own state dict."):
        other.load_state_dict(state, strict=True)
    assert torch.equal(output(other, x), output(layer, x)), (
        f"{_name(layer)} computes something else after its state dict was loaded."
    )


def check_copies(build: Build, sample: Sample = normal_input) -> None:
    """Copies and pickles compute the same, know their arguments, and are independent."""
    layer = build()
    perturb(layer)
    x = sample(layer, (5,))
    want = output(layer, x).detach()
    for how, twin in (
        ("deepcopy", copy.deepcopy(layer)),
        ("pickle", pickle.loads(pickle.dumps(layer))),
    ):
        assert torch.equal(output(twin, x), want), (
            f"{_name(layer)}: its {how} computes something else."
        )
        assert twin.init_args == layer.init_args, f"{_name(layer)}: its {how} forgot its arguments."
        perturb(twin, seed=5)
        assert torch.equal(output(layer, x), want), (
            f"{_name(layer)}: its {how} shares tensors with it."
        )


def check_switch(build: Build, sample: Sample = normal_input) -> None:
    """A wrapper that is off is transparent, in the forward and in the weight; on again it is what it was."""
    layer = build()
    perturb(layer)
    x = sample(layer, (5,))
    on = output(layer, x).detach()
    layer.enabled = False
    assert torch.equal(output(layer, x), output(layer.base, x)), (
        f"{_name(layer)} is off and changes the output."
    )
    if isinstance(layer.innermost, layers.MATRICES) and merges(layer):
        assert torch.equal(layer.weight, layer.base_weight), (
            f"{_name(layer)} is off and changes the weight."
        )
    layer.enabled = True
    assert torch.equal(output(layer, x), on), (
        f"{_name(layer)} is not what it was when it is on again."
    )
    assert not torch.equal(on, output(layer.base, x)), (
        f"{_name(layer)} changes nothing when it is on."
    )


def check_arguments(build: Build) -> None:
    """`init_args` goes through JSON and builds the same wrapper again."""
    layer = build()
    with _saying(f"{_name(layer)}: init_args is not plain data."):
        arguments = json.loads(json.dumps(layer.init_args))
    assert arguments == layer.init_args, (
        f"{_name(layer)}: init_args changes on its way through JSON."
    )
    again = type(layer)(copy.deepcopy(layer.base), **arguments)
    assert again.init_args == layer.init_args, (
        f"{_name(layer)}: built again, it has other arguments."
    )
    shapes = [{n: t.shape for n, t in one.state_dict().items()} for one in (layer, again)]
    assert shapes[0] == shapes[1], f"{_name(layer)}: built again, it has other tensors."


def check_penalty(build: Build) -> None:
    """A penalty, where there is one, is a finite number with a gradient."""
    layer = build()
    perturb(layer)
    penalty = layer.penalty()
    if penalty is not None:
        assert penalty.dim() == 0, (
            f"{_name(layer)}.penalty() has shape {tuple(penalty.shape)}; it must be one number."
        )
        assert penalty.isfinite(), f"{_name(layer)}.penalty() is {float(penalty)}."
        assert penalty.requires_grad, f"{_name(layer)}.penalty() depends on nothing that trains."


def check_cost(build: Build, sample: Sample = normal_input) -> None:
    """`cost()` is what it costs over a layer like the example: products are counted, and what autograd keeps is weighed, at two numbers of tokens."""
    layer = build()
    assert not isinstance(layer.base, Parameterization), "A cost is counted over a plain layer."
    perturb(layer)
    want = layer.cost()
    if want is None:
        return
    flops, once, kept = measure_cost(layer, sample)
    for what, have, say in (
        ("flops", flops, want.flops),
        ("flops_once", once, want.flops_once),
        ("kept", kept, want.kept),
    ):
        assert have == say, f"{_name(layer)}.cost().{what} is {say}, and {have} were measured."


def measure_cost(
    layer: Parameterization, sample: Sample = normal_input
) -> tuple[float, float, float]:
    """(flops, flops_once, kept) of a wrapper over its frozen layer, as `Cost` means them, of a run with few and many tokens."""
    found = []
    for leading in ((4,), (10,)):
        x = sample(layer, leading)
        tokens = layers.channels_last(layer.innermost, output(layer.base, x)).shape[:-1].numel()
        both = [_run_cost(module, x) for module in (layer, layer.base)]
        found.append((tokens, *(a - b for a, b in zip(*both, strict=True))))
    (few, flops, kept), (many, more_flops, more_kept) = found
    slope = (more_flops - flops) / (many - few)
    return slope, flops - slope * few, (more_kept - kept) / (many - few)


def _run_cost(module: nn.Module, x: Tensor) -> tuple[int, int]:
    """FLOPs of products, and numbers kept for the backward pass beside parameters, of one forward."""
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
            holding.append(tensor)
        return tensor

    holding: list[Tensor] = []  # or a freed storage's address would be another's
    x = x.detach().requires_grad_() if x.is_floating_point() else x
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        module(x)
    return counter.get_total_flops(), sum(kept.values())


def check_low_precision(build: Build, sample: Sample = normal_input) -> None:
    """Over a half-precision layer the adapter is float32, starts at the layer to the bit, and trains."""
    layer = build()
    dtype = layers.dtype(layer.innermost)
    for name, parameter in trainable(layer).items():
        assert parameter.dtype == torch.float32, (
            f"{_name(layer)}: {name} is {parameter.dtype} over {dtype}."
        )
    x = sample(layer, (2, 3))
    x = x.requires_grad_() if x.is_floating_point() else x
    y = output(layer, x)
    assert y.dtype == dtype, f"{_name(layer)} returns {y.dtype} over {dtype}."
    if layer.starts_at_base:
        assert torch.equal(y, output(layer.base, x)), (
            f"{_name(layer)} does not start at its base in {dtype}."
        )
    perturb(layer)
    _backward(output(layer, x))
    leaves: dict[str, Tensor] = {**({"x": x} if x.is_floating_point() else {}), **trainable(layer)}
    for name, leaf in leaves.items():
        grad = leaf.grad
        assert grad is not None, f"{_name(layer)}: no gradient reaches {name} over {dtype}."
        assert grad.isfinite().all(), (
            f"{_name(layer)}: the gradient of {name} is not finite over {dtype}."
        )
    if isinstance(layer.innermost, layers.MATRICES):
        assert layer.weight.dtype == dtype, (
            f"{_name(layer)}.weight is {layer.weight.dtype} over {dtype}."
        )


def check_conv1d_twin(
    cls: type[Parameterization],
    sample: Sample = normal_input,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Over transformers' Conv1D, whose weight is stored transposed, it is the same method."""
    base = example_bases(cls)[0]
    if not isinstance(base, nn.Linear) or Conv1D not in cls.accepts:
        return
    linear = builder(cls, base, **(arguments or {}))()
    twin = builder(cls, conv1d(base), **(arguments or {}))()
    assert twin.shape == linear.shape, (
        f"{cls.__name__} over Conv1D says {twin.shape}, over Linear {linear.shape}."
    )
    for layer in (linear, twin):
        perturb(layer)
    x = sample(linear, (2, 3))
    _close(
        output(twin, x),
        output(linear, x),
        f"{cls.__name__} over Conv1D computes something else than over Linear.",
    )
    if cls.mergeable:
        _close(
            twin.weight,
            linear.weight,
            f"{cls.__name__}.weight over Conv1D is not that over Linear.",
        )


def check_refusal(cls: type[Parameterization]) -> None:
    """A layer of another kind is refused by name."""
    sentence = ""
    try:
        cls(nn.Flatten())
    except TypeError as error:
        sentence = str(error)
    assert sentence, f"{cls.__name__} wraps an nn.Flatten."
    assert "Flatten" in sentence, (
        f"{cls.__name__} refuses a layer without saying which kind it is: {sentence}"
    )
