"""PT-PEFT: a prefix alone, and then other adapters together with it."""

from functools import partial

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_allocators import everything, fit
from test_residual_offset import IDS, llama

from adaptrank._errors import UserError
from adaptrank.allocation import ALLOCATORS, AdaLoRA, SoRA
from adaptrank.artifacts import load_adapter, save_adapter
from adaptrank.injection import adapt
from adaptrank.parameterizations import NOLA, SVD, LoRA, Prefix, wrappers
from adaptrank.strategies import PTPEFT, beside_allocator

LORA2 = partial(LoRA, rank=2)
STEPS = 10  # three of them, or 0.3, are stage 1


def adapted(method=LORA2, **prefix):
    torch.manual_seed(0)
    model = llama()
    adapt(model, "all", partial(Prefix, tokens=3, **prefix))
    return adapt(model, ["q_proj", "v_proj"], method) if method else model


def tensors_of(model, kind):
    return [
        parameter
        for wrapper in wrappers(model)
        if isinstance(wrapper, Prefix) == (kind == "prefix")
        for _, parameter in wrapper.own_parameters()
    ]


def values(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def same(before, tensors):
    return all(torch.equal(value, tensor) for value, tensor in zip(before, tensors, strict=True))


def groups(model):
    return [
        {"params": tensors_of(model, "prefix"), "lr": 0.02},
        {"params": tensors_of(model, "others"), "lr": 0.01},
    ]


class Task(lightning.LightningModule):
    """A tiny Llama with a prefix and another method, which learns random texts."""

    def __init__(self, method=LORA2):
        super().__init__()
        self.model = adapted(method)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(1000), batch_size=1)

    def training_step(self, batch, batch_idx):
        ids = torch.randint(50, (2, 5), generator=torch.Generator().manual_seed(batch_idx))
        return self.model(ids, labels=ids).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(groups(self.model), lr=1e-2)


