/* The steps in C: what each takes, and the table of one build of all of them.
 *
 * They are compiled three times, for vectors of 16, 32 and 64 bytes (steps16.c and its kin). Which
 * build runs is chosen while the program runs, by timing: see `policy/array_choice.py`. Arrays are
 * float32 and contiguous; states are columns, (.., d, n) for n tokens.
 */
#ifndef LOCALRL_STEPS_H
#define LOCALRL_STEPS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef ptrdiff_t Size;

/* Items from `from` to before `to` of some work. */
typedef void Work(const void *what, Size from, Size to);

enum {
    BLOCK = 24,   /* rows of weights in an item of a product: whole tiles in every build */
    FEWEST = 4,   /* columns up to which a product runs along the rows */
    COLUMNS = 64, /* of a norm that are worked on at once */
};

/* out (m, n) = weight (m, k) columns (k, n), and where there is an adapter + up (m, ranks) low, for few
 * columns. Up to FEWEST of them are given as rows, (n, k) and (n, ranks): vectors run along the rows of the
 * weight then. */
typedef struct {
    const float *weight, *columns;
    const float *up, *low; /* low (ranks, n), with the columns' step */
    float *out;
    Size m, k, n, ranks;
    Size columns_step; /* from one row of columns to the next: whole vectors of them */
    Size row_step, column_step; /* of out */
    bool add;              /* to what is in out */
} Product;

typedef struct {
    const float *x, *weight; /* (g, d, n) and (d,) */
    float *out;              /* what is made of x; on the way back the slope by that, then by x */
    Size d, n, blocks;       /* of 64 columns */
    float eps;
} Norm;

typedef struct {
    const float *gate, *x;
    float *out, *by_gate; /* the first is on the way back the slope by what was made, then by x */
} Swiglu;

/* Attention over many positions. */
typedef struct {
    const float *queries;       /* (R, h, r, L, d) */
    const float *keys, *values; /* (R, h, P + L, d) */
    const float *hidden;        /* (R, P): what is added to scores of ancestors */
    const float *within, *slope; /* on the way back: (R, h, r, L), and by what was found */
    float *out;                 /* what is found, or the slope by the queries */
    float *by_keys, *by_values; /* set to 0 before */
    Size heads, queried, length, past, d, room;
    float scale;
    atomic_bool *failed;
} Attention;

/* Attention of one token of every row, over a prompt that rows may share and a tail of their own, which
 * its keys and values are written behind. */
typedef struct {
    const float *queries;                 /* columns (h * r * d, B) */
    const float *new_keys, *new_values;   /* columns (h * d, B) */
    float *keys, *values;                 /* (B, h, room, d): the tails */
    const int64_t *lengths;               /* (B,): positions of each tail before */
    const int64_t *prompts;       /* (B, 4): addresses of a prompt's keys and values, its positions,
                                     numbers from one of its heads to the next; or NULL */
    float *out;                   /* columns (h * r * d, B) */
    Size rows, heads, each, room, d, longest;
    float scale;
    atomic_bool *failed;
} DecodeAttention;

/* One token of every row. */
typedef struct {
    const float *logits, *uniforms; /* (B, V) and (B,); NULL takes the likeliest token */
    int64_t *tokens;                /* (B,), as the next two */
    float *logprobs, *entropies;
    Size vocabulary;
    float temperature;
} Draw;

/* Items are: blocks of a product's rows, blocks of 64 columns of each of a norm's g, numbers of a
 * gate, rows' heads of keys, rows of logits. */
typedef struct {
    int bytes; /* of a vector */
    Work *product, *product_along, *norm, *norm_back, *swiglu, *swiglu_back;
    Work *attend, *attend_back, *attend_token, *draw;
} Steps;

extern const Steps steps16, steps32, steps64;

#endif
