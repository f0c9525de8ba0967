"""Steps are those of the optimizer that moves the axes, and an event fires on reaching its step."""

import logging
import warnings
from functools import partial

import lightning
import pytest
import torch
from torch import nn

from adaptrank.allocation import AdaLoRA, ElaLoRA
from adaptrank.axes import rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import SVD
from adaptrank.training.penalties import add_penalty_gradients

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Two(lightning.LightningModule):
    """Two adapted layers and a head, each with an optimizer that the module steps itself.

    Args:
        head_first: whether the optimizer of the head is the first one.
        every: batches from one step of the adapters to the next.
        repeats: steps of the adapters in such a batch.
    """

    def __init__(self, head_first=False, every=1, repeats=1, orth=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.layers = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
        adapt(self.layers, "all-linear", partial(SVD, rank=6, orth=orth))
        self.head = nn.Linear(12, 3)
        self.head_first, self.every, self.repeats = head_first, every, repeats

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(1000), batch_size=1)

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        head, adapters = optimizers if self.head_first else optimizers[::-1]
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(batch_idx))
        rounds = self.repeats if batch_idx % self.every == 0 else 0
        for _ in range(max(1, rounds)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward((self.head(self.layers(x)) - 1).square().mean())
            if self.head_first:
                head.step()
            if rounds:
                adapters.step()
            if not self.head_first:
                head.step()

    def configure_optimizers(self):
        adapters = [p for p in self.layers.parameters() if p.requires_grad]
        pair = [torch.optim.AdamW(adapters, lr=1e-2), torch.optim.SGD(self.head.parameters(), 1e-2)]
        return pair[::-1] if self.head_first else pair


def fit(model, *callbacks, ckpt_path=None, **arguments):
    settings = {"max_steps": 40, "accelerator": "cpu", "logger": False, **arguments}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(lightning|torch)\..*")
        trainer = lightning.Trainer(
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **settings,
        )
        trainer.fit(model, ckpt_path=ckpt_path, **({"weights_only": True} if ckpt_path else {}))
    return trainer


def units(model):
    return sum(len(axis) for axis in rank_axes(model).values())


def steps_of(allocator):
    return [event["step"] for event in allocator.events]


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize(("every", "final"), [(5, 10), (4, 10), (3, 9), (1, 9)])
def test_every_event_fires_and_the_budget_is_met(every, final, head_first):
    model, allocator = Two(head_first), AdaLoRA(budget=7, every=every, warmup=5, final=final)
    fit(model, allocator)
    assert allocator.phases.total == 20
    assert steps_of(allocator) == allocator.phases.events()
    assert units(model) == 7


def test_the_steps_are_counted_by_epochs_as_well():
    model, allocator = Two(), AdaLoRA(budget=7, every=3, warmup=5, final=5)
    fit(model, allocator, max_steps=-1, max_epochs=2, limit_train_batches=10)
    assert allocator.phases.total == 20
    assert steps_of(allocator) == allocator.phases.events()
    assert units(model) == 7


def test_an_event_that_is_passed_within_a_batch_is_made_up_for():
    model, allocator = Two(repeats=3), ElaLoRA(swaps=2, every=2, warmup=3, final=4)
    fit(model, allocator, max_steps=48)
    assert steps_of(allocator) == allocator.phases.events()


def test_a_run_that_ends_before_the_last_event_meets_its_budget(caplog):
    model, allocator = Two(every=4), AdaLoRA(budget=7, every=3, warmup=2, final=4)
    with caplog.at_level("WARNING", "adaptrank"):
        fit(model, allocator)
    assert units(model) == 7
    assert steps_of(allocator)[-1] == allocator.phases.end
    assert "training ended after step 8" in allocator.events[-1]["reason"]
    assert "AdaLoRA: training ended after 8 of 20 planned steps" in caplog.text


def test_a_stopped_run_is_not_pruned_behind_its_back():
    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    model, allocator = Two(), AdaLoRA(budget=7, every=3, warmup=5, final=5)
    fit(model, allocator, Stop())
    assert units(model) == 12
    assert not allocator.events


def test_a_resumed_run_counts_on(tmp_path):
    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 18:
                trainer.save_checkpoint(tmp_path / "nine.ckpt")

    def allocator():
        return AdaLoRA(budget=7, every=3, warmup=5, final=5)

    whole, first = Two(), allocator()
    fit(whole, first, Save())
    resumed, second = Two(), allocator()
    fit(resumed, second, ckpt_path=tmp_path / "nine.ckpt")
    assert second.events == first.events
    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("head_first", [False, True])
def test_scores_are_updated_once_and_a_penalty_is_added_once(head_first):
    class Counting(AdaLoRA):
        updates = 0

        def update(self, state, axes):
            type(self).updates += 1
            super().update(state, axes)

    class Gradients(lightning.Callback):
        seen = None

        def on_before_optimizer_step(self, trainer, module, optimizer):
            owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
            layer = module.layers[0]
            if self.seen is None and id(layer.P) in owned:
                self.seen = layer.P.grad.clone()

    model, gradients = Two(head_first, orth=0.1), Gradients()
    fit(model, Counting(budget=7, every=3, warmup=5, final=5), gradients)
    assert Counting.updates == 15  # none after the last event, and none for the head
    twin = Two(head_first, orth=0.1)
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    (twin.head(twin.layers(x)) - 1).square().mean().backward()
    add_penalty_gradients(twin.layers)
    torch.testing.assert_close(gradients.seen, twin.layers[0].P.grad)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_batches_make_one_step(accumulate):
    class One(Two):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = True
            self.head.requires_grad_(False)

        def training_step(self, batch, batch_idx):
            x = torch.randn(4, 12, generator=torch.Generator().manual_seed(batch_idx))
            return (self.head(self.layers(x)) - 1).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    model, allocator = One(), AdaLoRA(budget=7, every=3, warmup=3, final=3)
    fit(
        model,
        allocator,
        max_steps=-1,
        max_epochs=2,
        limit_train_batches=16,
        accumulate_grad_batches=accumulate,
    )
    assert allocator.phases.total == 2 * -(-16 // accumulate)
    assert steps_of(allocator) == allocator.phases.events()
    assert units(model) == 7
