"""Files from strangers, kind by kind: what a file may say, and that a refusal changes nothing.

`test_fuzz.py` tries the same at random.
"""

import json
import sys
import time
from functools import partial

import pytest
import torch
from conftest import LINEAR_METHODS
from safetensors.torch import load_file, save_file
from torch import nn

from adaptrank import adapt, describe, load_adapter, merge, save_adapter, select_rows, testing
from adaptrank.artifacts import (
    WEIGHTS,
    JsonError,
    digest_of,
    open_weights,
    parse_json,
    read_adapter,
    unchanged_on_error,
)
from adaptrank.axes import rank_axes
from adaptrank.cli.errors import ConfigError
from adaptrank.cli.loading import find_adapter
from adaptrank.composition import compose
from adaptrank.interop.peft import import_peft
from adaptrank.interop.peft.patterns import is_quick_pattern
from adaptrank.parameterizations import (
    NEAT,
    NOLA,
    HyperAdapt,
    LoRA,
    LowRankUpdate,
    MELoRA,
    PiCa,
    SBoRA,
    wrapped_layers,
)
from adaptrank.testing import perturb


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.v, self.up = nn.Linear(48, 24), nn.Linear(48, 24), nn.Linear(24, 24)
        self.head = nn.Linear(24, 2)

    def forward(self, x):
        return self.head(self.up(torch.tanh(self.q(x) + self.v(x))))


def made(*nest, **options):
    model = adapt(Model(), ["q", "v"], list(nest), **options)
    perturb(model)
    return model


def saved(folder, *nest, **options):
    return save_adapter(made(*nest, **options), folder, {"name": "tiny"})


def changed(folder, change, out):
    """Change a file as someone would who computes the digest anew."""
    tensors, description = load_file(folder / WEIGHTS), read_adapter(folder)
    change(tensors, description)
    description["digest"] = digest_of(json.loads(json.dumps(description)), tensors)
    out.mkdir(exist_ok=True)
    contiguous = {key: value.contiguous() for key, value in tensors.items()}
    save_file(contiguous, out / WEIGHTS, metadata={"adaptrank": json.dumps(description)})
    return out


