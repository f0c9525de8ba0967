"""Compiled blocks: few graphs for many ranks, and the results and files of an eager run."""

import copy
import inspect
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental import _config as shapes_config
from transformers import LlamaConfig, LlamaForCausalLM

import adaptrank
from adaptrank._errors import UserError
from adaptrank.allocation.methods.elalora import ElaLoRA
from adaptrank.artifacts import save_adapter
from adaptrank.axes import rank_axes
from adaptrank.data import ArithmeticProblems
from adaptrank.injection import adapt, disabled, select_rows
from adaptrank.modules import Adapter, CausalLM
from adaptrank.parameterizations import PARAMETERIZATIONS, LoRA
from adaptrank.parameterizations.base import on_example
from adaptrank.training.compiled_blocks import transformer_blocks

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _fresh_compiler(caplog):
    # Pytest would collect the compiler's trace, which takes longer than the compiling.
    caplog.set_level("WARNING", "torch.__trace")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def llama(layers, nest=LoRA, targets=TARGETS, **arguments):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        use_cache=False,
    )
    model = adapt(LlamaForCausalLM(config), targets, nest, **arguments)
    model.train()
    for axis in rank_axes(model).values():
        for slot in axis.closing():
            nn.init.normal_(slot.tensor, std=0.1)
    return model


def set_ranks(model, rank_of):
    """Give the axis of number i the rank `rank_of(i)`."""
    for number, axis in enumerate(rank_axes(model).values()):
        rank = rank_of(number)
        generator = torch.Generator().manual_seed(number)
        axis.resize(range(min(rank, len(axis))), max(0, rank - len(axis)), generator)


def tokens(rows, length):
    return torch.randint(32, (rows, length))


def loss_and_gradients(model, ids):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def assert_equals_eager(model, ids):
    loss, gradients = loss_and_gradients(model, ids)
    want_loss, want = loss_and_gradients(copy.deepcopy(model), ids)
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == want.keys()
    for name, gradient in want.items():
        distance = (gradients[name] - gradient).norm()
        assert distance <= 1e-6 * gradient.norm(), name


# ---- how many graphs


def test_twelve_ranks_share_two_graphs_and_so_do_lengths_and_events():
    """One graph is for the first block, whose input needs no gradient.

    Ranks differ from layer to layer when the model is made, and so do scales and names.
    """
    counter = CompileCounterWithBackend("aot_eager")
    model = llama(12, nest=partial(LoRA, rank=13), targets=["down_proj"])
    for number in range(12):
        nest = partial(LoRA, rank=2 + number)
        adapt(model, rf".*layers\.{number}\..*q_proj", nest, name=f"of layer {number}")
    adaptrank.compile_blocks(model, backend=counter, fullgraph=True)
    for rows, length in [(2, 8), (3, 11)]:
        loss_and_gradients(model, tokens(rows, length))
    set_ranks(model, lambda number: 2 + (5 * number) % 13)
    assert_equals_eager(model, tokens(2, 9))
    assert counter.frame_count == 2


def methods_with_a_rank():
    """Methods whose rank is an axis. Most of them have a scale of alpha / rank."""
    names = []
    for name, method in PARAMETERIZATIONS.items():
        takes_rank = "rank" in inspect.signature(method.__init__).parameters
        is_ours = method.__module__.startswith("adaptrank.")
        if is_ours and takes_rank and "rank" in on_example(method).axes:
            rare = () if name == "DoRA" else pytest.mark.tables
            names.append(pytest.param(name, marks=rare))
    return names


@pytest.mark.parametrize("name", methods_with_a_rank())
def test_layers_that_were_made_with_other_ranks_share_their_graphs(name):
    counter = CompileCounterWithBackend("eager")
    model = llama(5, targets=["down_proj"])
    for number in range(5):
        nest = partial(PARAMETERIZATIONS[name], rank=2 + number)
        adapt(model, rf".*layers\.{number}\..*q_proj", nest)
    adaptrank.compile_blocks(model, backend=counter, fullgraph=True)
    loss_and_gradients(model, tokens(2, 8))
    assert counter.frame_count <= 3


@pytest.mark.tables
def test_a_block_with_an_empty_layer_has_one_further_graph():
    counter = CompileCounterWithBackend("eager")
    model = llama(4)
    adaptrank.compile_blocks(model, backend=counter, fullgraph=True)
    ids = tokens(2, 8)
    loss_and_gradients(model, ids)
    assert counter.frame_count == 2
    empty = rank_axes(model)["model.layers.2.self_attn.q_proj:rank"]
    for rank, graphs in [(0, 3), (5, 3), (0, 3)]:
        empty.resize(range(min(rank, len(empty))), max(0, rank - len(empty)), torch.Generator())
        assert_equals_eager(model, ids)
        assert counter.frame_count == graphs


# ---- what else happens to a block


def two_blocks(backend="eager", nest=LoRA, targets=("q_proj",), **options):
    model = llama(2, nest, list(targets))
    counter = CompileCounterWithBackend(backend)
    return adaptrank.compile_blocks(model, backend=counter, **options), counter


def settings_of_compiler():
    return dynamo_config.get_config_copy(), shapes_config.get_config_copy()


@pytest.mark.tables
def test_hooks_switches_and_rows_are_noticed_after_compiling():
    model, counter = two_blocks()
    ids = tokens(2, 8)
    settings = settings_of_compiler()
    assert_equals_eager(model, ids)
    assert counter.frame_count == 2
    assert settings_of_compiler() == settings
    seen = []
    layer = model.model.layers[1].self_attn.q_proj
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(1))
    assert_equals_eager(model, ids)
    handle.remove()
    assert seen
    plain = copy.deepcopy(model)
    with disabled(model), disabled(plain):
        assert torch.equal(model(ids).logits, plain(ids).logits)
    names = ["default", None]
    with select_rows(model, names), select_rows(plain, names):
        assert torch.equal(model(ids).logits, plain(ids).logits)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)


