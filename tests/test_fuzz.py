"""Adapters from strangers: 2,000 folders, each changed at random.

Each folder loads equal, or is refused in one sentence and leaves the model as it was.
"""

import copy
import json
import os
import random
import shutil
from collections import Counter
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from adaptrank import adapt, load_adapter, save_adapter
from adaptrank._errors import UserError
from adaptrank.artifacts import read_adapter
from adaptrank.artifacts.header import digest_of
from adaptrank.parameterizations import DoRA, HyperAdapt, LoRA, MELoRA, PiCa, Prefix, SBoRA  # noqa: F401
from adaptrank.testing import perturb

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SHARES, EACH = 4, 500
HOSTILE = [
    None, True, -1, 0, 7, 10**6, 10**12, -(10**30), 1.5, 1e308, float("nan"), "", "x" * 5000,
    "../../etc/passwd", "/dev/zero", "__class__", ".*", "(", "\x00", [], {}, [[]], [None],
    {"": None}, {"class": "LoRA"}, "LoRA", "Prefix", "os.system", [1, 2], ["q", "k"], "lora.0",
]  # fmt: skip


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.third(torch.tanh(self.second(torch.tanh(self.first(x))))))


def made():
    model = Base()
    adapt(model, "first", [HyperAdapt, partial(LoRA, rank=2)], train_modules=["head"])
    adapt(model, "second", partial(MELoRA, minis=2))
    adapt(model, "third", partial(SBoRA, rank=2))
    perturb(model)
    return model


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save_adapter(made(), folder, {"name": "tiny", "source": "here"})
    other = Base()
    adapt(other, "second|third", DoRA)
    perturb(other)
    save_adapter(other, folder / "other", {"name": "tiny"})
    return folder


# ---- what is done to a folder


def bytes_flipped(folder, draw):
    data = bytearray((folder / WEIGHTS).read_bytes())
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    (folder / WEIGHTS).write_bytes(data)


def header_flipped(folder, draw):
    """Positions where a flip most often leaves a valid header."""
    data = bytearray((folder / WEIGHTS).read_bytes())
    size = int.from_bytes(data[:8], "little")
    data[8 + draw.randrange(size)] = draw.choice(b'0123456789abcxyz",:{}[]_. ')
    (folder / WEIGHTS).write_bytes(data)


def cut_short(folder, draw):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: draw.randrange(len(data))])


def made_longer(folder, draw):
    with (folder / WEIGHTS).open("ab") as file:
        file.write(draw.randbytes(draw.randint(1, 64)))


def configuration_garbled(folder, draw):
    (folder / CONFIG).write_bytes(draw.randbytes(40))


def other_weights(folder, draw):
    """Tensors of one file under the description of another."""
    description = read_adapter(folder)
    save_file(
        load_file(folder / "other" / WEIGHTS),
        folder / WEIGHTS,
        metadata={"adaptrank": json.dumps(description)},
    )


def something_else(folder, draw):
    file = folder / WEIGHTS
    how = draw.randrange(4)
    if how == 0:
        file.unlink()
        file.symlink_to(folder / "other" / WEIGHTS)
    elif how == 1:
        file.unlink()
        file.mkdir()
    elif how == 2:
        file.write_bytes(b"")
    else:
        shutil.make_archive(str(folder / "adapter"), "zip", folder / "other")
        shutil.move(folder / "adapter.zip", file)


def places(value, at=()):
    yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield from places(value[i], (*at, i))


def description_changed(folder, draw):
    """Change a file like someone who knows the format and computes the digest anew."""
    tensors, description = load_file(folder / WEIGHTS), read_adapter(folder)
    for _ in range(draw.randint(1, 2)):
        *way, last = draw.choice([at for at in places(description) if at])
        owner = description
        try:
            for step in way:
                owner = owner[step]
            how = draw.randrange(3)
            if how == 0:
                del owner[last]
            elif how == 1 and isinstance(owner, dict):
                owner[draw.choice(["", "first", "x", "rank", "../x"])] = owner.pop(last)
            else:
                owner[last] = copy.deepcopy(draw.choice(HOSTILE))
        except (KeyError, IndexError, TypeError):
            continue
    written(folder, tensors, description)


