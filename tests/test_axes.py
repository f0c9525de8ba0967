"""Units, their cost, how they come and go, and the optimizer's state that follows."""

import pytest
import torch
from torch import nn

from adaptrank.axes import check_optimizer, cost_model, fit_ranks, generator, natural, rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import SVD, HyperAdapt, LoRA, Parameterization, formula
from adaptrank.testing import check_parameterization, normal_input, perturb, whole_numbers

OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
}
SECOND = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf"}


class Third(torch.optim.Optimizer):
    """An optimizer of another package, with state of the parameter's shape and unknown names."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                    self.state[p]["count"] = torch.tensor(1.0)
                    velocity.mul_(0.9).add_(p.grad)
                    p.sub_(group["lr"] * velocity.sign())


OPTIMIZERS["Third"] = Third


class TiedLow(Parameterization):
    """W' = W + B_l M, with M (r, n) shared by all layers of a kind: a toy for tied axes."""

    source = "toy"
    axes = {"rank": {"M": 0, "B": 1}}
    shared = ("M",)

    def __init__(self, base, *, rank=3):
        super().__init__(base)
        m, n = self.shape
        self.M, self.B = self.zeros(rank, n), self.zeros(m, rank)
        nn.init.normal_(self.M)

    @formula
    def weight(self):
        return self.base_weight + self.gated("B") @ self.M

    def delta(self, x, y):
        return (x @ self.M.T) @ self.gated("B").T


class ToyTrain(Parameterization):
    """W' = W + G1 G2 G3: two bonds, neighbours share G2; axes as a property."""

    source = "toy"

    def __init__(self, base, *, r=3, s=4):
        super().__init__(base)
        m, n = self.shape
        self.G1, self.G2, self.G3 = self.zeros(m, r), self.zeros(r, s), self.zeros(s, n)
        nn.init.normal_(self.G1), nn.init.normal_(self.G2)

    @property
    def axes(self):
        return {"bond_1": {"G1": 1, "G2": 0}, "bond_2": {"G2": -1, "G3": 0}}

    @formula
    def weight(self):
        return self.base_weight + self.G1 @ self.gated("G2") @ self.gated("G3")

    def delta(self, x, y):
        return x @ self.gated("G3").T @ self.gated("G2").T @ self.G1.T


def trained(layer, optimizer, steps=4, seed=0):
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(5, layer.shape[1], generator=random, dtype=torch.float64)
        (layer(x) - 1).square().sum().backward()
        optimizer.step()


def svd(rank=6, **arguments):
    return SVD(nn.Linear(48, 24).double(), rank=rank, **arguments)


def snapshot(layer, optimizer):
    return {
        name: (
            p.detach().clone(),
            {k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)},
        )
        for name, p in layer.named_parameters()
        if p.requires_grad
    }


