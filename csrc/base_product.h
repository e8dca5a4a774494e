// SPDX-License-Identifier: Apache-2.0
// The name of the base product that is forced, "" for none. The rows are in adapted_linear.h.
#pragma once
#include <string>

namespace peftkern {

std::string forced_base_product();
void set_base_product(const std::string& name);

}  // namespace peftkern