def tensors_changed(folder, draw):
    tensors, description = load_file(folder / WEIGHTS), read_adapter(folder)
    key = draw.choice(sorted(tensors))
    t = tensors[key]
    how = draw.randrange(7)
    if how == 0:
        del tensors[key]
    elif how == 1:
        tensors[draw.choice(["x", f"{key}x", "first.0.A", ""])] = tensors.pop(key)
    elif how == 2:
        tensors[key] = t.reshape(-1)
    elif how == 3:
        tensors[key] = torch.zeros(
            [max(0, n + draw.choice([-1, 1, 3])) for n in t.shape], dtype=t.dtype
        )
    elif how == 4:
        tensors[key] = t.to(
            draw.choice([torch.int64, torch.float16, torch.bool, torch.float64, torch.uint8])
        )
    elif how == 5:
        tensors[key] = (
            torch.full_like(t, draw.choice([-1, 10**9]))
            if not t.is_floating_point()
            else t * float("nan")
        )
    else:
        tensors[f"{key}.more"] = torch.zeros(3)
    written(folder, tensors, description)


def written(folder, tensors, description):
    try:
        description["digest"] = digest_of(description, tensors)
        save_file(
            {k: t.contiguous() for k, t in tensors.items()},
            folder / WEIGHTS,
            metadata={"adaptrank": json.dumps(description)},
        )
    except Exception:  # what no writer can write
        (folder / WEIGHTS).write_bytes(b"{}")


BY_ACCIDENT = [
    bytes_flipped,
    header_flipped,
    cut_short,
    made_longer,
    configuration_garbled,
    other_weights,
    something_else,
]
ON_PURPOSE = [description_changed, tensors_changed]


def state(model):
    return [(name, p.clone(), p.requires_grad) for name, p in model.named_parameters()], [
        type(m) for m in model.modules()
    ]


def same(one, two):
    (parameters, kinds), (others, their_kinds) = one, two
    return kinds == their_kinds and all(
        a == c and torch.equal(b, d) and e == f
        for (a, b, e), (c, d, f) in zip(parameters, others, strict=True)
    )


def refusal(model, folder):
    try:
        load_adapter(model, folder)
    except Exception as error:
        return error


@pytest.mark.parametrize("share", range(SHARES))
def test_each_loads_equal_or_is_refused_in_one_sentence(good, tmp_path, share):
    draw = random.Random(share)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    want = made()(x)
    outcomes = Counter()
    for number in range(EACH):
        change = draw.choice([*BY_ACCIDENT, *3 * ON_PURPOSE])
        folder = tmp_path / str(number)
        shutil.copytree(good, folder)
        change(folder, draw)
        model = Base()
        before = state(model)
        error = refusal(model, folder)
        what = f"{number}, {change.__name__}: {error!r}"
        outcomes[change.__name__, "loaded" if error is None else "refused"] += 1
        assert error is None or type(error) in (UserError, FileNotFoundError), what
        if error is not None:
            assert str(error).strip(), what
            assert "\n" not in str(error).strip(), what
            assert same(state(model), before), what
        elif change in BY_ACCIDENT:
            assert torch.equal(model(x), want), what
        shutil.rmtree(folder)
    assert sum(outcomes.values()) == EACH
    assert outcomes["configuration_garbled", "loaded"] == sum(
        n for (name, _), n in outcomes.items() if name == "configuration_garbled"
    )
    print(dict(outcomes))


def test_a_write_that_is_killed_leaves_the_old_file_or_the_new(good, tmp_path):
    """A file is written under a temporary name and renamed: no adapter is ever half-written."""
    shutil.copytree(good, tmp_path / "a")
    (tmp_path / "a" / f".{WEIGHTS}.123").write_bytes(b"half")
    assert torch.equal(
        load_adapter(Base(), tmp_path / "a").first.A, load_adapter(Base(), good).first.A
    )
    with safe_open(good / WEIGHTS, framework="pt") as stored:
        assert "digest" in json.loads(stored.metadata()["adaptrank"])


def test_a_process_killed_in_the_middle_of_saving_never_leaves_a_file_that_loads_wrong(tmp_path):
    import signal
    import subprocess
    import sys
    import time

    script = """
import sys, torch
from torch import nn
from adaptrank import adapt, save_adapter
from adaptrank.parameterizations.lora import LoRA
model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False))
adapt(model, "all-linear", lambda layer: LoRA(layer, rank=64))
print("ready", flush=True)
value = 0
while True:
    value += 1
    for layer in model:
        layer.A.data.fill_(value), layer.B.data.fill_(value)
    save_adapter(model, sys.argv[1])
"""
    whole = 0
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline().strip() == "ready"
        time.sleep(0.05 + 0.05 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if not (tmp_path / WEIGHTS).exists():
            continue
        model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False))
        load_adapter(model, tmp_path)
        values = {
            float(t)
            for layer in model
            for t in (layer.A.min(), layer.A.max(), layer.B.min(), layer.B.max())
        }
        assert len(values) == 1, "all of one save"
        whole += 1
    assert whole
