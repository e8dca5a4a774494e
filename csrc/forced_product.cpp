// SPDX-License-Identifier: Apache-2.0
#include "forced_product.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace peftkern {

namespace {

struct Direction {
  const char* name;
  std::vector<std::string> ways;
  std::atomic<int> forced{-1};  // index into ways
};

// Grows only while the library is loaded.
Direction* directions() {
  static Direction table[2] = {{"forward", {}}, {"gradient", {}}};
  return table;
}

Direction& find(const std::string& name) {
  for (Direction* d = directions(); d != directions() + 2; ++d)
    if (name == d->name) return *d;
  throw std::runtime_error("direction: expected \"forward\" or \"gradient\", got \"" + name + "\"");
}

}  // namespace

std::string forced_product(const std::string& direction) {
  const Direction& d = find(direction);
  const int forced = d.forced.load(std::memory_order_relaxed);
  return forced < 0 ? "" : d.ways[static_cast<size_t>(forced)];
}

void set_product(const std::string& direction, const std::string& name) {
  Direction& d = find(direction);
  const auto found = std::find(d.ways.begin(), d.ways.end(), name);
  if (!name.empty() && found == d.ways.end()) {
    std::string known;
    for (const std::string& way : d.ways) known += "\"" + way + "\", ";
    throw std::runtime_error(direction + " product: expected " + known + "or \"\" for the best, got \"" + name + "\"");
  }
  d.forced = name.empty() ? -1 : static_cast<int>(found - d.ways.begin());
}

std::vector<std::string> product_names(const std::string& direction) { return find(direction).ways; }

void add_product_name(const std::string& direction, const std::string& name) {
  std::vector<std::string>& ways = find(direction).ways;
  if (std::find(ways.begin(), ways.end(), name) == ways.end()) ways.push_back(name);
}

}  // namespace peftkern
