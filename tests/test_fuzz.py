"""Adapters from strangers: 1,000 folders, each changed at random, for every method.

Each folder loads equal, or is refused in one sentence and leaves the model as it was, bit by bit.
`make tables` tries 10,000.
"""

import copy
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import LINEAR_METHODS, METHODS
from safetensors.torch import load_file, save_file
from torch import nn

from adaptrank import adapt, load_adapter, save_adapter
from adaptrank._errors import UserError
from adaptrank.artifacts import digest_of, read_adapter
from adaptrank.artifacts.contents import adapter_names
from adaptrank.parameterizations import PARAMETERIZATIONS, LoRA, named_layers, wrapped_layers
from adaptrank.testing import first_tensor, perturb

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SHARES, EACH, EACH_OF_MANY = 4, 250, 2500
SECONDS, BYTES = 10, 1 << 30
"""Limits of one folder, beside the model."""

HOSTILE = [
    None, True, -1, 0, 7, 10**6, 10**12, -(10**30), 10**400, 1.5, 1e308, float("nan"), float("inf"),
    "", "8", "x" * 5000, "../../etc/passwd", "/dev/zero", "__class__", ".*", "(", "(a+)+$", "\x00",
    "two\nlines", "\x1b[2J", [], {}, [[]], [None], {"": None}, {"class": "LoRA"}, "LoRA", "Prefix",
    "os.system", [1, 2], ["q", "k"], "lora.0", "default", "head",
]  # fmt: skip


class Linears(nn.Module):
    """Two blocks whose layers are alike, a fused projection, and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(48, 24), "c_attn": nn.Linear(24, 72)}) for _ in range(2)
        )
        self.head = nn.Linear(24, 2)
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        hidden = sum(block["c_attn"](torch.tanh(block["q"](x))) for block in self.blocks)
        return self.head(sum(hidden.chunk(3, -1))) - self.mean


class Other(nn.Module):
    """The example of a method that wraps no linear layer, and a head."""

    def __init__(self, method):
        super().__init__()
        self.layer, self.head = method.example(), nn.Linear(2, 2)

    def forward(self, x):
        return first_tensor(self.layer(x)).flatten()[:2] @ self.head.weight


def base_of(method):
    torch.manual_seed(0)
    model = Linears() if method in LINEAR_METHODS else Other(method)
    return model.eval()


def adapted(method):
    """A base with this method, and with a second adapter on a part of a fused layer."""
    model = base_of(method)
    if method in LINEAR_METHODS:
        adapt(model, r"blocks\.\d\.q", method, train_modules=["head"])
        split = {"c_attn": ["q", "k", "v"]}
        adapt(model, r"blocks\.0\.(q|c_attn\.v)", LoRA, name="second", split_fused=split)
    else:
        adapt(model, "layer", method, train_modules=["head"])
    perturb(model)
    return model


class Subject:
    """A method's base, its good file, and models to load changed files into."""

    def __init__(self, method, folder):
        self.method, self.folder = method, folder
        model = adapted(method)
        save_adapter(model, folder, {"name": "tiny", "num_labels": 2})
        self.tensors, self.description = load_file(folder / WEIGHTS), read_adapter(folder)
        self.content = (folder / WEIGHTS).read_bytes()
        self.base = base_of(method)
        example = method(method.example())
        seeded = torch.Generator().manual_seed(7)
        self.x = example.example_input((3,), seeded)
        self.want = self.output(model)
        self.models = {}

    @torch.no_grad()
    def output(self, model):
        return model(self.x)

    def target(self, kind):
        """A bare base, one that carries this adapter, or one that carries another."""
        if kind not in self.models:
            model = copy.deepcopy(self.base)
            if kind == "same":
                load_adapter(model, self.folder)
                for layer in wrapped_layers(model).values():
                    perturb(layer, seed=3)
            elif kind == "other":
                # With a head of its own beside another adapter the file would be refused.
                tied, present = self.description["tied"], model.state_dict()
                for name in self.description["trained_modules"]:
                    present[name].copy_(self.tensors[tied.get(name, name)])
                path = "blocks.1.q" if self.method in LINEAR_METHODS else "layer"
                method = LoRA if self.method in LINEAR_METHODS else self.method
                adapt(model, path.replace(".", r"\."), method, name="third")
                perturb(model, seed=3)
            self.models[kind] = model, state(model)
        return self.models[kind]


