// SPDX-License-Identifier: Apache-2.0
// Two launches that may overlap: fill() lets the next one start at once, add() waits for it where it needs `filled`. A
// BUG_ macro breaks the rule. sm_90 and later.
__global__ void fill(float* filled, const float* scratch) {
  asm volatile("griddepcontrol.launch_dependents;");
  filled[threadIdx.x] = scratch[threadIdx.x];
}

__global__ void add(const float* x, const float* filled, float* y, float* scratch) {
  float v = x[threadIdx.x];
#ifdef BUG_READS_TOO_EARLY
  v += filled[threadIdx.x];  // <- BUG_READS_TOO_EARLY
#endif
#ifdef BUG_WRITES_TOO_EARLY
  scratch[threadIdx.x] = v;  // <- BUG_WRITES_TOO_EARLY
#endif
#ifdef BUG_HALF_WAITS
  if (threadIdx.x < 16) return;  // <- BUG_HALF_WAITS
#endif
#ifndef BUG_NEVER_WAITS
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  y[threadIdx.x] = v + filled[threadIdx.x];  // <- BUG_NEVER_WAITS
  scratch[threadIdx.x] = v;
}
