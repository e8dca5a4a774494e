// SPDX-License-Identifier: Apache-2.0
// few_rows for a bf16 activation and a bf16 weight with vdpbf16ps: x is read as it lies.

struct Bf16RowDot {
  using X = bf16_t;
  using Weight = bf16_t;
  static constexpr int64_t kStep = 2 * kWidth;
  static constexpr bool kWidened = false;

  static F32 load_weight(const bf16_t* p) { return {_mm512_loadu_ps(p)}; }
  static F32 load_weight_first(const bf16_t* p, int64_t n) { return Bf16Dot::units(p, n); }
  static F32 load_x(const bf16_t* p) { return load_weight(p); }
  static F32 load_x_first(const bf16_t* p, int64_t n) { return load_weight_first(p, n); }
  static F32 dot(F32 x, F32 w, F32 sum) { return Bf16Dot::dot(x, w, sum); }
};

bool widens_few_rows_bf16(const FewRows& a) { return a.x_dtype != DType::bf16 || a.weight_dtype != DType::bf16; }

void few_rows_bf16(const FewRows& a, const float* widened, int64_t column0, int64_t column1) {
  if (widens_few_rows_bf16(a)) return few_rows(a, widened, column0, column1);
  few_rows_as<Bf16RowDot>(a, static_cast<const bf16_t*>(a.x), a.in, column0, column1);
}
