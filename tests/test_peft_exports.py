"""Every export is loaded by PEFT, and computes there what it computes here."""

import json
import warnings
from functools import partial

import pytest
import torch
import transformers
from conftest import METHODS
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adaptrank import adapt
from adaptrank._errors import UserError
from adaptrank.axes import rank_axes
from adaptrank.interop.peft import export_peft, import_peft
from adaptrank.parameterizations import HyperAdapt, LoRA, ResidualOffset
from adaptrank.testing import perturb

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", minversion="0.21")

IDS = torch.arange(3, 20)[None]
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
ids = torch.arange(5, 17)[None]
SEQ_CLS = {"name": "tiny", "auto_class": "AutoModelForSequenceClassification"}

CLASSIFIERS = {
    "Bert": ["query"],
    "Roberta": ["query"],
    "DistilBert": ["q_lin"],
    "DebertaV2": ["query_proj"],
    "GPT2": ["c_attn"],
    "Llama": ["q_proj"],
    "Electra": ["query"],
}
"""Model -> a target of its own."""


def classifier(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=60,
        hidden_size=32,
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=3,
        pad_token_id=1,
        embedding_size=32,
        num_key_value_heads=4,
        pooler_hidden_size=32,
    )
    return getattr(transformers, f"{name}ForSequenceClassification")(config).double().eval()


def llama(tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).double().eval()


@torch.no_grad()
def output(model, x=ids):
    y = model(x)
    return getattr(y, "logits", y)


def loaded_by_peft(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, folder).double().eval()


def check(model, make, folder, base=None, x=ids, **how):
    """Export a model, and load the result in PEFT and here."""
    want = output(model, x)
    export_peft(model, folder, base, **how)
    torch.testing.assert_close(output(loaded_by_peft(make(), folder), x), want, **CLOSE)
    torch.testing.assert_close(output(import_peft(make(), folder), x), want, **CLOSE)
    return json.loads((folder / "adapter_config.json").read_text())


# ---- heads


