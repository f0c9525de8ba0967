"""Optimizers that know adapters: pairing, refusals, LoRA+, scaled gradients, trainers."""

import inspect
import logging
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_allocators import PHASES, TOTAL, Toy, everything, fit
from test_lora_rite import RITE, T, Two, changes, distance, gauge, train
from test_trainer import arguments, assert_equal, base, rows, trained
from torch import nn
from transformers import Trainer

from adaptrank import OPTIMIZERS
from adaptrank.allocation import AdaLoRA, BeamLoRA, DyLoRA, ElaLoRA, SoRA
from adaptrank.axes import generator, rank_axes
from adaptrank.injection import adapt
from adaptrank.modules import Adapter, CausalLM
from adaptrank.optimizers import (
    LoRAPlus,
    LoRARITE,
    ModelOptimizer,
    ScaledAdamW,
    ScaledGD,
    lora_rite,
    optimizer_pair,
    summary,
)
from adaptrank.parameterizations import (
    PARAMETERIZATIONS,
    SVD,
    DoRA,
    HyperAdapt,
    LoRA,
    PiCa,
    wrappers,
)
from adaptrank.training.adapter_gradients import AdapterGradients

DOCS = Path(__file__).parents[1] / "docs"
PAIRED = [LoRARITE, ScaledGD, ScaledAdamW]
WITH_A_PAIR = {"DecoupledLoRA", "DoRA", "LoRA", "MELoRA", "MiSS", "SBoRA"}
PLUS = {"LoRA", "DoRA", "SVD", "MELoRA"}


# ---- the registry and the table


def test_the_registry_has_the_classes_of_the_folder_with_their_sources():
    assert list(OPTIMIZERS) == ["LoRAPlus", "LoRARITE", "ScaledAdamW", "ScaledGD"]
    for cls in OPTIMIZERS.values():
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", cls.source)
        assert summary(cls)


def test_which_methods_each_optimizer_works_on():
    cells = {name: optimizer_pair(LoRARITE, name) for name in SHIPPED}
    assert {name for name, cell in cells.items() if cell == "works"} == WITH_A_PAIR
    assert cells["PiCa"] == "ties M across layers by default; share=False works"
    assert cells["SVD"] == "does not depend on two factors through their product alone"
    for other in (ScaledGD, ScaledAdamW):
        assert {name: optimizer_pair(other, name) for name in SHIPPED} == cells
    assert optimizer_pair(LoRARITE, "HyperAdapt", "LoRA") == "works"
    assert "HyperAdapt does not" in optimizer_pair(LoRARITE, "HyperAdapt", "SVD")
    works_with_plus = {name for name in SHIPPED if optimizer_pair(LoRAPlus, name) == "works"}
    assert works_with_plus >= PLUS
    assert not works_with_plus & {"HyperAdapt", "PiCa", "SBoRA", "Prefix"}


def test_the_table_of_the_page_says_the_same():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (yes|no) \|$", PAGE.read_text(), re.MULTILINE)
    assert sorted(name for name, *_ in rows) == sorted(SHIPPED)
    for name, pairs, plus in rows:
        cell = optimizer_pair(LoRARITE, name)
        if name == "PiCa":
            assert "`share: false`" in pairs
        else:
            assert pairs.startswith("yes" if cell == "works" else "no"), name
        assert plus == ("yes" if optimizer_pair(LoRAPlus, name) == "works" else "no"), name


