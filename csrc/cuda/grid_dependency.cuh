// SPDX-License-Identifier: Apache-2.0
// Programmatic dependent launch, sm_90 and later: a kernel launched with `overlap` (launch.cuh) may start while the
// launch before it still runs, from where all blocks of that one have let it. Until wait_for_launch_before() it must
// not read what that launch writes, nor write what it touches; and every thread has to come there, so that its own end
// means the end of both. What came earlier still has ended before. tests/ptxsim checks this. Captured in a graph, it is
// an edge of that kind.
#pragma once
namespace peftkern {

// Without effect where the next launch does not overlap.
__device__ __forceinline__ void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace peftkern
