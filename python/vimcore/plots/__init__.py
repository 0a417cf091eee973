# SPDX-License-Identifier: Apache-2.0
"""Figures of training runs and of the demo."""
