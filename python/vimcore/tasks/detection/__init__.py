# SPDX-License-Identifier: Apache-2.0
"""Detection: boxes and masks of objects."""
