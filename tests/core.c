/* core.c - the C core without Python: to be run plain, under sanitizers and under valgrind. */
#include "gsgd.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);                          \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

static uint64_t state = 1;

static double uniform(double low, double high) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return low + (high - low) * (double)(state >> 11) / 9007199254740992.0;
}

/* A chain of dense layers with biases, all in float64 or all in float32: layer k has a weight (rows, cols)
 * and a bias. */
enum { MAX_LAYERS = 4 };

typedef struct {
    int layers;
    ptrdiff_t width[MAX_LAYERS + 1], units;
    gsgd_type type;
    int64_t *ids[MAX_LAYERS + 1]; /* unit ids of a level; the first and the last are pinned */
    int64_t constant;
    gsgd_block block[2 * MAX_LAYERS];
    gsgd_type types[2 * MAX_LAYERS];
    gsgd_plan *plan;
    gsgd_edge *in, *out;
    uint8_t *free_in;
} chain;

static size_t size_of(gsgd_type type) { return type == GSGD_FLOAT32 ? sizeof(float) : sizeof(double); }

static void build(chain *c, int layers, const ptrdiff_t *width, gsgd_type type) {
    *c = (chain){.layers = layers, .type = type, .constant = GSGD_PINNED};
    for (int k = 0; k <= layers; ++k) {
        c->width[k] = width[k];
        c->ids[k] = malloc((size_t)width[k] * sizeof(int64_t));
        for (ptrdiff_t i = 0; i < width[k]; ++i)
            c->ids[k][i] = k == 0 || k == layers ? GSGD_PINNED : c->units++;
    }
    for (int k = 0; k < layers; ++k) {
        gsgd_block weight = {.array = 2 * k, .row_unit = c->ids[k + 1], .col_unit = c->ids[k]};
        gsgd_block bias = {.array = 2 * k + 1, .row_unit = c->ids[k + 1], .col_unit = &c->constant};
        for (int d = 0; d < GSGD_NDIM; ++d)
            weight.dim[d] = bias.dim[d] = (gsgd_dim){1, 0, 0};
        weight.dim[GSGD_ROW] = bias.dim[GSGD_ROW] = (gsgd_dim){width[k + 1], 1, 0};
        weight.dim[GSGD_COL] = (gsgd_dim){width[k], 1, 1};
        c->block[2 * k] = weight;
        c->block[2 * k + 1] = bias;
        c->types[2 * k] = c->types[2 * k + 1] = type;
    }
    CHECK(gsgd_create(&c->plan, c->units, 2 * layers, c->types, 2 * layers, c->block) == GSGD_OK &&
          c->plan != NULL);
    size_t units = (size_t)c->units + 1;
    c->in = calloc(units, sizeof *c->in);
    c->out = calloc(units, sizeof *c->out);
    c->free_in = calloc(units, 1);
}

static void release(chain *c) {
    for (int k = 0; k <= c->layers; ++k)
        free(c->ids[k]);
    free(c->in);
    free(c->out);
    free(c->free_in);
    gsgd_destroy(c->plan);
}

/* Buffers for all weights of a chain; the weights' rows lie `pad` entries apart, or columns do when
 * transposed. */
typedef struct {
    gsgd_array array[2 * MAX_LAYERS];
    ptrdiff_t strides[2 * MAX_LAYERS][2];
    size_t bytes[2 * MAX_LAYERS];
} buffers;

static buffers *allocate(const chain *c, ptrdiff_t pad, int transposed) {
    buffers *b = calloc(1, sizeof *b);
    for (int i = 0; i < 2 * c->layers; ++i) {
        ptrdiff_t rows = c->width[i / 2 + 1], cols = i % 2 ? 1 : c->width[i / 2];
        b->strides[i][0] = i % 2 ? 1 + pad : transposed ? 1 : cols + pad;
        b->strides[i][1] = transposed ? rows + pad : 1;
        b->bytes[i] = (size_t)((rows + pad) * (cols + pad)) * size_of(c->type);
        b->array[i] = (gsgd_array){calloc(b->bytes[i] + 1, 1), b->strides[i]};
    }
    return b;
}

