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
TONES = np.array(
    [
        (207, 226, 243),  # empty
        (74, 160, 120),
        (240, 190, 70),
        (214, 90, 40),
        (120, 15, 25),  # full
    ]
)


class Picture:
    """A picture that is drawn again and again. network: with `shapes`, or None."""

    def __init__(self, network=None):
        from PIL import ImageFont

        self.shapes = beside(getattr(network, "shapes", ()))
        self.font = ImageFont.load_default(13 * FINE)

    def draw(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """{name: (n,) or (n, points)} of n decisions as an image (480, 640, 3) uint8."""
        from PIL import Image, ImageDraw

        size = FINE * WIDTH, FINE * HEIGHT
        self.image = Image.new("RGB", size, "white")
        self.pen = ImageDraw.Draw(self.image)
        road = 3.0 if self.shapes else 1.5
        heights = [0.0]
        for y in values.values():
            heights.append(1.0 if y.ndim == 1 else road)
        edges = np.cumsum(heights)
        edges *= HEIGHT / edges[-1]
        starts = edges[:-1]
        stops = edges[1:]
        for start, stop, name in zip(starts, stops, values):
            top = start + TOP
            bottom = stop - BOTTOM
            box = np.array([LEFT, top, WIDTH - RIGHT, bottom])
            self.panel(name, values[name], FINE * box.round())
        shown = WIDTH, HEIGHT
        small = self.image.resize(shown, Image.Resampling.BOX)
        return np.asarray(small).copy()

    def panel(self, name, y, box):
        """box: left, top, right, bottom."""
        left, top, *_ = box
        above = top - 4 * FINE
        self.write(name, left, above, "ls", INK)
        if y.ndim == 1:
            self.curve(y, box)
        elif self.shapes:
            self.map(y[-1], box)
        else:
            self.road(y.T, box)

    def write(self, text, x, y, anchor, color=SOFT):
        at = x, y
        self.pen.text(at, text, fill=color, font=self.font, anchor=anchor)

    def line(self, points, color, width):
        """points: (n, 2)."""
        flat = np.ravel(points).tolist()
        self.pen.line(flat, fill=color, width=width * FINE, joint="curve")

    def curve(self, y, box):
        """With a grid line and a number at both ends."""
        left, top, right, bottom = box
        y = np.round(y, 6)  # what is left of a queue is no number to draw
        low = float(np.nanmin(y))
        high = float(np.nanmax(y))
        if high == low:
            low -= 0.5
            high += 0.5
        beside = left - 6 * FINE
        for value, at in ((low, bottom), (high, top)):
            start = left, at
            stop = right, at
            self.line([start, stop], GRID, 1)
            self.write(f"{value:.4g}", beside, at, "rm")
        n = len(y)
        x = np.linspace(left, right, max(n, 2))
        height = top - bottom
        up = bottom + height * (y - low) / (high - low)
        points = np.stack([x[:n], up], 1)
        points = points[np.isfinite(y)]
        # a line of one point would not be drawn
        if len(points) == 1:
            dash = points + (2 * FINE, 0)
            points = np.concatenate([points, dash])
        self.line(points, BLUE, 2)

    def road(self, values, box):
        """(points, n): the road upwards, time to the right."""
        from PIL import Image

        low = float(np.nanmin(values))
        high = float(np.nanmax(values))
        span = max(high - low, 1e-9)
        upwards = values[::-1]
        shares = (upwards - low) / span
        pixels = Image.fromarray(tones(shares))
        left, top, right, bottom = box.astype(int).tolist()
        size = right - left, bottom - top
        pixels = pixels.resize(size, Image.Resampling.NEAREST)
        self.image.paste(pixels, (left, top))
        beside = left - 6 * FINE
        self.write("end", beside, top, "rm")
        self.write("start", beside, bottom, "rm")
        self.legend(f"light {low:.3g}, dark {high:.3g}", box)

    def map(self, filling, box):
        """Every segment in the colour of its filling."""
        points = np.concatenate(self.shapes)
        low = points.min(0)
        size = np.ptp(points, 0).clip(1.0)
        start = box[:2]
        stop = box[2:]
        room = stop - start - 12 * FINE
        scale = (room / size).min()
        half = 0.5 * scale * size
        center = (start + stop) / 2
        corner = center + half * (-1, 1)  # of the least x and y
        colors = tones(filling / FULL).tolist()
        for line, color in zip(self.shapes, colors):
            along = scale * (line - low)
            # pixels count downwards
            at = corner + along * (1, -1)
            self.line(at, tuple(color), 4)
        self.legend(f"dark: {100 * FULL:.0f} % full", box)

    def legend(self, text, box):
        _, top, right, _ = box
        above = top - 4 * FINE
        self.write(text, right, above, "rs")


def tones(x) -> np.ndarray:
    """Numbers from 0 to 1 as colours (..., 3) uint8; NaN is white."""
    x = np.asarray(x, float)
    last = len(TONES) - 1
    share = np.nan_to_num(x).clip(0, 1)
    at = last * share
    first = np.minimum(at.astype(int), last - 1)
    part = (at - first)[..., None]
    below = TONES[first]
    above = TONES[first + 1]
    color = (1 - part) * below + part * above
    color[np.isnan(x)] = 255
    return color.astype(np.uint8)


def beside(shapes, gap: float = GAP) -> list[np.ndarray]:
    """Polylines (points, 2) in m, each moved to the right of its way; [] if any has no points."""
    if not shapes or any(len(line) < 2 for line in shapes):
        return []
    moved = []
    for line in shapes:
        line = np.asarray(line, float)
        along = np.gradient(line, axis=0)
        # a quarter turn clockwise: (x, y) becomes (y, -x)
        right = along[:, ::-1] * (1, -1)
        length = np.linalg.norm(right, axis=1, keepdims=True)
        right /= np.maximum(length, 1e-9)
        moved.append(line + 0.5 * gap * right)
    return moved
