"""An allocator outside of Lightning: three calls in a loop, or a callback for transformers."""

import pytest
import torch
from test_allocators import ALL, TOTAL, Toy, everything, fit, sizes
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from adaptrank.allocation import AdaLoRA, ElaLoRA
from adaptrank.allocation.shells.transformers import AllocatorCallback
from adaptrank.axes import rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import SVD, LoRA


@pytest.mark.parametrize("name", ALL)
def test_three_calls_in_a_loop_are_what_lightning_does(name):
    """Bit by bit, with the orthogonality of a method that has one."""

    def method(base):
        return SVD(base, rank=4, orth=0.1)

    want = Toy(method)
    trainer = fit(want, ALL[name](), accumulate_grad_batches=2)

    model, allocator = Toy(method), ALL[name]()
    (optimizer,), (schedule,) = model.configure_optimizers()
    allocator.start(model, optimizer, TOTAL)
    events = []
    for step in range(TOTAL):
        for micro in range(2):
            (model.loss(2 * step + micro) / 2).backward()
        allocator.before_step()
        optimizer.step()
        if (event := allocator.step()) is not None:
            events.append(event)
        schedule["scheduler"].step()
        optimizer.zero_grad()
    allocator.finish()
    assert events == allocator.events
    assert [event["step"] for event in events] == [10, 14, 18]
    theirs, ours = everything(want, trainer), dict(model.state_dict())
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_allocator_that_evaluates_the_loss_says_when_it_has_none():
    class Evaluates(AdaLoRA):
        def score_units(self, state, axes):
            loss = self.run.loss(None)
            return {key: loss * torch.ones(len(axis)) for key, axis in axes.items()}

    model, allocator = Toy(), Evaluates(budget=6, warmup=0, every=1, final=1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    allocator.start(model, optimizer, 3)
    model.loss(0).backward()
    allocator.before_step()
    optimizer.step()
    with pytest.raises(
        ValueError,
        match=r"Evaluates evaluates the loss of whole batches; give `start` a function, loss=",
    ):
        allocator.step()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return adapt(LlamaForCausalLM(config), "all-linear", lambda base: LoRA(base, rank=4))


def train(folder, allocator, resume=None, model=None):
    model = llama() if model is None else model
    random = torch.Generator().manual_seed(0)
    data = [
        {"input_ids": (ids := torch.randint(32, (6,), generator=random)), "labels": ids}
        for _ in range(64)
    ]
    arguments = TrainingArguments(
        folder,
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=100,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model, arguments, train_dataset=data, callbacks=[AllocatorCallback(allocator)]
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def ranks(model):
    return {key: len(axis) for key, axis in rank_axes(model).items()}


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdaLoRA(budget=8, soft=False, every=2, warmup=4, final=4),
        lambda: ElaLoRA(every=2, warmup=4, final=4, swaps=6),
    ],
    ids=["AdaLoRA", "ElaLoRA"],
)
def test_in_transformers_trainer_and_through_its_checkpoints(make, tmp_path):
    allocator = make()
    model, _ = train(tmp_path, allocator)
    assert [event["step"] for event in allocator.events] == [6, 8]
    assert ranks(model) != ranks(llama())
    if isinstance(allocator, AdaLoRA):
        assert 0 in allocator.events[0]["sizes"].values()
    assert sum(ranks(model).values()) == allocator.events[-1]["total"]
    for step in (3, 7, 8, 10):
        again = make()
        resumed, _ = train(tmp_path, again, resume=str(tmp_path / f"checkpoint-{step}"))
        assert again.events == allocator.events
        pairs = zip(model.parameters(), resumed.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), step


def test_a_refusal_in_a_loop_changes_nothing():
    model = Toy()
    with pytest.raises(ValueError, match="AdaLoRA: a budget of 2 ranks is below 3"):
        AdaLoRA(budget=2, floor=1).start(model, torch.optim.Adam(model.parameters()), TOTAL)
    assert sum(sizes(model).values()) == 12
