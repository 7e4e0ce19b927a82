from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from bench.prepare.alignment import TEMPLATE, align_face, carry_over, similarity_from_points, template_points


def similarity(*, scale, degrees, shift):
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.column_stack([scale * turn, shift])


def random_points(seed, n=5):
    return np.random.default_rng(seed).uniform(0, 100, (n, 2))


def umeyama(source, target):
    """Equations 34 to 43 of the paper, by singular values."""
    a, b = source - source.mean(0), target - target.mean(0)
    u, d, vt = np.linalg.svd(b.T @ a / len(source))
    sign = np.diag([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    turn = u @ sign @ vt
    scale = np.trace(np.diag(d) @ sign) / (a**2).sum(1).mean()
    return np.column_stack([scale * turn, target.mean(0) - scale * turn @ source.mean(0)])


def squared_error(matrix, source, target):
    return ((carry_over(source, matrix) - target) ** 2).sum()


@pytest.mark.parametrize(("scale", "degrees"), [(1, 0), (0.1, 90), (7.5, -170), (1, 180), (0.37, 33)])
def test_an_exact_similarity_is_found_exactly(scale, degrees):
    wanted = similarity(scale=scale, degrees=degrees, shift=(12.5, -7.25))
    source = random_points(1)
    np.testing.assert_allclose(similarity_from_points(source, carry_over(source, wanted)), wanted, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_of_noisy_points_the_least_squares_solution_is_found(seed):
    source, target = random_points(seed, 7), random_points(seed + 100, 7)
    # x' = a x - b y + c, y' = b x + a y + d, solved by numpy.
    x, y, ones, zero = *source.T, np.ones(7), np.zeros(7)
    design = np.concatenate([np.stack([x, -y, ones, zero], 1), np.stack([y, x, zero, ones], 1)])
    (a, b, c, d), *_ = np.linalg.lstsq(design, target.T.ravel(), rcond=None)
    np.testing.assert_allclose(similarity_from_points(source, target), [[a, -b, c], [b, a, d]], atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_it_agrees_with_the_singular_values_of_the_paper(seed):
    source, target = random_points(seed, 7), random_points(seed + 50, 7)
    np.testing.assert_allclose(similarity_from_points(source, target), umeyama(source, target), atol=1e-9)


def test_a_mirrored_face_is_turned_and_scaled_but_never_mirrored():
    source = random_points(3)
    matrix = similarity_from_points(source, source * [-1, 1])
    assert np.linalg.det(matrix[:, :2]) > 0


def test_two_points_are_enough():
    source, target = np.array([[0.0, 0.0], [2.0, 0.0]]), np.array([[1.0, 1.0], [1.0, 5.0]])
    np.testing.assert_allclose(carry_over(source, similarity_from_points(source, target)), target, atol=1e-12)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (np.full((5, 2), 33.3), TEMPLATE),
        (TEMPLATE, np.full((5, 2), 33.3)),
        (np.array([[0.0, 0], [1, 0], [0, 1], [1, 1]]), np.array([[1.0, 0], [0, 0], [1, 1], [0, 1]])),  # a mirrored square
        (TEMPLATE[:1], TEMPLATE[:1]),
        (TEMPLATE[:3], TEMPLATE),
        (np.where(TEMPLATE > 90, np.nan, TEMPLATE), TEMPLATE),
        (TEMPLATE, np.where(TEMPLATE > 90, np.inf, TEMPLATE)),
    ],
)
def test_points_that_fix_no_similarity_are_refused(source, target):
    with pytest.raises(ValueError, match=r"coincide|N x 2|not finite"):
        similarity_from_points(source, target)


def test_the_template_scales_about_the_pixels_edges():
    np.testing.assert_allclose(template_points(112), TEMPLATE)
    np.testing.assert_allclose(template_points(224), 2 * TEMPLATE + 0.5)
    corners = np.array([[-0.5, -0.5], [111.5, 111.5]])
    np.testing.assert_allclose(template_points(256, corners), [[-0.5, -0.5], [255.5, 255.5]])


def test_a_face_on_the_template_already_comes_back_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    aligned = align_face(image, TEMPLATE, size=112)
    np.testing.assert_array_equal(aligned.image, image)
    np.testing.assert_allclose(aligned.matrix, [[1, 0, 0], [0, 1, 0]], atol=1e-12)


def dots(centers, *, size, radius):
    """White discs with soft edges: their centres of mass are exact."""
    y, x = np.mgrid[: size[1], : size[0]]
    image = np.zeros((size[1], size[0]))
    for cx, cy in centers:
        image += 255 * np.clip(radius + 0.5 - np.hypot(x - cx, y - cy), 0, 1)
    return np.repeat(np.clip(image, 0, 255).round().astype(np.uint8)[..., None], 3, axis=2)


def center_of_mass(image, at, reach):
    x0, y0 = (round(v) - reach for v in at)
    window = image[y0 : y0 + 2 * reach + 1, x0 : x0 + 2 * reach + 1, 0].astype(float)
    y, x = np.mgrid[y0 : y0 + 2 * reach + 1, x0 : x0 + 2 * reach + 1]
    return np.array([(x * window).sum(), (y * window).sum()]) / window.sum()


@pytest.mark.parametrize(("scale", "degrees"), [(0.11, 25), (0.5, -80), (0.93, 5), (1, 90), (1.6, 160), (3.2, -12)])
def test_what_is_drawn_lands_where_the_matrix_says(scale, degrees):
    size = 128
    # A grid in the result, carried back into an original that is larger than what is seen, with the face off its middle.
    grid = np.array([[x, y] for x in (20.0, 64.0, 108.0) for y in (20.0, 64.0, 108.0)])
    matrix = similarity(scale=1 / scale, degrees=degrees, shift=(0, 0))
    side = round(2 * size / scale)
    matrix[:, 2] = side * np.array([0.45, 0.55]) - carry_over(np.array([[64.0, 64.0]]), matrix)[0]
    image = dots(carry_over(grid, matrix), size=(side, side + 10), radius=6 / scale)
    aligned = align_face(image, carry_over(template_points(size), matrix), size=size)
    for point, landed in zip(grid, carry_over(carry_over(grid, matrix), aligned.matrix), strict=True):
        np.testing.assert_allclose(landed, point, atol=1e-8)
        np.testing.assert_allclose(center_of_mass(aligned.image, landed, 10), landed, atol=0.06)


@pytest.mark.parametrize("degrees", [0, 3, 30, 45])
def test_a_fine_checkerboard_shrunk_eight_times_becomes_even_grey(degrees):
    y, x = np.mgrid[:1200, :1200]
    board = np.repeat((255 * ((x + y) % 2)).astype(np.uint8)[..., None], 3, axis=2)
    matrix = similarity(scale=8, degrees=degrees, shift=(0, 0))
    matrix[:, 2] = 600 - carry_over(np.array([[55.5, 55.5]]), matrix)[0]
    aligned = align_face(board, carry_over(TEMPLATE, matrix), size=112).image
    inside = aligned[30:82, 30:82].astype(int)
    assert inside.min() >= 126
    assert inside.max() <= 129


def test_stripes_finer_than_the_result_leave_no_moire():
    x = np.arange(1100)
    stripes = np.broadcast_to((127.5 + 127.5 * np.sin(2 * np.pi * x / 5.3)).round().astype(np.uint8)[None, :, None], (1100, 1100, 3))
    matrix = similarity(scale=8, degrees=17, shift=(0, 0))
    matrix[:, 2] = 550 - carry_over(np.array([[55.5, 55.5]]), matrix)[0]
    aligned = align_face(stripes.copy(), carry_over(TEMPLATE, matrix), size=112).image
    assert aligned[30:82, 30:82].std() < 3


def test_beyond_the_picture_it_is_black():
    image = np.full((60, 60, 3), 200, np.uint8)
    aligned = align_face(image, TEMPLATE - 52, size=112).image  # the face reaches from -52 to 60
    assert (aligned[:51] == 0).all()
    assert (aligned[:, :51] == 0).all()
    assert (aligned[53:, 53:] == 200).all()


def test_a_face_far_outside_of_the_picture_is_black():
    assert not align_face(np.full((20, 20, 3), 200, np.uint8), TEMPLATE + 1000, size=32).image.any()


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_only_what_is_seen_of_a_large_picture_is_touched(factor, monkeypatch):
    sizes = []
    resize, transform = Image.Image.resize, Image.Image.transform
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: (sizes.append(self.size), resize(self, *a, **k))[1])
    monkeypatch.setattr(Image.Image, "transform", lambda self, *a, **k: (sizes.append(self.size), transform(self, *a, **k))[1])
    image = np.zeros((3000, 4000, 3), np.uint8)
    align_face(image, TEMPLATE * factor + [2000, 1500], size=112)
    assert sizes
    assert max(max(size) for size in sizes) <= 112 * factor + 12 * max(factor, 1) + 4


def test_the_border_of_the_result_looks_beyond_itself():
    coarse = Image.fromarray(np.random.default_rng(5).integers(0, 256, (450, 600, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((1200, 900), Image.Resampling.BICUBIC))
    points = TEMPLATE * 3.0 + [400, 300]
    # What is at the border of the one result is in the middle of the other.
    border = align_face(image, points, size=112).image.astype(int)
    middle = align_face(image, points, size=112, template=TEMPLATE + 9).image.astype(int)
    assert np.abs(border[:-9, :-9] - middle[9:, 9:]).max() <= 10
