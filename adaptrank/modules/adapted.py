"""What the tasks share: build the backbone, adapt it, optimize, and a checkpoint that leaves the backbone out."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torchmetrics import Metric

from adaptrank import backbones
from adaptrank._errors import UserError
from adaptrank.allocation.schedules import steps
from adaptrank.artifacts.adapter import load_adapter, read_adapter, trained_modules
from adaptrank.axes import fit_ranks, rank_axes
from adaptrank.injection import adapt, apply_rank_pattern, find_modules
from adaptrank.parameterizations import Parameterization, adapter_parameters, wrappers
from adaptrank.training.distributed import repeated_blocks, shard_frozen
from adaptrank.training.lightning import ensure_gradients

log = logging.getLogger("adaptrank")


@dataclass
class Adapter:
    """One entry of `adapters`: which layers, wrapped with what.

    Args:
        parameterization: a list, innermost first: [HyperAdapt], or [HyperAdapt, {class_path: LoRA, init_args: {rank: 4}}].
        targets: "all-linear", a list of last components of paths ([q_proj, v_proj]), or a regular expression over paths.
        exclude: layers to leave alone, as a list or a regular expression.
        name: of the adapter; several on one layer need several names.
        split_fused: whether the parts of a fused projection (GPT-2's c_attn) are layers of their own; null where the method
            reads their spectrum or blocks.
    """

    parameterization: list[Callable[[nn.Module], Parameterization]]
    targets: str | list[str] = "all-linear"
    exclude: str | list[str] | None = None
    name: str = "default"
    split_fused: bool | dict[str, list[str]] | None = None


class AdaptedModule(LightningModule):
    """A pretrained transformer with adapters; a task subclasses it and says what a step and an evaluation are.

    Args:
        backbone: a local folder or a model id, looked for in the local caches, in installed wheels, and on the Hub.
        adapters: what to wrap; empty only where `adapter` is given.
        adapter: folder of a saved adapter to start warm from.
        rank_pattern: sizes to start from, {axis, path or pattern: units}, or a `ranks.json` of another run.
        train_modules: further modules to train whole, by path or last component.
        dtype: of the frozen weights: "auto" is bf16 where the processor is fast at it, else float32. Adapters train in float32.
        optimizer: what optimizes; scales, gates, norms and biases are exempt from its weight decay.
        schedule: of the learning rate after the warm-up.
        warmup: steps of linear warm-up; an integer is steps, a float from 0.0 to 1.0 a fraction of all.
        lora_plus_ratio: learning rate of each axis' closing factor (LoRA's B) over that of the others (LoRA+,
            arXiv:2402.12354; 16 in the paper).
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        seed: of what growing to a `rank_pattern` draws.
    """

    auto_class: ClassVar[str]
    metrics_shown: ClassVar[Sequence[str]] = ()
    """Names of the evaluation's metrics, in the order of the summary."""

    def __init__(
        self,
        backbone: str,
        adapters: list[Adapter] | None = None,
        adapter: str | None = None,
        rank_pattern: dict[str, Any] | str | None = None,
        train_modules: list[str] | None = None,
        dtype: str = "auto",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Literal["linear", "cosine", "constant"] = "linear",
        warmup: int | float = 0.1,
        lora_plus_ratio: float = 1.0,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not adapters and adapter is None:
            raise UserError(
                "Nothing to train: give `adapters` to make, or an `adapter` folder to start from."
            )
        self.strict_loading = (
            False  # checkpoints leave the backbone out; on_load_checkpoint is strict about the rest
        )
        self.backbone_name = backbone
        self.adapters, self.adapter = adapters or [], adapter
        self.rank_pattern, self.train_modules = rank_pattern, train_modules or []
        self.frozen_dtype = backbones.auto_dtype(dtype)
        self.optimizer, self.schedule, self.warmup = optimizer, schedule, warmup
        steps(warmup, 0)
        self.lora_plus_ratio = lora_plus_ratio
        self.gradient_checkpointing = gradient_checkpointing
        self.seed = seed
        self.backbone: nn.Module | None = None
        self._random_state: dict[str, Any] | None = None

    @cached_property
    def source(self) -> backbones.Source:
        """Where the backbone comes from."""
        return backbones.resolve(self.backbone_name)

    @cached_property
    def tokenizer(self) -> Any:
        """The backbone's tokenizer; data modules take it from here."""
        return backbones.load_tokenizer(self.source)

    @property
    def model(self) -> Any:
        """The adapted transformer.

        Raises:
            RuntimeError: before `configure_model` has built it.
        """
        if self.backbone is None:
            raise RuntimeError("The backbone is built by configure_model(); the Trainer calls it.")
        return self.backbone

    # ---- building

    def load_backbone(self) -> Any:
        """The pretrained model of the task."""
        import transformers

        return backbones.load_model(
            self.source, getattr(transformers, self.auto_class), self.frozen_dtype
        )

    def heads(self, backbone: nn.Module) -> list[str]:
        """Paths of the modules that the task itself trains whole: a fresh classifier."""
        return []

    def configure_model(self) -> None:
        """Build and adapt the backbone; a second call does nothing."""
        if self.backbone is not None:
            return
        backbone = self.load_backbone()
        backbone.config.use_cache = False
        heads = self.heads(backbone)
        extra = find_modules(backbone, [*heads, *self.train_modules])
        if self.adapter is not None:
            extra |= {path: backbone.get_submodule(path) for path in _trained_in(self.adapter)}
        for path, module in extra.items():
            train_in_float32(module, cast_back=path not in heads)
        for entry in self.adapters:
            adapt(
                backbone,
                entry.targets,
                entry.parameterization,
                exclude=entry.exclude or (),
                name=entry.name,
                train_modules=list(extra),
                split_fused=entry.split_fused,
                seed=self.seed,
            )
        if self.adapter is not None:
            load_adapter(backbone, self.adapter)
        if self.rank_pattern:
            apply_rank_pattern(backbone, read_rank_pattern(self.rank_pattern), self.seed)
        if self.gradient_checkpointing:
            backbone.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        backbone.train()  # from_pretrained returns it in eval mode, and Lightning leaves modes as they are
        self.backbone = backbone
        strategy = self._trainer.strategy if self._trainer is not None else None
        if isinstance(strategy, ModelParallelStrategy):
            shard_frozen(backbone, repeated_blocks(backbone), strategy.device_mesh["data_parallel"])

    def describe_base(self) -> dict[str, Any]:
        """What an adapter's file says of its base."""
        return {
            "name": self.backbone_name,
            "source": self.source.describe(),
            "auto_class": self.auto_class,
        }

    # ---- optimizing

    def configure_optimizers(self) -> Any:
        """The optimizer over parameter groups, and a schedule over all steps of the run."""
        from transformers import get_scheduler

        groups = parameter_groups(self.model, self.lora_plus_ratio)
        optimizer = self.optimizer(groups)
        fuse(optimizer)
        for group in optimizer.param_groups:
            if group.pop("closing"):
                group["lr"] = group["lr"] * self.lora_plus_ratio
        total = int(self.trainer.estimated_stepping_batches)
        warmup = steps(self.warmup, total)
        if warmup >= total > 0:
            raise UserError(
                f"A warm-up of {warmup} steps never ends in a run of {total}; shorten `warmup`, or train longer."
            )
        scheduler = get_scheduler(self.schedule_name(), optimizer, warmup, total)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def schedule_name(self) -> str:
        """The schedule by its name in transformers."""
        return "constant_with_warmup" if self.schedule == "constant" else self.schedule

    def setup(self, stage: str) -> None:
        ensure_gradients(self.trainer)
        if self.trainer.precision in ("bf16-true", "16-true"):
            log.warning(
                "precision=%s trains the adapters in half precision, where small steps vanish; use precision=32-true and "
                "model.dtype=bf16: the frozen weights stay in half precision.",
                self.trainer.precision,
            )

    def on_validation_start(self) -> None:
        # A metric that Trainer.validate() used holds inference tensors, which the validation inside of fit cannot update.
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()

    def on_test_start(self) -> None:
        self.on_validation_start()

    # ---- checkpoints: what trains, the ranks by its shapes, and the random state; never the backbone

    def trained_state(self) -> dict[str, Tensor]:
        """The part of `state_dict()` that a checkpoint holds."""
        names = {f"backbone.{name}" for name in trained_modules(self.model)}
        prefixes = []
        for path, module in self.named_modules():
            if isinstance(module, Parameterization):
                prefixes.append(f"{path}.")
        state = self.state_dict()
        return {
            key: value
            for key, value in state.items()
            if key in names
            or any(
                key.startswith(prefix) and not key.startswith(f"{prefix}base.")
                for prefix in prefixes
            )
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.trained_state()
        checkpoint["random_state"] = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stored = checkpoint["state_dict"]
        fit_ranks(self, stored)
        expected = self.trained_state()
        for what, names in (
            ("has no", expected.keys() - stored.keys()),
            ("has an unexpected", stored.keys() - expected),
        ):
            if names:
                raise UserError(
                    f"The checkpoint {what} {min(names)} ({len(names)} such); it was saved under other adapters than this "
                    f"configuration has. Resume with the run's own config.yaml."
                )
        self._random_state = checkpoint.get("random_state")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if (
            self._random_state is not None
        ):  # only now: what comes between loading and training draws numbers too
            torch.set_rng_state(self._random_state["cpu"].cpu())
            if self._random_state["cuda"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(self._random_state["cuda"])
            self._random_state = None


def train_in_float32(module: nn.Module, cast_back: bool) -> None:
    """Hold a half-precision module in float32, where small steps do not vanish; its inputs are cast on the way in.

    Args:
        module: trained whole.
        cast_back: give its output the dtype of its input again, for what comes after it.
    """
    dtype = next((parameter.dtype for parameter in module.parameters()), None)
    if dtype not in (torch.bfloat16, torch.float16):
        return
    module.to(torch.float32)
    module.register_forward_pre_hook(_cast_inputs)
    if cast_back:
        module.register_forward_hook(partial(_cast_output, dtype))


def _cast_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def _cast_output(dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return output.to(dtype) if isinstance(output, Tensor) else output


def _trained_in(folder: str) -> list[str]:
    """Paths of the modules that an adapter's file trains whole."""
    return list(
        dict.fromkeys(name.rpartition(".")[0] for name in read_adapter(folder)["trained_modules"])
    )


def parameter_groups(model: nn.Module, lora_plus_ratio: float = 1.0) -> list[dict[str, Any]]:
    """Trainable parameters in groups: with weight decay and without, closing factors apart for LoRA+.

    Exempt from decay: what a method lists in `no_decay`, and vectors outside of wrappers (norms, biases).

    Raises:
        ValueError: if a LoRA+ ratio is asked for and no method has a closing factor.
    """
    closing = {id(slot.tensor) for axis in rank_axes(model).values() for slot in axis.closing()}
    if lora_plus_ratio != 1.0 and not closing:
        raise UserError(
            "lora_plus_ratio needs a method with a rank axis, such as LoRA; leave it at 1.0 here."
        )
    exempt = {
        id(getattr(wrapper, name)) for wrapper in wrappers(model) for name in wrapper.no_decay
    }
    own = {id(p) for p in adapter_parameters(model)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = id(parameter) not in exempt and (id(parameter) in own or parameter.dim() > 1)
            plus = lora_plus_ratio != 1.0 and id(parameter) in closing
            groups.setdefault((decays, plus), []).append(parameter)
    return [
        {"params": parameters, "closing": plus, **({} if decays else {"weight_decay": 0.0})}
        for (decays, plus), parameters in groups.items()
    ]


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer of PyTorch step all tensors in one call, where it can and nobody has said how it should."""
    for group in optimizer.param_groups:
        unsaid = "fused" in group and group["fused"] is None and group.get("foreach") is None
        fits = all(
            p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in group["params"]
        )
        if unsaid and fits and not group.get("differentiable") and not group.get("capturable"):
            group["fused"] = True


def read_rank_pattern(pattern: Mapping[str, Any] | str) -> Mapping[str, Any]:
    """A pattern as it is, or from the JSON file that a run leaves as `ranks.json`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no JSON mapping.
    """
    if not isinstance(pattern, str):
        return pattern
    file = Path(pattern)
    if not file.is_file():
        raise FileNotFoundError(
            f"rank_pattern={pattern!r}: no such file; give a mapping, or the ranks.json of a run."
        )
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise UserError(
            f"rank_pattern={pattern!r} holds no JSON mapping; give the ranks.json that a run leaves."
        )
    return read
