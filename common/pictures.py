"""Pictures of environments, render_mode="rgb_array": what lanes.py keeps of an episode, drawn.

    picture = Picture(network).draw({"equity": (n,), "position": (n,)})  # (H, W, 3) uint8

A quantity over n decisions is a curve; one with a value at every point of a road, (n, points), an
image of space and time, or, where the network has coordinates, a map of its segments as they are
now. Pillow draws twice as large and shrinks, for smooth lines: a few milliseconds a frame.
"""

from __future__ import annotations

import numpy as np

WIDTH, HEIGHT = 640, 480  # of the picture
FINE = 2  # drawn so many times as large
LEFT, RIGHT, TOP, BOTTOM = 76, 14, 26, 12  # pixels around a panel
BLUE, INK, SOFT, GRID = "#0b62b5", "#1b2430", "#5a6675", "#e5e8ec"
GAP = 14.0  # m between the two directions of a street on a map
FULL = 0.5  # filling of a segment from which on it is as dark as can be
# empty to full: the first tone of a road, the last of a jam
TONES = np.array([(207, 226, 243), (74, 160, 120), (240, 190, 70), (214, 90, 40), (120, 15, 25)])


class Picture:
    """A picture that is drawn again and again. network: with `shapes`, or None."""

    def __init__(self, network=None):
        from PIL import ImageFont

        self.shapes = beside(getattr(network, "shapes", ()))
        self.font = ImageFont.load_default(13 * FINE)

    def draw(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """{name: (n,) or (n, points)} of n decisions as an image (480, 640, 3) uint8."""
        from PIL import Image, ImageDraw

        self.image = Image.new("RGB", (FINE * WIDTH, FINE * HEIGHT), "white")
        self.pen = ImageDraw.Draw(self.image)
        heights = [1.0 if y.ndim == 1 else 3.0 if self.shapes else 1.5 for y in values.values()]
        edges = HEIGHT * np.cumsum([0.0, *heights]) / sum(heights)
        for name, y, top, bottom in zip(values, values.values(), edges, edges[1:]):
            box = FINE * np.array([LEFT, top + TOP, WIDTH - RIGHT, bottom - BOTTOM]).round()
            self.write(name, box[0], box[1] - 4 * FINE, "ls", INK)
            if y.ndim == 1:
                self.curve(y, box)
            elif self.shapes:
                self.map(y[-1], box)
            else:
                self.road(y.T, box)
        small = self.image.resize((WIDTH, HEIGHT), Image.Resampling.BOX)
        return np.asarray(small).copy()

    def write(self, text, x, y, anchor, color):
        self.pen.text((x, y), text, fill=color, font=self.font, anchor=anchor)

    def scale(self, low, high, box):
        """A grid line and a number at both ends."""
        for value, y in ((low, box[3]), (high, box[1])):
            self.pen.line((box[0], y, box[2], y), fill=GRID, width=FINE)
            self.write(f"{value:.4g}", box[0] - 6 * FINE, y, "rm", SOFT)

    def curve(self, y, box):
        y = np.round(y, 6)  # what is left of a queue is no number to draw
        low, high = float(np.nanmin(y)), float(np.nanmax(y))
        if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
            low, high = low - 0.5, high + 0.5
        self.scale(low, high, box)
        x = np.linspace(box[0], box[2], max(len(y), 2))[: len(y)]
        up = box[3] - (box[3] - box[1]) * (y - low) / (high - low)
        points = np.stack([x, up], 1)[np.isfinite(y)]
        if len(points) == 1:
            points = np.concatenate([points, points + (2 * FINE, 0)])
        self.pen.line(points.ravel().tolist(), fill=BLUE, width=2 * FINE, joint="curve")

    def road(self, values, box):
        """(points, n): the road upwards, time to the right."""
        from PIL import Image

        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        pixels = Image.fromarray(tones((values[::-1] - low) / max(high - low, 1e-9)))
        left, top, right, bottom = box.astype(int).tolist()
        size = right - left, bottom - top
        self.image.paste(pixels.resize(size, Image.Resampling.NEAREST), (left, top))
        for text, y in (("end", top), ("start", bottom)):
            self.write(text, box[0] - 6 * FINE, y, "rm", SOFT)
        self.write(f"light {low:.3g}, dark {high:.3g}", box[2], box[1] - 4 * FINE, "rs", SOFT)

    def map(self, filling, box):
        """Every segment in the colour of its filling."""
        points = np.concatenate(self.shapes)
        low, size = points.min(0), np.ptp(points, 0).clip(1.0)
        room = box[2:] - box[:2] - 12 * FINE
        scale = (room / size).min()
        corner = (box[:2] + box[2:] + (-1, 1) * size * scale) / 2  # of the least x and y
        colors = tones(filling / FULL).tolist()
        for line, color in zip(self.shapes, colors):
            at = corner + (line - low) * scale * (1, -1)
            self.pen.line(at.ravel().tolist(), fill=tuple(color), width=4 * FINE, joint="curve")
        self.write(f"dark: {100 * FULL:.0f} % full", box[2], box[1] - 4 * FINE, "rs", SOFT)


def tones(x) -> np.ndarray:
    """Numbers from 0 to 1 as colours (..., 3) uint8; NaN is white."""
    x = np.asarray(x, float)
    at = np.nan_to_num(x).clip(0, 1) * (len(TONES) - 1)
    first = np.minimum(at.astype(int), len(TONES) - 2)
    part = (at - first)[..., None]
    color = TONES[first] * (1 - part) + TONES[first + 1] * part
    return np.where(np.isnan(x)[..., None], 255, color).astype(np.uint8)


def beside(shapes, gap: float = GAP) -> list[np.ndarray]:
    """Polylines (points, 2) in m, each moved to the right of its way; [] if any has no points."""
    if not shapes or any(len(line) < 2 for line in shapes):
        return []
    moved = []
    for line in shapes:
        line = np.asarray(line, float)
        along = np.gradient(line, axis=0)
        right = along[:, ::-1] * (1, -1)
        size = np.linalg.norm(right, axis=1, keepdims=True)
        moved.append(line + 0.5 * gap * right / np.maximum(size, 1e-9))
    return moved
