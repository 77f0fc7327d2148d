/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tests/capi/capi_test.c - the C API from plain C99, on the CPU and, where there is one, on a GPU.
 */
#define _POSIX_C_SOURCE 200809L

#include <codegemm_c.h>

#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>
#if defined(TEST_CUDA)
#include <cuda_runtime_api.h>
#endif

/* Sanitizers keep terabytes of addresses for themselves. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TEST_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define TEST_SANITIZED 1
#endif
#endif
#if !defined(TEST_SANITIZED)
#define TEST_SANITIZED 0
#endif

static int faults = 0;
static int checks = 0;

static void check(int good, const char* what, int line) {
  ++checks;
  if (good) return;
  ++faults;
  printf("capi_test.c:%d: not so: %s (last error: %s)\n", line, what, codegemm_c_last_error());
}
#define CHECK(condition) check((condition) ? 1 : 0, #condition, __LINE__)

/* Stops where going on makes no sense. */
#define REQUIRE(condition)                                                                                   \
  do {                                                                                                       \
    CHECK(condition);                                                                                        \
    if (faults > 0) exit(1);                                                                                 \
  } while (0)

/* The call failed with this code, and its text has every one of up to three words. */
static void check_error(codegemm_c_status got, codegemm_c_status want, const char* a, const char* b,
                        const char* c, int line) {
  const char* words[3];
  int i = 0;
  words[0] = a, words[1] = b, words[2] = c;
  ++checks;
  if (got != want) {
    ++faults;
    printf("capi_test.c:%d: status %d (%s), expected %d; last error: %s\n", line, (int)got,
           codegemm_c_status_name(got), (int)want, codegemm_c_last_error());
    return;
  }
  for (i = 0; i < 3; ++i) {
    if (words[i] == NULL || strstr(codegemm_c_last_error(), words[i]) != NULL) continue;
    ++faults;
    printf("capi_test.c:%d: the error does not tell '%s': %s\n", line, words[i], codegemm_c_last_error());
  }
}
#define FAILS(call, code, a, b, c) check_error((call), (code), (a), (b), (c), __LINE__)

/* A fixed sequence of numbers (splitmix64). */
static uint64_t state = 20260915;
static uint32_t next_number(void) {
  uint64_t z = (state += UINT64_C(0x9E3779B97F4A7C15));
  z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
  z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
  return (uint32_t)(z >> 32);
}

static double half_value(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int fraction = bits & 1023;
  const double size = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
  return (bits & 0x8000) != 0 ? -size : size;
}

/* ---- Matrices ------------------------------------------------------------------------------------------ */

static void free_matrix(codegemm_c_matrix* w) {
  free((void*)(uintptr_t)w->codes);
  free((void*)(uintptr_t)w->codebooks);
  free((void*)(uintptr_t)w->scales);
}

static codegemm_c_matrix make_matrix(const char* name, int64_t rows, int64_t cols) {
  codegemm_c_matrix w;
  uint32_t* codes = NULL;
  uint16_t *codebooks = NULL, *scales = NULL;
  int64_t i = 0;
  memset(&w, 0, sizeof(w));
  w.struct_size = sizeof(w);
  w.rows = rows;
  w.cols = cols;
  REQUIRE(codegemm_c_parse_format(name, &w.format) == CODEGEMM_C_OK);
  REQUIRE(codegemm_c_canonical_sizes(&w.format, rows, cols, &w.code_words, &w.codebook_values,
                                     &w.scale_values) == CODEGEMM_C_OK);
  codes = malloc((size_t)w.code_words * sizeof(*codes));
  codebooks = malloc((size_t)w.codebook_values * sizeof(*codebooks));
  scales = malloc((size_t)w.scale_values * sizeof(*scales));
  REQUIRE(codes != NULL && codebooks != NULL && scales != NULL);
  /* Padding codes too: nothing may read them. */
  for (i = 0; i < w.code_words; ++i) {
    const uint32_t byte = (1U << w.format.b) - 1U;
    codes[i] = next_number() & (byte | byte << 8 | byte << 16 | byte << 24);
  }
  /* Centroids of magnitude 1/8 to 4, either sign; scales 1/64 to 1/16. */
  for (i = 0; i < w.codebook_values; ++i) {
    codebooks[i] = (uint16_t)((next_number() & 0x83FFU) | (12U + next_number() % 5U) << 10);
  }
  for (i = 0; i < w.scale_values; ++i) {
    scales[i] = (uint16_t)((next_number() & 0x03FFU) | (9U + next_number() % 2U) << 10);
  }
  w.codes = codes;
  w.codebooks = codebooks;
  w.scales = scales;
  return w;
}

/* W[n][k] out of the canonical arrays, as the header describes them; b <= 8. */
static double weight(const codegemm_c_matrix* w, int64_t n, int64_t k) {
  const int64_t vectors = w->cols / w->format.v;
  const int64_t words = (vectors + 3) / 4;
  const int64_t centroids = INT64_C(1) << w->format.b;
  const int64_t j = k / w->format.v;
  double sum = 0.0;
  int64_t c = 0;
  for (c = 0; c < w->format.m; ++c) {
    const uint32_t word = w->codes[(c * words + j / 4) * w->rows + n];
    const int64_t code = (word >> (8 * (j % 4))) & 255U;
    sum += half_value(w->codebooks[(c * centroids + code) * w->format.v + k % w->format.v]);
  }
  return sum * half_value(w->scales[(w->format.g < 0 ? 0 : k / w->format.g) * w->rows + n]);
}

/* ---- Tests --------------------------------------------------------------------------------------------- */

static void test_version_and_errors(void) {
  int32_t code = 0;
  CHECK(codegemm_c_abi_version() == CODEGEMM_C_ABI_VERSION);
  CHECK(strchr(codegemm_c_version(), '.') != NULL);
  CHECK(strcmp(codegemm_c_last_error(), "") == 0); /* nothing has failed yet */
  CHECK(codegemm_c_last_native_error() == 0);
  CHECK(strcmp(codegemm_c_status_name(CODEGEMM_C_OK), "ok") == 0);
  CHECK(strcmp(codegemm_c_status_name(CODEGEMM_C_SHAPE_MISMATCH), "shape mismatch") == 0);
  CHECK(strcmp(codegemm_c_status_name(CODEGEMM_C_INTERNAL_ERROR), "internal error") == 0);
  CHECK(strcmp(codegemm_c_status_name(77), "unknown status") == 0);
  for (code = CODEGEMM_C_OK; code <= CODEGEMM_C_OUT_OF_MEMORY; ++code) {
    CHECK(strcmp(codegemm_c_status_name(code), "unknown status") != 0);
  }
}

static void test_formats(void) {
  codegemm_c_format f;
  char name[CODEGEMM_C_FORMAT_NAME_BYTES];
  int64_t words = -7, codebooks = -7, scales = -7;
  memset(&f, 0, sizeof(f));
  CHECK(codegemm_c_parse_format("m2v8b6g32", &f) == CODEGEMM_C_OK);
  CHECK(f.m == 2 && f.v == 8 && f.b == 6 && f.g == 32);
  CHECK(codegemm_c_format_name(&f, name, sizeof(name)) == CODEGEMM_C_OK && strcmp(name, "m2v8b6g32") == 0);
  CHECK(codegemm_c_format_name(&f, name, 10) == CODEGEMM_C_OK);
  FAILS(codegemm_c_format_name(&f, name, 9), CODEGEMM_C_WORKSPACE_TOO_SMALL, "9", "10", NULL);
  CHECK(codegemm_c_validate_format(&f) == CODEGEMM_C_OK);

  FAILS(codegemm_c_parse_format("m2v8", &f), CODEGEMM_C_INVALID_ARGUMENT, "m2v8", NULL, NULL);
  FAILS(codegemm_c_parse_format("m5v8g32", &f), CODEGEMM_C_INVALID_ARGUMENT, "m = 5", NULL, NULL);
  CHECK(f.m == 2 && f.v == 8 && f.b == 6 && f.g == 32); /* untouched by failures */
  FAILS(codegemm_c_parse_format(NULL, &f), CODEGEMM_C_NULL_POINTER, "name", NULL, NULL);
  FAILS(codegemm_c_parse_format("m1v4g128", NULL), CODEGEMM_C_NULL_POINTER, "format", NULL, NULL);
  f.v = 3;
  FAILS(codegemm_c_validate_format(&f), CODEGEMM_C_INVALID_ARGUMENT, "v = 3", NULL, NULL);
  FAILS(codegemm_c_format_name(&f, name, sizeof(name)), CODEGEMM_C_INVALID_ARGUMENT, "v = 3", NULL, NULL);
  FAILS(codegemm_c_validate_format(NULL), CODEGEMM_C_NULL_POINTER, "format", NULL, NULL);

  CHECK(codegemm_c_parse_format("m1v4g128", &f) == CODEGEMM_C_OK);
  CHECK(codegemm_c_canonical_sizes(&f, 10, 260, &words, &codebooks, &scales) == CODEGEMM_C_OK);
  CHECK(words == 17 * 10 && codebooks == 256 * 4 && scales == 3 * 10);
  FAILS(codegemm_c_canonical_sizes(&f, 10, 258, &words, &codebooks, &scales), CODEGEMM_C_INVALID_ARGUMENT,
        "258", "v = 4", NULL);
  FAILS(codegemm_c_canonical_sizes(&f, -1, 256, &words, &codebooks, &scales), CODEGEMM_C_INVALID_ARGUMENT,
        "-1", NULL, NULL);
  FAILS(codegemm_c_canonical_sizes(&f, INT64_MAX, 256, &words, &codebooks, &scales),
        CODEGEMM_C_INVALID_ARGUMENT, "too large", NULL, NULL);
  FAILS(codegemm_c_canonical_sizes(&f, 0, INT64_C(1) << 40, &words, &codebooks, &scales),
        CODEGEMM_C_UNSUPPORTED, "1099511627776", NULL, NULL);
  FAILS(codegemm_c_canonical_sizes(&f, 10, 260, &words, NULL, &scales), CODEGEMM_C_NULL_POINTER,
        "codebook_values", NULL, NULL);
}