def state(model):
    """Everything about a model: modules, their attributes, and the tensors with their flags."""
    modules = [(id(module), type(module), sorted(vars(module))) for module in model.modules()]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return modules, [(name, id(t), t.requires_grad, t.detach().clone()) for name, t in tensors]


def same(one, two):
    if one[0] != two[0] or len(one[1]) != len(two[1]):
        return False
    for (*facts, value), (*other_facts, other) in zip(one[1], two[1], strict=True):
        if facts != other_facts or not torch.equal(value, other):
            return False
    return True


# ---- a second reader, which trusts the file: the meaning of a file that loads


def read_naively(model, description, tensors):
    """Build what a description says by its classes alone, and set the tensors one by one."""
    owners = {}
    for path, names in description.get("split", {}).items():
        split(model, path, names)
    for entry in description["adapters"]:
        for path in entry["layers"]:
            layers = named_layers(model)
            layer = layers[path]
            for position, wrapper in enumerate(entry["nest"]):
                layer = PARAMETERIZATIONS[wrapper["class"]](layer, **wrapper["init_args"])
                layer.name = wrapper["name"]
                owners[f"{path}.{position}"] = layer.eval()
            parent, _, last = path.rpartition(".")
            setattr_of(named_layers(model)[parent], last, layer)
    tied = description["tied"]
    with torch.no_grad():
        for key in [*tensors, *tied]:
            value = tensors[tied.get(key, key)]
            prefix = next((p for p in owners if key.startswith(f"{p}.")), None)
            if prefix is None:
                target = dict([*model.named_parameters(), *model.named_buffers()])[key]
                target.copy_(value)
                continue
            path, _, name = key.removeprefix(f"{prefix}.").rpartition(".")
            owner = owners[prefix].get_submodule(path)
            present = getattr(owner, name)
            present.data = value.to(present.dtype)
    for wrapper in owners.values():
        wrapper.renew()
    return model


def split(model, path, names):
    from adaptrank.layers import Parts

    parent, _, last = path.rpartition(".")
    layer = named_layers(model)[path]
    setattr_of(named_layers(model)[parent], last, Parts(layer, names))


def setattr_of(owner, name, value):
    if isinstance(owner, nn.ModuleDict | nn.ModuleList):
        owner._modules[name] = value
    else:
        setattr(owner, name, value)


# ---- what is done to a file by accident


def bytes_flipped(subject, draw):
    data = bytearray(subject.content)
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def header_flipped(subject, draw):
    """Positions where a flip most often leaves a valid header."""
    data = bytearray(subject.content)
    size = int.from_bytes(data[:8], "little")
    data[8 + draw.randrange(size)] = draw.choice(b'0123456789abcxyz",:{}[]_. ')
    return bytes(data)


def cut_short(subject, draw):
    return subject.content[: draw.randrange(len(subject.content))]


def made_longer(subject, draw):
    return subject.content + draw.randbytes(draw.randint(1, 64))


def header_size_changed(subject, draw):
    size = draw.choice([0, 1, 2**25 + 1, 2**31, 2**63, len(subject.content)])
    return size.to_bytes(8, "little") + subject.content[8:]


def untouched(subject, draw):
    return subject.content


# ---- what is done to a file on purpose, always with a valid digest


def entries(description):
    return description["adapters"]


def any_key(draw, tensors):
    return draw.choice(sorted(tensors))


def names_changed(subject, draw, description, tensors):
    entry = draw.choice(entries(description))
    wrapper = draw.choice(entry["nest"])
    how = draw.randrange(5)
    if how == 0:
        wrapper["name"] = draw.choice(["", "default", "second", "third", "x" * 5000, "a\nb", 7])
    elif how == 1:
        wrapper["class"] = draw.choice([*PARAMETERIZATIONS, "Parameterization", "os.system", ""])
    elif how == 2:
        path = draw.choice(sorted(entry["layers"]))
        paths = ["", "head", ".*", "(", "blocks.0", "blocks.1.c_attn", "layer", f"{path}.base"]
        entry["layers"][draw.choice(paths)] = entry["layers"].pop(path)
    elif how == 3:
        one, two = any_key(draw, tensors), any_key(draw, tensors)
        tensors[one], tensors[two] = tensors[two], tensors[one]
    else:
        names = ["x", "head.weight", "mean", "first.0.A", "", "blocks.0.q.weight", "a\nb"]
        tensors[draw.choice(names)] = tensors.pop(any_key(draw, tensors))


