// SPDX-License-Identifier: Apache-2.0
// ImportanceUpdate of rank_allocation.h on a range of layers.
//   i = |p * g|;  sensitivity = b1 sensitivity + (1 - b1) i;  uncertainty = b2 uncertainty + (1 - b2) |i - sensitivity|
// Bound by memory: 16 bytes read and 8 written an element, and the scores cost no further pass. Each product and sum is
// rounded, as torch does it: averages of fp32 parameters are those of HF PEFT, bit for bit.

static_assert(kWidth <= kMaxLanes);
constexpr int64_t kUpdateAhead = 512;  // elements asked for ahead, into L2: 3.2 ms against 3.6 ms for 3.7 M from memory
constexpr int64_t kScoreBlock = 64;    // vectors summed before they are added to the total

struct Importance {
  F32 beta1, rest1, beta2, rest2, inverse_scale;

  explicit Importance(const ImportanceUpdate& a)
      : beta1(set1(static_cast<float>(a.beta1))),
        rest1(set1(static_cast<float>(1.0 - a.beta1))),
        beta2(set1(static_cast<float>(a.beta2))),
        rest2(set1(static_cast<float>(1.0 - a.beta2))),
        inverse_scale(set1(a.grad_scale ? 1.0f / *a.grad_scale : 1.0f)) {}

  // The new averages and the score of one vector of elements.
  F32 update(F32 p, F32 g, F32& sensitivity, F32& uncertainty) const {
    const F32 i = abs(mul(p, mul(g, inverse_scale)));
    sensitivity = add(mul(beta1, sensitivity), mul(rest1, i));
    const F32 deviation = abs(fma(set1(-1.0f), sensitivity, i));
    uncertainty = add(mul(beta2, uncertainty), mul(rest2, deviation));
    return mul(sensitivity, uncertainty);
  }

  // Of n <= kWidth elements from index i on; the other lanes of the score are 0.
  template <class T>
  F32 update(const T* p, const T* g, float* sensitivity, float* uncertainty, int64_t i, int64_t n) const {
    if (n >= kWidth) {
      __builtin_prefetch(p + i + kUpdateAhead, 0, 2);
      if (g) __builtin_prefetch(g + i + kUpdateAhead, 0, 2);
      __builtin_prefetch(sensitivity + i + kUpdateAhead, 1, 2);
      __builtin_prefetch(uncertainty + i + kUpdateAhead, 1, 2);
      F32 s = load(sensitivity + i), u = load(uncertainty + i);
      const F32 score = update(load(p + i), g ? load(g + i) : zero(), s, u);
      store(sensitivity + i, s);
      store(uncertainty + i, u);
      return score;
    }
    F32 s = load_first(sensitivity + i, n), u = load_first(uncertainty + i, n);
    const F32 score = update(load_first(p + i, n), g ? load_first(g + i, n) : zero(), s, u);
    store_first(sensitivity + i, n, s);
    store_first(uncertainty + i, n, u);
    return score;
  }
};

// The sum of the scores of `columns` consecutive elements: a row of A, or one element of E.
template <class T>
inline float row_score(const Importance& importance, const T* p, const T* g, float* sensitivity, float* uncertainty,
                       int64_t columns) {
  float total = 0.0f;
  for (int64_t block = 0; block < columns; block += kScoreBlock * kWidth) {
    const int64_t end = smaller(block + kScoreBlock * kWidth, columns);
    F32 sum = zero();
    for (int64_t i = block; i < end; i += kWidth)
      sum = add(sum, importance.update(p, g, sensitivity, uncertainty, i, end - i));
    total += sum_lanes(sum);
  }
  return total;
}

// total[j] = the sum of the scores of column j of B. B is read as it lies: kWidth rows are rank whole vectors, lane l
// of vector v belonging to column (v * kWidth + l) % rank. sums: [rank, kWidth].
template <class T>
inline void column_scores(const Importance& importance, const T* p, const T* g, float* sensitivity, float* uncertainty,
                          int64_t rows, int64_t rank, float* sums, float* total) {
  for (int64_t j = 0; j < rank; ++j) total[j] = 0.0f;
  for (int64_t block = 0; block < rows; block += kScoreBlock * kWidth) {
    const int64_t end = smaller(block + kScoreBlock * kWidth, rows);
    for (int64_t v = 0; v < rank; ++v) store(sums + v * kWidth, zero());
    for (int64_t row = block; row < end; row += kWidth) {
      const int64_t elements = smaller(kWidth, end - row) * rank;
      for (int64_t i = 0; i < elements; i += kWidth) {
        const F32 score = importance.update(p, g, sensitivity, uncertainty, row * rank + i, elements - i);
        store(sums + i, add(load(sums + i), score));
      }
    }
    for (int64_t lane = 0; lane < kWidth; ++lane)
      for (int64_t j = 0; j < rank; ++j) total[j] += sums[lane * rank + j];
  }
}

inline float at_least_one(int64_t n) { return n > 0 ? static_cast<float>(n) : 1.0f; }

template <class T>
inline void update_layer(const ImportanceUpdate& a, const Importance& importance, const TripletLayer& layer,
                         float* scratch) {
  const T *A = static_cast<const T*>(layer.A), *E = static_cast<const T*>(layer.E), *B = static_cast<const T*>(layer.B);
  const T *grad_A = static_cast<const T*>(layer.grad_A), *grad_E = static_cast<const T*>(layer.grad_E);
  const T* grad_B = static_cast<const T*>(layer.grad_B);
  float *s = a.sensitivity, *u = a.uncertainty, *of_B = scratch + layer.rank * kWidth;
  column_scores(importance, B, grad_B, s + layer.state_B(), u + layer.state_B(), layer.out, layer.rank, scratch, of_B);
  for (int64_t j = 0; j < layer.rank; ++j) {
    const int64_t row = j * layer.in, at = layer.state + row, at_E = layer.state_E() + j;
    const float of_A = row_score(importance, A + row, grad_A ? grad_A + row : nullptr, s + at, u + at, layer.in);
    const float of_E = row_score(importance, E + j, grad_E ? grad_E + j : nullptr, s + at_E, u + at_E, int64_t{1});
    a.scores[layer.first + j] = of_E + (of_A / at_least_one(layer.in) + of_B[j] / at_least_one(layer.out));
  }
}

void update_importance(const ImportanceUpdate& a, float* scratch, int64_t layer0, int64_t layer1) {
  const Importance importance(a);
  for (int64_t i = layer0; i < layer1; ++i) {
    const TripletLayer& layer = a.layers[i];
    dispatch(layer.dtype, [&](auto tag) { update_layer<decltype(tag)>(a, importance, layer, scratch); });
  }
}
