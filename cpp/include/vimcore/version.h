// SPDX-License-Identifier: Apache-2.0
#pragma once

#define VIMCORE_VERSION_MAJOR 0
#define VIMCORE_VERSION_MINOR 2
#define VIMCORE_VERSION_PATCH 0
#define VIMCORE_VERSION "0.2.0"