def counts_changed(subject, draw, description, tensors):
    count = draw.choice([0, 1, 3, -1, True, "8", 8.5, 10**6, 10**12, 10**400, float("nan")])
    entry = draw.choice(entries(description))
    how = draw.randrange(5)
    if how == 0 and description["ranks"]:
        description["ranks"][draw.choice(sorted(description["ranks"]))] = count
    elif how == 1:
        description["base"]["num_labels"] = count
    elif how == 2 and (arguments := draw.choice(entry["nest"])["init_args"]):
        arguments[draw.choice(sorted(arguments))] = count
    elif how == 3:
        path = draw.choice(sorted(entry["layers"]))
        entry["layers"][path] = draw.choice([[24, 48], [48, 24], [], [count, count], count])
    else:
        description["format_version"] = count


def ties_changed(subject, draw, description, tensors):
    one, two = any_key(draw, tensors), any_key(draw, tensors)
    alike = [key for key in sorted(tensors) if key.rpartition(".")[2] == one.rpartition(".")[2]]
    how = draw.randrange(6)
    if how == 0:
        description["tied"][one] = two
    elif how == 1:
        description["tied"][one] = draw.choice([one, "x", "head.weight", 7])
    elif how == 2:
        description["tied"][one] = two
        tensors.pop(one)
    elif how == 3:
        description["tied"] |= {one: two, two: one}
    elif how == 4 and len(alike) > 1:
        # A tie of two tensors of one kind, as a method could have made it.
        first, second = draw.sample(alike, 2)
        description["tied"][second] = first
        tensors.pop(second)
    elif description["tied"]:
        key = draw.choice(sorted(description["tied"]))
        owner = description["tied"].pop(key)
        if draw.random() < 0.5:
            tensors[key] = tensors[owner].clone() + 1


def splits_changed(subject, draw, description, tensors):
    table = description.setdefault("split", {})
    paths = ["head", "blocks.0.q", "blocks.0.c_attn", "blocks.1.c_attn", "layer", "", "x", ".*"]
    names = [
        ["q", "k", "v"], ["q", "k"], ["q"], ["forward", "weight", "bias"], ["q", "q", "q"], [],
        ["k", "v", "q"], [f"p{i}" for i in range(65)], [f"p{i}" for i in range(24)], "qkv",
        ["names", "plain", "training"], ["q.A", "k", "v"], [None, 1, "v"],
    ]  # fmt: skip
    if table and draw.random() < 0.3:
        table.pop(draw.choice(sorted(table)))
    else:
        table[draw.choice(paths)] = draw.choice(names)


def nests_changed(subject, draw, description, tensors):
    entry = draw.choice(entries(description))
    nest = entry["nest"]
    wrapper = copy.deepcopy(draw.choice(nest))
    how = draw.randrange(8)
    if how == 0:
        nest.insert(draw.randrange(len(nest) + 1), wrapper)
    elif how == 1:
        nest.remove(draw.choice(nest))
    elif how == 2:
        nest.reverse()
    elif how == 3:
        nest.extend(copy.deepcopy(wrapper) for _ in range(draw.choice([16, 40, 3000])))
    elif how == 4:
        nest.extend({**wrapper, "name": f"n{i}"} for i in range(draw.choice([20, 5000])))
    elif how == 5:
        nest.extend([{**wrapper, "name": "between"}, copy.deepcopy(nest[0])])
    elif how == 6:
        entries(description).append(copy.deepcopy(entry))
    else:
        # One more adapter that is whole.
        nest.append({**copy.deepcopy(nest[-1]), "name": "more"})
        for path in entry["layers"]:
            last = f"{path}.{len(nest) - 2}."
            for key in [key for key in tensors if key.startswith(last)]:
                name = key.removeprefix(last)
                tensors[f"{path}.{len(nest) - 1}.{name}"] = tensors[key].clone()


def indices_changed(subject, draw, description, tensors):
    whole = [key for key in sorted(tensors) if not tensors[key].is_floating_point()]
    if not whole:
        return tensors_changed(subject, draw, description, tensors)
    key = draw.choice(whole)
    value = tensors[key].clone()
    how = draw.randrange(5)
    if how == 0:
        value.view(-1)[draw.randrange(value.numel())] = draw.choice(
            [-1, 24, 48, 31, 10**6, -(2**63), 2**62, 2**63 - 1]
        )
    elif how == 1:
        value = value.to(draw.choice([torch.int32, torch.uint8, torch.bool, torch.float32]))
    elif how == 2:
        value = value.flatten()[torch.randperm(value.numel())].view(value.shape)
    elif how == 3:
        value = torch.full_like(value, draw.choice([0, 1, 23]))
    else:
        value = value.flatten()[:-1].clone()
    tensors[key] = value
    return None


