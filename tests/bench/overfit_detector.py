# SPDX-License-Identifier: Apache-2.0
"""A detector learns a few scenes of digits by heart: average precision of boxes and masks there.

    python tests/bench/overfit_detector.py            # 8 scenes, 300 updates: about a minute of one core

What can be learnt at all shows here: losses, decoding, suppression, pasting and evaluation have to agree.
Strokes are 3 to 5 pixels wide, which limits the masks' precision at high thresholds. Status 1: box AP is
not above 0.95 or mask AP50 not above 0.9.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vimcore import VisionMamba
from vimcore.data.detection import Framing, Jitter
from vimcore.data.object_sources import scenes
from vimcore.data.transforms import Input
from vimcore.detection import CascadeMaskRCNN
from vimcore.tasks.detection.evaluation import Truth, rows_of
from vimcore.tasks.detection.settings import DetectionSettings
from vimcore.train.presets import PRESETS

BATCH, LR, CLIP = 4, 2e-3, 5.0


@dataclass(frozen=True)
class Learnt:
    """COCO's figures, and how long it took."""

    box_ap: float
    mask_ap: float
    mask_ap50: float
    cpu_seconds: float


def overfit(count: int, updates: int, seed: int = 0) -> Learnt:
    """The preset's network on so many scenes, drawn anew from the seed."""
    recipe = DetectionSettings().merged(PRESETS["digits-objects"])
    objects, side = scenes(count, held_out=True), (48, 48)
    framing = Framing(Input(3, side, (0.5,) * 3, (0.25,) * 3, 48), side, Jitter(None, 0.0), masks=True)
    data = [framing.training(objects.read(i, True), np.random.default_rng(0)) for i in range(count)]
    torch.manual_seed(seed)
    vim = {"img_size": 48, "patch_size": 4, "embed_dim": recipe.embed_dim, "depth": recipe.depth}
    backbone = VisionMamba(**vim, class_token="none", num_classes=0, memory="fast")
    model = CascadeMaskRCNN(backbone, len(objects.classes), **recipe.head_options())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    begin = time.process_time()
    for update in range(updates):
        fall = min(1.0, (updates - update) / (0.4 * updates))
        optimizer.param_groups[0]["lr"] = LR * min((update + 1) / 20, 1.0) * fall
        batch = [data[(update * BATCH + i) % count] for i in range(min(BATCH, count))]
        losses = model([image for image, _ in batch], [target for _, target in batch])
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        found = model.detections([image for image, _ in data])
    box, mask = Truth(objects, masks=True).precision({i: rows_of(x, side) for i, x in enumerate(found)})
    assert mask is not None
    seconds = round(time.process_time() - begin, 2)
    return Learnt(box.values["ap"], mask.values["ap"], mask.values["ap50"], seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the figures as JSON; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--updates", type=int, default=300, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = overfit(args.scenes, args.updates)
    print(json.dumps({"scenes": args.scenes, "updates": args.updates, **vars(found)}))
    return 0 if found.box_ap > 0.95 and found.mask_ap50 > 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