static void test_pack(void) {
  codegemm_c_matrix w = make_matrix("m2v4b6g32", 40, 64);
  codegemm_c_matrix bad = w;
  codegemm_c_packed* packed = (codegemm_c_packed*)(uintptr_t)8;
  uint32_t* codes = (uint32_t*)(uintptr_t)w.codes;
  uint16_t* scales = (uint16_t*)(uintptr_t)w.scales;

  /* 40 x 64: 2 codebooks x 4 words x 40 rows, 2 x 64 x 4 values, 2 groups x 40 rows. */
  CHECK(w.code_words == 320 && w.codebook_values == 512 && w.scale_values == 80);
  bad.code_words = 319;
  FAILS(codegemm_c_pack(&bad, &packed), CODEGEMM_C_SHAPE_MISMATCH, "code_words is 319", "320", "40 x 64");
  CHECK(packed == NULL);
  bad = w;
  bad.codebook_values = 511;
  FAILS(codegemm_c_pack(&bad, &packed), CODEGEMM_C_SHAPE_MISMATCH, "codebook_values is 511", "512",
        "m2v4b6g32");
  bad = w;
  bad.scale_values = 81;
  FAILS(codegemm_c_pack(&bad, &packed), CODEGEMM_C_SHAPE_MISMATCH, "scale_values is 81", "80", NULL);
  bad = w;
  bad.scales = NULL;
  FAILS(codegemm_c_pack(&bad, &packed), CODEGEMM_C_NULL_POINTER, "scales", NULL, NULL);
  bad = w;
  bad.codes = (const uint32_t*)((uintptr_t)w.codes + 2);
  FAILS(codegemm_c_pack(&bad, &packed), CODEGEMM_C_MISALIGNED, "codes", "4", NULL);
  bad = w;
  bad.struct_size = 8;
  FAILS(codegemm_c_pack(&bad, &packed), CODEGEMM_C_INVALID_ARGUMENT, "struct_size is 8", NULL, NULL);
  bad = w;
  bad.cols = 66;
  FAILS(codegemm_c_pack(&bad, &packed), CODEGEMM_C_INVALID_ARGUMENT, "66", NULL, NULL);
  FAILS(codegemm_c_pack(NULL, &packed), CODEGEMM_C_NULL_POINTER, "matrix", NULL, NULL);
  FAILS(codegemm_c_pack(&w, NULL), CODEGEMM_C_NULL_POINTER, "packed", NULL, NULL);

  CHECK(codegemm_c_validate_matrix(&w) == CODEGEMM_C_OK);
  codes[7] |= 64; /* codebook 0, vector 0, row 7: not below 2^6 */
  FAILS(codegemm_c_validate_matrix(&w), CODEGEMM_C_CORRUPT_DATA, "row 7", "2^6", NULL);
  FAILS(codegemm_c_pack(&w, &packed), CODEGEMM_C_CORRUPT_DATA, "row 7", NULL, NULL);
  codes[7] &= ~UINT32_C(64);
  scales[41] = 0x7C00; /* infinite */
  FAILS(codegemm_c_pack(&w, &packed), CODEGEMM_C_INVALID_ARGUMENT, "row 1", "group 1", NULL);
  CHECK(packed == NULL);
  scales[41] = 0x2400;

  REQUIRE(codegemm_c_pack(&w, &packed) == CODEGEMM_C_OK);
  CHECK(codegemm_c_packed_rows(packed) == 40 && codegemm_c_packed_cols(packed) == 64);
  CHECK(codegemm_c_packed_bytes(packed) >= 2 * 16 * 40);
  codegemm_c_packed_destroy(packed);
  CHECK(codegemm_c_packed_rows(NULL) == -1);
  CHECK(strstr(codegemm_c_last_error(), "packed") != NULL);
  CHECK(codegemm_c_packed_cols(NULL) == -1 && codegemm_c_packed_bytes(NULL) == -1);
  codegemm_c_packed_destroy(NULL);
  free_matrix(&w);

  w = make_matrix("m1v4b4g-1", 8, 16);
  w.format.b = 10;
  w.code_words = 2 * 8;
  w.codebook_values = 1024 * 4;
  bad = w;
  bad.codes = calloc(16, 4);
  bad.codebooks = calloc(4096, 2);
  FAILS(codegemm_c_pack(&bad, &packed), CODEGEMM_C_UNSUPPORTED, "b = 10", NULL, NULL);
  free((void*)(uintptr_t)bad.codes);
  free((void*)(uintptr_t)bad.codebooks);
  free_matrix(&w);
}

static void test_executors(void) {
  codegemm_c_executor* executor = (codegemm_c_executor*)(uintptr_t)8;
  FAILS(codegemm_c_executor_create(-1, &executor), CODEGEMM_C_INVALID_ARGUMENT, "-1", NULL, NULL);
  CHECK(executor == NULL);
  FAILS(codegemm_c_executor_create(CODEGEMM_C_MAX_THREADS + 1, &executor), CODEGEMM_C_INVALID_ARGUMENT,
        "1025", "1024", NULL);
  FAILS(codegemm_c_executor_create(1, NULL), CODEGEMM_C_NULL_POINTER, "executor", NULL, NULL);
  REQUIRE(codegemm_c_executor_create(0, &executor) == CODEGEMM_C_OK);
  CHECK(codegemm_c_executor_threads(executor) >= 1);
  codegemm_c_executor_destroy(executor);
  codegemm_c_executor_destroy(NULL);
  CHECK(codegemm_c_executor_threads(NULL) == -1);
}

typedef struct product {
  const codegemm_c_packed* packed;
  codegemm_c_executor* executor;
  const float* x;
  const float* want;
  int64_t tokens, rows, cols;
  int bad;
} product;

/* Another thread, the same executor, its own workspace: the same bits. Its errors are its own. */
static void* multiply_often(void* context) {
  product* p = context;
  size_t bytes = 0;
  void* workspace = NULL;
  float* y = malloc((size_t)(p->tokens * p->rows) * sizeof(float));
  int i = 0;
  p->bad = 1;
  if (y == NULL || strcmp(codegemm_c_last_error(), "") != 0) return NULL;
  if (codegemm_c_workspace_bytes(p->packed, p->tokens, codegemm_c_executor_threads(p->executor), &bytes) !=
          0 ||
      posix_memalign(&workspace, CODEGEMM_C_WORKSPACE_ALIGNMENT, bytes) != 0) {
    return NULL;
  }
  p->bad = 0;
  for (i = 0; i < 20; ++i) {
    memset(y, 0xFF, (size_t)(p->tokens * p->rows) * sizeof(float));
    if (codegemm_c_gemm(p->packed, p->tokens, p->x, p->cols, y, p->rows, workspace, bytes, p->executor) !=
            0 ||
        memcmp(y, p->want, (size_t)(p->tokens * p->rows) * sizeof(float)) != 0) {
      p->bad = 1;
    }
  }
  if (codegemm_c_validate_format(NULL) != CODEGEMM_C_NULL_POINTER) p->bad = 1;
  free(workspace);
  free(y);
  return NULL;
}

/* Two layers in an arena that is gone before they are used, beside the same packed alone. */
static void test_arena(void) {
  enum { kRows = 40, kCols = 64 };
  codegemm_c_matrix layers[2];
  codegemm_c_packed *in_arena[2] = {NULL, NULL}, *alone = NULL;
  codegemm_c_packed* none = (codegemm_c_packed*)(uintptr_t)8;
  codegemm_c_arena* arena = NULL;
  codegemm_c_executor* executor = NULL;
  float x[kCols], y[kRows], again[kRows];
  void* workspace = NULL;
  size_t bytes = 0;
  int i = 0, n = 0;
  layers[0] = make_matrix("m1v4g64", kRows, kCols);
  layers[1] = make_matrix("m2v4b4g32", kRows, kCols);
  for (i = 0; i < kCols; ++i) x[i] = (float)(i % 7 - 3);
  FAILS(codegemm_c_arena_create(NULL), CODEGEMM_C_NULL_POINTER, "arena", NULL, NULL);
  REQUIRE(codegemm_c_arena_create(&arena) == CODEGEMM_C_OK);
  FAILS(codegemm_c_pack_in(&layers[0], NULL, &none), CODEGEMM_C_NULL_POINTER, "arena", NULL, NULL);
  CHECK(none == NULL);
  FAILS(codegemm_c_pack_in(NULL, arena, &none), CODEGEMM_C_NULL_POINTER, "matrix", NULL, NULL);
  FAILS(codegemm_c_pack_in(&layers[0], arena, NULL), CODEGEMM_C_NULL_POINTER, "packed", NULL, NULL);
  for (i = 0; i < 2; ++i) REQUIRE(codegemm_c_pack_in(&layers[i], arena, &in_arena[i]) == CODEGEMM_C_OK);
  codegemm_c_arena_destroy(arena);
  codegemm_c_arena_destroy(NULL);
  REQUIRE(codegemm_c_executor_create(1, &executor) == CODEGEMM_C_OK);
  for (i = 0; i < 2; ++i) {
    REQUIRE(codegemm_c_pack(&layers[i], &alone) == CODEGEMM_C_OK);
    CHECK(codegemm_c_packed_rows(in_arena[i]) == kRows && codegemm_c_packed_cols(in_arena[i]) == kCols);
    CHECK(codegemm_c_packed_bytes(in_arena[i]) == codegemm_c_packed_bytes(alone));
    REQUIRE(codegemm_c_workspace_bytes(alone, 1, 1, &bytes) == CODEGEMM_C_OK);
    REQUIRE(posix_memalign(&workspace, CODEGEMM_C_WORKSPACE_ALIGNMENT, bytes) == 0);
    for (n = 0; n < kRows; ++n) y[n] = again[n] = NAN;
    REQUIRE(codegemm_c_gemm(alone, 1, x, kCols, y, kRows, workspace, bytes, executor) == CODEGEMM_C_OK);
    REQUIRE(codegemm_c_gemm(in_arena[i], 1, x, kCols, again, kRows, workspace, bytes, executor) ==
            CODEGEMM_C_OK);
    CHECK(!isnan(y[0]) && memcmp(y, again, sizeof(y)) == 0);
    free(workspace);
    codegemm_c_packed_destroy(alone);
    codegemm_c_packed_destroy(in_arena[i]); /* the first before the second is used */
    free_matrix(&layers[i]);
  }
  codegemm_c_executor_destroy(executor);
}