def state(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    modules = [(id(module), sorted(vars(module))) for module in model.modules()]
    return modules, [(name, id(t), t.requires_grad, t.detach().clone()) for name, t in tensors]


def assert_same(one, two):
    assert one[0] == two[0]
    for (*facts, value), (*other_facts, other) in zip(one[1], two[1], strict=True):
        assert facts == other_facts
        assert torch.equal(value, other)


def assert_refused(model, folder, words, load=load_adapter):
    before = state(model)
    with pytest.raises(ValueError, match=words) as error:
        load(model, folder)
    assert str(error.value).isprintable()
    assert_same(state(model), before)


# ---- a file reaches no further than it says


@pytest.mark.parametrize("name", ["up.weight", "up.bias", "q.base.weight", "q.bias", "v.weight"])
def test_a_tensor_of_the_base_that_is_not_declared_is_refused(tmp_path, name):
    folder = saved(tmp_path / "a", LoRA)
    hostile = changed(folder, lambda t, d: t.update({name: torch.zeros(24, 24)}), tmp_path / "b")
    assert_refused(Model(), hostile, f"an unexpected tensor {name}")
    tied = changed(
        folder,
        lambda t, d: d["tied"].update({name: "q.0.A"}),
        tmp_path / "c",
    )
    assert_refused(Model(), tied, f"an unexpected tensor {name}")


def test_a_declared_tensor_is_loaded_and_trains(tmp_path):
    model = made(LoRA, train_modules=["head"])
    save_adapter(model, tmp_path)
    loaded = load_adapter(Model(), tmp_path)
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert loaded.head.weight.requires_grad
    assert not loaded.up.weight.requires_grad


def test_another_adapter_is_out_of_reach(tmp_path):
    folder = saved(tmp_path / "a", LoRA)

    def reach(tensors, description):
        description["trained_modules"].append("q.base.A")
        tensors["q.base.A"] = torch.zeros(8, 48)

    hostile = changed(folder, reach, tmp_path / "b")
    assert_refused(made(LoRA, name="other"), hostile, "no place in this model for q.base.A")


# ---- a refusal changes nothing


@pytest.mark.parametrize("present", ["bare", "same", "other"])
def test_an_error_at_the_very_end_leaves_the_model_as_it_was(tmp_path, monkeypatch, present):
    """Values, ranks, flags and modules come back even if a method's own code fails."""
    made_model = made(partial(LoRA, rank=4), train_modules=["head"])
    rank_axes(made_model)["q:rank"].resize(range(2))
    save_adapter(made_model, tmp_path)
    model = Model()
    if present == "other":
        # A head of its own beside another adapter would be refused before.
        model.head.load_state_dict(made_model.head.state_dict())
    if present != "bare":
        adapt(
            model, ["q", "v"], partial(LoRA, rank=4), name="default" if present == "same" else "x"
        )
        perturb(model)
        model(torch.randn(3, 48)).sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    before = state(model)

    def fails(self):
        if self.B.abs().sum() and len(self.A) == 2:
            raise RuntimeError("no luck")

    monkeypatch.setattr(LoRA, "refresh", fails)
    with pytest.raises(RuntimeError, match="no luck"):
        load_adapter(model, tmp_path)
    assert_same(state(model), before)
    assert all(g is p.grad for g, p in zip(grads, model.parameters(), strict=True))
    if present != "bare":
        model(torch.randn(3, 48)).sum().backward()


def test_a_rollback_gives_everything_back():
    model = made(LoRA)
    before = state(model)

    def change(rollback):
        rollback.announce([model.up.weight])
        model.up.weight.data.zero_()
        model.head = nn.Identity()
        model.extra = 3
        model.up.register_buffer("more", torch.ones(1))
        model.q.A = nn.Parameter(torch.ones(2, 2))
        model.q.enabled = False
        rank_axes(model)["v:rank"].resize(range(3))
        model.requires_grad_(True)
        raise KeyError

    with pytest.raises(KeyError), unchanged_on_error(model) as rollback:
        change(rollback)
    assert_same(state(model), before)
    assert model.q.enabled
    assert not hasattr(model, "extra")


def test_composing_with_a_refused_file_leaves_the_base_as_it_was(tmp_path):
    good = saved(tmp_path / "a", LoRA)
    bad = changed(good, lambda t, d: t.update({"v.0.A": torch.zeros(3, 48)}), tmp_path / "b")
    load = lambda model, folder: compose(model, [good, folder])  # noqa: E731
    assert_refused(Model(), bad, "different ranks", load)


# ---- indices


class Unstated(LowRankUpdate):
    """A method with a buffer of whole numbers whose range it does not state."""

    source = "none"
    axes = {"rank": {"A": 0, "index": 0, "B": 1}}

    def __init__(self, base: nn.Module, *, rank: int = 3) -> None:
        super().__init__(base)
        m, n = self.shape
        self.A, self.B = self.zeros(rank, n), self.zeros(m, rank)
        nn.init.normal_(self.A)
        self.register_buffer("index", torch.arange(rank))

    def factors(self):
        return self.gated("B"), self.A


def test_a_method_states_the_range_of_its_indices(tmp_path):
    build = testing.builder(Unstated, nn.Linear(48, 24))
    with pytest.raises(AssertionError, match=r"whole numbers index, and index_ranges\(\)"):
        testing.check_indices(build)
    folder = saved(tmp_path, Unstated)
    assert_refused(Model(), folder, r"Unstated.index_ranges\(\) does not state their range")


INDEXED = [cls for cls in LINEAR_METHODS if cls(nn.Linear(48, 24)).index_ranges()]


@pytest.mark.parametrize("method", INDEXED, ids=lambda cls: cls.__name__)
def test_an_index_outside_of_its_range_is_refused(tmp_path, method):
    folder = saved(tmp_path / "a", method)
    ranges = method(nn.Linear(48, 24)).index_ranges()
    for name, allowed in ranges.items():
        for wrong in (-1, allowed.stop, 2**63 - 1):

            def change(tensors, description, name=name, wrong=wrong):
                tensors[f"q.0.{name}"] = torch.full_like(tensors[f"q.0.{name}"], wrong)

            hostile = changed(folder, change, tmp_path / "b")
            assert_refused(Model(), hostile, f"q.0.{name} of {method.__name__} holds {wrong}")


def test_there_are_methods_with_indices():
    assert {SBoRA, MELoRA, PiCa, NOLA} <= set(INDEXED)


# ---- numbers, types and names of a description


def set_argument(name, value):
    def change(tensors, description):
        description["adapters"][0]["nest"][0]["init_args"][name] = value

    return change


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        (LoRA, set_argument("rank", True), "rank=True, which should be a whole number"),
        (LoRA, set_argument("rank", "8"), "rank='8', which should be a whole number"),
        (LoRA, set_argument("alpha", [1]), "which should be a number"),
        (LoRA, set_argument("init", "x"), "which should be 'kaiming', 'gaussian', 'orthogonal'"),
        (LoRA, set_argument("rnk", 8), "which it does not have. Did you mean 'rank'"),
        (LoRA, set_argument("rank", 10**12), "asks for a LoRA with 1,000,000,000,000"),
        (LoRA, set_argument("rank", 10**6), "asks for 72,000,000 numbers for a LoRA"),
        (LoRA, set_argument("rank", 10**400), "a whole number of 401 digits"),
        (LoRA, set_argument("alpha", float("nan")), "it holds NaN"),
        (LoRA, set_argument("alpha", float("inf")), "it holds Infinity"),
        (NOLA, set_argument("rank", 10**6), "numbers for a NOLA"),
        (NOLA, set_argument("chunk", 10**6), "numbers for a NOLA"),
        (MELoRA, set_argument("rank", 10**6), "numbers for a MELoRA"),
        (NEAT, set_argument("depth", 10**6), "more than 1,024 tensors"),
        (LoRA, lambda t, d: d["base"].update(num_labels=10**9), "states 1,000,000,000 labels"),
        (LoRA, lambda t, d: d["base"].update(name="a\x1b[2J"), "base.name is no text of one line"),
        (LoRA, lambda t, d: d["base"].update(name="x" * 5000), "base.name is no text of one line"),
        (LoRA, lambda t, d: d["ranks"].update({"q:rank": 7}), "states 7 units for q:rank"),
        (LoRA, lambda t, d: d["ranks"].update({"up:rank": 7}), "states a rank for up:rank"),
        (LoRA, lambda t, d: d["tied"].update({"q.0.A": "q.0.A"}), "ties q.0.A to a tensor"),
        (LoRA, lambda t, d: d.update(split={"up": ["forward", "weight"]}), "split is not what"),
        (LoRA, lambda t, d: d.update(split={"up": ["a", "b"]}), "parts that it does not use"),
        (LoRA, lambda t, d: d.update(pruned={"up:heads": [0]}), "cannot be cut to 1 heads"),
        (LoRA, lambda t, d: d["adapters"][0].update(layers={}), "are not given with their shapes"),
        (LoRA, lambda t, d: t.update({"q.0.A": torch.zeros(0, 48)}), "stored with different ranks"),
        (LoRA, lambda t, d: t.update({"q.0.A": torch.zeros(8, 0)}), r"q.0.A is \(8, 0\), this"),
        (LoRA, lambda t, d: t.update({"q.0.A": torch.zeros(0)}), r"was stored with shape \(0,\)"),
        (LoRA, lambda t, d: t.update({"q.0.A": t["q.0.A"] * float("nan")}), "are not finite"),
        (LoRA, lambda t, d: t.update({"q.0.A": t["q.0.A"].double() * 1e300}), "are not finite in"),
        (LoRA, lambda t, d: t.update({"q.0.A": t["q.0.A"].int()}), "q.0.A is torch.int32"),
        (LoRA, lambda t, d: t.update({"q.0.A": t["q.0.A"].cfloat()}), "q.0.A is torch.complex64"),
        (SBoRA, lambda t, d: t.update({"q.0.index": t["q.0.index"].bool()}), "q.0.index is torch"),
    ],
    ids=lambda value: getattr(value, "__name__", value).strip("<>"),
)  # fmt: skip
def test_what_no_writer_writes_is_refused_at_once(tmp_path, method, change, words):
    hostile = changed(saved(tmp_path / "a", method), change, tmp_path / "b")
    started = time.process_time()
    assert_refused(Model(), hostile, words)
    assert time.process_time() - started < 5


