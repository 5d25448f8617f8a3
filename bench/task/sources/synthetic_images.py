"""Images of synthetic items: one textured shape on a pale background, drawn at any size from a few numbers.

A drawing holds the attributes (shape, colour, texture) and nuisance parameters (position, size, rotation, light,
noise), so two items with equal attributes never have equal pixels. Everything is computed on a grid with four samples
a pixel, without fonts, files or a drawing library, so an image depends on these numbers alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Grid = NDArray[np.float64]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (204, 48, 44),
    "orange": (232, 126, 34),
    "yellow": (236, 196, 44),
    "green": (74, 158, 66),
    "teal": (30, 156, 156),
    "blue": (52, 98, 196),
    "purple": (126, 66, 176),
    "pink": (224, 92, 154),
}
"""In the order of the colour wheel: neighbours look similar."""
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent")
TEXTURES = ("plain", "stripes", "bars", "dots", "checks", "shaded")

_SAMPLES = 2  # per side, so four samples a pixel
_PERIOD = 0.36  # of a texture, in half heights of the shape: six pixels at 32 x 32, still visible


@dataclass(frozen=True)
class Drawing:
    """One item's image; call it with a size to render it. Small and picklable."""

    shape: int
    colour: int
    texture: int
    x: float
    y: float
    """Centre of the shape, from -1 to 1 across the image."""
    scale: float
    """Half height of the shape; 1 is half the image."""
    turn: float
    """Rotation, in radians."""
    light: float
    """Brightness of the shape, around 1."""
    ground: tuple[float, float, float]
    """Colour in the middle of the background, 0 to 255."""
    slope: float
    """Change of the background's brightness from top to bottom, 0 to 255."""
    noise: float
    """Standard deviation of the pixel noise, 0 to 255."""
    noise_seed: int

    def __call__(self, size: int) -> NDArray[np.uint8]:
        """Render as uint8 (3, size, size), RGB."""
        steps = (np.arange(size * _SAMPLES) + 0.5) * (2 / (size * _SAMPLES)) - 1
        y, x = np.meshgrid(steps, steps, indexing="ij")
        image = np.array(self.ground)[:, None, None] + self.slope * y
        shadow = inside(self.shape, *self._local(x - 0.05, y - 0.07))
        image = np.where(shadow, image * 0.8, image)
        u, v = self._local(x, y)
        paint = np.array(list(COLOURS.values())[self.colour])[:, None, None] * self.light
        shade = texture_shade(self.texture, u, v)
        # Towards white where the texture is positive, towards black where it is negative.
        paint = np.where(shade > 0, paint + (255 - paint) * shade, paint * (1 + shade))
        image = np.where(inside(self.shape, u, v), paint, image)
        image = image.reshape(3, size, _SAMPLES, size, _SAMPLES).mean(axis=(2, 4))
        image += np.random.default_rng(self.noise_seed).normal(0, self.noise, image.shape)
        pixels: NDArray[np.uint8] = np.clip(np.rint(image), 0, 255).astype(np.uint8)
        return pixels

    def _local(self, x: Grid, y: Grid) -> tuple[Grid, Grid]:
        """Map image coordinates to the shape's frame, in which it lies between -1 and 1 and y points up."""
        dx, dy = (x - self.x) / self.scale, (self.y - y) / self.scale
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        return cos * dx + sin * dy, cos * dy - sin * dx


def draw(rng: np.random.Generator, shape: int, colour: int, texture: int) -> Drawing:
    """Return a drawing of these attributes with random nuisance parameters."""
    grey = rng.uniform(208, 238)
    return Drawing(
        shape=shape,
        colour=colour,
        texture=texture,
        x=rng.uniform(-0.12, 0.12),
        y=rng.uniform(-0.12, 0.12),
        scale=rng.uniform(0.65, 0.82),
        turn=rng.uniform(-0.15, 0.15),
        light=rng.uniform(0.85, 1.1),
        ground=(grey + rng.uniform(-14, 14), grey + rng.uniform(-14, 14), grey + rng.uniform(-14, 14)),
        slope=rng.uniform(-12, 12),
        noise=rng.uniform(2, 8),
        noise_seed=int(rng.integers(2**31)),
    )


def inside(shape: int, x: Grid, y: Grid) -> NDArray[np.bool_]:
    """Mask of the points inside a shape (an index into ``SHAPES``); coordinates in its frame."""
    r = np.hypot(x, y)
    match SHAPES[shape]:
        case "circle":
            return r < 0.9
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) < 0.8
        case "triangle":
            return (y > -0.75) & (np.abs(x) * 1.75 + y < 0.95)
        case "star":
            tenth = np.pi / 5
            angle = np.abs((np.arctan2(x, y) + tenth) % (2 * tenth) - tenth)  # from the nearest point's axis
            # Edge from a point (radius 1, angle 0) to a notch (radius 0.45, angle 36 degrees).
            run = 1 - 0.45 * np.cos(tenth)
            star: NDArray[np.bool_] = r * (run * np.sin(angle) + 0.45 * np.sin(tenth) * np.cos(angle)) < 0.45 * np.sin(
                tenth
            )
            return star
        case "ring":
            return (r < 0.92) & (r > 0.45)
        case "cross":
            return (np.minimum(np.abs(x), np.abs(y)) < 0.3) & (np.maximum(np.abs(x), np.abs(y)) < 0.9)
        case "heart":
            a, b = x * 1.25, y * 1.2 + 0.15
            return (a**2 + b**2 - 1) ** 3 - a**2 * b**3 < 0
        case _:  # crescent
            return (r < 0.92) & (np.hypot(x - 0.42, y - 0.12) > 0.68)


def texture_shade(texture: int, x: Grid, y: Grid) -> Grid:
    """Lightening (up to 1) or darkening (down to -1) of each point by a texture (an index into ``TEXTURES``)."""
    across, along = np.sin(2 * np.pi * x / _PERIOD / 1.6), np.sin(2 * np.pi * y / _PERIOD / 1.6)
    match TEXTURES[texture]:
        case "plain":
            return np.zeros_like(x)
        case "stripes":
            return np.where(along > 0, 0.6, 0.0)
        case "bars":
            return np.where(across > 0, -0.5, 0.0)
        case "dots":
            return np.where(across * along > 0.3, 0.8, 0.0)
        case "checks":
            return np.where(across * along > 0, -0.55, 0.1)
        case _:  # shaded
            return np.clip(-0.75 * x, -0.65, 0.65)
