// SPDX-License-Identifier: Apache-2.0
// y = x W^T + bias and y = x W with AMX, W in NF4. Blocks of W are dequantized into the second-level cache, as the very
// bits of dequantize_nf4, and used for up to kRowsBlock rows of x from there; sums stay fp32.
//
// Everything is made of tiles of 16 rows x 64 bytes, 1 KiB each and contiguous:
//   forward    C[n][m] += W[n][k] (as it comes) x^T[k][m] (pairs of k in a dword, packed once)
//   gradient   C[m][k] += q[m][n] (copied once) W[n][k] (pairs of n in a dword: two dequantized rows interleaved)
// A sum runs over the depth in one order, whatever the split of columns over threads.

constexpr int64_t kTileBytes = 1024, kTileDepth = 32;
constexpr int64_t kRowsBlock = 512;             // rows of x for which a dequantized block is used
constexpr int64_t kBlockElements = 128 * 1024;  // of dequantized weights: 256 KiB beside 512 KiB each of x and sums
constexpr int64_t kFewRowsDepth = 4096;         // up to 64 rows: whole rows of W, read as one stream

inline int64_t tiles_of(int64_t n) { return (n + 15) / 16; }
inline int64_t steps_of(int64_t n) { return (n + kTileDepth - 1) / kTileDepth; }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void start_tiles() {
  const TileConfig config;
  _tile_loadconfig(&config);
}

// c[i][j] (+)= sum over steps of a[i][step] b[j][step]: kA x kB tiles of sums. Strides in bytes between tile rows.
template <int kA, int kB>
inline void tile_block(const char* a, int64_t a_stride, const char* b, int64_t b_stride, int64_t steps, char* c,
                       int64_t ci, int64_t cj, bool first) {
  if (first) {
    _tile_zero(0);
    if constexpr (kB > 1) _tile_zero(1);
    if constexpr (kA > 1) _tile_zero(2);
    if constexpr (kA > 1 && kB > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, c, 64);
    if constexpr (kB > 1) _tile_loadd(1, c + cj, 64);
    if constexpr (kA > 1) _tile_loadd(2, c + ci, 64);
    if constexpr (kA > 1 && kB > 1) _tile_loadd(3, c + ci + cj, 64);
  }
  for (int64_t s = 0; s < steps; ++s, a += kTileBytes, b += kTileBytes) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kB > 1) {
      _tile_loadd(7, b + b_stride, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kA > 1) {
      _tile_loadd(5, a + a_stride, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kB > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, 64);
  if constexpr (kB > 1) _tile_stored(1, c + cj, 64);
  if constexpr (kA > 1) _tile_stored(2, c + ci, 64);
  if constexpr (kA > 1 && kB > 1) _tile_stored(3, c + ci + cj, 64);
}

inline void tile_blocks(const char* a, int64_t a_tiles, int64_t a_stride, const char* b, int64_t b_tiles,
                        int64_t b_stride, int64_t steps, char* c, int64_t ci, int64_t cj, bool first) {
  for (int64_t i = 0; i < a_tiles; i += 2) {
    for (int64_t j = 0; j < b_tiles; j += 2) {
      const char *at = a + i * a_stride, *bt = b + j * b_stride;
      char* ct = c + i * ci + j * cj;
      const bool two_a = i + 1 < a_tiles, two_b = j + 1 < b_tiles;
      if (two_a && two_b) {
        tile_block<2, 2>(at, a_stride, bt, b_stride, steps, ct, ci, cj, first);
      } else if (two_a) {
        tile_block<2, 1>(at, a_stride, bt, b_stride, steps, ct, ci, cj, first);
      } else if (two_b) {
        tile_block<1, 2>(at, a_stride, bt, b_stride, steps, ct, ci, cj, first);
      } else {
        tile_block<1, 1>(at, a_stride, bt, b_stride, steps, ct, ci, cj, first);
      }
    }
  }
}

// 16 x 16 dwords, in place.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

inline __mmask32 mask_of(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

// x [rows, columns] as tiles [depth block][row tile][step], as they are or with the dwords of a tile transposed. A
// block of the depth is contiguous: with all of a row tile's steps in a row, 128 KiB apart for 4096 columns, a block
// would use a quarter of the sets of the second-level cache.
template <bool kTransposed>
void pack_tiles(const Nf4Product& a, int64_t columns, int64_t depth, char* packed, int64_t tile0, int64_t tile1) {
  const bf16_t* x = static_cast<const bf16_t*>(a.x);
  const int64_t steps = steps_of(columns), block_steps = depth / kTileDepth;
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t block = step / block_steps * block_steps, here = smaller(block_steps, steps - block);
      __m512i row[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t at = tile * 16 + i;
        const __mmask32 mask = at < a.rows ? mask_of(columns - step * kTileDepth) : 0;
        row[i] = _mm512_maskz_loadu_epi16(mask, x + (mask ? at * columns + step * kTileDepth : 0));
      }
      if (kTransposed) transpose(row);
      char* target = packed + (block * tiles_of(a.rows) + tile * here + step - block) * kTileBytes;
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(target + 64 * i, row[i]);
    }
  }
}

