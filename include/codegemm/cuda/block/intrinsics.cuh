// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/block/intrinsics.cuh - the few PTX instructions that CUDA C++ has no name for.
// Layer: cuda/block (device).
#pragma once

#include <cstdint>

namespace codegemm::cuda::detail {

// Threads 4q..4q+3 of a warp hold row q of A and columns of B and D, as mma.sync lays fragments out. fp16 and
// bf16 numbers are tf32 numbers, so the products are exact and only the fp32 sums round.
__device__ __forceinline__ void mma_tf32_k4(float (&d)[4], const float (&a)[2], float b) {
  asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(b)));
}

__device__ __forceinline__ void mma_tf32_k8(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// a | b, made where it stands: neither moved to its uses nor left out.
__device__ __forceinline__ unsigned or_here(unsigned a, unsigned b) {
  unsigned out;
  asm volatile("or.b32 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}

// Weights are read once: they must not push the activations out of the first-level cache.
__device__ __forceinline__ uint4 load_once(const void* address) {
  uint4 out;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
               : "l"(address));
  return out;
}

// Asynchronous copies of a thread, in groups; both sides are at multiples of 16 bytes.
__device__ __forceinline__ void copy_16_bytes(unsigned shared, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}
// `bytes` of them, zeros behind.
__device__ __forceinline__ void copy_16_bytes(unsigned shared, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most Pending groups are not there.
template <int Pending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}
// Four 8 x 8 matrices of 16-bit numbers: lane 8 i + j names row j of the i-th, and gets numbers 2 (lane % 4)
// and the next of row lane / 4 of each.
__device__ __forceinline__ void load_matrices(unsigned shared, unsigned (&out)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared)
               : "memory");
}

// The same of what does not change between two barriers of the block: other accesses may be moved across it.
__device__ __forceinline__ void load_matrices_of_constants(unsigned shared, unsigned (&out)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared));
}

// Programmatic dependent launch. On hardware without it a kernel starts when the one before has ended.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Asks for `bytes` (a multiple of 16, at a multiple of 16) to be brought into the second-level cache. One
// thread.
__device__ __forceinline__ void prefetch_l2(const void* address, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes));
#else
  for (unsigned at = 0; at < bytes; at += 128) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(address) + at));
  }
#endif
}

// The same for the first-level cache and the line of one address.
__device__ __forceinline__ void prefetch_l1(const void* address) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(address));
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// One thread tells one of another block of the grid, by a word or byte in global memory, that what it and the
// threads that it met before wrote is there.
__device__ __forceinline__ void hand_over(unsigned* word) {
  asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(word) : "memory");
}
__device__ __forceinline__ void hand_over(unsigned char* byte) {
  asm volatile("st.release.gpu.global.u8 [%0], %1;" ::"l"(byte), "r"(1) : "memory");
}
__device__ __forceinline__ unsigned handed_over(const unsigned* word) {
  unsigned there;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(word) : "memory");
  return there;
}
__device__ __forceinline__ unsigned handed_over(const unsigned char* byte) {
  unsigned there;
  asm volatile("ld.acquire.gpu.global.u8 %0, [%1];" : "=r"(there) : "l"(byte) : "memory");
  return there;
}
// Whole warps wait, lanes with `waits` for their word or byte, which is 0 then as before. Where single lanes
// waited in a loop, products whose barrier of a warpgroup came behind it hung.
template <class Word>
__device__ __forceinline__ void take_hand_over(Word* word, bool waits) {
  unsigned there = 1;
  do {
    if (waits) there = handed_over(word);
  } while (!__all_sync(0xFFFFFFFFU, there != 0));
  if (waits) *word = 0;  // for the next call
  __syncwarp();
}
// What is there then, from the second-level cache.
__device__ __forceinline__ float4 load_handed_over(const float4* from) {
  float4 out;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(out.x), "=f"(out.y), "=f"(out.z), "=f"(out.w)
               : "l"(from)
               : "memory");
  return out;
}