def run(strategy, model, optimizer, watch, steps=STEPS):
    """Train in a plain loop, and call `watch` after each step, before the strategy."""
    strategy.start(model, optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        watch(step)
        strategy.step()
    strategy.finish()


def test_a_prefix_alone_and_then_all_together_from_a_fresh_optimizer_and_a_warm_up():
    model = adapted()
    prefix, others = tensors_of(model, "prefix"), tensors_of(model, "others")
    optimizer = torch.optim.AdamW(groups(model), weight_decay=0.1)
    before = {"others": values(others)}
    rates, counts = [], []

    def note(stepped, *_):
        rates.append(tuple(group["lr"] for group in stepped.param_groups))

    strategy = PTPEFT(warmup=4)
    strategy.start(model, optimizer, STEPS)
    optimizer.register_step_pre_hook(note)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        counts.append([int(state["step"]) for state in optimizer.state.values()])
        logits = model(IDS).logits.detach()
        if strategy.step() is None:
            continue
        assert step == 2
        assert torch.equal(model(IDS).logits, logits)
        assert not optimizer.state
        assert same(before["others"], others)
        before["prefix"] = values(prefix)
    strategy.finish()
    assert counts[2] == [3] * len(prefix)
    assert counts[3] == [1] * (len(prefix) + len(others))
    assert not same(before["prefix"], prefix)
    assert not same(before["others"], others)
    rising = [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert rates[:3] == [(0.02, 0.01)] * 3
    assert rates[3:] == [pytest.approx((0.002 * factor, 0.01 * factor)) for factor in rising]
    counted = [sum(p.numel() for p in each) for each in (prefix, [*prefix, *others])]
    assert [event["trained"] for event in strategy.round_events] == counted
    assert [event["step"] for event in strategy.round_events] == [0, 3]


def test_a_frozen_prefix_stays_in_stage_two_and_all_trains_again_afterwards(tmp_path):
    model = adapted()
    prefix, others = tensors_of(model, "prefix"), tensors_of(model, "others")
    kept = {}

    def watch(step):
        kept.setdefault(step, values(prefix))

    # One group for all would do here, since the prefix has no rate in stage 2.
    optimizer = torch.optim.SGD([*prefix, *others], lr=0.5)
    run(PTPEFT(freeze_prefix=True, stage1=3), model, optimizer, watch)
    assert not same(kept[1], kept[2])
    assert same(kept[2], prefix)
    assert all(parameter.requires_grad for parameter in [*prefix, *others])
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(llama(), tmp_path)(IDS).logits, model(IDS).logits)


def test_a_tensor_that_the_user_has_frozen_trains_in_no_stage():
    model = adapted()
    frozen = tensors_of(model, "others")[0].requires_grad_(False)
    before, fixed = {name: p.requires_grad for name, p in model.named_parameters()}, frozen.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    run(PTPEFT(prefix_rate=1), model, optimizer, lambda step: None)
    assert torch.equal(frozen, fixed)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("accumulate", [1, 3])
def test_resume_is_exact_to_the_bit_in_both_stages_and_at_the_border(accumulate, tmp_path):
    whole, strategy = Task(), PTPEFT(warmup=2)
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    settings = {"steps": 6, "accumulate_grad_batches": accumulate}
    want = everything(whole, fit(whole, strategy, checkpoint, **settings))
    assert [event["step"] for event in strategy.round_events] == [0, 2]
    for step in (1, 2, 3) if accumulate == 1 else (2,):
        model, resumed = Task(), PTPEFT(warmup=2)
        again = fit(model, resumed, ckpt_path=tmp_path / f"step={step}.ckpt", **settings)
        have = everything(model, again)
        assert have.keys() == want.keys()
        assert all(torch.equal(have[key], want[key]) for key in want), f"cut at {step}"
        assert resumed.round_events == strategy.round_events


def test_an_allocator_acts_in_stage_two_alone():
    adalora = AdaLoRA(budget=6, every=2, warmup=3, final=2)
    seen = []
    observe = adalora.update
    adalora.update = lambda *given: (seen.append(adalora.run.steps_done), observe(*given))
    model = Task(partial(SVD, rank=2))
    fit(model, adalora, PTPEFT(), steps=STEPS)
    assert [event["step"] for event in adalora.events if event["step"]] == [5, 7, 8]
    assert seen == [3, 4, 5, 6, 7]  # before steps 4 to 8
    early = AdaLoRA(budget=6, every=2, warmup=2, final=2)
    with pytest.raises(UserError, match=r"AdaLoRA warms up for 2 steps.*before step 4; .*warmup=3"):
        fit(Task(partial(SVD, rank=2)), early, PTPEFT(), steps=STEPS)


def test_gates_rest_in_stage_one():
    sora, gates = SoRA(every=2, warmup=3, final=2), {}
    model = Task()

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, *rest):
            leaves = sora.engine.state.leaves()
            gates[trainer.global_step] = values(leaves)
            assert all(leaf.grad is None for leaf in leaves)

    fit(model, sora, PTPEFT(warmup=0), Watch(), steps=STEPS)
    assert gates[1]
    assert same(gates[1], gates[3])
    assert not same(gates[3], gates[5])


def test_every_allocator_may_take_part():
    assert all(beside_allocator(PTPEFT, cls) == "works" for cls in ALLOCATORS.values())


def test_refusals():
    model = adapted(encoder=4)
    together = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(UserError, match=r"one parameter group .*learning_rates: \{Prefix: 0.01\}"):
        PTPEFT().start(model, together, STEPS)
    PTPEFT(prefix_rate=1.0).start(model, together, STEPS)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    without = adapt(llama(), ["q_proj"], LORA2)
    with pytest.raises(UserError, match=r"this model has none; add .targets: all, parameteriz"):
        PTPEFT().start(without, optimizer, STEPS)
    with pytest.raises(UserError, match="trains other adapters after the prefix"):
        PTPEFT().start(adapted(None), optimizer, STEPS)
    with pytest.raises(UserError, match="NOLA with these arguments does not start at it"):
        PTPEFT().start(adapted(partial(NOLA, init="released")), optimizer, STEPS)
    for stage1 in (0, 10, 0.01):
        with pytest.raises(UserError, match="leaves one of the two stages of PTPEFT without a st"):
            PTPEFT(stage1=stage1).start(adapted(), optimizer, STEPS)
    with pytest.raises(UserError, match=r"stage1=1\.5"):
        PTPEFT(stage1=1.5)