/* ---- The quantizer ------------------------------------------------------------------------------------- */

enum { kQuantRows = 48, kQuantCols = 64 };

/* tr((W - W^) H (W - W^)^T), H of the gram or, without one, the identity. */
static double error_of(const float* w, const codegemm_c_matrix* q, const float* gram) {
  double sum = 0.0;
  int64_t n = 0, i = 0, j = 0;
  for (n = 0; n < q->rows; ++n) {
    for (i = 0; i < q->cols; ++i) {
      const double off = (double)w[n * q->cols + i] - weight(q, n, i);
      if (gram == NULL) {
        sum += off * off;
        continue;
      }
      for (j = 0; j < q->cols; ++j) {
        sum += off * (double)gram[i * q->cols + j] * ((double)w[n * q->cols + j] - weight(q, n, j));
      }
    }
  }
  return sum;
}

static int same_matrix(const codegemm_c_matrix* a, const codegemm_c_matrix* b) {
  return memcmp(a->codes, b->codes, (size_t)a->code_words * 4) == 0 &&
         memcmp(a->codebooks, b->codebooks, (size_t)a->codebook_values * 2) == 0 &&
         memcmp(a->scales, b->scales, (size_t)a->scale_values * 2) == 0;
}

typedef struct share_told {
  int calls, fell;
  double last;
} share_told;
static void tell_share(void* context, double share) {
  share_told* told = context;
  told->fell |= share < told->last;
  told->last = share;
  ++told->calls;
}

static void test_quantize(void) {
  float w[kQuantRows * kQuantCols], gram[kQuantCols * kQuantCols], x[kQuantCols], y[kQuantRows];
  const size_t size = (size_t)kQuantRows * kQuantCols;
  codegemm_c_format f;
  codegemm_c_quantize_options options;
  codegemm_c_quantized *plain = NULL, *again = NULL, *calibrated = NULL;
  codegemm_c_matrix m, other;
  codegemm_c_executor *one = NULL, *three = NULL;
  codegemm_c_packed* packed = NULL;
  share_told told = {0, 0, 0.0};
  void* workspace = NULL;
  size_t bytes = 0, i = 0;
  double norm = 0.0, plain_error = 0.0;
  int64_t n = 0, k = 0;
  REQUIRE(codegemm_c_executor_create(1, &one) == CODEGEMM_C_OK);
  REQUIRE(codegemm_c_executor_create(3, &three) == CODEGEMM_C_OK);
  REQUIRE(codegemm_c_parse_format("m2v4b4g32", &f) == CODEGEMM_C_OK);
  for (i = 0; i < size; ++i) {
    w[i] = (float)((double)(next_number() % 2001U) - 1000.0) / 1000.0F;
    norm += (double)w[i] * (double)w[i];
  }
  memset(&m, 0, sizeof(m));
  memset(&other, 0, sizeof(other));
  m.struct_size = other.struct_size = sizeof(m);

  /* The defaults, on one thread and on three: the same bits; another seed: others. */
  REQUIRE(codegemm_c_quantize(w, kQuantRows, kQuantCols, kQuantCols, &f, NULL, 0, NULL, one, &plain) ==
          CODEGEMM_C_OK);
  REQUIRE(codegemm_c_quantized_matrix(plain, &m) == CODEGEMM_C_OK);
  CHECK(m.rows == kQuantRows && m.cols == kQuantCols && m.format.m == 2 && m.format.g == 32);
  CHECK(codegemm_c_validate_matrix(&m) == CODEGEMM_C_OK);
  plain_error = error_of(w, &m, NULL);
  CHECK(plain_error > 0.0 && plain_error < 0.2 * norm);
  options.struct_size = sizeof(options);
  REQUIRE(codegemm_c_quantize_defaults(&options) == CODEGEMM_C_OK);
  CHECK(options.seed == 1 && options.iterations == 16 && options.training_rounds == 12 &&
        options.encode_rounds == 3 && options.refits == 3 && options.sample == 65536 &&
        options.rounds == 12 && options.beam == 4 && options.codebook_steps == 8 && options.reserved == 0 &&
        options.tolerance == 0.01 && options.damping == 0.1 && options.progress == NULL);
  options.progress = tell_share;
  options.context = &told;
  REQUIRE(codegemm_c_quantize(w, kQuantRows, kQuantCols, kQuantCols, &f, NULL, 0, &options, three, &again) ==
          CODEGEMM_C_OK);
  CHECK(told.calls > 1 && !told.fell && told.last == 1.0);
  REQUIRE(codegemm_c_quantized_matrix(again, &other) == CODEGEMM_C_OK);
  CHECK(same_matrix(&m, &other));
  codegemm_c_quantized_destroy(again);
  options.seed = 2;
  REQUIRE(codegemm_c_quantize(w, kQuantRows, kQuantCols, kQuantCols, &f, NULL, 0, &options, three, &again) ==
          CODEGEMM_C_OK);
  REQUIRE(codegemm_c_quantized_matrix(again, &other) == CODEGEMM_C_OK);
  CHECK(!same_matrix(&m, &other));
  codegemm_c_quantized_destroy(again);

  /* The product of what was quantized is that of the weights that it stands for. */
  REQUIRE(codegemm_c_pack(&m, &packed) == CODEGEMM_C_OK);
  REQUIRE(codegemm_c_workspace_bytes(packed, 1, 1, &bytes) == CODEGEMM_C_OK);
  REQUIRE(posix_memalign(&workspace, CODEGEMM_C_WORKSPACE_ALIGNMENT, bytes + 1) == 0);
  for (k = 0; k < kQuantCols; ++k) x[k] = (float)(k % 5) - 2.0F;
  REQUIRE(codegemm_c_gemm(packed, 1, x, kQuantCols, y, kQuantRows, workspace, bytes, one) == CODEGEMM_C_OK);
  for (n = 0; n < kQuantRows; ++n) {
    double want = 0.0;
    for (k = 0; k < kQuantCols; ++k) want += weight(&m, n, k) * (double)x[k];
    CHECK(fabs((double)y[n] - want) < 2e-2);
  }
  free(workspace);
  codegemm_c_packed_destroy(packed);

  /* Some inputs are a hundred times the others: told of that, the outputs' error is less than without. */
  for (i = 0; i < (size_t)kQuantCols * kQuantCols; ++i) gram[i] = 0.0F;
  for (k = 0; k < kQuantCols; ++k) {
    gram[k * kQuantCols + k] = k % 8 == 0 ? 1e4F : 1.0F;
    if (k % 16 == 0) gram[k * kQuantCols + k + 8] = gram[(k + 8) * kQuantCols + k] = 8e3F;
  }
  options.seed = 1;
  told.calls = told.fell = 0;
  told.last = 0.0;
  REQUIRE(codegemm_c_quantize(w, kQuantRows, kQuantCols, kQuantCols, &f, gram, kQuantCols, &options, three,
                              &calibrated) == CODEGEMM_C_OK);
  CHECK(told.calls > 1 && !told.fell && told.last == 1.0);
  REQUIRE(codegemm_c_quantized_matrix(calibrated, &other) == CODEGEMM_C_OK);
  CHECK(error_of(w, &other, gram) < 0.5 * error_of(w, &m, gram));
  codegemm_c_quantized_destroy(calibrated);

  /* Rows with a stride: those of every other row. */
  REQUIRE(codegemm_c_quantize(w, kQuantRows / 2, kQuantCols, 2 * kQuantCols, &f, NULL, 0, NULL, one,
                              &again) == CODEGEMM_C_OK);
  REQUIRE(codegemm_c_quantized_matrix(again, &other) == CODEGEMM_C_OK);
  for (n = 0; n < kQuantRows / 2; ++n) {
    double off = 0.0, all = 0.0;
    for (k = 0; k < kQuantCols; ++k) {
      const double v = (double)w[2 * n * kQuantCols + k];
      off += (v - weight(&other, n, k)) * (v - weight(&other, n, k));
      all += v * v;
    }
    CHECK(off < 0.3 * all);
  }
  codegemm_c_quantized_destroy(again);
  REQUIRE(codegemm_c_quantize(NULL, 0, kQuantCols, kQuantCols, &f, NULL, 0, NULL, one, &again) ==
          CODEGEMM_C_OK); /* no rows: nothing is read */
  codegemm_c_quantized_destroy(again);

  /* Wrong calls. */
#define QUANTIZE(weights, rows, cols, stride, gram, gram_stride)                                             \
  codegemm_c_quantize((weights), (rows), (cols), (stride), &f, (gram), (gram_stride), &options, one, &again)
  options.progress = NULL;
  again = plain;
  FAILS(QUANTIZE(NULL, kQuantRows, kQuantCols, kQuantCols, NULL, 0), CODEGEMM_C_NULL_POINTER, "weights", NULL,
        NULL);
  CHECK(again == NULL);
  FAILS(QUANTIZE(w, kQuantRows, kQuantCols - 2, kQuantCols, NULL, 0), CODEGEMM_C_INVALID_ARGUMENT, "62",
        "v = 4", NULL);
  FAILS(QUANTIZE(w, -1, kQuantCols, kQuantCols, NULL, 0), CODEGEMM_C_INVALID_ARGUMENT, "-1", NULL, NULL);
  FAILS(QUANTIZE(w, (INT64_C(1) << 30) + 1, kQuantCols, kQuantCols, NULL, 0), CODEGEMM_C_UNSUPPORTED,
        "1073741825", NULL, NULL);
  FAILS(QUANTIZE(w, INT64_MAX, INT64_MAX - 3, INT64_MAX, NULL, 0), CODEGEMM_C_INVALID_ARGUMENT, "too large",
        NULL, NULL);
  FAILS(QUANTIZE(w, kQuantRows, kQuantCols, kQuantCols - 1, NULL, 0), CODEGEMM_C_INVALID_ARGUMENT,
        "stride 63", "64 columns", NULL);
  FAILS(QUANTIZE((const float*)((uintptr_t)w + 2), 1, kQuantCols, kQuantCols, NULL, 0), CODEGEMM_C_MISALIGNED,
        "weights", NULL, NULL);
  FAILS(QUANTIZE(w, kQuantRows, kQuantCols, kQuantCols, gram, kQuantCols - 1), CODEGEMM_C_SHAPE_MISMATCH,
        "stride 63", NULL, NULL);
  gram[3 * kQuantCols + 5] = NAN;
  FAILS(QUANTIZE(w, kQuantRows, kQuantCols, kQuantCols, gram, kQuantCols), CODEGEMM_C_INVALID_ARGUMENT,
        "row 3", "column 5", "nan");
  w[7 * kQuantCols + 9] = INFINITY;
  FAILS(QUANTIZE(w, kQuantRows, kQuantCols, kQuantCols, NULL, 0), CODEGEMM_C_INVALID_ARGUMENT, "row 7",
        "column 9", "inf");
  w[7 * kQuantCols + 9] = 1e30F;
  FAILS(QUANTIZE(w, kQuantRows, kQuantCols, kQuantCols, NULL, 0), CODEGEMM_C_INVALID_ARGUMENT, "row 7",
        "group 0", "fp16");
  w[7 * kQuantCols + 9] = 0.5F;
  options.iterations = -1;
  FAILS(QUANTIZE(w, kQuantRows, kQuantCols, kQuantCols, NULL, 0), CODEGEMM_C_INVALID_ARGUMENT,
        "iterations = -1", NULL, NULL);
  options.iterations = 1;
  options.beam = 17;
  gram[3 * kQuantCols + 5] = 0.0F;
  FAILS(QUANTIZE(w, kQuantRows, kQuantCols, kQuantCols, gram, kQuantCols), CODEGEMM_C_INVALID_ARGUMENT,
        "beam = 17", NULL, NULL);
  options.reserved = 1;
  FAILS(QUANTIZE(w, kQuantRows, kQuantCols, kQuantCols, NULL, 0), CODEGEMM_C_INVALID_ARGUMENT, "reserved",
        NULL, NULL);
  options.struct_size = 8;
  FAILS(QUANTIZE(w, kQuantRows, kQuantCols, kQuantCols, NULL, 0), CODEGEMM_C_INVALID_ARGUMENT,
        "struct_size is 8", NULL, NULL);
  FAILS(codegemm_c_quantize_defaults(&options), CODEGEMM_C_INVALID_ARGUMENT, "struct_size is 8", NULL, NULL);
#undef QUANTIZE
  f.v = 3;
  FAILS(codegemm_c_quantize(w, kQuantRows, kQuantCols, kQuantCols, &f, NULL, 0, NULL, one, &again),
        CODEGEMM_C_INVALID_ARGUMENT, "v", NULL, NULL);
  FAILS(codegemm_c_quantize(w, kQuantRows, kQuantCols, kQuantCols, NULL, NULL, 0, NULL, one, &again),
        CODEGEMM_C_NULL_POINTER, "format", NULL, NULL);
  f.v = 4;
  FAILS(codegemm_c_quantize(w, kQuantRows, kQuantCols, kQuantCols, &f, NULL, 0, NULL, NULL, &again),
        CODEGEMM_C_NULL_POINTER, "executor", NULL, NULL);
  FAILS(codegemm_c_quantize(w, kQuantRows, kQuantCols, kQuantCols, &f, NULL, 0, NULL, one, NULL),
        CODEGEMM_C_NULL_POINTER, "quantized", NULL, NULL);
  FAILS(codegemm_c_quantized_matrix(NULL, &m), CODEGEMM_C_NULL_POINTER, "quantized", NULL, NULL);
  FAILS(codegemm_c_quantized_matrix(plain, NULL), CODEGEMM_C_NULL_POINTER, "matrix", NULL, NULL);
  codegemm_c_quantized_destroy(plain);
  codegemm_c_quantized_destroy(NULL);
  codegemm_c_executor_destroy(one);
  codegemm_c_executor_destroy(three);
}