@pytest.mark.parametrize("targets", ["own", "all-linear"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_with_its_whole_head(tmp_path, name, targets):
    model = classifier(name)
    heads = [n for n, _ in model.named_children() if n != model.base_model_prefix]
    heads = [n for n in heads if list(model.get_submodule(n).parameters())]
    named = CLASSIFIERS[name] if targets == "own" else targets
    adapt(model, named, partial(LoRA, rank=2), train_modules=heads)
    perturb(model, 0.2)
    config = check(model, partial(classifier, name), tmp_path, SEQ_CLS)
    assert config["task_type"] == "SEQ_CLS"
    assert set(config["modules_to_save"]) == set(heads)


def test_a_part_of_a_head(tmp_path):
    """PEFT saves the whole classifier for this task."""
    model = adapt(classifier("Roberta"), ["query"], LoRA, train_modules=["classifier.out_proj"])
    perturb(model, 0.2)
    config = check(model, partial(classifier, "Roberta"), tmp_path, SEQ_CLS)
    assert config["modules_to_save"] == ["classifier"]


def test_a_head_that_was_not_trained(tmp_path):
    model = adapt(classifier("Bert"), ["query"], LoRA)
    perturb(model, 0.2)
    config = check(model, partial(classifier, "Bert"), tmp_path, SEQ_CLS)
    assert config["modules_to_save"] == ["classifier"]


def test_an_adapter_on_a_head(tmp_path):
    """PEFT would replace the head by a copy, if it were told the task."""
    model = adapt(classifier("Roberta"), "all-linear", LoRA)
    perturb(model, 0.2)
    config = check(model, partial(classifier, "Roberta"), tmp_path, SEQ_CLS)
    assert config["task_type"] is None
    assert "modules_to_save" not in config


# ---- other modules that were trained whole


@pytest.mark.parametrize(
    ("trained", "names"),
    [
        (["model.norm"], ["model.norm"]),
        (["input_layernorm"], ["input_layernorm"]),
        (["0.input_layernorm"], ["0.input_layernorm"]),
        (["layers.1.mlp"], ["1.mlp"]),
        (["lm_head", "embed_tokens"], ["embed_tokens", "lm_head"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_modules_are_named_as_peft_finds_them(tmp_path, trained, names):
    model = adapt(llama(), ["q_proj", "o_proj"], partial(LoRA, rank=2), train_modules=trained)
    perturb(model, 0.2)
    assert check(model, llama, tmp_path)["modules_to_save"] == names


def test_tied_embeddings(tmp_path):
    make = partial(llama, tied=True)
    model = adapt(make(), ["q_proj"], partial(LoRA, rank=2), train_modules=["embed_tokens"])
    perturb(model, 0.2)
    config = check(model, make, tmp_path / "whole")
    assert config["modules_to_save"] == ["embed_tokens", "lm_head"]
    model = adapt(make(), ["q_proj", "embed_tokens"], partial(LoRA, rank=2))
    perturb(model, 0.2)
    check(model, make, tmp_path / "adapted")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.see = nn.Conv2d(3, 8, (3, 2), padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.outer_norm = nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = self.outer_norm(self.norm(self.see(x)).relu()).mean((-2, -1))
        return self.head(y * self.scale)


def net():
    return Net().double().eval()


IMAGES = torch.randn(2, 3, 6, 6, dtype=torch.float64)


def test_a_module_with_statistics_and_a_name_that_others_end_in(tmp_path):
    model = adapt(net(), ["see", "head"], partial(LoRA, rank=2), train_modules=["norm"])
    perturb(model, 0.2)
    model.norm.running_mean += 0.3
    config = check(model, net, tmp_path, x=IMAGES)
    assert config["modules_to_save"] == ["norm"]


def test_a_parameter_of_the_model_itself_is_refused(tmp_path):
    model = adapt(net(), ["head"], partial(LoRA, rank=2))
    model.scale.requires_grad_(True)
    with pytest.raises(UserError, match="scale was trained, and PEFT saves no part"):
        export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Twice(nn.Module):
    """A path that another path ends in."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.ModuleDict({"layer": nn.Linear(6, 6)})
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(self.inner["layer"](x).relu())


def test_a_path_that_another_one_ends_in(tmp_path):
    make = lambda: Twice().double().eval()  # noqa: E731
    model = adapt(make(), "layer", partial(LoRA, rank=2))
    perturb(model, 0.5)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert check(model, make, tmp_path, x=x)["target_modules"] == "layer"


# ---- methods and layers


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(64, 16)
        self.see = nn.Conv2d(16, 16, (1, 2))
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)

    def forward(self, x):
        tokens = self.tokens(x).movedim(-1, 1)[:, :, None]  # (batch, 16, 1, length)
        return self.last(self.first(self.see(tokens)[:, :, 0].movedim(1, -1)).relu())


def nets_of_layers():
    return Layers().double().eval()


NESTS = {cls.__name__: cls for cls in METHODS if cls.__module__.startswith("adaptrank.")}
NESTS |= {
    "LoRA on LoRA": [partial(LoRA, rank=2), partial(LoRA, rank=3)],
    "LoRA on HyperAdapt": [HyperAdapt, partial(LoRA, rank=2)],
}
TARGETS = {"linear": ["first", "last"], "embedding": ["tokens"], "convolution": ["see"]}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", NESTS)
def test_every_method_that_leaves_at_all_computes_the_same_in_peft(tmp_path, name, kind):
    nest = NESTS[name]
    model = nets_of_layers()
    classes = [
        m if isinstance(m, type) else m.func for m in (nest if type(nest) is list else [nest])
    ]
    if not all(cls.wraps(model.get_submodule(t)) for cls in classes for t in TARGETS[kind]):
        pytest.skip("not a layer of this method")
    adapt(model, TARGETS[kind], nest)
    perturb(model, 0.2)
    want = output(model)
    try:
        # A rank that represents any change of these layers.
        export_peft(model, tmp_path, rank=60)
    except UserError as error:
        assert "PEFT's LoRA has no place for it" in str(error)  # noqa: PT017
        assert name in ("ResidualOffset", "TensorTrainAdapter")
        return
    torch.testing.assert_close(output(loaded_by_peft(nets_of_layers(), tmp_path)), want, **CLOSE)
    torch.testing.assert_close(output(import_peft(nets_of_layers(), tmp_path)), want, **CLOSE)


# ---- layers without units


@pytest.mark.parametrize("emptied", [["first"], ["first", "last"]], ids=["one layer", "all layers"])
@pytest.mark.parametrize(
    "cls",
    [cls for cls in METHODS if cls.wraps(nn.Linear(6, 4)) and rank_axes(cls(nn.Linear(48, 24)))],
    ids=lambda cls: cls.__name__,
)
def test_layers_without_units_compute_the_same_in_peft(tmp_path, cls, emptied):
    """PEFT's LoRA refuses a rank of 0, so that such a layer is left out, or has a zero unit."""
    model = adapt(nets_of_layers(), ["first", "last"], cls)
    perturb(model, 0.2)
    layers = [model.get_submodule(path) for path in emptied]
    for layer in layers:
        for axis in rank_axes(layer).values():
            axis.resize([])
    want = output(model)
    if not all(wrapper.mergeable for wrapper in layers):
        with pytest.raises(UserError, match="PEFT's LoRA has no place for it"):
            export_peft(model, tmp_path, rank=60)
        return
    report = export_peft(model, tmp_path, rank=60)
    assert {report["layers"][path]["rank"] for path in emptied} == {0}
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    left_out = len(emptied) == 1 and layers[0].idle
    assert targets == (["last"] if left_out else ["first", "last"])
    torch.testing.assert_close(output(loaded_by_peft(nets_of_layers(), tmp_path)), want, **CLOSE)
    torch.testing.assert_close(output(import_peft(nets_of_layers(), tmp_path)), want, **CLOSE)


def test_adalora_of_peft_after_its_allocation(tmp_path):
    """PEFT stores layers whose units are all masked with tensors of size zero."""
    config = peft.AdaLoraConfig(
        init_r=2,
        target_r=1,
        tinit=1,
        tfinal=2,
        deltaT=1,
        total_step=8,
        lora_alpha=6,
        target_modules=["first", "last"],
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(nets_of_layers(), config).double()
    # In float64 PEFT takes its count of units for a parameter.
    trained = [parameter for name, parameter in theirs.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    last = theirs.base_model.model.last
    for step in range(8):
        # Only the last layer has an effect, so that it gets all of the budget.
        (last(torch.ones(3, last.in_features, dtype=torch.float64)) - 1).square().sum().backward()
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.eval().save_pretrained(tmp_path / "theirs")
    kept = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["rank_pattern"]
    assert sorted(sum(units) for units in kept.values()) == [0, 2]
    want = output(theirs)
    ours = import_peft(nets_of_layers(), tmp_path / "theirs")
    assert ours.first.idle
    assert {key: len(axis) for key, axis in rank_axes(ours).items()} == {
        "first:rank": 0,
        "last:rank": 2,
    }
    torch.testing.assert_close(output(ours), want, **CLOSE)
    # A unit that grows there has the scale of one unit in PEFT, alpha / (1 + 1e-5).
    assert ours.first.scale == pytest.approx(6, rel=1e-4)
    export_peft(ours, tmp_path / "back")
    again = loaded_by_peft(nets_of_layers(), tmp_path / "back")
    torch.testing.assert_close(output(again), want, **CLOSE)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dilation": 2}, r"a convolution with dilation \(2, 2\)"),
        ({"padding": 1, "padding_mode": "reflect"}, "padding mode 'reflect'"),
    ],
    ids=["dilated", "reflecting"],
)
def test_a_convolution_that_peft_does_not_follow_is_refused(tmp_path, change, sentence):
    model = nn.Sequential(nn.Conv2d(3, 4, 2, **change))
    with pytest.raises(UserError, match=sentence):
        export_peft(adapt(model, ["0"], LoRA), tmp_path)


def test_what_peft_would_ignore_is_refused(tmp_path):
    with pytest.raises(UserError, match="trains a bias, and PEFT's LoRA has no place for it"):
        export_peft(adapt(llama(), ["q_proj"], ResidualOffset), tmp_path, rank=4)
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(UserError, match=r"out_proj: nn.MultiheadAttention reads this weight"):
        export_peft(adapt(encoder, ["out_proj"], LoRA), tmp_path)
    assert not list(tmp_path.iterdir())


def test_export_and_import_see_through_modules_around_a_model(tmp_path):
    model = adapt_and_perturb(llama())
    want = model(IDS).logits
    export_peft(torch.compile(model, backend="eager"), tmp_path)
    around = nn.DataParallel(llama())
    assert import_peft(around, tmp_path) is around
    torch.testing.assert_close(around.module(IDS).logits, want, **CLOSE)


def adapt_and_perturb(model):
    adapt(model, ["q_proj"], partial(LoRA, rank=2), train_modules=["lm_head"])
    perturb(model, 0.2)
    return model
