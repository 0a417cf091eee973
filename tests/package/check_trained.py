"""What cpp/examples/train.cpp wrote, read by Python: python check_trained.py WEIGHTS HELD_OUT PICTURE.

The held-out images equal the demo's; Runtime gives the very logits that C++ gave, the torch module the same
within rounding. Writes one of the images as a PNG file and prints the logits that belong to it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import vimcore
from vimcore import _core
from vimcore.data import digits as data
from vimcore.tools import demo


def main(weights: str, held_out: str, picture: str) -> None:
    arrays, _ = _core.read_safetensors(held_out)
    images, labels, logits = arrays["images"], arrays["labels"], arrays["logits"]
    digits, truth = data.load_digits()
    _, indices = data.split_digits(truth)
    files = [data.encode_png(data.picture(digits[i])) for i in indices]
    assert np.array_equal(labels, truth[indices])
    assert np.array_equal(images, demo.network_input(files).numpy())

    runtime = vimcore.Runtime(weights)
    assert runtime.labels == demo.LABELS
    assert runtime.preprocess == demo.PREPROCESS
    assert np.array_equal(runtime(images), logits)
    with torch.no_grad():
        module = vimcore.VisionMamba.load(weights)(torch.from_numpy(images)).numpy()
    assert np.abs(module - logits).max() <= 1e-6 * np.abs(logits).max()
    accuracy = float((logits.argmax(1) == labels).mean())
    assert accuracy > 0.5, f"the network has learnt too little: {accuracy}"

    Path(picture).write_bytes(files[0])
    print("\n".join(f"{value:.9g}" for value in logits[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