PAGE = DOCS / "optimizers.md"
SHIPPED = [
    name for name, cls in PARAMETERIZATIONS.items() if cls.__module__.startswith("adaptrank.")
]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_stated_pair_leaves_the_output_when_it_is_split_in_another_way(name):
    """The statement of every method is checked against its output."""
    cls = PARAMETERIZATIONS[name]
    torch.manual_seed(1)
    layer = cls(cls.example().double())
    pair = layer.factor_pair()
    if pair is None:
        return
    if name == "DecoupledLoRA":
        layer.magnitudes.data.fill_(1)  # it multiplies the product, beside the pair
    tensors = {each: getattr(layer, each) for each, _ in (pair.B, pair.A)}
    for tensor in tensors.values():
        if isinstance(tensor, nn.Parameter):
            tensor.data.normal_()
    x = layer.example_input((3,), torch.Generator().manual_seed(0)).double()
    before = layer(x)
    (B, of_B), (A, of_A) = pair.B, pair.A
    rows, columns = (
        (tensors[key].double() if dim == one else tensors[key].double().mT)
        for key, dim, one in ((B, of_B, 1), (A, of_A, 0))
    )
    factors = layer.factors()
    if pair.blocks is None and factors is not None:
        torch.testing.assert_close(pair.scale * rows @ columns, factors[0] @ factors[1])
    if not all(isinstance(tensor, nn.Parameter) for tensor in tensors.values()):
        return
    units = rows.shape[1]
    basis = torch.eye(units).double()
    for block in [range(units)] if pair.blocks is None else pair.blocks.tolist():
        members = [unit for unit in block if unit < units]
        basis[torch.tensor(members)[:, None], members] = torch.randn(
            len(members), len(members)
        ).double()
    layer.get_parameter(B).data.copy_(rows @ basis)
    layer.get_parameter(A).data.copy_(torch.linalg.solve(basis, columns))
    torch.testing.assert_close(layer(x), before, rtol=1e-9, atol=1e-9)


# ---- refusals


@pytest.mark.parametrize("optimizer", PAIRED)
@pytest.mark.parametrize(
    ("method", "why"),
    [
        (SVD, "SVD does not depend on two factors through their product alone"),
        (HyperAdapt, "HyperAdapt does not depend on two factors"),
    ],
)
def test_a_method_without_a_pair_is_refused_by_name(optimizer, method, why):
    model = adapt(nn.Sequential(nn.Linear(8, 8)), "all-linear", method)
    with pytest.raises(ValueError, match=f"{optimizer.__name__} does not go with .*{why}.*AdamW"):
        optimizer(model)


def test_a_model_that_nobody_named_and_one_without_adapters():
    model = Two()
    optimizer = LoRARITE([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"LoRARITE\(model, lr=...\), or call optimizer.bind"):
        train(model, optimizer, 1)
    plus = LoRAPlus([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="LoRAPlus has parameters and does not know their adap"):
        train(model, plus, 1)
    with pytest.raises(ValueError, match="trains adapters, and the model has none"):
        LoRARITE(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="Nothing in this model trains"):
        LoRARITE(nn.Linear(3, 3).requires_grad_(False))


def test_a_factor_that_layers_share_is_refused():
    model = nn.ModuleList(nn.ModuleDict({"map": nn.Linear(8, 8)}) for _ in range(2))
    adapt(model, "all-linear", PiCa)
    with pytest.raises(ValueError, match=r"LoRARITE cannot train PiCa where .*PiCa share: false"):
        LoRARITE(model)
    whole = nn.Sequential(LoRA(nn.Linear(8, 8)), LoRA(nn.Linear(8, 8)))
    whole[1].A, whole[1].B = whole[0].A, whole[0].B
    LoRARITE(whole)  # tied as a whole
    whole[1].B = nn.Parameter(whole[1].B.detach().clone())
    with pytest.raises(ValueError, match="share a factor and not its dual: untie the layers"):
        LoRARITE(whole)


class Squared(LoRA):
    """A user's method whose output depends on more than the product."""

    def weight(self):
        return self.base_weight + self.scale * self.B.square() @ self.A


class Stated(Squared):
    """It says that it has a pair all the same."""

    def factor_pair(self):
        return super().factor_pair()


def test_a_subclass_with_another_formula_has_to_state_its_pair_anew():
    assert optimizer_pair.__module__.startswith("adaptrank")
    wrapper = Squared(nn.Linear(8, 8))
    assert LoRARITE.misfit(wrapper) == "redefines weight() and does not state factor_pair() anew"
    assert not LoRARITE.misfit(Stated(nn.Linear(8, 8)))


@pytest.mark.parametrize("allocator", [SoRA, BeamLoRA, DyLoRA])
@pytest.mark.parametrize("optimizer", PAIRED)
def test_an_allocator_with_gates_is_refused_at_its_start(allocator, optimizer):
    model = Two()
    with pytest.raises(ValueError, match=f"{optimizer.__name__} mixes the units .*AdamW"):
        allocator().start(model, optimizer(model), 20)


def test_a_gate_that_is_hung_later_stops_the_step():
    model = Two()
    optimizer = RITE(model)
    train(model, optimizer, 1)
    next(iter(rank_axes(model).values())).gate = torch.ones(4)
    with pytest.raises(ValueError, match="cannot step LoRA, which has units that are multiplied"):
        train(model, optimizer, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1}, "lr=-1 makes no sense"),
        ({"betas": (0.9, 1.0)}, "betas=1.0 makes no sense"),
        ({"betas": 0.9}, "Give two numbers"),
        ({"clip": 0}, "clip=0 makes no sense"),
        ({"eps": float("nan")}, "eps=nan makes no sense"),
        ({"adamw_lr": -1}, "adamw_lr=-1 makes no sense"),
    ],
)
def test_numbers_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        LoRARITE(Two(), **options)


