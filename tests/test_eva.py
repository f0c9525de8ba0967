"""EVA: directions of the inputs, ranks by what they explain, and a start that changes nothing."""

from functools import partial

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_allocators import everything, fit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adaptrank.allocation import EVA, AdaLoRA, ElaLoRA, GeLoRA
from adaptrank.allocation.initial.layer_inputs import watch
from adaptrank.axes import rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import NOLA, SVD, DoRA, HyperAdapt, LoRA, MELoRA, PiCa, SBoRA

LORA4 = partial(LoRA, rank=4)


class Low(lightning.LightningModule):
    """Two layers that read inputs of rank 2, and two that read full ones."""

    def __init__(self, method=LORA4):
        super().__init__()
        torch.manual_seed(0)
        self.low = nn.ModuleList(nn.Linear(16, 12) for _ in range(2))
        self.full = nn.ModuleList(nn.Linear(16, 12) for _ in range(2))
        self.plane = torch.randn(2, 16)
        adapt(self, "all-linear", method)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(1000), batch_size=1)

    def inputs(self, index):
        random = torch.Generator().manual_seed(int(index))
        return torch.randn(40, 2, generator=random) @ self.plane, torch.randn(
            40, 16, generator=random
        )

    def forward(self, index):
        low, full = self.inputs(index)
        return [*(layer(low) for layer in self.low), *(layer(full) for layer in self.full)]

    def training_step(self, batch, batch_idx):
        return sum((y - 1).square().mean() for y in self(batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def sizes(model):
    return {key: len(axis) for key, axis in rank_axes(model).items()}


def test_inputs_of_rank_two_get_at_most_two_ranks_and_the_total_is_exact():
    model = Low()
    allocator = EVA()
    fit(model, allocator, steps=2)
    found = sizes(model)
    assert sum(found.values()) == 16
    assert max(found["low.0:rank"], found["low.1:rank"]) <= 2
    assert allocator.events[0]["step"] == 0
    assert allocator.events[0]["total"] == 16


@pytest.mark.parametrize(("floor", "left"), [(0, 0), (1, 1)])
def test_a_layer_whose_inputs_do_not_vary_loses_its_units(floor, left):
    class Still(Low):
        def __init__(self):
            super().__init__()
            self.still = adapt(nn.Sequential(nn.Linear(16, 12)), "all-linear", LORA4)

        def forward(self, index):
            return [*super().forward(index), self.still(torch.full((40, 16), 0.3))]

    model, allocator = Still(), EVA(floor=floor)
    fit(model, allocator, steps=2)
    found = sizes(model)
    assert found["still.0:rank"] == left
    assert sum(found.values()) == allocator.events[0]["total"] == 20


@pytest.mark.parametrize(
    "method", [LORA4, partial(DoRA, rank=4), partial(SVD, rank=4), [HyperAdapt, LORA4]]
)
def test_the_start_is_the_base_and_A_holds_the_directions(method):
    model = Low(method)
    x = model.inputs(0)
    before = [y.detach().clone() for y in model(0)]

    class Look(EVA):
        def initialize(self, axes, evidence):
            super().initialize(axes, evidence)
            for y, want in zip(model(0), before, strict=True):
                torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
            for layer in model.low:
                name = layer.input_factor["rank"]
                rows = getattr(layer, name)
                real = torch.linalg.matrix_rank(torch.cat([rows[:2], model.plane]), rtol=1e-4)
                assert real == 2, "the leading directions span the plane of the inputs"
                torch.testing.assert_close(rows[:2].norm(dim=1), torch.ones(len(rows[:2])))

    fit(model, Look(), steps=2)
    assert len(x) == 2


def test_layers_that_read_one_tensor_share_a_sketch():
    model = Low()

    class Look(EVA):
        def initialize(self, axes, evidence):
            assert evidence["low.0:rank"] is evidence["low.1:rank"]
            assert evidence["low.0:rank"] is not evidence["full.0:rank"]
            super().initialize(axes, evidence)

    fit(model, Look(), steps=2)
    torch.testing.assert_close(*(layer.A[:1].abs().sum() for layer in model.low), rtol=0.5, atol=1)


def test_units_that_read_parts_of_the_input_have_directions_of_their_part():
    model = Low(partial(MELoRA, minis=4, rank=2))

    class Look(EVA):
        def initialize(self, axes, evidence):
            super().initialize(axes, evidence)
            self.checked = 0
            for key, axis in axes.items():
                layer = axis.members[0][0]
                rows = torch.cat([model.inputs(i)[key.startswith("full")] for i in range(1)])
                for unit in range(min(4, len(axis))):
                    mini = int(layer.block[unit])
                    part = rows[:, 4 * mini : 4 * mini + 4]
                    lead = torch.linalg.svd(part - part.mean(0)).Vh[0]
                    cosine = float((lead @ layer.A[unit]).abs())
                    self.checked += cosine > 0.999 or len(axis) < 4

    allocator = Look(max_batches=1)
    fit(model, allocator, steps=2)
    assert allocator.checked >= 12
    assert sum(sizes(model).values()) == 4 * 8


@pytest.mark.parametrize("method", [partial(PiCa, rank=4), partial(SBoRA, rank=4)])
def test_where_no_factor_can_be_set_only_the_ranks_are_chosen(method):
    with pytest.raises(
        ValueError,
        match=r"EVA with init=True needs axes that can input_init \(with init=False it does not\)",
    ):
        fit(Low(method), EVA(), steps=2)
    model = Low(method)
    total = sum(sizes(model).values())
    fit(model, EVA(init=False), steps=2)
    assert sum(sizes(model).values()) == total


def test_it_composes_with_one_that_moves_in_any_order():
    for order in (0, 1):
        model, eva, ada = Low(), EVA(), AdaLoRA(8, every=2, warmup=2, final=2)
        fit(model, *((eva, ada) if order else (ada, eva)), steps=10)
        assert ada.run.start_total == 16
        assert ada.run.start_sizes == eva.events[0]["sizes"]
        assert sum(sizes(model).values()) == 8
    with pytest.raises(
        ValueError,
        match=r"EVA and GeLoRA would both choose the ranks|GeLoRA and EVA would both choose",
    ):
        fit(Low(), EVA(), GeLoRA(), steps=2)


def test_refusals():
    with pytest.raises(ValueError, match="EVA needs axes that can input_directions, and NOLA"):
        fit(Low(NOLA), EVA(), steps=2)
    for arguments in ({"rho": 0.5}, {"tau": 0.0}, {"max_batches": 0}):
        with pytest.raises(ValueError, match="rho and batches are at least 1"):
            EVA(**arguments)
    model = Low()
    with pytest.raises(ValueError, match="EVA looks at training batches, and got none"):
        EVA().start(model, torch.optim.Adam(model.parameters()), 10)


def test_a_layer_that_takes_no_part_keeps_its_rank():
    model = Low()
    model.unused = adapt(nn.Sequential(nn.Linear(16, 12)), "all-linear", partial(LoRA, rank=3))
    allocator = EVA()
    fit(model, allocator, steps=2)
    found = sizes(model)
    assert found["unused.0:rank"] == 3
    assert sum(found.values()) == 16 + 3
    assert allocator.events[0]["total"] == 19


def test_resume_does_not_look_again(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = Low()
    pair = lambda: (EVA(), ElaLoRA(every=2, warmup=2, final=2, pool=1))  # noqa: E731
    want = everything(whole, fit(whole, *pair(), checkpoint, steps=10))
    for step in (1, 5, 9):
        model, (eva, ela) = Low(), pair()
        eva.choose = None  # must not be called
        have = everything(
            model, fit(model, eva, ela, ckpt_path=tmp_path / f"step={step}.ckpt", steps=10)
        )
        assert not [key for key in want if not torch.equal(have[key], want[key])], step


def test_padding_and_what_is_not_predicted_are_left_out():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = adapt(LlamaForCausalLM(config), "all-linear", LORA4)
    ids = torch.randint(32, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 0] = -100
    for labelled, rows in ((True, 7), (False, 8)):
        seen = {}
        handles = watch(
            model,
            rank_axes(model),
            lambda key, x, of, seen=seen: seen.update({key: (len(x), of)}),
            labelled,
        )
        model(input_ids=ids, attention_mask=mask, labels=labels)
        for handle in handles:
            handle.remove()
        assert {n for n, _ in seen.values()} == {rows}
        of = {key.split(".")[-1].split(":")[0]: which for key, (_, which) in seen.items()}
        assert of["q_proj"] == of["k_proj"] == of["v_proj"] != of["o_proj"]
        assert of["gate_proj"] == of["up_proj"] != of["down_proj"]


def test_a_mask_lasts_for_its_pass_whichever_part_is_called():
    model = nn.Module()
    model.part = nn.Sequential(nn.Linear(4, 4))
    adapt(model, "all-linear", LORA4)

    class Takes(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part = part

        def forward(self, x, attention_mask=None):
            if x is None:
                raise KeyError
            return self.part(x)

    outer = nn.ModuleDict({"inner": Takes(model.part)})
    seen = []
    handles = watch(outer, rank_axes(outer), lambda key, rows, of: seen.append(len(rows)))
    x = torch.ones(1, 5, 4)
    outer["inner"](x, attention_mask=torch.tensor([[1, 1, 0, 0, 0]]))
    with pytest.raises(KeyError):
        outer["inner"](None, attention_mask=torch.tensor([[1, 1, 0, 0, 0]]))
    outer["inner"](x)
    for handle in handles:
        handle.remove()
    assert seen == [2, 5]