def test_a_call_with_a_cache_is_not_compiled():
    model, counter = two_blocks()
    ids = tokens(2, 4)
    settings = {"max_new_tokens": 3, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    texts = model.generate(ids, **settings)
    assert counter.frame_count == 0
    assert torch.equal(texts, copy.deepcopy(model).generate(ids, **settings))


def test_a_copy_is_not_compiled_and_names_stay(tmp_path):
    model, counter = two_blocks()
    plain = llama(2, targets=["q_proj"])
    assert list(model.state_dict()) == list(plain.state_dict())
    copied = copy.deepcopy(model)
    copied(tokens(1, 3))
    assert counter.frame_count == 0
    save_adapter(model, tmp_path / "compiled")
    save_adapter(plain, tmp_path / "plain")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "compiled" / file).read_bytes() == (
            tmp_path / "plain" / file
        ).read_bytes()


@pytest.mark.tables
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointed_blocks_equal_eager(backend, checkpointing):
    model, _ = two_blocks(backend, targets=TARGETS)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rank_axes(model)["model.layers.1.self_attn.q_proj:rank"].resize(range(2))
    for length in (8, 11):
        ids = tokens(2, length)
        loss, gradients = loss_and_gradients(model, ids)
        want_loss, want = loss_and_gradients(copy.deepcopy(model), ids)
        torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(gradients, want, rtol=1e-4, atol=1e-6)


# ---- the key of the task modules


def causal(folder, compile, **arguments):
    torch.manual_seed(1)
    return CausalLM(
        folder,
        [Adapter([partial(LoRA, rank=4)], targets=["q_proj", "v_proj"])],
        dtype="fp32",
        generate=False,
        padding_free=False,
        schedule="constant",
        warmup=0,
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        compile=compile,
        **arguments,
    )


def fit(folder, out, compile, ckpt_path=None, **arguments):
    """Train 12 steps, of which ElaLoRA changes ranks after some, and save after 6 and 12."""
    model = causal(folder, compile)
    saving = ModelCheckpoint(out, "{step}", every_n_train_steps=6, save_top_k=-1)
    trainer = Trainer(
        callbacks=[ElaLoRA(swaps=2, every=2, warmup=1, final=1), saving],
        max_steps=12,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **arguments,
    )
    data = ArithmeticProblems(batch_size=4, train_size=48, val_size=4, eval_batch_size=4)
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return model, {name: p.detach().clone() for name, p in model.trained_state().items()}


def assert_same_run(run, other):
    (_, state), (_, other_state) = run, other
    assert state.keys() == other_state.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, other_state[name], rtol=1e-6, atol=1e-7)


OPTIONS = {"backend": "aot_eager", "fullgraph": True}


@pytest.mark.tables
def test_a_compiled_run_equals_an_eager_one_which_resumes_it(tiny_llama, tmp_path):
    eager = fit(tiny_llama, tmp_path / "eager", False)
    compiled = fit(tiny_llama, tmp_path / "compiled", OPTIONS)
    ranks = {len(axis) for axis in rank_axes(eager[0]).values()}
    assert len(ranks) > 1, "no event changed a rank"
    assert_same_run(compiled, eager)
    files = [tmp_path / run / "step=6.ckpt" for run in ("eager", "compiled")]
    checkpoints = [torch.load(file, weights_only=True) for file in files]
    assert checkpoints[0]["state_dict"].keys() == checkpoints[1]["state_dict"].keys()
    assert checkpoints[0]["adaptrank"] == checkpoints[1]["adaptrank"]
    assert_same_run(fit(tiny_llama, tmp_path / "a", False, files[1]), eager)


@pytest.mark.tables
def test_a_compiled_run_resumes_an_eager_one(tiny_llama, tmp_path):
    eager = fit(tiny_llama, tmp_path / "eager", False)
    checkpoint = tmp_path / "eager" / "step=6.ckpt"
    assert_same_run(fit(tiny_llama, tmp_path / "compiled", OPTIONS, checkpoint), eager)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("max-autotune", "compile='max-autotune' makes no sense. Give true, false, or options"),
        ({"modus": "default"}, "compile has no option 'modus'; torch.compile takes .*'mode'"),
        ({"mode": "fast"}, "compile: mode='fast' is unknown; use one of default, .*reduce-over"),
        ({"backend": "inducter"}, "backend='inducter' is unknown.*Did you mean 'inductor'"),
        ({"mode": "default", "options": {}}, "give mode or options"),
    ],
)
def test_options_that_do_not_fit_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        CausalLM("nowhere", [Adapter([LoRA])], compile=given)


def test_blocks_are_found_in_lists_of_lists():
    blocks = [nn.Sequential(nn.Linear(2, 2)) for _ in range(3)]
    model = nn.Module()
    model.stages = nn.ModuleList([nn.ModuleList(blocks[:2]), nn.ModuleList(blocks[2:])])
    assert list(transformer_blocks(model)) == blocks


def test_a_model_without_blocks_is_refused():
    model = adapt(nn.Sequential(nn.Linear(4, 4)), "all-linear", LoRA)
    with pytest.raises(UserError, match=r"Sequential has no module list.*torch\.compile"):
        adaptrank.compile_blocks(model)