static void test_gemm(const char* format, int64_t rows, int64_t cols, int64_t tokens) {
  const int64_t x_stride = cols + 3, y_stride = rows + 5;
  codegemm_c_matrix w = make_matrix(format, rows, cols);
  codegemm_c_packed* packed = NULL;
  codegemm_c_executor *one = NULL, *three = NULL;
  float* x = malloc((size_t)(tokens * x_stride) * sizeof(float));
  float* y = malloc((size_t)(tokens * y_stride) * sizeof(float));
  float* again = malloc((size_t)(tokens * y_stride) * sizeof(float));
  void* workspace = NULL;
  size_t bytes = 0, bytes1 = 0;
  double error = 0.0, norm = 0.0;
  int64_t i = 0, t = 0, n = 0, k = 0;
  REQUIRE(x != NULL && y != NULL && again != NULL);
  REQUIRE(codegemm_c_pack(&w, &packed) == CODEGEMM_C_OK);
  REQUIRE(codegemm_c_executor_create(1, &one) == CODEGEMM_C_OK);
  REQUIRE(codegemm_c_executor_create(3, &three) == CODEGEMM_C_OK);
  CHECK(codegemm_c_executor_threads(one) == 1 && codegemm_c_executor_threads(three) == 3);
  for (i = 0; i < tokens * x_stride; ++i) x[i] = (float)((double)next_number() / 2147483648.0 - 1.0);
  for (i = 0; i < tokens * y_stride; ++i) y[i] = again[i] = NAN;
  REQUIRE(codegemm_c_workspace_bytes(packed, tokens, 1, &bytes1) == CODEGEMM_C_OK);
  REQUIRE(codegemm_c_workspace_bytes(packed, tokens, 3, &bytes) == CODEGEMM_C_OK);
  REQUIRE(bytes >= bytes1 && bytes1 > 0);
  REQUIRE(posix_memalign(&workspace, CODEGEMM_C_WORKSPACE_ALIGNMENT, bytes + 64) == 0);

  REQUIRE(codegemm_c_gemm(packed, tokens, x, x_stride, y, y_stride, workspace, bytes, three) ==
          CODEGEMM_C_OK);
  for (t = 0; t < tokens; ++t) {
    for (n = 0; n < rows; ++n) {
      double want = 0.0, off = 0.0;
      for (k = 0; k < cols; ++k) want += (double)x[t * x_stride + k] * weight(&w, n, k);
      off = (double)y[t * y_stride + n] - want;
      error += off * off;
      norm += want * want;
    }
    for (n = rows; n < y_stride; ++n)
      CHECK(isnan(y[t * y_stride + n])); /* between the rows nothing is written */
  }
  CHECK(norm > 0.0 && sqrt(error / norm) < 1e-3); /* NaN fails */
  REQUIRE(codegemm_c_gemm(packed, tokens, x, x_stride, again, y_stride, workspace, bytes1, one) ==
          CODEGEMM_C_OK);
  CHECK(memcmp(y, again, (size_t)(tokens * y_stride) * sizeof(float)) == 0);

  if (tokens == 1) {
    /* workspace_bytes() is for any number up to `tokens`: exact for one alone. */
    FAILS(codegemm_c_gemm(packed, 1, x, x_stride, y, y_stride, workspace, bytes - 1, three),
          CODEGEMM_C_WORKSPACE_TOO_SMALL, "bytes", "3 workers", NULL);
  }
  FAILS(codegemm_c_gemm(packed, tokens, x, x_stride, y, y_stride, NULL, bytes, three),
        CODEGEMM_C_NULL_POINTER, "workspace", NULL, NULL);
  FAILS(codegemm_c_gemm(packed, tokens, x, x_stride, y, y_stride, (char*)workspace + 4, bytes, three),
        CODEGEMM_C_MISALIGNED, "4 bytes", "64", NULL);
  FAILS(codegemm_c_gemm(packed, tokens, x, cols - 1, y, y_stride, workspace, bytes, three),
        CODEGEMM_C_INVALID_ARGUMENT, "x has stride", NULL, NULL);
  FAILS(codegemm_c_gemm(packed, tokens, x, x_stride, y, rows - 1, workspace, bytes, three),
        CODEGEMM_C_INVALID_ARGUMENT, "y has stride", NULL, NULL);
  FAILS(codegemm_c_gemm(packed, tokens, NULL, x_stride, y, y_stride, workspace, bytes, three),
        CODEGEMM_C_NULL_POINTER, "x is null", NULL, NULL);
  FAILS(codegemm_c_gemm(packed, tokens, x, x_stride, NULL, y_stride, workspace, bytes, three),
        CODEGEMM_C_NULL_POINTER, "y is null", NULL, NULL);
  FAILS(codegemm_c_gemm(packed, tokens, (const float*)((uintptr_t)x + 1), x_stride, y, y_stride, workspace,
                        bytes, three),
        CODEGEMM_C_MISALIGNED, "x", NULL, NULL);
  FAILS(codegemm_c_gemm(packed, -1, x, x_stride, y, y_stride, workspace, bytes, three),
        CODEGEMM_C_INVALID_ARGUMENT, "tokens is -1", NULL, NULL);
  FAILS(codegemm_c_gemm(packed, CODEGEMM_C_MAX_TOKENS + 1, x, x_stride, y, y_stride, workspace, bytes, three),
        CODEGEMM_C_UNSUPPORTED, "16777217", NULL, NULL);
  FAILS(codegemm_c_gemm(NULL, tokens, x, x_stride, y, y_stride, workspace, bytes, three),
        CODEGEMM_C_NULL_POINTER, "packed", NULL, NULL);
  FAILS(codegemm_c_gemm(packed, tokens, x, x_stride, y, y_stride, workspace, bytes, NULL),
        CODEGEMM_C_NULL_POINTER, "executor", NULL, NULL);
  CHECK(memcmp(y, again, (size_t)(tokens * y_stride) * sizeof(float)) == 0); /* no failure wrote anything */
  CHECK(codegemm_c_gemm(packed, 0, NULL, cols, NULL, rows, NULL, 0, three) == CODEGEMM_C_OK);

  FAILS(codegemm_c_workspace_bytes(packed, -1, 1, &bytes), CODEGEMM_C_INVALID_ARGUMENT, "-1", NULL, NULL);
  FAILS(codegemm_c_workspace_bytes(packed, 1, 0, &bytes), CODEGEMM_C_INVALID_ARGUMENT, "threads is 0", NULL,
        NULL);
  FAILS(codegemm_c_workspace_bytes(packed, INT64_MAX, 1, &bytes), CODEGEMM_C_UNSUPPORTED, "16777216", NULL,
        NULL);
  FAILS(codegemm_c_workspace_bytes(packed, 1, INT32_MAX, &bytes), CODEGEMM_C_UNSUPPORTED, "1024", NULL, NULL);
  FAILS(codegemm_c_workspace_bytes(NULL, 1, 1, &bytes), CODEGEMM_C_NULL_POINTER, "packed", NULL, NULL);
  FAILS(codegemm_c_workspace_bytes(packed, 1, 1, NULL), CODEGEMM_C_NULL_POINTER, "bytes", NULL, NULL);

  if (tokens == 1) {
    product p[2];
    pthread_t threads[2];
    p[0].packed = packed, p[0].executor = three, p[0].x = x, p[0].want = again;
    p[0].tokens = tokens, p[0].rows = rows, p[0].cols = cols, p[0].bad = 1;
    p[1] = p[0];
    FAILS(codegemm_c_parse_format("mine", &w.format), CODEGEMM_C_INVALID_ARGUMENT, "mine", NULL, NULL);
    for (i = 0; i < 2; ++i) REQUIRE(pthread_create(&threads[i], NULL, multiply_often, &p[i]) == 0);
    for (i = 0; i < 2; ++i) REQUIRE(pthread_join(threads[i], NULL) == 0);
    CHECK(p[0].bad == 0 && p[1].bad == 0);
    CHECK(strstr(codegemm_c_last_error(), "mine") != NULL);
  }
  free(workspace);
  free(x);
  free(y);
  free(again);
  codegemm_c_packed_destroy(packed);
  codegemm_c_executor_destroy(one);
  codegemm_c_executor_destroy(three);
  free_matrix(&w);
}

