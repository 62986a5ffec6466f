/* Drawing tokens from logits. */

enum { PARTS = 512, TOGETHER = 256 }; /* of a vocabulary; minimum tokens of a part */

INLINE float highest_of(const float *x, Size n)
{
    float most[LANES], highest = -INFINITY;
    for (int lane = 0; lane < LANES; lane++) {
        most[lane] = -INFINITY;
    }
    Size whole = n - n % LANES;
    for (Size i = 0; i < whole; i += LANES) {
        for (int lane = 0; lane < LANES; lane++) {
            most[lane] = larger(x[i + lane], most[lane]);
        }
    }
    for (int lane = 0; lane < LANES; lane++) {
        highest = larger(most[lane], highest);
    }
    for (Size i = whole; i < n; i++) {
        highest = larger(x[i], highest);
    }
    return highest;
}

/* A logit minus the highest, over the temperature, bounded at -1e4: the exponential is 0 as for -inf,
 * but 0 * -inf would be NaN in the entropy. NaN stays NaN. */
INLINE float below(float logit, float highest, float temperature)
{
    float found = (logit - highest) / temperature;
    return found < -1e4f ? -1e4f : found;
}

/* The sum of the weights of some tokens, and the sum of weights times shifted logits. */
INLINE void weigh_some(const float *logits, Size n, float highest, float temperature,
                       float *restrict sum, float *restrict spread)
{
    float sums[LANES] = {0}, spreads[LANES] = {0};
    Size whole = n - n % LANES;
    for (Size i = 0; i < whole; i += LANES) {
        for (int lane = 0; lane < LANES; lane++) {
            float x = below(logits[i + lane], highest, temperature), weight = exponential(x);
            sums[lane] += weight;
            spreads[lane] += weight * x;
        }
    }
    *sum = 0;
    *spread = 0;
    for (int lane = 0; lane < LANES; lane++) {
        *sum += sums[lane];
        *spread += spreads[lane];
    }
    for (Size i = whole; i < n; i++) {
        float x = below(logits[i], highest, temperature), weight = exponential(x);
        *sum += weight;
        *spread += weight * x;
    }
}

/* The first token from `from` on at which the cumulative weight, `sum` before that, exceeds the mark. It
 * is never a token of weight 0. */
INLINE Size token_above(const float *logits, Size from, Size n, float highest, float temperature,
                        double sum, double mark)
{
    Size last = from;
    for (Size i = from; i < n; i++) {
        float weight = exponential(below(logits[i], highest, temperature));
        sum += weight;
        if (weight > 0) {
            last = i;
            if (sum > mark) {
                return i;
            }
        }
    }
    return last;
}

/* The token that a row's uniform number selects; finds the part of the vocabulary by its sum first. */
INLINE Size drawn(const float *logits, Size all, Size each, const float *sums, double mark,
                  float highest, float temperature)
{
    double before = 0;
    Size part = 0;
    for (Size i = 0; i * each < all; i++) {
        if (sums[i] > 0) {
            part = i; /* the last non-empty one, in case rounding misses the mark */
            if (before + sums[i] > mark) {
                break;
            }
            before += sums[i];
        }
    }
    return token_above(logits, part * each, all, highest, temperature, before, mark);
}

INLINE Size likeliest(const float *logits, Size all, float highest)
{
    Size token = 0;
    while (token + 1 < all && logits[token] != highest) {
        token++;
    }
    return token;
}

STEP void draw(const void *what, Size from, Size to)
{
    const Draw *p = what;
    const Size all = p->vocabulary, each = all <= PARTS * TOGETHER ? TOGETHER : all / PARTS + 1;
    for (Size row = from; row < to; row++) {
        const float *logits = p->logits + row * all;
        float highest = highest_of(logits, all), sums[PARTS], spread;
        double total = 0, spreads = 0;
        for (Size i = 0; i < all; i += each) {
            Size n = all - i < each ? all - i : each;
            weigh_some(logits + i, n, highest, p->temperature, &sums[i / each], &spread);
            total += sums[i / each];
            spreads += spread;
        }
        Size token = p->uniforms == NULL
                         ? likeliest(logits, all, highest)
                         : drawn(logits, all, each, sums, p->uniforms[row] * total, highest,
                                 p->temperature);
        p->tokens[row] = token;
        p->logprobs[row] = (float)(below(logits[token], highest, p->temperature) - log(total));
        p->entropies[row] = (float)(log(total) - spreads / total);
    }
}
