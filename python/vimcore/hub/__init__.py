# SPDX-License-Identifier: Apache-2.0
"""Weights by name: what the authors published, downloads, and networks as repositories of a hub."""
