import random
from collections import Counter

import numpy as np
import pytest

from benchmarks import baseline
from data import raug15

W, H = 40, 30
MAGNITUDES = range(15)
NAMES = [
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast"),
    *("Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel", "Cutout"),
]


@pytest.fixture(scope="module")
def pixels():
    rng = np.random.default_rng(0)
    return rng.integers(20, 230, (H, W, 3), dtype=np.uint8)


def ramp(k=4):
    """Red tells a pixel's x and green its y: linear, so that bilinear and bicubic interpolation both reproduce it."""
    y, x = np.mgrid[:H, :W]
    return np.stack([k * x, k * y, np.full_like(x, 77)], axis=2).astype(np.uint8)


def run(name, pixels, m, seed=0):
    random.seed(seed)
    return varied(name, pixels, m).astype(int)


def varied(name, pixels, m):
    operation = raug15.OPERATIONS[name]
    return operation.apply(pixels, *operation.draw(m, *pixels.shape[:2]))


def luma(p):
    return (p @ np.array([299, 587, 114])) / 1000


def blend(degenerate, p, m):
    factor = 1.8 * m / 10 + 0.1
    return (degenerate + factor * (p - degenerate)).clip(0, 255)


def smooth(p):
    out = p.astype(float)
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    windows = np.lib.stride_tricks.sliding_window_view(p, (3, 3), axis=(0, 1))
    out[1:-1, 1:-1] = (windows * kernel).sum((-1, -2))
    return out


def autocontrast(p, m):
    low, high = p.min((0, 1)), p.max((0, 1))
    return (p - low) * 255 / (high - low)