# ---- scaled gradients


def test_scaled_gradient_descent_is_the_formula():
    model = Two()
    optimizer = ScaledGD(model, lr=0.1, damping=0.0)
    model.loss(0).backward()
    wanted = []
    for wrapper in wrappers(model):
        A, B, gA, gB = wrapper.A.detach(), wrapper.B.detach(), wrapper.A.grad, wrapper.B.grad
        wanted.append(
            (A - 0.1 * torch.linalg.inv(B.T @ B) @ gA, B - 0.1 * gB @ (A @ A.T).inverse())
        )
    optimizer.step()
    for wrapper, (A, B) in zip(wrappers(model), wanted, strict=True):
        torch.testing.assert_close(wrapper.A.data, A, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(wrapper.B.data, B, rtol=1e-9, atol=1e-10)
    damped = Two()
    optimizer = ScaledGD(damped, lr=0.1, damping=0.5)
    damped.loss(0).backward()
    A, B, gA = damped.first.A.detach().clone(), damped.first.B.detach(), damped.first.A.grad
    gram = B.T @ B
    d = 0.5 * gram.trace() / 4 + 1e-12
    optimizer.step()
    want = A - 0.1 * torch.linalg.inv(gram + d * torch.eye(4).double()) @ gA
    torch.testing.assert_close(damped.first.A.data, want, rtol=1e-9, atol=1e-12)


def test_scaled_gradient_descent_is_lora_rite_without_moments(monkeypatch):
    """With V = I and no momentum."""

    def identity(stacks, of):
        return [torch.eye(V.shape[-1]).double().expand(V.shape) for V in stacks]

    monkeypatch.setattr(lora_rite, "functions", identity)
    one, other = Two(alpha=4.0), Two(alpha=4.0)  # s = 1
    train(one, LoRARITE(one, lr=0.05, betas=(0.0, 0.999), clip=None), 10)
    train(other, ScaledGD(other, lr=0.05, damping=0.0), 10)
    assert distance(one, other) < 1e-9


def test_scaled_gradient_descent_does_not_depend_on_the_split():
    paths = []
    for basis in (None, T["random"]):
        model = Two()
        if basis is not None:
            gauge(model, basis)
        paths.append(train(model, ScaledGD(model, lr=0.05, damping=0.0), 20))
    assert distance(*paths) < 1e-9


def test_scaled_adamw_is_adamw_on_preconditioned_gradients():
    model, twin = Two(), Two()
    optimizer = ScaledAdamW(model, lr=0.02, damping=0.1, weight_decay=0.1)
    trained = [p for p in twin.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.1)
    for number in range(3):
        optimizer.zero_grad()
        adam.zero_grad()
        model.loss(number).backward()
        twin.loss(number).backward()
        for wrapper in wrappers(twin):
            A, B = wrapper.A.detach(), wrapper.B.detach()
            for p, gram in ((wrapper.A, B.T @ B), (wrapper.B, A @ A.T)):
                d = 0.1 * gram.trace() / 4 + 1e-12
                inverse = torch.linalg.inv(gram + d * torch.eye(4).double())
                p.grad = inverse @ p.grad if p is wrapper.A else p.grad @ inverse
        gradient = model.first.A.grad.clone()
        optimizer.step()
        adam.step()
        assert torch.equal(model.first.A.grad, gradient)  # that of the loss is still there
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    axis = next(iter(rank_axes(model).values()))
    axis.resize([0, 2], 3, generator(0, "a", 1), [optimizer])
    assert optimizer.state[model.first.B]["exp_avg_sq"].shape == model.first.B.shape
    train(model, optimizer, 2, 3)


# ---- LoRA+


def rates_of(optimizer, model):
    names = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_lora_plus_has_a_group_of_closing_factors_and_a_schedule_keeps_the_ratio():
    model = nn.ModuleDict({"layers": Two(DoRA), "head": nn.Linear(3, 2).double()})
    optimizer = LoRAPlus(model, lr=0.01, ratio=8.0, weight_decay=0.1)
    first = {"A": (0.01, 0.1), "B": (0.08, 0.1), "m": (0.01, 0.0), "weight": (0.01, 0.1)}
    assert rates_of(optimizer, model) == {**first, "bias": (0.01, 0.0)}
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 4)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    rates = {name: rate for name, (rate, _) in rates_of(optimizer, model).items()}
    assert rates["A"] == pytest.approx(0.005)
    assert rates["B"] == pytest.approx(0.04)
    saved = optimizer.state_dict()
    again = LoRAPlus(model, lr=0.01, ratio=8.0)
    again.load_state_dict(saved)
    assert rates_of(again, model)["B"][0] == pytest.approx(0.04)


