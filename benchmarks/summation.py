"""The summation study: do single-domain adapters add up to one trained on all data?

    python benchmarks/summation.py --config configs/studies/summation.yaml --data.root FOLDER
        [--seeds 0 1 2] [--out runs/summation]

The question is that of arXiv:2508.11985. For every seed the script trains an adapter for each
domain, one for each pair of domains, and one for all domains. The latter two see the merged data,
which has the sum of the examples, in one pass. Then `adaptrank.compose` sums the adapters of single
domains, and everything is evaluated on the same validation examples.

Finished results are kept in --out and not computed again. The minutes of a study that was stopped
are those of its last part. The script writes docs/results/summation.md and
benchmarks/results/summation.json from all seeds that are there.

The perplexity of several domains is exp of the mean loss over the completion tokens of all their
examples.
"""

import argparse
import json
import math
import os
import platform
import random
import statistics
import time
import warnings
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import common
import lightning
import torch
import transformers
import yaml
from transformers.utils import logging as transformers_logging

from adaptrank import backbones, compose, load_adapter, save_adapter
from adaptrank.data import CompletionTask, causal_batch
from adaptrank.modules import Adapter, CausalLM
from adaptrank.parameterizations import LoRA

ROOT = Path(__file__).parents[1]
PAPER = {"mathematics+medicine": -9.10, "mathematics+finance": 4.54, "medicine+finance": 27.56}


class Rows(CompletionTask):
    """Rows that are given."""

    def __init__(self, rows: list[dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.given = rows

    def rows(self, split: str) -> list[dict[str, Any]]:
        return self.given


def read(
    root: Path, tasks: list[str], split: str, count: int, seed: object
) -> list[dict[str, Any]]:
    """Return `count` rows of a domain, equally many of each of its tasks, drawn by the seed."""
    found = []
    for i, task in enumerate(tasks):
        lines = (root / task / f"{split}.jsonl").read_text(encoding="utf-8").strip().split("\n")
        rows = [json.loads(line) for line in lines]
        share = count // len(tasks) + (i < count % len(tasks))
        if len(rows) < share:
            raise SystemExit(
                f"{task} has {len(rows)} {split} rows, and {share} are needed. Lower `examples`."
            )
        random.Random(f"{task}/{split}/{seed}").shuffle(rows)
        found += [
            {"prompt": row["prompt"], "completion": row["completion"]} for row in rows[:share]
        ]
    return found


def module(config: dict[str, Any]) -> CausalLM:
    lora = partial(LoRA, rank=config["rank"], alpha=config["alpha"])
    return CausalLM(
        config["backbone"],
        [Adapter([lora], config["targets"])],
        dtype=config["dtype"],
        optimizer=partial(torch.optim.AdamW, lr=config["lr"], weight_decay=0.0),
        generate=False,
    )


def train(
    config: dict[str, Any], rows: list[dict[str, Any]], seed: int, folder: Path
) -> dict[str, Any]:
    """Fit one adapter and save it. Return examples, steps and seconds."""
    lightning.seed_everything(seed, verbose=False)
    model = module(config)
    data = Rows(
        rows,
        batch_size=config["batch_size"],
        max_length=config["max_length"],
        seed=seed,
        group_by_length=True,
    )
    trainer = lightning.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        accelerator="cpu",
    )
    start = time.time()
    trainer.fit(model, data)
    save_adapter(
        model.model, folder, {"name": config["backbone"], "auto_class": "AutoModelForCausalLM"}
    )
    return {"examples": len(rows), "steps": trainer.global_step, "seconds": time.time() - start}


class Evaluation:
    """Evaluate a model on fixed validation examples: {domain: [summed loss, tokens]}."""

    def __init__(self, config: dict[str, Any], root: Path, task: CausalLM) -> None:
        self.task, self.examples = task, {}
        for domain, tasks in config["domains"].items():
            data = Rows(
                read(root, tasks, "validation", config["validation"], 0),
                max_length=config["max_length"],
            )
            data.tokenizer = task.tokenizer
            self.examples[domain] = sorted(
                data.encode(data.given, "val"), key=lambda e: len(e["input_ids"])
            )
        self.pad = data.pad_id

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module) -> dict[str, list[float]]:
        self.task.backbone = model.train(False)
        found = {}
        for domain, examples in self.examples.items():
            total, tokens = 0.0, 0
            for start in range(0, len(examples), 16):
                batch = causal_batch(examples[start : start + 16], pad_id=self.pad)
                losses, _ = self.task(batch["input_ids"], batch["attention_mask"], batch["labels"])
                total, tokens = total + float(losses.double().sum()), tokens + len(losses)
            found[domain] = [total, tokens]
        return found


def perplexity(losses: dict[str, list[float]], domains: list[str]) -> float:
    return math.exp(sum(losses[d][0] for d in domains) / sum(losses[d][1] for d in domains))


