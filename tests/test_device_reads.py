"""No training step of a layer reads the device: on a GPU every such read waits for all kernels.

Two kinds of tensors have no numbers to read. Under `FakeTensorMode` a tensor has the device of a
CPU. A tensor on the meta device stands for one on a GPU: it does not mix with tensors on the CPU.
Fake tensors on a GPU have no backward pass where PyTorch is built without CUDA.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import default_cases, ids, loss_of, method_cases, nest_cases

from adaptrank.axes import rank_axes
from adaptrank.optimizers import LoRARITE, ScaledGD
from adaptrank.parameterizations import LoRA, MELoRA

METHOD_CASES = default_cases()
CASES = [*method_cases(), *nest_cases()]

READS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "nonzero_numpy",
    "unique_consecutive",
    "unique_dim",
    "unique_dim_consecutive",
}
"""Operations of aten whose result, or its shape, depends on numbers on the device."""
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


class DeviceRead(RuntimeError):
    """A read of the device."""


class NoReads(TorchDispatchMode):
    """Raise at every operation that reads the device, and at every copy between two devices.

    A copy from the host waits as well, unless its memory is pinned.
    """

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.removeprefix("aten::")
        if name in READS or (name == "repeat_interleave" and len(args) == 1):
            raise DeviceRead(name)
        indices = args[1] if name in INDEXING else ()
        if any(index is not None and index.dtype is torch.bool for index in indices):
            raise DeviceRead(f"{name} with a boolean mask")
        result = operation(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_", "_copy_from"):
            source = args[1] if name == "copy_" else args[0]
            if source.device != result.device:
                raise DeviceRead(f"{name} from {source.device} to {result.device}")
        return result


def fake(layer, x):
    """Give a layer fake tensors, and return their mode and a fake input."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def convert(tensor):
        return mode.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)

    layer._apply(convert)
    return mode, convert(x)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_training_step_reads_no_number(case):
    layer = case.build(dropout=0.1)
    mode, x = fake(layer, case.sample(layer))
    with mode, NoReads():
        loss_of(layer, x).backward()


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_training_step_stays_on_the_device(case):
    layer = case.build(torch.bfloat16)
    x = case.sample(layer)
    layer, x = layer.to("meta"), x.detach().to("meta").requires_grad_(x.requires_grad)
    with NoReads():
        loss_of(layer, x).backward()


@pytest.mark.parametrize("case", METHOD_CASES, ids=ids)
def test_gates_and_autocast_read_no_number(case):
    layer = case.build(dropout=0.1)
    mode, x = fake(layer, case.sample(layer))
    with mode:
        for axis in rank_axes(layer).values():
            axis.gate = torch.ones(len(axis), requires_grad=True)
    for autocast in (False, True):
        with mode, NoReads(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss_of(layer, x).backward()


READINGS = {
    "bool": lambda x: bool(x.sum() > 0),
    "list": torch.Tensor.tolist,
    "host": torch.Tensor.cpu,
    "from the host": lambda x: x + torch.ones(3).to(x.device),
    "nonzero": torch.nonzero,
    "mask": lambda x: x[x > 0],
    "repeats": lambda x: torch.repeat_interleave(x.long()),
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("reading", READINGS)
def test_a_read_raises(reading):
    x = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError), NoReads():
        READINGS[reading](x)


@pytest.mark.parametrize("method", [LoRA, MELoRA])
@pytest.mark.parametrize("optimizer", [LoRARITE, ScaledGD])
def test_the_step_of_an_optimizer_of_pairs_stays_on_the_device(optimizer, method):
    layer = method(torch.nn.Linear(48, 24)).to("meta")
    stepped = optimizer(layer, weight_decay=0.1)
    for parameter in (layer.A, layer.B):
        parameter.grad = torch.empty_like(parameter)
    with NoReads():
        stepped.step()
        stepped.step()
