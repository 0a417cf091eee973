# SPDX-License-Identifier: Apache-2.0
"""What `vimcore train` and `vimcore eval` are made of: settings, data, the step, checkpoints, measuring.

`loop` needs torch alone and is what `vimcore.train.fit` uses too; the rest needs the extra `train`
(torchvision and timm).
"""
