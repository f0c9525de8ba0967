"""Real images of handwritten digits, which scikit-learn ships, to be classified."""

from typing import Any

from adaptrank._errors import UserError
from adaptrank.backbones import digit_images
from adaptrank.data.image_task import ImageTask
from adaptrank.data.images import StoredImage
from adaptrank.data.stratify import stratified_sample
from adaptrank.data.task import Row, Split, check_size

DIGITS = tuple(range(10))


class HandwrittenDigits(ImageTask):
    """Handwritten digits, 1,797 gray images of 8 x 8 pixels, which scikit-learn ships.

    Each class has the same share of training and validation. The test images are those of
    validation. The backbone `adaptrank/vit-digits` knows the digits 0 to 4, so that `digits: [5, 6,
    7, 8, 9]` are new to it.

    Args:
        digits: the digits to tell apart.
        train_size: number of training images, by default all that do not validate.
        val_size: number of validation images.
        kwargs: those of `ImageTask`.

    Raises:
        UserError: if there are fewer than two different digits, or a size is more than there are
            images. In `setup`, if scikit-learn is not installed.
    """

    def __init__(
        self,
        digits: list[int] | None = None,
        train_size: int | None = None,
        val_size: int = 200,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        chosen = list(DIGITS) if digits is None else list(digits)
        if len(set(chosen)) != len(chosen) or len(chosen) < 2 or not set(chosen) <= set(DIGITS):
            raise UserError(f"digits={digits} has to name at least two different digits, 0 to 9.")
        check_size("train_size", train_size, 1, "leaves no image")
        check_size("val_size", val_size, 1, "leaves no image")
        self.digits = sorted(chosen)
        self.train_size = train_size
        self.val_size = val_size

    @property
    def class_names(self) -> list[str]:
        return [str(digit) for digit in self.digits]

    def rows(self, split: Split) -> list[Row] | None:
        if split not in ("train", "val"):
            return None
        images, labels = digit_images()
        places = [int(place) for place, label in enumerate(labels) if label in self.digits]
        wanted = self.val_size + (self.train_size or 1)
        if wanted > len(places):
            raise UserError(
                f"train_size and val_size ask for {wanted} images, and there are {len(places)} of "
                f"the digits {self.digits}."
            )
        held_back = self._draw(places, labels, self.val_size, "val")
        if split == "val":
            chosen = held_back
        else:
            rest = sorted(set(places) - set(held_back))
            chosen = self._draw(rest, labels, self.train_size or len(rest), "train")
        return [
            {
                "image": StoredImage(images, place),
                "label": self.digits.index(int(labels[place])),
                "where": f"Image {place} of scikit-learn's digits",
            }
            for place in chosen
        ]

    def _draw(self, places: list[int], labels: Any, count: int, split: str) -> list[int]:
        """Return some of the places of images, the same share of each digit."""
        if count == len(places):
            return places
        groups = [int(labels[place]) for place in places]
        return [places[k] for k in stratified_sample(groups, count, self.seed, split)]
