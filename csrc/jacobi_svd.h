// SPDX-License-Identifier: Apache-2.0
// Singular values and left singular vectors of a batch of small square matrices by one-sided Jacobi rotations (Hestenes
// 1958; accuracy: Demmel and Veselic, SIAM J. Matrix Anal. Appl. 13, 1992). In raw pointers, what both backends
// implement; torch-free. All arithmetic is fp64.
//
//   C V = U diag(S):  pairs of columns are rotated until all are orthogonal; then S are their norms, U their directions
//
//   for columns x, y with a = x.x, b = y.y, c = x.y, unless |c| <= tolerance sqrt(a b) or one of them is zero:
//     zeta = (b - a) / (2 c),  t = sign(zeta) / (|zeta| + sqrt(1 + zeta^2)),  cosine = 1 / sqrt(1 + t^2)
//     x, y = cosine (x - t y), cosine (y + t x);   a, b = a - t c, b + t c
//
// a and b are summed anew at the start of each sweep, which visits every pair once; the first sweep without a rotation
// is the last. Why fp64 and not the Gram matrix C^T C: with either alternative a singular value carries an absolute
// error of sqrt(eps) or fp32's eps times the largest, and the energy of a discarded tail is then noise; rotations of
// the columns themselves keep the relative accuracy of graded columns.
#pragma once
#include <cmath>

#include "dtypes.h"

namespace peftkern {

constexpr int64_t kMaxJacobiSize = 1024;  // columns of a matrix
constexpr int32_t kMaxJacobiSweeps = 60;  // 5 to 11 are usual; so many mean a NaN
// The entries of a matrix are expected below 1; columns of a norm below 2^-200 are zero. So no square under- or
// overflows, and what is left of a column that depends on others stops being rotated.
constexpr double kJacobiZero = 0x1p-400;  // of the square of the norm

struct JacobiSvd {
  double* vectors;  // [batch, n, n]: row j is column j of the matrix, on return S[j]'s left singular vector, or 0
  double* values;   // [batch, n] singular values, in no order
  int32_t* sweeps;  // [batch] taken; kMaxJacobiSweeps + 1 if it did not converge
  int64_t batch, n;
};

// Cosine of an angle that is rounding: a sum of n products is off by less than n eps.
PEFTKERN_HOST_DEVICE double jacobi_tolerance(int64_t n) { return 0x1p-52 * static_cast<double>(n < 16 ? 16 : n); }

// The pair of columns number `pair`, 0 <= pair < ceil(n / 2), of round `round`, 0 <= round < players - 1, with players
// = n rounded up to even: a round-robin tournament by the circle method, in which player 0 keeps its seat. The columns
// of a round are all different; second == n is a bye.
PEFTKERN_HOST_DEVICE void jacobi_pair(int64_t n, int64_t round, int64_t pair, int64_t& first, int64_t& second) {
  const int64_t others = n + n % 2 - 1;  // players that move
  const int64_t up = round + pair, down = round - pair;
  const int64_t p = pair == 0 ? 0 : 1 + (up < others ? up : up - others);
  const int64_t q = 1 + (down < 0 ? down + others : down);
  first = p < q ? p : q;
  second = p < q ? q : p;
}

// tan of the angle that makes a pair orthogonal, or false if there is nothing to do.
PEFTKERN_HOST_DEVICE bool jacobi_rotation(double a, double b, double c, double tolerance, double& tangent) {
  if (a <= kJacobiZero || b <= kJacobiZero || c * c <= tolerance * tolerance * a * b) return false;
  const double zeta = (b - a) / (2.0 * c), z = zeta < 0.0 ? -zeta : zeta;
  const double t = z > 0x1p27 ? 0.5 / z : 1.0 / (z + sqrt(1.0 + z * z));  // z^2 could overflow
  tangent = zeta < 0.0 ? -t : t;
  return true;
}

}  // namespace peftkern
