// SPDX-License-Identifier: Apache-2.0
// Which way of csrc/products.h a product takes, where it is not the first row that accepts: one that is forced, for
// tests and benchmarks, or the one that was fastest when this machine timed them (peftkern/autotune.py).
#pragma once
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peftkern {

// ---- forced

// The name that is forced for direction "forward" or "gradient", "" for none.
std::string forced_product(const std::string& direction);

// Forces a way by its name; "" chooses the best again. Throws if no backend has such a way.
void set_product(const std::string& direction, const std::string& name);

// The ways that the backends have, and how a backend tells them.
std::vector<std::string> product_names(const std::string& direction);
void add_product_name(const std::string& direction, const std::string& name);

// ---- timed

// A product of one device and one bucket of shapes, and what its ways took there; the fastest comes first.
struct Timed {
  std::string product;
  std::vector<std::pair<std::string, double>> seconds;
};

bool autotune_on();
void set_autotune(bool on);

std::optional<std::string> fastest_way(const std::string& product);
void remember(Timed timed);

// As text, a line each: product, then ways and seconds, separated by tabs. add_timed throws on any other text.
std::vector<std::string> all_timed();
void add_timed(const std::vector<std::string>& lines);
void forget_timed();

// How often a way is timed, after one call that allocates and loads.
constexpr int kTimings = 7;
double median(std::vector<double> values);

// Held by the one thread that may time; others, meanwhile, take the first row that accepts.
class TimingTurn {
 public:
  TimingTurn();
  ~TimingTurn();
  TimingTurn(const TimingTurn&) = delete;
  explicit operator bool() const { return mine_; }

 private:
  bool mine_;
};

}  // namespace peftkern