static void test_empty(void) {
  codegemm_c_matrix w = make_matrix("m1v4g128", 16, 128);
  codegemm_c_matrix none = w;
  codegemm_c_packed* packed = NULL;
  codegemm_c_executor* executor = NULL;
  float y[16];
  size_t bytes = 7;
  int i = 0;
  REQUIRE(codegemm_c_executor_create(1, &executor) == CODEGEMM_C_OK);
  /* K = 0: y is all zeros. */
  none.cols = 0, none.codes = NULL, none.scales = NULL, none.code_words = 0, none.scale_values = 0;
  REQUIRE(codegemm_c_pack(&none, &packed) == CODEGEMM_C_OK);
  CHECK(codegemm_c_workspace_bytes(packed, 1, 1, &bytes) == CODEGEMM_C_OK && bytes == 0);
  for (i = 0; i < 16; ++i) y[i] = NAN;
  CHECK(codegemm_c_gemm(packed, 1, NULL, 0, y, 16, NULL, 0, executor) == CODEGEMM_C_OK);
  for (i = 0; i < 16; ++i) CHECK(y[i] == 0.0F);
  codegemm_c_packed_destroy(packed);
  codegemm_c_executor_destroy(executor);
  free_matrix(&w);
}

static void test_cuda_packing(void) {
  codegemm_c_matrix parts[2];
  codegemm_c_cuda_weights weights, old;
  codegemm_c_cuda_problem problem;
  codegemm_c_cuda_device* device = (codegemm_c_cuda_device*)(uintptr_t)8;
  size_t bytes = 0, one = 0, told = 0;
  unsigned char *buffer = NULL, *second = NULL;
  parts[0] = make_matrix("m1v4g128", 32, 256);
  parts[1] = make_matrix("m1v4g128", 40, 256);
  memset(&weights, 0, sizeof(weights));
  REQUIRE(codegemm_c_cuda_pack_bytes(parts, 1, &one) == CODEGEMM_C_OK);
  REQUIRE(codegemm_c_cuda_pack_bytes(parts, 2, &bytes) == CODEGEMM_C_OK);
  REQUIRE(bytes > one && one > 32 * 256 / 4);
  buffer = malloc(bytes + 1);
  second = malloc(bytes);
  REQUIRE(buffer != NULL && second != NULL);
  memset(buffer, 0xA5, bytes + 1);
  FAILS(codegemm_c_cuda_pack(parts, 2, buffer, bytes, &weights), CODEGEMM_C_INVALID_ARGUMENT, "weights",
        "struct_size is 0", NULL);
  weights.struct_size = sizeof(weights);
  FAILS(codegemm_c_cuda_pack(parts, 2, buffer, bytes - 1, &weights), CODEGEMM_C_WORKSPACE_TOO_SMALL, "buffer",
        NULL, NULL);
  CHECK(buffer[0] == 0xA5 && weights.parts == 0);
  REQUIRE(codegemm_c_cuda_pack(parts, 2, buffer, bytes + 1, &weights) == CODEGEMM_C_OK);
  CHECK(buffer[bytes] == 0xA5);
  CHECK(weights.struct_size == sizeof(weights) && weights.parts == 2 && weights.cols == 256);
  CHECK(weights.part_rows[0] == 32 && weights.part_rows[1] == 40 && weights.part_rows[2] == 0);
  CHECK(weights.format.v == 4 && weights.data == NULL && weights.sets >= 1);
  CHECK(weights.unscale > 0.0F && weights.layout_version > 0);
  CHECK(codegemm_c_cuda_weights_bytes(&weights, &told) == CODEGEMM_C_OK && told == bytes);
  REQUIRE(codegemm_c_cuda_pack(parts, 2, second, bytes, &weights) == CODEGEMM_C_OK);
  CHECK(memcmp(buffer, second, bytes) == 0); /* every byte is written, always the same */

  old = weights;
  old.layout_version += 1;
  FAILS(codegemm_c_cuda_weights_bytes(&old, &told), CODEGEMM_C_INCOMPATIBLE, "layout_version", NULL, NULL);
  old = weights;
  old.parts = 5;
  FAILS(codegemm_c_cuda_weights_bytes(&old, &told), CODEGEMM_C_INVALID_ARGUMENT, "parts is 5", NULL, NULL);
  old = weights;
  old.sets = 0;
  FAILS(codegemm_c_cuda_weights_bytes(&old, &told), CODEGEMM_C_INVALID_ARGUMENT, "sets is 0", NULL, NULL);
  old = weights;
  old.part_rows[0] = INT64_MAX;
  CHECK(codegemm_c_cuda_weights_bytes(&old, &told) != CODEGEMM_C_OK);
  FAILS(codegemm_c_cuda_weights_bytes(NULL, &told), CODEGEMM_C_NULL_POINTER, "weights", NULL, NULL);

  FAILS(codegemm_c_cuda_pack_bytes(parts, 5, &bytes), CODEGEMM_C_UNSUPPORTED, "5 matrices", NULL, NULL);
  FAILS(codegemm_c_cuda_pack_bytes(NULL, 1, &bytes), CODEGEMM_C_NULL_POINTER, "matrices", NULL, NULL);
  parts[1].struct_size = 0;
  FAILS(codegemm_c_cuda_pack_bytes(parts, 2, &bytes), CODEGEMM_C_INVALID_ARGUMENT, "matrices[1]", NULL, NULL);
  parts[1].struct_size = sizeof(parts[1]);
  parts[1].format.g = 64;
  FAILS(codegemm_c_cuda_pack_bytes(parts, 2, &bytes), CODEGEMM_C_INVALID_ARGUMENT, "matrices[1] is m1v4g64",
        NULL, NULL);
  parts[1].format.g = 128;
  parts[1].scale_values = 3;
  FAILS(codegemm_c_cuda_pack(parts, 2, second, bytes, &weights), CODEGEMM_C_SHAPE_MISMATCH, "matrices[1]",
        "scale_values is 3", NULL);

  if (codegemm_c_has_cuda() == 0) {
    memset(&problem, 0, sizeof(problem));
    FAILS(codegemm_c_cuda_query_device(0, &device), CODEGEMM_C_UNSUPPORTED, "without CUDA", NULL, NULL);
    CHECK(device == NULL);
    FAILS(codegemm_c_cuda_validate(&problem, NULL), CODEGEMM_C_UNSUPPORTED, "without CUDA", NULL, NULL);
    FAILS(codegemm_c_cuda_workspace_bytes(&problem, NULL, &bytes), CODEGEMM_C_UNSUPPORTED, "without CUDA",
          NULL, NULL);
    FAILS(codegemm_c_cuda_run(&problem, NULL, NULL, 0, NULL), CODEGEMM_C_UNSUPPORTED, "without CUDA", NULL,
          NULL);
  } else {
    FAILS(codegemm_c_cuda_validate(NULL, NULL), CODEGEMM_C_NULL_POINTER, "problem", NULL, NULL);
    FAILS(codegemm_c_cuda_query_device(1000, &device), CODEGEMM_C_CUDA_ERROR, "cuda", NULL, NULL);
    CHECK(device == NULL && codegemm_c_last_native_error() != 0);
  }
  codegemm_c_cuda_device_destroy(NULL);
  free(buffer);
  free(second);
  free_matrix(&parts[0]);
  free_matrix(&parts[1]);
}