def test_strict_json():
    assert parse_json('{"a": [1, 2.5, null, true, "x"]}') == {"a": [1, 2.5, None, True, "x"]}
    for text, words in (
        ('{"a": 1, "a": 2}', "a key twice"),
        ("[NaN]", "holds NaN"),
        ("[-Infinity]", "holds -Infinity"),
        ("[1e999]", "not finite"),
        (f"[{'9' * 400}]", "400 digits"),
        (f"[{'9' * 5000}]", "5000 digits"),
        ("[" * 100_000, "no JSON"),
        (" " * (2**24 + 1), "16,777,217 characters"),
    ):
        with pytest.raises(JsonError, match=words):
            parse_json(text)


def test_an_absurd_header_is_not_read(tmp_path):
    file = tmp_path / WEIGHTS
    for size in (2**25 + 1, 2**63):
        file.write_bytes(size.to_bytes(8, "little") + b"{}")
        with pytest.raises(ValueError, match="its header says that it has"):
            read_adapter(tmp_path)
    file.write_bytes(b"\x02")
    with pytest.raises(ValueError, match="is damaged"), open_weights(file):
        pass


def test_a_file_that_is_far_larger_than_the_model_is_not_read(tmp_path):
    """The numbers of the file are a hole on the disk, which takes no time to write."""
    header = {
        "q.0.A": {"dtype": "F32", "shape": [2**28], "data_offsets": [0, 2**30]},
        "__metadata__": {"adaptrank": json.dumps(read_adapter(saved(tmp_path / "a", LoRA)))},
    }
    text = json.dumps(header).encode()
    (tmp_path / "b").mkdir()
    with (tmp_path / "b" / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2**30)
    assert_refused(Model(), tmp_path / "b", "no adapter of this model has more than")


