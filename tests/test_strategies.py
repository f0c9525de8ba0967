"""Training strategies: rounds, the merge ledger, restarts, and exact resumes."""

import copy
import warnings
from functools import partial

import lightning
import pytest
import torch
from conftest import LINEAR_METHODS
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from test_allocators import Toy, everything, fit
from torch import nn

from adaptrank import testing
from adaptrank._errors import UserError
from adaptrank.allocation import AdaLoRA, ElaLoRA, SoRA
from adaptrank.artifacts import load_adapter, read_adapter, save_adapter
from adaptrank.axes import fit_ranks, rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import (
    SVD,
    HyperAdapt,
    LoRA,
    MergedUpdates,
    Parameterization,
    wrapped_layers,
)
from adaptrank.strategies import (
    STRATEGIES,
    ChainOfLoRA,
    RACLoRA,
    ReLoRA,
    Rounds,
    TrainingStrategy,
    XGBLoRA,
    change_of,
    insert_ledgers,
    ledger_of,
    live_wrappers,
    merge_into_ledger,
    restart,
)

TOTAL = 24
LORA2 = partial(LoRA, rank=2)

MAKERS = {
    "ReLoRA": lambda: ReLoRA(every=8, restart_warmup=3),
    "ReLoRA magnitude": lambda: ReLoRA(every=8, restart_warmup=3, reset="magnitude"),
    "ReLoRA random": lambda: ReLoRA(every=8, restart_warmup=3, reset="random"),
    "ChainOfLoRA": lambda: ChainOfLoRA(links=3),
    "ChainOfLoRA ranks": lambda: ChainOfLoRA(links=3, ranks=[3, 2, 1]),
    "RACLoRA": lambda: RACLoRA(every=8),
    "RACLoRA coin": lambda: RACLoRA(every=8, train="coin"),
    "XGBLoRA": lambda: XGBLoRA(every=8, blocks=2),
}