def equalize(p, m):
    out = np.empty_like(p)
    for c in range(3):
        histogram = np.bincount(p[..., c].ravel(), minlength=256)
        last = histogram[histogram > 0][-1]
        step = (histogram.sum() - last) // 255
        below = np.concatenate([[0], histogram.cumsum()[:-1]])
        out[..., c] = ((step // 2 + below) // step).clip(0, 255)[p[..., c]]
    return out


REFERENCES = {
    # (name): reference of (pixels, m), tolerance in grey levels (Pillow rounds or truncates)
    "AutoContrast": (autocontrast, 1),
    "Equalize": (equalize, 0),
    "Invert": (lambda p, m: 255 - p, 0),
    "Posterize": (lambda p, m: p // 2 ** (8 - int(4 * m / 10)) * 2 ** (8 - int(4 * m / 10)), 0),
    "Solarize": (lambda p, m: np.where(p < int(256 * m / 10), p, 255 - p), 0),
    "SolarizeAdd": (lambda p, m: np.where(p < 128, np.minimum(p + int(110 * m / 10), 255), p), 0),
    "Color": (lambda p, m: blend(luma(p)[..., None], p, m), 2.1),  # Pillow rounds the grey too, then times 2.6
    "Contrast": (lambda p, m: blend(np.full(3, np.round(luma(p).mean())), p, m), 2.1),
    "Brightness": (lambda p, m: blend(np.zeros(3), p, m), 1.001),
    "Sharpness": (lambda p, m: blend(smooth(p), p, m), 2.1),
}


@pytest.mark.parametrize("m", MAGNITUDES)
@pytest.mark.parametrize("name", REFERENCES)
def test_pixel_operations_equal_their_formulas(name, m, pixels):
    if name == "Equalize":
        pixels = np.tile(pixels, (2, 2, 1))  # enough pixels for a step of more than one
    reference, tolerance = REFERENCES[name]
    expected = reference(pixels.astype(int), m)
    actual = run(name, pixels, m)
    assert np.abs(actual - expected).max() <= tolerance
    # Other magnitudes are far outside the tolerance: the formula is told apart from its neighbours.
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        other = reference(pixels.astype(int), (m + 1) % 15)
        assert np.abs(actual - other).max() > 2 * tolerance


def test_posterize_at_zero_bits_is_black(pixels):
    for m in (0, 1, 2):  # int(4 m / 10) = 0
        assert not run("Posterize", pixels, m).any()
    assert run("Posterize", pixels, 3).any()


def test_solarize_beyond_the_greatest_value_changes_nothing(pixels):
    pixels = np.concatenate([pixels, np.full_like(pixels, 255)])
    for m in (10, 14):  # 256 and 358
        assert (run("Solarize", pixels, m) == pixels).all()
    assert (run("Solarize", pixels, 0) == 255 - pixels.astype(int)).all()


def source_of(name, m, sign):
    """Where output pixel (x, y) comes from, in pixel-centre coordinates."""
    y, x = np.mgrid[:H, :W].astype(float)
    if name == "ShearX":
        return x + sign * 0.3 * m / 10 * (y + 0.5), y
    if name == "ShearY":
        return x, y + sign * 0.3 * m / 10 * (x + 0.5)
    if name == "TranslateXRel":
        return x + sign * 0.45 * m / 10 * W, y
    if name == "TranslateYRel":
        return x, y + sign * 0.45 * m / 10 * H
    angle = np.deg2rad(sign * 30 * m / 10)
    dx, dy = x - (W - 1) / 2, y - (H - 1) / 2
    return (
        np.cos(angle) * dx - np.sin(angle) * dy + (W - 1) / 2,
        np.sin(angle) * dx + np.cos(angle) * dy + (H - 1) / 2,
    )


@pytest.mark.parametrize("m", MAGNITUDES)
@pytest.mark.parametrize("name", ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"))
def test_geometric_operations_fetch_each_pixel_from_its_place(name, m):
    image = ramp()

    def agrees(actual, sign):
        sx, sy = source_of(name, m, sign)
        inside = (sx >= 2) & (sx <= W - 3) & (sy >= 2) & (sy <= H - 3)
        outside = (sx < -1) | (sx > W) | (sy < -1) | (sy > H)
        close = np.abs(actual[..., :2] - 4 * np.stack([sx, sy], 2)).max(2) <= 1.5  # of 4 per pixel
        return close[inside].all() and (actual[outside] == 128).all()

    signs = []
    for seed in range(30):
        actual = run(name, image, m, seed)
        matching = [sign for sign in (-1, 1) if agrees(actual, sign)]
        assert matching
        signs += matching if len(matching) == 1 else []
    if m:  # both directions occur; at m = 0 they are one
        assert set(signs) == {-1, 1}


@pytest.mark.parametrize("name", ("Rotate", "ShearX", "ShearY"))
def test_geometric_operations_interpolate_bilinearly_or_bicubically(name, pixels):
    found = {run(name, pixels, 9, seed).tobytes() for seed in range(60)}
    assert len(found) == 4  # two signs x two interpolations


@pytest.mark.parametrize("m", MAGNITUDES)
def test_cutout_is_a_grey_square_with_a_uniform_centre(m):
    side = max(2, 4 * m)
    image = np.zeros((H, W, 3), np.uint8)
    centres = set()
    for seed in range(40):
        actual = run("Cutout", image, m, seed)
        cut = (actual == (125, 122, 113)).all(2)
        assert (actual[~cut] == 0).all()
        (ys,), (xs,) = cut.any(1).nonzero(), cut.any(0).nonzero()
        assert cut.sum() == len(ys) * len(xs) > 0  # a rectangle
        for found, size in ((ys, H), (xs, W)):
            assert len(found) == found[-1] - found[0] + 1
            # The whole side, unless the border clips it; never more than half is cut off.
            assert (
                len(found) == side
                or (side // 2 <= len(found) < side and (found[0] == 0 or found[-1] == size - 1))
                or len(found) == size
            )
        centres.add((ys[0], xs[0]))
    assert len(centres) > 3
    assert (image == 0).all()


def test_cutout_centres_are_uniform():
    image = np.zeros((8, 8, 3), np.uint8)
    random.seed(0)
    counts = Counter()
    for _ in range(6400):
        cut = varied("Cutout", image, 0)[..., 0] == 125
        counts[tuple(np.argwhere(cut)[-1])] += 1  # the lower right pixel of a side of 2: the centre
    assert set(counts) == {(y, x) for y in range(8) for x in range(8)}
    assert chi_square(counts.values()) < 63 + 5 * (2 * 63) ** 0.5


def chi_square(counts):
    expected = sum(counts) / len(counts)
    return sum((c - expected) ** 2 / expected for c in counts)


def test_two_operations_each_with_its_own_uniform_magnitude(monkeypatch):
    assert list(raug15.OPERATIONS) == NAMES
    monkeypatch.setattr(
        raug15,
        "OPERATIONS",
        {name: raug15.Operation(lambda m, h, w: (m,), lambda pixels, m: pixels) for name in NAMES},
    )
    random.seed(0)
    images = 24_000
    applied = [(name, m) for _ in range(images) for name, (m,) in raug15.draw(1, 1)]
    assert len(applied) == 2 * images
    cells = Counter(applied)
    assert set(cells) == {(name, m) for name in NAMES for m in MAGNITUDES}
    degrees = 16 * 15 - 1
    assert chi_square(cells.values()) < degrees + 5 * (2 * degrees) ** 0.5  # 5 sigma
    # The two of an image are drawn independently: all 256 ordered pairs, all 225 pairs of magnitudes.
    for part, kinds in ((0, 16), (1, 15)):
        pairs = Counter((a[part], b[part]) for a, b in zip(applied[::2], applied[1::2], strict=True))
        assert len(pairs) == kinds**2
        assert chi_square(pairs.values()) < kinds**2 + 5 * (2 * kinds**2) ** 0.5


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_at_every_magnitude_keeps_size_and_kind_and_its_input(name, pixels):
    before = pixels.copy()
    for m in MAGNITUDES:
        made = varied(name, pixels, m)
        assert (made.shape, made.dtype) == ((H, W, 3), np.uint8)
        assert (pixels == before).all()


@pytest.mark.parametrize("size", [(224, 224), (61, 40)])
@pytest.mark.parametrize("name", NAMES)
def test_operations_are_pillows(name, size, photograph):
    """To a grey level, and in nearly all pixels exactly: two programs truncate what is a whole number but for rounding.

    Translations by a whole number of tenths of a pixel have many such values.
    """
    image = photograph(7, *size)
    differing = []
    for m in MAGNITUDES:
        for seed in range(6):
            random.seed(seed)
            expected = np.asarray(baseline.OPERATIONS[name](image, m)).astype(int)
            state = random.getstate()
            actual = run(name, np.array(image), m, seed)
            assert random.getstate() == state  # the same draws
            assert np.abs(actual - expected).max() <= 1
            differing.append((actual != expected).mean())
    assert np.mean(differing) < (0.02 if "Translate" in name else 0.005)


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize"])
def test_one_grey_level_is_left_as_it_is(name):
    flat = np.full((9, 7, 3), 93, np.uint8)
    assert (run(name, flat, 0) == 93).all()
