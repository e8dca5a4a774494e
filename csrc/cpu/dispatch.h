// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace peftkern::cpu {

std::vector<std::string> isa_names();   // those this machine can run, best first
void set_isa(const std::string& name);  // "" chooses the best again; throws for an unknown or unsupported name
bool is_amd();

}  // namespace peftkern::cpu
