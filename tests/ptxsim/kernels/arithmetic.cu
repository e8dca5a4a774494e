// SPDX-License-Identifier: Apache-2.0
// What numpy or Python can check bit by bit, or within the ulps that CUDA promises.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

__global__ void convert(const float* x, __half* h, __nv_bfloat16* b, float* widened, int* i, uint32_t* tf32, int n) {
  int k = blockIdx.x * blockDim.x + threadIdx.x;
  if (k >= n) return;
  float v = x[k];
  h[k] = __float2half_rn(v);
  b[k] = __float2bfloat16_rn(v);
  widened[k] = __half2float(__ushort_as_half(static_cast<unsigned short>(k)));
  i[k] = __float2int_rn(v);
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(tf32[k]) : "f"(v));
}

__global__ void directed(const float* x, float* y, int n) {
  int k = threadIdx.x;
  if (k >= n) return;
  float a = x[k], b = x[(k + 1) % n];
  y[k * 6 + 0] = __fadd_rd(a, b), y[k * 6 + 1] = __fadd_ru(a, b), y[k * 6 + 2] = __fmul_rz(a, b);
  y[k * 6 + 3] = __fdiv_ru(a, b), y[k * 6 + 4] = __fmaf_rd(a, b, a), y[k * 6 + 5] = __fmaf_rn(a, b, a);
}

__global__ void halves(const float* x, __half* h, __nv_bfloat16* b) {
  int t = threadIdx.x;
  __half hv = __float2half(x[t]), hu = __float2half(x[t ^ 1]);
  __nv_bfloat16 bv = __float2bfloat16(x[t]), bu = __float2bfloat16(x[t ^ 1]);
  h[t * 4] = __hadd(hv, hu), h[t * 4 + 1] = __hmul(hv, hu), h[t * 4 + 2] = __hfma(hv, hu, hv),
        h[t * 4 + 3] = __hmax(hv, hu);
  b[t * 4] = __hadd(bv, bu), b[t * 4 + 1] = __hmul(bv, bu), b[t * 4 + 2] = __hfma(bv, bu, bv),
        b[t * 4 + 3] = __hmax(bv, bu);
}

__noinline__ __device__ float scaled_sine(float a, float b) { return a * sinf(b); }

__global__ void functions(const float* x, float* y, int n) {
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= n) return;
  float v = x[t], a = fabsf(v), *o = y + t * 10;
  o[0] = expf(v), o[1] = logf(a), o[2] = sinf(v * 100.f), o[3] = tanhf(v), o[4] = rsqrtf(a);
  o[5] = erff(v), o[6] = powf(a, 1.7f), o[7] = v / 3.f, o[8] = sqrtf(a), o[9] = scaled_sine(v, 2.f);
}

// 16 integer intrinsics behind a switch (a jump table).
__global__ void integers(const int* x, int* y) {
  int t = threadIdx.x, v = x[t], r = 0;
  switch (v & 15) {
    case 0: r = v * 3; break;
    case 1: r = v ^ 5; break;
    case 2: r = __clz(v); break;
    case 3: r = __brev(v); break;
    case 4: r = __popc(v); break;
    case 5: r = __ffs(v); break;
    case 6: r = __byte_perm(v, 77, 0x4321); break;
    case 7: r = __funnelshift_l(v, 99, 5); break;
    case 8: r = v / 7; break;
    case 9: r = v % 11; break;
    case 10: r = __dp4a(v, 0x01020304, 5); break;
    case 11: r = max(v, -v); break;
    case 12: r = __mulhi(v, 123456789); break;
    case 13: r = (v << 3) >> 1; break;
    case 14: r = __vadd4(v, 0x01010101); break;
    default: r = abs(v);
  }
  y[t] = r;
}

__global__ void atomics(float* f, __half2* h, __nv_bfloat162* b, unsigned long long* u, int* i) {
  int t = threadIdx.x;
  atomicAdd(f, 1.f);
  atomicAdd(h, __floats2half2_rn(1.f, .5f));
  atomicAdd(b, __floats2bfloat162_rn(1.f, .25f));
  atomicMax(u, static_cast<unsigned long long>(t) << 33);
  atomicMin(i, -t);
  atomicXor(i + 1, t);
  atomicInc(reinterpret_cast<unsigned*>(i) + 2, 9);
  atomicCAS(i + 3, 0, t + 1);
}
