// SPDX-License-Identifier: Apache-2.0
#include "base_product.h"

#include <atomic>
#include <stdexcept>

namespace peftkern {

namespace {
constexpr const char* kNames[] = {"", "nf4_few_rows", "library"};
std::atomic<const char*> forced{kNames[0]};
}  // namespace

std::string forced_base_product() { return forced.load(); }

void set_base_product(const std::string& name) {
  for (const char* known : kNames)
    if (name == known) {
      forced = known;
      return;
    }
  throw std::runtime_error("base product: expected \"nf4_few_rows\", \"library\" or \"\" for the best, got \"" + name +
                           "\"");
}

}  // namespace peftkern