# ---- optimizer surgery


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("keep", [[0, 2, 5], [4, 1, 0], [3, 3, 1], list(range(6))])
def test_moments_follow_unit_by_unit(name, keep):
    layer = svd()
    optimizer = OPTIMIZERS[name]([p for p in layer.parameters() if p.requires_grad])
    trained(layer, optimizer)
    before, grow = snapshot(layer, optimizer), 2
    axis = rank_axes(layer)[":rank"]
    axis.resize(keep, grow, generator(0, axis.key, 1), [optimizer])
    for slot in axis.slots():
        value, state = before[slot.name]
        assert slot.tensor.grad is None
        assert torch.equal(
            slot.select(range(3 if len(keep) == 3 else 6)),
            value.index_select(slot.dim, torch.tensor(keep)),
        )
        assert state, "the optimizer has state"
        for key, old in state.items():
            new = optimizer.state[slot.tensor][key]
            if old.shape != value.shape:
                assert torch.equal(new, old), f"{key} is one number for the whole tensor"
                continue
            assert new.shape == slot.tensor.shape
            kept = old.index_select(slot.dim, torch.tensor(keep))
            assert torch.equal(new.narrow(slot.dim, 0, len(keep)), kept)
            fresh = new.narrow(slot.dim, len(keep), grow)
            if key in SECOND:
                mean = kept.mean(slot.dim, keepdim=True).expand_as(fresh)
                torch.testing.assert_close(fresh, mean, rtol=1e-14, atol=0)
            else:
                assert not fresh.any(), f"{key} of a fresh unit is neutral"
    trained(layer, optimizer, seed=1)  # and it goes on
    assert all(p.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_is_as_if_the_unit_had_never_been(name):
    """Elementwise optimizers train 5 units like 6 units of which one is always zero."""

    def run(prune):
        torch.manual_seed(0)
        layer = LoRA(nn.Linear(48, 24).double(), rank=6)
        optimizer = OPTIMIZERS[name]([layer.A])  # B = const: units do not interact
        random = torch.Generator().manual_seed(1)
        for step in range(8):
            if step == 4 and prune:
                rank_axes(layer)[":rank"].resize([0, 1, 3, 4, 5], 0, None, [optimizer])
            optimizer.zero_grad()
            grad = torch.randn(6, 48, generator=random, dtype=torch.float64)
            layer.A.grad = grad[[0, 1, 3, 4, 5]] if len(layer.A) == 5 else grad
            optimizer.step()
        return layer.A.detach()

    assert torch.equal(run(True), run(False)[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_tensor_that_is_never_edited_never_notices(name):
    """The neighbour's trajectory is the same to the bit, with events on this axis or without."""

    def run(edit):
        torch.manual_seed(0)
        one, two = svd(), LoRA(nn.Linear(48, 24).double())
        optimizer = OPTIMIZERS[name](
            [p for layer in (one, two) for p in layer.parameters() if p.requires_grad]
        )
        random = torch.Generator().manual_seed(1)
        for step in range(9):
            if edit and step % 3 == 2:
                axis = rank_axes(one)[":rank"]
                axis.resize(
                    range(1, len(axis)), step % 2, generator(0, axis.key, step), [optimizer]
                )
            x = torch.randn(5, 48, generator=random, dtype=torch.float64)
            optimizer.zero_grad()
            (one(x).square().sum() + two(x).square().sum()).backward()
            optimizer.step()
        return two

    assert all(
        torch.equal(a, b)
        for a, b in zip(run(True).parameters(), run(False).parameters(), strict=True)
    )


def test_a_fresh_unit_does_not_jump():
    """The first 50 updates of a fresh unit are at most 1.5 times the median update.

    Gradients are of equal size everywhere, late in training.
    """
    worst = {}
    for neutral in (True, False):
        layer = LoRA(nn.Linear(48, 24).double(), rank=6)
        optimizer = torch.optim.Adam([layer.B], lr=1e-2)
        layer.B.grad = torch.ones_like(layer.B)
        for _ in range(300):
            optimizer.step()
        axis = rank_axes(layer)[":rank"]
        axis.resize(grow=1, generator=generator(0, axis.key, 1), optimizers=[optimizer])
        if not neutral:
            optimizer.state[layer.B]["exp_avg_sq"][:, -1] = 0
        worst[neutral] = 0.0
        for _ in range(50):
            before = layer.B.detach().clone()
            layer.B.grad = torch.ones_like(layer.B)
            optimizer.step()
            size = (layer.B.detach() - before).abs().mean(0)
            worst[neutral] = max(worst[neutral], float(size[-1] / size[:-1].median()))
    assert worst[True] <= 1.5
    assert worst[False] > 1.5  # guards the test itself


def test_closing_zeroes_the_factor_and_its_momentum_only():
    layer = svd()
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    trained(layer, optimizer)
    before = snapshot(layer, optimizer)
    axis = rank_axes(layer)[":rank"]
    axis.close([1, 4], [optimizer])
    l, state = layer.l.detach(), optimizer.state[layer.l]
    assert not l[[1, 4]].any()
    assert not state["exp_avg"][[1, 4]].any()
    assert torch.equal(state["exp_avg_sq"], before["l"][1]["exp_avg_sq"])
    assert torch.equal(l[[0, 2, 3, 5]], before["l"][0][[0, 2, 3, 5]])
    for name in ("P", "Q"):
        assert torch.equal(getattr(layer, name), before[name][0])
        assert torch.equal(
            optimizer.state[getattr(layer, name)]["exp_avg"], before[name][1]["exp_avg"]
        )
    (layer(normal_input(layer, (5,))) - 1).square().sum().backward()
    assert layer.l.grad[[1, 4]].all(), (
        "a closed unit goes on receiving gradients, and may come back"
    )


@pytest.mark.parametrize("failing", [False, True])
def test_closed_for_a_moment(failing):
    layer = svd()
    perturb(layer)
    axis, x = rank_axes(layer)[":rank"], normal_input(layer, (5,))
    want, inside = layer(x), None
    try:
        with axis.closed(range(6)):
            inside = layer(x)
            assert not failing or 1 / 0
    except ZeroDivisionError:
        pass
    assert torch.equal(inside, layer.base(x))
    assert torch.equal(layer(x), want)


# ---- refusals


@pytest.mark.parametrize(
    "kind", [torch.optim.Rprop, torch.optim.ASGD, torch.optim.LBFGS, torch.optim.Adafactor]
)
def test_optimizers_that_cannot_follow_are_refused_by_name(kind):
    with pytest.raises(
        TypeError,
        match=rf"^{kind.__name__} keeps state that cannot follow a rank; use Adam, .* or Adamax",
    ):
        check_optimizer(kind([nn.Parameter(torch.zeros(3, 4))]))


def test_an_unknown_optimizer_is_judged_by_its_state():
    class Factored(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p]["rows"] = torch.zeros(p.shape[0])

    p = nn.Parameter(torch.zeros(3, 4))
    factored = Factored([p])
    check_optimizer(factored)  # nothing to judge by yet
    factored.step()
    with pytest.raises(
        TypeError,
        match=r"Factored keeps .* \(its 'rows' has shape \(3,\) for a parameter \(3, 4\)\)",
    ):
        check_optimizer(factored)
    third = Third([p])
    p.grad = torch.ones(3, 4)
    third.step()
    check_optimizer(third)


def test_a_name_alone_is_not_trusted():
    quantized = type("AdamW", (torch.optim.Optimizer,), {"__module__": "elsewhere"})(
        [nn.Parameter(torch.zeros(3, 4))], {}
    )
    parameter = quantized.param_groups[0]["params"][0]
    quantized.state[parameter]["qmap"] = torch.zeros(256)
    with pytest.raises(TypeError, match="'qmap'"):
        check_optimizer(quantized)


def test_resizing_refuses_what_does_not_exist():
    axis = rank_axes(svd())[":rank"]
    for keep, grow, sentence in (
        ([0, 6], 0, "has units 0 to 5; asked to keep"),
        ([-1], 0, "has units 0 to 5"),
        ([0], -1, "grow -1"),
        (None, 19, r"holds at most 24 units; asked for 6 \+ 19"),
        ([0] * 25, 0, "holds at most 24 units"),
    ):
        with pytest.raises(ValueError, match=sentence):
            axis.resize(keep, grow, generator(0, "a", 0))
    assert len(axis) == 6
    assert axis.limits() == (0, 24)
    assert rank_axes(LoRA(nn.Linear(4, 4)))[":rank"].limits() == (0, None)
    axis.resize([])
    with pytest.raises(ValueError, match=r"has no units; asked to keep \[0\]"):
        axis.resize([0])


# ---- identity of parameters, and autograd


def test_a_live_graph_across_a_resize_does_not_matter():
    """The gradient accumulator of a graph that is still alive would keep the old shape."""
    layer = svd()
    perturb(layer)
    alive = layer(normal_input(layer, (5,))).sum()
    axis = rank_axes(layer)[":rank"]
    for keep, grow in (([0, 2], 0), ([0, 1], 5)):
        axis.resize(keep, grow, generator(0, axis.key, 1))
        again = layer(normal_input(layer, (5,))).sum()
        again.backward()
        assert all(s.tensor.grad.shape == s.tensor.shape for s in axis.slots())
        alive = alive, again


def test_parameters_stay_the_same_objects_and_hooks_survive():
    layer = svd()
    perturb(layer)
    objects, seen = dict(layer.named_parameters()), []
    layer.P.register_hook(lambda grad: seen.append(("grad", grad.shape[1])))
    layer.P.register_post_accumulate_grad_hook(lambda p: seen.append(("accumulated", p.shape[1])))
    layer(normal_input(layer, (5,))).sum().backward()
    axis = rank_axes(layer)[":rank"]
    axis.resize([1, 2])
    layer(normal_input(layer, (5,))).sum().backward()
    assert seen == [("grad", 6), ("accumulated", 6), ("grad", 2), ("accumulated", 2)]
    assert all(p is objects[name] for name, p in layer.named_parameters())
    assert layer.P.is_contiguous()


# ---- tied layers


def tied():
    model = nn.ModuleDict(
        {f"{i}": nn.ModuleDict({"q": nn.Linear(8, 6), "v": nn.Linear(8, 5)}) for i in range(3)}
    )
    return adapt(model.double(), "all-linear", TiedLow)


def test_the_toys_keep_the_contract():
    check_parameterization(TiedLow)
    check_parameterization(ToyTrain)


def test_tied_layers_are_one_axis_counted_and_resized_once():
    model = tied()
    axes = rank_axes(model)
    assert list(axes) == ["0.q:rank", "0.v:rank"]
    assert model["0"]["q"].M is model["2"]["q"].M
    assert model["0"]["q"].M is not model["0"]["v"].M
    cost = cost_model(model)
    assert cost.total({"0.q:rank": 3, "0.v:rank": 3}) == 3 * (8 + 3 * 6) + 3 * (8 + 3 * 5)
    assert cost.marginal("0.q:rank", {}) == 8 + 3 * 6
    whole_numbers(model)
    axis, x = axes["0.q:rank"], torch.randint(-3, 4, (4, 8)).double()
    assert [slot.label for slot in axis.slots()] == ["M", "B", "B@1", "B@2"]
    before = [model[f"{i}"]["q"](x) for i in range(3)]
    axis.resize(grow=2, generator=generator(0, axis.key, 1))
    assert all(torch.equal(model[f"{i}"]["q"](x), y) for i, y in enumerate(before))
    with axis.closed([1]):
        closed = [model[f"{i}"]["q"](x) for i in range(3)]
    axis.resize([0, 2, 3, 4])
    for i, y in enumerate(closed):
        layer = model[f"{i}"]["q"]
        assert layer.M is model["0"]["q"].M
        assert (layer.M.shape, layer.B.shape) == ((4, 8), (6, 4))
        torch.testing.assert_close(layer(x), y)
    assert len(axes["0.v:rank"]) == 3


def test_the_gate_of_a_tied_unit_is_that_of_all_its_layers():
    model = tied()
    perturb(model)
    axis, x = rank_axes(model)["0.q:rank"], torch.randn(4, 8).double()
    with pytest.raises(RuntimeError, match=r"0\.q:rank: .*call gate_grad\(\) after backward"):
        axis.gate_grad()
    sum(model[f"{i}"]["q"](x).square().sum() for i in (0, 2)).backward()  # layer 1 took no part
    M = model["0"]["q"].M
    torch.testing.assert_close(axis.gate_grad(), (M * M.grad).sum(1))


def test_fit_ranks_of_a_tied_model():
    model, other = tied(), tied()
    perturb(model)
    rank_axes(model)["0.v:rank"].resize([1])
    fit_ranks(other, model.state_dict())
    other.load_state_dict(model.state_dict())
    assert other["2"]["v"].M is other["0"]["v"].M
    x = torch.randn(4, 8).double()
    assert torch.equal(other["1"]["v"](x), model["1"]["v"](x))


# ---- two axes that share a tensor


def test_costs_do_not_add_up_where_two_axes_share_a_tensor():
    layer = ToyTrain(nn.Linear(48, 24).double())
    cost, sizes = cost_model(layer), {":bond_1": 3, ":bond_2": 4}
    assert cost.total(sizes) == 24 * 3 + 3 * 4 + 4 * 48
    assert cost.marginal(":bond_1", sizes) == 24 + 4
    assert cost.marginal(":bond_2", sizes) == 3 + 48
    assert cost.marginal(":bond_2", {":bond_1": 9, ":bond_2": 4}) == 9 + 48
    axes = rank_axes(layer)
    axes[":bond_1"].resize([0, 2])
    axes[":bond_2"].resize(grow=3, generator=generator(0, "b", 1))
    assert layer.G2.shape == (2, 7)
    assert cost.total({k: len(a) for k, a in axes.items()}) == sum(
        p.numel() for p in layer.parameters() if p.requires_grad
    )


# ---- scores, keys, order


def test_values_are_reduced_tensor_by_tensor_and_never_summed():
    layer = svd()
    axis = rank_axes(layer)[":rank"]
    for reduce, function in (
        ("mean", torch.mean),
        ("sum", torch.sum),
        ("norm", torch.linalg.vector_norm),
    ):
        result = axis.per_unit(lambda slot: slot.tensor.detach(), reduce)
        assert list(result) == ["P", "Q", "l"]
        torch.testing.assert_close(
            result["P"], torch.stack([function(layer.P[:, k]) for k in range(6)]).detach()
        )
        torch.testing.assert_close(
            result["Q"], torch.stack([function(layer.Q[k]) for k in range(6)]).detach()
        )
        assert result["l"].shape == (6,)
    assert list(axis.per_unit(lambda slot: slot.tensor if slot.name == "Q" else None)) == ["Q"]


def test_numbers_in_paths_are_numbers():
    model = adapt(nn.Sequential(*(nn.Linear(4, 4) for _ in range(12))), "all-linear", LoRA)
    assert list(rank_axes(model)) == [f"{i}:rank" for i in range(12)]
    keys = ["layers.10.q", "layers.2.v", "layers.2.q", "encoder.1", "layers"]
    assert sorted(keys, key=natural) == [
        "encoder.1",
        "layers",
        "layers.2.q",
        "layers.2.v",
        "layers.10.q",
    ]


def test_two_axes_of_one_name_in_a_nest_have_their_own_keys():
    nest = nn.ModuleDict({"q": LoRA(HyperAdapt(LoRA(nn.Linear(48, 24), rank=2)), rank=3)})
    assert {key: len(axis) for key, axis in rank_axes(nest).items()} == {
        "q.0:rank": 2,
        "q.2:rank": 3,
    }


# ---- loading


def test_stored_ranks_are_read_from_the_shapes():
    model = nn.ModuleDict(
        {"a": LoRA(nn.Linear(8, 6)), "b": SVD(LoRA(nn.Linear(8, 6), rank=2), rank=5)}
    )
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for key, axis in rank_axes(model).items():
        axis.resize([0], 1, generator(0, key, 1))
    fit_ranks(model, state)
    model.load_state_dict(state)
    assert {key: len(axis) for key, axis in rank_axes(model).items()} == {
        "a:rank": 8,
        "b.0:rank": 2,
        "b.1:rank": 5,
    }
    fit_ranks(model, {})  # a file that has nothing of an axis says nothing about it
    assert len(rank_axes(model)["a:rank"]) == 8


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("P", (24, 5), r"different ranks \(P: 5, Q: 6, l: 6\); the file is damaged"),
        ("l", (6, 1), r"l was stored with shape \(6, 1\), and has 1 dimension"),
        ("all", 30, "stored with 30 units, and holds 0 to 24"),
    ],
)
def test_a_damaged_file_is_refused(name, shape, sentence):
    layer = svd()
    state = layer.state_dict()
    if name == "all":
        state.update(P=torch.zeros(24, shape), Q=torch.zeros(shape, 48), l=torch.zeros(shape))
    else:
        state[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=sentence):
        fit_ranks(layer, state)


def test_a_missing_tensor_is_left_to_the_strict_load():
    layer, state = svd(), svd(rank=4).state_dict()
    del state["Q"]
    fit_ranks(layer, state)
    with pytest.raises(RuntimeError, match=r'Missing key.*"Q"'):
        layer.load_state_dict(state)


# ---- draws


def test_draws_depend_on_seed_axis_and_step_and_on_nothing_else():
    def draw(*arguments):
        torch.rand(3)  # the global state does not matter
        return torch.rand(4, generator=generator(*arguments)).tolist()

    assert draw(0, "a:rank", 10) == draw(0, "a:rank", 10)
    others = [draw(1, "a:rank", 10), draw(0, "b:rank", 10), draw(0, "a:rank", 11)]
    assert draw(0, "a:rank", 10) not in others


def test_an_axis_declared_in_the_wrong_order_says_so():
    wrong = type("Wrong", (LoRA,), {"axes": {"rank": {"B": 1, "A": 0}}})(nn.Linear(8, 6))
    with pytest.raises(
        ValueError,
        match=r"names 'B' before the tensor that closes the axis, .* name the zero-initialized",
    ):
        rank_axes(wrong)[":rank"].resize(grow=1, generator=generator(0, "a", 1))


def test_closing_drops_the_momentum_of_sgd():
    layer = LoRA(nn.Linear(6, 5), rank=3)
    layer.B.data.normal_()
    optimizer = torch.optim.SGD([layer.A, layer.B], lr=0.1, momentum=0.9)
    layer(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    (axis,) = rank_axes(nn.ModuleDict({"q": layer})).values()
    axis.close([1], [optimizer])
    momentum = optimizer.state[layer.B]["momentum_buffer"]
    assert not momentum[:, 1].any()
    assert momentum[:, 0].all()