def undeclared_added(subject, draw, description, tensors):
    base = dict([*subject.base.named_parameters(), *subject.base.named_buffers()])
    name = draw.choice(sorted(base))
    how = draw.randrange(6)
    if how == 0:
        tensors[name] = torch.zeros_like(base[name])
    elif how == 1:
        description["trained_modules"].append(name)
    elif how == 2:
        tensors[name] = torch.zeros_like(base[name])
        if name not in description["trained_modules"]:
            description["trained_modules"].append(name)
    elif how == 3:
        tensors[draw.choice(["blocks.1.q.2.A", "blocks.1.q.base.weight", "x"])] = torch.zeros(3)
    elif how == 4:
        dropped = draw.choice(description["trained_modules"])
        description["trained_modules"].remove(dropped)
        if draw.random() < 0.5:
            tensors.pop(dropped, None)
    else:
        description["trained_modules"] = draw.choice(HOSTILE)


def patterns_changed(subject, draw, description, tensors):
    pattern = draw.choice(
        ["(a+)+$", ".*", "(.*.*)*", "[", "\\", "^" * 900, "(?:" * 500, "a" * 9999]
    )
    how = draw.randrange(4)
    if how == 0:
        layers = draw.choice(entries(description))["layers"]
        layers[pattern] = layers.pop(draw.choice(sorted(layers)))
    elif how == 1:
        description["pruned"] = {draw.choice([f"{pattern}:heads", "blocks.0:channels", ":"]): [0]}
    elif how == 2:
        description["ranks"][f"{pattern}:rank"] = 8
    else:
        description["base"][draw.choice(["name", "source", "auto_class", "fingerprint"])] = pattern


def places(value, at=()):
    yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield from places(value[i], (*at, i))


def description_changed(subject, draw, description, tensors):
    """Change anything to anything."""
    *way, last = draw.choice([at for at in places(description) if at])
    owner = description
    for step in way:
        owner = owner[step]
    how = draw.randrange(3)
    if how == 0:
        del owner[last]
    elif how == 1 and isinstance(owner, dict):
        owner[draw.choice(["", "first", "x", "rank", "../x"])] = owner.pop(last)
    else:
        owner[last] = copy.deepcopy(draw.choice(HOSTILE))


def tensors_changed(subject, draw, description, tensors):
    key = any_key(draw, tensors)
    t = tensors[key]
    how = draw.randrange(7)
    if how == 0:
        del tensors[key]
    elif how == 1:
        tensors[key] = t.reshape(-1)
    elif how == 2:
        shape = [max(0, n + draw.choice([-1, 1, 3])) for n in t.shape]
        tensors[key] = torch.zeros(shape, dtype=t.dtype)
    elif how == 3:
        dtypes = [torch.int64, torch.float16, torch.bool, torch.float64, torch.uint8]
        tensors[key] = t.to(draw.choice([*dtypes, torch.complex64, torch.float8_e4m3fn]))
    elif how == 4 and t.is_floating_point():
        tensors[key] = t * draw.choice([float("nan"), float("inf"), 1e30, -1.0])
    elif how == 5:
        tensors[key] = t.new_zeros(0, *t.shape[1:])
    else:
        tensors[f"{key}.more"] = torch.zeros(3)


def units_dropped(subject, draw, description, tensors):
    """Drop units of one axis in all its tensors, as an allocator does, so that the file is good.

    An axis may lose all of them.
    """
    if not description["ranks"]:
        return
    key = draw.choice(sorted(description["ranks"]))
    model = subject.target("same")[0]
    from adaptrank.axes import rank_axes

    axis = rank_axes(model)[key]
    keep = draw.choice([0, draw.randint(0, len(axis))])
    prefixes = {}
    for path, layer in wrapped_layers(model).items():
        for position, wrapper in enumerate(layer.nest):
            prefixes[id(wrapper)] = f"{path}.{position}"
    for wrapper, name in axis.members:
        for tensor, dim in wrapper.axis_tensors(name):
            stored = f"{prefixes[id(wrapper)]}.{tensor}"
            if stored in tensors:
                tensors[stored] = tensors[stored].narrow(dim, 0, keep).clone()
    description["ranks"][key] = keep


