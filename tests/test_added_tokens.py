"""Tokens that a run adds: new rows train, are saved, merged and exported."""

import json

import pytest
import torch
import yaml
from loading_runs import causal, command, fit
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from adaptrank import load_adapter, merge, save_adapter
from adaptrank.artifacts import read_adapter
from adaptrank.cli.loading import find_adapter
from adaptrank.data import CausalLMData
from adaptrank.injection import fold_rows, train_rows, trained_rows

TOKENS = ["<call>", "</call>"]


def base(tokens_of, folder, tied, spare=0):
    """Write a model with as many rows as its tokenizer has tokens, and spare ones."""
    tokenizer = AutoTokenizer.from_pretrained(tokens_of)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=len(tokenizer) + spare, eos_token_id=1, pad_token_id=2,
        bos_token_id=None, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), len(tokenizer)


@pytest.fixture(scope="module", params=["tied", "untied", "spare rows"])
def backbone(request, tmp_path_factory, tiny_llama):
    spare = 4 if request.param == "spare rows" else 0
    folder = tmp_path_factory.mktemp("tokens") / "base"
    return base(tiny_llama, folder, request.param != "untied", spare)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "a.jsonl"
    row = json.dumps({"prompt": "How many", "completion": " <call> 3 </call>"})
    file.write_text(f"{row}\n" * 8)
    return str(file)


def data(rows):
    return CausalLMData(rows, validation=rows, batch_size=4)


@pytest.fixture(scope="module")
def run(backbone, rows):
    """A trained module, its frozen embedding before, and the number of tokens before."""
    folder, tokens = backbone
    module = causal(folder, added_tokens=TOKENS, generate=False)
    fit(module, data(rows), max_steps=4)
    return module, AutoModelForCausalLM.from_pretrained(folder), tokens


def test_only_the_new_rows_train(run):
    module, before, tokens = run
    embedding, old = module.model.get_input_embeddings(), before.get_input_embeddings().weight
    assert torch.equal(embedding.weight[:tokens], old[:tokens])
    head, old_head = module.model.get_output_embeddings(), before.get_output_embeddings().weight
    assert torch.equal(head.weight[:tokens], old_head[:tokens])
    names = [n for n, p in module.named_parameters() if p.requires_grad and "parametriz" in n]
    is_tied = before.config.tie_word_embeddings
    assert len(names) == (1 if is_tied else 2)
    assert torch.equal(head.weight, embedding.weight) == is_tied
    moments = [s["exp_avg"].shape for s in module.trainer.optimizers[0].state.values()]
    assert max(shape[0] for shape in moments if shape[-1] == 16) <= 16, "no moment of a vocabulary"
    fresh = causal(module.backbone_name, added_tokens=TOKENS)
    fresh.configure_model()
    start = fresh.model.get_input_embeddings().weight
    assert not torch.equal(embedding.weight[tokens : tokens + 2], start[tokens : tokens + 2])
    again = causal(module.backbone_name, added_tokens=TOKENS)
    torch.manual_seed(99)
    again.configure_model()
    assert torch.equal(again.model.get_input_embeddings().weight, start), "the seed is fixed"


def test_it_is_saved_small_and_restored_everywhere(run, tmp_path, rows, caplog):
    module, before, tokens = run
    adapter = save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    described = read_adapter(adapter)["base"]
    assert described["added_tokens"] == {"<call>": tokens, "</call>": tokens + 1}
    assert described["trained_rows"] == [tokens, tokens + 1]
    ids = torch.tensor([[4, tokens, 5, tokens + 1]])
    with torch.no_grad():
        want = module.eval().model(ids).logits
        warm = causal(module.backbone_name, adapters=None, adapter=str(adapter))
        warm.configure_model()
        assert torch.equal(warm.eval().model(ids).logits, want)
        stored = find_adapter(str(adapter), None)
        model = stored.load(torch.float32)
        torch.testing.assert_close(model(ids).logits, want)
    assert not caplog.records
    assert not trained_rows(model)
    assert model.config.vocab_size == max(tokens + 2, before.config.vocab_size)
    assert stored.tokenizer().convert_tokens_to_ids(TOKENS) == [tokens, tokens + 1]
    trained = [n for n, p in warm.named_parameters() if p.requires_grad and "parametriz" in n]
    assert trained, "training goes on with the rows"
    fit(warm, data(rows), max_steps=1)
    with pytest.raises(ValueError, match=r"was trained with \['<call>'.*Leave added_tokens out"):
        causal(module.backbone_name, adapter=str(adapter), added_tokens=["<x>"]).configure_model()


def test_merging_writes_rows_and_tokenizer(run, tmp_path, capsys):
    module, _, tokens = run
    adapter = save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    ids = torch.tensor([[4, tokens, 5, tokens + 1]])
    with torch.no_grad():
        want = module.eval().model(ids).logits
    code, _, err = command(capsys, "merge", adapter, "--out", tmp_path / "merged")
    assert code == 0, err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, want, rtol=1e-4, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.convert_tokens_to_ids(TOKENS) == [tokens, tokens + 1]
    for folder in (adapter, tmp_path / "merged"):
        code, out, err = command(capsys, "generate", folder, "--prompt", "<call>", "--raw")
        assert code == 0, err
        assert out.startswith("<call>")


