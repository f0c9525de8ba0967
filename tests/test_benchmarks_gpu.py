"""benchmarks/gpu.py measures every part, on a CPU with tiny shapes, and says what is left out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LIGER = "theirs, grouped, bf16, Liger"


@pytest.fixture(scope="module")
def gpu():
    """The script as a module. Its imports are found in its folder."""
    pytest.importorskip("peft")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import gpu

        yield gpu


@pytest.fixture
def device(gpu):
    import torch

    return gpu.Device(torch.device("cpu"))


# ---- every part


@pytest.mark.tables
def test_tiny_shapes_go_through_every_part(gpu, tmp_path):
    gpu.main(["--tiny", "--minutes", "60", "--out", str(tmp_path)])
    now = json.loads((tmp_path / gpu.FILE).read_text())["now"]
    assert now["left_out"] == {}
    assert now["parts"].keys() == gpu.PARTS.keys()
    failed = {
        (name, row): figures["failed"]
        for name, part in now["parts"].items()
        for row, figures in (part.get("rows") or part["modes"]).items()
        if "failed" in figures
    }
    assert failed.keys() <= {("run", LIGER)}, failed
    rows = now["parts"]["steps-1B"]["rows"]
    assert rows.keys() == set(gpu.TINY.variants)
    for method in ("LoRA", "SVD", "DoRA", "LoKr", "MiSS"):
        assert rows[method]["peft"]["median"] > 0
    assert {row["launches"] for row in rows.values()} == {None}
    for mode in now["parts"]["falling"]["modes"].values():
        assert (mode["before"]["ranks"], mode["after"]["ranks"]) == (8 * 7, 2 * 7)
        assert len(mode["events"]) == 1
    page = (tmp_path / "docs" / "results" / "gpu.md").read_text()
    assert "Device: **CPU**" in page
    assert "| n/a |" in page
    assert "not measured" in page
    assert "Left out" not in page


def test_the_page_of_the_repository_is_the_one_of_its_results(gpu, tmp_path):
    gpu.main(["--page", "--out", str(tmp_path)])
    for path in (gpu.FILE, Path("docs") / "results" / "gpu.md"):
        assert (tmp_path / path).read_bytes() == (BENCHMARKS.parent / path).read_bytes()


BLOCKED = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"jsonargparse", "datasets", "lightning", "torchmetrics"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import gpu
print(gpu.whole_run.missing(gpu.PARTS["run"].needs))
"""


@pytest.mark.tables
def test_the_script_starts_without_what_only_one_part_needs():
    command = [sys.executable, "-c", BLOCKED]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['lightning', 'jsonargparse', 'torchmetrics']"