def text_changed(subject, draw, description, tensors):
    """JSON that no writer of JSON would write."""
    text = json.dumps(description)
    how = draw.randrange(5)
    if how == 0:
        return text.replace("{", '{"format_version": 1, ', 1)
    if how == 1:
        return text.replace(
            ": ", f": {draw.choice(['NaN', '-Infinity', '1e999', '9' * 5000])}, ", 1
        )
    if how == 2:
        return "[" * 100_000
    if how == 3:
        return text.replace('"default"', f'"default", "x": {"9" * draw.choice([30, 400, 5000])}')
    return text[: draw.randrange(len(text))]


BY_ACCIDENT = [
    bytes_flipped, header_flipped, cut_short, made_longer, header_size_changed, untouched,
]  # fmt: skip
ON_PURPOSE = [
    names_changed, counts_changed, ties_changed, splits_changed, nests_changed, indices_changed,
    undeclared_added, patterns_changed, description_changed, tensors_changed, units_dropped,
    text_changed,
]  # fmt: skip


def written(subject, changes, draw, file):
    """Write a changed file with a valid digest, and return what it says, or None if none can."""
    description, tensors = copy.deepcopy(subject.description), dict(subject.tensors)
    text = None
    for change in changes:
        try:
            text = change(subject, draw, description, tensors) or text
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError):
            # The change before has taken away what this one would change.
            continue
    try:
        description["digest"] = digest_of(description, tensors)
        text = json.dumps(description) if text is None else text
        contiguous = {
            key: t.clone(memory_format=torch.contiguous_format) for key, t in tensors.items()
        }
        save_file(contiguous, file, metadata={"adaptrank": text})
    except Exception:
        file.write_bytes(b"{}")
        return None
    return description, tensors


def refusal(model, folder):
    try:
        load_adapter(model, folder)
    except Exception as error:
        return error


def check_refused(error, model, before, what):
    assert isinstance(error, UserError | FileNotFoundError), what
    sentence = str(error).strip()
    assert sentence, what
    assert sentence.isprintable(), what
    assert len(sentence) < 2500, what
    assert same(state(model), before), what


def renamed(subject, description):
    """Return whether a file has adapters beside those that a model with the good file carries."""
    return adapter_names(description) != adapter_names(subject.description)


def check_loaded(subject, kind, model, meaning, what):
    """Check that a model that was loaded computes what the file says, and nothing else changed."""
    if kind == "other" or (kind == "same" and meaning and renamed(subject, meaning[0])):
        # Two adapters make one output.
        return
    if meaning is None:
        assert torch.equal(subject.output(model), subject.want), what
        return
    description, tensors = meaning
    if kind == "same":
        # A layer that is split in the model already need not be split by the file.
        splits = {**subject.description["split"], **description.get("split", {})}
        description = {**description, "split": splits}
    naive = copy.deepcopy(subject.base)
    if kind == "same":
        with torch.no_grad():
            for name in subject.description["trained_modules"]:
                naive.get_parameter(name).copy_(subject.tensors[name])
    naive = read_naively(naive, description, tensors)
    torch.testing.assert_close(
        subject.output(model), subject.output(naive), rtol=1e-4, atol=1e-5, equal_nan=True, msg=what
    )


def try_folders(folder, methods, count, seed):
    """Change files of these methods, load each, and check what comes out."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    subjects = []
    for method in methods:
        (folder / method.__name__).mkdir(parents=True)
        subjects.append(Subject(method, folder / method.__name__))
    changed = folder / "changed"
    changed.mkdir()
    file = changed / WEIGHTS
    outcomes, slowest = Counter(), (0.0, "")
    present = forget_peak()
    for number in range(count):
        subject = subjects[number % len(subjects)]
        kind = draw.choices(["bare", "same", "other"], [6, 3, 1])[0]
        if draw.random() < 0.15:
            change = draw.choice(BY_ACCIDENT)
            file.write_bytes(change(subject, draw))
            meaning = None
        else:
            change = draw.choice(ON_PURPOSE)
            more = [draw.choice(ON_PURPOSE)] if draw.random() < 0.2 else []
            meaning = written(subject, [change, *more], draw, file)
        model, before = subject.target(kind)
        started = time.process_time()
        error = refusal(model, changed)
        seconds = time.process_time() - started
        outcome = "loaded" if error is None else "refused"
        what = f"{number}: {subject.method.__name__}, {change.__name__}, {kind}: {error!r}"
        outcomes[change.__name__, outcome] += 1
        slowest = max(slowest, (seconds, what[:120]))
        assert seconds < SECONDS, what
        if error is None:
            check_loaded(subject, kind, model, meaning, what)
            subject.models.pop(kind)
        else:
            check_refused(error, model, before, what)
    taken = memory_of("VmHWM") - present
    assert taken < BYTES, f"{taken:,} bytes above the model"
    report(outcomes, slowest, taken)
    assert {kind for kind, _ in outcomes} >= {change.__name__ for change in ON_PURPOSE}
    assert outcomes["untouched", "loaded"]
    assert not outcomes["untouched", "refused"]
    # A good file that was written anew loads, or the digest of this test would be wrong.
    assert outcomes["units_dropped", "loaded"]


def memory_of(key):
    """Return a size of this process in bytes: VmRSS is that of now, VmHWM the largest so far."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", text)[1])


