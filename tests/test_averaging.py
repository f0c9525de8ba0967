"""Averaged weights (EMA, SWA): checkpoints hold those that were validated, and resume exactly."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch.optim.swa_utils import get_ema_multi_avg_fn

from adaptrank.allocation import EVA, AdaLoRA
from adaptrank.data import ArithmeticProblems
from adaptrank.modules import Adapter, CausalLM
from adaptrank.parameterizations import SVD, LoRA, SBoRA

AVERAGES = {
    "EMA": lambda: EMAWeightAveraging(decay=0.7),
    "EMA multi": lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.7)),
    "SWA": lambda: WeightAveraging(),
    "stochastic": lambda: StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=1),
}
LORA = partial(LoRA, rank=4)
STEPS = {"max_epochs": 4, "check_val_every_n_epoch": 2}


def module(folder, method=LORA, **arguments):
    torch.manual_seed(0)
    return CausalLM(
        folder,
        [Adapter([method], targets=["q_proj", "up_proj"])],
        dtype="fp32",
        generate=False,
        optimizer=partial(torch.optim.AdamW, lr=0.05),
        schedule="constant",
        warmup=0,
        **arguments,
    )


def fit(model, folder, *callbacks, ckpt_path=None, **arguments):
    trainer = Trainer(
        **{**STEPS, **arguments},
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, ModelCheckpoint(folder, "{epoch}", every_n_epochs=2, save_top_k=-1)],
    )
    data = ArithmeticProblems(batch_size=4, train_size=8, val_size=4)
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


class Validated(Callback):
    """Keeps the weights that each validation used."""

    def __init__(self):
        self.weights = []

    def on_validation_batch_start(self, trainer, model, *_):
        self.weights.append(copy.deepcopy(dict(model.trained_state())))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", AVERAGES)
def test_a_checkpoint_holds_the_validated_weights_and_resumes_exactly(name, tiny_llama, tmp_path):
    whole, validated = module(tiny_llama), Validated()
    trainer = fit(whole, tmp_path / "whole", AVERAGES[name](), validated)
    path = tmp_path / "whole" / "epoch=1.ckpt"
    stored = torch.load(path, weights_only=True)
    trained = whole.trained_state().keys()
    assert same(stored["state_dict"], validated.weights[0])
    if name == "stochastic":
        (state,) = (s for k, s in stored["callbacks"].items() if k.startswith("Stochastic"))
        assert state["average_model_state"].keys() == trained
    else:
        assert stored["current_model_state"].keys() == trained
        assert not same(stored["state_dict"], stored["current_model_state"])

    resumed = module(tiny_llama)
    again = fit(resumed, tmp_path / "rest", AVERAGES[name](), ckpt_path=path)
    assert again.global_step == trainer.global_step == 8
    assert same(resumed.trained_state(), whole.trained_state())
    last = torch.load(tmp_path / "rest" / "epoch=3.ckpt", weights_only=True)
    expected = torch.load(tmp_path / "whole" / "epoch=3.ckpt", weights_only=True)
    assert same(last["state_dict"], expected["state_dict"])


@pytest.mark.filterwarnings("ignore")
def test_frozen_weights_and_indices_are_not_averaged(tiny_llama, tmp_path):
    plain = module(tiny_llama, partial(SBoRA, rank=4))
    plain.configure_model()
    frozen = {
        key: value.clone()
        for key, value in plain.state_dict().items()
        if key not in plain.trained_state() or not value.is_floating_point()
    }
    model, average = module(tiny_llama, partial(SBoRA, rank=4)), EMAWeightAveraging(decay=0.7)
    fit(model, tmp_path, average)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())
    shared = zip(model.parameters(), average._average_model.module.parameters(), strict=True)
    assert all((a is b) is not a.requires_grad for a, b in shared)


@pytest.mark.filterwarnings("ignore")
def test_stochastic_averaging_averages_a_module_that_is_built_late(tiny_llama, tmp_path):
    """Lightning copies the module before it is built, and would average nothing."""
    seen = []

    class Last(Callback):
        def on_train_epoch_start(self, trainer, model):
            seen.append(copy.deepcopy(dict(model.trained_state())))

    model = module(tiny_llama)
    # The callback averages at the start of an epoch, from its first one on.
    fit(model, tmp_path, AVERAGES["stochastic"](), Last())
    for key, value in model.trained_state().items():
        mean = torch.stack([weights[key] for weights in seen]).mean(0)
        torch.testing.assert_close(value, mean)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["EMA", "stochastic"])
@pytest.mark.parametrize("allocator", [lambda: AdaLoRA(budget=9), lambda: EVA(max_batches=1)])
def test_averages_beside_ranks_that_change_are_refused_before_training(
    name, allocator, tiny_llama, tmp_path
):
    model = module(tiny_llama, partial(SVD, rank=4))
    with pytest.raises(ValueError, match="WeightAveraging keeps a copy of the weights"):
        fit(model, tmp_path, AVERAGES[name](), allocator())
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.filterwarnings("ignore")
def test_weights_alone_are_filtered_and_recorded_too(tiny_llama, tmp_path):
    model = module(tiny_llama)
    trainer = fit(model, tmp_path, AVERAGES["EMA"](), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    stored = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert stored["state_dict"].keys() == model.trained_state().keys()
    assert stored["adaptrank"]["adapter"]["adapters"][0]["nest"][0]["class"] == "LoRA"
