"""LoRAPrune: groups of the base, masked while it trains and cut out of what is loaded."""

import lightning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_allocators import fit
from transformers import LlamaConfig, LlamaForCausalLM

from adaptrank.allocation import AdaLoRA, LoRAPrune
from adaptrank.allocation.methods.loraprune import mask_within_layers, masked_groups
from adaptrank.allocation.plans import ranked
from adaptrank.artifacts import load_adapter, save_adapter
from adaptrank.axes import PRUNED, compact, find_groups
from adaptrank.injection import adapt
from adaptrank.parameterizations import SVD, DoRA, HyperAdapt, LoRA, PiCa
from adaptrank.testing import perturb

PHASES = {"every": 2, "warmup": 2, "final": 2}  # of 10 steps: events at 4, 6, 8


def llama(layers=4, bias=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=3,
        use_cache=False,
        attention_bias=bias,
        mlp_bias=bias,
    )
    return LlamaForCausalLM(config).double()


class Model(lightning.LightningModule):
    def __init__(self, method=LoRA, targets="all-linear", **arguments):
        super().__init__()
        self.backbone = adapt(llama(**arguments), targets, method)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(1000), batch_size=1)

    def training_step(self, batch, batch_idx):
        ids = torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(batch_idx))
        return self.backbone(input_ids=ids, labels=ids).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def logits(model, batch=99):
    ids = torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_groups_that_were_closed_in_an_evaluation_train_afterwards():
    model = Model().backbone
    groups = find_groups(model)["model.layers.0.mlp:channels"]
    with torch.inference_mode():
        groups.close([0, 3])
    x = torch.ones(1, 20, requires_grad=True)
    (masked,) = groups.mask(groups.reader, (x,))
    masked.square().sum().backward()
    assert (x.grad == 0).nonzero()[:, 1].tolist() == [0, 3]


def test_the_groups_of_a_llama():
    found = find_groups(Model().backbone)
    heads, channels = found["model.layers.2.self_attn:heads"], found["model.layers.2.mlp:channels"]
    assert (len(heads), len(channels)) == (
        3,
        20,
    )  # two query heads go with their key and value head
    assert [(p.name, p.dim, p.width) for p in heads.parts] == [
        ("q_proj", 0, 8),
        ("k_proj", 0, 4),
        ("v_proj", 0, 4),
        ("o_proj", 1, 8),
    ]
    assert [(p.name, p.dim, p.width) for p in channels.parts] == [
        ("gate_proj", 0, 1),
        ("up_proj", 0, 1),
        ("down_proj", 1, 1),
    ]
    assert not find_groups(llama())
    only = find_groups(Model(targets=["up_proj"]).backbone)
    assert [key.rpartition(":")[2] for key in only] == ["channels"] * 4


def test_the_importance_of_a_group_is_the_formula():
    model = Model()
    for layer in model.backbone.modules():
        if isinstance(layer, LoRA):
            perturb(layer)
    model.training_step(None, 0).backward()
    attention = model.backbone.model.layers[1].self_attn
    want = torch.zeros(3).double()
    for name, dim in (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1)):
        layer = getattr(attention, name)
        gA, gB = layer.A.grad, layer.B.grad
        estimate = gB @ layer.A + layer.B @ gA - gB @ gA
        blocks = (estimate * layer.weight).abs().sum(1 - dim).chunk(3)
        sums = torch.stack([block.sum() for block in blocks])
        want += sums / sums.norm()
    have = find_groups(model.backbone)["model.layers.1.self_attn:heads"].importance()
    torch.testing.assert_close(have.double(), want, rtol=1e-6, atol=0)


def test_picas_estimate_is_the_exact_gradient_on_the_span():
    torch.manual_seed(0)
    base = torch.nn.Linear(48, 24).double()
    for side in ("input", "output"):
        layer = PiCa(torch.nn.Linear(48, 24).double(), side=side, share=False)
        layer.innermost.load_state_dict(base.state_dict())
        layer.refresh()
        x = torch.randn(5, 48).double()
        layer(x).square().sum().backward()
        y = layer(x).detach()
        G = 2 * y.T @ x
        P = layer.P
        want = G @ P.T @ P if side == "input" else P @ P.T @ G
        torch.testing.assert_close(layer.weight_gradient(), want, rtol=1e-9, atol=1e-9)


@given(st.integers(1, 40), st.floats(0.01, 0.99), st.floats(0, 1))
def test_how_many_go(size, sparsity, progress):
    lost = masked_groups(size, sparsity, progress)
    assert 0 <= lost < size
    assert lost <= size * sparsity + 1e-9
    scores = torch.rand(size).round(decimals=1)
    plan = mask_within_layers({"a": scores}, sparsity, progress, {})
    assert set(plan["a"].units if plan else ()) == set(ranked(scores)[size - lost :])


