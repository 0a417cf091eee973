# SPDX-License-Identifier: Apache-2.0
"""`python -m vimcore.timm SCRIPT ...`: runs a script of timm's that knows our models."""

import runpy
import sys

from . import __doc__ as usage  # which registers the models

if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
    print(f"usage: python -m vimcore.timm SCRIPT ...\n\n{usage}")
    sys.exit(0 if len(sys.argv) > 1 else 2)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
