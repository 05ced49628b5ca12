/* The small steps between a decoder layer's products, one call each. Float32, rows contiguous.
   N = rows, H and K = query and key/value heads, G = H / K, D = head size, S = cached tokens. */
#include <math.h>
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

/* Adds to each row of out [N, d_out], rows `stride` apart, x A^T B with the ranks of its own adapter: `counts[n]` rows of
   A [S, d_in] and B [S, d_out] from `firsts[n]` on (arXiv:2106.09685) */
void add_updates(const float *x, const float *a, const float *b, const int64_t *firsts, const int64_t *counts, float *out,
                 int64_t num_rows, int64_t d_in, int64_t d_out, int64_t stride) {
#pragma omp parallel for schedule(static) if (num_rows > 1)
    for (int64_t n = 0; n < num_rows; n++)
        for (int64_t r = firsts[n]; r < firsts[n] + counts[n]; r++) {
            const float *row = x + n * d_in, *from = a + r * d_in, *to = b + r * d_out;
            float *sum = out + n * stride, hidden = 0;
            for (int64_t i = 0; i < d_in; i++) hidden += row[i] * from[i];
            for (int64_t i = 0; i < d_out; i++) sum[i] += hidden * to[i];
        }
}