static void drop(const chain *c, buffers *b) {
    for (int i = 0; i < 2 * c->layers; ++i)
        free(b->array[i].data);
    free(b);
}

static double get(const chain *c, const buffers *b, int i, ptrdiff_t r, ptrdiff_t col) {
    ptrdiff_t at = r * b->strides[i][0] + col * b->strides[i][1];
    return c->type == GSGD_FLOAT32 ? (double)((float *)b->array[i].data)[at]
                                   : ((double *)b->array[i].data)[at];
}

static void set(const chain *c, buffers *b, int i, ptrdiff_t r, ptrdiff_t col, double x) {
    ptrdiff_t at = r * b->strides[i][0] + col * b->strides[i][1];
    if (c->type == GSGD_FLOAT32)
        ((float *)b->array[i].data)[at] = (float)x;
    else
        ((double *)b->array[i].data)[at] = x;
}

static void fill(const chain *c, buffers *b, double scale) {
    for (int i = 0; i < 2 * c->layers; ++i)
        for (ptrdiff_t r = 0; r < c->width[i / 2 + 1]; ++r)
            for (ptrdiff_t k = 0; k < (i % 2 ? 1 : c->width[i / 2]); ++k)
                set(c, b, i, r, k, scale * (uniform(0.2, 1) * (uniform(0, 1) < 0.5 ? -1 : 1)));
}

static void copy(const chain *c, buffers *to, const buffers *from) {
    for (int i = 0; i < 2 * c->layers; ++i)
        for (ptrdiff_t r = 0; r < c->width[i / 2 + 1]; ++r)
            for (ptrdiff_t k = 0; k < (i % 2 ? 1 : c->width[i / 2]); ++k)
                set(c, to, i, r, k, get(c, from, i, r, k));
}

static int equal(const chain *c, const buffers *a, const buffers *b) {
    for (int i = 0; i < 2 * c->layers; ++i)
        for (ptrdiff_t r = 0; r < c->width[i / 2 + 1]; ++r)
            for (ptrdiff_t k = 0; k < (i % 2 ? 1 : c->width[i / 2]); ++k) {
                double x = get(c, a, i, r, k), y = get(c, b, i, r, k);
                if (memcmp(&x, &y, sizeof x))
                    return 0;
            }
    return 1;
}

static void skeleton(chain *c, const buffers *w, gsgd_rule rule) {
    int64_t unit;
    gsgd_choose_trees(c->plan, w->array, rule, NULL, c->in, c->out);
    CHECK(gsgd_set_trees(c->plan, c->in, c->out, c->free_in, &unit) == GSGD_OK);
    double *ones = malloc(((size_t)c->units + 1) * sizeof *ones);
    for (ptrdiff_t u = 0; u < c->units; ++u)
        ones[u] = 1;
    gsgd_set_reference(c->plan, ones, ones, ones);
    free(ones);
}

/* Where an edge lies, and its weight. */
static double at_edge(const chain *c, const buffers *b, gsgd_edge e, ptrdiff_t *r, ptrdiff_t *k) {
    ptrdiff_t cols = e.block % 2 ? 1 : c->width[e.block / 2];
    *r = e.entry / cols;
    *k = e.entry % cols;
    return get(c, b, (int)e.block, *r, *k);
}

static int64_t source(const chain *c, gsgd_edge e, ptrdiff_t k) {
    return e.block % 2 ? -1 : c->ids[e.block / 2][k];
}

/* One step of METHOD.md, sections 2 and 3, by recursion, from the definitions, with the scale of ones. */
typedef struct {
    const chain *c;
    const buffers *w, *g;
    double lr;
} oracle;

static double product_in(const oracle *o, int64_t v) {
    ptrdiff_t r, k;
    if (v < 0)
        return 1;
    double w = at_edge(o->c, o->w, o->c->in[v], &r, &k);
    return w * product_in(o, source(o->c, o->c->in[v], k));
}

