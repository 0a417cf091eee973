# SPDX-License-Identifier: Apache-2.0
"""Checks of the core on the machine it runs on."""
