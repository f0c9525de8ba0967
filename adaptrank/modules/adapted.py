"""The LightningModule that all tasks share: build and adapt the backbone, optimize, checkpoint."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import Metric

from adaptrank import backbones
from adaptrank._errors import UserError
from adaptrank._options import check_maker
from adaptrank.allocation.schedules import steps
from adaptrank.artifacts import TENSORS, locate_tensors, trained_modules, use_chat_template
from adaptrank.axes import fit_ranks
from adaptrank.checkpoints import (
    RECORD,
    STEPS_OF_SCHEDULE,
    compare_model,
    identify_base,
    make_record,
    model_differences,
)
from adaptrank.injection import as_makers, describe
from adaptrank.modules.agreement import agree, trained_conventions
from adaptrank.modules.averaging import averaged_models, fill_frozen, filter_weights
from adaptrank.modules.backbone_loading import (
    add_tokens,
    check_devices,
    check_quantized,
    describe_tokens,
    device_of,
    leave_in_place,
    modules_that_train,
    tokens_to_add,
)
from adaptrank.modules.gradient_checkpointing import (
    check_recomputable,
    enable_checkpointing,
    read_checkpointing,
)
from adaptrank.modules.host_batch import HostBatch, unwatch_transfers
from adaptrank.modules.learning_rates import STUDIED_HEAD, check_rates, rates_of_model
from adaptrank.modules.learning_schedule import learning_schedule
from adaptrank.modules.optim import build_optimizer
from adaptrank.modules.option_checks import check_optimizer_options, check_options
from adaptrank.modules.settings import Adapter, read_compile_options, read_rank_pattern
from adaptrank.modules.trainable_parts import make_trainable
from adaptrank.modules.trained_state import (
    check_same_keys,
    random_state,
    select_trained,
    set_random_state,
)
from adaptrank.modules.trainer_setup import prepare_trainer
from adaptrank.parameterizations import StudiedRate
from adaptrank.training.compiled_blocks import compile_blocks
from adaptrank.training.distributed import repeated_blocks, shard_frozen
from adaptrank.training.finite import check_finite
from adaptrank.training.step_mean import StepMean

log = logging.getLogger("adaptrank")


class AdaptedModule(LightningModule):
    """A pretrained transformer with adapters. Subclasses define the step and the evaluation.

    Args:
        backbone: a local folder or a model id, looked for in the local caches, in installed
            wheels, and on the Hub.
        adapters: list of adapters to make. It may be empty only where `adapter` is given.
        adapter: folder of a saved adapter to start warm from, or its name on the Hub, `user/name`
            or `user/name@revision`.
        rank_pattern: sizes to start from, {axis, path or pattern: units}, or the folder or the
            `ranks.json` of another run.
        train_modules: further modules to train whole, by path or last component.
        dtype: dtype of the frozen weights, bf16, fp16, fp32 or fp64, or "auto", which is bf16
            where the processor is fast at it, else float32. Adapters train in float32.
        optimizer: optimizer, without weight decay on scales, gates, norms and biases.
        schedule: learning rate after the warm-up.
        warmup: length of the linear warm-up, as a number of steps, or as a fraction of all steps
            from 0.0 to 1.0.
        lora_plus_ratio: learning rate of each axis' closing factor (LoRA's B) over that of the
            others (LoRA+, arXiv:2402.12354, which uses 16).
        gradient_checkpointing: recompute activations in the backward pass, to save memory. True, or
            options: {every_n_layers: 2}, `offload` and `use_reentrant`.
        compile: compile each transformer block with `torch.compile`. True takes its defaults, and
            a mapping is its options, {mode: max-autotune-no-cudagraphs}. Results are the same up
            to rounding.
        seed: seed of the generator that initializes new units of a `rank_pattern`.
        resize_tokens: give the embedding and the head rows for tokens that only the tokenizer has.
            With true both train whole, and are saved with the adapter. With "new" the new rows
            train alone.
        quantize: load the linear layers of a plain backbone in 4 or 8 bits: nf4, fp4, int8 or
            llm-int8, or a mapping with options, {type: nf4, double_quant: false}.
        attn_implementation: attention of transformers: eager, sdpa, flash_attention_2 and others.
        device_map: devices of the layers, for validate, test and predict. A run of training is on
            the device of the trainer.
        trust_remote_code: run Python code that comes with the backbone.
        revision: branch, tag or commit of a backbone on the Hub.
        added_tokens: tokens to add to the tokenizer. Their rows of the embedding and of the head
            train, and with `resize_tokens: true` all rows.
        learning_rates: own learning rates of parts of what trains, in place of that of the
            optimizer: {HyperAdapt: 0.01, LoRA: 0.001}. A key is a method, one of its tensors
            (LoRA.B), a kind of tensor (scales), an adapter, or a module that trains whole. Or
            "studied": each method, and a fresh head of a task with a study, have the rate of AdamW
            that was chosen there.
    """

    accept_changes: bool = False
    """Whether to go on from a checkpoint of a run with other settings, which are logged."""
    auto_class: ClassVar[str]
    """Class of transformers that loads the backbone with the head of the task."""
    studied_head: ClassVar[StudiedRate | None] = STUDIED_HEAD
    """Learning rate of a fresh head in a study of such tasks, or None without one."""
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
        gradient_checkpointing: bool | dict[str, Any] = False,
        seed: int = 0,
        resize_tokens: bool | Literal["new"] = False,
        compile: bool | dict[str, Any] = False,
        quantize: str | dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        device_map: str | dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        added_tokens: list[str] | None = None,
        learning_rates: dict[str, Any] | Literal["studied"] | None = None,
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(fill_frozen)  # type: ignore[no-untyped-call]
        if not adapters and adapter is None:
            raise UserError(
                "Nothing to train: give `adapters` to make, or an `adapter` folder to start from."
            )
        # Checkpoints leave the backbone out. `on_load_checkpoint` is strict about the rest.
        self.strict_loading = False
        self.backbone_name = backbone
        self.adapters = adapters or []
        self.adapter = adapter
        self.rank_pattern = rank_pattern
        self.train_modules = train_modules or []
        self.resize_tokens = resize_tokens
        self.frozen_dtype = backbones.auto_dtype(dtype)
        self.loading = backbones.read_options(
            quantize, attn_implementation, device_map, trust_remote_code, added_tokens
        )
        self.revision = revision
        self.optimizer = optimizer
        self.schedule = schedule
        check_options(schedule, warmup, lora_plus_ratio, seed)
        self.learning_rates = check_rates(learning_rates)
        self.compile_options = read_compile_options(compile)
        check_quantized(self.loading, self.frozen_dtype, self.compile_options is not None)
        check_optimizer_options(optimizer)
        self.gradient_checkpointing = read_checkpointing(gradient_checkpointing)
        for entry in self.adapters:
            makers = as_makers(entry.parameterization)
            for make in makers:
                check_maker(make)
            if self.gradient_checkpointing is not None:
                check_recomputable(makers)
        self.warmup = warmup
        self.lora_plus_ratio = lora_plus_ratio
        self.seed = seed
        self.backbone: nn.Module | None = None
        # Number of tokens, if the embedding has new rows for some of them.
        self.vocabulary: int | None = None
        # Rows of the embedding that train alone, and whether all of them do.
        self.trained_rows: list[int] = []
        self.trains_embeddings = False
        # Differences between data and adapter that the log has named.
        self.warned: set[tuple[str, int]] = set()
        self.base_fingerprint: str | None = None
        self._resumed_random_state: dict[str, Any] | None = None
        self._steps_of_schedule: int | None = None
        self.step_mean = StepMean()
        self.host_batch = HostBatch()
        self._warned_unsupervised: set[str] = set()

    @cached_property
    def source(self) -> backbones.Source:
        """Origin of the backbone."""
        return backbones.resolve(self.backbone_name, self.revision)

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the backbone. Data modules take it from here.

        It has the chat template that the `adapter` was trained with.
        """
        options = replace(self.loading, added_tokens=tokens_to_add(self))
        tokenizer = backbones.load_tokenizer(self.source, options)
        use_chat_template(tokenizer, trained_conventions(self))
        return tokenizer

    @property
    def model(self) -> Any:
        """The adapted transformer.

        Raises:
            RuntimeError: before `configure_model` has built it.
        """
        if self.backbone is None:
            raise RuntimeError("The backbone is built by configure_model(). The Trainer calls it.")
        return self.backbone

    def __repr__(self) -> str:
        """Return the task, its backbone, and what trains."""
        head = f"{type(self).__name__}({self.backbone_name})"
        if self.backbone is None:
            return f"{head}, not built yet"
        return f"{head}\n{describe(self.backbone)}"

    # ---- building

    def load_backbone(self) -> Any:
        """Load the pretrained model of the task."""
        import transformers

        check_devices(self.loading, self._trainer)
        return backbones.load_model(
            self.source,
            getattr(transformers, self.auto_class),
            self.frozen_dtype,
            self.loading,
            kept=partial(modules_that_train, self),
            device=device_of(self._trainer),
            **self.model_options(),
        )

    def model_options(self) -> dict[str, Any]:
        """Return further arguments of `backbones.load_model`, such as `num_labels`."""
        return {}

    def heads(self, backbone: nn.Module) -> list[str]:
        """Return paths of the modules that the task itself trains whole, such as a classifier."""
        return []

    def configure_model(self) -> None:
        """Build and adapt the backbone. A second call does nothing."""
        if self.backbone is not None:
            agree(self)
            return
        if self.rank_pattern:
            # Refused before minutes of loading.
            read_rank_pattern(self.rank_pattern)
        backbone = self.load_backbone()
        add_tokens(self, backbone)
        backbone.config.use_cache = False
        make_trainable(self, backbone)
        if self.gradient_checkpointing is not None:
            enable_checkpointing(backbone, self.gradient_checkpointing)
        # `from_pretrained` returns the model in eval mode, and Lightning leaves modes as they are.
        backbone.train()
        self.backbone = backbone
        # The base is identified before its weights are sharded or pruned.
        self.base_fingerprint = identify_base(backbone)
        if self.compile_options is not None:
            compile_blocks(backbone, **self.compile_options)
        strategy = self._trainer.strategy if self._trainer is not None else None
        leave_in_place(self, self._trainer)
        if isinstance(strategy, ModelParallelStrategy):
            shard_frozen(backbone, repeated_blocks(backbone), strategy.device_mesh["data_parallel"])
        agree(self)

    @property
    def frozen_form(self) -> str:
        """Form of the frozen weights: a dtype such as "bfloat16", or "nf4" and others."""
        quantization = self.loading.quantization
        dtype = str(self.frozen_dtype).removeprefix("torch.")
        return dtype if quantization is None else quantization.kind

    def describe_base(self) -> dict[str, Any]:
        """Return the description of the base for an adapter's file."""
        described = {
            "name": self.backbone_name,
            "source": self.source.describe(),
            "auto_class": self.auto_class,
        }
        if self.revision is not None:
            described["revision"] = self.revision
        return described | describe_tokens(self)

    def conventions(self) -> dict[str, Any]:
        """Return what this module adds to the conventions of the data."""
        return {}

    def metrics_logged(self) -> Sequence[str]:
        """Return the names of the metrics of an evaluation, known after `configure_model`."""
        return self.metrics_shown

    def chance(self) -> dict[str, float]:
        """Return the metrics of a model that guesses, after an evaluation. Empty if unknown.

        "accuracy_error" is the standard error of the accuracy, and "vocabulary" says that the
        classes are tokens.
        """
        return {}

    # ---- optimizing

    def studied_head_rate(self, backbone: nn.Module) -> StudiedRate | None:
        """Return the learning rate that a study chose for a fresh head of this task.

        It is None for a head that has been trained, and for a task without such a study.
        """
        is_fresh = self.adapter is None and bool(self.heads(backbone))
        return self.studied_head if is_fresh else None

    def rates_of(self, backbone: nn.Module) -> dict[str, float]:
        """Return the learning rates of parts of an adapted backbone, {key: rate}."""
        return rates_of_model(backbone, self.learning_rates, self.studied_head_rate(backbone))

    def configure_optimizers(self) -> Any:
        """Return the optimizer over parameter groups, and a schedule over all steps of the run."""
        optimizer = build_optimizer(
            self.model, self.optimizer, self.lora_plus_ratio, self.rates_of(self.model)
        )
        total = int(self.trainer.estimated_stepping_batches)
        warmup = steps(self.warmup, total)
        if warmup >= total > 0:
            raise UserError(
                f"A warm-up of {warmup} steps never ends in a run of {total}. Shorten `warmup`, or "
                "train longer."
            )
        scheduler = learning_schedule(self.schedule, optimizer, warmup, total)
        depends_on_total = self.schedule != "constant" or isinstance(self.warmup, float)
        self._steps_of_schedule = total if depends_on_total else None
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def describe_training(self) -> dict[str, Any]:
        """Return what the steps of training depend on, for the record of a run."""
        described = {
            "dtype": str(self.frozen_dtype),
            "lora_plus_ratio": self.lora_plus_ratio,
            "schedule": self.schedule,
            "warmup": self.warmup,
            STEPS_OF_SCHEDULE: self._steps_of_schedule,
        }
        # Checkpoints of earlier versions do not have these, and neither does a run without them.
        if self.loading.quantization is not None:
            described["quantize"] = self.loading.quantization.describe()
        if self.loading.attention is not None:
            described["attn_implementation"] = self.loading.attention
        if self.learning_rates:
            described["learning_rates"] = self.learning_rates
        return described

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate the loss of a batch with its weight in the optimizer step."""
        if self._trainer is not None:
            loss = self.step_mean.weigh(loss, self._trainer.accumulate_grad_batches)
        super().backward(loss, *args, **kwargs)

    def warn_unsupervised(self, what: str) -> None:
        """Warn once in a run that nothing is trained on in a batch.

        Args:
            what: the data without a label, for the message.
        """
        if what not in self._warned_unsupervised:
            self._warned_unsupervised.add(what)
            log.warning(
                "A %s has no label to train on: each is -100. Its loss counts as zero. Look at the "
                "template and at max_length, which may cut off every completion.",
                what,
            )

    def setup(self, stage: str) -> None:
        self.step_mean.reset()
        self._warned_unsupervised.clear()
        prepare_trainer(self.trainer, self, stage)

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        unwatch_transfers(self.trainer)

    def on_validation_start(self) -> None:
        # A metric that Trainer.validate() used holds inference tensors. The validation inside of
        # fit cannot update them.
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()

    def on_test_start(self) -> None:
        self.on_validation_start()

    # ---- checkpoints

    def trained_state(self) -> dict[str, Tensor]:
        """Return the part of `state_dict()` that a checkpoint holds."""
        return select_trained(self, [f"backbone.{name}" for name in trained_modules(self.model)])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None:
            # Lightning asks no callback about a checkpoint of weights alone.
            check_finite(self._trainer, self)
        # Callbacks have been here before, and may have put averaged weights into it.
        filter_weights(checkpoint, self.trained_state())
        checkpoint["random_state"] = random_state()
        checkpoint[TENSORS] = locate_tensors(self, self.model)
        if RECORD not in checkpoint:
            checkpoint[RECORD] = make_record(self._trainer, self, self.base_fingerprint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stored = checkpoint["state_dict"]
        check_same_keys(self.trained_state(), stored, model_differences(self, checkpoint))
        trainer = self._trainer
        # A run that resumes is compared as a whole, by `RunRecorder`.
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            compare_model(self, checkpoint)
        for model in (self, *averaged_models(trainer)):
            fit_ranks(model, stored)
        self._resumed_random_state = checkpoint.get("random_state")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Between loading a checkpoint and the first batch other code draws random numbers. The
        # stored state is therefore restored as late as here.
        if self._resumed_random_state is not None:
            set_random_state(self._resumed_random_state)
            self._resumed_random_state = None
