/* One build of the kernels, for vectors of BYTES. */
#include "steps.h"

#include <math.h>
#include <stdlib.h>

/* The instruction set is given per function: all files are compiled with the same flags, and no function
 * of this build is ever called on a processor without it. */
#if BYTES > 16 && defined(__x86_64__) && defined(__GNUC__)
#if BYTES == 64
#define FOR "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#else
#define FOR "avx2,fma"
#endif
#if defined(__clang__) || BYTES < 64
#define TARGET __attribute__((target(FOR)))
#else
#define TARGET __attribute__((target(FOR ",prefer-vector-width=512")))
#endif
#else
#define TARGET
#endif

#define STEP TARGET static
#define INLINE TARGET static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(BYTES), aligned(4)));

/* Floats in a vector; rows of a tile with one and with two vectors of columns, limited by the number of
 * registers; queries that attention processes at once. */
enum {
    LANES = BYTES / 4,
    ROWS1 = BYTES == 32 ? 12 : 8,
    ROWS2 = BYTES == 64 ? 8 : 6,
    QUERIES = ROWS2,
    ALONG = BYTES == 64 ? 4 : 3, /* rows of weights multiplied by FEWEST columns at once */
};

#include "arithmetic.h"
#include "columns.h"
#include "attention.h"
#include "sampling.h"

#define TABLE                                                                                     \
    {BYTES,  product, product_along, norm,         norm_back, swiglu, swiglu_back,                \
     attend, attend_back,            attend_token, draw}