#if defined(TEST_CUDA)
static void* to_device(const void* from, size_t bytes) {
  void* to = NULL;
  REQUIRE(cudaMalloc(&to, bytes > 0 ? bytes : 1) == cudaSuccess);
  if (from != NULL) REQUIRE(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice) == cudaSuccess);
  if (from == NULL) REQUIRE(cudaMemset(to, 0, bytes) == cudaSuccess);
  return to;
}

/* One product of the two merged matrices, gate and up or not, against a double reference. */
static void multiply_on_gpu(const codegemm_c_cuda_device* device, const codegemm_c_matrix* parts,
                            const codegemm_c_cuda_weights* weights, int64_t tokens, int32_t activation) {
  enum { kRows = 64, kHalf = 32, kCols = 256, kStride = 72 };
  codegemm_c_cuda_problem problem, other;
  const int64_t columns = activation == CODEGEMM_C_SWIGLU ? kHalf : kRows;
  uint16_t* x = malloc((size_t)(tokens * kCols) * sizeof(*x));
  float* y = malloc((size_t)(tokens * kStride) * sizeof(*y));
  float bias[kRows];
  size_t bytes = 77, planned = 78;
  void* workspace = NULL;
  double error = 0.0, norm = 0.0;
  int64_t i = 0, t = 0, n = 0, k = 0;
  REQUIRE(x != NULL && y != NULL);
  for (i = 0; i < tokens * kCols; ++i)
    x[i] = (uint16_t)((next_number() & 0x83FFU) | (12U + next_number() % 3U) << 10);
  for (i = 0; i < tokens * kStride; ++i) y[i] = NAN;
  for (i = 0; i < kRows; ++i) bias[i] = (float)(next_number() % 100) / 50.0F - 1.0F;

  memset(&problem, 0, sizeof(problem));
  problem.struct_size = sizeof(problem);
  problem.weights = weights;
  problem.tokens = tokens;
  problem.x_stride = kCols;
  problem.y_stride = kStride;
  problem.x_type = CODEGEMM_C_FP16;
  problem.y_type = CODEGEMM_C_FP32;
  problem.activation = activation;
  REQUIRE(codegemm_c_cuda_workspace_bytes(&problem, device, &planned) == CODEGEMM_C_OK);
  FAILS(codegemm_c_cuda_validate(&problem, device), CODEGEMM_C_NULL_POINTER, "x", NULL, NULL);
  problem.x = to_device(x, (size_t)(tokens * kCols) * sizeof(*x));
  problem.y = to_device(y, (size_t)(tokens * kStride) * sizeof(*y));
  problem.bias = to_device(bias, sizeof(bias));
  REQUIRE(codegemm_c_cuda_validate(&problem, device) == CODEGEMM_C_OK);
  REQUIRE(codegemm_c_cuda_workspace_bytes(&problem, device, &bytes) == CODEGEMM_C_OK);
  CHECK(bytes == planned);

  other = problem;
  other.x_type = CODEGEMM_C_FP32;
  FAILS(codegemm_c_cuda_validate(&other, device), CODEGEMM_C_INVALID_ARGUMENT, "x_type is 3", NULL, NULL);
  other = problem;
  other.y_type = 0;
  FAILS(codegemm_c_cuda_validate(&other, device), CODEGEMM_C_INVALID_ARGUMENT, "y_type is 0", NULL, NULL);
  other = problem;
  other.flags = 2;
  FAILS(codegemm_c_cuda_validate(&other, device), CODEGEMM_C_INVALID_ARGUMENT, "flags is 2", NULL, NULL);
  other = problem;
  other.y_stride = columns - 1;
  FAILS(codegemm_c_cuda_run(&other, device, NULL, 0, NULL), CODEGEMM_C_INVALID_ARGUMENT, "y has stride", NULL,
        NULL);
  FAILS(codegemm_c_cuda_run(&problem, NULL, NULL, 0, NULL), CODEGEMM_C_NULL_POINTER, "device", NULL, NULL);

  workspace = to_device(NULL, bytes);
  if (bytes > 0) {
    FAILS(codegemm_c_cuda_run(&problem, device, workspace, bytes - 1, NULL), CODEGEMM_C_WORKSPACE_TOO_SMALL,
          "needs", NULL, NULL);
  }
  problem.flags = tokens == 1 ? CODEGEMM_C_CUDA_NO_OVERLAP : 0;
  REQUIRE(codegemm_c_cuda_run(&problem, device, workspace, bytes, NULL) == CODEGEMM_C_OK);
  REQUIRE(cudaMemcpy(y, problem.y, (size_t)(tokens * kStride) * sizeof(*y), cudaMemcpyDeviceToHost) ==
          cudaSuccess);
  for (t = 0; t < tokens; ++t) {
    double sums[kRows];
    for (n = 0; n < kRows; ++n) {
      sums[n] = (double)bias[n];
      for (k = 0; k < kCols; ++k) {
        sums[n] += half_value(x[t * kCols + k]) * weight(&parts[n / kHalf], n % kHalf, k);
      }
    }
    for (n = 0; n < columns; ++n) {
      const double gate = sums[n];
      const double want =
          activation == CODEGEMM_C_SWIGLU ? gate / (1.0 + exp(-gate)) * sums[n + kHalf] : gate;
      const double off = (double)y[t * kStride + n] - want;
      error += off * off;
      norm += want * want;
    }
    for (n = columns; n < kStride; ++n) CHECK(isnan(y[t * kStride + n]));
  }
  CHECK(norm > 0.0 && sqrt(error / norm) < 2e-3); /* NaN fails */
  cudaFree((void*)(uintptr_t)problem.x);
  cudaFree(problem.y);
  cudaFree((void*)(uintptr_t)problem.bias);
  cudaFree(workspace);
  free(x);
  free(y);
}

static void test_cuda_run(void) {
  codegemm_c_matrix parts[2];
  codegemm_c_cuda_weights weights;
  codegemm_c_cuda_device* device = NULL;
  size_t bytes = 0;
  void *buffer = NULL, *data = NULL;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    printf("capi_test: nothing was run on a GPU: there is none\n");
    return;
  }
  REQUIRE(cudaSetDevice(0) == cudaSuccess);
  REQUIRE(codegemm_c_cuda_query_device(0, &device) == CODEGEMM_C_OK);
  parts[0] = make_matrix("m1v4g128", 32, 256);
  parts[1] = make_matrix("m1v4g128", 32, 256);
  memset(&weights, 0, sizeof(weights));
  weights.struct_size = sizeof(weights);
  REQUIRE(codegemm_c_cuda_pack_bytes(parts, 2, &bytes) == CODEGEMM_C_OK);
  buffer = malloc(bytes);
  REQUIRE(buffer != NULL);
  REQUIRE(codegemm_c_cuda_pack(parts, 2, buffer, bytes, &weights) == CODEGEMM_C_OK);
  data = to_device(buffer, bytes);
  weights.data = data;
  multiply_on_gpu(device, parts, &weights, 1, CODEGEMM_C_NO_ACTIVATION);
  multiply_on_gpu(device, parts, &weights, 20, CODEGEMM_C_NO_ACTIVATION);
  multiply_on_gpu(device, parts, &weights, 3, CODEGEMM_C_SWIGLU);
  cudaFree(data);
  free(buffer);
  free_matrix(&parts[0]);
  free_matrix(&parts[1]);
  codegemm_c_cuda_device_destroy(device);
}
#endif

/* ---- KV ------------------------------------------------------------------------------------------------ */

typedef struct pages {
  int copies;
  int32_t destination, source, tokens;
  int32_t refuse; /* returned instead of 0 */
} pages;

static int32_t copy_block(void* context, int32_t destination, int32_t source, int32_t tokens) {
  pages* p = context;
  if (p->refuse != 0) return p->refuse;
  ++p->copies;
  p->destination = destination;
  p->source = source;
  p->tokens = tokens;
  return 0;
}

static codegemm_c_kv_options kv_options(pages* p) {
  codegemm_c_kv_options options;
  memset(&options, 0, sizeof(options));
  options.struct_size = sizeof(options);
  options.blocks = 10;
  options.layers = 2;
  options.kv_heads = 3;
  options.head_dim = 8;
  options.block_tokens = 4;
  options.element_bytes = 2;
  options.copy_block = copy_block;
  options.context = p;
  return options;
}

/* The system gives some threads and then no more: those that run are ended, and an error comes out. So it
 * does where memory is short. */
static void test_limits(void) {
  struct rlimit before, low;
  codegemm_c_executor* executor = NULL;
  codegemm_c_status status = CODEGEMM_C_OK, no_memory = CODEGEMM_C_OK;
  pages p = {0, 0, 0, 0, 0};
  codegemm_c_kv_options options = kv_options(&p);
  codegemm_c_kv* kv = NULL;
  FILE* file = fopen("/proc/self/statm", "r");
  unsigned long size = 0;
  const int known = file != NULL && fscanf(file, "%lu", &size) == 1;
  if (file != NULL) fclose(file);
  if (TEST_SANITIZED || !known) {
    printf("capi_test: no test of a lack of threads and memory: %s\n", known ? "a sanitizer" : "no /proc");
    return;
  }
  options.blocks = INT64_C(1) << 30;
  REQUIRE(getrlimit(RLIMIT_AS, &before) == 0);
  low = before;
  low.rlim_cur = (rlim_t)size * (rlim_t)sysconf(_SC_PAGESIZE) + ((rlim_t)100 << 20);
  REQUIRE(setrlimit(RLIMIT_AS, &low) == 0);
  status = codegemm_c_executor_create(1000, &executor); /* with stacks of 8 MiB, some 12 of them fit */
  no_memory = codegemm_c_kv_create(&options, &kv);
  REQUIRE(setrlimit(RLIMIT_AS, &before) == 0);
  CHECK(executor == NULL);
  CHECK(status == CODEGEMM_C_IO_ERROR || status == CODEGEMM_C_OUT_OF_MEMORY);
  CHECK(no_memory == CODEGEMM_C_OUT_OF_MEMORY && kv == NULL && codegemm_c_last_native_error() == 0);
}