def forget_peak():
    """Let VmHWM begin anew, and return the present size in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_of("VmRSS")


def report(outcomes, slowest, taken):
    for kind in sorted({kind for kind, _ in outcomes}):
        loaded, refused = outcomes[kind, "loaded"], outcomes[kind, "refused"]
        print(f"{kind:20} {loaded:5} loaded {refused:5} refused")
    print(f"slowest {slowest[0]:.2f} s ({slowest[1]}), {taken / 2**20:.0f} MiB above the model")


@pytest.mark.parametrize("share", range(SHARES))
def test_each_loads_equal_or_is_refused_in_one_sentence(tmp_path, share):
    try_folders(tmp_path, METHODS[share::SHARES], EACH, share)


@pytest.mark.tables
@pytest.mark.parametrize("share", range(SHARES))
def test_ten_thousand_folders(tmp_path, share):
    try_folders(tmp_path, METHODS[share::SHARES], EACH_OF_MANY, 100 + share)


# ---- things in the place of a file


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save_adapter(adapted(LoRA), folder)
    return folder


@pytest.mark.parametrize("thing", ["link", "folder", "nothing", "archive", "garbled configuration"])
def test_something_else_in_the_place_of_the_file(good, tmp_path, thing):
    folder = tmp_path / "a"
    shutil.copytree(good, folder)
    file = folder / WEIGHTS
    if thing == "garbled configuration":
        # The header decides. The configuration is for people.
        (folder / CONFIG).write_bytes(b"\x00{{")
        load_adapter(base_of(LoRA), folder)
        return
    file.unlink()
    if thing == "link":
        file.symlink_to(good / WEIGHTS)
    elif thing == "folder":
        file.mkdir()
    elif thing == "archive":
        shutil.make_archive(str(tmp_path / "archive"), "zip", good)
        shutil.move(tmp_path / "archive.zip", file)
    model = base_of(LoRA)
    before = state(model)
    check_refused(refusal(model, folder), model, before, thing)


def test_a_write_that_is_killed_leaves_the_old_file_or_the_new(good, tmp_path):
    """A file is written under a temporary name and renamed: no adapter is ever half-written."""
    shutil.copytree(good, tmp_path / "a")
    (tmp_path / "a" / f".{WEIGHTS}.123.new").write_bytes(b"half")
    loaded, again = (load_adapter(base_of(LoRA), folder) for folder in (tmp_path / "a", good))
    assert torch.equal(loaded.blocks[1]["q"].A, again.blocks[1]["q"].A)


class Large(nn.Sequential):
    """A model whose adapter takes some time to write."""

    def __init__(self):
        super().__init__(*(nn.Linear(512, 512, bias=False) for _ in range(2)))


def save_until_killed(folder, parent):
    """Save an adapter again and again. All numbers of one save are equal."""
    model = adapt(Large(), "all-linear", partial(LoRA, rank=64))
    value = 0
    while os.getppid() == parent:
        value += 1
        for layer in model:
            layer.A.data.fill_(value)
            layer.B.data.fill_(value)
        save_adapter(model, folder)


@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.15])
def test_a_process_killed_in_the_middle_of_saving_never_leaves_a_file_that_loads_wrong(
    seconds, tmp_path
):
    arguments = (tmp_path, os.getpid())
    process = multiprocessing.get_context("fork").Process(target=save_until_killed, args=arguments)
    process.start()
    while not (tmp_path / WEIGHTS).exists() and process.is_alive():
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    model = load_adapter(Large(), tmp_path)
    numbers = {float(edge) for layer in model for t in (layer.A, layer.B) for edge in t.aminmax()}
    assert len(numbers) == 1, "all of one save"
