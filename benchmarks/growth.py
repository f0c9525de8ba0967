"""Growth of the cost with size, and its prediction for models that are too large to try here.

    python benchmarks/growth.py [--rounds 5] [--curves layers width rank tokens adapted ...]

Every curve changes one size of a Llama of SmolLM2's shapes in bf16, with random weights and without
a head. At each point it measures, in interleaved rounds, a step of the frozen floor (forward and
backward through the activations), and whole steps of LoRA and of HyperAdapt. It also measures the
bytes that the forward pass keeps for the backward pass. "Own" is what an adapter adds to the floor.
The exponent of a curve is the slope of a straight line through the logarithms.

- layers: 6 to 30. width: 256 to 4096, with 2 layers and an MLP 4 times as wide. rank: 1 to 64.
  tokens: 64 to 1024 in one row.
- adapted: 7 to 56 of the linear layers of 8 blocks. adapters: 1 to 8 nested LoRAs of rank 8.
- processes: 1 and 2 processes of one thread each, with a batch of the same size for each. Gradients
  are averaged by `average_gradients`.

Predictions: one block of the true shapes is built, the bytes it keeps for 256 tokens are measured,
and multiplied. Parameters, gradients and optimizer state come from `python -m adaptrank plan`
(`artifacts.planning`), on the meta device. Attention keeps what PyTorch's flash attention keeps.
The predictions are compared with published figures where there are some.

The script writes benchmarks/results/growth.json and docs/results/growth.md.
"""

import argparse
import gc
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import common
import torch
import torch.distributed as dist
from torch import Tensor, nn

from adaptrank import PARAMETERIZATIONS, adapt, testing
from adaptrank.artifacts import planning
from adaptrank.parameterizations import Parameterization
from adaptrank.training.distributed import average_gradients

RANK = 8


def llama(
    layers: int, width: int = 576, dtype: torch.dtype = torch.bfloat16, **more: Any
) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    heads = max(width // 64, 1)
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 3 if heads % 3 == 0 else heads // 4 or 1,
    }
    inside = 1536 if width == 576 else 4 * width
    known = {
        "hidden_size": width,
        "intermediate_size": inside,
        "vocab_size": 64,
        "use_cache": False,
        **sizes,
        **more,
    }
    return (
        LlamaModel(LlamaConfig(num_hidden_layers=layers, **known)).to(dtype).requires_grad_(False)
    )


def lora(rank: int = RANK) -> Callable[[nn.Module], Parameterization]:
    return partial(PARAMETERIZATIONS["LoRA"], rank=rank)


def perturbed(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Parameterization):
            testing.perturb(module, std=0.01)
    return model