def test_the_commands_load_the_classes_of_transformers_that_they_know(tmp_path):
    model = made(LoRA)
    save_adapter(model, tmp_path, {"name": str(tmp_path), "auto_class": "pipeline"})
    with pytest.raises(ConfigError, match=r"transformers' 'pipeline'. The commands load AutoModel"):
        find_adapter(str(tmp_path), None)


# ---- deep, and side by side


def test_a_file_nests_sixteen_deep_and_no_deeper(tmp_path):
    model = Model()
    save_adapter(made(*[partial(LoRA, rank=1)] * 16), tmp_path / "a")
    load_adapter(model, tmp_path / "a")
    save_adapter(made(*[partial(LoRA, rank=1)] * 17), tmp_path / "b")
    assert_refused(Model(), tmp_path / "b", "nests 17 classes, and 16 is most")


def many(count, method, model=None):
    model = nn.Sequential(nn.Linear(48, 24)) if model is None else model
    for number in range(count):
        adapt(model, "0", method, name=f"a{number}")
    return model


def sequential():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 24)).double()


@pytest.mark.parametrize(
    "method",
    [partial(LoRA, rank=1), HyperAdapt, partial(SBoRA, rank=1)],
    ids=["add", "scale", "pick"],
)
def test_hundreds_of_adapters_stand_side_by_side(tmp_path, method):
    model = many(200, method, sequential())
    perturb(model, 0.01)
    x = torch.randn(4, 48, dtype=torch.float64)
    y = model(x)
    torch.testing.assert_close(y, model[0].definition(x), rtol=1e-9, atol=1e-9)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert describe(model).count(" on ") == 199
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(sequential(), tmp_path)(x), y)
    merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)


