// SPDX-License-Identifier: Apache-2.0
// One-sided Jacobi on a range of matrices. Definition: jacobi_svd.h.
// Columns lie in scratch, padded with zeros to whole vectors. The pairs of a round depend on each other in nothing, so
// that the square roots and divisions of one overlap with the products of the next.

inline double dot(const double* x, const double* y, int64_t n) {  // n: whole vectors
  constexpr int kSums = 4;  // twice the vectors a machine can multiply while one sum waits
  F64 sum[kSums];
  for (int s = 0; s < kSums; ++s) sum[s] = set1(0.0);
  int64_t i = 0;
  for (; i + kSums * kWidth64 <= n; i += kSums * kWidth64)
    for (int s = 0; s < kSums; ++s) sum[s] = fma(load(x + i + s * kWidth64), load(y + i + s * kWidth64), sum[s]);
  for (; i < n; i += kWidth64) sum[0] = fma(load(x + i), load(y + i), sum[0]);
  return sum_lanes(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

inline void rotate(double* x, double* y, int64_t n, double tangent, double cosine) {
  const F64 plus = set1(tangent), minus = set1(-tangent), scale = set1(cosine);
  for (int64_t i = 0; i < n; i += kWidth64) {
    const F64 a = load(x + i), b = load(y + i);
    store(x + i, mul(scale, fma(minus, b, a)));
    store(y + i, mul(scale, fma(plus, a, b)));
  }
}

// Returns whether a pair was rotated. columns: [n, ld]; norms: squares, [n].
inline bool jacobi_sweep(double* columns, double* norms, int64_t n, int64_t ld) {
  const double tolerance = jacobi_tolerance(n);
  for (int64_t j = 0; j < n; ++j) norms[j] = dot(columns + j * ld, columns + j * ld, ld);
  bool rotated = false;
  for (int64_t round = 0; round < n + n % 2 - 1; ++round)
    for (int64_t pair = 0; pair < (n + 1) / 2; ++pair) {
      int64_t i, j;
      jacobi_pair(n, round, pair, i, j);
      if (j == n) continue;
      double *x = columns + i * ld, *y = columns + j * ld, tangent;
      const double c = dot(x, y, ld);
      if (!jacobi_rotation(norms[i], norms[j], c, tolerance, tangent)) continue;
      rotate(x, y, ld, tangent, 1.0 / sqrt(1.0 + tangent * tangent));
      norms[i] -= tangent * c;
      norms[j] += tangent * c;
      rotated = true;
    }
  return rotated;
}

void jacobi_svd(const JacobiSvd& a, double* scratch, int64_t matrix0, int64_t matrix1) {
  const int64_t n = a.n, ld = (n + kDoubleUnit - 1) / kDoubleUnit * kDoubleUnit;
  double *columns = scratch, *norms = scratch + n * ld;
  for (int64_t m = matrix0; m < matrix1; ++m) {
    double* vectors = a.vectors + m * n * n;
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < ld; ++i) columns[j * ld + i] = i < n ? vectors[j * n + i] : 0.0;
    int32_t sweep = 0;
    bool rotated = true;
    for (; rotated && sweep < kMaxJacobiSweeps; ++sweep) rotated = jacobi_sweep(columns, norms, n, ld);
    a.sweeps[m] = rotated ? sweep + 1 : sweep;
    for (int64_t j = 0; j < n; ++j) {
      const double* column = columns + j * ld;
      const double square = dot(column, column, ld), value = square <= kJacobiZero ? 0.0 : sqrt(square);
      a.values[m * n + j] = value;
      for (int64_t i = 0; i < n; ++i) vectors[j * n + i] = value == 0.0 ? 0.0 : column[i] / value;
    }
  }
}