def inputs(model: nn.Module, rows: int, tokens: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    width = model.config.hidden_size
    x = torch.randn(rows, tokens, width, generator=random)
    return x.to(torch.bfloat16).requires_grad_()


def step(
    model: nn.Module, x: Tensor, after_backward: Callable[[], object] = lambda: None
) -> Callable[[], float]:
    def loss() -> Tensor:
        x.grad = None
        return model(inputs_embeds=x).last_hidden_state.square().mean()

    return common.step(model, loss, after_backward)


def kept(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward pass keeps for the backward pass.

    The input is included. The tensors of the model are not.
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        output = model(inputs_embeds=x).last_hidden_state
    del output
    return sum(found.values())


# ---- curves: (size, {name: (model, input)})

Points = Iterator[tuple[int, dict[str, tuple[nn.Module, Tensor]]]]


def three(
    build: Callable[[], nn.Module], rows: int, tokens: int
) -> dict[str, tuple[nn.Module, Tensor]]:
    models = {
        "floor": build(),
        "LoRA": perturbed(adapt(build(), "all-linear", lora())),
        "HyperAdapt": perturbed(adapt(build(), "all-linear", PARAMETERIZATIONS["HyperAdapt"])),
    }
    return {name: (model, inputs(model, rows, tokens)) for name, model in models.items()}


def layers() -> Points:
    for count in (6, 12, 18, 30):
        yield count, three(partial(llama, count), 4, 64)


def width() -> Points:
    for size in (256, 512, 1024, 2048, 4096):
        yield size, three(partial(llama, 2, size), 4, 64)


def rank() -> Points:
    base = llama(8)
    x = inputs(base, 4, 128)
    for size in (1, 2, 4, 8, 16, 32, 64):
        yield (
            size,
            {"floor": (base, x), "LoRA": (perturbed(adapt(llama(8), "all-linear", lora(size))), x)},
        )


def tokens() -> Points:
    for count in (64, 128, 256, 512, 1024):
        yield count, three(partial(llama, 8), 1, count)


def adapted() -> Points:
    for blocks in (1, 2, 4, 8):
        base = llama(8)
        x = inputs(base, 4, 128)
        targets = rf"layers\.[{8 - blocks}-7]\..*_proj"
        some = {
            name: perturbed(adapt(llama(8), targets, method))
            for name, method in (("LoRA", lora()), ("HyperAdapt", PARAMETERIZATIONS["HyperAdapt"]))
        }
        yield 7 * blocks, {name: (model, x) for name, model in {"floor": base, **some}.items()}


def adapters() -> Points:
    for count in (1, 2, 4, 8):
        base, model = llama(8), llama(8)
        for number in range(count):
            adapt(model, "all-linear", lora(), name=f"a{number}")
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, Parameterization):
                for _, parameter in module.own_parameters():
                    parameter.requires_grad_(True)
        x = inputs(base, 4, 128)
        yield count, {"floor": (base, x), "LoRA": (perturbed(model), x)}


CURVES: dict[str, Callable[[], Points]] = {
    "layers": layers,
    "width": width,
    "rank": rank,
    "tokens": tokens,
    "adapted": adapted,
    "adapters": adapters,
}


def measure(curve: Callable[[], Points], rounds: int) -> dict[str, Any]:
    points = []
    for size, models in curve():
        seconds = common.interleaved({name: step(*pair) for name, pair in models.items()}, rounds)
        bytes_ = {name: kept(*pair) for name, pair in models.items()}
        point: dict[str, Any] = {"size": size, "ms": {}, "own_ms": {}, "MiB": {}, "own_MiB": {}}
        for name in models:
            point["ms"][name] = common.quartiles([1000 * s for s in seconds[name]])
            point["MiB"][name] = round(bytes_[name] / 2**20, 3)
            if name != "floor":
                added = [
                    1000 * (a - b) for a, b in zip(seconds[name], seconds["floor"], strict=True)
                ]
                point["own_ms"][name] = common.quartiles(added)
                point["own_MiB"][name] = round((bytes_[name] - bytes_["floor"]) / 2**20, 3)
        points.append(point)
        del models
        gc.collect()
        print(
            size,
            {name: round(ms["median"], 1) for name, ms in point["ms"].items()},
            point["own_MiB"],
            flush=True,
        )
    sizes = [point["size"] for point in points]
    exponents = {
        what: {
            name: exponent(sizes, [median(p[what][name]) for p in points])
            for name in points[0][what]
        }
        for what in ("ms", "own_ms", "MiB", "own_MiB")
    }
    return {"points": points, "exponents": exponents}


def median(value: Any) -> float:
    return float(value["median"] if isinstance(value, dict) else value)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Return the slope of log(value) over log(size), or None where a value is not positive."""
    if min(values) <= 0:
        return None
    xs, ys = [math.log(s) for s in sizes], [math.log(v) for v in values]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum(
        (x - mx) ** 2 for x in xs
    )
    return round(slope, 2)


# ---- processes


def one_process(number: int, count: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{count}", rank=number, world_size=count
    )
    for name, method in (("LoRA", lora()), ("HyperAdapt", PARAMETERIZATIONS["HyperAdapt"])):
        model = perturbed(adapt(llama(8), "all-linear", method))
        trained = [p for p in model.parameters() if p.requires_grad]
        run = step(model, inputs(model, 4, 64), partial(average_gradients, trained))
        seconds = [run() for _ in range(rounds + 1)][1:]
        if number == 0:
            with open(f"{folder}/{count}-{name}", "w") as file:
                file.write(" ".join(map(str, seconds)))
    dist.destroy_process_group()


def processes(rounds: int) -> dict[str, Any]:
    """Return the time of a step in two processes over one, with a batch of its own for each."""
    import torch.multiprocessing as mp

    found: dict[str, Any] = {"LoRA": [], "HyperAdapt": []}
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            for count in (1, 2):
                mp.spawn(one_process, (count, rounds, folder), nprocs=count)
            for name, ratios in found.items():
                means = {}
                for count in (1, 2):
                    with open(f"{folder}/{count}-{name}") as file:
                        means[count] = common.quartiles([float(s) for s in file.read().split()])[
                            "median"
                        ]
                ratios.append(means[2] / means[1])
    return {name: common.quartiles(ratios) for name, ratios in found.items()}


# ---- predictions


def llama3(width: int, inside: int, count: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inside,
        "num_hidden_layers": count,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": tied,
    }


MODELS = {
    "3B": llama3(3072, 8192, 28, 24, True),
    "8B": llama3(4096, 14336, 32, 32, False),
    "70B": llama3(8192, 28672, 80, 64, False),
}
"""Llama 3's shapes."""

METHODS = ("HyperAdapt", "LoRA", "SVD", "DoRA", "LoKr", "MiSS", "SBoRA")
SEEN, TOKENS = 256, 4096

PUBLISHED = {
    "LoRA r=32": ("LoRA", {"rank": 32}, 9_175_040),
    "LoRA r=64": ("LoRA", {"rank": 64}, 18_350_080),
    "DoRA r=32": ("DoRA", {"rank": 32}, 9_289_728),
    "LoKr r=32, factor 4": ("LoKr", {"rank": 32, "factor": 4}, 2_294_656),
    "MiSS r=64": ("MiSS", {"rank": 64}, 7_340_032),
}
"""Trainable parameters on q_proj and v_proj of Llama-3.2-3B in HF PEFT's method comparison."""
BETWEEN_STEPS, FILE = 6_925_580_957.696, 36_715_216
"""Mean allocated bytes, and bytes of the adapter's file, of LoRA r=32 there (train_info)."""
MORE_RANK = 0.2
"""Peak of LoRA r=64 minus peak of LoRA r=32 there in GiB, both printed to 0.1."""


def block(sizes: Mapping[str, Any]) -> nn.Module:
    """One block of these shapes."""
    own = {**sizes, "vocab_size": 64}
    del own["num_hidden_layers"]
    return llama(1, own.pop("hidden_size"), **own)


def on_meta(
    sizes: Mapping[str, Any], targets: Any, method: Callable[[nn.Module], Parameterization]
) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16)
    return planning.footprint(adapt(model, targets, method), 2.0)