def test_excluded_layers_are_whole_and_the_schedule_is_cubic():
    model, allocator = Model(), LoRAPrune(0.5, whole=0.25, **PHASES)
    fit(model, allocator, steps=10)
    assert [event["step"] for event in allocator.events] == [4, 6, 8]
    for event in allocator.events:
        progress = (event["step"] - 2) / 6
        rho = 0.5 * (1 - (1 - progress) ** 3)
        for key, closed in event["closed"].items():
            assert len(closed) == int(rho * (3 if key.endswith("heads") else 20) + 1e-9)
        assert event["total"] == event["budget"]
    layers = {key.split(".")[2] for key in allocator.events[-1]["closed"]}
    assert layers == {"1", "2"}, "the first quarter of the layers and the last one lose nothing"


@pytest.mark.parametrize(
    "method",
    [LoRA, lambda base: PiCa(base, rank=4), lambda base: PiCa(base, rank=4, side="output")],
)
@pytest.mark.parametrize("bias", [False, True])
def test_masked_and_cut_models_compute_the_same(method, bias, tmp_path):
    model = Model(method, bias=bias)
    fit(model, LoRAPrune(0.6, whole=0.25, **PHASES), steps=10)
    want = logits(model.backbone)
    save_adapter(model.backbone, tmp_path / "a")
    loaded = load_adapter(llama(bias=bias), tmp_path / "a")
    torch.testing.assert_close(logits(loaded), want, rtol=1e-9, atol=1e-10)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model.backbone, loaded))
    assert after < before
    assert loaded.model.layers[1].mlp.up_proj.innermost.weight.shape == (8, 24)
    assert loaded.model.layers[0].mlp.up_proj.innermost.weight.shape == (20, 24)
    compact(model.backbone, model.backbone.__dict__[PRUNED])
    torch.testing.assert_close(logits(model.backbone), logits(loaded), rtol=1e-9, atol=1e-10)


def test_a_fresh_adapter_scores_with_finite_numbers():
    """B = 0 at the first step."""
    model = Model()
    model.training_step(None, 0).backward()
    for groups in find_groups(model.backbone).values():
        assert groups.importance().isfinite().all()


def test_a_score_that_is_no_number_leaves_the_average(monkeypatch):
    model, allocator = Model(), LoRAPrune(0.5, **PHASES)
    from adaptrank.axes import groups as groups

    plain, calls = groups.Groups.importance, []

    def importance(self):
        calls.append(self.key)
        return plain(self) * (float("nan") if len(calls) % 3 == 0 else 1)

    monkeypatch.setattr(groups.Groups, "importance", importance)
    fit(model, allocator, steps=10)
    assert all("skipped" not in event for event in allocator.events)


def test_resume_is_exact(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, allocator = Model(), LoRAPrune(0.5, **PHASES)
    fit(whole, allocator, checkpoint, steps=10)
    for step in (1, 4, 5, 8, 9):
        model, resumed = Model(), LoRAPrune(0.5, **PHASES)
        fit(model, resumed, steps=10, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.events == allocator.events
        assert torch.equal(logits(model.backbone), logits(whole.backbone)), step


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (
            DoRA,
            "LoRAPrune needs axes that can weight_gradient, and DoRA at .* cannot; "
            "use one of .*LoRA.*PiCa",
        ),
        (SVD, "SVD at .* cannot"),
        (
            [HyperAdapt, LoRA],
            "LoRAPrune needs axes that can weight_gradient, and (LoRA|HyperAdapt) at",
        ),
    ],
)
def test_methods_without_an_estimate_are_refused(method, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit(Model(method), LoRAPrune(**PHASES), steps=10)


def test_it_stands_alone():
    with pytest.raises(ValueError, match="LoRAPrune tolerates no other; keep one"):
        fit(Model(), LoRAPrune(**PHASES), AdaLoRA(), steps=10)


@pytest.mark.parametrize("arguments", [{"sparsity": 0.0}, {"sparsity": 1.0}, {"whole": 1.0}])
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match="give shares"):
        LoRAPrune(**arguments)


def test_a_model_that_is_no_match_is_left_alone():
    model = llama()
    before = [p.shape for p in model.parameters()]
    with pytest.raises(
        ValueError,
        match=r"layers\.9\.mlp:channels cannot be cut to 2 channels: this model has none there",
    ):
        compact(
            model, {"model.layers.1.mlp:channels": [0, 1], "model.layers.9.mlp:channels": [0, 1]}
        )
    assert [p.shape for p in model.parameters()] == before