def test_over_an_embedding_the_roles_are_swapped():
    model = nn.Sequential(nn.Embedding(20, 8))
    adapt(model, ["0"], LoRA)
    rates = rates_of(LoRAPlus(model, lr=0.01, ratio=2.0), model)
    assert {name: rate for name, (rate, _) in rates.items()} == {"A": 0.02, "B": 0.01}


def test_lora_plus_is_refused_where_one_factor_alone_trains():
    model = nn.Sequential(nn.Linear(8, 8))
    adapt(model, "all-linear", PiCa)
    with pytest.raises(ValueError, match="PiCa has no trained factor beside one that starts at z"):
        LoRAPlus(model)


def test_the_key_and_the_optimizer_are_one(tiny_llama):
    """`lora_plus_ratio` with AdamW takes the same steps as LoRAPlus."""
    results = []
    for optimizer, ratio in (
        (partial(torch.optim.AdamW, lr=1e-3), 4.0),
        (partial(LoRAPlus, lr=1e-3, ratio=4.0, weight_decay=0.01), 1.0),
    ):
        torch.manual_seed(0)
        module = task(tiny_llama, optimizer, lora_plus_ratio=ratio)
        stepped(module)
        results.append({n: p.detach() for n, p in module.named_parameters() if p.requires_grad})
    assert results[0].keys() == results[1].keys()
    assert all(map(torch.equal, results[0].values(), results[1].values()))
    with pytest.raises(ValueError, match=r"LoRARITE balances .* leave lora_plus_ratio at 1.0"):
        stepped(task(tiny_llama, LoRARITE, lora_plus_ratio=4.0))