def predict(name: str) -> dict[str, Any]:
    sizes = MODELS[name]
    layers_, rows = sizes["num_hidden_layers"], {}
    model = block(sizes)
    x = inputs(model, 1, SEEN)
    floor = kept(model, x) / SEEN
    for method in METHODS:
        cls = PARAMETERIZATIONS[method]
        made = lora() if method == "LoRA" else cls
        one = perturbed(adapt(model, "all-linear", made))
        own = kept(one, x) / SEEN - floor
        for path, layer in [
            (p, m) for p, m in one.named_modules() if isinstance(m, Parameterization)
        ]:
            parent, _, last = path.rpartition(".")
            setattr(one.get_submodule(parent), last, layer.innermost)
        size = on_meta(sizes, "all-linear", made)
        rows[method] = {
            "trainable": size.trainable,
            "adapter": size.parameters + size.gradients,
            "optimizer": size.optimizer,
            "activations": own * layers_ * TOKENS,
            "frozen": size.frozen,
        }
        gc.collect()
        print(
            name,
            method,
            {key: round(value / 2**30, 2) for key, value in rows[method].items()},
            flush=True,
        )
    return {"floor": floor * layers_ * TOKENS, "methods": rows}


def against_published() -> list[list[str]]:
    rows, found = [], {}
    for label, (method, arguments, count) in PUBLISHED.items():
        found[label] = on_meta(
            MODELS["3B"], ["q_proj", "v_proj"], partial(PARAMETERIZATIONS[method], **arguments)
        )
        ours = found[label].trainable
        rows.append(
            [f"{label}, trainable numbers", f"{ours:,}", f"{count:,}", f"{ours / count:.3f}"]
        )
    lora_ = found["LoRA r=32"]
    between = lora_.frozen + lora_.parameters + lora_.optimizer
    more = sum(
        getattr(found["LoRA r=64"], k) - getattr(lora_, k)
        for k in ("parameters", "gradients", "optimizer")
    )
    rows += [
        [
            "LoRA r=32, bytes of the file",
            f"{lora_.file:,}",
            f"{FILE:,}",
            f"{lora_.file / FILE:.3f}",
        ],
        [
            "LoRA r=32, GiB between steps",
            f"{between / 2**30:.2f}",
            f"{BETWEEN_STEPS / 2**30:.2f}",
            f"{between / BETWEEN_STEPS:.3f}",
        ],
        [
            "LoRA r=64 above r=32, GiB",
            f"{more / 2**30:.2f}",
            f"{MORE_RANK}",
            f"{more / 2**30 / MORE_RANK:.2f}",
        ],
    ]
    return rows


# ---- the page

BYTES = ("frozen", "adapter", "optimizer", "activations")
WORDS = {
    "layers": "Layers of the model, 4 x 64 tokens",
    "width": "Width, 2 layers, 4 x 64 tokens",
    "rank": "Rank of LoRA on all 56 linear layers of 8 blocks, 4 x 128 tokens",
    "tokens": "Tokens in one row, 8 blocks",
    "adapted": "Adapted linear layers of 8 blocks, from the last one down, 4 x 128 tokens",
    "adapters": "LoRAs of rank 8, one around the other, on all 56 linear layers, 4 x 128 tokens",
}


