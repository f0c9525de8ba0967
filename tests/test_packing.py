"""Packed rows: each example as if it were alone, in full rows, in an order that resumes."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from test_batches import Ready, tiny
from test_data_text import cache, ready, write
from test_step_mean import QUIET

from adaptrank.data import ArithmeticProblems, CausalLMData
from adaptrank.data.packing import PackedExamples, joined, pack, packed_batch
from adaptrank.modules import Adapter, CausalLM
from adaptrank.modules.packed_rows import check_packing
from adaptrank.parameterizations import AttentionScale, LoRA, Prefix

__all__ = ["cache"]  # a fixture


def some_lengths(n=200, longest=40, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(1, longest + 1, (n,), generator=random).tolist()


def examples(lengths=(9, 4, 12, 1, 2), prompt=0, seed=0):
    random = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(3, 40, (length,), generator=random, dtype=torch.int32)
        labels = torch.where(torch.arange(length) < prompt, -100, ids).int()
        made.append({"input_ids": ids, "labels": labels})
    return made


# ---- rows


@pytest.mark.parametrize("size", [64, 100])
def test_every_example_is_in_one_row_that_holds_it(size):
    lengths = some_lengths()
    rows = pack(lengths, size, seed=3)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert max(sum(lengths[index] for index in row) for row in rows) <= size
    assert sum(lengths) / (len(rows) * size) > 0.95
    # No two rows fit into one.
    used = sorted(sum(lengths[index] for index in row) for row in rows)
    assert used[0] + used[1] > size
    assert pack(lengths, size, seed=3) == rows
    assert pack(lengths, size, seed=4) != rows


def test_rows_are_packed_window_by_window(monkeypatch):
    monkeypatch.setattr("adaptrank.data.packing.WINDOW", 50)
    lengths = some_lengths()
    rows = pack(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert sum(lengths) / (len(rows) * 64) > 0.9


def test_a_batch_of_packed_rows_has_positions_that_begin_again_and_no_label_at_a_start():
    parts = examples((3, 2, 4))
    packed = PackedExamples(parts, [[2, 0], [1]])
    batch = packed_batch(packed[:], pad_id=7)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]]
    assert batch["input_ids"][1].tolist() == [*parts[1]["input_ids"].tolist(), 7, 7, 7, 7, 7]
    starts = batch["position_ids"] == 0
    assert (batch["labels"][starts] == -100).all()
    assert int((batch["labels"] != -100).sum()) == sum(len(part["labels"]) - 1 for part in parts)
    assert all(tensor.dtype == torch.long for tensor in batch.values())
    # The examples themselves keep their labels.
    assert (parts[0]["labels"] != -100).all()


# ---- the oracle: the same examples one by one


def loss_and_gradients(module, batches):
    module.zero_grad()
    losses = torch.cat([module(**batch)[0] for batch in batches])
    losses.mean().backward()
    trained = [p for p in module.parameters() if p.requires_grad]
    return len(losses), losses.mean().detach(), [p.grad.clone() for p in trained]


@pytest.mark.parametrize("prompt", [0, 2])
@pytest.mark.parametrize(
    ("model_type", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "eager"), ("qwen3", "sdpa")],
)
def test_packed_rows_have_the_loss_and_the_gradients_of_their_examples(
    model_type, attention, prompt
):
    module = Ready(tiny(model_type, attention))
    parts = examples(prompt=prompt)
    alone = [packed_batch([joined([part])], pad_id=0) for part in parts]
    for batch in alone:
        del batch["position_ids"]
    want = loss_and_gradients(module, alone)
    packed = PackedExamples(parts, [[2, 1, 3], [0, 4]])
    got = loss_and_gradients(module, [packed_batch(packed[:], pad_id=0)])
    assert got[0] == want[0] == sum(max(len(part["labels"]) - max(prompt, 1), 0) for part in parts)
    # Eager attention takes its softmax in float32.
    rounding = (
        {"rtol": 1e-5, "atol": 1e-7} if attention == "eager" else {"rtol": 1e-9, "atol": 1e-11}
    )
    torch.testing.assert_close(got[1:], want[1:], **rounding)


def test_packed_rows_under_a_sliding_window():
    module = Ready(tiny("mistral", sliding_window=5))
    parts = examples()
    want = loss_and_gradients(module, [packed_batch([joined([part])], 0) for part in parts])
    packed = PackedExamples(parts, [[2, 1, 3], [0, 4]])
    got = loss_and_gradients(module, [packed_batch(packed[:], pad_id=0)])
    torch.testing.assert_close(got[1:], want[1:], rtol=1e-9, atol=1e-11)


# ---- models that cannot keep the borders


def test_models_that_cannot_keep_the_borders_are_refused():
    check_packing(tiny("llama"), 4, 16)
    check_packing(tiny("mistral", sliding_window=5), 4, 16)
    check_packing(Ready(tiny(), AttentionScale, targets=["self_attn"]).model, 4, 16)
    model = tiny("falcon_h1", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8)
    with pytest.raises(ValueError, match=r"FalconH1ForCausalLM .* Leave out data.packing"):
        check_packing(model, 1, 16)
    with pytest.raises(ValueError, match=r"BloomForCausalLM .* Leave out data.packing"):
        check_packing(tiny("bloom", "eager"), 1, 16)
    model = tiny("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    check_packing(model, 1, 16)
    with pytest.raises(ValueError, match=r"a batch has 4. Set data.batch_size: 1"):
        check_packing(model, 4, 16)
    model.config._attn_implementation_internal = "my_own"
    with pytest.raises(ValueError, match="attention 'my_own' does not keep"):
        check_packing(model, 1, 16)


def test_rows_that_flash_attention_would_join_are_refused():
    module = Ready(tiny("llama"))
    batch = packed_batch(PackedExamples(examples(), [[2, 1, 3], [0, 4]])[:], pad_id=0)
    module.model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="several packed rows, and LlamaForCausalLM"):
        module(**batch)


# ---- the data module and whole runs


def sentences(n):
    return [{"prompt": f"Q{i}:", "completion": " y" * (i % 7 + 1)} for i in range(n)]


def packed_data(tmp_path, n=40, **keys):
    path = write(tmp_path / "a.jsonl", sentences(n))
    keys = {"packing": True, "max_length": 40, "batch_size": 2, **keys}
    return ready(CausalLMData(path, path, **keys), stage="fit")


def test_every_epoch_and_process_sees_every_example_once(tmp_path, caplog):
    caplog.set_level("INFO")
    data = packed_data(tmp_path)
    packed, _ = data.batched("train")
    assert (
        f"Packing puts 40 examples into {len(packed)} rows of 40 tokens, which are 9" in caplog.text
    )
    orders = []
    for epoch in range(2):
        dealt = []
        for rank in range(2):
            data.trainer = SimpleNamespace(
                distributed_sampler_kwargs={"rank": rank, "num_replicas": 2}
            )
            loader = data.train_dataloader()
            loader.set_epoch(epoch)
            dealt += [row for batch in loader.batch_sampler for row in batch]
        orders.append(dealt)
        seen = [index for row in set(dealt) for index in packed.rows[row]]
        assert sorted(seen) == list(range(40))
    assert orders[0] != orders[1]
    # Evaluation reads each example in a row of its own.
    assert set(next(iter(data.val_dataloader()))) == {"input_ids", "attention_mask", "labels"}
    assert set(next(iter(data.val_dataloader()))["attention_mask"].sum(1).tolist()) != {40}


def test_workers_give_the_same_packed_batches(tmp_path):
    batches = []
    for workers in (0, 1):
        data = packed_data(tmp_path, num_workers=workers)
        data.trainer = None
        batches.append(list(data.train_dataloader()))
    for ours, theirs in zip(*batches, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


class Small(CausalLM):
    """A llama of random weights over the tokens of the tests' tokenizer."""

    tokenizer = None

    def load_backbone(self):
        return tiny("llama", vocab_size=260)


