// SPDX-License-Identifier: Apache-2.0
// The kernels of a batch with many adapters (multi_low_rank.h): low_rank.inl's tiles over gathered rows. A row's sums
// and a gradient's are taken in the same order as there, so a row has the bits it has in a batch of one adapter.
//
// A factor is packed in pieces that stay in cache, by transposing registers, and never as a whole. With one row an
// adapter it is used once, and even that would cost more than the product: then it goes from registers to the sums.

static_assert(kDepth == kPanelDepth && kSpan == kColumnSpan && kRowChunk % kTileRows == 0);

inline float alpha_of(const float* alphas, float alpha, int64_t adapter) { return alphas ? alphas[adapter] : alpha; }

// ---- down
// ------------------------------------------------------------------------------------------------------------

inline void store_multi_down(const MultiLoraDown& a, int64_t adapter, int64_t rank, const float* sums, int64_t ld,
                             int64_t entry0, int64_t entry1) {
  const float scale = alpha_of(a.alphas, a.alpha, adapter) * a.dropout.scale;
  for (int64_t e = entry0; e < entry1; ++e)
    for (int64_t j = 0; j < a.rank; ++j) a.out[e * a.rank + j] = j < rank ? scale * sums[(e - entry0) * ld + j] : 0.0f;
}

// sums[j] += x[0:depth] factor[j][0:depth] for one row: what down_tile does, without a packed factor
template <class F>
inline void down_row(const F* factor, int64_t stride, int64_t rank, const float* x, int64_t depth, float* sums) {
  for (int64_t j = 0; j < rank; j += kWidth) {
    F32 sum = load(sums + j);
    for (int64_t c = 0; c < depth; c += kWidth) {
      F32 block[kWidth];
      load_transposed(factor + j * stride + c, stride, rank - j, depth - c, block);
      for (int64_t i = 0; i < smaller(kWidth, depth - c); ++i) sum = fma(set1(x[c + i]), block[i], sum);
    }
    store(sums + j, sum);
  }
}

template <class T, class F>
void multi_down_rows(const MultiLoraDown& a, int64_t adapter, int64_t rank, int64_t entry0, int64_t entry1,
                     float* scratch) {
  const T* x = static_cast<const T*>(a.x);
  const F* factor = static_cast<const F*>(a.factors.data) + adapter * a.rank * a.columns;
  const int64_t ld = padded_rank(rank);
  float *sums = scratch, *packed = scratch + kRowChunk * ld;
  float tile[kTileRows * kDepth] = {};
  std::memset(sums, 0, sizeof(float) * static_cast<size_t>(kRowChunk * ld));
  for (int64_t column = 0; column < a.columns; column += kDepth) {
    const int64_t depth = smaller(kDepth, a.columns - column);
    if (entry1 - entry0 == 1 && a.factors.rank_major) {
      load_tile(x, a.columns, a.groups.order[entry0], 1, column, depth, a.dropout, tile, kDepth);
      down_row(factor + column, a.columns, rank, tile, depth, sums);
      continue;
    }
    if (a.factors.rank_major)
      transpose_panel(factor + column, a.columns, rank, depth, packed, ld);
    else
      copy_panel(factor + column * a.rank, a.rank, depth, rank, packed, ld);
    for (int64_t e = entry0; e < entry1; e += kTileRows) {
      const int64_t rows = smaller(kTileRows, entry1 - e);
      for (int64_t i = 0; i < rows; ++i)
        load_tile(x, a.columns, a.groups.order[e + i], 1, column, depth, a.dropout, tile + i * kDepth, kDepth);
      float* const row_sums = sums + (e - entry0) * ld;
      int64_t j = 0;
      for (; j + kTileVectors * kWidth <= ld; j += kTileVectors * kWidth)
        down_tile<kTileVectors>(tile, depth, packed + j, row_sums + j, ld);
      for (; j < ld; j += kWidth) down_tile<1>(tile, depth, packed + j, row_sums + j, ld);
    }
  }
  store_multi_down(a, adapter, rank, sums, ld, entry0, entry1);
}

