# SPDX-License-Identifier: Apache-2.0
"""What stands on a backbone's maps of features: for every pixel, or for objects."""