static double product_out(const oracle *o, int64_t v) {
    ptrdiff_t r, k;
    if (v < 0)
        return 1;
    double w = at_edge(o->c, o->w, o->c->out[v], &r, &k);
    return w * product_out(o, o->c->ids[o->c->out[v].block / 2 + 1][r]);
}

static int is_edge(gsgd_edge e, int block, ptrdiff_t entry) { return e.block == block && e.entry == entry; }

static double sum_out(const oracle *o, int64_t v) {
    const chain *c = o->c;
    double sum = 0;
    for (int i = 0; i < 2 * c->layers; i += 2)
        for (ptrdiff_t r = 0; r < c->width[i / 2 + 1]; ++r)
            for (ptrdiff_t k = 0; k < c->width[i / 2]; ++k) {
                if (c->ids[i / 2][k] != v)
                    continue;
                int64_t child = c->ids[i / 2 + 1][r];
                ptrdiff_t entry = r * c->width[i / 2] + k;
                if (!is_edge(c->out[v], i, entry))
                    sum += get(c, o->w, i, r, k) * get(c, o->g, i, r, k);
                else if (child >= 0 && is_edge(c->in[child], i, entry))
                    sum += sum_out(o, child);
            }
    return sum;
}

static double ratio(const oracle *o, int64_t v) {
    ptrdiff_t r, k;
    if (v < 0)
        return 1;
    double w = at_edge(o->c, o->w, o->c->in[v], &r, &k), g = at_edge(o->c, o->g, o->c->in[v], &r, &k);
    if (o->c->free_in[v])
        return ratio(o, source(o->c, o->c->in[v], k));
    double x = product_in(o, v) * product_out(o, v), q = w * g - sum_out(o, v);
    return 1 - o->lr * q / (x * x);
}

static double expected(const oracle *o, int i, ptrdiff_t r, ptrdiff_t k) {
    const chain *c = o->c;
    ptrdiff_t entry = i % 2 ? r : r * c->width[i / 2] + k;
    int64_t u = i % 2 ? -1 : c->ids[i / 2][k], v = c->ids[i / 2 + 1][r];
    double w = get(c, o->w, i, r, k), g = get(c, o->g, i, r, k);
    if (u >= 0 && is_edge(c->out[u], i, entry))
        return w;
    if (v >= 0 && is_edge(c->in[v], i, entry))
        return w * ratio(o, v) / ratio(o, u);
    double x = product_in(o, u) * product_out(o, v);
    return (w - o->lr * g / (x * x)) / ratio(o, u);
}

static const gsgd_rates plain = {.lr = 0.01};

/* How a step is to be taken. */
typedef struct {
    gsgd_rates rates; /* of all arrays */
    double clip_norm;
    int threads, stages; /* stages: by three calls instead of one */
} manner;

static manner simply(gsgd_rates rates) { return (manner){rates, INFINITY, 1, 0}; }

static gsgd_status try_step(chain *c, buffers *w, buffers *g, buffers *m, buffers *v, manner how,
                            int64_t *unit) {
    gsgd_rates all[2 * MAX_LAYERS];
    for (int i = 0; i < 2 * c->layers; ++i)
        all[i] = how.rates;
    gsgd_options options = {
        .rates = all, .max_ratio = INFINITY, .clip_norm = how.clip_norm, .threads = how.threads};
    const gsgd_array *first = m ? m->array : NULL, *second = v ? v->array : NULL;
    ptrdiff_t limited;
    if (!how.stages)
        return gsgd_step(c->plan, w->array, g->array, g->array, first, second, &options, &limited, unit);
    size_t row = (size_t)c->units + 1;
    double *gathered = malloc((GSGD_GATHERED + GSGD_SOLVED) * row * sizeof *gathered);
    double *solved = gathered + GSGD_GATHERED * row;
    gsgd_gather(c->plan, w->array, g->array, g->array, first, second, &options, NULL, gathered);
    gsgd_status status = gsgd_solve(c->plan, gathered, &options, solved, &limited, unit);
    if (status == GSGD_OK)
        gsgd_apply(c->plan, w->array, g->array, first, second, &options, solved);
    free(gathered);
    return status;
}