// 32 weights of row n from column k on, k % 32 == 0: a block holds all of them, as block sizes are powers of two >= 32.
struct WeightRow {
  const Nf4Product& a;
  int64_t last_block = -1;
  NibbleTable<bf16_t> table{0.0f};

  __m512i at(int64_t n, int64_t k) {
    const int64_t flat = n * a.in + k, block = flat >> __builtin_ctzll(static_cast<uint64_t>(a.block_size));
    if (block != last_block) {
      table = NibbleTable<bf16_t>(a.absmax[block]);
      last_block = block;
    }
    return table.lookup(a.packed + flat / 2);
  }
};

// ---- forward

inline int64_t forward_depth(const Nf4Product& a) { return a.rows <= 64 ? kFewRowsDepth : 512; }

// W[n0 : n0 + tiles * 16][k0 : k0 + depth] as tiles [row tile][step]
inline void dequantize_tiles(const Nf4Product& a, int64_t n0, int64_t tiles, int64_t k0, int64_t depth, char* target) {
  const int64_t steps = depth / kTileDepth;
  WeightRow row{a};
  for (int64_t n = 0; n < tiles * 16; ++n) {
    char* out = target + (n / 16 * steps * kTileBytes) + n % 16 * 64;
    if (n0 + n >= a.out) {
      for (int64_t s = 0; s < steps; ++s) _mm512_store_si512(out + s * kTileBytes, _mm512_setzero_si512());
      continue;
    }
    const uint8_t* ahead = a.packed + ((n0 + n) * a.in + k0) / 2 + kAhead;
    for (int64_t s = 0; s < steps; ++s) {
      if (s % 4 == 0) __builtin_prefetch(ahead + s * 16);
      _mm512_store_si512(out + s * kTileBytes, row.at(n0 + n, k0 + s * kTileDepth));
    }
  }
}

inline void store_forward(const Nf4Product& a, const char* c, int64_t m0, int64_t m_tiles, int64_t n0, int64_t n_tiles,
                          int64_t n_stride) {
  bf16_t* y = static_cast<bf16_t*>(a.y);
  for (int64_t m = 0; m < m_tiles; ++m)
    for (int64_t n = 0; n < n_tiles; ++n) {
      __m512i row[16];
      for (int i = 0; i < 16; ++i) row[i] = _mm512_load_si512(c + (m * n_stride + n) * kTileBytes + 64 * i);
      transpose(row);
      const int64_t column = n0 + n * 16, left = a.out - column, rows = smaller(16, a.rows - m0 - m * 16);
      const F32 bias = !a.bias ? zero() : left >= 16 ? load(a.bias + column) : load_first(a.bias + column, left);
      for (int64_t i = 0; i < rows; ++i) {
        const F32 value = add({_mm512_castsi512_ps(row[i])}, bias);
        bf16_t* target = y + (m0 + m * 16 + i) * a.out + column;
        left >= 16 ? store(target, value) : store_first(target, left, value);
      }
    }
}

void forward_pack(const Nf4Product& a, void* packed, int64_t tile0, int64_t tile1) {
  pack_tiles<true>(a, a.in, forward_depth(a), static_cast<char*>(packed), tile0, tile1);
}

void forward_columns(const Nf4Product& a, const void* packed_x, void* scratch, int64_t column0, int64_t column1) {
  const int64_t depth = forward_depth(a), panel = kBlockElements / depth;
  char *w = static_cast<char*>(scratch), *c = w + kBlockElements * 2;
  start_tiles();
  for (int64_t n = column0; n < column1; n += panel) {
    const int64_t n_tiles = tiles_of(smaller(panel, column1 - n));
    for (int64_t m = 0; m < a.rows; m += kRowsBlock) {
      const int64_t m_tiles = tiles_of(smaller(kRowsBlock, a.rows - m));
      for (int64_t k = 0; k < a.in; k += depth) {
        const int64_t here = smaller(depth, a.in - k), steps = here / kTileDepth;
        dequantize_tiles(a, n, n_tiles, k, here, w);
        const char* x =
            static_cast<const char*>(packed_x) + (k / kTileDepth * tiles_of(a.rows) + m / 16 * steps) * kTileBytes;
        tile_blocks(w, n_tiles, steps * kTileBytes, x, m_tiles, steps * kTileBytes, steps, c, kTileBytes,
                    n_tiles * kTileBytes, k == 0);
      }
      store_forward(a, c, m, m_tiles, n, n_tiles, n_tiles);
    }
  }
  _tile_release();
}

