"""Every key of a batch is used or refused, and every term of a model's loss is trained on."""

import logging
from functools import partial

import pytest
import torch
from conftest import LINEAR_METHODS, perturb
from lightning.pytorch import Trainer
from test_step_mean import QUIET, TinyCausal, TinyClassifier, rows
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening
from transformers.models.auto import AutoConfig, AutoModelForCausalLM

from adaptrank._errors import UserError
from adaptrank.modules import Adapter, CausalLM
from adaptrank.modules.label_counts import LabelSpread
from adaptrank.parameterizations import AttentionScale, LoRA, Prefix, wrappers

LENGTHS = (9, 4, 12)


class Ready(CausalLM):
    """A module around a model that exists already."""

    tokenizer = None

    def __init__(self, model, *nest, **arguments):
        super().__init__("none", [Adapter(list(nest or [partial(LoRA, rank=2)]), **arguments)])
        self.ready = [model]
        self.configure_model()
        for wrapper in wrappers(self.backbone):
            perturb(wrapper, 0.2)

    def load_backbone(self):
        return self.ready.pop()


def tiny(model_type="llama", attention="sdpa", **more):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "head_dim": 8,
        "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "pad_token_id": 0, "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 2,
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type)
    known = {key: value for key, value in sizes.items() if hasattr(config, key)} | more
    config = AutoConfig.for_model(model_type, **known)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double()
    if "moe" in model_type or model_type in ("mixtral", "gpt_oss"):
        model.set_experts_implementation("eager")
    return model


def examples(seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 40, (length,), generator=random) for length in LENGTHS]


def packed(texts):
    """One row of all examples, as DataCollatorWithFlattening makes it."""
    features = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in texts]
    return dict(DataCollatorWithFlattening(return_tensors="pt")(features))


def one_by_one(module, texts):
    """The losses of the tokens of each example in a row of its own."""
    return torch.cat([module(ids[None], torch.ones_like(ids)[None], ids[None])[0] for ids in texts])


def losses_of(module, batch):
    return module._token_losses(batch)[0]


def block_mask(texts):
    blocks = [torch.ones(len(ids), len(ids), dtype=torch.bool).tril() for ids in texts]
    return torch.block_diag(*blocks).bool()[None, None]


def with_mask(batch):
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def as_prepared(batch, convert=lambda mask: mask):
    """Packed rows told apart by a mask alone: positions that do not matter go on."""
    without = {key: value for key, value in batch.items() if key != "position_ids"}
    return {**without, "attention_mask": convert(block_mask(examples()))}


def boundaries(batch, **options):
    texts = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in examples()]
    return dict(DataCollatorWithFlattening(return_tensors="pt", **options)(texts))


def padded(batch, left):
    """A packed row with four tokens of padding."""
    sides = (4, 0) if left else (0, 4)
    batch = with_mask(batch)
    fill = {"labels": -100, "position_ids": 1}
    return {
        key: nn.functional.pad(value, sides, value=fill.get(key, 0)) for key, value in batch.items()
    }


PACKED = {
    "position_ids": lambda batch: batch,
    "position_ids and a mask of ones": with_mask,
    "padding on the right": partial(padded, left=False),
    "padding on the left": partial(padded, left=True),
    "flash boundaries": partial(boundaries, return_flash_attn_kwargs=True),
    "boundaries alone": partial(
        boundaries, return_flash_attn_kwargs=True, return_position_ids=False
    ),
    "seq_idx": partial(boundaries, return_seq_idx=True),
    "seq_idx alone": partial(boundaries, return_seq_idx=True, return_position_ids=False),
}


@pytest.fixture
def softmax_in_float64(monkeypatch):
    """Let eager attention take its softmax in float64, where transformers asks for float32.

    A sum over a longer row may be rounded in another order, which depends on the processor.
    """
    softmax = torch.nn.functional.softmax

    def exact(scores, *arguments, dtype=None, **options):
        dtype = scores.dtype if scores.dtype == torch.float64 else dtype
        return softmax(scores, *arguments, dtype=dtype, **options)

    monkeypatch.setattr(torch.nn.functional, "softmax", exact)