def task(folder, optimizer, **arguments):
    nest = [partial(LoRA, rank=2)]
    return CausalLM(
        folder, [Adapter(nest)], dtype="fp32", optimizer=optimizer, warmup=0, **arguments
    )


class Steps:
    """A trainer's view for `configure_optimizers`."""

    estimated_stepping_batches = 10


def stepped(module, steps=2):
    module.configure_model()
    module._trainer = Steps()
    optimizer = module.configure_optimizers()["optimizer"]
    module._trainer = None
    for number in range(steps):
        optimizer.zero_grad()
        ids = torch.arange(4 + number)[None]
        module.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return optimizer


# ---- trainers


class Rite(Toy):
    """Three layers with LoRA, in which ranks move."""

    def __init__(self, cls=LoRARITE):
        super().__init__(partial(LoRA, rank=4))
        self.cls = cls

    def configure_optimizers(self):
        optimizer = self.cls(self, lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=TOTAL)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


RUNS = {
    "AdaLoRA": (lambda: AdaLoRA(budget=6, **PHASES), [14]),
    "ElaLoRA": (lambda: ElaLoRA(**PHASES), [10, 16]),
}
"""Allocator, and the steps at which its run is killed: on an event, and between two."""


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_with_moving_ranks_resumes_to_the_bit(name, tmp_path):
    make, steps = RUNS[name]
    whole, allocator = Rite(), make()
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    want = everything(whole, fit(whole, allocator, checkpoint))
    assert any(event["pruned"] for event in allocator.events)
    for step in steps:
        model, resumed = Rite(), make()
        again = everything(model, fit(model, resumed, ckpt_path=tmp_path / f"step={step}.ckpt"))
        assert resumed.events == allocator.events
        assert again.keys() == want.keys()
        for key, value in want.items():
            same = torch.equal(again[key], value) if torch.is_tensor(value) else again[key] == value
            assert same, (step, key)


def test_clipping_by_the_trainer_beside_that_of_the_optimizer_is_said(caplog):
    shell = AdapterGradients()
    for cls, clip in ((LoRARITE, 1.0), (LoRARITE, 0), (LoRARITE, None), (ScaledAdamW, 1.0)):
        with caplog.at_level(logging.WARNING, "adaptrank"):
            fit(Rite(cls), shell, steps=1, gradient_clip_val=clip)
        said = "LoRARITE clips by itself (clip), and gradient_clip_val=1.0 clips" in caplog.text
        assert said is (cls is LoRARITE and clip == 1.0)
        caplog.clear()


def test_accelerates_wrapper_shows_the_roles_of_what_it_wraps():
    from accelerate import Accelerator

    model = Two(dtype=torch.float32)
    optimizer = Accelerator(cpu=True).prepare_optimizer(RITE(model))
    allocator = ElaLoRA(every=2, warmup=2, final=2)
    allocator.start(model, optimizer, 8)
    for number in range(8):
        model.loss(number).backward()
        allocator.before_step()
        optimizer.step()
        optimizer.zero_grad()
        allocator.step()
    assert any(event.get("grown") for event in allocator.events)


def test_transformers_trainer_takes_it_and_resumes(tmp_path):
    def run(folder, steps, resume=None):
        model = adapt(base(), "all-linear", partial(LoRA, rank=4))
        trainer = Trainer(
            model,
            arguments(folder, max_grad_norm=0.0, save_steps=steps),
            train_dataset=rows(),
            callbacks=[ElaLoRA(every=2, warmup=3, final=3)],
            optimizers=(LoRARITE(model, lr=1e-3), None),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trained(trainer)

    want = run(tmp_path, 5)
    again = run(tmp_path / "again", 5, str(tmp_path / "checkpoint-5"))
    assert_equal(again, want)


# ---- the command


def test_constructors_say_the_same_words():
    for cls in OPTIMIZERS.values():
        names = list(inspect.signature(cls).parameters)
        assert names[:2] == ["params", "lr"]
        assert issubclass(cls, ModelOptimizer)
    assert changes(Two())
