// SPDX-License-Identifier: Apache-2.0
// Everything of the library.
#pragma once

#include "vimcore/build_info.h"
#include "vimcore/checksum.h"
#include "vimcore/config.h"
#include "vimcore/context.h"
#include "vimcore/error.h"
#include "vimcore/image.h"
#include "vimcore/model.h"
#include "vimcore/model_file.h"
#include "vimcore/ops.h"
#include "vimcore/optimizer.h"
#include "vimcore/option.h"
#include "vimcore/params.h"
#include "vimcore/plan.h"
#include "vimcore/positions.h"
#include "vimcore/preprocess.h"
#include "vimcore/safetensors.h"
#include "vimcore/segment.h"
#include "vimcore/tensor.h"
#include "vimcore/version.h"
#include "vimcore/weights.h"