// scratch: [kRowChunk + kPanelDepth, padded_rank]; at most kRowChunk entries, all of one adapter with that rank
void multi_lora_down(const MultiLoraDown& a, int64_t adapter, int64_t rank, int64_t entry0, int64_t entry1,
                     float* scratch) {
  dispatch(a.x_dtype, [&](auto x) {
    dispatch(a.factors.dtype,
             [&](auto f) { multi_down_rows<decltype(x), decltype(f)>(a, adapter, rank, entry0, entry1, scratch); });
  });
}

// ---- up
// --------------------------------------------------------------------------------------------------------------

template <class T>
inline void multi_up_store(const MultiLoraUp& a, float scale, int64_t row, int64_t column, F32 sum, uint32_t bits) {
  const int64_t left = a.columns - column;
  T* y = static_cast<T*>(a.y) + row * a.columns + column;
  if (a.dropout.threshold) sum = keep(sum, bits);
  const F32 value = fma(sum, set1(scale), load_up_to(y, left));
  left >= kWidth ? store(y, value) : store_first(y, left, value);
}

// One row: what multi_up_tile does, without a packed factor.
template <class T, class F>
inline void multi_up_row(const MultiLoraUp& a, float scale, int64_t rank, const F* factor, int64_t entry,
                         int64_t column0, int64_t column1) {
  uint8_t bits[kSpan / 8 + kKeepPad];
  const int64_t row = a.groups.order[entry];
  const float* u = a.u + entry * a.rank;
  if (a.dropout.threshold) keep_row(a.dropout, row, column0, column1 - column0, bits);
  for (int64_t column = column0; column < column1; column += kWidth) {
    const int64_t left = column1 - column;
    F32 sum = zero();
    if (a.factors.rank_major) {
      for (int64_t j = 0; j < rank; ++j) sum = fma(set1(u[j]), load_up_to(factor + j * a.columns + column, left), sum);
    } else {
      for (int64_t j = 0; j < rank; j += kWidth) {
        F32 block[kWidth];
        load_transposed(factor + column * a.rank + j, a.rank, left, rank - j, block);
        for (int64_t i = 0; i < smaller(kWidth, rank - j); ++i) sum = fma(set1(u[j + i]), block[i], sum);
      }
    }
    multi_up_store<T>(a, scale, row, column, sum, a.dropout.threshold ? lane_bits(bits, column - column0) : 0);
  }
}

template <class T>
inline void multi_up_tile(const MultiLoraUp& a, float scale, int64_t rank, const float* packed, int64_t entry,
                          int64_t rows, int64_t column0, int64_t column1) {
  uint8_t bits[kTileRows][kSpan / 8 + kKeepPad];
  const float* u[kTileRows];
  for (int64_t i = 0; i < kTileRows; ++i) u[i] = a.u + (entry + smaller(i, rows - 1)) * a.rank;
  if (a.dropout.threshold)
    for (int64_t i = 0; i < rows; ++i)
      keep_row(a.dropout, a.groups.order[entry + i], column0, column1 - column0, bits[i]);
  for (int64_t column = column0; column < column1; column += kTileVectors * kWidth) {
    F32 sum[kTileRows][kTileVectors];
    for (int i = 0; i < kTileRows; ++i)
      for (int v = 0; v < kTileVectors; ++v) sum[i][v] = zero();
    for (int64_t j = 0; j < rank; ++j) {
      F32 factor[kTileVectors];
      for (int v = 0; v < kTileVectors; ++v) factor[v] = load(packed + j * kSpan + column - column0 + v * kWidth);
      for (int i = 0; i < kTileRows; ++i) {
        const F32 weight = set1(u[i][j]);
        for (int v = 0; v < kTileVectors; ++v) sum[i][v] = fma(weight, factor[v], sum[i][v]);
      }
    }
    for (int i = 0; i < rows; ++i)
      for (int v = 0; v < kTileVectors; ++v) {
        const int64_t at = column + v * kWidth;
        if (at < column1)
          multi_up_store<T>(a, scale, a.groups.order[entry + i], at, sum[i][v],
                            a.dropout.threshold ? lane_bits(bits[i], at - column0) : 0);
      }
  }
}

