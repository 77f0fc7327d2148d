/* SPDX-License-Identifier: Apache-2.0
 *
 * bench/support/gpu_peer.h - what another implementation exports to be timed beside ours, in the same run, on
 * the same weights: a shared library with these three functions, loaded by
 * `codegemm-gpu --peer NAME=LIBRARY`. C, so that it may be built by anything. Peers live elsewhere.
 */
#ifndef CODEGEMM_BENCH_GPU_PEER_H
#define CODEGEMM_BENCH_GPU_PEER_H

#ifdef __cplusplus
extern "C" {
#endif

/* An N x K matrix in the canonical layout, in host memory; valid during create() only. */
struct codegemm_peer_matrix {
  int v, m, b, g;
  long long rows, cols;
  const unsigned* codes;           /* [m][ceil((K / v) / codes_per_word)][N] */
  const unsigned short* codebooks; /* fp16 [m][2^b][v] */
  const unsigned short* scales;    /* fp16 [ceil(K / g)][N] */
};

/* Puts the weights on the device, `copies` times at different places. NULL: this matrix is not supported. */
void* codegemm_peer_create(const struct codegemm_peer_matrix* matrix, int copies);
/* Enqueues y[tokens][N] = x[tokens][K] W^T in fp16 on the stream, with the given copy. Not 0: not supported.
 * It may be captured into a graph. */
int codegemm_peer_run(void* handle, int copy, const void* x, void* y, int tokens, void* stream);
void codegemm_peer_destroy(void* handle);

#ifdef __cplusplus
}
#endif
#endif
