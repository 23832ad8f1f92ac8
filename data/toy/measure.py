"""What a toy picture shows, measured on its pixels alone: how far it is ink, which colour, which subject.

Every measure compares with true renders, and is itself tested on other true renders. Pillow and numpy only.
"""

from functools import cache

import numpy as np
from PIL import Image

from .world import COLOURS, PLACES, SUBJECTS, Scene, render

SIDE = 64  # pixels a side at which colours and subjects are compared
REFERENCE_SEED = 7_000_000  # far from those of the training sets


# ---- Style


def line_share(image):
    """The share of the pixels at strong edges that touch a neutral near-black, which is the pen's lines; 0..1."""
    pixels = np.asarray(image, np.float32)
    grey = pixels.mean(axis=2)
    slope_y, slope_x = np.gradient(grey)
    edges = np.hypot(slope_x, slope_y) > 14
    black = (grey < 62) & (np.ptp(pixels, axis=2) < 34)
    touched = black.copy()
    for axis in (0, 1):
        for shift in (-1, 1):
            touched |= np.roll(black, shift, axis)
    return (touched & edges).sum() / max(1, edges.sum())


def paper_share(image):
    """The share of the picture's margin that has the colours of paper, light and warm rather than grey; 0..1."""
    pixels = np.asarray(image, np.float32)
    margin = len(pixels) // 8
    outer = np.ones(pixels.shape[:2], bool)
    outer[margin:-margin, margin:-margin] = False
    red, green, blue = pixels[outer].T
    return ((green > 110) & (red >= green - 6) & (green > blue) & (red - blue < 110)).mean()


def lines_of_each(images, base, ink):
    """How far the lines of each picture went from the base style to ink: 0 as in `base`, 1 as in `ink`. -> [float]

    The three lists show the same scenes, because scenes differ in how many of their edges the pen draws.
    """
    shares = ([line_share(image) for image in group] for group in (images, base, ink))
    return [(value - low) / (high - low) for value, low, high in zip(*shares)]


def style_scores(images, base, ink):
    """How far pictures went from the base style to ink, by lines and by paper: 0 as in `base`, 1 as in `ink`.

    The three lists must show the same scenes. -> {"lines", "lines_worst", "paper", "style"}
    `lines` is the mean over the pictures, `lines_worst` the least of them, `paper` that of the pictures' mean. `style`
    is the mean of lines and paper. More ink than ink counts as 1: it is no better, and a black blot makes up for no
    line that is missing.
    """
    lines = [min(1.0, score) for score in lines_of_each(images, base, ink)]
    value, low, high = (float(np.mean([paper_share(image) for image in group])) for group in (images, base, ink))
    scores = {"lines": float(np.mean(lines)), "lines_worst": min(lines), "paper": (value - low) / (high - low)}
    return scores | {"style": (scores["lines"] + min(1.0, scores["paper"])) / 2}


# ---- Colour


def colour_histogram(image):
    """Blurred shares of 8 × 8 × 8 colour cells in the middle of the picture, where the subject is: (512,).

    They are blurred so that a colour which the VAE shifted a little, into the next cell, is still near.
    """
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.int32)
    top, bottom, left, right = (round(SIDE * share) for share in (0.22, 0.88, 0.22, 0.78))
    cells = (pixels[top:bottom, left:right].reshape(-1, 3) // 32) @ (64, 8, 1)
    counts = np.bincount(cells, minlength=512).reshape(8, 8, 8)
    for axis in range(3):
        padded = np.pad(counts, [(1, 1) if i == axis else (0, 0) for i in range(3)], "edge")
        counts = sum(weight * np.take(padded, range(i, i + 8), axis) for i, weight in enumerate((0.25, 0.5, 0.25)))
    return counts.ravel() / len(cells)


@cache
def colour_references(subject, place, style):
    """{colour: mean histogram of two true renders} for one subject and place."""
    references = {}
    for colour in COLOURS:
        scene = Scene(subject, colour, place)
        true = [render(scene, style, REFERENCE_SEED + i, SIDE) for i in range(2)]
        references[colour] = np.mean([colour_histogram(image) for image in true], axis=0)
    return references


def colour_of(image, subject, place, style):
    """The colour whose true renders of this subject and place, in this style, are nearest to the picture."""
    histogram = colour_histogram(image)
    references = colour_references(subject, place, style)
    return min(references, key=lambda colour: np.abs(references[colour] - histogram).sum())


# ---- Subject


def edge_features(image):
    """Where the edges of each of 8 directions are, in 16 × 16 cells, blurred a little: (2048,), of unit length."""
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255
    slope_y, slope_x = np.gradient(grey)
    direction = np.arctan2(slope_y, slope_x) % np.pi
    one_hot = np.minimum((direction / np.pi * 8).astype(int), 7) == np.arange(8)[:, None, None]
    strength = one_hot * np.sqrt(np.hypot(slope_x, slope_y))  # (8, 64, 64)
    cells = strength.reshape(8, 16, SIDE // 16, 16, SIDE // 16).sum(axis=(2, 4))
    padded = np.pad(cells, ((0, 0), (1, 1), (1, 1)))
    blurred = sum(padded[:, y : y + 16, x : x + 16] for y in range(3) for x in range(3))
    return blurred.ravel() / np.linalg.norm(blurred)


class SubjectClassifier:
    """Ridge regression from edge features to the subject, fitted to true renders of base and ink.

    It sees no colours, so it cannot take every red thing for a fox. One classifier serves both styles, so that base
    and LoRA are judged alike.
    """

    def __init__(self, examples_per_subject=20):
        rng = np.random.default_rng(REFERENCE_SEED)
        features, labels = [], []
        for i in range(examples_per_subject):
            for label, subject in enumerate(SUBJECTS):
                scene = Scene(subject, COLOURS[rng.integers(len(COLOURS))], PLACES[rng.integers(len(PLACES))])
                features.append(edge_features(render(scene, ("base", "ink")[i % 2], REFERENCE_SEED + i, SIDE)))
                labels.append(label)
        x = np.array(features)
        self.mean = x.mean(axis=0)
        x = x - self.mean
        wanted = np.eye(len(SUBJECTS))[labels] - 1 / len(SUBJECTS)
        # The dual form, because there are fewer examples than features.
        self.weights = x.T @ np.linalg.solve(x @ x.T + 0.01 * np.eye(len(x)), wanted)

    def __call__(self, image):
        """-> the subject's name."""
        return SUBJECTS[np.argmax((edge_features(image) - self.mean) @ self.weights)]