def done(file: Path, make: Any) -> Any:
    """Return the content of the file, or make it now and keep it there."""
    if file.is_file():
        return json.loads(file.read_text())
    result = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    growing = file.with_suffix(f".{os.getpid()}")
    growing.write_text(json.dumps(result))
    os.replace(growing, file)
    print(f"{file.parent.name}/{file.stem} done", flush=True)
    return result


def study(config: dict[str, Any], root: Path, seed: int, out: Path) -> dict[str, Any]:
    folder, domains = out / f"seed-{seed}", list(config["domains"])
    task = module(config)
    evaluate = Evaluation(config, root, task)

    def base() -> torch.nn.Module:
        return backbones.load_model(
            task.source, transformers.AutoModelForCausalLM, task.frozen_dtype
        )

    start = time.time()
    result: dict[str, Any] = {
        "base": done(out / "base.json", lambda: evaluate(base())),
        "trained": {},
        "summed": {},
    }
    rows = {d: read(root, config["domains"][d], "train", config["examples"], seed) for d in domains}
    groups = [group for size in range(1, len(domains) + 1) for group in combinations(domains, size)]
    for group in groups:
        name = "+".join(group)
        adapter = folder / name
        facts = done(
            folder / f"train {name}.json",
            lambda group=group, adapter=adapter: train(
                config, [row for d in group for row in rows[d]], seed, adapter
            ),
        )
        losses = done(
            folder / f"evaluate {name}.json",
            lambda adapter=adapter: evaluate(load_adapter(base(), adapter)),
        )
        result["trained"][name] = {**facts, "losses": losses}
    for group in groups:
        if len(group) == 1:
            continue
        name = "+".join(group)

        def summed(weight: float, group: tuple[str, ...] = group) -> dict[str, Any]:
            model = base()
            report = compose(model, [folder / d for d in group], [weight] * len(group))
            layers = report.pop("layers")
            report["interference"] = statistics.mean(
                facts["interference"] for facts in layers.values()
            )
            return {"losses": evaluate(model), "report": report}

        result["summed"][name] = {
            "sum": done(folder / f"sum {name}.json", partial(summed, 1.0)),
            "mean": done(folder / f"mean {name}.json", partial(summed, 1 / len(group))),
        }
    result["minutes"] = done(folder / "minutes.json", lambda: (time.time() - start) / 60)
    return result


