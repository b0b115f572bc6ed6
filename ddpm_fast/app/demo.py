"""The main job in three minutes: train on scanned digits, sample, and let a classifier judge."""

__all__ = ["recognised_share", "run"]

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..training.config import load
from ..training.pictures import to_uint8
from ..training.trainer import Run, train, write_pictures

JUDGED = 256  # samples
CONFIDENT = 0.8  # the probability above which a sample counts as a digit


def run(folder: Path) -> Run:
    """Trains on the digits and samples into `folder`.

    Returns:
        The run; its metrics also have `recognised_share`, of 256 samples, and `recognised_digits`, how many of
        each digit from 0 to 9.
    """
    # 8 x 8 images are too small to share: a second thread gained a third (17 steps/s against 11.5) where both
    # cores were free, and cost nine tenths (1.7) where other work held one of them.
    torch.set_num_threads(1)
    trained = train(load("digits"), folder)
    samples = write_pictures(trained, n=JUDGED)
    share, counts = recognised_share(samples)
    trained.metrics |= {"recognised_share": share, "recognised_digits": counts}
    trained.write_metrics()
    return trained


def recognised_share(images: Tensor) -> tuple[float, list[int]]:
    """How many images a classifier, fitted on the real digits, gives a probability over 0.8.

    The classifier is one support vector machine a digit, each with the probability of "this digit" against all
    else. Nothing makes the ten add up to 1, so that what resembles no digit is not forced to be one: of pure
    noise it recognises nothing.

    Args:
        images: (N, 1, 8, 8), in [0, 1].

    Returns:
        The share of them, in [0, 1], and among these the count of each digit from 0 to 9.
    """
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.datasets import load_digits
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.svm import SVC

    pixels, labels = load_digits(return_X_y=True)  # 0 ... 16
    machine = CalibratedClassifierCV(SVC(gamma=0.001), ensemble=False)
    classifiers = OneVsRestClassifier(machine).fit(pixels, labels).estimators_
    judged = to_uint8(images).flatten(1).numpy() * (16 / 255)
    probability = np.stack([c.predict_proba(judged)[:, 1] for c in classifiers], axis=1)  # (N, 10)
    confident = probability.max(axis=1) > CONFIDENT
    counts = np.bincount(probability.argmax(axis=1)[confident], minlength=10)
    return float(confident.mean()), counts.tolist()
