"""Images out of folders and tables: the same pixels and labels in every form, changed only where that was asked for."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from share_client.data import Fit, ImageRows, read_image_splits
from share_client.data import pictures as pictures_module
from share_client.data.pictures import load_files
from share_client.tasks_file import TaskConfig
from share_core.errors import ConfigError

Image = pytest.importorskip("PIL.Image", reason="image files need pillow")

FIT = Fit((1, 8, 8))
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
LABELS = ("cat", "dog", "cat", "dog", "cat", "dog")


def _png(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "png")
    return out.getvalue()


def _folder(root: Path) -> Path:
    for number, (picture, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        (root / "images" / label).mkdir(parents=True, exist_ok=True)
        (root / "images" / label / f"{number}.png").write_bytes(_png(picture))
    (root / "images" / ".hidden").write_bytes(b"")
    (root / "images" / "cat" / "Thumbs.db").write_bytes(b"")
    return root / "images"


def _listed(root: Path, ending: str) -> Path:
    _folder(root)
    rows = [(f"images/{label}/{number}.png", label) for number, label in enumerate(LABELS)]
    path = root / f"list.{ending}"
    if ending == "csv":
        path.write_text("image,label\n" + "".join(f"{name},{label}\n" for name, label in rows))
    else:
        path.write_text("".join(json.dumps({"image": name, "label": label}) + "\n" for name, label in rows))
    return path


def _parquet(root: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    # As Hugging Face datasets write images: an object with bytes and path.
    images = [{"bytes": _png(picture), "path": None} for picture in PIXELS]
    parquet.write_table(pyarrow.table({"image": images, "label": list(LABELS)}), root / "a.parquet")
    return root / "a.parquet"


def _dataset(root: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = {"image": [{"bytes": _png(picture), "path": None} for picture in PIXELS], "label": list(LABELS)}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(root / "set"))
    return root / "set"


MAKERS: Mapping[str, Callable[[Path], Path]] = {
    "folder": _folder,
    "csv": lambda root: _listed(root, "csv"),
    "jsonl": lambda root: _listed(root, "jsonl"),
    "parquet": _parquet,
    "datasets": _dataset,
}


def _config(path: Path, **more: object) -> TaskConfig:
    return replace(TaskConfig("t", "image-classification", path, path), **more)  # type: ignore[arg-type]


def _by_first_pixels(rows: ImageRows) -> list[tuple[list[float], object]]:
    return sorted((x.flatten().tolist(), label) for x, label in zip(rows.x, rows.labels, strict=True))


@pytest.mark.parametrize("name", MAKERS)
def test_every_form_gives_the_same_images(tmp_path: Path, name: str) -> None:
    train, test = read_image_splits(_config(MAKERS[name](tmp_path)), FIT)
    x = torch.from_numpy(PIXELS).float().div(255).unsqueeze(-1)
    assert _by_first_pixels(train) == _by_first_pixels(ImageRows(x, LABELS, ("",) * 6))
    assert _by_first_pixels(test) == _by_first_pixels(train)
    assert str(tmp_path) in train.places[0]


@pytest.mark.parametrize("name", MAKERS)
def test_images_are_held_out_once_and_cut(tmp_path: Path, name: str) -> None:
    config = _config(MAKERS[name](tmp_path), test=None, validation=0.6)
    train, test = read_image_splits(config, FIT)
    assert len(train.labels) + len(test.labels) == 6
    assert not {tuple(x.flatten().tolist()) for x in train.x} & {tuple(x.flatten().tolist()) for x in test.x}
    short, small = read_image_splits(replace(config, rows=2, test_rows=1), FIT)
    assert torch.equal(short.x, train.x[:2])
    assert torch.equal(small.x, test.x[:1])


def test_an_image_that_is_added_to_a_folder_moves_no_other(tmp_path: Path) -> None:
    config = _config(_folder(tmp_path), test=None, validation=0.6)
    before = read_image_splits(config, FIT)
    (tmp_path / "images" / "cat" / "0new.png").write_bytes(_png(PIXELS[0] // 2))
    after = read_image_splits(config, FIT)
    for old, new in zip(before, after, strict=True):
        assert set(old.places) <= set(new.places)


def test_files_are_resized_and_converted_only_when_the_task_says_so(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        Image.new("RGBA", (16, 4), (255, 0, 0, 255)).save(tmp_path / label / "x.png")
    for options, words in (({}, "mode L .* got mode RGBA"), ({"convert": True}, "got 4 x 16 .*resize = true")):
        config = _config(tmp_path, options=options)
        with pytest.raises(ConfigError, match=words):
            read_image_splits(config, Fit.of(config, (1, 8, 8)))
    config = _config(tmp_path, options={"convert": True, "resize": True})
    train, _ = read_image_splits(config, Fit.of(config, (1, 8, 8)))
    assert train.x.shape == (2, 8, 8, 1)
    assert torch.allclose(train.x, torch.full_like(train.x, 0.299), atol=0.005)  # the share of red in ITU-R BT.601


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 8])
def test_greys_of_16_bits_keep_their_brightness(tmp_path: Path, ending: str, channels: int, size: int) -> None:
    deep = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / f"a.{ending}")
    with pytest.raises(ConfigError, match="got mode I;16; change the file, or say convert = true"):
        load_files([tmp_path / f"a.{ending}"], Fit((channels, 16, 16)))
    (pixels,) = load_files([tmp_path / f"a.{ending}"], Fit((channels, size, size), resize=True, convert=True))
    means = (deep / 65535).reshape(size, 16 // size, size, 16 // size).mean(axis=(1, 3))
    assert pixels.shape == (size, size, channels)
    error = np.abs(pixels.numpy() - means[..., None])[1:-1, 1:-1].max()  # filters differ at the border
    assert error < (0.5 / 255 + 1e-6 if size == 16 else 0.02)


@pytest.mark.parametrize(("kind", "mode"), [(np.float32, "F"), (np.int32, "I")])
@pytest.mark.parametrize("convert", [False, True])
def test_numbers_without_a_white_are_refused(tmp_path: Path, kind: type, mode: str, convert: bool) -> None:
    Image.fromarray(np.full((8, 8), 1, kind)).save(tmp_path / "a.tif")
    with pytest.raises(ConfigError, match=rf"a\.tif: expected .* got mode {mode}, .*scale them to 255 or 65535"):
        load_files([tmp_path / "a.tif"], Fit((1, 8, 8), convert=convert))


def test_options_are_read_and_checked() -> None:
    config = _config(Path("x"), options={"resize": 1})
    with pytest.raises(ConfigError, match="options of kind 'image-classification': resize: expected true or false"):
        Fit.of(config, (1, 8, 8))


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3]), st.sampled_from([1, 3]), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_resized_and_converted_arrays_stay_in_range(tall: int, wide: int, have: int, want: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.rand(2, tall, wide, have, generator=draw)
    out = Fit((want, 8, 8), resize=True, convert=True).arrays(pixels, "here")
    assert out.shape == (2, 8, 8, want)
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1
    assert out.min() >= pixels.min() - 1e-4  # no filter here makes a pixel darker or brighter than all others
    assert out.max() <= pixels.max() + 1e-4


def test_arrays_that_fit_are_left_alone() -> None:
    pixels = torch.rand(2, 8, 8, 1)
    assert torch.equal(Fit((1, 8, 8), resize=True, convert=True).arrays(pixels, "here"), pixels)


def test_a_bomb_of_pixels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32)
    with pytest.raises(ConfigError, match="less than 90 million pixels"):
        read_image_splits(_config(_folder(tmp_path)), FIT)


@pytest.mark.parametrize("wrapped", [False, True])
def test_base64_is_no_name_of_a_file_and_is_not_told(tmp_path: Path, wrapped: bool) -> None:
    text = base64.b64encode(_png(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))).decode()
    assert len(text) > 4096, "longer than the name of a file may be"
    row = {"image": {"bytes": text} if wrapped else text, "label": 0}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=r"line 1: image: .* base64 is not read: save the images as files") as caught:
        read_image_splits(_config(tmp_path / "a.jsonl"), FIT)
    assert text[:20] not in str(caught.value)


def test_missing_pillow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    folder = _folder(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"needs pillow: pip install 'fedshare\[data\]'"):
        read_image_splits(_config(folder), FIT)


def test_a_fit_that_resizes_unasked_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def eager(self: Fit, opened: object, where: str) -> object:
        return pictures_module.np.asarray(opened.convert("L").resize((8, 8))).reshape(8, 8, 1)  # type: ignore[attr-defined]

    monkeypatch.setattr(Fit, "picture", eager)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_files_are_resized_and_converted_only_when_the_task_says_so(tmp_path)