static void step(chain *c, buffers *w, buffers *g, buffers *m, buffers *v, manner how) {
    int64_t unit;
    CHECK(try_step(c, w, g, m, v, how, &unit) == GSGD_OK);
}

static void test_definitions(gsgd_rule rule) {
    static const ptrdiff_t widths[][5] = {{3, 6, 2, 6, 3}, {3, 4, 2, 4, 2}, {4, 4, 4, 4, 4}, {1, 1, 7, 1, 1}};
    for (size_t n = 0; n < sizeof widths / sizeof *widths; ++n) {
        chain c;
        build(&c, 4, widths[n], GSGD_FLOAT64);
        buffers *w = allocate(&c, 0, 0), *g = allocate(&c, 0, 0), *old = allocate(&c, 0, 0);
        fill(&c, w, 1);
        fill(&c, g, 0.1);
        skeleton(&c, w, rule);
        copy(&c, old, w);
        step(&c, w, g, NULL, NULL, simply(plain));
        oracle o = {&c, old, g, plain.lr};
        for (int i = 0; i < 8; ++i)
            for (ptrdiff_t r = 0; r < c.width[i / 2 + 1]; ++r)
                for (ptrdiff_t k = 0; k < (i % 2 ? 1 : c.width[i / 2]); ++k) {
                    double right = expected(&o, i, r, k);
                    CHECK(fabs(get(&c, w, i, r, k) - right) <= 1e-11 * (1 + fabs(right)));
                }
        drop(&c, w);
        drop(&c, g);
        drop(&c, old);
        release(&c);
    }
}

/* A checksum over the bits of all steps: programs built in other ways print the same. */
static uint64_t checksum = 1469598103934665603u;

static void add_to_checksum(const chain *c, const buffers *w) {
    for (int i = 0; i < 2 * c->layers; ++i)
        for (size_t k = 0; k < w->bytes[i]; ++k)
            checksum = (checksum ^ ((const unsigned char *)w->array[i].data)[k]) * 1099511628211u;
}

/* The same bits for any number of threads and any strides, in one call and in three. */
static void test_bits(gsgd_type type, gsgd_rates rates, double clip_norm) {
    static const ptrdiff_t widths[] = {70, 700, 333, 300, 3};
    chain c;
    build(&c, 4, widths, type);
    buffers *start = allocate(&c, 0, 0), *gradient = allocate(&c, 0, 0), *first = NULL;
    fill(&c, start, 0.1);
    fill(&c, gradient, 1e-6);
    skeleton(&c, start, GSGD_MODULO);
    static const int threads[] = {1, 2, 4};
    for (int layout = 0; layout < 4; ++layout)
        for (int t = 0; t < 3; ++t) {
            buffers *w = allocate(&c, layout == 1 ? 3 : 0, layout >= 2), *m = NULL, *v = NULL;
            buffers *g = allocate(&c, layout == 1 ? 1 : 0, layout == 3);
            copy(&c, w, start);
            copy(&c, g, gradient);
            if (rates.momentum > 0)
                m = allocate(&c, 0, layout == 2);
            if (rates.method != GSGD_SGD)
                v = allocate(&c, layout == 1 ? 2 : 0, layout >= 2);
            for (int n = 0; n < 3; ++n) {
                skeleton(&c, start, GSGD_MODULO); /* a plan forgets how many threads have paid */
                step(&c, w, g, m, v, (manner){rates, clip_norm, threads[t], t == n});
            }
            CHECK(first == NULL || equal(&c, first, w));
            drop(&c, g);
            if (m != NULL)
                drop(&c, m);
            if (v != NULL)
                drop(&c, v);
            if (first == NULL)
                first = w;
            else
                drop(&c, w);
        }
    CHECK(!equal(&c, first, start));
    add_to_checksum(&c, first);
    drop(&c, first);
    drop(&c, start);
    drop(&c, gradient);
    release(&c);
}

