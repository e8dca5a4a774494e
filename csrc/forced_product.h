// SPDX-License-Identifier: Apache-2.0
// Forcing one way to make a product (products.h), for tests and benchmarks.
#pragma once
#include <string>
#include <vector>

namespace peftkern {

// The name that is forced for direction "forward" or "gradient", "" for none.
std::string forced_product(const std::string& direction);

// Forces a way by its name; "" chooses the best again. Throws if no backend has such a way.
void set_product(const std::string& direction, const std::string& name);

// The ways that the backends have, and how a backend tells them.
std::vector<std::string> product_names(const std::string& direction);
void add_product_name(const std::string& direction, const std::string& name);

}  // namespace peftkern