static void test_kv_errors(void) {
  pages p = {0, 0, 0, 0, 0};
  codegemm_c_kv_options options = kv_options(&p);
  codegemm_c_kv* kv = (codegemm_c_kv*)(uintptr_t)8;
  codegemm_c_kv_sequence* sequence = (codegemm_c_kv_sequence*)(uintptr_t)8;
  codegemm_c_kv_stats stats;
  const int32_t tokens[4] = {1, 2, 3, 4};
  int64_t count = 0;
  options.blocks = -1;
  FAILS(codegemm_c_kv_create(&options, &kv), CODEGEMM_C_INVALID_ARGUMENT, "blocks is -1", NULL, NULL);
  CHECK(kv == NULL);
  options.blocks = INT64_MAX;
  FAILS(codegemm_c_kv_create(&options, &kv), CODEGEMM_C_INVALID_ARGUMENT, "blocks", "2147483646", NULL);
  options = kv_options(&p);
  options.head_dim = 0;
  FAILS(codegemm_c_kv_create(&options, &kv), CODEGEMM_C_INVALID_ARGUMENT, "head_dim = 0", NULL, NULL);
  options = kv_options(&p);
  options.copy_block = NULL;
  FAILS(codegemm_c_kv_create(&options, &kv), CODEGEMM_C_NULL_POINTER, "copy_block", NULL, NULL);
  options = kv_options(&p);
  options.reserved = 1;
  FAILS(codegemm_c_kv_create(&options, &kv), CODEGEMM_C_INVALID_ARGUMENT, "reserved is 1", NULL, NULL);
  options = kv_options(&p);
  options.struct_size += 8;
  FAILS(codegemm_c_kv_create(&options, &kv), CODEGEMM_C_INVALID_ARGUMENT, "struct_size", NULL, NULL);
  FAILS(codegemm_c_kv_create(NULL, &kv), CODEGEMM_C_NULL_POINTER, "options", NULL, NULL);
  options = kv_options(&p);
  FAILS(codegemm_c_kv_create(&options, NULL), CODEGEMM_C_NULL_POINTER, "kv", NULL, NULL);

  REQUIRE(codegemm_c_kv_create(&options, &kv) == CODEGEMM_C_OK);
  FAILS(codegemm_c_kv_open(kv, "", "1", "", tokens, 4, &sequence, NULL), CODEGEMM_C_INVALID_ARGUMENT,
        "model_id", NULL, NULL);
  CHECK(sequence == NULL);
  FAILS(codegemm_c_kv_open(kv, "m", NULL, "", tokens, 4, &sequence, NULL), CODEGEMM_C_NULL_POINTER,
        "model_version", NULL, NULL);
  FAILS(codegemm_c_kv_open(kv, "m", "1", NULL, tokens, 4, &sequence, NULL), CODEGEMM_C_NULL_POINTER,
        "tenant_salt", NULL, NULL);
  FAILS(codegemm_c_kv_open(kv, "m", "1", "", NULL, 4, &sequence, NULL), CODEGEMM_C_NULL_POINTER, "tokens",
        NULL, NULL);
  FAILS(codegemm_c_kv_open(kv, "m", "1", "", tokens, -4, &sequence, NULL), CODEGEMM_C_INVALID_ARGUMENT,
        "count is -4", NULL, NULL);
  FAILS(codegemm_c_kv_open(NULL, "m", "1", "", tokens, 4, &sequence, NULL), CODEGEMM_C_NULL_POINTER, "kv",
        NULL, NULL);
  FAILS(codegemm_c_kv_open(kv, "m", "1", "", tokens, 4, NULL, NULL), CODEGEMM_C_NULL_POINTER, "sequence",
        NULL, NULL);
  FAILS(codegemm_c_kv_reserve(NULL, 1), CODEGEMM_C_NULL_POINTER, "sequence", NULL, NULL);
  FAILS(codegemm_c_kv_commit(NULL, tokens, 1), CODEGEMM_C_NULL_POINTER, "sequence", NULL, NULL);
  FAILS(codegemm_c_kv_fork(NULL, &sequence), CODEGEMM_C_NULL_POINTER, "parent", NULL, NULL);
  FAILS(codegemm_c_kv_append_private(NULL, 1), CODEGEMM_C_NULL_POINTER, "sequence", NULL, NULL);
  FAILS(codegemm_c_kv_truncate(NULL, 0), CODEGEMM_C_NULL_POINTER, "sequence", NULL, NULL);
  FAILS(codegemm_c_kv_blocks(NULL, NULL, 0, &count), CODEGEMM_C_NULL_POINTER, "sequence", NULL, NULL);
  CHECK(codegemm_c_kv_length(NULL) == -1 && codegemm_c_kv_reserved(NULL) == -1);
  codegemm_c_kv_release(NULL);
  codegemm_c_kv_destroy(NULL);

  stats.struct_size = 4;
  FAILS(codegemm_c_kv_get_stats(kv, &stats), CODEGEMM_C_INVALID_ARGUMENT, "struct_size is 4", NULL, NULL);

  /* A fork is not committed, a base not appended to, and nothing beyond what is reserved. */
  REQUIRE(codegemm_c_kv_open(kv, "m", "1", "", tokens, 4, &sequence, &count) == CODEGEMM_C_OK);
  CHECK(count == 0);
  FAILS(codegemm_c_kv_commit(sequence, tokens, 4), CODEGEMM_C_INVALID_ARGUMENT, "4 tokens", "0 are reserved",
        NULL);
  FAILS(codegemm_c_kv_append_private(sequence, 1), CODEGEMM_C_INVALID_ARGUMENT, "base sequence", NULL, NULL);
  FAILS(codegemm_c_kv_reserve(sequence, -1), CODEGEMM_C_INVALID_ARGUMENT, "-1", NULL, NULL);
  FAILS(codegemm_c_kv_reserve(sequence, 41), CODEGEMM_C_EXHAUSTED, NULL, NULL, NULL);
  CHECK(codegemm_c_kv_length(sequence) == 0 && codegemm_c_kv_reserved(sequence) == 0);
  codegemm_c_kv_release(sequence);
  codegemm_c_kv_destroy(kv);
}

