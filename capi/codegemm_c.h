/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file
 * codegemm_c.h - both libraries from C and from everything that can call C: the quantizer, products with
 * codebook-quantized weights on the CPU and the GPU, and the KV block allocator with its page table. C99 and
 * C++, no other header of the project.
 *
 * Errors. Functions return a codegemm_c_status; what went wrong, with the names and the numbers, says
 * codegemm_c_last_error(). No exception leaves the library and nothing is printed. A failed call changes none
 * of the caller's memory but handles, which become NULL, and counts that its description names. A pointer
 * must not be NULL unless its description says so; NULL is then an error (CODEGEMM_C_NULL_POINTER), not a
 * crash.
 *
 * Ownership. What a create function, codegemm_c_quantize(), codegemm_c_pack(), codegemm_c_pack_in() or
 * codegemm_c_kv_open() gives belongs to the caller until he gives it back, once, with the function that its
 * description names; these take NULL and do nothing. Arrays that are passed in are read during the call and
 * not kept.
 *
 * Threads. Functions may be called from any thread at any time, with these rules: a handle is given back by
 * one call, while no other uses it; a sequence is used by one thread at a time. Quantized and packed
 * matrices and devices are never changed and may be shared. Calls on one executor wait for each other. An
 * allocator locks itself.
 *
 * ABI. A struct that may grow begins with struct_size, which the caller sets to sizeof of that struct as his
 * header has it. Enumerators and functions are added, never renumbered or removed, without a new
 * CODEGEMM_C_ABI_VERSION, which is also the number in the shared library's file name.
 */
#ifndef CODEGEMM_C_H_
#define CODEGEMM_C_H_

#include <stddef.h>
#include <stdint.h>

/** @def CODEGEMM_C_API
 * What the shared library shows. */
#if defined(_WIN32) && defined(CODEGEMM_C_BUILDING)
#define CODEGEMM_C_API __declspec(dllexport)
#elif defined(_WIN32)
#define CODEGEMM_C_API __declspec(dllimport)
#elif defined(__GNUC__)
#define CODEGEMM_C_API __attribute__((visibility("default")))
#else
#define CODEGEMM_C_API
#endif