/* One shard that holds everything takes the same step; what fits no network is refused. */
static void test_shard(void) {
    static const ptrdiff_t widths[] = {3, 5, 2, 3};
    chain c;
    build(&c, 3, widths, GSGD_FLOAT32);
    buffers *w = allocate(&c, 0, 0), *g = allocate(&c, 0, 0), *right = allocate(&c, 0, 0);
    fill(&c, w, 1);
    fill(&c, g, 0.1);
    copy(&c, right, w);
    skeleton(&c, w, GSGD_MODULO);
    manner clipping = {plain, 0.01, 1, 0};
    step(&c, right, g, NULL, NULL, clipping);

    int64_t from[7], to[7], array[7], unit;
    uint8_t counts[6] = {1, 1, 1, 1, 1, 1};
    for (ptrdiff_t u = 0; u < c.units; ++u) {
        ptrdiff_t r, k;
        at_edge(&c, w, c.in[u], &r, &k);
        from[u] = source(&c, c.in[u], k);
        array[u] = c.in[u].block;
        at_edge(&c, w, c.out[u], &r, &k);
        to[u] = c.ids[c.out[u].block / 2 + 1][r];
    }
    int64_t from3 = from[3];
    from[3] = 5;
    CHECK(gsgd_set_shard(c.plan, c.in, c.out, from, to, array, c.free_in, counts, &unit) == GSGD_BAD_TREE);
    CHECK(unit == 3);
    from[3] = 7;
    CHECK(gsgd_set_shard(c.plan, c.in, c.out, from, to, array, c.free_in, counts, &unit) == GSGD_BAD_TREE);
    from[3] = from3;
    array[2] = 6;
    CHECK(gsgd_set_shard(c.plan, c.in, c.out, from, to, array, c.free_in, counts, &unit) == GSGD_BAD_TREE);
    CHECK(unit == 2);
    array[2] = c.in[2].block;
    CHECK(gsgd_set_shard(c.plan, c.in, c.out, from, to, array, c.free_in, counts, &unit) == GSGD_OK);
    clipping.stages = 1;
    step(&c, w, g, NULL, NULL, clipping);
    CHECK(equal(&c, w, right));
    drop(&c, w);
    drop(&c, g);
    drop(&c, right);
    release(&c);
}

static void test_errors(void) {
    static const ptrdiff_t widths[] = {2, 3, 3, 2};
    chain c;
    build(&c, 3, widths, GSGD_FLOAT64);
    buffers *w = allocate(&c, 0, 0), *g = allocate(&c, 0, 0), *old = allocate(&c, 0, 0);
    fill(&c, w, 1);
    fill(&c, g, 1);
    skeleton(&c, w, GSGD_MODULO);
    copy(&c, old, w);
    int64_t unit;
    for (int i = 0; i < 6; ++i) { /* a gradient that is not finite, wherever it is */
        double before = get(&c, g, i, 1, 0);
        set(&c, g, i, 1, 0, i % 2 ? NAN : INFINITY);
        CHECK(try_step(&c, w, g, NULL, NULL, simply(plain), &unit) == GSGD_NOT_FINITE);
        CHECK(unit == -1 && equal(&c, w, old));
        set(&c, g, i, 1, 0, before);
    }
    ptrdiff_t r, k;
    at_edge(&c, w, c.in[0], &r, &k);
    set(&c, w, (int)c.in[0].block, r, k, 0); /* a skeleton weight that has become zero */
    CHECK(try_step(&c, w, g, NULL, NULL, simply(plain), &unit) == GSGD_NOT_FINITE);
    CHECK(unit >= 0);
    copy(&c, w, old);

    gsgd_edge good = c.in[4];
    c.in[4] = c.in[3]; /* an edge into another unit */
    CHECK(gsgd_set_trees(c.plan, c.in, c.out, c.free_in, &unit) == GSGD_BAD_TREE && unit == 4);
    c.in[4] = (gsgd_edge){99, 0};
    CHECK(gsgd_set_trees(c.plan, c.in, c.out, c.free_in, &unit) == GSGD_BAD_TREE && unit == 4);
    c.in[4] = good;
    CHECK(gsgd_set_trees(c.plan, c.in, c.out, c.free_in, &unit) == GSGD_OK);
    step(&c, w, g, NULL, NULL, simply(plain));
    CHECK(!equal(&c, w, old));

    c.block[2].array = 17;
    gsgd_plan *plan;
    CHECK(gsgd_create(&plan, c.units, 6, c.types, 6, c.block) == GSGD_BAD_BLOCK && plan == NULL);
    c.block[2].array = 2;
    CHECK(gsgd_create(&plan, 2, 6, c.types, 6, c.block) == GSGD_BAD_BLOCK && plan == NULL);
    gsgd_destroy(NULL);
    drop(&c, w);
    drop(&c, g);
    drop(&c, old);
    release(&c);
}