class Seen(Callback):
    """Keep the tokens of every batch, and write a checkpoint after one of them."""

    def __init__(self, path, step):
        self.path, self.step = path, step
        self.batches = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch["input_ids"].tolist())
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def small():
    return Small(
        "none",
        [Adapter([partial(LoRA, rank=2)])],
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        schedule="constant",
        warmup=0,
        generate=False,
        dtype="fp32",
    )


def run(tmp_path, step, **resume):
    data, module = packed_data(tmp_path, 24), small()
    seen = Seen(tmp_path / "part.ckpt", step)
    trainer = Trainer(**QUIET, max_epochs=2, limit_val_batches=0, callbacks=[seen])
    trainer.fit(module, data, **resume)
    trained = {key: value.clone() for key, value in module.trained_state().items()}
    return trainer, seen.batches, trained


def test_a_packed_run_has_the_steps_of_its_rows_and_resumes_in_mid_epoch(tmp_path):
    rows = len(packed_data(tmp_path, 24).batched("train")[0])
    steps = -(-rows // 2)
    trainer, seen, trained = run(tmp_path, steps + 1)
    assert trainer.estimated_stepping_batches == trainer.global_step == 2 * steps
    _, rest, resumed = run(tmp_path, -1, ckpt_path=tmp_path / "part.ckpt")
    assert steps > 2
    assert rest == seen[steps + 1 :]
    for key, value in trained.items():
        assert torch.equal(resumed[key], value)


def test_a_model_that_cannot_keep_borders_ends_a_packed_run_at_once(tmp_path):
    class Mixer(Small):
        def load_backbone(self):
            return tiny("bloom", "eager", vocab_size=260)

    module = Mixer("none", [Adapter([partial(LoRA, rank=2)])], dtype="fp32")
    with pytest.raises(ValueError, match=r"Leave out data\.packing"):
        Trainer(**QUIET, max_steps=1).fit(module, packed_data(tmp_path))
    module = small()
    module.adapters = [Adapter([Prefix], targets="model")]
    with pytest.raises(ValueError, match="Prefix extends masks"):
        Trainer(**QUIET, max_steps=1, limit_val_batches=0).fit(module, packed_data(tmp_path))


def test_what_packing_does_not_go_with(tmp_path):
    with pytest.raises(ValueError, match="Leave out `packing` or `group_by_length`"):
        CausalLMData("a.jsonl", packing=True, group_by_length=True)
    with pytest.raises(TypeError, match="packing='yes' is neither"):
        CausalLMData("a.jsonl", packing="yes")
    data = ArithmeticProblems(train_size=2_000_000, val_size=2, packing=True)
    ready(data, stage="fit")
    data.trainer = None
    with pytest.raises(ValueError, match="packing needs the length of all 2000000 examples"):
        data.train_dataloader()
    described = [packed_data(tmp_path, packing=on).describe_training() for on in (False, True)]
    assert described[1] == described[0] | {"packing": True}


def test_a_document_is_split_and_a_supervised_example_is_cut(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": "abcdefghij" * 9}] * 2)
    data = ready(CausalLMData(path, path, packing=True, max_length=40), stage="fit")
    packed, _ = data.batched("train")
    targets = sum(int((packed[k]["labels"] != -100).sum()) for k in range(len(packed)))
    assert targets == 2 * 90
    path = write(tmp_path / "p.jsonl", [{"prompt": "p" * 90, "completion": "c"}] * 2)
    data = ready(CausalLMData(path, path, packing=True, max_length=40), stage="fit")
    assert [len(row) for row in data.batched("train")[0].rows] == [1, 1]
    assert data.truncated["train"] == 2
