"""Images of simple coloured solids with known pose, and of flat shapes with captions, drawn with NumPy alone.

Real enough to need the same code as real images, small enough to be made in seconds: pixels, poses and captions are
exact, and every image follows from its seed. ``python -m share_simulations.shapes OUT`` writes the data and the
pretrained backbones that docs/kinds-vision.md uses.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from share_core.errors import ConfigError

Array = NDArray[np.float64]
SIDE = 24
"""Height and width of every image."""
DISTANCE = 4.0
"""From the camera to the middle of where objects are, in units of about half an object."""
FOCAL = 1.5
"""Width of the image at distance 1 is 2 / FOCAL."""


@dataclass(frozen=True)
class Solid:
    """A convex body or several of them: corners, and faces as loops of corners with a colour each."""

    corners: Array
    """(n, 3)"""
    faces: tuple[tuple[int, ...], ...]
    """Corners of each face, anticlockwise seen from outside."""
    colours: Array
    """(faces, 3) from 0 to 1."""


def _box(low: Sequence[float], high: Sequence[float]) -> tuple[Array, tuple[tuple[int, ...], ...]]:
    """Return corners and faces of a box: -x, +x, -y, +y, -z, +z."""
    corners = np.array([[(low, high)[i][0], (low, high)[j][1], (low, high)[k][2]] for i, j, k in np.ndindex(2, 2, 2)])
    faces = ((0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3))
    return corners, faces


_SIX = np.array(
    [[0.9, 0.2, 0.2], [0.2, 0.8, 0.3], [0.25, 0.35, 0.95], [0.9, 0.85, 0.2], [0.8, 0.3, 0.8], [0.2, 0.8, 0.85]]
)


def _joined(*parts: tuple[Array, tuple[tuple[int, ...], ...]], colours: Array = _SIX) -> Solid:
    corners, faces, start = [], [], 0
    for own, loops in parts:
        corners.append(own)
        faces += [tuple(start + corner for corner in loop) for loop in loops]
        start += len(own)
    return Solid(np.concatenate(corners), tuple(faces), np.resize(colours, (len(faces), 3)))


def _pyramid() -> Solid:
    corners = np.array([[-1, -0.8, -1], [1, -0.8, -1], [1, -0.8, 1], [-1, -0.8, 1], [0.3, 1.2, 0]], dtype=float)
    return _joined((corners, ((0, 1, 2, 3), (0, 4, 1), (1, 4, 2), (2, 4, 3), (3, 4, 0))))


def _wedge() -> Solid:
    corners = np.array(
        [[-1, -0.7, -0.8], [1, -0.7, -0.8], [1, -0.7, 0.8], [-1, -0.7, 0.8], [-1, 0.9, -0.8], [-1, 0.9, 0.8]],
        dtype=float,
    )
    return _joined((corners, ((0, 1, 2, 3), (0, 4, 1), (3, 2, 5), (0, 3, 5, 4), (1, 4, 5, 2))), colours=_SIX[::-1])


SOLIDS: Mapping[str, Solid] = {
    "box": _joined(_box((-1, -0.6, -0.8), (1, 0.6, 0.8))),
    "slab": _joined(_box((-0.5, -1.1, -0.9), (0.5, 1.1, 0.9)), colours=np.roll(_SIX, 2, axis=0)),
    "pyramid": _pyramid(),
    "wedge": _wedge(),
    "ell": _joined(_box((-1, -1, -0.4), (1, -0.4, 0.4)), _box((-1, -0.4, -0.4), (-0.4, 1, 0.4))),
}
"""Categories. Backbones are pretrained on box and slab; the others are for tasks."""
PRETRAINING = ("box", "slab")


def rotation(yaw: float, pitch: float, roll: float) -> Array:
    """Return the matrix of turns by three angles in radians about y, then x, then z: ``Rz Rx Ry``."""
    (cy, sy), (cx, sx), (cz, sz) = ((np.cos(a), np.sin(a)) for a in (yaw, pitch, roll))
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    turned: Array = about_z @ about_x @ about_y
    return turned


def project(points: Array, turn: Array, shift: Array) -> Array:
    """Return (n, 3): pixel x and y of points under a pose, and their distance. The camera looks along +z, y is down."""
    seen = points @ turn.T + shift + np.array([0, 0, DISTANCE])
    scale = FOCAL * SIDE / 2 / seen[:, 2:]
    return np.concatenate([SIDE / 2 + seen[:, :2] * scale, seen[:, 2:]], axis=1)


def render(solid: Solid, turn: Array, shift: Array, background: Array) -> NDArray[np.uint8]:
    """Return an image (SIDE, SIDE, 3): faces turned to the camera, the farthest first, darker where turned away."""
    image = np.broadcast_to(background, (SIDE, SIDE, 3)).copy()
    flat = project(solid.corners, turn, shift)
    seen = solid.corners @ turn.T + shift + np.array([0, 0, DISTANCE])
    y, x = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    for face in sorted(range(len(solid.faces)), key=lambda one: -float(flat[list(solid.faces[one]), 2].mean())):
        loop = list(solid.faces[face])
        normal = np.cross(seen[loop[1]] - seen[loop[0]], seen[loop[2]] - seen[loop[1]])
        towards = float(normal @ -seen[loop[0]] / (np.linalg.norm(normal) * np.linalg.norm(seen[loop[0]])))
        if towards <= 0:
            continue
        inside = np.ones((SIDE, SIDE), dtype=bool)
        for a, b in zip(loop, [*loop[1:], loop[0]], strict=True):
            (ax, ay, _), (bx, by, _) = flat[a], flat[b]
            inside &= (bx - ax) * (y - ay) - (by - ay) * (x - ax) <= 0
        image[inside] = solid.colours[face] * (0.4 + 0.6 * towards)
    return (image * 255).round().astype(np.uint8)


@dataclass(frozen=True)
class Posed:
    """Images of one solid with their poses and the corners in pixels."""

    images: NDArray[np.uint8]
    """(n, SIDE, SIDE, 3)"""
    rotations: Array
    """(n, 3, 3)"""
    translations: Array
    """(n, 3)"""
    corners: Array
    """(n, corners, 2) as fractions of width and height."""


def posed(name: str, count: int, seed: int) -> Posed:
    """Return images of a solid in random poses before random plain backgrounds."""
    draw = np.random.default_rng(seed)
    solid = SOLIDS[name]
    images, turns, shifts, corners = [], [], [], []
    for _ in range(count):
        turn = rotation(draw.uniform(-1.6, 1.6), draw.uniform(-0.7, 0.7), draw.uniform(-0.5, 0.5))
        shift = draw.uniform(-0.3, 0.3, 3)
        images.append(render(solid, turn, shift, draw.uniform(0, 0.4, 3)))
        turns.append(turn)
        shifts.append(shift)
        corners.append(project(solid.corners, turn, shift)[:, :2] / SIDE)
    return Posed(np.stack(images), np.stack(turns), np.stack(shifts), np.stack(corners))


COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.7, 0.2), "blue": (0.15, 0.25, 0.9), "yellow": (0.95, 0.85, 0.1)}
PLACES = {"left": 0.32, "middle": 0.5, "right": 0.68}
FORMS: Mapping[str, Callable[[Array, Array], NDArray[np.bool_]]] = {
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.2,
    "disc": lambda x, y: np.hypot(x, y) < 0.23,
    "bar": lambda x, y: (abs(x) < 0.07) & (abs(y) < 0.35),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.07) & (np.maximum(abs(x), abs(y)) < 0.28),
    "ring": lambda x, y: (np.hypot(x, y) < 0.27) & (np.hypot(x, y) > 0.15),
}
"""Which points are in a flat shape around zero."""
CAPTION_SIDE = 12
"""Height and width of the images with captions."""


def captioned(forms: Sequence[str], count: int, seed: int, dark: bool = False) -> tuple[NDArray[np.uint8], list[str]]:
    """Return images (n, CAPTION_SIDE, CAPTION_SIDE, 3) and captions such as ``a red disc on the left``.

    Shapes lie on white, or on ``dark`` blue-grey, which the caption says.
    """
    draw = np.random.default_rng(seed)
    y, x = (np.mgrid[0:CAPTION_SIDE, 0:CAPTION_SIDE] + 0.5) / CAPTION_SIDE
    images, captions = [], []
    for _ in range(count):
        form, colour, place = (str(draw.choice(list(some))) for some in (forms, COLOURS, PLACES))
        image = np.full((CAPTION_SIDE, CAPTION_SIDE, 3), (0.2, 0.22, 0.3) if dark else (1.0, 1.0, 1.0))
        image[FORMS[form](x - PLACES[place], y - 0.5 + draw.uniform(-0.1, 0.1))] = COLOURS[colour]
        images.append((image * 255).round().astype(np.uint8))
        captions.append(f"a {colour} {form} on the {place}" + (" at night" if dark else ""))
    return np.stack(images), captions


def write_table(folder: Path, name: str, images: NDArray[np.uint8], columns: Mapping[str, Sequence[object]]) -> Path:
    """Write images as PNG files and ``NAME.jsonl`` with a column ``image`` and the given ones; return its path.

    Raises:
        ConfigError: pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("writing images needs pillow: pip install 'fedshare[data]'") from error
    (folder / name).mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as out:
        for row, image in enumerate(images):
            file = f"{name}/{row:05d}.png"
            Image.fromarray(image).save(folder / file)
            out.write(json.dumps({"image": file, **{key: values[row] for key, values in columns.items()}}) + "\n")
    return path