def test_without_a_gpu_it_says_what_to_type(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "Type --tiny" in capsys.readouterr().err


# ---- time, and parts that cannot be measured


def test_a_part_takes_at_most_its_share_and_what_is_left(gpu):
    time = [100.0]
    whole = gpu.Deadline(50.0, lambda: time[0])
    assert whole.part(0.4).left() == 20.0
    time[0] += 45.0
    assert whole.part(0.4).left() == 5.0
    assert whole.allows(5.0)
    assert not whole.allows(5.1)
    time[0] += 45.0
    assert whole.part(0.4).left() == 0.0


def test_results_are_written_after_each_part_and_name_what_is_missing(gpu, device, monkeypatch):
    time = [0.0]

    def slow(device, deadline, settings):
        time[0] += 30.0
        return {"rows": {}}

    def broken(device, deadline, settings):
        raise RuntimeError("out of memory\nwith a long story")

    parts = {
        "first": gpu.Part(0.5, slow),
        "broken": gpu.Part(0.5, broken),
        "lacking": gpu.Part(0.5, slow, ("no_such_module",)),
        "second": gpu.Part(0.5, slow),
        "late": gpu.Part(0.5, slow),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    written = []
    deadline = gpu.Deadline(70.0, lambda: time[0])
    gpu.measure(
        list(parts), device, deadline, gpu.TINY, lambda found: written.append(json.dumps(found))
    )
    assert [len(json.loads(text)["parts"]) for text in written] == [1, 1, 1, 2, 2]
    assert json.loads(written[-1])["left_out"] == {
        "broken": "it failed: RuntimeError: out of memory",
        "lacking": "no_such_module is not installed",
        "late": "no time was left",
    }


def test_variants_that_fail_or_come_too_late_are_named(gpu, device, monkeypatch):
    steps = gpu.steps
    time = [0.0]
    variant = steps.variant

    def some(name, base):
        time[0] += 10.0
        if name == "LoRA":
            raise ValueError("no such layer")
        return variant("floor", base)

    monkeypatch.setattr(steps, "variant", some)
    deadline = gpu.Deadline(40.0, lambda: time[0])
    size = gpu.TINY.sizes["1B"]
    names = ["floor", "LoRA", "MiSS"]
    found = steps.eager(size, device, deadline, gpu.TINY, names)
    assert found["rows"]["LoRA"] == {"failed": "ValueError: no such layer"}
    assert found["left_out"] == ["MiSS"]
    assert "ms" in found["rows"]["floor"]


# ---- what the profiler saw


def test_launches_and_synchronizations_are_counted_by_name(gpu):
    from gpu_parts.measures import Counts, count

    host = [
        ("cudaLaunchKernel", False, 1.0),
        ("cudaLaunchKernelExC", False, 1.0),
        ("cuLaunchKernelEx", False, 1.0),
        ("aten::item", False, 1.0),
        ("aten::_local_scalar_dense", False, 1.0),
        ("cudaStreamSynchronize", False, 1.0),
        ("cudaDeviceSynchronize", False, 1.0),
        ("cudaMemcpyAsync", False, 1.0),
    ]
    on_device = [("gemm", True, 2.0), ("Memcpy DtoH", True, 0.5), ("Context Sync", True, 9.0)]
    counts = count(host + on_device)
    assert counts == Counts(launches=3, waits=2, reads=1, busy_ms=2.5)
    own = count([("cudaDeviceSynchronize", False, 1.0)])
    assert (counts - own).syncs == 1


def test_the_profiler_sees_a_number_that_is_read(gpu, device):
    import torch

    value = torch.ones(3)
    assert device.counts(lambda: value.sum()).reads == 0
    assert device.counts(lambda: value.sum().item()).reads == 1


# ---- models and lengths


def test_variants_share_the_tensors_of_the_frozen_model(gpu, device):
    from gpu_parts.models import frozen, variant

    base = frozen(gpu.TINY.sizes["1B"], device.device)
    before = [parameter.clone() for parameter in base.parameters()]
    addresses = {parameter.data_ptr() for parameter in base.parameters()}
    for name in ("floor", "LoRA", "PEFT LoRA", "HyperAdapt + LoRA"):
        model = variant(name, base)
        kept = [p for p in model.parameters() if not p.requires_grad]
        assert {parameter.data_ptr() for parameter in kept} == addresses, name
        trained = [p for p in model.parameters() if p.requires_grad]
        assert bool(trained) == (name != "floor")
        assert all(parameter.abs().sum() > 0 for parameter in trained)
    assert all((a == b).all() for a, b in zip(before, base.parameters(), strict=True))


def test_lengths_are_those_of_the_fitted_distributions(gpu):
    import statistics

    prompts, completions = zip(*gpu.whole_run.lengths(4000), strict=True)
    assert statistics.mean(prompts) == pytest.approx(64.9, rel=0.02)
    assert statistics.mean(completions) == pytest.approx(94.0, rel=0.02)
    assert statistics.correlation(prompts, completions) == pytest.approx(0.5, abs=0.05)


def test_what_kernels_of_others_change_is_undone(gpu):
    from transformers.models.llama import modeling_llama

    before = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaMLP.forward
    with gpu.whole_run.restored(gpu.whole_run.LLAMA):
        modeling_llama.apply_rotary_pos_emb = None
        modeling_llama.LlamaMLP.forward = None
    assert before == (modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaMLP.forward)
