# SPDX-License-Identifier: Apache-2.0
"""Figures of runs and of the demo."""
