/* One build of the steps, for vectors of BYTES. */
#include "steps.h"

#include <math.h>
#include <stdlib.h>

/* Instructions are named function by function: one set of flags builds all files, and no function of
 * this build is ever called on a processor without them. */
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

typedef float lanes __attribute__((vector_size(BYTES), aligned(4)));

/* Numbers in a vector; rows of a tile of one and of two vectors of columns, by the registers there
 * are; queries that attention takes at once. */
enum {
    LANES = BYTES / 4,
    ROWS1 = BYTES == 32 ? 12 : 8,
    ROWS2 = BYTES == 64 ? 8 : 6,
    QUERIES = ROWS2,
    ALONG = BYTES == 64 ? 4 : 3, /* rows of weights that are multiplied with FEWEST columns at once */
};

#include "arithmetic.h"
#include "columns.h"
#include "attention.h"
#include "sampling.h"

#define TABLE                                                                                     \
    {BYTES,  product, product_along, norm,         norm_back, swiglu, swiglu_back,                \
     attend, attend_back,            attend_token, draw}