// A barrier in shared memory at byte address `barrier` for one phase: it opens once `bytes` have been pushed
// to this block. One thread calls; the blocks of a cluster meet (cluster_arrive, cluster_wait) before the
// first push.
__device__ __forceinline__ void expect_pushes(unsigned barrier, unsigned bytes) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n\t"
      "fence.mbarrier_init.release.cluster;\n\t"
      "{.reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;}" ::"r"(barrier),
      "r"(bytes)
      : "memory");
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// All threads of the cluster meet; what they wrote to shared memory before is seen after.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n\t"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// The address of this block's shared memory `shared` in block `rank` of the cluster.
__device__ __forceinline__ unsigned address_in(unsigned shared, unsigned rank) {
  unsigned out;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(shared), "r"(rank));
  return out;
}
__device__ __forceinline__ float load_from(unsigned address) {
  float out;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(out) : "r"(address) : "memory");
  return out;
}
// Writes into another block of the cluster and counts at its barrier. Nothing waits here.
__device__ __forceinline__ void push(unsigned address, float value, unsigned barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address),
      "r"(__float_as_uint(value)), "r"(barrier)
      : "memory");
}
// The same with four values, at a multiple of 16 bytes.
__device__ __forceinline__ void push4(unsigned address, const float4& values, unsigned barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          address),
      "r"(__float_as_uint(values.x)), "r"(__float_as_uint(values.y)), "r"(__float_as_uint(values.z)),
      "r"(__float_as_uint(values.w)), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void push8(unsigned address, const float (&values)[8], unsigned barrier) {
  push4(address, make_float4(values[0], values[1], values[2], values[3]), barrier);
  push4(address + 16U, make_float4(values[4], values[5], values[6], values[7]), barrier);
}
// What was pushed lies in shared memory, of which no cache holds a copy: the scope of the block is enough.
__device__ __forceinline__ void wait_for_pushes(unsigned barrier) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n\t"
      "@!done bra again;\n\t}" ::"r"(barrier)
      : "memory");
}

// Barriers in shared memory with phases, at byte address `barrier`.
__device__ __forceinline__ void init_barrier(unsigned barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void wait_for_phase(unsigned barrier, unsigned parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// The same for whole warps, whose threads go on together: ptxas then knows that they do.
__device__ __forceinline__ void wait_for_phase_together(unsigned barrier, unsigned parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "vote.sync.all.pred done, done, 0xffffffff;\n\t"
      "@!done bra.uni again;\n\t}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// The same for a phase that blocks of the cluster arrive at.
__device__ __forceinline__ void wait_for_cluster_phase(unsigned barrier, unsigned parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void arrive(unsigned barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0];}" ::"r"(barrier) : "memory");
}
// At a barrier of any block of the cluster, see address_in().
__device__ __forceinline__ void arrive_in_cluster(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// At one of this block and one of another, if `does`.
__device__ __forceinline__ void arrive_at_both(unsigned barrier, unsigned other, bool does) {
  asm volatile(
      "{\n\t.reg .pred does;\n\t.reg .b64 state;\n\t"
      "setp.ne.b32 does, %2, 0;\n\t"
      "@does mbarrier.arrive.shared::cta.b64 state, [%0];\n\t"
      "@does mbarrier.arrive.shared::cluster.b64 _, [%1];\n\t}" ::"r"(barrier),
      "r"(other), "r"(static_cast<int>(does))
      : "memory");
}
__device__ __forceinline__ void arrive_and_expect(unsigned barrier, unsigned bytes) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;}" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}
// This thread's asynchronous copies arrive when they are done, as one of the barrier's arrivals.
__device__ __forceinline__ void arrive_after_copies(unsigned barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// `bytes` (a multiple of 16) into shared memory, counted at the barrier. One thread.
__device__ __forceinline__ void copy_bulk(unsigned shared, const void* from, unsigned bytes,
                                          unsigned barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// The description of a tensor, in global or parameter memory, is brought to where copies look for it.
__device__ __forceinline__ void prefetch_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// A box of a four-dimensional tensor, from these coordinates on, into this block.
__device__ __forceinline__ void copy_box_4(unsigned shared, const void* map, int x, int y, int z, int w,
                                           unsigned barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
      : "memory");
}
// A box of a two-dimensional tensor, from (column, row) on, into the same place of every block in `blocks`.
__device__ __forceinline__ void copy_box(unsigned shared, const void* map, int column, int row,
                                         unsigned barrier, unsigned short blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}
#endif

}  // namespace codegemm::cuda::detail