@pytest.mark.usefixtures("softmax_in_float64")
@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize(
    ("model_type", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("qwen3", "sdpa")],
)
def test_packed_rows_are_their_examples(form, model_type, attention):
    module = Ready(tiny(model_type, attention))
    texts = examples()
    got = losses_of(module, PACKED[form](packed(texts)))
    torch.testing.assert_close(got, one_by_one(module, texts), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "convert",
    [
        lambda mask: mask,
        lambda mask: mask.long(),
        lambda mask: torch.zeros(mask.shape).masked_fill(~mask, float("-inf")),
    ],
    ids=["bool", "int", "float"],
)
def test_a_mask_of_four_dimensions_says_who_sees_whom(attention, convert):
    module = Ready(tiny("llama", attention))
    texts = examples()
    got = losses_of(module, as_prepared(packed(texts), convert))
    torch.testing.assert_close(got, one_by_one(module, texts), rtol=1e-6, atol=1e-8)


def test_a_sliding_window_and_packed_rows():
    module = Ready(tiny("mistral", sliding_window=5))
    texts = examples()
    want = one_by_one(module, texts)
    for form in ("position_ids", "position_ids and a mask of ones", "flash boundaries"):
        got = losses_of(module, PACKED[form](packed(texts)))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match="packed rows with padding, and MistralForCausalLM"):
        losses_of(module, padded(packed(texts), left=False))


@pytest.mark.parametrize("method", LINEAR_METHODS, ids=lambda cls: cls.__name__)
def test_packed_rows_are_their_examples_under_every_method(method):
    module = Ready(tiny(), method)
    texts = examples()
    got = losses_of(module, with_mask(packed(texts)))
    torch.testing.assert_close(got, one_by_one(module, texts), rtol=1e-8, atol=1e-10)


def test_packed_rows_under_methods_of_whole_attentions():
    texts = examples()
    module = Ready(tiny(), AttentionScale, targets=["self_attn"])
    got = losses_of(module, packed(texts))
    torch.testing.assert_close(got, one_by_one(module, texts), rtol=1e-8, atol=1e-10)
    # A prefix lies in a cache that all examples of a row would share.
    module = Ready(tiny(), Prefix, targets="model")
    with pytest.raises(ValueError, match="Prefix extends masks"):
        losses_of(module, packed(texts))


def test_a_recurrent_model_refuses_packed_rows():
    module = Ready(tiny("falcon_h1", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8))
    texts = examples()
    with pytest.raises(ValueError, match="position_ids that begin again, and FalconH1ForCausalLM"):
        losses_of(module, packed(texts))
    with pytest.raises(ValueError, match="boundaries of examples, and FalconH1ForCausalLM"):
        losses_of(module, boundaries({}, return_seq_idx=True))


def test_rows_without_a_mask_have_no_padding():
    module = Ready(tiny())
    ids = torch.stack([ids[:4] for ids in examples()])
    with_ones = module(ids, torch.ones_like(ids), ids)[0]
    assert torch.equal(losses_of(module, {"input_ids": ids, "labels": ids}), with_ones)


def test_left_padding():
    module = Ready(tiny())
    texts = examples()
    width = max(map(len, texts))
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids in texts:
        side = (width - len(ids), 0)
        batch["input_ids"].append(nn.functional.pad(ids, side))
        batch["attention_mask"].append(nn.functional.pad(torch.ones_like(ids), side))
        labels = nn.functional.pad(ids, side, value=-100)
        labels[width - len(ids)] = -100
        batch["labels"].append(labels)
    batch = {key: torch.stack(value) for key, value in batch.items()}
    torch.testing.assert_close(losses_of(module, batch), one_by_one(module, texts))


def test_embeddings_in_place_of_tokens():
    module = Ready(tiny())
    batch = rows((7, 4))
    ids = batch.pop("input_ids")
    batch["inputs_embeds"] = module.model.get_input_embeddings()(ids)
    torch.testing.assert_close(
        losses_of(module, batch), losses_of(module, {**rows((7, 4))}), rtol=1e-9, atol=1e-12
    )


