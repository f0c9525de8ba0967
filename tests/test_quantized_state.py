"""Quantized optimizer state follows ranks: tensor subclasses (torchao), bitsandbytes, float8."""

from functools import partial

import lightning
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from test_allocators import fit
from test_state_roles import only_axis, train
from torch import Tensor, nn

from adaptrank.allocation import ElaLoRA
from adaptrank.axes import check_optimizer, dequantized, generator
from adaptrank.axes.block_quantized import decode, number_of
from adaptrank.axes.quantized_tensors import is_quantized_tensor
from adaptrank.injection import adapt
from adaptrank.parameterizations import LoRA
from adaptrank.training.finite import FiniteWeights

BLOCK = 256


class Codes(Tensor):
    """Stand-in for torchao's states: codes of 8 bits, a scale for each block, few operations."""

    @staticmethod
    def __new__(cls, codes, scale, signed, dtype):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes, scale, signed, dtype):
        self.codes, self.scale, self.signed, self.block_size = codes, scale, signed, BLOCK

    @classmethod
    def zeros(cls, shape, signed=True, block_size=BLOCK, device=None, dtype=None):
        codes = torch.zeros(shape, dtype=torch.int16, device=device)
        return cls(codes, torch.zeros(codes.numel() // block_size, device=device), signed, dtype)

    def dequantize(self):
        blocks = self.codes.float().view(-1, BLOCK) / 127 * self.scale[:, None]
        return blocks.view(self.codes.shape)

    def __tensor_flatten__(self):
        return ["codes", "scale"], [self.signed, self.dtype]

    @classmethod
    def __tensor_unflatten__(cls, parts, rest, outer_size=None, outer_stride=None):
        return cls(parts["codes"], parts["scale"], *rest)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        own = args[0]
        if function is torch.ops.aten.copy_.default:
            blocks = args[1].reshape(-1, BLOCK)
            scale = blocks.abs().amax(1).clamp_min(1e-12)
            own.codes.copy_((blocks / scale[:, None] * 127).round().view(own.shape))
            own.scale.copy_(scale)
            return own
        if function is torch.ops.aten.detach.default:
            return cls(own.codes, own.scale, own.signed, own.dtype)
        if function is torch.ops.aten._to_copy.default:
            return cls(own.codes.clone(), own.scale.clone(), own.signed, own.dtype)
        raise NotImplementedError(f"Codes: {function}")


class CodedAdam(torch.optim.Optimizer):
    """Adam whose moments are `Codes` where a tensor has 4096 elements or more in whole blocks."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, self.state[p], group["lr"])
        return loss

    def update(self, p, state, lr):
        if not state:
            fits = p.numel() >= 4096 and p.numel() % BLOCK == 0
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = Codes.zeros(p.shape, dtype=p.dtype) if fits else torch.zeros_like(p)
            state["step"] = torch.tensor(0.0)
        state["step"] += 1
        first, second = (plain(state[key]) for key in ("exp_avg", "exp_avg_sq"))
        first = 0.9 * first + 0.1 * p.grad
        second = 0.99 * second + 0.01 * p.grad.square()
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        correction = (1 - 0.99 ** state["step"]).sqrt() / (1 - 0.9 ** state["step"])
        p.sub_(lr * correction * first / (second.sqrt() + 1e-8))


def plain(value):
    return value.dequantize() if isinstance(value, Codes) else value


torch.serialization.add_safe_globals([Codes])


def torchao(name):
    return getattr(pytest.importorskip("torchao.optim"), name)


def bitsandbytes(name):
    return getattr(pytest.importorskip("bitsandbytes").optim, name)


FORMS = {
    "stand-in": lambda: CodedAdam,
    "AdamW8bit": lambda: torchao("AdamW8bit"),
    "AdamW4bit": lambda: torchao("AdamW4bit"),
    "AdamWFp8": lambda: torchao("AdamWFp8"),
}
ERROR = {"stand-in": 0.01, "AdamW8bit": 0.03, "AdamW4bit": 0.3, "AdamWFp8": 0.05}
"""Largest error of a value after it was encoded again, as a share of the largest value."""


@pytest.fixture
def eager():
    """torchao compiles each step, which takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def lora(rank=4, m=24, n=2048):
    torch.manual_seed(0)
    layer = LoRA(nn.Linear(n, m), rank=rank)
    layer.B.data.normal_().mul_(0.1)
    return layer


# ---- tensor subclasses


@pytest.mark.parametrize("name", FORMS)
def test_a_quantized_tensor_follows_and_stays_quantized(name, eager):
    layer = lora()
    optimizer = FORMS[name]()([layer.A, layer.B], lr=1e-2)
    train(layer, optimizer)
    check_optimizer(optimizer)
    state = optimizer.state[layer.A]
    kind = type(state["exp_avg"])
    assert is_quantized_tensor(state["exp_avg"])
    first, second = (dequantized(state[key]) for key in ("exp_avg", "exp_avg_sq"))
    only_axis(layer).resize([3, 1], 2, generator(0, "a", 1), [optimizer])
    assert type(state["exp_avg"]) is type(state["exp_avg_sq"]) is kind
    assert state["exp_avg"].shape == layer.A.shape
    have, sizes = (dequantized(state[key]) for key in ("exp_avg", "exp_avg_sq"))
    within = {"rtol": 0, "atol": ERROR[name] * float(first.abs().max())}
    torch.testing.assert_close(have[:2], first[[3, 1]], **within)
    assert not have[2:].any()
    within = {"rtol": 0, "atol": ERROR[name] * float(second.abs().max())}
    torch.testing.assert_close(sizes[:2], second[[3, 1]], **within)
    torch.testing.assert_close(sizes[2:], second[[3, 1]].mean(0).expand(2, -1), **within)
    assert sizes[2:].median() > 0.5 * second[[3, 1]].mean(0).median()
    only_axis(layer).close([0], [optimizer])
    assert state["step"] == 3
    train(layer, optimizer)
    assert layer.A.isfinite().all()


@pytest.mark.parametrize("name", FORMS)
def test_a_size_that_does_not_fit_the_blocks_is_kept_in_plain_numbers(name, eager):
    layer = lora(rank=6, n=1024)
    layer.A.data = layer.A.data.bfloat16()
    layer.A.grad = torch.randn_like(layer.A)
    optimizer = FORMS[name]()([layer.A], lr=1e-2)
    optimizer.step()
    before = dequantized(optimizer.state[layer.A]["exp_avg"])
    only_axis(layer).resize([5, 0, 2], 0, None, [optimizer])
    value = optimizer.state[layer.A]["exp_avg"]
    assert type(value) is Tensor
    assert value.dtype == torch.bfloat16
    torch.testing.assert_close(value, before[[5, 0, 2]].bfloat16())
    only_axis(layer).resize([], 0, None, [optimizer])
    only_axis(layer).resize(None, 5, generator(0, "a", 1), [optimizer])
    layer.A.grad = torch.randn_like(layer.A)
    optimizer.step()
    assert optimizer.state[layer.A]["exp_avg"].shape == (5, 1024)


def test_closed_units_have_no_quantized_momentum():
    layer = lora(m=2048, n=16)
    optimizer = CodedAdam([layer.A, layer.B])
    train(layer, optimizer)
    only_axis(layer).close([2], [optimizer])
    momentum = optimizer.state[layer.B]["exp_avg"].dequantize()
    assert not momentum[:, 2].any()
    assert momentum[:, 1].any()


class Wide(lightning.LightningModule):
    """One layer whose factor A is large enough to be quantized."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Sequential(nn.Linear(1024, 16), nn.Tanh(), nn.Linear(16, 16))
        adapt(self.map, "all-linear", partial(LoRA, rank=5))
        self.make = make

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(100), batch_size=1)

    def training_step(self, batch, index):
        x = torch.randn(8, 1024, generator=torch.Generator().manual_seed(index))
        return (self.map(x) - 1).square().mean()

    def configure_optimizers(self):
        return self.make([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def everything(model, trainer):
    """All parameters, and all numbers of the optimizer's state."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for parameter, state in trainer.optimizers[0].state.items():
        for key, value in state.items():
            where, value = f"{names[parameter]} {key}", torch.as_tensor(value)
            parts = value.__tensor_flatten__()[0] if is_quantized_tensor(value) else []
            tensors |= {f"{where} {part}": getattr(value, part) for part in parts}
            if not parts:
                tensors[where] = value
    return tensors


@pytest.mark.parametrize("name", ["stand-in", "AdamW4bit", "bitsandbytes"])
def test_a_run_with_quantized_state_resumes_to_the_bit(name, eager, tmp_path):
    make = FORMS[name]() if name in FORMS else bitsandbytes("AdamW8bit")

    def run(*callbacks, **arguments):
        model = Wide(make)
        allocator = ElaLoRA(swaps=1, every=1, warmup=1, final=1)
        trainer = fit(model, FiniteWeights(), allocator, *callbacks, steps=6, **arguments)
        return everything(model, trainer), allocator.events

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    want, events = run(saving)
    assert any("codes" in key or "absmax" in key for key in want)
    have, again = run(ckpt_path=tmp_path / "step=3.ckpt")
    assert again == events
    assert have.keys() == want.keys()
    assert not [key for key in want if not torch.equal(have[key], want[key])]


# ---- bitsandbytes


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(
    ("n", "keep", "grow"),
    [(2048, [2, 0], 3), (1500, [1], 1), (1000, [0, 1, 2, 3], 3)],
    ids=["large", "below 4096", "above 4096"],
)
def test_a_fresh_unit_of_bitsandbytes_has_the_mean_second_moment(bits, n, keep, grow):
    """A state of 8 bits stays one below 4096 elements, and one of 32 bits above."""
    layer = lora(n=n)
    optimizer = bitsandbytes("PagedAdamW" if bits == 32 else "PagedAdamW8bit")([layer.A, layer.B])
    train(layer, optimizer)
    check_optimizer(optimizer)
    state = optimizer.state[layer.A]
    dtype = state["state2"].dtype
    assert dtype == (torch.uint8 if bits == 8 and n > 1024 else torch.float32)
    before = {key: values_of(state, key) for key in ("state1", "state2")}
    only_axis(layer).resize(keep, grow, generator(0, "a", 1), [optimizer])
    assert state["state2"].dtype == dtype
    sizes = values_of(state, "state2")
    kept = len(keep)
    within = {"rtol": 0, "atol": 0.02 * float(before["state2"].max()) if bits == 8 else 1e-12}
    torch.testing.assert_close(sizes[:kept], before["state2"][keep], **within)
    mean = before["state2"][keep].mean(0).expand(grow, -1)
    torch.testing.assert_close(sizes[kept:], mean, **within)
    assert not values_of(state, "state1")[kept:].any()
    train(layer, optimizer)
    assert layer.A.isfinite().all()


def values_of(state, key):
    number = number_of(state, key)
    return state[key].clone() if number is None else decode(state, number)


# ---- other forms, and refusals


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_state_of_another_dtype_follows(dtype):
    layer = lora(n=16)
    optimizer = torch.optim.SGD([layer.A, layer.B], lr=0.1)
    values = {"exp_avg": torch.randn(4, 16), "exp_avg_sq": torch.rand(4, 16) + 0.5}
    optimizer.state[layer.A] = {key: value.to(dtype) for key, value in values.items()}
    check_optimizer(optimizer)
    only_axis(layer).resize([2, 0], 1, generator(0, "a", 1), [optimizer])
    state = optimizer.state[layer.A]
    first, second = (values[key].to(dtype).float()[[2, 0]] for key in state)
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype
    assert torch.equal(state["exp_avg"].float()[:2], first)
    assert not state["exp_avg"].float()[2].any()
    assert torch.equal(state["exp_avg_sq"][2].float(), second.mean(0).to(dtype).float())
    only_axis(layer).close([0], [optimizer])


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"amsgrad": True}])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_fused_and_foreach_forms_follow(name, options):
    if name == "SGD":
        options = {"momentum": 0.9, **{k: v for k, v in options.items() if k != "amsgrad"}}
    layer = lora(n=16)
    optimizer = getattr(torch.optim, name)([layer.A, layer.B], lr=1e-2, **options)
    train(layer, optimizer)
    check_optimizer(optimizer)
    only_axis(layer).resize([3], 2, generator(0, "a", 1), [optimizer])
    train(layer, optimizer)
    states = optimizer.state[layer.A].values()
    assert {value.shape for value in states if value.dim()} == {layer.A.shape}


