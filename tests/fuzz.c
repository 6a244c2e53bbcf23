/* fuzz.c - random networks, weights and calls for the C core, to be run under sanitizers.
 *
 * Built with -DLIBFUZZER and -fsanitize=fuzzer, libFuzzer chooses the bytes that all choices are read from;
 * otherwise the program takes `fuzz FIRST LAST` as seeds of a generator of bytes. What holds for every input:
 *
 * - a block or a tree that is none is refused;
 * - a step that is refused leaves every bit as it was, and the three stages take the same one, bit by bit;
 * - a scale is positive and finite, or `left` says that it is none.
 */
#include "gsgd.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Groups, rows and columns up to 3, taps up to 2 in each direction; strides of up to 2. */
enum { MOST_UNITS = 12, MOST_BLOCKS = 6, MOST_EXTENT = 3, MOST_STRIDED = 2 * 3 * 3 * 3 * 2 * 2 * 2 };

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);                          \
            abort();                                                                                         \
        }                                                                                                    \
    } while (0)

typedef struct {
    const uint8_t *at, *end;
} bytes;

/* A number below n; 0 when no bytes are left. */
static int choose(bytes *b, int n) { return b->at < b->end ? *b->at++ % n : 0; }

/* Mostly ordinary weights; zeros, tiny, huge and not finite ones. */
static double number(bytes *b) {
    static const double odd[] = {0, 1e-310, 1e-38, 1e30, -1e300, INFINITY, NAN};
    int x = choose(b, 256);
    return x >= 249 ? odd[x - 249] : (x - 124.5) / 64;
}

typedef struct {
    ptrdiff_t units, blocks;
    gsgd_type types[MOST_BLOCKS];
    gsgd_block block[MOST_BLOCKS];
    ptrdiff_t strides[MOST_BLOCKS][GSGD_NDIM];
    int64_t unit[MOST_BLOCKS][2][MOST_EXTENT * MOST_EXTENT];
} network;

/* An array per block, its axes in a random order of strides. Units are any, a few of them none of the
 * network's: whether they are is returned. */
static int describe(bytes *b, network *n) {
    int valid = 1;
    n->units = choose(b, MOST_UNITS + 1);
    n->blocks = choose(b, MOST_BLOCKS + 1);
    for (int k = 0; k < n->blocks; ++k) {
        gsgd_block *block = &n->block[k];
        *block = (gsgd_block){.array = k, .row_unit = n->unit[k][0], .col_unit = n->unit[k][1]};
        n->types[k] = choose(b, 2) ? GSGD_FLOAT64 : GSGD_FLOAT32;
        ptrdiff_t stride = 1 + choose(b, 2);
        int first = choose(b, GSGD_NDIM);
        for (int d = 0; d < GSGD_NDIM; ++d) {
            int axis = (first + d) % GSGD_NDIM;
            block->dim[axis] = (gsgd_dim){1 + choose(b, axis < GSGD_TAP ? MOST_EXTENT : 2), 1, axis};
            n->strides[k][axis] = stride;
            stride *= block->dim[axis].extent;
        }
        for (int side = 0; side < 2; ++side)
            for (ptrdiff_t i = block->dim[GSGD_GROUP].extent * block->dim[GSGD_ROW + side].extent; i-- > 0;) {
                int x = choose(b, 64);
                n->unit[k][side][i] = x == 63 ? n->units : x % (int)(n->units + 1) - 1;
                valid &= n->unit[k][side][i] < n->units;
            }
    }
    return valid;
}

/* Buffers of the network's arrays. */
typedef struct {
    double memory[MOST_BLOCKS][MOST_STRIDED];
    gsgd_array array[MOST_BLOCKS];
} buffers;

static void point(buffers *to, const network *n) {
    for (int k = 0; k < n->blocks; ++k)
        to->array[k] = (gsgd_array){to->memory[k], n->strides[k]};
}

/* Fill with the bytes' numbers, over and over. */
static void fill(bytes *b, buffers *to, const network *n, double scale) {
    double numbers[64];
    for (int i = 0; i < 64; ++i)
        numbers[i] = scale * number(b);
    for (int k = 0; k < n->blocks; ++k)
        for (int i = 0; i < MOST_STRIDED; ++i)
            if (n->types[k] == GSGD_FLOAT32)
                ((float *)to->memory[k])[i] = (float)numbers[(i * 7 + k) % 64];
            else
                to->memory[k][i] = numbers[(i * 7 + k) % 64];
    point(to, n);
}

static gsgd_rates rates_of(bytes *b) {
    gsgd_rates rates = {.method = (gsgd_method)choose(b, 3), .lr = 0.05 * choose(b, 8)};
    rates.momentum = choose(b, 2) ? 0.9 : 0;
    rates.weight_decay = choose(b, 2) ? 0.01 : 0;
    rates.nesterov = rates.method == GSGD_SGD && rates.momentum > 0 && choose(b, 2);
    rates.decoupled = rates.method == GSGD_ADAM && choose(b, 2);
    rates.beta2 = 0.99;
    rates.eps = choose(b, 2) ? 1e-8 : 0;
    rates.correct_m = rates.correct_v = 1.5;
    return rates;
}

