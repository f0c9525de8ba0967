"""`load_state_dict` of an adapted model whose ranks have moved since."""

import copy
import pickle
import re

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from adaptrank import adapt, delete_adapter, fit_ranks, load_adapter, merge, save_adapter, unmerge
from adaptrank.allocation import AdaLoRA
from adaptrank.axes import load_hook, rank_axes
from adaptrank.parameterizations import SVD, LoRA
from adaptrank.testing import perturb

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def net(method=LoRA):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    return adapt(layers, "all-linear", method)


def moved(method=LoRA):
    """A model with a rank of 1 and a rank of 3."""
    model = net(method)
    for number, axis in enumerate(rank_axes(model).values()):
        axis.resize([0] if number == 0 else range(3))
    perturb(model, 0.3)
    return model


def sizes(model):
    return [len(axis) for axis in rank_axes(model).values()]


@pytest.mark.parametrize("method", [LoRA, SVD], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("around", ["alone", "in a module", "a copy", "a pickle", "compiled"])
def test_the_ranks_are_those_of_the_state_dict(method, around):
    source, model = moved(method), net(method)
    if around == "in a module":
        source, model = nn.ModuleDict({"a": source}), nn.ModuleDict({"a": model})
    if around == "a copy":
        model = copy.deepcopy(model)
    if around == "a pickle":
        model = pickle.loads(pickle.dumps(model))
    if around == "compiled":
        source, model = torch.compile(source), torch.compile(model)
    model.load_state_dict(source.state_dict())
    assert sizes(model) == sizes(source) == [1, 3]
    if around != "in a module":
        plain = getattr(model, "_orig_mod", model), getattr(source, "_orig_mod", source)
        assert torch.equal(plain[0](X), plain[1](X))


def test_a_loaded_adapter_follows_a_state_dict(tmp_path):
    save_adapter(net(), tmp_path)
    outer = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = load_adapter(nn.ModuleDict({"a": outer}), tmp_path)
    model.load_state_dict(nn.ModuleDict({"a": moved()}).state_dict())
    assert sizes(model) == [1, 3]


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()

    def training_step(self, batch, index):
        return self.net(batch).square().mean()

    def validation_step(self, batch, index):
        self.log("v", self.net(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


def trainer(**arguments):
    return Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, **arguments,
    )  # fmt: skip


def test_a_checkpoint_of_a_module_of_ones_own_loads_without_its_allocator(tmp_path):
    data = DataLoader(torch.randn(64, 8), batch_size=8)
    source, file = Module(), tmp_path / "a.ckpt"
    run = trainer(max_steps=8, callbacks=[AdaLoRA(budget=6, every=1, warmup=2, final=1)])
    run.fit(source, data)
    run.save_checkpoint(file)
    assert sizes(source) != sizes(Module())
    again = Module.load_from_checkpoint(file, weights_only=True)
    assert sizes(again) == sizes(source)
    assert torch.equal(again.net(X), source.net(X))
    other = Module()
    trainer().validate(other, data, ckpt_path=file, verbose=False, weights_only=True)
    assert torch.equal(other.net(X), source.net(X))


# ---- what stays as it was


def test_equal_sizes_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(load_hook, "fit_ranks", None)
    model = net()
    parameters = list(model.parameters())
    model.load_state_dict(net().state_dict())
    model.load_state_dict({}, strict=False)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_a_part_of_an_axis_is_refused_as_ever_with_what_to_do():
    model, before = net(), copy.deepcopy(net().state_dict())
    part = {key: value for key, value in moved().state_dict().items() if key.endswith(".A")}
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.A") as error:
        model.load_state_dict(part, strict=False)
    assert str(error.value).count("call adaptrank.fit_ranks(model, state_dict) before") == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # One whole axis of several may come alone.
    whole = {key: value for key, value in moved().state_dict().items() if key.startswith("0.")}
    model.load_state_dict(whole, strict=False)
    assert sizes(model)[0] == 1


def test_sizes_that_cannot_be_are_named_beside_the_mismatch():
    model, stored = net(), moved().state_dict()
    stored["0.B"] = stored["0.B"].repeat(1, 2)
    with pytest.raises(RuntimeError, match="0:rank were stored with different ranks") as error:
        model.load_state_dict(stored)
    assert sizes(model) == sizes(net())
    assert "fit_ranks" not in str(error.value)


def test_layers_that_were_wrapped_by_hand_say_what_to_call():
    def by_hand(rank):
        return nn.Sequential(LoRA(nn.Linear(8, 8), rank=rank))

    model, stored = by_hand(4), by_hand(2).state_dict()
    sentence = "call adaptrank.fit_ranks(model, state_dict) before load_state_dict"
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        model.load_state_dict(stored)
    fit_ranks(model, stored)
    model.load_state_dict(stored)


def hooks(model):
    return sum(len(module._load_state_dict_pre_hooks) for module in model.modules())


def test_one_hook_that_goes_with_the_last_adapter():
    plain = hooks(nn.Sequential(nn.Linear(8, 8)))
    model = adapt(net(), ["0"], LoRA, name="b")
    assert hooks(model) == plain + 1
    delete_adapter(model, "b")
    assert hooks(model) == plain + 1
    assert hooks(delete_adapter(model)) == plain
    assert hooks(merge(net())) == plain
    kept = unmerge(merge(net(), keep_originals=True))
    kept.load_state_dict(moved().state_dict())
    assert sizes(kept) == [1, 3]
