/* Matrix products by the team: each part is one single-threaded BLAS call.
 *
 * A BLAS divides a product in advance and waits for its slowest thread at every step: next to one other
 * busy process this took thirty times as long. Here threads take parts as they become free.
 */

/* Values from the CBLAS standard, whose enumerations are passed as int. */
enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

/* The size of a part: columns of out; minimum and maximum number of multiplications, between which a part
 * is an eighth of the product; and, for a vector, numbers of the matrix. A BLAS repacks its matrices for
 * each part, which only pays off in parts with many rows and columns. */
enum { PART_COLUMNS = 512, LEAST_STEPS = 1 << 21, MOST_STEPS = 1 << 27, PART_LINE = 1 << 16 };

typedef void Gemm(int, int, int, int64_t, int64_t, int64_t, float, const float *, int64_t,
                  const float *, int64_t, float, float *, int64_t);
typedef void Gemv(int, int, int64_t, int64_t, float, const float *, int64_t, const float *, int64_t,
                  float, float *, int64_t);

static Gemm *blas_gemm;
static Gemv *blas_gemv;

typedef struct {
    int trans_a, trans_b;
    int64_t m, n, k;
    float alpha, beta;
    const float *a, *b;
    float *c;
    int64_t lda, ldb, ldc;
    int64_t rows, columns, across; /* of a part; number of parts side by side */
} Multiplication;

static int64_t least(int64_t x, int64_t y)
{
    return x < y ? x : y;
}

static int64_t parts_in(int64_t all, int64_t each)
{
    return (all + each - 1) / each;
}

static void multiply_part(const void *what, Size from, Size to)
{
    const Multiplication *p = what;
    for (Size part = from; part < to; part++) {
        int64_t row = part / p->across * p->rows, column = part % p->across * p->columns;
        const float *a = p->a + (p->trans_a == NO_TRANS ? row * p->lda : row);
        const float *b = p->b + (p->trans_b == NO_TRANS ? column : column * p->ldb);
        blas_gemm(ROW_MAJOR, p->trans_a, p->trans_b, least(p->rows, p->m - row),
                  least(p->columns, p->n - column), p->k, p->alpha, a, p->lda, b, p->ldb, p->beta,
                  p->c + row * p->ldc + column, p->ldc);
    }
}

/* Like cblas_sgemm; the parts depend only on the sizes. */
static void team_gemm(int order, int trans_a, int trans_b, int64_t m, int64_t n, int64_t k,
                      float alpha, const float *a, int64_t lda, const float *b, int64_t ldb,
                      float beta, float *c, int64_t ldc)
{
    if (order != ROW_MAJOR || m * n * k < 2 * LEAST_STEPS) {
        blas_gemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
        return;
    }
    Multiplication p = {trans_a, trans_b, m, n, k, alpha, beta, a, b, c, lda, ldb, ldc, 0, 0, 0};
    p.columns = n > PART_COLUMNS * 3 / 2 ? PART_COLUMNS : n;
    int64_t steps = m * n * k / 8;
    steps = steps < LEAST_STEPS ? LEAST_STEPS : least(steps, MOST_STEPS);
    /* Multiples of 48 are whole tiles in any BLAS. */
    int64_t rows = parts_in(steps / (p.columns * k) + 1, 48) * 48;
    p.rows = m > rows * 3 / 2 ? rows : m;
    p.across = parts_in(n, p.columns);
    parallel_for(multiply_part, &p, parts_in(m, p.rows) * p.across, PART);
}

typedef struct {
    int trans;
    int64_t m, n; /* of the matrix as stored */
    float alpha, beta;
    const float *a, *x;
    float *y;
    int64_t lda, step_x, step_y, each;
} Line;

static void line_part(const void *what, Size from, Size to)
{
    const Line *p = what;
    for (Size part = from; part < to; part++) {
        int64_t first = part * p->each, all = p->trans == NO_TRANS ? p->m : p->n;
        int64_t count = least(p->each, all - first);
        bool rows = p->trans == NO_TRANS;
        blas_gemv(ROW_MAJOR, p->trans, rows ? count : p->m, rows ? p->n : count, p->alpha,
                  p->a + (rows ? first * p->lda : first), p->lda, p->x, p->step_x, p->beta,
                  p->y + first * p->step_y, p->step_y);
    }
}

/* Like cblas_sgemv. */
static void team_gemv(int order, int trans, int64_t m, int64_t n, float alpha, const float *a,
                      int64_t lda, const float *x, int64_t step_x, float beta, float *y,
                      int64_t step_y)
{
    if (order != ROW_MAJOR || m * n < 2 * PART_LINE || step_y < 0) {
        blas_gemv(order, trans, m, n, alpha, a, lda, x, step_x, beta, y, step_y);
        return;
    }
    int64_t all = trans == NO_TRANS ? m : n, other = trans == NO_TRANS ? n : m;
    Line p = {trans, m, n, alpha, beta, a, x, y, lda, step_x, step_y, 0};
    p.each = parts_in(PART_LINE / other + 1, 16) * 16;
    parallel_for(line_part, &p, parts_in(all, p.each), PART);
}