class Opaque(Tensor):
    """A tensor of another library."""


def paged(value):
    value.is_paged = True
    return value


@pytest.mark.parametrize(
    ("make", "clause"),
    [
        (lambda p: p.detach().as_subclass(Opaque), r"its 'exp_avg' is a Opaque, no plain tensor"),
        (lambda p: paged(torch.zeros_like(p)), r"its 'exp_avg' is in paged memory"),
        (
            lambda p: torch.zeros(p.shape, dtype=torch.int8),
            r"its 'exp_avg' holds int8 codes of unknown form",
        ),
    ],
)
def test_a_state_whose_elements_cannot_be_moved_is_refused(make, clause):
    layer = lora(n=16)
    optimizer = torch.optim.SGD([layer.A, layer.B], lr=0.1)
    optimizer.state[layer.A] = {"exp_avg": make(layer.A)}
    with pytest.raises(TypeError, match=rf"^SGD keeps state .* \({clause}\); use Adam"):
        check_optimizer(optimizer)
    check_optimizer(optimizer, [layer.B])


def test_an_optimizer_that_trains_copies_elsewhere_is_refused():
    """torchao's CPU offload has no state of its own."""

    class Offload(torch.optim.Optimizer):
        def __init__(self, params):
            self.param_groups = [{"params": list(params)}]

    with pytest.raises(TypeError, match=r"^Offload keeps state that cannot follow a rank; use"):
        check_optimizer(Offload([lora(n=16).A]))


def test_a_sharded_parameter_is_refused_before_the_first_step():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = nn.Parameter(distribute_tensor(torch.randn(4, 8), mesh, [Shard(0)]))
        optimizer = torch.optim.AdamW([sharded])
        with pytest.raises(TypeError, match=r"\(its parameters are sharded over processes, and an"):
            check_optimizer(optimizer)
    finally:
        dist.destroy_process_group()