def test_a_row_reads_its_own_of_many_adapters():
    model = many(40, partial(LoRA, rank=1), sequential())
    perturb(model)
    x = torch.randn(3, 48, dtype=torch.float64)
    with select_rows(model, ["a7", None, "a39"]):
        y = model(x)
    few = sequential()
    layer = model[0].nest[7]
    alone = few[0](x[:1]) + layer.scale * x[:1] @ layer.A.T @ layer.B.T
    torch.testing.assert_close(y[:1], alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(y[1:2], few[0](x[1:2]), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="reads 2 rows"), select_rows(model, ["a7", None, "a3"]):
        model(x[:2])


def test_a_watched_adapter_among_many_is_called():
    model, seen = many(30, partial(LoRA, rank=1), sequential()), []
    perturb(model)
    x = torch.randn(3, 48, dtype=torch.float64)
    want = model(x)
    model[0].nest[20].register_forward_hook(lambda *call: seen.append(call))
    torch.testing.assert_close(model(x), want)
    assert len(seen) == 1


def calls_of(action):
    """Count the Python calls of an action, which its time on a busy machine would not show."""
    count = 0

    def counted(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(counted)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def test_the_time_does_not_grow_with_the_square_of_the_number_of_adapters(tmp_path):
    method, x = partial(LoRA, rank=1), torch.randn(2, 48)
    calls = {}
    for count in (40, 160):
        model = many(count, method)
        folder = tmp_path / str(count)
        actions = {
            "forward": partial(model, x),
            "save": partial(save_adapter, model, folder),
            "load": partial(load_adapter, nn.Sequential(nn.Linear(48, 24)), folder),
            "describe": partial(describe, model),
            "adapt": partial(adapt, model, "0", method, name="one more"),
            "merge": partial(merge, model),
        }
        calls[count] = {name: calls_of(action) for name, action in actions.items()}
        calls[count]["adapt"] *= count
    for action, few in calls[40].items():
        assert calls[160][action] < 5 * few, action


def test_a_base_that_is_set_anew_is_found_by_all_wrappers_around_it():
    model = many(5, partial(LoRA, rank=1))
    outermost, plain = model[0], model[0].innermost
    other = nn.Linear(48, 24)
    outermost.nest[0].base = other
    assert outermost.innermost is other
    assert all(wrapper.innermost is other for wrapper in outermost.nest)
    outermost.nest[0]._modules["base"] = plain
    assert all(wrapper.innermost is plain for wrapper in outermost.nest)
    assert len(wrapped_layers(model)["0"].nest) == 5


# ---- PEFT


def peft_folder(folder, tensors=None, **settings):
    torch.manual_seed(1)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "tiny"}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    prefix = "base_model.model"
    factors = {
        f"{prefix}.q.lora_A.weight": torch.randn(2, 48),
        f"{prefix}.q.lora_B.weight": torch.randn(24, 2),
    }
    save_file({**factors, **(tensors or {})}, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def test_a_peft_file_reaches_no_further_than_its_configuration_says(tmp_path):
    tensors = {"base_model.model.up.weight": torch.zeros(24, 24)}
    hostile = peft_folder(tmp_path / "a", tensors)
    words = "up.weight, which its modules_to_save does not name"
    assert_refused(Model(), hostile, words, import_peft)
    declared = peft_folder(tmp_path / "b", tensors, modules_to_save=["up"])
    assert not import_peft(Model(), declared).up.weight.any()
    # PEFT stores embeddings at times. As they are those of the model, they change nothing.
    unchanged = {"base_model.model.up.weight": Model().up.weight.detach().clone()}
    import_peft(Model(), peft_folder(tmp_path / "c", unchanged))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank_pattern": {"(a+)+$": 2}}, "rank_pattern=.*which is not what PEFT writes"),
        ({"alpha_pattern": {".*" * 20: 2}}, "alpha_pattern=.*which is not what PEFT writes"),
        ({"lora_alpha": 10**400}, "a whole number of 401 digits"),
        ({"r": 10**400}, "a whole number of 401 digits"),
        ({"lora_alpha": float("nan")}, "it holds NaN"),
        ({"modules_to_save": "up"}, "which are no names"),
    ],
    ids=str,
)
def test_a_peft_configuration_that_nobody_writes_is_refused(tmp_path, settings, words):
    assert_refused(Model(), peft_folder(tmp_path / "a", **settings), words, import_peft)


def test_patterns_that_people_write_are_quick():
    for pattern in ("q_proj", r"^model\.layers\.\d+\.q", "layers.[0-3].*", "(q|k)_proj", "^a$"):
        assert is_quick_pattern(pattern), pattern
    for pattern in ("(a+)+", "(a|a)*", "(.*)*", ".*.*.*.*", "(?=a*)*", r"(a)\1", "[", "x" * 1001):
        assert not is_quick_pattern(pattern), pattern


def test_a_batch_of_another_size_is_refused_in_a_nest_of_any_depth():
    model = many(40, partial(LoRA, rank=1), sequential())
    x = torch.randn(3, 48, dtype=torch.float64)
    with pytest.raises(ValueError, match="reads 3 rows"), select_rows(model, [None, None]):
        model(x)


def test_reading_a_deep_nest_raises_the_limit_of_recursion():
    layer = many(150, partial(LoRA, rank=1), sequential())[0]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    try:
        layer.__setstate__(vars(layer))
        assert sys.getrecursionlimit() > 2000
    finally:
        sys.setrecursionlimit(limit)