static void take_steps(bytes *b, gsgd_plan *plan, const network *n, buffers *w) {
    static buffers g, m, v, before[3], staged[3];
    static double gathered[GSGD_GATHERED * (MOST_UNITS + 1)], solved[GSGD_SOLVED * (MOST_UNITS + 1)];
    gsgd_rates rates[MOST_BLOCKS];
    for (int step = 0; step < 3; ++step) {
        rates[0] = rates_of(b); /* arrays differ in rates alone */
        for (int k = 1; k < n->blocks; ++k) {
            rates[k] = rates[0];
            rates[k].lr *= k;
        }
        gsgd_options options = {.rates = rates, .max_ratio = choose(b, 2) ? 4 : INFINITY};
        options.clip_norm = choose(b, 3) ? INFINITY : 0.5;
        options.threads = 1 + choose(b, 2);
        fill(b, &g, n, 0.1);
        if (step == 0) {
            memset(m.memory, 0, sizeof m.memory);
            memset(v.memory, 0, sizeof v.memory);
        }
        point(&m, n);
        point(&v, n);
        for (int k = 0; k < n->blocks; ++k)
            if (choose(b, 8) == 7)
                g.array[k].data = NULL;
        const gsgd_array *first = rates[0].momentum > 0 || rates[0].method == GSGD_ADAM ? m.array : NULL;
        const gsgd_array *second = rates[0].method != GSGD_SGD ? v.array : NULL;
        ptrdiff_t clamped, clamped_in_stages;
        int64_t unit, unit_in_stages;
        before[0] = *w, before[1] = m, before[2] = v;
        gsgd_gather(plan, w->array, g.array, g.array, first, second, &options, NULL, gathered);
        gsgd_status status =
            gsgd_solve(plan, gathered, &options, solved, &clamped_in_stages, &unit_in_stages);
        if (status == GSGD_OK)
            gsgd_apply(plan, w->array, g.array, first, second, &options, solved);
        staged[0] = *w, staged[1] = m, staged[2] = v;
        *w = before[0], m = before[1], v = before[2];
        CHECK(gsgd_step(plan, w->array, g.array, g.array, first, second, &options, &clamped, &unit) ==
              status);
        CHECK(status == GSGD_OK ? clamped == clamped_in_stages : unit == unit_in_stages);
        const buffers *expected = status == GSGD_OK ? staged : before;
        CHECK(!memcmp(w->memory, expected[0].memory, sizeof w->memory));
        CHECK(!memcmp(m.memory, expected[1].memory, sizeof m.memory));
        CHECK(!memcmp(v.memory, expected[2].memory, sizeof v.memory));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    bytes b = {data, data + size};
    static network n;
    static buffers w;
    gsgd_plan *plan;
    int valid = describe(&b, &n);
    gsgd_status status = gsgd_create(&plan, n.units, n.blocks, n.types, n.blocks, n.block);
    CHECK((status == GSGD_OK) == valid);
    if (!valid)
        return 0;
    gsgd_edge in[MOST_UNITS + 1], out[MOST_UNITS + 1];
    uint8_t free_in[MOST_UNITS + 1];
    double c[MOST_UNITS + 1], left, ones[MOST_UNITS + 1];
    for (int u = 0; u <= MOST_UNITS; ++u)
        ones[u] = 1;
    int64_t unit;
    fill(&b, &w, &n, 1);
    gsgd_choose_trees(plan, w.array, (gsgd_rule)choose(&b, 2), choose(&b, 2) ? ones : NULL, in, out);
    if (choose(&b, 4) == 3) /* edges that were not chosen */
        for (int u = 0; u < n.units; ++u) {
            in[u] = (gsgd_edge){choose(&b, MOST_BLOCKS + 2) - 1, choose(&b, MOST_EXTENT + 1)};
            out[u] = (gsgd_edge){choose(&b, MOST_BLOCKS + 2) - 1, choose(&b, MOST_EXTENT + 1)};
        }
    status = gsgd_set_trees(plan, in, out, free_in, &unit);
    CHECK(status == GSGD_OK || (status == GSGD_BAD_TREE && unit >= 0 && unit < n.units));
    if (status == GSGD_OK) {
        if (gsgd_balance(plan, w.array, c, &left) == GSGD_OK && left == 0) {
            for (int u = 0; u < n.units; ++u)
                CHECK(c[u] > 0 && isfinite(c[u]));
            gsgd_set_reference(plan, ones, ones, c);
        } else {
            gsgd_set_reference(plan, ones, ones, ones);
        }
        take_steps(&b, plan, &n, &w);
    }
    gsgd_destroy(plan);
    return 0;
}

#ifndef LIBFUZZER
int main(int count, char **arguments) {
    long first = count == 3 ? atol(arguments[1]) : 0, last = count == 3 ? atol(arguments[2]) : 0;
    static uint8_t data[1024];
    for (long seed = first; seed < last; ++seed) {
        uint64_t state = (uint64_t)seed;
        for (size_t i = 0; i < sizeof data; ++i) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            data[i] = (uint8_t)(state >> 56);
        }
        LLVMFuzzerTestOneInput(data, sizeof data);
    }
    printf("fuzz: inputs %ld to %ld passed\n", first, last);
    return 0;
}
#endif