#if defined(__cplusplus)
extern "C" {
#endif

/* ---- Version and errors -------------------------------------------------------------------------------- */

/** Of this header; see ABI above. */
#define CODEGEMM_C_ABI_VERSION 1

/**
 * The CODEGEMM_C_ABI_VERSION that the library was built with: compare it after loading the library by name.
 */
CODEGEMM_C_API uint32_t codegemm_c_abi_version(void);

/** "MAJOR.MINOR.PATCH" of the libraries inside. Never NULL, valid for ever. */
CODEGEMM_C_API const char* codegemm_c_version(void);

/** 0, or why not: a value of enum codegemm_c_status_code. */
typedef int32_t codegemm_c_status;

/** Values of codegemm_c_status. */
enum codegemm_c_status_code {
  CODEGEMM_C_OK = 0,
  CODEGEMM_C_INVALID_ARGUMENT = 1,    /**< a number or combination that no call of this function accepts */
  CODEGEMM_C_SHAPE_MISMATCH = 2,      /**< arguments that are each valid but do not fit one another */
  CODEGEMM_C_NULL_POINTER = 3,        /**< a pointer that must not be NULL is */
  CODEGEMM_C_MISALIGNED = 4,          /**< a pointer or stride without the alignment that is needed */
  CODEGEMM_C_WORKSPACE_TOO_SMALL = 5, /**< a workspace or an array for results is smaller than it must be */
  CODEGEMM_C_UNSUPPORTED = 6,      /**< valid, but no kernel, format, architecture or build here serves it */
  CODEGEMM_C_NOT_FOUND = 7,        /**< something named that is not there */
  CODEGEMM_C_IO_ERROR = 8,         /**< the operating system, or a function of the caller's, refused */
  CODEGEMM_C_CORRUPT_DATA = 9,     /**< data that contradict their format */
  CODEGEMM_C_EXHAUSTED = 10,       /**< back-pressure: no block left now; try again later */
  CODEGEMM_C_INCOMPATIBLE = 11,    /**< things that may not be used together */
  CODEGEMM_C_CANCELLED = 12,       /**< stopped on request */
  CODEGEMM_C_CUDA_ERROR = 13,      /**< CUDA refused; codegemm_c_last_native_error() is the cudaError_t */
  CODEGEMM_C_OUT_OF_MEMORY = 14,   /**< memory could not be had */
  CODEGEMM_C_INTERNAL_ERROR = 1000 /**< a fault of the library itself */
};

/** The code in words, "shape mismatch"; "unknown status" for others. Never NULL, valid for ever. */
CODEGEMM_C_API const char* codegemm_c_status_name(codegemm_c_status status);

/**
 * What the last call of this thread that failed had to say, "" if none has. At most 1023 bytes. Never NULL;
 * the text stays until this thread's next call of the library.
 */
CODEGEMM_C_API const char* codegemm_c_last_error(void);

/** errno (CODEGEMM_C_IO_ERROR) or cudaError_t (CODEGEMM_C_CUDA_ERROR) of that failure, else 0. */
CODEGEMM_C_API int32_t codegemm_c_last_native_error(void);

/* ---- Formats ------------------------------------------------------------------------------------------- */

/**
 * W[n, k] = s[n, k / g] * sum over c of C_c[code_c[n, k / v]][k % v]: vectors of v weights along K (2, 4, 8
 * or 16), m codebooks (1 to 4) of 2^b centroids (4 to 16; the CPU kernels go to 8), one scale for g weights
 * of a row (a multiple of v), or for a whole row (-1). This struct does not grow.
 */
typedef struct codegemm_c_format {
  int32_t v; /**< weights that one code stands for */
  int32_t m; /**< codebooks */
  int32_t b; /**< bits of a code */
  int32_t g; /**< weights of a row that share a scale, or -1 */
} codegemm_c_format;

/** Room that every format's name fits into, with its end. */
#define CODEGEMM_C_FORMAT_NAME_BYTES 32

/** Reads "m1v4g128" or "m1v4b6g32" (no b: 8) and checks it. INVALID_ARGUMENT. */
CODEGEMM_C_API codegemm_c_status codegemm_c_parse_format(const char* name, codegemm_c_format* format);

/**
 * Writes the name, with a 0 at its end, into capacity bytes. INVALID_ARGUMENT for a format that cannot be;
 * WORKSPACE_TOO_SMALL.
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_format_name(const codegemm_c_format* format, char* name,
                                                        size_t capacity);

/** Whether the canonical layout can hold the format. INVALID_ARGUMENT, with the number that cannot be. */
CODEGEMM_C_API codegemm_c_status codegemm_c_validate_format(const codegemm_c_format* format);

/* ---- Quantized matrices -------------------------------------------------------------------------------- */

/**
 * A matrix of N x K in the canonical layout, in memory of the caller's that is only read. Rows are outputs,
 * columns are inputs; K is a multiple of v. Arrays of no element may be NULL.
 */
typedef struct codegemm_c_matrix {
  size_t struct_size;       /**< sizeof(codegemm_c_matrix) */
  codegemm_c_format format; /**< how the weights are quantized */
  int64_t rows;             /**< N */
  int64_t cols;             /**< K */
  /** [m][ceil((K / v) / codes in a word)][N]: 4 codes of 8 bits in a word for b <= 8, else 2 of 16; lowest
   * bits first along K, what is over is 0. */
  const uint32_t* codes;
  const uint16_t* codebooks; /**< fp16 [m][2^b][v] */
  const uint16_t* scales;    /**< fp16 [ceil(K / g)][N], for g = -1 [1][N] */
  int64_t code_words;        /**< elements that the caller has at codes */
  int64_t codebook_values;   /**< at codebooks */
  int64_t scale_values;      /**< at scales */
} codegemm_c_matrix;

/**
 * Elements of the three arrays of an N x K matrix. INVALID_ARGUMENT for a format or shape that cannot be;
 * UNSUPPORTED for a side over 2^30.
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_canonical_sizes(const codegemm_c_format* format, int64_t rows,
                                                            int64_t cols, int64_t* code_words,
                                                            int64_t* codebook_values, int64_t* scale_values);

/**
 * Checks a matrix, every code of it: for what comes out of a file. As codegemm_c_canonical_sizes();
 * SHAPE_MISMATCH where an array has not the elements that the shape asks for; MISALIGNED; CORRUPT_DATA with
 * the place of a code that is not below 2^b.
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_validate_matrix(const codegemm_c_matrix* matrix);

/* ---- Quantizing ---------------------------------------------------------------------------------------- */

/** Quantized weights in the canonical layout. Owns its memory. */
typedef struct codegemm_c_quantized codegemm_c_quantized;

/**
 * Threads that products and the quantizer run on: the one that calls, and others that live as long as the
 * executor, which codegemm_c_executor_create() makes.
 */
typedef struct codegemm_c_executor codegemm_c_executor;

/**
 * How far a quantization has come: `share` is 0 to 1. Called by the thread that called, which holds the
 * executor: it must not use that, and must not unwind.
 */
typedef void (*codegemm_c_quantize_progress)(void* context, double share);

/** What codegemm_c_quantize() may be told. codegemm_c_quantize_defaults() fills it. */
typedef struct codegemm_c_quantize_options {
  size_t struct_size;      /**< sizeof(codegemm_c_quantize_options) */
  uint64_t seed;           /**< the same one gives the same bits, whatever the number of threads */
  int32_t iterations;      /**< k-means: rounds of Lloyd for each codebook (16) */
  int32_t training_rounds; /**< k-means: rounds of training all codebooks together, m > 1 (12) */
  int32_t encode_rounds; /**< k-means: rounds of choosing one codebook's codes given the others, m > 1 (3) */
  int32_t refits;        /**< k-means: times that scales are fitted to the codes (3) */
  int64_t sample;        /**< k-means: vectors that codebooks are trained on, 1 or more (65536) */
  /* With `gram` alone: */
  int32_t rounds;         /**< rounds of new codes and fits at most (12) */
  int32_t beam;           /**< paths that the search for codes keeps, 1 to 16 (4) */
  int32_t codebook_steps; /**< conjugate gradient steps of each fit (8) */
  int32_t reserved;       /**< 0 */
  double tolerance;       /**< they end when one gains less than this share of the error (0.01) */
  double damping;         /**< added to the diagonal, in shares of its mean (0.1) */
  codegemm_c_quantize_progress progress; /**< may be NULL */
  void* context;                         /**< for progress; may be NULL */
} codegemm_c_quantize_options;

/** Fills a struct whose struct_size is set with the numbers in brackets, seed 1 and no progress. */
CODEGEMM_C_API codegemm_c_status codegemm_c_quantize_defaults(codegemm_c_quantize_options* options);

/**
 * Quantizes weights[rows][cols] (fp32, row by row, row_stride >= cols elements from one to the next; rows are
 * outputs) to a format. Without `gram` (NULL; its stride is then not looked at) the sum of squared errors of
 * the weights is made small, by k-means; with it that of the layer's outputs on calibration data: gram[cols]
 * [cols] = X^T X of the layer's inputs X in fp32, of whatever scale, gram_stride >= cols. options may be
 * NULL: the defaults. `quantized` is a new handle, NULL on failure. INVALID_ARGUMENT for a format, shape,
 * stride or option that cannot be (cols must be a multiple of v), for a weight or element of gram that is
 * not finite, or negative on gram's diagonal, with its row and column, and for weights whose scales fp16
 * cannot hold; SHAPE_MISMATCH for gram_stride; UNSUPPORTED for a side over 2^30; MISALIGNED; OUT_OF_MEMORY.
 * Takes minutes for large layers with gram, during which other calls on the executor wait.
 * codegemm_c_quantized_destroy() frees it.
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_quantize(const float* weights, int64_t rows, int64_t cols,
                                                     int64_t row_stride, const codegemm_c_format* format,
                                                     const float* gram, int64_t gram_stride,
                                                     const codegemm_c_quantize_options* options,
                                                     codegemm_c_executor* executor,
                                                     codegemm_c_quantized** quantized);

/**
 * Fills a struct whose struct_size is set with the matrix, for codegemm_c_pack(), codegemm_c_cuda_pack() and
 * whoever writes the arrays to a file. They belong to the handle and are valid as long as it is.
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_quantized_matrix(const codegemm_c_quantized* quantized,
                                                             codegemm_c_matrix* matrix);

/** Frees quantized weights. */
CODEGEMM_C_API void codegemm_c_quantized_destroy(codegemm_c_quantized* quantized);

/* ---- The product on the CPU ---------------------------------------------------------------------------- */

/** Weights in the layout of this machine's kernels. Owns its memory. */
typedef struct codegemm_c_packed codegemm_c_packed;

/**
 * Packs a matrix, once; it may be freed then. As codegemm_c_validate_matrix(); INVALID_ARGUMENT for a
 * codebook value or scale that is not finite; UNSUPPORTED for b > 8; OUT_OF_MEMORY.
 * codegemm_c_packed_destroy() frees it.
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_pack(const codegemm_c_matrix* matrix, codegemm_c_packed** packed);

/**
 * Memory for the matrices of a model, side by side on pages of 2 MiB: layers of less than some MiB are 8 to
 * 20% faster there when they come out of memory.
 */
typedef struct codegemm_c_arena codegemm_c_arena;

/** OUT_OF_MEMORY. codegemm_c_arena_destroy() gives it back. */
CODEGEMM_C_API codegemm_c_status codegemm_c_arena_create(codegemm_c_arena** arena);
/** What is packed in it stays valid; memory goes back to the system when nothing in it is left. */
CODEGEMM_C_API void codegemm_c_arena_destroy(codegemm_c_arena* arena);

/**
 * codegemm_c_pack() in an arena, best in the order in which the layers are read. Several threads may pack in
 * one at once.
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_pack_in(const codegemm_c_matrix* matrix, codegemm_c_arena* arena,
                                                    codegemm_c_packed** packed);

/** Frees a packed matrix. */
CODEGEMM_C_API void codegemm_c_packed_destroy(codegemm_c_packed* packed);

/** N; -1 for NULL. */
CODEGEMM_C_API int64_t codegemm_c_packed_rows(const codegemm_c_packed* packed);
/** K; -1 for NULL. */
CODEGEMM_C_API int64_t codegemm_c_packed_cols(const codegemm_c_packed* packed);
/** Bytes of memory held; -1 for NULL. */
CODEGEMM_C_API int64_t codegemm_c_packed_bytes(const codegemm_c_packed* packed);

/** Threads of an executor at most. */
#define CODEGEMM_C_MAX_THREADS 1024

/**
 * threads is 1 to CODEGEMM_C_MAX_THREADS, or 0 for one for each hardware thread. INVALID_ARGUMENT; IO_ERROR
 * where the system gives no thread; OUT_OF_MEMORY. codegemm_c_executor_destroy() ends the threads.
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_executor_create(int32_t threads, codegemm_c_executor** executor);
/** Ends the threads. */
CODEGEMM_C_API void codegemm_c_executor_destroy(codegemm_c_executor* executor);

/** How many there are, the calling one among them; -1 for NULL. */
CODEGEMM_C_API int32_t codegemm_c_executor_threads(const codegemm_c_executor* executor);

/** The alignment of a workspace of codegemm_c_gemm(), in bytes. */
#define CODEGEMM_C_WORKSPACE_ALIGNMENT 64
/** The most tokens of one call. */
#define CODEGEMM_C_MAX_TOKENS 16777216

/**
 * Bytes of workspace for products of up to `tokens` tokens on `threads` threads
 * (codegemm_c_executor_threads()). INVALID_ARGUMENT for a negative number of tokens or less than one thread;
 * UNSUPPORTED for more than CODEGEMM_C_MAX_TOKENS or CODEGEMM_C_MAX_THREADS.
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_workspace_bytes(const codegemm_c_packed* packed, int64_t tokens,
                                                            int32_t threads, size_t* bytes);

/**
 * y[tokens][N] = x[tokens][K] W^T in fp32. x_stride >= K and y_stride >= N are elements from one token to the
 * next. y is overwritten and must not overlap x. The bits of y do not depend on the number of threads. Of 0
 * tokens x, y and the workspace may be NULL, as the workspace may where codegemm_c_workspace_bytes() is 0.
 * Allocates nothing; the workspace's content has no meaning before and after, and products that run at the
 * same time need one each. INVALID_ARGUMENT (negative tokens, stride), MISALIGNED, WORKSPACE_TOO_SMALL,
 * UNSUPPORTED (tokens).
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_gemm(const codegemm_c_packed* packed, int64_t tokens,
                                                 const float* x, int64_t x_stride, float* y, int64_t y_stride,
                                                 void* workspace, size_t workspace_bytes,
                                                 codegemm_c_executor* executor);

/* ---- The product on the GPU ---------------------------------------------------------------------------- */

/**
 * 1 if the library was built with CUDA. If it was not, codegemm_c_cuda_query_device(), _validate(),
 * _workspace_bytes() and _run() give UNSUPPORTED; packing works everywhere.
 */
CODEGEMM_C_API int32_t codegemm_c_has_cuda(void);

/** Matrices that can be merged along N. */
#define CODEGEMM_C_CUDA_MAX_PARTS 4
/** Bytes: alignment of packed weights and workspaces in device memory. */
#define CODEGEMM_C_CUDA_ALIGNMENT 256

/**
 * Weights in the GPU kernels' layout: numbers, filled by codegemm_c_cuda_pack(), and the place of the packed
 * bytes, which the caller copies to device memory and sets here. The numbers and the bytes may be kept in a
 * file: a library of another layout_version refuses them.
 */
typedef struct codegemm_c_cuda_weights {
  size_t struct_size;       /**< sizeof(codegemm_c_cuda_weights) */
  int32_t layout_version;   /**< of the packed bytes */
  int32_t parts;            /**< matrices that are merged along N, each with codebooks of its own */
  codegemm_c_format format; /**< of all parts */
  int64_t part_rows[CODEGEMM_C_CUDA_MAX_PARTS]; /**< N of each part, 0 beyond the last */
  int64_t cols;                                 /**< K of all */
  int32_t sets;                                 /**< columns of codes that a lane owns */
  float unscale;                                /**< what sums of packed numbers are multiplied by */
  const void* data;                             /**< device memory, aligned to CODEGEMM_C_CUDA_ALIGNMENT */
} codegemm_c_cuda_weights;

/**
 * Bytes of `count` packed matrices that are merged along N: Q, K and V, or gate and up. All have the same K
 * and format, and all but the last a multiple of 16 rows. Looks at formats and shapes alone: arrays and their
 * sizes may be NULL and 0. INVALID_ARGUMENT, SHAPE_MISMATCH (another K), UNSUPPORTED (rows of a part, more
 * than CODEGEMM_C_CUDA_MAX_PARTS).
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_cuda_pack_bytes(const codegemm_c_matrix* matrices, int32_t count,
                                                            size_t* bytes);

/**
 * Packs them into a buffer of the caller's in host memory, of at least as many bytes, and fills the numbers
 * of weights (whose struct_size is set); data becomes NULL. As codegemm_c_validate_matrix() for each and
 * codegemm_c_cuda_pack_bytes(); WORKSPACE_TOO_SMALL; OUT_OF_MEMORY (needs as much again for a moment).
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_cuda_pack(const codegemm_c_matrix* matrices, int32_t count,
                                                      void* buffer, size_t buffer_bytes,
                                                      codegemm_c_cuda_weights* weights);

/**
 * Bytes that data of these weights must have, after a check of all the numbers: for what comes out of a file.
 * INCOMPATIBLE (layout_version), INVALID_ARGUMENT, UNSUPPORTED.
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_cuda_weights_bytes(const codegemm_c_cuda_weights* weights,
                                                               size_t* bytes);

/** What the calls need to know of one GPU. */
typedef struct codegemm_c_cuda_device codegemm_c_cuda_device;

/**
 * Asks the current device, which must have this number. Once, when the program starts. CUDA_ERROR,
 * UNSUPPORTED. codegemm_c_cuda_device_destroy() frees it.
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_cuda_query_device(int32_t number,
                                                              codegemm_c_cuda_device** device);
/** Frees it. */
CODEGEMM_C_API void codegemm_c_cuda_device_destroy(codegemm_c_cuda_device* device);

/** Types of numbers in device memory. */
enum codegemm_c_type { CODEGEMM_C_FP16 = 1, CODEGEMM_C_BF16 = 2, CODEGEMM_C_FP32 = 3 };

/** What is done to the sums. */
enum codegemm_c_activation {
  CODEGEMM_C_NO_ACTIVATION = 0,
  /** y = silu(gate) * up, of N / 2 columns: gate is the first half of the rows of W, up the second. N is a
   * multiple of 32. */
  CODEGEMM_C_SWIGLU = 1
};

/** Bits of codegemm_c_cuda_problem::flags. */
enum codegemm_c_cuda_flags {
  /** The kernel waits for the one before it in the stream before it reads anything. Without it only the
   * weights may be read early: set it where that kernel writes them. */
  CODEGEMM_C_CUDA_NO_OVERLAP = 1
};

/**
 * y[tokens][N] = x[tokens][K] W^T (+ bias) (+ residual), in device memory. Fill it with zeros first: fields
 * that are not set then mean none.
 */
typedef struct codegemm_c_cuda_problem {
  size_t struct_size;                     /**< sizeof(codegemm_c_cuda_problem) */
  const codegemm_c_cuda_weights* weights; /**< in host memory; what they name is on the device */
  int64_t tokens;                         /**< rows of x and of y */
  const void* x;                          /**< [tokens][K], x_type */
  int64_t x_stride;                       /**< elements from one token to the next, >= K */
  void* y;                                /**< [tokens][N], y_type; must not overlap x */
  int64_t y_stride;                       /**< elements, >= the columns of y */
  const void* bias;                       /**< [N], y_type, or NULL */
  const void* residual;                   /**< as y, is added, or NULL; may be y itself */
  int64_t residual_stride;                /**< elements, >= the columns of y */
  int32_t x_type;                         /**< enum codegemm_c_type: CODEGEMM_C_FP16 or _BF16 */
  int32_t y_type;                         /**< enum codegemm_c_type */
  int32_t activation;                     /**< enum codegemm_c_activation */
  uint32_t flags;                         /**< enum codegemm_c_cuda_flags, added */
} codegemm_c_cuda_problem;

/**
 * Whether codegemm_c_cuda_run() takes this problem on this device. Looks at no device memory.
 * INVALID_ARGUMENT, SHAPE_MISMATCH, MISALIGNED, INCOMPATIBLE, UNSUPPORTED (no kernel, a GPU before compute
 * capability 8.0).
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_cuda_validate(const codegemm_c_cuda_problem* problem,
                                                          const codegemm_c_cuda_device* device);

/**
 * Bytes of workspace in device memory, often 0. x, y and the weights' data may be NULL here, and then count
 * as aligned to 256 bytes. Fewer tokens may need more: size a workspace for each number of tokens that will
 * come, and take the most. As codegemm_c_cuda_validate().
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_cuda_workspace_bytes(const codegemm_c_cuda_problem* problem,
                                                                 const codegemm_c_cuda_device* device,
                                                                 size_t* bytes);

/**
 * Puts the product into the stream, a cudaStream_t (NULL: the default stream), and returns; may be captured
 * into a graph. The workspace is aligned to CODEGEMM_C_CUDA_ALIGNMENT and filled with zeros once, before its
 * first use; calls of all sizes may share it, two streams may not. It may be NULL where 0 bytes are needed.
 * The same bits on every run on the same card. As codegemm_c_cuda_validate(); WORKSPACE_TOO_SMALL,
 * MISALIGNED, CUDA_ERROR.
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_cuda_run(const codegemm_c_cuda_problem* problem,
                                                     const codegemm_c_cuda_device* device, void* workspace,
                                                     size_t workspace_bytes, void* stream);

/* ---- KV blocks ----------------------------------------------------------------------------------------- */

/**
 * Decides which block of an engine's KV pages holds which tokens, and shares blocks between sequences that
 * begin alike. The pages are the engine's: the allocator sees numbers of blocks only. One turn:
 *   codegemm_c_kv_open(tokens)         the longest cached prefix is shared, `matched` tokens of it
 *   codegemm_c_kv_reserve(base, n)     blocks for the n tokens that are missing, or EXHAUSTED: try later
 *   (the engine writes their K and V)
 *   codegemm_c_kv_commit(base, them)   now others can share them
 *   codegemm_c_kv_fork(base)           a decode module's view, at no cost in blocks
 *   codegemm_c_kv_append_private(1)    room for a token of its own, at position length - 1
 *   codegemm_c_kv_release()            of both; what was committed stays cached until room is needed
 */
typedef struct codegemm_c_kv codegemm_c_kv;

/** The blocks of one context. Keeps the allocator's insides alive: either may be given back first. */
typedef struct codegemm_c_kv_sequence codegemm_c_kv_sequence;

/**
 * Copies the first `tokens` slots of block `source` over those of `destination`, K and V in every layer: two
 * sequences that share a partly filled block go different ways. For pages on a device it may just put the
 * copy into the stream that the pages' other work runs in. Returns 0, or else the call that needed the copy
 * fails with IO_ERROR and this number as native error, and nothing has changed. Called while the allocator is
 * locked, by the thread that called: it must not call the allocator or its sequences, and must not unwind.
 */
typedef int32_t (*codegemm_c_kv_copy_block)(void* context, int32_t destination, int32_t source,
                                            int32_t tokens);

/** What codegemm_c_kv_create() needs: the pages' shape, and the function that copies a block. */
typedef struct codegemm_c_kv_options {
  size_t struct_size;                  /**< sizeof(codegemm_c_kv_options) */
  int64_t blocks;                      /**< 0 to 2^31 - 2 */
  int32_t layers;                      /**< of the model */
  int32_t kv_heads;                    /**< heads of K and of V, after grouping */
  int32_t head_dim;                    /**< numbers in a head */
  int32_t block_tokens;                /**< tokens in a block, 1 to 4096 */
  int32_t element_bytes;               /**< of one number in the pages, 1 to 8; for the bytes in statistics */
  int32_t reserved;                    /**< 0 */
  codegemm_c_kv_copy_block copy_block; /**< copies the first tokens of one block over another's */
  void* context;                       /**< for copy_block; may be NULL */
} codegemm_c_kv_options;

/** INVALID_ARGUMENT, with the number that cannot be; OUT_OF_MEMORY. codegemm_c_kv_destroy() gives it back. */
CODEGEMM_C_API codegemm_c_status codegemm_c_kv_create(const codegemm_c_kv_options* options,
                                                      codegemm_c_kv** kv);

/**
 * Sequences that are still there stay valid; copy_block and context are needed until the last of them is
 * released.
 */
CODEGEMM_C_API void codegemm_c_kv_destroy(codegemm_c_kv* kv);

/**
 * A base sequence over the longest prefix of tokens[count] that is cached, in full blocks: `matched` tokens
 * (may be NULL; it is also the sequence's length). Cached KV is shared only where all three texts are equal:
 * model_id names the prefill model and is not empty, model_version changes whenever its weights do,
 * tenant_salt keeps tenants apart ("": shared by everybody). tokens may be NULL where count is 0.
 * INVALID_ARGUMENT, OUT_OF_MEMORY. codegemm_c_kv_release() gives the sequence back.
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_kv_open(codegemm_c_kv* kv, const char* model_id,
                                                    const char* model_version, const char* tenant_salt,
                                                    const int32_t* tokens, int64_t count,
                                                    codegemm_c_kv_sequence** sequence, int64_t* matched);

/**
 * Makes sure that extra_tokens can follow the length: takes free blocks, evicts cached ones, and copies a
 * partly filled last block that is shared. All or nothing. For both kinds of sequence. EXHAUSTED when blocks
 * in use leave too few, INVALID_ARGUMENT, OUT_OF_MEMORY, IO_ERROR (copy_block).
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_kv_reserve(codegemm_c_kv_sequence* sequence,
                                                       int64_t extra_tokens);

/**
 * K and V of tokens[count] are now written at length and after: a base sequence grows by them, and blocks
 * that are full are shared from now on. A block may give way to its equal: read the ids anew.
 * INVALID_ARGUMENT on a fork, and for more than is reserved.
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_kv_commit(codegemm_c_kv_sequence* sequence, const int32_t* tokens,
                                                      int64_t count);

/**
 * A decode-private view of a sequence of either kind, as long as it is now; shares every block.
 * INVALID_ARGUMENT, OUT_OF_MEMORY; where the parent has tokens reserved in a partly filled block also
 * EXHAUSTED and IO_ERROR. codegemm_c_kv_release() gives it back; parent and fork in any order.
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_kv_fork(const codegemm_c_kv_sequence* parent,
                                                    codegemm_c_kv_sequence** fork);

/**
 * A fork grows by `tokens`, whose K and V the engine writes next, at positions length - tokens and after.
 * Never shared. As codegemm_c_kv_reserve(), and cannot fail within what is reserved; INVALID_ARGUMENT on a
 * base sequence.
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_kv_append_private(codegemm_c_kv_sequence* sequence,
                                                              int64_t tokens);

/**
 * Forgets the tokens from `length` on and gives their blocks back, and the reserved ones: after a rejected
 * speculation, or an edit of the context. Not below what a fork began with. INVALID_ARGUMENT.
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_kv_truncate(codegemm_c_kv_sequence* sequence, int64_t length);

/** Gives a sequence and its blocks back. */
CODEGEMM_C_API void codegemm_c_kv_release(codegemm_c_kv_sequence* sequence);

/** Tokens whose K and V are there; -1 for NULL. */
CODEGEMM_C_API int64_t codegemm_c_kv_length(const codegemm_c_kv_sequence* sequence);
/** Tokens that can follow with no further block; -1 for NULL. */
CODEGEMM_C_API int64_t codegemm_c_kv_reserved(const codegemm_c_kv_sequence* sequence);

/**
 * The blocks, those for reserved tokens too: position p lies in ids[p / block_tokens], slot p % block_tokens.
 * Writes `count`, the number of blocks, in any case, and up to capacity ids. WORKSPACE_TOO_SMALL if there are
 * more. ids may be NULL where capacity is 0.
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_kv_blocks(const codegemm_c_kv_sequence* sequence, int32_t* ids,
                                                      int64_t capacity, int64_t* count);

/**
 * FlashInfer's page table of `count` sequences of one allocator, in CSR form: the pages of sequence i are
 * indices[indptr[i]] to indices[indptr[i + 1] - 1], and the last of them holds last_page_len[i] tokens, 1 to
 * block_tokens (an empty sequence: no page, block_tokens). What is reserved does not count. Capacities are in
 * elements: indptr has count + 1, last_page_len count, indices `pages`, a number that is written whenever the
 * sequences are good. Arrays may be NULL where their capacity is 0: a call with none asks for `pages`.
 * WORKSPACE_TOO_SMALL; INCOMPATIBLE for sequences of two allocators; INVALID_ARGUMENT, UNSUPPORTED,
 * OUT_OF_MEMORY.
 */
CODEGEMM_C_API codegemm_c_status codegemm_c_kv_page_table(const codegemm_c_kv_sequence* const* sequences,
                                                          int64_t count, int32_t* indptr,
                                                          int64_t indptr_capacity, int32_t* indices,
                                                          int64_t indices_capacity, int32_t* last_page_len,
                                                          int64_t last_page_len_capacity, int64_t* pages);

/** total = free + cached + in_use, in_use = shared + private_blocks. */
typedef struct codegemm_c_kv_stats {
  size_t struct_size;      /**< sizeof(codegemm_c_kv_stats) */
  int64_t total_blocks;    /**< of the pool */
  int64_t free_blocks;     /**< hold nothing */
  int64_t cached_blocks;   /**< used by no sequence, may be evicted */
  int64_t in_use_blocks;   /**< used by one sequence or more */
  int64_t shared_blocks;   /**< of these, by two or more */
  int64_t private_blocks;  /**< of these, by one */
  int64_t sequences;       /**< open */
  int64_t bytes_per_block; /**< of the pages */
  /* Counted from the allocator's beginning. */
  int64_t hit_tokens;     /**< looked up and found */
  int64_t miss_tokens;    /**< looked up and not found */
  int64_t evicted_blocks; /**< cached blocks given up for room */
  int64_t merged_blocks;  /**< committed blocks that gave way to their equal */
  int64_t copied_blocks;  /**< by copy_block */
} codegemm_c_kv_stats;

/** Fills a struct whose struct_size is set. INVALID_ARGUMENT. */
CODEGEMM_C_API codegemm_c_status codegemm_c_kv_get_stats(const codegemm_c_kv* kv, codegemm_c_kv_stats* stats);

#if defined(__cplusplus)
}
#endif

#endif /* CODEGEMM_C_H_ */