def curve_section(name: str, found: Mapping[str, Any]) -> str:
    points, exponents = found["points"], found["exponents"]
    names = [n for n in points[0]["ms"] if n != "floor"]
    header = [
        name,
        "floor, ms",
        *(f"{n}, own ms" for n in names),
        "floor, MiB",
        *(f"{n}, own MiB" for n in names),
    ]
    rows = [
        [
            str(p["size"]),
            common.spread(p["ms"]["floor"]),
            *(common.spread(p["own_ms"][n]) for n in names),
            f"{p['MiB']['floor']:.1f}",
            *(f"{p['own_MiB'][n]:.2f}" for n in names),
        ]
        for p in points
    ]

    def cell(value: float | None) -> str:
        return "within noise" if value is None else f"{value:.2f}"

    last = [
        "exponent",
        cell(exponents["ms"]["floor"]),
        *(cell(exponents["own_ms"][n]) for n in names),
        cell(exponents["MiB"]["floor"]),
        *(cell(exponents["own_MiB"][n]) for n in names),
    ]
    return f"### {WORDS[name]}\n\n{common.table(header, [*rows, last])}"


def page(found: Mapping[str, Any]) -> str:
    parts = [
        "# How cost grows",
        common.paragraph(
            "This page is written by `python benchmarks/growth.py`, which explains every",
            "measurement. The tables show milliseconds of a step, and MiB kept for the backward",
            f"pass, in bf16. They are medians and quartiles of {found['rounds']} interleaved",
            "rounds.",
            '"Own" is what an adapter adds to the frozen floor, with its gradient and the step of',
            "the",
            "optimizer. Where this is small beside the floor, it is mostly noise. The last line of",
            "each table is the exponent: 1 is proportional, and 0 does not grow.",
        ),
        common.on(found["machine"]),
        "## Curves",
        *(curve_section(name, one) for name, one in found["curves"].items()),
        "### Processes",
        common.paragraph(
            "A step in two processes of one thread, over a step in one process of one thread, each",
            "with 4 x 64 tokens of its own. A ratio of 1 is perfect. The two processes share a",
            "memory bus here.",
        ),
        common.table(
            ["method", "ratio"], [[n, common.spread(r)] for n, r in found["processes"].items()]
        ),
        "## What it predicts",
        common.paragraph(
            f"GiB for Llama 3's shapes in bf16, with {TOKENS} tokens a step, all linear layers,",
            f"and rank {RANK} where there is a rank (LoKr has its default). There is no",
            "checkpointing. Activations are those of one block of the true shapes, measured and",
            "multiplied by the number of blocks. All other figures come from `python -m adaptrank",
            "plan`. Adapters, their gradients and Adam's moments are float32.",
        ),
    ]
    for name, one in found["predictions"].items():
        rows = [
            [
                method,
                f"{row['trainable']:,}",
                *(f"{row[k] / 2**30:.2f}" for k in ("adapter", "optimizer", "activations")),
                f"{(one['floor'] + sum(row[k] for k in BYTES)) / 2**30:.1f}",
            ]
            for method, row in one["methods"].items()
        ]
        frozen = next(iter(one["methods"].values()))["frozen"]
        parts += [
            f"### {name}",
            f"The frozen weights take {frozen / 2**30:.1f} GiB, and the activations of the frozen "
            f"model {one['floor'] / 2**30:.1f} GiB.",
            common.table(
                [
                    "method",
                    "trainable",
                    "parameters and gradients",
                    "optimizer",
                    "activations, own",
                    "all in all",
                ],
                rows,
            ),
        ]
    parts += [
        "### Against published figures",
        common.paragraph(
            "The published figures are those of HF PEFT's method comparison (MetaMathQA,",
            "Llama-3.2-3B in bf16, q_proj and v_proj). Its peaks include an evaluation that",
            "generates 50 answers at a time, and are not comparable. Its average between steps",
            "also contains the last logits.",
        ),
        common.table(["figure", "plan", "published", "ratio"], found["published"]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--curves", nargs="*", choices=[*CURVES, "processes", "predictions"], default=None
    )
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    wanted = options.curves
    found: dict[str, Any] = {"machine": common.machine(), "rounds": options.rounds}
    found["curves"] = {
        n: measure(c, options.rounds) for n, c in CURVES.items() if wanted is None or n in wanted
    }
    if wanted is None or "processes" in wanted:
        found["processes"] = processes(options.rounds)
    if wanted is None or "predictions" in wanted:
        found["predictions"] = {name: predict(name) for name in ("8B", "70B")}
        found["published"] = against_published()
    if wanted is None:
        common.write("growth", found, page(found))
        print(page(found))
    else:
        print(found)


if __name__ == "__main__":
    main()
