/* The small steps between a decoder layer's products, one call each. Float32, rows contiguous.
   N = rows, H and K = query and key/value heads, G = H / K, D = head size, S = cached tokens. */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define MANY_ROWS 64 /* below, a second thread costs more than it does */

/* out = x / rms(x) * weight (arXiv:1910.07467) */
void rms_norm(const float *x, const float *weight, float *out, int64_t num_rows, int64_t width, float epsilon) {
#pragma omp parallel for schedule(static) if (num_rows >= MANY_ROWS)
    for (int64_t n = 0; n < num_rows; n++) {
        const float *row = x + n * width;
        float squares = 0;
        for (int64_t i = 0; i < width; i++) squares += row[i] * row[i];
        const float scale = 1 / sqrtf(squares / width + epsilon);
        for (int64_t i = 0; i < width; i++) out[n * width + i] = row[i] * scale * weight[i];
    }
}

/* Turns the first `turned` of each row's heads in place: (a, b) becomes (a cos + b sin, b cos + a sin), the first half
   of the sines being negative. heads [N, all, D], cosines and sines [N, D] */
void turn(float *heads, const float *cosines, const float *sines, int64_t num_rows, int64_t all, int64_t turned,
          int64_t size) {
    const int64_t half = size / 2;
#pragma omp parallel for schedule(static) if (num_rows >= MANY_ROWS)
    for (int64_t n = 0; n < num_rows; n++) {
        const float *cosine = cosines + n * size, *sine = sines + n * size;
        for (int64_t h = 0; h < turned; h++) {
            float *a = heads + (n * all + h) * size, *b = a + half;
            for (int64_t i = 0; i < half; i++) {
                const float first = a[i], second = b[i];
                a[i] = first * cosine[i] + second * sine[i];
                b[i] = second * cosine[half + i] + first * sine[half + i];
            }
        }
    }
}

/* out = silu(gate) * up, for gate_up [N, 2 width] */
void silu_and_mul(const float *gate_up, float *out, int64_t num_rows, int64_t width) {
#pragma omp parallel for schedule(static) if (num_rows >= MANY_ROWS)
    for (int64_t n = 0; n < num_rows; n++) {
        const float *gate = gate_up + n * 2 * width, *up = gate + width;
        for (int64_t i = 0; i < width; i++) out[n * width + i] = gate[i] / (1 + expf(-gate[i])) * up[i];
    }
}

/* Attention of N rows, each over its own cached tokens: `places` [N, S] says where in the cache [.., K, D] they lie,
   `lengths` [N] how many there are. query [N, H, D] with `stride` between rows, scores [N, H, S], out [N, H, D] */
void attend(const float *query, const float *keys, const float *values, const int64_t *places, const int64_t *lengths,
            float *scores, float *out, int64_t num_rows, int64_t longest, int64_t num_kv, int64_t group, int64_t size,
            int64_t stride, float scaling) {
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t n = 0; n < num_rows; n++)
        for (int64_t k = 0; k < num_kv; k++) {
            const int64_t length = lengths[n], first = (n * num_kv + k) * group;
            const int64_t *place = places + n * longest;
            const float *q = query + n * stride + k * group * size;
            float *score = scores + first * longest, *o = out + first * size;
            for (int64_t s = 0; s < length; s++) {
                const float *key = keys + (place[s] * num_kv + k) * size;
                for (int64_t g = 0; g < group; g++) {
                    float sum = 0;
                    for (int64_t d = 0; d < size; d++) sum += q[g * size + d] * key[d];
                    score[g * longest + s] = sum * scaling;
                }
            }
            for (int64_t g = 0; g < group; g++) {
                float *row = score + g * longest, top = row[0], total = 0;
                for (int64_t s = 1; s < length; s++) top = fmaxf(top, row[s]);
                for (int64_t s = 0; s < length; s++) total += row[s] = expf(row[s] - top);
                for (int64_t s = 0; s < length; s++) row[s] /= total;
            }
            memset(o, 0, group * size * sizeof(float));
            for (int64_t s = 0; s < length; s++) {
                const float *value = values + (place[s] * num_kv + k) * size;
                for (int64_t g = 0; g < group; g++)
                    for (int64_t d = 0; d < size; d++) o[g * size + d] += score[g * longest + s] * value[d];
            }
        }
}