def write_poses(folder: Path, solid: str, rows: int, test_rows: int, seed: int) -> None:
    """Write ``train.jsonl`` and ``test.jsonl`` with image, rotation, translation and keypoints (the corners)."""
    for name, count, own in (("train", rows, 2 * seed), ("test", test_rows, 2 * seed + 1)):
        made = posed(solid, count, own)
        columns = {
            "rotation": made.rotations.round(6).tolist(),
            "translation": made.translations.round(6).tolist(),
            "keypoints": made.corners.clip(0, 1).round(6).tolist(),
        }
        write_table(folder, name, made.images, columns)


def write_captions(
    folder: Path, forms: Sequence[str], rows: int, test_rows: int, seed: int, dark: bool = False
) -> None:
    """Write ``train.jsonl`` and ``test.jsonl`` with image and caption."""
    for name, count, own in (("train", rows, 2 * seed), ("test", test_rows, 2 * seed + 1)):
        images, captions = captioned(forms, count, own, dark)
        write_table(folder, name, images, {"caption": captions})


def main() -> None:
    """Write the data of four tasks and two backbones into a directory."""
    from share_simulations.pretrain_shapes import pretrain_denoiser, pretrain_encoder, save_denoiser, save_encoder

    out = Path(sys.argv[1] if len(sys.argv) > 1 else "shapes")
    write_poses(out / "pyramid", "pyramid", 600, 200, 11)
    write_poses(out / "wedge", "wedge", 600, 200, 12)
    write_captions(out / "night", ("square", "disc"), 400, 100, 13, dark=True)
    write_captions(out / "rings", ("cross", "ring"), 400, 100, 14)
    save_encoder(pretrain_encoder(600).module, out / "encoder.safetensors")
    save_denoiser(pretrain_denoiser(600).module, out / "denoiser")
    print(f"wrote {', '.join(sorted(path.name for path in out.iterdir()))} to {out}")


if __name__ == "__main__":
    main()