size_t forward_packed_bytes(const Nf4Product& a) { return static_cast<size_t>(tiles_of(a.rows) * a.in * 32); }
size_t forward_scratch_bytes(const Nf4Product& a) {
  const int64_t panel = kBlockElements / forward_depth(a), m_tiles = tiles_of(smaller(kRowsBlock, a.rows));
  return static_cast<size_t>(kBlockElements * 2 + panel * m_tiles * 64);
}

// ---- gradient

constexpr int64_t kGradientDepth = 512, kGradientPanel = kBlockElements / kGradientDepth;

// W[n0 : n0 + steps * 32][k0 : k0 + columns] as tiles [column tile][step] of interleaved rows
inline void dequantize_pairs(const Nf4Product& a, int64_t n0, int64_t steps, int64_t k0, int64_t columns, char* w) {
  alignas(64) uint16_t low[32], high[32];
  for (int i = 0; i < 32; ++i) {
    low[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
    high[i] = static_cast<uint16_t>(low[i] + 16);
  }
  const __m512i low_half = _mm512_load_si512(low), high_half = _mm512_load_si512(high);
  WeightRow even{a}, odd{a};
  for (int64_t pair = 0; pair < steps * 16; ++pair) {
    const int64_t n = n0 + 2 * pair;
    char* target = w + pair / 16 * kTileBytes + pair % 16 * 64;
    for (int64_t k = 0; k < columns; k += 32, target += 2 * steps * kTileBytes) {
      const __m512i first = n < a.out ? even.at(n, k0 + k) : _mm512_setzero_si512();
      const __m512i second = n + 1 < a.out ? odd.at(n + 1, k0 + k) : _mm512_setzero_si512();
      if (k % 128 == 0) {
        __builtin_prefetch(a.packed + ((n + 16) * a.in + k0 + k) / 2);
        __builtin_prefetch(a.packed + ((n + 17) * a.in + k0 + k) / 2);
      }
      _mm512_store_si512(target, _mm512_permutex2var_epi16(first, low_half, second));
      _mm512_store_si512(target + steps * kTileBytes, _mm512_permutex2var_epi16(first, high_half, second));
    }
  }
}

void gradient_pack(const Nf4Product& a, void* packed, int64_t tile0, int64_t tile1) {
  pack_tiles<false>(a, a.out, kGradientDepth, static_cast<char*>(packed), tile0, tile1);
}

void gradient_columns(const Nf4Product& a, const void* packed_q, void* scratch, int64_t column0, int64_t column1) {
  char *w = static_cast<char*>(scratch), *c = w + kBlockElements * 2;
  bf16_t* y = static_cast<bf16_t*>(a.y);
  start_tiles();
  for (int64_t k = column0; k < column1; k += kGradientPanel) {
    const int64_t columns = smaller(kGradientPanel, column1 - k), k_tiles = columns / 16;
    for (int64_t m = 0; m < a.rows; m += kRowsBlock) {
      const int64_t rows = smaller(kRowsBlock, a.rows - m), m_tiles = tiles_of(rows);
      for (int64_t n = 0; n < a.out; n += kGradientDepth) {
        const int64_t steps = steps_of(smaller(kGradientDepth, a.out - n));
        dequantize_pairs(a, n, steps, k, columns, w);
        const char* q =
            static_cast<const char*>(packed_q) + (n / kTileDepth * tiles_of(a.rows) + m / 16 * steps) * kTileBytes;
        tile_blocks(q, m_tiles, steps * kTileBytes, w, k_tiles, steps * kTileBytes, steps, c, k_tiles * kTileBytes,
                    kTileBytes, n == 0);
      }
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t t = 0; t < k_tiles; ++t)
          store(y + (m + i) * a.in + k + t * 16,
                load(reinterpret_cast<const float*>(c + (i / 16 * k_tiles + t) * kTileBytes + i % 16 * 64)));
    }
  }
  _tile_release();
}

size_t gradient_packed_bytes(const Nf4Product& a) {
  return static_cast<size_t>(tiles_of(a.rows) * steps_of(a.out) * kTileBytes);
}
size_t gradient_scratch_bytes(const Nf4Product& a) {
  return static_cast<size_t>(kBlockElements * 2 + kGradientPanel * tiles_of(smaller(kRowsBlock, a.rows)) * 64);
}

inline int64_t tile_panels(const Nf4Product& a) { return tiles_of(a.rows); }

// 4096 x 4096: 1.06 against 0.73 ms for 2 rows, 1.1 against 1.5 for 4 (before nf4_few_rows_bf16.inl).
inline int64_t amx_from_rows(int64_t) { return 3; }
constexpr Nf4Tiles kNf4Forward{amx_from_rows,         tile_panels,  forward_packed_bytes,
                               forward_scratch_bytes, forward_pack, forward_columns};
constexpr Nf4Tiles kNf4Gradient{amx_from_rows,          tile_panels,   gradient_packed_bytes,
                                gradient_scratch_bytes, gradient_pack, gradient_columns};