def rows_of(results: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return perplexities, changes and cosines of each group of domains and each seed."""
    table = []
    for name in next(iter(results.values()))["summed"]:
        domains = name.split("+")
        for seed, result in results.items():
            merged = perplexity(result["trained"][name]["losses"], domains)
            report = result["summed"][name]["sum"]["report"]
            nulls = [pair["null"] for pair in report["pairs"]]
            one_start = [pair["null_one_start"] for pair in report["pairs"]]
            own = sum(result["trained"][d]["losses"][d][0] for d in domains)
            row = {
                "domains": name,
                "seed": seed,
                "base": perplexity(result["base"], domains),
                "merged": merged,
                "own": math.exp(own / sum(result["base"][d][1] for d in domains)),
                "rms_cos": report["rms_cos"],
                "signed": statistics.mean(pair["signed_mean"] for pair in report["pairs"]),
                "right": statistics.mean(pair["right_overlap"] for pair in report["pairs"]),
                "null": statistics.mean(nulls),
                "null_one_start": statistics.mean(one_start),
                "interference": report["interference"],
            }
            for how in ("sum", "mean"):
                row[how] = perplexity(result["summed"][name][how]["losses"], domains)
                row[f"{how}_change"] = 100 * (row[how] / merged - 1)
            table.append(row)
    return table


def spread(values: list[float], spec: str) -> str:
    shown = format(statistics.mean(values), spec)
    return (
        shown
        if len(values) == 1
        else f"{shown} ± {format(statistics.stdev(values), spec.replace('+', ''))}"
    )


def page(
    config: dict[str, Any],
    results: dict[int, dict[str, Any]],
    table: list[dict[str, Any]],
    command: str,
) -> str:
    names = list(dict.fromkeys(row["domains"] for row in table))
    of = {name: [row for row in table if row["domains"] == name] for name in names}
    lines = []
    for name in names:
        rows = of[name]
        paper = f"{PAPER[name]:+.2f} %" if name in PAPER else "not stated"
        cells = [
            spread([row[key] for row in rows], ".3f") for key in ("base", "own", "merged", "sum")
        ]
        cells += [spread([row["sum_change"] for row in rows], "+.2f") + " %", paper]
        cells += [
            spread([row["mean"] for row in rows], ".3f"),
            spread([row["mean_change"] for row in rows], "+.2f") + " %",
        ]
        lines.append(f"| {name.replace('+', ' + ')} | {' | '.join(cells)} |")
    cosines = []
    for name in names:
        rows = of[name]
        keys = (
            ("rms_cos", ".4f"),
            ("signed", "+.4f"),
            ("right", ".3f"),
            ("interference", "+.4f"),
            ("null", ".4f"),
            ("null_one_start", ".4f"),
        )
        cells = [spread([row[key] for row in rows], spec) for key, spec in keys]
        cosines.append(f"| {name.replace('+', ' + ')} | {' | '.join(cells)} |")
    minutes = ", ".join(f"{result['minutes']:.0f}" for result in results.values())
    pairs = [name for name in names if name in PAPER]
    signs = []
    for name in pairs:
        falls = statistics.mean(row["sum_change"] for row in of[name]) < 0
        sign = "the same sign" if falls == (PAPER[name] < 0) else "the other sign"
        signs.append(f"{name.replace('+', ' + ')} has {sign}")
    ours = sorted(pairs, key=lambda n: statistics.mean(r["sum_change"] for r in of[n]))
    by_cosine = sorted(pairs, key=lambda n: statistics.mean(r["rms_cos"] for r in of[n]))
    tasks = ", ".join(f"{name}: {' and '.join(t)}" for name, t in config["domains"].items())
    scale = f"{config['alpha'] / config['rank']:g}"
    seeds = ", ".join(map(str, results))
    best_first, least_similar_first = (
        ", ".join(name.replace("+", " + ") for name in ranking) for ranking in (ours, by_cosine)
    )
    settings = common.paragraph(
        f"{config['backbone']} ({config['dtype']} backbone) has LoRA of rank {config['rank']} and",
        f"alpha {config['alpha']} (scale {scale}) on {config['targets']}. There are",
        f"{config['examples']} training examples for each domain ({tasks}). An adapter on merged",
        f"data has the sum of them. Training is one pass in batches of {config['batch_size']},",
        f"with AdamW at {config['lr']}, 10 % warm-up and linear decay. Adapters of one seed start",
        f"from the same A. All are evaluated on the same {config['validation']} validation",
        f"examples of each domain. The seeds are {seeds}. They took {minutes} minutes on",
        f"{os.cpu_count()} cores. This page is written by `{command}`.",
    )
    columns = common.paragraph(
        "The perplexity is that of completions, over the examples of all domains of a row: of the",
        "base, of each domain's own adapter on its own domain, of one adapter trained on the",
        'merged data, of the sum of the domains\' adapters, and of their mean. "Change" is',
        'relative to the merged data. "Paper" is GPT-2 on other question-answering sets',
        "(arXiv:2508.11985, the abstract; its settings beyond rank 4 and alpha 64 were not",
        "readable).",
    )
    similarity = common.paragraph(
        "Pairwise similarity of the adapters over all layers (for three, the mean of their pairs):",
        "root mean square cosine, mean cosine, overlap of the input spaces, and interference 1 -",
        '|sum|² / sum |·|². "Null" is the root mean square cosine of independent random changes.',
        '"Null, one start" is that of LoRAs that start from one A and learn independent B.',
    )
    verdict = common.paragraph(
        f"Compared with the paper, {', '.join(signs)}. The paper's order from the best pair to the",
        "worst is mathematics + medicine, mathematics + finance, medicine + finance. Here it is",
        f"{best_first}. The paper finds that the change rises with the RMS cosine. By RMS cosine",
        f"the order here is {least_similar_first}.",
    )
    changes_header = [
        *(
            "domains",
            "base",
            "own adapters",
            "merged data",
            "sum",
            "change",
            "paper",
            "mean",
            "change",
        ),
    ]
    cosines_header = [
        *("domains", "RMS cosine", "mean cosine", "overlap of inputs", "interference", "null"),
        "null, one start",
    ]
    parts = [
        "# Adapters that add up: the summation study",
        settings,
        columns,
        "\n".join([*header_lines(changes_header), *lines]),
        similarity,
        "\n".join([*header_lines(cosines_header), *cosines]),
        verdict,
    ]
    return "\n\n".join(parts) + "\n"


def header_lines(names: list[str]) -> list[str]:
    """Return the first two lines of a Markdown table."""
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data.root", dest="root", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the configuration's")
    parser.add_argument("--out", type=Path, default=Path("runs/summation"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers_logging.disable_progress_bar()
    config = yaml.safe_load(options.config.read_text())
    for tasks in config["domains"].values():
        for task in tasks:
            if not (options.root / task).is_dir():
                raise SystemExit(f"--data.root {options.root} has no folder {task!r}.")
    seeds = options.seeds or config["seeds"]
    same = {k: v for k, v in config.items() if k != "seeds"}
    kept = done(options.out / "config.json", lambda: same)
    if kept != same:
        raise SystemExit(
            f"{options.out} holds a study with another configuration. Name another folder by --out."
        )
    results = {seed: study(config, options.root, seed, options.out) for seed in seeds}
    table = rows_of(results)
    chosen = " ".join(map(str, seeds))
    command = (
        f"python benchmarks/summation.py --config {options.config} --data.root FOLDER "
        f"--seeds {chosen}"
    )
    text = page(config, results, table, command)
    (ROOT / "docs/results/summation.md").write_text(text)
    machine = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    record = {
        "config": config,
        "machine": machine,
        "rows": table,
        "results": {str(s): r for s, r in results.items()},
    }
    (ROOT / "benchmarks/results/summation.json").write_text(json.dumps(record, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