def test_a_key_that_the_model_names_is_read():
    """GPT-2 adds the embeddings of token types."""
    module = Ready(tiny("gpt2"))
    batch = rows((7, 4))
    types = torch.randint(3, 40, batch["input_ids"].shape)
    output = module.model(**batch, token_type_ids=types)
    loss = module.training_step({**batch, "token_type_ids": types}, 0)
    torch.testing.assert_close(loss, output.loss.double(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(loss, module.training_step(batch, 0))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"token_type_ids": torch.zeros(2, 7)}, "'token_type_ids', which LlamaForCausalLM"),
        ({"weights": torch.ones(2)}, "'weights', which LlamaForCausalLM does not read"),
        ({"position_id": torch.ones(2, 7)}, "Did you mean 'position_ids'"),
        ({"past_key_values": torch.ones(1)}, "'past_key_values'"),
        ({"answers": ["1", "2"]}, "'answers'"),
        ({"labels": None}, "no tensor 'labels'"),
        ({"labels": torch.ones(2, dtype=torch.long)}, "a label for each token"),
        ({"labels": torch.ones(2, 6, dtype=torch.long)}, r"labels has the shape \(2, 6\)"),
        ({"attention_mask": torch.ones(2, 6)}, r"attention_mask has the shape \(2, 6\)"),
        ({"attention_mask": torch.ones(2, 7, 7)}, r"Give \(2, 7\) or \(2, 1, 7, 7\)"),
        ({"attention_mask": torch.ones(2, 1, 6, 7)}, r"Give \(2, 7\) or \(2, 1, 7, 7\)"),
        ({"position_ids": torch.ones(2, 6)}, r"position_ids has the shape \(2, 6\)"),
        ({"input_ids": None}, "no input_ids"),
        ({"input_ids": torch.ones(7, dtype=torch.long)}, r"Give \(rows, tokens\)"),
        ({"inputs_embeds": torch.ones(2, 7, 32)}, "both input_ids and inputs_embeds"),
        ({"max_length_q": 4}, "no cu_seq_lens_q"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_nobody_reads_is_refused_by_name(change, sentence):
    module = Ready(tiny())
    with pytest.raises(ValueError, match=sentence):
        module.training_step({**rows((7, 4)), **change}, 0)
    with pytest.raises(ValueError, match="A batch is a mapping"):
        module.training_step([torch.ones(2)], 0)


def test_a_classifier_refuses_keys_that_its_model_does_not_name():
    module = TinyClassifier("none", [Adapter([LoRA])], num_labels=3)
    module.configure_model()
    batch = {**rows((7, 4)), "labels": torch.tensor([0, 2])}
    module.training_step({**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}, 0)
    with pytest.raises(ValueError, match="'idx', which BertForSequenceClassification"):
        module.training_step({**batch, "idx": torch.ones(2)}, 0)
    with pytest.raises(ValueError, match="no tensor 'labels'"):
        module.training_step({key: batch[key] for key in ("input_ids", "attention_mask")}, 0)


# ---- batches without a label


@pytest.mark.parametrize("kind", [TinyCausal, TinyClassifier])
def test_a_batch_without_a_label_has_a_loss_of_zero_and_is_warned_of_once(kind, caplog):
    more = {"num_labels": 3} if kind is TinyClassifier else {"generate": False}
    module = kind("none", [Adapter([partial(LoRA, rank=2)])], warmup=0, **more)
    batch = rows((7, 4))
    batch["labels"] = torch.full_like(
        batch["input_ids"][:, 0] if kind is TinyClassifier else batch["labels"], -100
    )
    module.configure_model()
    loss = module.training_step(batch, 0)
    loss.backward()
    assert float(loss) == 0
    for parameter in module.parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="adaptrank"):
        trainer = Trainer(**QUIET, max_epochs=1)
        trainer.fit(module, DataLoader([batch] * 3, batch_size=None))
    assert sum("no label to train on" in message for message in caplog.messages) == 1
    assert float(trainer.callback_metrics["train_loss"]) == 0
    assert all(p.isfinite().all() for p in module.parameters())


def test_a_validation_batch_without_a_label_counts_for_nothing():
    batch, silent = rows((7, 4)), rows((5, 5))
    silent["labels"][:] = -100
    module = TinyCausal("none", [Adapter([LoRA])], generate=False)
    losses = []
    for batches in ([batch], [batch, silent]):
        loader = DataLoader(batches, batch_size=None)
        losses += Trainer(**QUIET).validate(module, loader, verbose=False)
    assert losses[0] == losses[1]


