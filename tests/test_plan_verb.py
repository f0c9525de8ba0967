"""What `plan` tells is what a run does."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from loading_runs import causal
from test_configs import CONFIGS, short
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from adaptrank.artifacts import save_adapter, simulation
from adaptrank.artifacts.known_shapes import KnownShapes
from adaptrank.cli import main, preparation
from adaptrank.data import CausalLMData
from adaptrank.injection import adapt
from adaptrank.parameterizations import LoRA


@pytest.fixture
def files(tiny_llama, tiny_bert, tmp_path):
    def made(name, **more):
        file = next(file for file in CONFIGS if file.stem == name)
        config = short(
            yaml.safe_load(file.read_text()),
            {"CausalLM": tiny_llama, "SequenceClassification": tiny_bert},
        )
        for key, value in more.items():
            config[key].setdefault("init_args", {}).update(value)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        return tmp_path / f"{name}.yaml"

    return made


def planned(file, capsys, *more):
    capsys.readouterr()
    main(["plan", "--config", str(file), "--json", *more])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "name", ["elalora_llama", "adalora_llama", "sora_llama", "hybrid_llama", "pica_llama", "smoke"]
)
def test_its_figures_are_those_of_the_run(name, files, tmp_path, capsys):
    file = files(name)
    data = planned(file, capsys)
    main(["fit", "--config", str(file), "--runs", str(tmp_path / "runs"), "--evaluate", "false"])
    folder = tmp_path / "runs" / name / "0"
    summary = json.loads((folder / "summary.json").read_text())
    ends_equal = name == "pica_llama"  # elsewhere ranks move
    if ends_equal:
        assert data["trainable"] == summary["trainable"]
    assert data["frozen_parameters"] == summary["parameters"] - summary["trainable"]
    assert data["bytes"]["optimizer"] == 2 * data["bytes"]["parameters"]
    if data["allocator"]:
        events = [json.loads(line) for line in (folder / "ranks.jsonl").read_text().splitlines()]
        assert data["units_at_start"] == events[0]["active"]
        assert data["budget"] == [
            [event["step"], event["budget"]] for event in events if event["step"]
        ]
    if ends_equal:
        size = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
        assert data["bytes"]["file"] < size < data["bytes"]["file"] + 2**16  # the header


def test_it_loads_no_weight_and_leaves_no_folder(files, tmp_path, capsys, monkeypatch):
    from adaptrank import backbones

    monkeypatch.setattr(backbones, "load_model", lambda *a, **k: pytest.fail("a weight was loaded"))
    monkeypatch.chdir(tmp_path)
    file = files("elalora_llama")
    main(["plan", "--config", str(file)])
    out = capsys.readouterr().out
    assert "ElaLoRA (two pools), " in out
    assert "trainable" in out
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"allocator": {"every": 90}}, "would never act"),
        ({"allocator": {"warmup": 3, "final": 3}}, "would never act"),
        (
            {"model": {"adapters": [{"targets": ["nowhere"], "parameterization": ["LoRA"]}]}},
            "nowhere",
        ),
        (
            {
                "model": {
                    "adapters": [{"targets": "all-linear", "parameterization": ["HyperAdapt"]}]
                }
            },
            "nothing to allocate",
        ),
    ],
)
def test_what_a_run_refuses_it_refuses_with_the_same_sentence(change, sentence, files, capsys):
    file = files("elalora_llama", **change)
    said = []
    for verb in ("plan", "fit"):
        with pytest.raises(SystemExit) as left:
            main([verb, "--config", str(file), *(["--evaluate", "false"] if verb == "fit" else [])])
        assert left.value.code == 2
        said.append(" ".join(capsys.readouterr().err.split()))
    assert sentence in said[0]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"budget": 3, "floor": 1}, "a budget of 3 ranks is below 14"),
        ({"budget": 14, "floor": 1}, "leaves the floor of 1 unit(s) to each of 14 axes"),
        (
            {"budget": 84},
            "would never act: it prunes to a budget, and this one leaves all as it is",
        ),
    ],
)
def test_a_budget_at_which_nothing_can_move(files, capsys, arguments, sentence):
    file = files("adalora_llama", allocator=arguments)
    with pytest.raises(SystemExit):
        main(["plan", "--config", str(file)])
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_without_a_configuration(capsys):
    with pytest.raises(SystemExit):
        main(["plan"])
    assert "plan needs a configuration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "change", "sentence"),
    [
        ("model", {"init_args": {"warmup": 300}}, "never ends in a run of"),
        ("trainer", {"precision": "64-mixed"}, "64-mixed"),
        ("trainer", {"strategy": "fsdp"}, "fsdp"),
        ("trainer", {"accelerator": "gpu"}, "gpu"),
        (
            "data",
            {"class_path": "CausalLMData", "init_args": {"sources": "nowhere.jsonl"}},
            "There is no 'nowhere.jsonl'",
        ),
    ],
)
def test_what_the_trainer_the_data_or_the_optimizer_refuse(
    section, change, sentence, files, capsys
):
    """Beside what a run refuses when it is built, which both verbs share."""
    file = files("lora_llama")
    config = yaml.safe_load(file.read_text())
    if "class_path" in change:
        config[section] = change
    elif "init_args" in change:
        config[section]["init_args"] |= change["init_args"]
    else:
        config[section] |= change
    file.write_text(yaml.safe_dump(config))
    said = []
    for verb in ("plan", "fit"):
        options = ["--evaluate", "false"] if verb == "fit" else []
        with pytest.raises(SystemExit) as left:
            main([verb, "--config", str(file), *options])
        assert left.value.code == 2
        said.append(" ".join(capsys.readouterr().err.split()))
    assert sentence in said[0]
    assert said[0] == said[1]


def test_epochs_and_batches_give_the_steps(files, capsys):
    file = files("lora_llama")
    options = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "2", "--model.warmup", "0.0"]
    options += ["--trainer.accumulate_grad_batches", "2", "--data.train_size", "40"]
    data = planned(file, capsys, *options, "--data.batch_size", "4")
    assert data["steps"] == 2 * 40 // 4 // 2
    assert data["batch"]["rows"] == 4


def test_figures_say_how_they_were_obtained(files, capsys):
    file = files("lora_llama")
    data = planned(file, capsys)
    assert data["how"].keys() >= {*data["bytes"]} - {"peak"}
    main(["plan", "--config", str(file), "--tokens", "11"])
    out = capsys.readouterr().out
    assert "of 11 tokens: as asked." in out
    assert "activations, with checkpointing" in out
    assert "counted in a step on tensors without values" in out
    assert "measured here: a product" in out
    size, activations = data["bytes"], data["activations"]
    rest = ("frozen", "parameters", "gradients", "optimizer")
    peak = sum(size[name] for name in rest) + activations["without_checkpointing"]
    assert size["peak"] == peak
    assert activations["with_checkpointing"] < activations["without_checkpointing"]


def test_one_device_of_two_is_planned_without_starting_another_process(files, capsys):
    file = files("lora_llama")
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    data = planned(file, capsys, *options)
    assert data["time"]["devices"] == 2


# ---- rows that give several examples, or share a row


@pytest.mark.parametrize("packing", [False, True])
def test_steps_count_the_examples_that_a_text_is_cut_into(
    packing, files, tmp_path, capsys, monkeypatch
):
    """Only some rows are read, and the others are taken to be like them."""
    texts = tmp_path / "texts.jsonl"
    line = json.dumps({"text": "12 + 7 = 19. 30 + 4 = 34. 5 + 6 = 11. 8 + 90 = 98."})
    texts.write_text(f"{line}\n" * 24)
    arguments = {"sources": str(texts), "packing": packing, "max_length": 16, "batch_size": 4}
    file = files("lora_llama")
    config = yaml.safe_load(file.read_text())
    config["data"] = {"class_path": "CausalLMData", "init_args": arguments}
    config["trainer"] |= {"max_steps": -1, "max_epochs": 1}
    file.write_text(yaml.safe_dump(config))
    whole = planned(file, capsys)
    monkeypatch.setattr(preparation, "MOST_ROWS", 6)
    assert planned(file, capsys)["steps"] == whole["steps"]
    data = CausalLMData(**arguments)
    data.tokenizer = AutoTokenizer.from_pretrained(config["model"]["init_args"]["backbone"])
    data.setup("fit")
    rows, _ = data.batched("train")
    assert len(data.examples("train")) > 2 * 24
    assert whole["steps"] == -(-len(rows) // 4)
    assert whole["batch"] == {
        "rows": 4,
        "tokens": max(len(row["input_ids"]) for row in rows),
        "from": "the longest among the first 1,024 rows of the data",
    }


def test_packing_that_a_model_cannot_keep_apart_is_refused(files, tmp_path, capsys):
    from transformers import BloomConfig

    file = files("lora_llama")
    config = yaml.safe_load(file.read_text())
    arguments = config["model"]["init_args"]
    folder = tmp_path / "bloom"
    AutoTokenizer.from_pretrained(arguments["backbone"]).save_pretrained(folder)
    BloomConfig(vocab_size=400, hidden_size=16, n_layer=1, n_head=2).save_pretrained(folder)
    arguments["backbone"] = str(folder)
    config["data"]["init_args"]["packing"] = True
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        main(["plan", "--config", str(file)])
    assert "Leave out data.packing" in " ".join(capsys.readouterr().err.split())


# ---- how the backbone is loaded


def test_quantized_weights_take_what_they_take_when_they_are_loaded(files, capsys):
    pytest.importorskip("bitsandbytes")
    file = files("lora_llama")
    backbone = yaml.safe_load(file.read_text())["model"]["init_args"]["backbone"]
    plain = planned(file, capsys)
    data = planned(file, capsys, "--model.quantize", "llm-int8")
    model = causal(backbone, quantize="llm-int8")
    model.configure_model()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert data["bytes"]["frozen"] == sum(p.numel() * p.element_size() for p in frozen)
    assert data["frozen_parameters"] == plain["frozen_parameters"]
    assert data["bytes"]["file"] == plain["bytes"]["file"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--model.quantize", "llm-int8", "--model.train_modules", "[q_proj]"],
            "cannot train whole",
        ),
        (["--model.device_map", "auto"], "Leave device_map out"),
        (
            ["--model.device_map", "auto", "--trainer.devices", "2", "--trainer.strategy", "ddp"],
            "DDPStrategy moves it",
        ),
    ],
)
def test_options_of_loading_that_fit_refuses(options, sentence, files, capsys):
    pytest.importorskip("bitsandbytes")
    file = files("lora_llama")
    with pytest.raises(SystemExit) as left:
        main(["plan", "--config", str(file), *options])
    assert left.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_the_peak_is_that_of_the_configured_checkpointing(files, capsys):
    file = files("lora_llama")
    whole = planned(file, capsys, "--model.gradient_checkpointing", "true")
    some = planned(file, capsys, "--model.gradient_checkpointing", "{every_n_layers: 2}")
    off = planned(file, capsys)
    assert [data["checkpointing"] for data in (whole, some, off)] == [True, True, False]
    kept = [data["activations"]["with_checkpointing"] for data in (whole, some)]
    assert kept[0] < kept[1] < off["activations"]["without_checkpointing"]
    for data, activations in ((whole, kept[0]), (some, kept[1])):
        assert data["activations"]["without_checkpointing"] > activations
        assert off["bytes"]["peak"] - data["bytes"]["peak"] == (
            off["activations"]["without_checkpointing"] - activations
        )
        assert data["time"]["flops_per_step"] > off["time"]["flops_per_step"]


# ---- adapters to start from, real steps, metrics of one's own


def test_an_adapter_to_start_from_is_planned_from_its_file(files, tmp_path, capsys):
    """Its ranks are those of the file, and modules may train whole beside it."""
    file = files("lora_llama")
    backbone = yaml.safe_load(file.read_text())["model"]["init_args"]["backbone"]
    model = causal(backbone, partial(LoRA, rank=3))
    model.configure_model()
    save_adapter(model.model, tmp_path / "adapter")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    norm = model.model.model.norm.weight.numel()
    options = ["--model.adapters", "null", "--model.adapter", str(tmp_path / "adapter")]
    data = planned(file, capsys, *options, "--model.train_modules", "[model.norm]")
    assert data["trainable"] == trained + norm
    assert data["kinds"]["trained whole"] == norm
    assert data["frozen_parameters"] == sum(p.numel() for p in model.parameters()) - trained - norm
    assert data["bytes"]["peak"] > data["bytes"]["frozen"]


def test_real_steps_are_measured_and_leave_nothing(files, tmp_path, capsys, monkeypatch):
    file = files("elalora_llama")
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    main(["plan", "--config", str(file), "--measure", "2"])
    out = capsys.readouterr().out
    assert "Measured in 2 steps with the real weights" in out
    assert "s, without the first one" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_monitored_metric_may_be_a_class_of_torchmetrics(files, capsys):
    """What a task logs is known once its metrics are made."""
    file = files("smoke")
    config = yaml.safe_load(file.read_text())
    config["model"]["init_args"]["metrics"] = [{"class_path": "MulticlassF1Score", "name": "F"}]
    checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "F", "mode": "max"}}
    config["trainer"]["callbacks"] = [checkpoint]
    file.write_text(yaml.safe_dump(config))
    assert planned(file, capsys)["trainable"]


# ---- activations


def llama(layers):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return adapt(LlamaForCausalLM(config).train(), "all-linear", LoRA)


def loss_of(model, device):
    ids = torch.ones(2, 9, dtype=torch.long, device=device)
    return lambda: model(input_ids=ids, labels=ids).loss


class Stack(nn.Module):
    """Equal blocks, which may be computed again in the backward pass."""

    def __init__(self, count, recomputes=False):
        super().__init__()
        block = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        self.blocks = nn.ModuleList(copy.deepcopy(block) for _ in range(count))
        self.recomputes = recomputes

    def forward(self, x):
        for block in self.blocks:
            if self.recomputes:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


@pytest.mark.parametrize("recomputes", [False, True])
def test_equal_blocks_are_extended_exactly(recomputes, monkeypatch):
    model = adapt(Stack(6, recomputes), "all-linear", LoRA).to("meta")
    x = torch.ones(5, 8, device="meta")

    def loss():
        return model(x).sum()

    assert simulation.equal_blocks(model).name == "blocks"
    short = simulation.simulate_step(model, loss)
    assert len(model.blocks) == 6
    other = adapt(Stack(6), ["blocks.0.0"], LoRA)
    assert simulation.equal_blocks(other) is None
    monkeypatch.setattr(simulation, "equal_blocks", lambda model: None)
    assert simulation.simulate_step(model, loss) == short


def test_known_shapes_are_those_that_pytorch_finds():
    """A view shares the memory of its argument, and equal arguments have equal types."""
    shapes = KnownShapes()
    x = torch.ones(4, 6, device="meta")
    add, view = torch.ops.aten.add.Tensor, torch.ops.aten._unsafe_view.default
    for _ in range(3):
        for other in (1, 1.0, True, x.to(torch.float64), x.mT.contiguous().mT):
            result, _ = shapes.run(add, (x.int(), other), {}, None)
            expected = x.int() + other
            assert result.dtype == expected.dtype
            assert result.stride() == expected.stride()
        result, _ = shapes.run(view, (x, [24]), {}, None)
        assert result.untyped_storage()._cdata == x.untyped_storage()._cdata
        filled, _ = shapes.run(torch.ops.aten.fill_.Scalar, (x, 2.0), {}, None)
        assert filled is x
        halves, _ = shapes.run(torch.ops.aten.split_with_sizes_copy.default, (x, [1, 3]), {}, None)
        assert [half.shape[0] for half in halves] == [1, 3]
        real, _ = shapes.run(add, (torch.ones(2), torch.full((2,), 3.0)), {}, None)
        assert real.tolist() == [4, 4]


def test_activations_are_those_of_a_real_step():
    """What a real step keeps for its backward pass, each memory once, is a lower bound."""
    model = llama(2)
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, "cpu")()
    real = sum(kept.values())
    loss.backward()
    with FlopCounterMode(display=False) as flops:
        loss_of(model, "cpu")().backward()
    model = model.to("meta")
    step = simulation.simulate_step(model, loss_of(model, "meta"))
    assert real <= step.activations <= 1.5 * real
    assert step.flops >= flops.get_total_flops()
    matrices = simulation.simulate_step(model, loss_of(model, "meta"), fused_attention=False)
    assert matrices.activations > step.activations