def run_plain(strategy, model, steps=TOTAL, make=torch.optim.Adam, watch=None):
    """Train the toy's loss in a plain loop."""
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    strategy.start(model, optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()
        if watch is not None:
            watch(step, optimizer, model)
        strategy.step()
    strategy.finish()
    return optimizer


# ---- rounds


def test_rounds_by_length_and_by_count():
    rounds = Rounds.of_length(10, 25)
    assert rounds.borders == (10, 20)
    assert len(rounds) == 3
    assert rounds.length(2) == 5
    assert [rounds.number(step) for step in (0, 9, 10, 19, 20, 24)] == [0, 0, 1, 1, 2, 2]
    assert Rounds.of_length(10, 10).borders == ()
    assert Rounds.of_count(3, 10).borders == (3, 6)
    with pytest.raises(UserError, match="11 rounds do not fit into a run of 10"):
        Rounds.of_count(11, 10)


# ---- the ledger


@pytest.mark.parametrize("dense", [False, True])
def test_the_ledger_keeps_the_contract_of_a_parameterization(dense):
    def build():
        ledger = MergedUpdates(nn.Linear(48, 24).double())
        random = torch.Generator().manual_seed(3)
        for k in (2, 3):
            ledger.add((torch.randn(24, k, generator=random), torch.randn(k, 48, generator=random)))
        if dense:
            ledger.add(torch.randn(24, 48, generator=random))
        assert not list(ledger.own_parameters())
        return LoRA(ledger)

    for check in (
        testing.check_definition,
        testing.check_gradients,
        testing.check_merged,
        testing.check_factors,
        testing.check_state_dict,
        testing.check_copies,
        testing.check_switch,
    ):
        check(build)


def test_a_dense_change_without_some_of_its_rows_is_refused():
    ledger = MergedUpdates(nn.Linear(6, 4))
    stored = ledger.state_dict() | {"D": torch.zeros(3, 6)}
    model = nn.Sequential(ledger)
    with pytest.raises(UserError, match="3 of 4 rows"):
        fit_ranks(model, {f"0.{name}": value for name, value in stored.items()})


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", ["embedding", "convolution"])
def test_the_ledger_works_over_other_layers_than_linear_ones(kind, dense):
    torch.manual_seed(0)
    base = nn.Embedding(10, 6) if kind == "embedding" else nn.Conv2d(3, 4, 3)
    base, twin = base.double(), copy.deepcopy(base).double()
    ledger = MergedUpdates(base)
    m, n = ledger.shape
    U, V = torch.randn(m, 2, dtype=torch.float64), torch.randn(2, n, dtype=torch.float64)
    ledger.add(U @ V if dense else (U, V))
    change = U @ V
    if kind == "embedding":
        x = torch.tensor([[1, 2, 9]])
        twin.weight.data += change.T
    else:
        x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
        twin.weight.data += change.view_as(twin.weight)
    torch.testing.assert_close(ledger(x), twin(x))


def test_the_ledger_is_found_by_name_and_is_no_method_to_choose():
    from adaptrank.parameterizations import PARAMETERIZATIONS

    assert PARAMETERIZATIONS["MergedUpdates"] is MergedUpdates
    assert "MergedUpdates" not in list(PARAMETERIZATIONS)


def test_the_ledger_equals_the_sum_of_all_changes_over_a_half_precision_weight():
    """200 merges of rank one into bfloat16 would lose most of the change."""
    base = nn.Linear(32, 24).bfloat16()
    W = base.weight.detach().double()
    layer, total = MergedUpdates(base), torch.zeros(24, 32, dtype=torch.float64)
    for _ in range(200):
        U, V = 1e-3 * torch.randn(24, 1), torch.randn(1, 32)
        total += U.double() @ V.double()
        layer.add((U, V))
        numbers = sum(tensor.numel() for tensor in layer.own_tensors().values())
        assert numbers <= 24 * 32 + 24 + 32  # no more than the dense change
    assert len(layer.D) == 24
    assert not len(layer.A)
    change = layer.dense().double() - W
    assert (change - total).norm() < 1e-5 * total.norm()
    assert torch.equal(base.weight, W.bfloat16())


def restarts(layer):
    """Whether a wrapper has a weight, starts at that of its layer, and changes nothing else."""
    kind = type(layer)
    weight_only = (
        kind.trained_bias is Parameterization.trained_bias
        and kind.merged is Parameterization.merged
    )
    return layer.mergeable and layer.starts_at_base and weight_only


@pytest.mark.parametrize("cls", LINEAR_METHODS, ids=lambda cls: cls.__name__)
def test_a_merge_and_a_restart_leave_the_function_as_it_is(cls):
    """For every method that can be merged; the others are refused by name."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(48, 24)).double()
    model = copy.deepcopy(base)
    model[0] = cls(model[0])
    testing.perturb(model)
    x = torch.randn(5, 48, dtype=torch.float64)
    if not restarts(model[0]):
        with pytest.raises(UserError, match=cls.__name__):
            insert_ledgers(model)
        return
    insert_ledgers(model)
    model.eval()
    want = model(x)
    outermost = model[0]
    size = {axis: outermost.axis_size(axis) for axis in outermost.axes}
    change = change_of(outermost)
    merge_into_ledger(outermost)
    for wrapper in live_wrappers(outermost):
        restart("0", wrapper, 0, 1)
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-11)
    assert {axis: outermost.axis_size(axis) for axis in outermost.axes} == size
    dense = change[0] @ change[1] if isinstance(change, tuple) else change
    ledger = ledger_of(outermost)
    torch.testing.assert_close(ledger.dense() - base[0].weight, dense, rtol=0, atol=1e-11)
    left = change_of(outermost)
    rest = left[0] @ left[1] if isinstance(left, tuple) else left
    assert rest.abs().max() < 1e-11
    assert dense.abs().max() > 1e-4


@pytest.mark.parametrize("inner", [HyperAdapt, LoRA])
def test_nests_and_sizes_that_differ_from_the_arguments(inner):
    model = nn.Sequential(nn.Linear(16, 12)).double()
    model[0] = LoRA(inner(model[0]), rank=4)
    insert_ledgers(model)
    assert [type(w) for w in model[0].nest] == [MergedUpdates, inner, LoRA]
    assert [w.nest_depth for w in model[0].nest] == [1, 2, 3]
    testing.perturb(model)
    axis = list(rank_axes(model).values())[-1]
    for keep, grow in (([0, 2], 0), (None, 5)):
        axis.resize(keep, grow, torch.Generator().manual_seed(0))
        testing.perturb(model)
        x = torch.randn(3, 16, dtype=torch.float64)
        want, size = model(x), len(axis)
        merge_into_ledger(model[0])
        for wrapper in live_wrappers(model[0]):
            restart("0", wrapper, 0, 1)
        torch.testing.assert_close(model(x), want, rtol=0, atol=1e-11)
        assert len(axis) == size


def test_a_restart_draws_the_same_whatever_was_drawn_before():
    drawn = []
    for noise in (0, 5):
        torch.manual_seed(noise)
        model = nn.Sequential(LoRA(nn.Linear(16, 12), rank=3))
        torch.rand(noise)
        state = torch.random.get_rng_state()
        restart("0", model[0], 7, 2)
        assert torch.equal(torch.random.get_rng_state(), state)
        drawn.append(model[0].A.detach().clone())
    assert torch.equal(*drawn)
    restart("0", model[0], 7, 3)
    assert not torch.equal(model[0].A, drawn[0])


def test_two_wrappers_of_a_nest_draw_different_tensors():
    model = nn.Sequential(LoRA(LoRA(nn.Linear(16, 12), rank=3), rank=3))
    for wrapper in model[0].nest:
        restart("0", wrapper, 0, 1)
    assert not torch.equal(model[0].A, model[0].base.A)


def test_an_adapter_with_a_ledger_is_saved_and_loaded(tmp_path):
    base = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8))
    model = adapt(copy.deepcopy(base), "all-linear", LORA2)
    insert_ledgers(model)
    testing.perturb(model)
    for outermost in wrapped_layers(model).values():
        merge_into_ledger(outermost)
    ledger_of(model[1]).add(torch.randn(8, 12))
    save_adapter(model, tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    x = torch.randn(4, 16)
    assert torch.equal(loaded(x), model(x))
    other = adapt(copy.deepcopy(base), "all-linear", LORA2)
    insert_ledgers(other)
    fit_ranks(other, model.state_dict())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


# ---- strategies


def test_the_registry_lists_the_folder():
    assert {"ReLoRA", "ChainOfLoRA"} <= set(STRATEGIES)
    assert all(cls.source.startswith("arXiv:") for cls in STRATEGIES.values())


@pytest.mark.parametrize("name", MAKERS)
def test_the_function_stays_the_same_at_every_border(name):
    strategy, model = MAKERS[name](), Toy(LORA2, dtype=torch.float64)
    x, borders = torch.randn(5, 16, dtype=torch.float64), []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    strategy.start(model, optimizer, TOTAL)
    for step in range(TOTAL):
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()
        before = [layer(x).detach() for layer in model.maps]
        if strategy.step() is not None:
            borders.append(step + 1)
            for layer, want in zip(model.maps, before, strict=True):
                torch.testing.assert_close(layer(x), want, rtol=1e-11, atol=1e-11)
    strategy.finish()
    assert borders == [8, 16]
    assert any(len(ledger_of(layer).A) for layer in model.maps)


def test_optimizer_state_is_gone_after_a_full_reset_and_the_first_step_is_no_longer_than_the_rate():
    strategy, model = ChainOfLoRA(links=2), Toy(LORA2)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    strategy.start(model, optimizer, 2 * TOTAL)
    for step in range(TOTAL + 1):
        optimizer.zero_grad()
        model.loss(step).backward()
        if step == TOTAL:
            before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        optimizer.step()
        strategy.step()
        if step == TOTAL - 1:
            assert not optimizer.state
    after = [p.detach() for p in model.parameters() if p.requires_grad]
    longest = max(float((b - a).abs().max()) for a, b in zip(after, before, strict=True))
    assert longest <= 1e-2 * (1 + 1e-4)


@pytest.mark.parametrize("reset", ["magnitude", "random"])
def test_relora_prunes_a_share_of_each_moment_and_keeps_the_step(reset):
    strategy, model = ReLoRA(every=8, restart_warmup=3, reset=reset, prune=0.75), Toy(LORA2)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    strategy.start(model, optimizer, 16)
    for step in range(8):
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()
        kept = {p: state["exp_avg_sq"].clone() for p, state in optimizer.state.items()}
        strategy.step()
    for p, state in optimizer.state.items():
        assert float(state["step"]) == 8
        is_gone = state["exp_avg_sq"] == 0
        assert int(is_gone.sum()) == int(0.75 * p.numel())
        assert int((state["exp_avg"] == 0).sum()) >= int(0.75 * p.numel())
        assert not state["exp_avg"][is_gone].any()
        if reset == "magnitude":
            assert kept[p][is_gone].max() <= kept[p][~is_gone].min()


@pytest.mark.parametrize("name", MAKERS)
def test_no_step_after_a_border_is_a_leap(name):
    """The gradient of A is zero behind a B of zero. Adam must not divide a moment by epsilon."""
    strategy, model = MAKERS[name](), Toy(LORA2)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    strategy.start(model, optimizer, 24)
    for step in range(24):
        optimizer.zero_grad()
        model.loss(step).backward()
        before = [p.detach().clone() for p in trained]
        optimizer.step()
        moved = [(p - b).abs() for p, b in zip(trained, before, strict=True) if p.numel()]
        assert max(float(distance.max()) for distance in moved) <= 3.2 * 1e-2
        strategy.step()


def test_relora_warms_up_again_after_each_restart():
    strategy, model = ReLoRA(every=8, restart_warmup=4, reset="full"), Toy(LORA2)
    rates = []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    step_of = optimizer.step
    strategy.start(model, optimizer, 20)
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    for step in range(20):
        optimizer.zero_grad()
        model.loss(step).backward()
        step_of()
        assert optimizer.param_groups[0]["lr"] == 0.5
        strategy.step()
    restarted = [0.0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5]
    assert rates == [0.5] * 8 + restarted + restarted[:4]


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", MAKERS)
def test_resume_is_exact_to_the_bit(name, accumulate, tmp_path):
    """Stopped inside of a round, one step before a border, on a border, and one step after."""
    whole, strategy = Toy(LORA2), MAKERS[name]()
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = fit(whole, strategy, checkpoint, accumulate_grad_batches=accumulate)
    want = everything(whole, trainer)
    assert [event["step"] for event in strategy.round_events] == [0, 8, 16]
    for step in (3, 7, 8, 9, 20) if accumulate == 1 else (8, 12):
        model, resumed = Toy(LORA2), MAKERS[name]()
        path = tmp_path / f"step={step}.ckpt"
        again = fit(model, resumed, ckpt_path=path, accumulate_grad_batches=accumulate)
        have = everything(model, again)
        assert have.keys() == want.keys()
        different = [key for key in want if not torch.equal(have[key], want[key])]
        assert not different, f"cut at {step}: {different}"
        assert resumed.round_events == strategy.round_events


def test_an_allocator_acts_before_the_merge_and_scores_anew_in_each_round():
    adalora = AdaLoRA(budget=6, every=4, warmup=2, final=4)
    strategy, model = ReLoRA(every=8, restart_warmup=2, reset="full"), Toy(partial(SVD, rank=4))
    forgotten = []
    engine = adalora.engine
    forget = engine.forget_scores
    engine.forget_scores = lambda: (forget(), forgotten.append(engine.progress.steps_done))
    # Listed in the wrong order: the strategy moves behind the allocator.
    trainer = fit(model, strategy, adalora)
    names = [type(callback).__name__ for callback in trainer.callbacks]
    assert names.index("AdaLoRA") < names.index("ReLoRA")
    assert forgotten == [8, 16]
    axes = {key: axis for key, axis in rank_axes(model).items() if axis.trainable()}
    assert sum(len(axis) for axis in axes.values()) == 6


def test_elalora_grows_within_rounds_and_resumes(tmp_path):
    def make():
        allocator = ElaLoRA(every=4, warmup=2, final=4)
        return ReLoRA(every=8, restart_warmup=2), allocator

    whole = Toy(partial(SVD, rank=4))
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = fit(whole, *make(), checkpoint)
    want = everything(whole, trainer)
    for step in (8, 11, 16):
        model = Toy(partial(SVD, rank=4))
        again = fit(model, *make(), ckpt_path=tmp_path / f"step={step}.ckpt")
        have = everything(model, again)
        assert all(torch.equal(have[key], want[key]) for key in want)


def test_refusals():
    model = Toy(LORA2)
    with pytest.raises(UserError, match="ReLoRA and SoRA: its gates"):
        fit(model, ReLoRA(every=8, restart_warmup=2), SoRA())
    with pytest.raises(UserError, match="both divide the run into rounds"):
        fit(Toy(LORA2), ReLoRA(every=8, restart_warmup=2), ChainOfLoRA())
    with pytest.raises(UserError, match="not shorter than a cycle"):
        ReLoRA(every=10, restart_warmup=10)
    with pytest.raises(UserError, match="give 3 ranks"):
        ChainOfLoRA(links=3, ranks=[4, 2])
    with pytest.raises(UserError, match="one round in this run of 24 optimizer steps"):
        fit(Toy(LORA2), ReLoRA(every=24, restart_warmup=3))
    with pytest.raises(UserError, match="found no adapter"):
        ReLoRA().start(nn.Linear(4, 4), torch.optim.SGD(nn.Linear(4, 4).parameters(), lr=1), 10)
    with pytest.raises(UserError, match="has no end"):
        ReLoRA().start(model, torch.optim.SGD(model.parameters(), lr=1), float("inf"))


def test_a_checkpoint_of_another_strategy_is_refused(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=9, save_top_k=-1)
    fit(Toy(LORA2), ReLoRA(every=8, restart_warmup=3), checkpoint, steps=12)
    path = tmp_path / "step=9.ckpt"
    with pytest.raises(UserError, match="every: 8 there, 9 here"):
        fit(Toy(LORA2), ReLoRA(every=9, restart_warmup=3), ckpt_path=path, steps=12)
    with pytest.raises(UserError, match="a run without ChainOfLoRA"):
        fit(Toy(LORA2), ChainOfLoRA(), ckpt_path=path, steps=12)


def test_a_strategy_of_ones_own_takes_a_few_lines():
    class Halves(TrainingStrategy, registered=False):
        """Freeze A in the second half."""

        def rounds(self, total_steps):
            return Rounds.of_count(2, total_steps)

        def arrange(self, number):
            for layer in self.layers.values():
                layer.A.requires_grad_(number == 0)

    model, kept = Toy(LORA2), {}

    def watch(step, optimizer, model):
        if step == TOTAL // 2 - 1:
            kept["A"] = model.maps[0].A.detach().clone()
            kept["B"] = model.maps[0].B.detach().clone()

    run_plain(Halves(), model, watch=watch, make=torch.optim.SGD)
    assert torch.equal(model.maps[0].A, kept["A"])
    assert not torch.equal(model.maps[0].B, kept["B"])


def test_an_allocator_leaves_out_the_first_tenth_of_a_round_but_never_its_last_event():
    adalora = AdaLoRA(budget=6, every=1, warmup=0, final=19)
    strategy = ReLoRA(every=20, restart_warmup=2, reset="full")
    fit(Toy(partial(SVD, rank=4)), strategy, adalora, steps=60)
    steps = [event["step"] for event in adalora.events if event["step"]]
    assert steps == [*range(1, 21), *range(23, 41), 41]


# ---- what trains after a run


def flags(model):
    """Return name -> whether the tensor trains. A ledger under a wrapper changes no name."""
    named = model.named_parameters()
    return {name.replace("base.", ""): parameter.requires_grad for name, parameter in named}


def run_all(strategy, model):
    """Train with an optimizer of all parameters, of which most are frozen."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    strategy.start(model, optimizer, TOTAL)
    for step in range(TOTAL):
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()
        strategy.step()


@pytest.mark.parametrize("name", MAKERS)
def test_the_end_of_a_run_leaves_frozen_what_was_frozen(name, tmp_path):
    model = Toy(LORA2)
    before, frozen = flags(model), model.maps[1].innermost.weight.clone()
    strategy = MAKERS[name]()
    for _ in range(2):
        run_all(strategy, model)
        strategy.finish()
        assert flags(model) == before
        strategy.finish()
        assert flags(model) == before
    save_adapter(model.maps, tmp_path)
    assert not read_adapter(tmp_path)["trained_modules"]
    run_plain(MAKERS[name](), model, make=lambda _, lr: torch.optim.AdamW(model.parameters(), lr))
    assert torch.equal(model.maps[1].innermost.weight, frozen)


class AllParameters(Toy):
    """A module whose optimizer has all parameters, as in most examples of Lightning."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("name", ["ReLoRA", "RACLoRA", "RACLoRA coin", "XGBLoRA"])
def test_a_run_in_lightning_leaves_frozen_what_was_frozen(name, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=11, save_top_k=-1)
    model, before = AllParameters(LORA2), flags(AllParameters(LORA2))
    fit(model, MAKERS[name](), checkpoint)
    assert flags(model) == before
    resumed = AllParameters(LORA2)
    fit(resumed, MAKERS[name](), ckpt_path=tmp_path / "step=11.ckpt")
    assert flags(resumed) == before
    for parameter, again in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, again)


class Broken(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 10:
            raise RuntimeError("broken")


def test_a_run_that_breaks_off_leaves_flags_as_they_were():
    model = AllParameters(LORA2)
    before = flags(model)
    with pytest.raises(RuntimeError, match="broken"):
        fit(model, MAKERS["RACLoRA"](), Broken())
    assert flags(model) == before


class Evaluated(AllParameters):
    val_dataloader = Toy.train_dataloader

    def validation_step(self, batch, batch_idx):
        return None


def test_an_evaluation_leaves_flags_as_they_were():
    model = Evaluated(LORA2)
    before = flags(model)
    trainer = lightning.Trainer(
        callbacks=[MAKERS["RACLoRA"]()],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        limit_val_batches=1,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        trainer.validate(model, verbose=False)
    assert flags(model) == before


def test_a_tensor_that_the_user_freezes_within_a_run_stays_frozen():
    model = Toy(LORA2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    strategy = RACLoRA(every=8)
    strategy.start(model, optimizer, TOTAL)
    layer = model.maps[0]
    assert not layer.B.requires_grad
    layer.A.requires_grad_(False)
    strategy.finish()
    assert layer.B.requires_grad
    assert not layer.A.requires_grad


def test_plan_leaves_flags_as_they_were():
    model = Toy(LORA2)
    before, engine = flags(model), MAKERS["RACLoRA coin"]().engine
    engine.prepare(model)
    engine.foresee(model, [], TOTAL)
    assert flags(model) == before