/* Edges of a tree that go round in a circle: two units that feed each other. */
static void test_cycle(void) {
    int64_t a[] = {0}, b[] = {1}, end[] = {GSGD_PINNED}, unit;
    gsgd_block block[4] = {{.row_unit = a, .col_unit = end},
                           {.row_unit = b, .col_unit = a},
                           {.row_unit = a, .col_unit = b},
                           {.row_unit = end, .col_unit = a}};
    gsgd_type types[4] = {GSGD_FLOAT64, GSGD_FLOAT64, GSGD_FLOAT64, GSGD_FLOAT64};
    for (int k = 0; k < 4; ++k) {
        block[k].array = k;
        for (int d = 0; d < GSGD_NDIM; ++d)
            block[k].dim[d] = (gsgd_dim){1, 0, 0};
    }
    gsgd_plan *plan;
    uint8_t free_in[2];
    CHECK(gsgd_create(&plan, 2, 4, types, 4, block) == GSGD_OK);
    gsgd_edge in[2] = {{2, 0}, {1, 0}}, out[2] = {{3, 0}, {2, 0}};
    CHECK(gsgd_set_trees(plan, in, out, free_in, &unit) == GSGD_BAD_TREE);
    in[0].block = 0;
    CHECK(gsgd_set_trees(plan, in, out, free_in, &unit) == GSGD_OK);

    double weight[4] = {0, 1, 1, 1}; /* nothing reaches the units: both are pinned */
    gsgd_array arrays[4];
    static const ptrdiff_t stride[1] = {1};
    for (int k = 0; k < 4; ++k)
        arrays[k] = (gsgd_array){&weight[k], stride};
    gsgd_choose_trees(plan, arrays, GSGD_LARGEST, NULL, in, out);
    CHECK((in[0].block < 0) == (out[0].block < 0));
    gsgd_destroy(plan);
}

/* Each method by itself undoes the other: path values move by the ratios that weight allocation is given. */
static void test_methods(void) {
    static const ptrdiff_t widths[] = {3, 5, 2, 3};
    chain c;
    build(&c, 3, widths, GSGD_FLOAT64);
    buffers *w = allocate(&c, 0, 0), *v = allocate(&c, 0, 0), *ratios = allocate(&c, 0, 0);
    buffers *moved = allocate(&c, 0, 0), *values = allocate(&c, 0, 0), *logs = allocate(&c, 0, 0);
    fill(&c, w, 1);
    skeleton(&c, w, GSGD_LARGEST);
    gsgd_path_values(c.plan, w->array, v->array, NULL);
    gsgd_path_values(c.plan, w->array, values->array, logs->array);
    for (int i = 0; i < 6; ++i)
        for (ptrdiff_t r = 0; r < c.width[i / 2 + 1]; ++r)
            for (ptrdiff_t k = 0; k < (i % 2 ? 1 : c.width[i / 2]); ++k) {
                double value = get(&c, v, i, r, k), sign = get(&c, values, i, r, k);
                CHECK(isnan(value) ? isnan(sign) : fabs(sign * exp(get(&c, logs, i, r, k)) - value) < 1e-12);
                set(&c, ratios, i, r, k, uniform(0.5, 2));
            }
    gsgd_allocate(c.plan, w->array, ratios->array, moved->array);
    gsgd_path_values(c.plan, moved->array, values->array, NULL);
    for (int i = 0; i < 6; ++i)
        for (ptrdiff_t r = 0; r < c.width[i / 2 + 1]; ++r)
            for (ptrdiff_t k = 0; k < (i % 2 ? 1 : c.width[i / 2]); ++k) {
                double before = get(&c, v, i, r, k);
                if (isnan(before))
                    CHECK(get(&c, w, i, r, k) == get(&c, moved, i, r, k));
                else
                    CHECK(fabs(get(&c, values, i, r, k) / before - get(&c, ratios, i, r, k)) < 1e-12);
            }
    buffers *all[] = {w, v, ratios, moved, values, logs};
    for (int i = 0; i < 6; ++i)
        drop(&c, all[i]);
    release(&c);
}

