// SPDX-License-Identifier: Apache-2.0
#include "choice.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>

#ifdef __linux__
#include <pthread.h>
#endif

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

std::atomic<bool> autotune{false}, timing{false};

struct Table {
  std::mutex mutex;
  std::map<std::string, Timed> timed;
};

Table* make_table();

// Never destroyed: other threads may still call when static objects are.
Table& table() {
  static Table* const instance = make_table();
  return *instance;
}

// Held across a fork, so that a child never finds it locked by a thread that it does not have.
Table* make_table() {
#ifdef __linux__
  pthread_atfork([] { table().mutex.lock(); }, [] { table().mutex.unlock(); },
                 [] {
                   table().mutex.unlock();
                   timing = false;
                 });
#endif
  return new Table;
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

bool autotune_on() { return autotune.load(std::memory_order_relaxed); }
void set_autotune(bool on) { autotune = on; }

std::optional<std::string> fastest_way(const std::string& product) {
  Table& t = table();
  const std::lock_guard<std::mutex> lock(t.mutex);
  const auto found = t.timed.find(product);
  return found == t.timed.end() ? std::nullopt : std::optional(found->second.seconds.front().first);
}

void remember(Timed timed) {
  std::stable_sort(timed.seconds.begin(), timed.seconds.end(),
                   [](const auto& a, const auto& b) { return a.second < b.second; });
  Table& t = table();
  const std::lock_guard<std::mutex> lock(t.mutex);
  t.timed.insert_or_assign(timed.product, std::move(timed));
}

std::vector<std::string> all_timed() {
  Table& t = table();
  const std::lock_guard<std::mutex> lock(t.mutex);
  std::vector<std::string> lines;
  for (const auto& [product, timed] : t.timed) {
    std::ostringstream line;
    line << product;
    for (const auto& [way, seconds] : timed.seconds) line << '\t' << way << '\t' << seconds;
    lines.push_back(line.str());
  }
  return lines;
}

void add_timed(const std::vector<std::string>& lines) {
  for (const std::string& line : lines) {
    std::istringstream in(line);
    Timed timed;
    std::string way, seconds;
    std::getline(in, timed.product, '\t');
    while (std::getline(in, way, '\t') && std::getline(in, seconds, '\t')) {
      char* end = nullptr;
      timed.seconds.emplace_back(way, std::strtod(seconds.c_str(), &end));
      if (way.empty() || end == seconds.c_str() || *end) timed.product.clear();
    }
    if (timed.product.empty() || timed.seconds.empty())
      throw std::runtime_error("timed product: expected a product, ways and seconds between tabs, got \"" + line +
                               "\"");
    remember(std::move(timed));
  }
}

void forget_timed() {
  Table& t = table();
  const std::lock_guard<std::mutex> lock(t.mutex);
  t.timed.clear();
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

TimingTurn::TimingTurn() : mine_(!timing.exchange(true)) {
  table();  // its fork handlers also end a turn that a child has inherited
}
TimingTurn::~TimingTurn() {
  if (mine_) timing = false;
}

}  // namespace peftkern