template <class T, class F>
void multi_up_columns(const MultiLoraUp& a, int64_t adapter, int64_t rank, int64_t entry0, int64_t entry1,
                      int64_t column0, int64_t column1, float* packed) {
  const F* factor = static_cast<const F*>(a.factors.data) + adapter * a.rank * a.columns;
  const float scale = alpha_of(a.alphas, a.alpha, adapter) * a.dropout.scale;
  if (entry1 - entry0 == 1) return multi_up_row<T>(a, scale, rank, factor, entry0, column0, column1);
  if (a.factors.rank_major)
    copy_panel(factor + column0, a.columns, rank, column1 - column0, packed, kSpan);
  else
    transpose_panel(factor + column0 * a.rank, a.rank, column1 - column0, rank, packed, kSpan);
  for (int64_t e = entry0; e < entry1; e += kTileRows) {
    multi_up_tile<T>(a, scale, rank, packed, e, smaller(kTileRows, entry1 - e), column0, column1);
  }
}

// scratch: [padded_rank, kColumnSpan]; at most kColumnSpan columns, column0 a multiple of that; entries of one adapter
void multi_lora_up(const MultiLoraUp& a, int64_t adapter, int64_t rank, int64_t entry0, int64_t entry1, int64_t column0,
                   int64_t column1, float* scratch) {
  dispatch(a.y_dtype, [&](auto y) {
    dispatch(a.factors.dtype, [&](auto f) {
      multi_up_columns<decltype(y), decltype(f)>(a, adapter, rank, entry0, entry1, column0, column1, scratch);
    });
  });
}

// ---- grad
// ------------------------------------------------------------------------------------------------------------

template <class T, class G>
void multi_grad_columns(const MultiLoraGrad& a, int64_t adapter, int64_t rank, int64_t column0, int64_t column1,
                        float* scratch) {
  const T* x = static_cast<const T*>(a.x);
  G* grad = static_cast<G*>(a.grad) + adapter * a.rank * a.columns;
  const int64_t entry0 = a.groups.offsets[adapter], entry1 = a.groups.offsets[adapter + 1];
  const float scale = alpha_of(a.alphas, a.alpha, adapter) * a.dropout.scale;
  float tile[kRowBlock * kColumnUnit] = {};
  for (int64_t column = column0; column < column1; column += kColumnUnit) {
    const int64_t columns = smaller(kColumnUnit, column1 - column);
    std::memset(scratch, 0, sizeof(float) * static_cast<size_t>(round_up(a.rank, kRowUnit) * kColumnUnit));
    for (int64_t e = entry0; e < entry1; e += kRowBlock) {
      const int64_t rows = smaller(kRowBlock, entry1 - e);
      for (int64_t i = 0; i < rows; ++i)
        load_tile(x, a.columns, a.groups.order[e + i], 1, column, columns, a.dropout, tile + i * kColumnUnit,
                  kColumnUnit);
      for (int64_t j = 0; j < rank; j += kTileRows) {
        int64_t ranks[kTileRows];  // past the last rank the last one is summed again and not stored
        for (int64_t k = 0; k < kTileRows; ++k) ranks[k] = smaller(j + k, rank - 1);
        for (int64_t c = 0; c < columns; c += kTileVectors * kWidth)
          grad_tile(tile + c, rows, a.u + e * a.rank, a.rank, ranks, scratch + j * kColumnUnit + c);
      }
    }
    for (int64_t j = 0; j < a.rank; ++j)
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t at = a.rank_major ? j * a.columns + column + c : (column + c) * a.rank + j;
        grad[at] = from_float<G>(j < rank ? scale * scratch[j * kColumnUnit + c] : 0.0f);
      }
  }
}

// scratch: [rank rounded up to kRowUnit, kColumnUnit]
void multi_lora_grad(const MultiLoraGrad& a, int64_t adapter, int64_t rank, int64_t column0, int64_t column1,
                     float* scratch) {
  dispatch(a.x_dtype, [&](auto x) {
    dispatch(a.grad_dtype, [&](auto g) {
      multi_grad_columns<decltype(x), decltype(g)>(a, adapter, rank, column0, column1, scratch);
    });
  });
}