# ---- mixtures of experts


EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "phimoe", "granitemoe")


@pytest.mark.parametrize("model_type", EXPERTS)
def test_the_balance_of_experts_is_a_part_of_the_training_loss(model_type):
    model = tiny(model_type, "eager", output_router_logits=True, router_aux_loss_coef=0.5)
    module = Ready(model, targets=["q_proj", "v_proj"])
    batch = rows((9, 5))
    want = module.model(**batch).loss
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss.double(), want.double(), rtol=1e-5, atol=1e-6)
    means = module.step_mean._means
    torch.testing.assert_close(means["train_loss"] + means["train_aux_loss"], loss.detach())
    assert float(means["train_aux_loss"]) > 0.3
    assert "_loss_function" not in vars(module.model)
    losses = losses_of(module, batch)
    torch.testing.assert_close(losses.mean(), means["train_loss"])
    module.model.config.output_router_logits = False
    module.training_step(batch, 0)
    assert list(module.step_mean._means) == ["train_loss"]


def test_the_balance_of_experts_is_logged_apart():
    model = tiny("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    module = Ready(model, targets=["q_proj"])
    silent = rows((5, 5))
    silent["labels"][:] = -100
    for batches, positive in (([rows((9, 5)), rows((4,))], True), ([silent], False)):
        trainer = Trainer(**QUIET, max_epochs=1, accumulate_grad_batches=2)
        trainer.fit(module, DataLoader(batches, batch_size=None))
        assert bool(trainer.callback_metrics["train_aux_loss"] > 0) is positive


def test_boundaries_beside_padding_are_never_dropped():
    """A window shorter than the row leaves no mask that could separate the examples."""
    model = tiny("qwen3", sliding_window=4, use_sliding_window=True, max_window_layers=0)
    batch = padded(boundaries(None, return_seq_idx=True, return_position_ids=False), left=False)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    with pytest.raises(ValueError, match="packed rows with padding"):
        Ready(model).training_step(batch, 0)


def test_boundaries_count_the_tokens_of_all_rows():
    texts = [torch.randint(3, 40, (length,)) for length in (3, 5, 4, 4)]
    ids = torch.stack([torch.cat(texts[:2]), torch.cat(texts[2:])])
    labels = ids.clone()
    labels[0, 3] = labels[1, 4] = -100
    batch = {"input_ids": ids, "labels": labels}
    module = Ready(tiny())
    ends = torch.tensor([0, 3, 8, 12, 16], dtype=torch.int32)
    got = losses_of(module, {**batch, "cu_seq_lens_q": ends})
    torch.testing.assert_close(got, one_by_one(module, texts), rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match="does not end at its 16 tokens"):
        losses_of(module, {**batch, "cu_seq_lens_q": ends[:3]})


def test_packed_rows_of_a_mixture_of_experts():
    """The balance of experts is computed from a mask of two dimensions."""
    model = tiny("mixtral", output_router_logits=True, sliding_window=None)
    module = Ready(model, targets=["q_proj"])
    texts = examples()
    got = losses_of(module, with_mask(packed(texts)))
    torch.testing.assert_close(got, one_by_one(module, texts), rtol=1e-9, atol=1e-11)
    module.training_step(with_mask(packed(texts)), 0).backward()
    with pytest.raises(ValueError, match="packed rows with padding"):
        module.training_step(padded(packed(texts), left=False), 0)


def test_a_regression_has_one_label_for_each_row():
    module = TinyClassifier("none", [Adapter([partial(LoRA, rank=2)])], num_labels=1)
    module.configure_model()
    output, count = torch.zeros(4), torch.tensor(4)
    with pytest.raises(UserError, match="one label for each row"):
        module.problem.loss(output, torch.zeros(4, 1), count, None)
    assert module.problem.loss(output, torch.ones(4), count, None) == 1


def test_the_variance_of_large_labels():
    spread = LabelSpread()
    spread.update(torch.tensor([9999.0, 10001.0] * 50))
    assert spread.chance()["loss"] == pytest.approx(1.0)
    assert LabelSpread().chance() == {}
