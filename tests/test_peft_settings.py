"""Settings of a PEFT adapter: each is read, or is refused by name."""

import copy
import dataclasses
import json
import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adaptrank import delete_adapter, load_adapter, save_adapter, set_enabled
from adaptrank._errors import UserError
from adaptrank.interop.peft import import_peft
from adaptrank.interop.peft.allow_list import OFF, UNDERSTOOD
from adaptrank.parameterizations import DoRA, LoRA, wrapped_layers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", minversion="0.21")

ids = torch.arange(3, 15)[None]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def llama(tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids).logits


def trained(config, folder, base=None, first=None):
    """Save an adapter of PEFT after training, and before it in `first`; return its logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base or llama(), config).eval()
        if first is not None:
            model.save_pretrained(first)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
    return logits(model)


def change_config(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


# ---- the allow-list


@pytest.mark.parametrize("kind", ["LORA", "ADALORA", "LOKR"])
def test_every_setting_of_peft_is_in_the_table_with_its_default(kind):
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    for field in dataclasses.fields(config_class):
        assert field.name in UNDERSTOOD[kind] or field.name in OFF[kind], field.name
        if field.name in OFF[kind]:
            assert field.default == OFF[kind][field.name], field.name
    assert not UNDERSTOOD[kind] & OFF[kind].keys()


ON = {
    "alora_invocation_tokens": [5, 6],
    "arrow_config": {"top_k": 2},
    "bias": "lora_only",
    "kasa_config": {"beta": 0.1},
    "layer_replication": [[0, 2]],
    "lora_bias": True,
    "megatron_config": {"tensor_model_parallel_size": 2},
    "monteclora_config": {"num_samples": 2},
    "target_parameters": ["experts.down_proj"],
    "trainable_token_indices": [3],
    "use_bdlora": {"nblocks": 2},
    "use_dora": True,
    "use_qalora": True,
    "velora_config": {"scale": 2.0},
}
"""A value of each setting that none of our classes has."""


@pytest.fixture(scope="module")
def plain_adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    configs = {
        "LORA": peft.LoraConfig(r=2, target_modules=TARGETS),
        "ADALORA": peft.AdaLoraConfig(init_r=2, target_r=1, target_modules=TARGETS, total_step=9),
        "LOKR": peft.LoKrConfig(r=2, target_modules=TARGETS),
    }
    for kind, config in configs.items():
        trained(config, folder / kind)
    return folder


@pytest.mark.parametrize("kind", ["LORA", "ADALORA", "LOKR"])
def test_a_setting_that_is_on_and_not_understood_is_refused_by_name(plain_adapters, kind, tmp_path):
    import shutil

    folder = tmp_path / "adapter"
    shutil.copytree(plain_adapters / kind, folder)
    import_peft(llama(), folder)
    assert set(OFF[kind]) <= set(ON)
    model = llama()
    before = copy.deepcopy(model.state_dict())
    settings = json.loads((folder / "adapter_config.json").read_text())
    # A setting of a later version, at a value that may mean anything.
    values = {name: ON[name] for name in OFF[kind]} | {"use_sparks": True, "spark_size": 0}
    for name, value in values.items():
        change_config(folder, **{**dict.fromkeys(values), **settings, name: value})
        with pytest.raises(UserError, match=f"trained with {name}="):
            import_peft(model, folder)
    assert not wrapped_layers(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    change_config(folder, **{**settings, "use_sparks": False, "spark_size": None, "sparks": {}})
    import_peft(model, folder)


def test_the_default_of_an_installed_peft_is_no_use_of_a_setting(
    plain_adapters, tmp_path, monkeypatch
):
    import shutil

    folder = tmp_path / "adapter"
    shutil.copytree(plain_adapters / "LORA", folder)
    change_config(folder, spark_size=16)
    with pytest.raises(UserError, match="trained with spark_size=16, a setting that is unknown"):
        import_peft(llama(), folder)
    later = dataclasses.make_dataclass(
        "Later", [("spark_size", int, dataclasses.field(default=16))]
    )
    monkeypatch.setitem(peft.PEFT_TYPE_TO_CONFIG_MAPPING, "LORA", later)
    import_peft(llama(), folder)


# ---- initializations that change the base


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_a_base_without_its_first_components_is_converted_exactly(tmp_path, init, variant):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS,
        init_lora_weights=init,
        rank_pattern={"down_proj": 3},
        **variant,
    )
    want = trained(config, tmp_path / "theirs")
    base = llama()
    assert (want - logits(base)).abs().max() > 0.1
    model = import_peft(llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    # The base is the original one, and the change is a LoRA of twice the rank.
    for path, layer in wrapped_layers(model).items():
        assert torch.equal(layer.innermost.weight, base.get_submodule(path).weight)
        assert type(layer) is (DoRA if variant.get("use_dora") else LoRA)
        assert len(layer.A) == (6 if path.endswith("down_proj") else 8)
    save_adapter(model, tmp_path / "ours")
    assert torch.equal(logits(load_adapter(llama(), tmp_path / "ours")), logits(model))


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "mica"], ids=str)
def test_an_initialization_that_leaves_the_base_alone_needs_nothing(tmp_path, init):
    want = trained(
        peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=init), tmp_path / "theirs"
    )
    model = import_peft(llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    assert {len(layer.A) for layer in wrapped_layers(model).values()} == {4}


def test_random_components_follow_from_the_initial_adapter(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa_niter_2")
    first, last = tmp_path / "first", tmp_path / "last"
    want = trained(config, last, first=first)
    with pytest.raises(UserError, match=r"init_lora_weights='pissa_niter_2'.* as `initial`"):
        import_peft(llama(), last)
    # PEFT writes the adapter before training with the same settings.
    model = import_peft(llama(), last, initial=first)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    change_config(first, r=5)
    with pytest.raises(UserError, match="has r=5, and the trained adapter 4"):
        import_peft(llama(), last, initial=first)
    change_config(last, init_lora_weights=True)
    with pytest.raises(UserError, match="leave the initial adapter out"):
        import_peft(llama(), last, initial=first)


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq", "something_new"])
def test_a_base_that_nobody_knows_is_refused(plain_adapters, tmp_path, init):
    import shutil

    folder = tmp_path / "adapter"
    shutil.copytree(plain_adapters / "LORA", folder)
    change_config(folder, init_lora_weights=init)
    with pytest.raises(UserError, match=f"init_lora_weights='{init}'"):
        import_peft(llama(), folder)


class One(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.layer = nn.Linear(*reversed(weight.shape), bias=False)
        self.layer.weight = nn.Parameter(weight)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_components_that_the_weight_does_not_determine_are_refused(tmp_path, init):
    weight = torch.eye(6) if init == "pissa" else torch.ones(6, 6)
    config = peft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=init)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(One(weight.clone()), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="weight of layer does not determine its first 2 compon"):
        import_peft(One(weight.clone()), tmp_path)


# ---- a name that exists


@pytest.mark.parametrize("second", [["q_proj"], ["q_proj", "v_proj"], ["down_proj"]], ids=str)
def test_a_second_adapter_of_the_same_name_is_refused(tmp_path, second):
    want = trained(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), tmp_path / "a")
    want_of_second = trained(peft.LoraConfig(r=2, target_modules=second), tmp_path / "b")
    model = import_peft(llama(), tmp_path / "a")
    sentence = (
        r"has an adapter 'default' already, and .* needs a name of its own; call "
        r"import_peft\(..., name='other'\), or adaptrank.delete_adapter\(model, 'default'\)"
    )
    with pytest.raises(UserError, match=sentence):
        import_peft(model, tmp_path / "b")
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    # What the error says.
    import_peft(model, tmp_path / "b", name="other")
    set_enabled(model, "other")
    torch.testing.assert_close(logits(model), want_of_second, rtol=1e-4, atol=1e-5)
    import_peft(delete_adapter(model), tmp_path / "b")


# ---- tensors of the base


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_peft_stores_beside_its_adapter(tmp_path, tied):
    targets = ["q_proj", "embed_tokens"] if tied else ["q_proj", "embed_tokens", "lm_head"]
    want = trained(peft.LoraConfig(r=2, target_modules=targets), tmp_path, llama(tied))
    model = import_peft(llama(tied), tmp_path)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    assert not model.model.embed_tokens.innermost.weight.requires_grad
    other = llama(tied)
    with torch.no_grad():
        other.model.embed_tokens.weight[0] += 1
    with pytest.raises(
        UserError, match=r"holds model.embed_tokens.weight, which its modules_to_sa"
    ):
        import_peft(other, tmp_path)


# ---- tied tensors


def test_a_tied_embedding_that_peft_trained_apart_is_refused_until_it_is_untied(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    want = trained(config, tmp_path, llama(tied=True))
    model = llama(tied=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"embed_tokens.weight and leaves lm_head.weight as it was"):
        import_peft(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # What the error says.
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    torch.testing.assert_close(logits(import_peft(model, tmp_path)), want, rtol=1e-4, atol=1e-5)


def test_a_tie_that_peft_kept_stays_a_tie(tmp_path):
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    want = trained(config, tmp_path, llama(tied=True))
    model = import_peft(llama(tied=True), tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
