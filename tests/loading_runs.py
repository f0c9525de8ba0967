"""Small runs that the tests of loading share."""

from functools import partial

import torch
from lightning.pytorch import Callback, Trainer

from adaptrank.cli import main
from adaptrank.data import ArithmeticProblems
from adaptrank.modules import Adapter, CausalLM
from adaptrank.parameterizations import LoRA

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
}


def causal(folder, *nest, **arguments):
    """A task module with a LoRA, in float32 unless told otherwise."""
    nest = nest or (partial(LoRA, rank=2),)
    settings = {"dtype": "fp32", "optimizer": partial(torch.optim.AdamW, lr=1e-2), **arguments}
    adapters = settings.pop("adapters", [Adapter(list(nest), targets=["q_proj", "down_proj"])])
    return CausalLM(folder, adapters, **settings)


def problems():
    return ArithmeticProblems(batch_size=4, train_size=40, val_size=4)


class Losses(Callback):
    """Collects the loss of each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]))


def fit(module, data=None, callbacks=(), ckpt_path=None, **arguments):
    trainer = Trainer(
        **{**QUIET, "enable_checkpointing": False, **arguments}, callbacks=list(callbacks)
    )
    trainer.fit(module, datamodule=data or problems(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def trained(module):
    """The tensors that train, by name."""
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def command(capsys, *args):
    """Run a command, and return (exit code, stdout, stderr)."""
    capsys.readouterr()
    try:
        main(list(map(str, args)))
        code = 0
    except SystemExit as leaving:
        code = leaving.code
    said = capsys.readouterr()
    return code, said.out, said.err