/* Rows of one adapter that are taken together, so that what is read of it serves all of them; and ranks, likewise. */
#define ROWS 4
#define RANKS 8

/* Adds scale x A^T B to `num` rows of out, for `ranks` rows of A [.., d_in] and B [.., d_out]; inlined for each num. */
static inline __attribute__((always_inline)) void add_update(const int num, const float *x, const float *a, const float *b,
                                                             float scale, float *out, int64_t ranks, int64_t d_in,
                                                             int64_t d_out, int64_t stride) {
    for (int64_t first = 0; first < ranks; first += RANKS) {
        const int64_t here = ranks - first < RANKS ? ranks - first : RANKS;
        float hidden[ROWS][RANKS] = {0};
        for (int64_t r = 0; r < here; r++) {
            const float *from = a + (first + r) * d_in;
            float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
            for (int64_t i = 0; i < d_in; i++) {
                s0 += x[i] * from[i];
                if (num > 1) s1 += x[d_in + i] * from[i];
                if (num > 2) s2 += x[2 * d_in + i] * from[i];
                if (num > 3) s3 += x[3 * d_in + i] * from[i];
            }
            hidden[0][r] = scale * s0, hidden[1][r] = scale * s1, hidden[2][r] = scale * s2, hidden[3][r] = scale * s3;
        }
        const float *to[RANKS];
        for (int64_t r = 0; r < RANKS; r++) to[r] = b + (first + (r < here ? r : 0)) * d_out;
#pragma omp simd
        for (int64_t i = 0; i < d_out; i++)
#pragma GCC unroll 4
            for (int n = 0; n < num; n++) {
                float sum = out[n * stride + i];
#pragma GCC unroll 8
                for (int r = 0; r < RANKS; r++) sum += hidden[n][r] * to[r][i];
                out[n * stride + i] = sum;
            }
    }
}

/* Adds to each row of out [N, ..], rows `stride` apart, scale x A^T B of its own adapter (arXiv:2106.09685), for each of
   the `num_parts` linear layers whose results lie side by side in it: that of part p, `widths[p]` wide, at `places[p]`.
   a[p] [K, R, d_in] and b[p] [K, R, widths[p]] hold K adapters; row n goes through the first `ranks[n]` ranks, if any, of
   number `slots[n]`. */
void add_updates(const float *x, const float *const *a, const float *const *b, const int64_t *places,
                 const int64_t *widths, const int64_t *slots, const int64_t *ranks, const float *scales, float *out,
                 int64_t num_parts, int64_t num_rows, int64_t max_r, int64_t d_in, int64_t stride) {
#pragma omp parallel if (num_rows > 1)
    {
        const int64_t share = (num_rows + omp_get_num_threads() - 1) / omp_get_num_threads();
        int64_t n = share * omp_get_thread_num(), end = n + share < num_rows ? n + share : num_rows;
        while (n < end) {
            int64_t num = 1;
            while (num < ROWS && n + num < end && slots[n + num] == slots[n]) num++;
            if (num == 3) num = 2;
            for (int64_t p = 0; ranks[n] && p < num_parts; p++) {
                const float *row = x + n * d_in, scale = scales[n];
                const float *from = a[p] + slots[n] * max_r * d_in, *to = b[p] + slots[n] * max_r * widths[p];
                float *result = out + n * stride + places[p];
                if (num == 4) add_update(4, row, from, to, scale, result, ranks[n], d_in, widths[p], stride);
                else if (num == 2) add_update(2, row, from, to, scale, result, ranks[n], d_in, widths[p], stride);
                else add_update(1, row, from, to, scale, result, ranks[n], d_in, widths[p], stride);
            }
            n += num;
        }
    }
}
