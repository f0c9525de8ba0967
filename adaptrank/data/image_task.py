"""The task of naming a class, or a number, for an image."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, overload

from adaptrank._errors import UserError
from adaptrank.data.class_tasks import Tasks
from adaptrank.data.collate import Batch, image_batch
from adaptrank.data.images import decode, raw_bytes
from adaptrank.data.incremental_data import IncrementalData
from adaptrank.data.lazy import Computed
from adaptrank.data.seeding import seeded_random
from adaptrank.data.task import Row, Split


class ImageTask(IncrementalData):
    """Images to classify, decoded when they are read.

    Rows have `image`, anything that `adaptrank.data.images.decode` takes, `where`, the place of
    the row for errors, and `label`, the index of the class. The image processor is the
    LightningModule's (`trainer.lightning_module.image_processor`), or the one that was assigned to
    `.image_processor` before `setup`. Batches are `image_batch`.

    Args:
        batch_size, eval_batch_size, num_workers, seed, limit_train, limit_val: as in `TaskData`.
        examples_per_class: as in `LabelledData`.
        horizontal_flip: probability that a training image is mirrored, by the seed, the epoch and
            the image.
        tasks, task_seed, epochs_per_task, steps_per_task: as in `IncrementalData`.
    """

    def __init__(
        self,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        limit_train: int | None = None,
        limit_val: int | None = None,
        horizontal_flip: float = 0.0,
        tasks: Tasks | None = None,
        task_seed: int | None = None,
        epochs_per_task: int = 1,
        steps_per_task: int | None = None,
        examples_per_class: int | None = None,
    ) -> None:
        if isinstance(horizontal_flip, bool) or not 0 <= horizontal_flip <= 1:
            raise UserError(
                f"horizontal_flip={horizontal_flip} is no probability. Use a number from 0 to 1."
            )
        super().__init__(
            examples_per_class=examples_per_class,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            limit_train=limit_train,
            limit_val=limit_val,
            tasks=tasks,
            task_seed=task_seed,
            epochs_per_task=epochs_per_task,
            steps_per_task=steps_per_task,
        )
        self.horizontal_flip = horizontal_flip
        self.image_processor: Any = None

    def find_preprocessor(self) -> None:
        """Take the image processor from the LightningModule.

        Raises:
            UserError: if it has none.
        """
        if self.image_processor is None:
            module = getattr(self.trainer, "lightning_module", None)
            self.image_processor = getattr(module, "image_processor", None)
        if self.image_processor is None:
            raise UserError(
                f"{type(self).__name__} found no image processor: the LightningModule has none. "
                "Use the module ImageClassification, or assign one before the run: "
                "data.image_processor = AutoImageProcessor.from_pretrained(...)."
            )

    def encode_split(self, rows: Sequence[Row], split: Split) -> "ImageExamples":
        flip = self.horizontal_flip if split == "train" else 0.0
        numbered = list(rows)
        if self.model_classes not in (None, self.class_names):
            numbered = [_with_label(row, self.label_of_model) for row in rows]
        return ImageExamples(numbered, self.image_processor, flip, self.seed)

    def encode(self, rows: list[Row], split: Split) -> list[Row]:
        return list(self.encode_split(rows, split))

    def collate(self, split: Split) -> Callable[[Sequence[Row]], Batch]:
        return image_batch

    def content(self) -> Sequence[Row]:
        examples = self.examples("train")
        assert isinstance(examples, ImageExamples)
        return examples.hashes

    def training_labels(self) -> Sequence[Any]:
        examples = self.examples("train")
        assert isinstance(examples, ImageExamples)
        return [row["label"] for row in examples.rows]

    def describe_training(self) -> dict[str, Any]:
        return {**super().describe_training(), "horizontal_flip": self.horizontal_flip}


def _with_label(row: Row, number: Callable[[Any], Any]) -> Row:
    """Return a row with its label in another numbering."""
    return {**row, "label": number(row["label"])} if "label" in row else row


class ImageExamples(Sequence[Row]):
    """Examples {pixel_values (C, H, W), label} of images, decoded when they are read.

    Args:
        rows: rows with `image`, and perhaps `label` and `where`.
        processor: image processor of transformers.
        flip: probability that an image is mirrored.
        seed: seed of the mirroring.
        epoch: number of the epoch, which also decides about the mirroring.
    """

    def __init__(
        self, rows: list[Row], processor: Any, flip: float = 0.0, seed: int = 0, epoch: int = 0
    ) -> None:
        self.rows = rows
        self.processor = processor
        self.flip = flip
        self.seed = seed
        self.epoch = epoch

    def at_epoch(self, epoch: int) -> "ImageExamples":
        """Return the examples as they are in an epoch."""
        return ImageExamples(self.rows, self.processor, self.flip, self.seed, epoch)

    @property
    def hashes(self) -> Sequence[Row]:
        """A hash of each image with its label, computed when it is asked for."""
        return Computed(len(self.rows), partial(_hash, self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.__getitems__(list(range(*index.indices(len(self)))))
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Row]:
        """Return the examples of a batch. A DataLoader calls this."""
        examples = []
        for index in indices:
            row = self.rows[index]
            pixels = self._pixels(row, index % len(self))
            label = {"label": row["label"]} if "label" in row else {}
            examples.append({"pixel_values": pixels, **label})
        return examples

    def _pixels(self, row: Row, index: int) -> Any:
        """Return what the processor makes of an image, (C, H, W)."""
        where = row.get("where") or f"Row {index}"
        image = decode(row["image"], where)
        if self.flip and seeded_random("flip", self.seed, self.epoch, index).random() < self.flip:
            from PIL import ImageOps

            image = ImageOps.mirror(image)
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


def _hash(rows: list[Row], index: int) -> Row:
    """Return what identifies a row: a hash of the bytes of its image, and its label."""
    row = rows[index]
    digest = hashlib.blake2b(raw_bytes(row["image"]), digest_size=8).hexdigest()
    return {"image": digest, "label": row.get("label")}