static void test_kv_session(void) {
  enum { kTokens = 10 };
  const int32_t context[kTokens] = {11, 12, 13, 14, 21, 22, 23, 24, 31, 32};
  pages p = {0, 0, 0, 0, 0};
  codegemm_c_kv_options options = kv_options(&p);
  codegemm_c_kv_stats stats;
  codegemm_c_kv *kv = NULL, *other_kv = NULL;
  codegemm_c_kv_sequence *base = NULL, *fork = NULL, *again = NULL, *stranger = NULL;
  const codegemm_c_kv_sequence* batch[3];
  int32_t blocks[10], shared[10], indptr[4], indices[16], last[3];
  int64_t matched = -1, count = -1, pages_told = -1;

  REQUIRE(codegemm_c_kv_create(&options, &kv) == CODEGEMM_C_OK);
  REQUIRE(codegemm_c_kv_open(kv, "base", "v1", "", context, kTokens, &base, &matched) == CODEGEMM_C_OK);
  CHECK(matched == 0 && codegemm_c_kv_length(base) == 0);
  REQUIRE(codegemm_c_kv_reserve(base, kTokens) == CODEGEMM_C_OK);
  CHECK(codegemm_c_kv_reserved(base) >= kTokens);
  REQUIRE(codegemm_c_kv_commit(base, context, kTokens) == CODEGEMM_C_OK);
  CHECK(codegemm_c_kv_length(base) == kTokens);
  CHECK(codegemm_c_kv_blocks(base, blocks, 10, &count) == CODEGEMM_C_OK && count == 3);
  CHECK(codegemm_c_kv_blocks(base, NULL, 0, &count) == CODEGEMM_C_WORKSPACE_TOO_SMALL && count == 3);
  FAILS(codegemm_c_kv_blocks(base, shared, 2, &count), CODEGEMM_C_WORKSPACE_TOO_SMALL, "2", "3", NULL);
  CHECK(shared[0] == blocks[0] && shared[1] == blocks[1]);
  CHECK(blocks[0] != blocks[1] && blocks[1] != blocks[2] && blocks[0] != blocks[2]);

  /* Somebody else with the same context has its full blocks; another version or salt has nothing. */
  REQUIRE(codegemm_c_kv_open(kv, "base", "v1", "", context, kTokens, &again, &matched) == CODEGEMM_C_OK);
  CHECK(matched == 8 && codegemm_c_kv_length(again) == 8);
  CHECK(codegemm_c_kv_blocks(again, shared, 10, &count) == CODEGEMM_C_OK && count == 2);
  CHECK(shared[0] == blocks[0] && shared[1] == blocks[1]);
  REQUIRE(codegemm_c_kv_open(kv, "base", "v2", "", context, kTokens, &stranger, &matched) == CODEGEMM_C_OK);
  CHECK(matched == 0);
  codegemm_c_kv_release(stranger);
  REQUIRE(codegemm_c_kv_open(kv, "base", "v1", "salt", context, kTokens, &stranger, &matched) ==
          CODEGEMM_C_OK);
  CHECK(matched == 0);
  codegemm_c_kv_release(stranger);

  /* A fork shares all three blocks; its first token copies the two slots of the last one. */
  REQUIRE(codegemm_c_kv_fork(base, &fork) == CODEGEMM_C_OK);
  CHECK(codegemm_c_kv_blocks(fork, shared, 10, &count) == CODEGEMM_C_OK && count == 3);
  CHECK(memcmp(shared, blocks, 3 * sizeof(int32_t)) == 0);
  FAILS(codegemm_c_kv_commit(fork, context, 1), CODEGEMM_C_INVALID_ARGUMENT, "fork", NULL, NULL);
  p.refuse = 42;
  FAILS(codegemm_c_kv_append_private(fork, 1), CODEGEMM_C_IO_ERROR, "2 tokens", "returned 42", NULL);
  CHECK(codegemm_c_last_native_error() == 42);
  CHECK(codegemm_c_kv_length(fork) == kTokens && p.copies == 0);
  p.refuse = 0;
  REQUIRE(codegemm_c_kv_append_private(fork, 5) == CODEGEMM_C_OK);
  CHECK(codegemm_c_kv_blocks(fork, shared, 10, &count) == CODEGEMM_C_OK && count == 4);
  CHECK(shared[1] == blocks[1] && shared[2] != blocks[2]);
  CHECK(p.copies == 1 && p.source == blocks[2] && p.destination == shared[2] && p.tokens == 2);
  CHECK(codegemm_c_kv_length(fork) == 15);
  FAILS(codegemm_c_kv_truncate(fork, 9), CODEGEMM_C_INVALID_ARGUMENT, "9", "10", NULL);
  CHECK(codegemm_c_kv_truncate(fork, 12) == CODEGEMM_C_OK && codegemm_c_kv_length(fork) == 12);

  /* The page table: 10 tokens, 12 and 8, in blocks of 4. */
  batch[0] = base, batch[1] = fork, batch[2] = again;
  FAILS(codegemm_c_kv_page_table(batch, 3, NULL, 0, NULL, 0, NULL, 0, &pages_told),
        CODEGEMM_C_WORKSPACE_TOO_SMALL, "indptr", "0", "4");
  CHECK(pages_told == 8);
  indptr[0] = 77;
  FAILS(codegemm_c_kv_page_table(batch, 3, indptr, 4, indices, 7, last, 3, &pages_told),
        CODEGEMM_C_WORKSPACE_TOO_SMALL, "indices", "7", "8");
  FAILS(codegemm_c_kv_page_table(batch, 3, indptr, 4, indices, 8, last, 2, &pages_told),
        CODEGEMM_C_WORKSPACE_TOO_SMALL, "last_page_len", "2", "3");
  CHECK(indptr[0] == 77);
  REQUIRE(codegemm_c_kv_page_table(batch, 3, indptr, 4, indices, 16, last, 3, &pages_told) == CODEGEMM_C_OK);
  CHECK(indptr[0] == 0 && indptr[1] == 3 && indptr[2] == 6 && indptr[3] == 8);
  CHECK(memcmp(indices, blocks, 3 * sizeof(int32_t)) == 0);
  CHECK(memcmp(indices + 3, shared, 3 * sizeof(int32_t)) == 0);
  CHECK(memcmp(indices + 6, blocks, 2 * sizeof(int32_t)) == 0);
  CHECK(last[0] == 2 && last[1] == 4 && last[2] == 4);
  CHECK(codegemm_c_kv_page_table(NULL, 0, indptr, 1, NULL, 0, NULL, 0, &pages_told) == CODEGEMM_C_OK);
  CHECK(pages_told == 0 && indptr[0] == 0);
  batch[1] = NULL;
  FAILS(codegemm_c_kv_page_table(batch, 3, indptr, 4, indices, 16, last, 3, &pages_told),
        CODEGEMM_C_NULL_POINTER, "sequence 1", NULL, NULL);
  FAILS(codegemm_c_kv_page_table(batch, -1, indptr, 4, indices, 16, last, 3, &pages_told),
        CODEGEMM_C_INVALID_ARGUMENT, "count is -1", NULL, NULL);
  REQUIRE(codegemm_c_kv_create(&options, &other_kv) == CODEGEMM_C_OK);
  REQUIRE(codegemm_c_kv_open(other_kv, "base", "v1", "", context, kTokens, &stranger, NULL) == CODEGEMM_C_OK);
  batch[1] = stranger;
  FAILS(codegemm_c_kv_page_table(batch, 3, indptr, 4, indices, 16, last, 3, &pages_told),
        CODEGEMM_C_INCOMPATIBLE, "sequence 1", NULL, NULL);
  codegemm_c_kv_release(stranger);
  codegemm_c_kv_destroy(other_kv);

  memset(&stats, 0, sizeof(stats));
  stats.struct_size = sizeof(stats);
  REQUIRE(codegemm_c_kv_get_stats(kv, &stats) == CODEGEMM_C_OK);
  CHECK(stats.total_blocks == 10 && stats.in_use_blocks == 4 && stats.free_blocks == 6 &&
        stats.cached_blocks == 0);
  CHECK(stats.shared_blocks == 2 && stats.private_blocks == 2 && stats.sequences == 3);
  CHECK(stats.bytes_per_block == 2 * 2 * 3 * 8 * 4 * 2);
  CHECK(stats.hit_tokens == 8 && stats.copied_blocks == 1);

  /* What was committed stays cached after its sequences, and goes when room is needed. */
  codegemm_c_kv_release(base);
  codegemm_c_kv_release(again);
  codegemm_c_kv_release(fork);
  REQUIRE(codegemm_c_kv_get_stats(kv, &stats) == CODEGEMM_C_OK);
  CHECK(stats.cached_blocks == 2 && stats.free_blocks == 8 && stats.sequences == 0);
  REQUIRE(codegemm_c_kv_open(kv, "base", "v1", "other", NULL, 0, &base, NULL) == CODEGEMM_C_OK);
  REQUIRE(codegemm_c_kv_reserve(base, 40) == CODEGEMM_C_OK);
  REQUIRE(codegemm_c_kv_get_stats(kv, &stats) == CODEGEMM_C_OK);
  CHECK(stats.evicted_blocks == 2 && stats.in_use_blocks == 10);

  /* The allocator's handle may go before its sequences. */
  REQUIRE(codegemm_c_kv_commit(base, context, kTokens) == CODEGEMM_C_OK);
  codegemm_c_kv_destroy(kv);
  CHECK(codegemm_c_kv_length(base) == kTokens);
  /* Where the parent may write into its last block at any time, a fork copies now; no block is left. */
  FAILS(codegemm_c_kv_fork(base, &fork), CODEGEMM_C_EXHAUSTED, "fork", "2 tokens", NULL);
  CHECK(fork == NULL);
  REQUIRE(codegemm_c_kv_truncate(base, kTokens) == CODEGEMM_C_OK);
  CHECK(codegemm_c_kv_reserved(base) == 0);
  REQUIRE(codegemm_c_kv_fork(base, &fork) == CODEGEMM_C_OK);
  codegemm_c_kv_release(base);
  REQUIRE(codegemm_c_kv_append_private(fork, 1) == CODEGEMM_C_OK);
  CHECK(codegemm_c_kv_length(fork) == kTokens + 1);
  codegemm_c_kv_release(fork);
}

/* Two threads on one allocator, each with sequences of its own. */
static void* sessions_often(void* context) {
  codegemm_c_kv* kv = context;
  const int32_t tokens[6] = {1, 2, 3, 4, 5, 6};
  int bad = 0, i = 0;
  for (i = 0; i < 200; ++i) {
    codegemm_c_kv_sequence *base = NULL, *fork = NULL;
    int64_t matched = 0, count = 0;
    int32_t ids[4];
    if (codegemm_c_kv_open(kv, "base", "v1", "", tokens, 6, &base, &matched) != CODEGEMM_C_OK) return context;
    if (matched != 0 && matched != 4) ++bad;
    if (codegemm_c_kv_reserve(base, 6 - matched) != CODEGEMM_C_OK) ++bad;
    if (codegemm_c_kv_commit(base, tokens + matched, 6 - matched) != CODEGEMM_C_OK) ++bad;
    if (codegemm_c_kv_fork(base, &fork) != CODEGEMM_C_OK) ++bad;
    if (codegemm_c_kv_append_private(fork, 1) != CODEGEMM_C_OK) ++bad;
    if (codegemm_c_kv_blocks(fork, ids, 4, &count) != CODEGEMM_C_OK || count != 2) ++bad;
    codegemm_c_kv_release(base);
    codegemm_c_kv_release(fork);
  }
  return bad == 0 ? NULL : context;
}

static void test_kv_threads(void) {
  pages p = {0, 0, 0, 0, 0};
  codegemm_c_kv_options options = kv_options(&p);
  codegemm_c_kv_stats stats;
  codegemm_c_kv* kv = NULL;
  pthread_t threads[2];
  void* bad = NULL;
  int i = 0;
  REQUIRE(codegemm_c_kv_create(&options, &kv) == CODEGEMM_C_OK);
  for (i = 0; i < 2; ++i) REQUIRE(pthread_create(&threads[i], NULL, sessions_often, kv) == 0);
  for (i = 0; i < 2; ++i) {
    REQUIRE(pthread_join(threads[i], &bad) == 0);
    CHECK(bad == NULL);
  }
  stats.struct_size = sizeof(stats);
  REQUIRE(codegemm_c_kv_get_stats(kv, &stats) == CODEGEMM_C_OK);
  CHECK(stats.sequences == 0 && stats.in_use_blocks == 0 && stats.cached_blocks == 1 &&
        stats.free_blocks == 9);
  CHECK(p.copies == 400 && stats.copied_blocks == 400);
  codegemm_c_kv_destroy(kv);
}

int main(void) {
  test_version_and_errors();
  test_formats();
  test_pack();
  test_quantize();
  test_arena();
  test_executors();
  test_limits();
  test_gemm("m2v4b4g32", 96, 256, 1);  /* looked up in registers on every machine that can */
  test_gemm("m1v4g128", 65, 256, 3);   /* a Psumbook of several tokens; rows that fill no block */
  test_gemm("m2v8g-1", 80, 128, 1);    /* one scale a row */
  test_gemm("m3v2b5g16", 64, 64, 130); /* many tokens */
  test_empty();
  test_cuda_packing();
#if defined(TEST_CUDA)
  test_cuda_run();
#endif
  test_kv_errors();
  test_kv_session();
  test_kv_threads();
  if (faults > 0) {
    printf("capi_test: %d of %d checks failed\n", faults, checks);
    return 1;
  }
  printf("capi_test: %d checks passed\n", checks);
  return 0;
}
