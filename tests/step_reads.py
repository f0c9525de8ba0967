"""Find reads of the device on a machine that has none.

Some tensors on the CPU are declared to be on a device, and so is everything that is computed from
them. Whatever would make the host wait for them is noted with the line that did it.
"""

import traceback

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.nonzero_numpy, aten.bincount,
    aten.nonzero_static, aten.repeat_interleave,
}  # fmt: skip
"""Operations whose result, or its shape, has to be on the host."""
TO_HOST = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}
NOT_OF_INTEREST = ("step_reads", "/torch/", "lightning_utilities", "apply_func", "contextlib")
"""Parts of the paths of files that say nothing about who reads."""
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class DeviceReads(TorchDispatchMode):
    """Note each read of a tensor that is declared to be on a device, or computed from one.

    It is entered around a step, again and again. `reads` has a line for each read.
    """

    def __init__(self):
        super().__init__()
        self.storages = set()
        self.reads = []
        self.calls = _Calls(self)

    def __enter__(self):
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.calls.__exit__(*error)

    def place(self, tensors):
        """Declare tensors to be on the device."""
        self.storages.update(map(_storage, tensors))

    def take_back(self, tensors):
        """Declare tensors to be on the host, whose memory may have been another's before."""
        self.storages.difference_update(map(_storage, tensors))

    def has(self, value):
        return isinstance(value, Tensor) and _storage(value) in self.storages

    def note(self, what):
        frames = [
            f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_stack()
            if not any(part in frame.filename for part in NOT_OF_INTEREST)
        ]
        self.reads.append(f"{what}: {' < '.join(reversed(frames[-6:]))}")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [value for value in tree_leaves((args, kwargs or {})) if isinstance(value, Tensor)]
        on_device = any(map(self.has, given))
        packet = function.overloadpacket
        is_mask = packet in INDEXING and any(
            t.dtype in (torch.bool, torch.uint8) for t in given[1:]
        )
        counts = packet is aten.repeat_interleave and not isinstance(args[0], Tensor)
        if on_device and ((packet in READS and not counts) or is_mask):
            self.note(str(function))
        result = function(*args, **(kwargs or {}))
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        (self.place if on_device else self.take_back)(made)
        return result


class _Calls(TorchFunctionMode):
    """Note calls that read a tensor on the CPU without an operation."""

    def __init__(self, reads):
        super().__init__()
        self.of = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in TO_HOST and args and self.of.has(args[0]):
            self.of.note(function.__name__)
        return function(*args, **(kwargs or {}))


def _storage(tensor):
    return tensor.untyped_storage()._cdata
