/* The C kernels, called steps: the arguments of each, and the table of one build of all of them.
 *
 * They are compiled three times, for vectors of 16, 32 and 64 bytes (steps16.c etc.). The build to run is
 * chosen at run time, by timing: see `engines/cpu/kernel_choice.py`. Arrays are float32 and contiguous;
 * hidden states are columns, (.., d, n) for n tokens.
 */
#ifndef LOCALRL_STEPS_H
#define LOCALRL_STEPS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef ptrdiff_t Size;

/* Processes items `from` up to, but not including, `to` of some work. */
typedef void Work(const void *what, Size from, Size to);

enum {
    BLOCK = 24,   /* rows of weights in an item of a product: whole tiles in every build */
    FEWEST = 4,   /* columns up to which a product runs along the rows */
    COLUMNS = 64, /* of a norm, processed at once */
};

/* out (m, n) = weight (m, k) columns (k, n), plus up (m, ranks) low if there is an adapter, for few
 * columns. Up to FEWEST columns are given as rows, (n, k) and (n, ranks): vectors then run along the rows
 * of the weight. */
typedef struct {
    const float *weight, *columns;
    const float *up, *low; /* low (ranks, n), with the columns' step */
    float *out;
    Size m, k, n, ranks;
    Size columns_step; /* between rows of columns: whole vectors */
    Size row_step, column_step; /* of out */
    bool add;              /* to the contents of out */
} Product;

typedef struct {
    const float *x, *weight; /* (g, d, n) and (d,) */
    float *out;              /* output; in the backward pass grad w.r.t. output, then w.r.t. x */
    Size d, n, blocks;       /* of 64 columns */
    float eps;
} Norm;

typedef struct {
    const float *gate, *x;
    float *out, *grad_gate; /* out: in the backward pass grad w.r.t. output, then w.r.t. x */
} Swiglu;

/* Attention over many positions. */
typedef struct {
    const float *queries;       /* (R, h, r, L, d) */
    const float *keys, *values; /* (R, h, P + L, d) */
    const float *mask_bias;        /* (R, P): additive mask of ancestors */
    const float *rowsum, *grad; /* backward pass: (R, h, r, L), and grad w.r.t. the output */
    float *out;                 /* output, or grad w.r.t. the queries */
    float *grad_keys, *grad_values; /* gradients, set to 0 before */
    Size heads, queried, length, past, d, room;
    float scale;
    atomic_bool *failed;
} Attention;

/* Attention of one token of every row, over a prompt that rows may share and the row's own tail, to which
 * the token's keys and values are appended. */
typedef struct {
    const float *queries;                 /* columns (h * r * d, B) */
    const float *new_keys, *new_values;   /* columns (h * d, B) */
    float *keys, *values;                 /* (B, h, room, d): the tails */
    const int64_t *lengths;               /* (B,): positions of each tail before the token */
    const int64_t *prompts;       /* (B, 4): addresses of a prompt's keys and values, its length,
                                     stride between its heads; or NULL */
    float *out;                   /* columns (h * r * d, B) */
    Size rows, heads, each, room, d, longest;
    float scale;
    atomic_bool *failed;
} DecodeAttention;

/* Draws one token for every row. */
typedef struct {
    const float *logits, *uniforms; /* (B, V) and (B,); NULL takes the most likely token */
    int64_t *tokens;                /* (B,), like the next two */
    float *logprobs, *entropies;
    Size vocabulary;
    float temperature;
} Draw;

/* Items are: blocks of a product's rows, blocks of 64 columns in each of a norm's g matrices, numbers of
 * a gate, the key heads of each row, rows of logits. */
typedef struct {
    int bytes; /* of a vector */
    Work *product, *product_along, *norm, *norm_back, *swiglu, *swiglu_back;
    Work *attend, *attend_back, *attend_token, *draw;
} Steps;

extern const Steps steps16, steps32, steps64;

#endif
