# SPDX-License-Identifier: Apache-2.0
"""For every part: names in messages, files written atomically, numbers in calls and on command lines."""
