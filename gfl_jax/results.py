"""What a detector says about one image."""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gfl_jax.detectors import sides
from gfl_jax.detectors.sides import Sides
from gfl_jax.drawing import draw_boxes, enlarged
from gfl_jax.errors import InputError, MissingFileError, needs

if TYPE_CHECKING:
    import PIL.Image
    import supervision


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """The detections on one image, by descending score.

    Attributes:
        source: the file's name; empty for arrays.
        image: the pixels, upright; uint8 RGB [height, width, 3].
        boxes: float32 [n, 4], x1 y1 x2 y2 in pixels of `image`.
        scores: float32 [n].
        labels: int [n], class indices.
        names: [n], names of the classes.
        category_ids: [n], ids of the classes in the annotations that the detector was trained on.
        sides: on request, the distribution of each side, in pixels of `image`.
    """

    source: str
    image: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: list[str]
    category_ids: list[int]
    sides: Sides | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        rows = zip(self.names, self.scores, self.boxes, strict=True)
        lines = [
            f"  {name} {score:.3f} at " + " ".join(f"{side:.1f}" for side in box)
            for name, score, box in rows
        ]
        height, width = self.image.shape[:2]
        title = f"{len(self)} detections in {self.source or 'an image'} of {width} x {height}"
        return "\n".join([title, *lines])

    def above(self, score: float) -> "Result":
        """The detections with at least this score."""
        n = int((self.scores >= score).sum())
        chosen = self.sides and Sides(self.sides.positions[:n], self.sides.probabilities[:n])
        cut = {
            name: getattr(self, name)[:n]
            for name in ("boxes", "scores", "labels", "names", "category_ids")
        }
        return dataclasses.replace(self, sides=chosen, **cut)

    def plot(self, score_threshold: float = 0.3) -> "PIL.Image.Image":
        """The image with boxes, names and scores; small images are enlarged.

        Args:
            score_threshold: least score of the detections that are drawn.
        """
        import PIL.Image

        shown = self.above(score_threshold)
        image, factor = enlarged(self.image)
        texts = [f"{n} {s:.2f}" for n, s in zip(shown.names, shown.scores, strict=True)]
        drawn = draw_boxes(image, shown.boxes * factor, shown.labels.tolist(), texts)
        return PIL.Image.fromarray(drawn)

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """COCO results: image_id, category_id, bbox (x, y, width, height) and score of each."""
        return [
            {
                "image_id": int(image_id),
                "category_id": category_id,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            for category_id, score, (x1, y1, x2, y2) in zip(
                self.category_ids, self.scores.tolist(), self.boxes.tolist(), strict=True
            )
        ]

    def to_supervision(self) -> "supervision.Detections":
        """As `supervision.Detections`, with the names in `data["class_name"]`.

        Raises:
            MissingExtraError: supervision is not installed.
        """
        with needs("supervision"):
            import supervision
        return supervision.Detections(
            xyxy=self.boxes,
            confidence=self.scores,
            class_id=self.labels,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def spread(self) -> np.ndarray:
        """Standard deviation of each side in pixels, [n, 4]; needs `sides`."""
        return sides.spread(self._sides())

    def interval(self, share: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of where each side lies with a probability, [n, 4] each, in pixels.

        Args:
            share: the probability. Whether it is true depends on the training.
        """
        return sides.interval(self._sides(), share)

    def _sides(self) -> Sides:
        if self.sides is None:
            raise InputError("ask for the distributions first: detector(image, distributions=True)")
        return self.sides


class Unreadable(NamedTuple):
    """An image that could not be read.

    Attributes:
        source: the file's name.
        error: says why.
    """

    source: str
    error: InputError | MissingFileError
