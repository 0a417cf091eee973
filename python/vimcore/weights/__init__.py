# SPDX-License-Identifier: Apache-2.0
"""Files of weights, vimcore's and those of others; knows no modules."""
