"""Videos frame by frame: decoded, predicted on, drawn and encoded with their own time stamps."""

import collections
import fractions
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gfl_jax.drawing import draw_boxes
from gfl_jax.errors import InputError, SetupError, needs
from gfl_jax.paths import PathLike, local_path, writing
from gfl_jax.results import Result, Unreadable
from gfl_jax.run import Run

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
"""Endings of the files that are taken for videos."""

CODECS = ("libx264", "libopenh264", "mpeg4")
"""Encoders of the drawn video; the first that this machine has."""


def annotate_video(
    run: Run, video: PathLike, file: Path, score_threshold: float
) -> Iterator[tuple[float, Result]]:
    """Draws the detections on every frame of a video, without sound.

    Args:
        run: the detector.
        video: the file to read.
        file: the .mp4 file to write; frames have the time stamps of the original.
        score_threshold: least score of what is drawn.

    Yields:
        Each frame's time in seconds and its detections.

    Raises:
        InputError: it is not a video, or breaks off; what was read until then is written.
        MissingExtraError: PyAV is not installed.
    """
    with needs("video"):
        import av
    source = local_path(video, "the video")
    try:
        reader = av.open(str(source))
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{source} cannot be read as a video: {error.strerror}") from error
    with reader:
        if not reader.streams.video:
            raise InputError(f"{source} has no pictures in it")
        stream = reader.streams.video[0]
        stream.thread_type = "AUTO"
        stated = (reader.duration or 0) / av.time_base  # seconds
        stamps: collections.deque[tuple[int, fractions.Fraction]] = collections.deque()
        broken: list[str] = []

        def frames() -> Iterator[np.ndarray]:
            decoded = 0
            try:
                for frame in reader.decode(stream):
                    image = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90 % 4)
                    base = frame.time_base or fractions.Fraction(1, 1000)
                    stamps.append((frame.pts if frame.pts is not None else decoded, base))
                    decoded += 1
                    yield np.ascontiguousarray(image)
            except (av.FFmpegError, OSError) as error:
                broken.append(f"{source} breaks off after {decoded} frames: {error.strerror}")
            if not decoded and not broken:
                broken.append(f"{source} has no frames")

        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        writer = None
        progress = tqdm(
            run.predictor.stream(frames()),
            total=stream.frames or None,
            desc=source.name,
            unit=" frames",
        )
        try:
            for result in progress:
                assert not isinstance(result, Unreadable)
                pts, base = stamps.popleft()
                if writer is None:
                    writer = _Writer(av, file, result.image.shape, stream.average_rate, base)
                shown = result.above(score_threshold)
                texts = [f"{n} {s:.2f}" for n, s in zip(shown.names, shown.scores, strict=True)]
                drawn = draw_boxes(result.image, shown.boxes, shown.labels.tolist(), texts)
                with writing(file):
                    writer.add(drawn, pts, base)
                yield float(pts * base), result
        finally:
            if writer is not None:
                with writing(file):
                    writer.close()
    if broken:
        raise InputError(broken[0])
    # Some containers, Matroska for one, end without an error where a file is cut off.
    last = float(pts * base)
    if last < 0.9 * stated - 1:
        raise InputError(
            f"{source} ends after {last:.1f} of the {stated:.1f} seconds that it says it has: it "
            "may be cut off"
        )


class _Writer:
    """An .mp4 file that is being written."""

    def __init__(
        self, av: Any, file: Path, shape: tuple[int, ...], rate: Any, base: fractions.Fraction
    ):
        # Half as many colours as pixels: both sides must be even.
        self._av, self._pad = av, [(0, side % 2) for side in shape[:2]] + [(0, 0)]
        self._container = av.open(str(file), "w")
        for codec in CODECS:
            try:
                self._stream = self._container.add_stream(codec, rate=rate or 25)
                break
            except (av.FFmpegError, ValueError):
                continue
        else:
            raise SetupError(f"this build of PyAV has no encoder among {', '.join(CODECS)}")
        self._stream.height, self._stream.width = (
            side + extra for side, (_, extra) in zip(shape[:2], self._pad[:2], strict=True)
        )
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = base

    def add(self, image: np.ndarray, pts: int, base: fractions.Fraction) -> None:
        padded = np.pad(image, self._pad, mode="edge")
        frame = self._av.VideoFrame.from_ndarray(padded, format="rgb24")
        frame.pts, frame.time_base = pts, base
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()