def test_merging_in_python_leaves_a_plain_model(backbone):
    folder, tokens = backbone
    module = causal(folder, added_tokens=TOKENS)
    module.configure_model()
    ids = torch.tensor([[4, tokens, 5]])
    with pytest.raises(ValueError, match="no copy of them is kept"):
        merge(module.model, keep_originals=True)
    with torch.no_grad():
        want = module.eval().model(ids).logits
        model = merge(module.model)
        torch.testing.assert_close(model(ids).logits, want)
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight is head.weight) == model.config.tie_word_embeddings


def test_peft_loads_the_export(run, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    module, _, tokens = run
    adapter = save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    code, out, err = command(capsys, "export", adapter, "--out", tmp_path / "peft")
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(module.backbone_name)
    assert ("resize_token_embeddings" in out) == (model.config.vocab_size < tokens + 2)
    if "resize_token_embeddings" in out:
        model.resize_token_embeddings(tokens + 2)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "peft")) == tokens + 2
    ids = torch.tensor([[4, tokens, 5, tokens + 1]])
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "peft")
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(ids).logits, module.eval().model(ids).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_run_resumes_to_the_bit(quantize, rows, tmp_path, tiny_llama):
    from lightning.pytorch.callbacks import ModelCheckpoint

    if quantize:
        pytest.importorskip("bitsandbytes")
    folder, _ = base(tiny_llama, tmp_path / "base", tied=True)
    settings = {"added_tokens": TOKENS, "quantize": quantize, "generate": False}
    whole = causal(folder, **settings)
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(whole, data(rows), [every], max_steps=4, enable_checkpointing=True)
    rest = causal(folder, **settings)
    fit(rest, data(rows), ckpt_path=tmp_path / "step=2.ckpt", max_steps=4)
    for first, second in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(first, second)


def test_the_whole_embedding_trains_if_the_user_says_so(rows, tmp_path, tiny_llama):
    folder, tokens = base(tiny_llama, tmp_path / "base", tied=True)
    module = causal(folder, added_tokens=TOKENS, resize_tokens=True, generate=False)
    fit(module, data(rows), max_steps=1)
    assert module.model.get_input_embeddings().weight.requires_grad
    assert not trained_rows(module.model)
    described = module.describe_base()
    assert described["vocabulary"] == tokens + 2
    adapter = save_adapter(module.model, tmp_path / "adapter", described)
    ids = torch.tensor([[4, tokens, 5]])
    with torch.no_grad():
        want = module.eval().model(ids).logits
        stored = find_adapter(str(adapter), None)
        torch.testing.assert_close(stored.load(torch.float32)(ids).logits, want)
    assert stored.tokenizer().convert_tokens_to_ids("<call>") == tokens


def test_rows_of_tokens_that_the_tokenizer_has_already(rows, tmp_path, tiny_llama):
    folder, tokens = base(tiny_llama, tmp_path / "base", tied=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(TOKENS)
    tokenizer.save_pretrained(folder)
    module = causal(folder, resize_tokens="new", generate=False)
    fit(module, data(rows), max_steps=1)
    assert module.describe_base()["trained_rows"] == [tokens, tokens + 1]
    adapter = save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    ids = torch.tensor([[4, tokens, 5]])
    with torch.no_grad():
        want = module.eval().model(ids).logits
        model = find_adapter(str(adapter), None).load(torch.float32)
        torch.testing.assert_close(model(ids).logits, want)


def test_a_scaled_embedding_scales_new_rows_as_well():
    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 3

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = Scaled(5, 2, padding_idx=4)

        def get_input_embeddings(self):
            return self.tokens

        def get_output_embeddings(self):
            return None

    model = Model()
    train_rows(model, [1, 3])
    (rows,) = trained_rows(model).values()
    with torch.no_grad():
        rows.rows.fill_(2)
    assert torch.equal(model.tokens(torch.tensor([3])), torch.full((1, 2), 6.0))
    model.tokens(torch.tensor([0, 3])).sum().backward()
    assert rows.rows.grad.tolist() == [[0, 0], [3, 3]]
    fold_rows(model)
    assert type(model.tokens) is Scaled
    assert model.tokens.weight[3].tolist() == [2, 2]


def test_a_plain_model_of_python_says_what_is_missing(run, tmp_path):
    module, _, _ = run
    adapter = save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    model = AutoModelForCausalLM.from_pretrained(module.backbone_name)
    with pytest.raises(ValueError, match="rows of added tokens"):
        load_adapter(model, adapter)


def test_the_configuration_takes_the_key(rows, tmp_path, capsys, tiny_llama):
    folder, _ = base(tiny_llama, tmp_path / "base", tied=True)
    config = {
        "model": {
            "class_path": "CausalLM",
            "init_args": {
                "backbone": folder,
                "adapters": [{"parameterization": [{"class_path": "LoRA"}]}],
                "added_tokens": TOKENS,
                "generate": False,
                "dtype": "fp32",
            },
        },
        "data": {"class_path": "CausalLMData", "init_args": {"sources": rows, "validation": rows}},
        "trainer": {"max_steps": 1, "accelerator": "cpu"},
        "runs": str(tmp_path / "runs"),
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(config))
    code, out, err = command(capsys, "fit", "--config", tmp_path / "a.yaml")
    assert code == 0, err
    assert "rows of added tokens" in out
    code, out, err = command(capsys, "plan", "--config", tmp_path / "a.yaml")
    assert code == 0, err