/* At the balanced scale the sums of squares in and out of every unit agree. */
static void test_balance(gsgd_type type) {
    static const ptrdiff_t widths[] = {3, 70, 2, 9, 3};
    chain c;
    build(&c, 4, widths, type);
    buffers *w = allocate(&c, 0, 0), *other = allocate(&c, 2, 1);
    fill(&c, w, 1);
    copy(&c, other, w);
    skeleton(&c, w, GSGD_MODULO);
    size_t units = (size_t)c.units;
    double *scale = calloc(2 * units, sizeof *scale), *in = calloc(2 * units, sizeof *in), left;
    CHECK(gsgd_balance(c.plan, w->array, scale, &left) == GSGD_OK && left == 0);
    CHECK(gsgd_balance(c.plan, other->array, scale + units, &left) == GSGD_OK && left == 0);
    CHECK(memcmp(scale, scale + units, units * sizeof *scale) == 0);
    for (int i = 0; i < 8; ++i)
        for (ptrdiff_t r = 0; r < c.width[i / 2 + 1]; ++r)
            for (ptrdiff_t k = 0; k < (i % 2 ? 1 : c.width[i / 2]); ++k) {
                int64_t u = i % 2 ? -1 : c.ids[i / 2][k], v = c.ids[i / 2 + 1][r];
                double x = get(&c, w, i, r, k) * (v < 0 ? 1 : scale[v]) / (u < 0 ? 1 : scale[u]);
                if (v >= 0)
                    in[v] += x * x;
                if (u >= 0)
                    in[units + (size_t)u] += x * x;
            }
    for (size_t u = 0; u < units; ++u)
        CHECK(fabs(in[u] / in[units + u] - 1) < 1e-11);
    free(scale);
    free(in);
    drop(&c, w);
    drop(&c, other);
    release(&c);
}

int main(void) {
    gsgd_rates momentum = plain, nesterov = plain, decay = plain, rmsprop = plain;
    gsgd_rates adam = {.method = GSGD_ADAM,
                       .lr = 1e-5,
                       .momentum = 0.9,
                       .weight_decay = 1e-3,
                       .beta2 = 0.99,
                       .eps = 1e-8,
                       .correct_m = 1,
                       .correct_v = 1,
                       .decoupled = 1};
    rmsprop.method = GSGD_RMSPROP;
    rmsprop.lr = rmsprop.eps = 1e-5;
    rmsprop.beta2 = 0.9;
    momentum.momentum = nesterov.momentum = 0.9;
    nesterov.nesterov = 1;
    nesterov.weight_decay = decay.weight_decay = 1e-3;
    test_definitions(GSGD_MODULO);
    test_definitions(GSGD_LARGEST);
    const gsgd_rates all[] = {plain, momentum, nesterov, decay, adam, rmsprop};
    for (int type = 0; type < 2; ++type) {
        for (int i = 0; i < 6; ++i)
            test_bits((gsgd_type)type, all[i], INFINITY);
        test_bits((gsgd_type)type, nesterov, 1e-4);
    }
    test_shard();
    test_balance(GSGD_FLOAT32);
    test_balance(GSGD_FLOAT64);
    test_errors();
    test_cycle();
    test_methods();
    printf("core: all passed, checksum of all steps %016llx\n", (unsigned long long)checksum);
    return 0;
}
