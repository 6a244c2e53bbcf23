/* balance.c - the scale of least sum of squares (METHOD.md, section 4).
 *
 * With t = log c it is the minimum of the convex sum of w^2 exp(2 t(v) - 2 t(u)) over the edges u -> v.
 * Sweeps over the layers set each unit to its own minimum; what they leave varies slowly with depth, so that
 * after each sweep Newton's method shifts every layer as a whole. Memory is of the order of units and of
 * pairs of layers: squares are formed anew from the weights, a tile at a time, in an order that does not
 * depend on strides. */
#include "plan.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TILE = 64, MOST_SWEEPS = 200, MOST_NEWTON_STEPS = 50 };

/* Lists of numbers, one after the other: list i is item[start[i]] to item[start[i + 1] - 1]. */
typedef struct {
    ptrdiff_t *start, *item;
} lists;

/* What flows from layer `source` to layer `to`: the sum of w^2 exp(2 t(v) - 2 t(u)) over its edges. */
typedef struct {
    ptrdiff_t to, source;
    double energy;
} flow;

/* Layers are numbered in the order of the first blocks that write them; the last is that of pinned ends.
 * Arrays over units begin at [-1]. */
typedef struct {
    gsgd_plan *plan;
    ptrdiff_t layers, flows;
    ptrdiff_t *layer;       /* per unit */
    lists members;          /* units of a layer */
    lists into, from;       /* layers of the rows and of the columns of a block */
    lists writers, readers; /* blocks that write and that read a layer */
    double *t, *up, *down;  /* per unit: log c, exp(2 t), exp(-2 t) */
    double *total_in, *total_out;
    double *ends, *sums;             /* per row or column of a block */
    flow *flow;                      /* blocks in order, and in a block by source, then by destination */
    double *shift, *step, *diagonal; /* per layer */
    ptrdiff_t *first,
        *row; /* matrix over layers: row i holds columns first[i] to i, from matrix[row[i]] on */
    double *matrix;
} balance;

/* Sums of w^2 end over rows (`by` is GSGD_ROW) or over columns of a block, taps included: one per entry of
 * the other dimension and group. */
static void sum_squares(const block *b, int by, const double *ends, double *sums) {
    int across = by == GSGD_ROW ? GSGD_COL : GSGD_ROW;
    ptrdiff_t n = b->dim[by].extent, m = b->dim[across].extent;
    memset(sums, 0, (size_t)(b->groups * m) * sizeof *sums);
    if (b->w.data == NULL || b->taps == 0)
        return;
    for (ptrdiff_t group = 0; group < b->groups; ++group)
        for (ptrdiff_t j = 0; j < m; j += TILE)
            for (ptrdiff_t i = 0; i < n; i += TILE) {
                ptrdiff_t high = n - i < TILE ? n - i : TILE, wide = m - j < TILE ? m - j : TILE;
                ptrdiff_t index[GSGD_NDIM] = {group};
                double tile[TILE][TILE], sum[TILE] = {0};
                for (ptrdiff_t r = 0; r < high; ++r)
                    memset(tile[r], 0, (size_t)wide * sizeof **tile);
                index[by] = i;
                index[across] = j;
                for (ptrdiff_t tap = 0; tap < b->taps; ++tap) {
                    for (ptrdiff_t d = GSGD_NDIM, rest = tap; d-- > GSGD_TAP; rest /= b->dim[d].extent)
                        index[d] = rest % b->dim[d].extent;
                    ptrdiff_t start = offset_of(&b->w, index), next = b->w.stride[by],
                              step = b->w.stride[across];
                    for (ptrdiff_t r = 0; r < high; ++r)
                        for (ptrdiff_t k = 0; k < wide; ++k) {
                            double w = load_at(b->type, &b->w, start + r * next + k * step);
                            tile[r][k] += w * w;
                        }
                }
                for (ptrdiff_t r = 0; r < high; ++r)
                    for (ptrdiff_t k = 0; k < wide; ++k)
                        sum[k] += tile[r][k] * ends[group * n + i + r];
                for (ptrdiff_t k = 0; k < wide; ++k)
                    sums[group * m + j + k] += sum[k];
            }
}

/* Move a unit. */
static void set_log(balance *s, int64_t u, double t) {
    s->t[u] = t;
    s->up[u] = exp(2 * t);
    s->down[u] = exp(-2 * t);
}

/* Sums of w^2 over the in-edges and over the out-edges of a layer's units: they give each unit's own minimum.
 */
static void sum_layer(balance *s, ptrdiff_t layer) {
    for (ptrdiff_t n = s->members.start[layer]; n < s->members.start[layer + 1]; ++n)
        s->total_in[s->members.item[n]] = s->total_out[s->members.item[n]] = 0;
    for (ptrdiff_t n = s->writers.start[layer]; n < s->writers.start[layer + 1]; ++n) {
        const block *b = &s->plan->block[s->writers.item[n]];
        for (ptrdiff_t i = 0; i < b->groups * b->cols; ++i)
            s->ends[i] = s->down[b->col_unit[i]];
        sum_squares(b, GSGD_COL, s->ends, s->sums);
        for (ptrdiff_t i = 0; i < b->groups * b->rows; ++i)
            s->total_in[b->row_unit[i]] += s->sums[i];
    }
    for (ptrdiff_t n = s->readers.start[layer]; n < s->readers.start[layer + 1]; ++n) {
        const block *b = &s->plan->block[s->readers.item[n]];
        for (ptrdiff_t i = 0; i < b->groups * b->rows; ++i)
            s->ends[i] = s->up[b->row_unit[i]];
        sum_squares(b, GSGD_ROW, s->ends, s->sums);
        for (ptrdiff_t i = 0; i < b->groups * b->cols; ++i)
            s->total_out[b->col_unit[i]] += s->sums[i];
    }
}

/* Whether some block leads from a layer to itself. */
static int feeds_itself(const balance *s, ptrdiff_t layer) {
    ptrdiff_t i = s->writers.start[layer], j = s->readers.start[layer];
    while (i < s->writers.start[layer + 1] && j < s->readers.start[layer + 1]) {
        if (s->writers.item[i] == s->readers.item[j])
            return 1;
        if (s->writers.item[i] < s->readers.item[j])
            ++i;
        else
            ++j;
    }
    return 0;
}

/* One sweep over the layers; the largest move of log c, NaN if one is. */
static double sweep(balance *s) {
    double largest = 0;
    for (ptrdiff_t layer = 0; layer + 1 < s->layers; ++layer) {
        sum_layer(s, layer);
        /* units of a layer that feed each other move together: half a step is safe, more is not */
        double part = feeds_itself(s, layer) ? 0.5 : 1;
        for (ptrdiff_t n = s->members.start[layer]; n < s->members.start[layer + 1]; ++n) {
            int64_t u = s->members.item[n];
            double move = log(s->total_out[u] / s->total_in[u]) / 4 - s->t[u];
            set_log(s, u, s->t[u] + part * move);
            if (!(fabs(move) <= largest) && !isnan(largest))
                largest = fabs(move);
        }
    }
    return largest;
}

static void measure_flows(balance *s) {
    flow *f = s->flow;
    for (ptrdiff_t k = 0; k < s->plan->blocks; ++k) {
        const block *b = &s->plan->block[k];
        for (ptrdiff_t n = s->from.start[k]; n < s->from.start[k + 1]; ++n) {
            ptrdiff_t source = s->from.item[n];
            if (s->into.start[k + 1] == s->into.start[k] + 1 && s->into.item[s->into.start[k]] == source) {
                *f++ = (flow){source, source, 0}; /* no shift changes it, as of a block between pinned ends */
                continue;
            }
            for (ptrdiff_t i = 0; i < b->groups * b->cols; ++i)
                s->ends[i] = s->layer[b->col_unit[i]] == source ? s->down[b->col_unit[i]] : 0;
            sum_squares(b, GSGD_COL, s->ends, s->sums);
            memset(s->step, 0, (size_t)s->layers * sizeof *s->step);
            for (ptrdiff_t i = 0; i < b->groups * b->rows; ++i)
                s->step[s->layer[b->row_unit[i]]] += s->sums[i] * s->up[b->row_unit[i]];
            for (ptrdiff_t m = s->into.start[k]; m < s->into.start[k + 1]; ++m)
                *f++ =
                    (flow){s->into.item[m], source, s->into.item[m] == source ? 0 : s->step[s->into.item[m]]};
        }
    }
}

static double flow_after(const flow *f, const double *shift) {
    return f->energy * exp(2 * (shift[f->to] - shift[f->source]));
}

/* The sum of all flows after the shift and `part` of the step. */
static double energy_after(const balance *s, double part) {
    double sum = 0;
    for (const flow *f = s->flow; f < s->flow + s->flows; ++f)
        sum += f->energy * exp(2 * (s->shift[f->to] + part * s->step[f->to] - s->shift[f->source] -
                                    part * s->step[f->source]));
    return sum;
}

/* Factorize the matrix as L D L', in place, and solve for s->step, which holds the right side. Whether it is
 * positive definite. */
static int solve_layers(balance *s) {
    ptrdiff_t n = s->layers - 1;
    for (ptrdiff_t i = 0; i < n; ++i) {
        double *row = s->matrix + s->row[i] - s->first[i], pivot = row[i];
        for (ptrdiff_t j = s->first[i]; j < i; ++j) {
            const double *other = s->matrix + s->row[j] - s->first[j];
            for (ptrdiff_t k = s->first[i] > s->first[j] ? s->first[i] : s->first[j]; k < j; ++k)
                row[j] -= row[k] * other[k];
        }
        for (ptrdiff_t j = s->first[i]; j < i; ++j) {
            double scaled = row[j] / s->diagonal[j];
            pivot -= row[j] * scaled;
            row[j] = scaled;
            s->step[i] -= scaled * s->step[j];
        }
        if (!(pivot > 0))
            return 0;
        s->diagonal[i] = pivot;
    }
    for (ptrdiff_t i = 0; i < n; ++i)
        s->step[i] /= s->diagonal[i];
    for (ptrdiff_t i = n; i-- > 0;)
        for (ptrdiff_t j = s->first[i]; j < i; ++j)
            s->step[j] -= s->matrix[s->row[i] - s->first[i] + j] * s->step[i];
    return 1;
}

/* The shift per layer, 0 for pinned ends, after which the sum of flows is least: Newton's method. */
static void shift_layers(balance *s) {
    ptrdiff_t last = s->layers - 1;
    measure_flows(s);
    memset(s->shift, 0, (size_t)s->layers * sizeof *s->shift);
    for (int n = 0; n < MOST_NEWTON_STEPS; ++n) {
        double before = 0, largest = 0, part = 1;
        memset(s->step, 0, (size_t)s->layers * sizeof *s->step);
        memset(s->matrix, 0, (size_t)s->row[last] * sizeof *s->matrix);
        for (const flow *f = s->flow; f < s->flow + s->flows; ++f) {
            double e = flow_after(f, s->shift);
            ptrdiff_t i = f->to > f->source ? f->to : f->source, j = f->to > f->source ? f->source : f->to;
            before += e;
            if (i == j)
                continue;
            s->step[f->source] += 2 * e;
            s->step[f->to] -= 2 * e;
            s->matrix[s->row[j] + j - s->first[j]] += 4 * e;
            if (i == last)
                continue;
            s->matrix[s->row[i] + i - s->first[i]] += 4 * e;
            s->matrix[s->row[i] + j - s->first[i]] -= 4 * e;
        }
        s->step[last] = 0;
        if (!solve_layers(s))
            return;
        for (ptrdiff_t i = 0; i < last; ++i)
            largest = fmax(largest, fabs(s->step[i]));
        while (part * largest > 1e-12 && energy_after(s, part) > before * (1 + 1e-15))
            part /= 2;
        for (ptrdiff_t i = 0; i < last; ++i)
            s->shift[i] += part * s->step[i];
        if (part * largest < 1e-12)
            return;
    }
}

static double find_scale(balance *s) {
    double left = 0;
    for (int n = 0; n < MOST_SWEEPS; ++n) {
        double most = 1;
        left = sweep(s);
        for (int64_t u = 0; u < s->plan->units; ++u)
            most = fmax(most, fabs(s->t[u]));
        if (isfinite(left) && left <= 1e-13 * most)
            return 0;
        shift_layers(s);
        for (int64_t u = 0; u < s->plan->units; ++u)
            set_log(s, u, s->t[u] + s->shift[s->layer[u]]);
    }
    return left;
}

/* Number the layers, and find that of each unit. */
static void number_layers(balance *s, ptrdiff_t *number) {
    ptrdiff_t blocks = s->plan->blocks;
    for (int64_t u = -1; u < s->plan->units; ++u)
        s->layer[u] = blocks;
    for (ptrdiff_t k = 0; k <= blocks; ++k)
        number[k] = 0;
    for (ptrdiff_t k = 0; k < blocks; ++k)
        for (ptrdiff_t i = 0; i < s->plan->block[k].groups * s->plan->block[k].rows; ++i) {
            int64_t u = s->plan->block[k].row_unit[i];
            if (u != GSGD_PINNED && s->layer[u] == blocks)
                s->layer[u] = k;
        }
    for (int64_t u = 0; u < s->plan->units; ++u)
        number[s->layer[u]] = 1;
    for (ptrdiff_t k = 0; k <= blocks; ++k)
        number[k] = k == blocks || number[k] ? s->layers++ : -1;
    for (int64_t u = -1; u < s->plan->units; ++u)
        s->layer[u] = number[s->layer[u]];
}

/* Distinct layers of the rows or columns of every block; `seen` is scratch, one entry per layer. */
static void list_layers(const balance *s, int dim, lists *to, ptrdiff_t *seen) {
    ptrdiff_t n = 0;
    for (ptrdiff_t i = 0; i < s->layers; ++i)
        seen[i] = -1;
    for (ptrdiff_t k = 0; k < s->plan->blocks; ++k) {
        const block *b = &s->plan->block[k];
        const int64_t *unit = dim == GSGD_ROW ? b->row_unit : b->col_unit;
        to->start[k] = n;
        for (ptrdiff_t i = 0; i < b->groups * b->dim[dim].extent; ++i)
            if (seen[s->layer[unit[i]]] != k) {
                seen[s->layer[unit[i]]] = k;
                to->item[n++] = s->layer[unit[i]];
            }
    }
    to->start[s->plan->blocks] = n;
}

/* Turn lists i -> values, which are below `values`, into lists value -> i, in order. */
static void invert(const lists *from, ptrdiff_t count, ptrdiff_t values, lists *to) {
    memset(to->start, 0, (size_t)(values + 2) * sizeof *to->start);
    for (ptrdiff_t n = 0; n < from->start[count]; ++n)
        to->start[from->item[n] + 2]++;
    for (ptrdiff_t v = 1; v <= values; ++v)
        to->start[v + 1] += to->start[v];
    for (ptrdiff_t i = 0; i < count; ++i)
        for (ptrdiff_t n = from->start[i]; n < from->start[i + 1]; ++n)
            to->item[to->start[from->item[n] + 1]++] = i;
}

/* Layers, lists, flows and the shape of the matrix; 0: no memory. The caller frees what `memory` holds. */
static int prepare(balance *s, void *memory[4]) {
    const gsgd_plan *plan = s->plan;
    ptrdiff_t units = plan->units, blocks = plan->blocks, ends = 0, most = 0;
    for (ptrdiff_t k = 0; k < blocks; ++k) {
        const block *b = &plan->block[k];
        ends += b->groups * (b->rows + b->cols);
        for (int d = GSGD_ROW; d <= GSGD_COL; ++d)
            if (b->groups * b->dim[d].extent > most)
                most = b->groups * b->dim[d].extent;
    }
    size_t u = (size_t)units + 1, k = (size_t)blocks + 3;
    ptrdiff_t *whole = memory[0] = calloc(3 * u + 9 * k + 3 * (size_t)ends, sizeof *whole);
    double *real = memory[1] = calloc(5 * u + 4 * k + 2 * (size_t)most, sizeof *real);
    if (whole == NULL || real == NULL)
        return 0;
    s->layer = whole + 1;
    s->members = (lists){whole + 2 * u + 3 * k, whole + u};
    s->into.start = whole + 2 * u + 4 * k;
    s->from.start = whole + 2 * u + 5 * k;
    s->writers.start = whole + 2 * u + 6 * k;
    s->readers.start = whole + 2 * u + 7 * k;
    s->first = whole + 2 * u;
    s->row = whole + 2 * u + k;
    ptrdiff_t *scratch = whole + 2 * u + 2 * k, *item = whole + 2 * u + 8 * k;
    double **array[] = {&s->t, &s->up, &s->down, &s->total_in, &s->total_out};
    for (int i = 0; i < 5; ++i)
        *array[i] = real + (size_t)i * u + 1;
    double **of_layer[] = {&s->shift, &s->step, &s->diagonal};
    for (int i = 0; i < 3; ++i)
        *of_layer[i] = real + 5 * u + (size_t)i * k;
    s->ends = real + 5 * u + 4 * k;
    s->sums = s->ends + most;
    for (int64_t v = -1; v < units; ++v)
        set_log(s, v, 0);

    number_layers(s, scratch);
    s->into.item = item;
    list_layers(s, GSGD_ROW, &s->into, scratch);
    s->from.item = s->into.item + s->into.start[blocks];
    list_layers(s, GSGD_COL, &s->from, scratch);
    s->writers.item = s->from.item + s->from.start[blocks];
    invert(&s->into, blocks, s->layers, &s->writers);
    s->readers.item = s->writers.item + s->into.start[blocks];
    invert(&s->from, blocks, s->layers, &s->readers);
    ptrdiff_t *start = s->members.start;
    for (ptrdiff_t v = 0; v < units; ++v)
        start[s->layer[v] + 2]++;
    for (ptrdiff_t i = 1; i <= s->layers; ++i)
        start[i + 1] += start[i];
    for (ptrdiff_t v = 0; v < units; ++v)
        s->members.item[start[s->layer[v] + 1]++] = v;

    for (ptrdiff_t i = 0; i < s->layers; ++i)
        s->first[i] = i;
    for (ptrdiff_t i = 0; i < blocks; ++i)
        for (ptrdiff_t n = s->into.start[i]; n < s->into.start[i + 1]; ++n)
            for (ptrdiff_t m = s->from.start[i]; m < s->from.start[i + 1]; ++m, ++s->flows) {
                ptrdiff_t x = s->into.item[n], y = s->from.item[m], high = x > y ? x : y, low = x > y ? y : x;
                if (low < s->first[high])
                    s->first[high] = low;
            }
    for (ptrdiff_t i = 0; i < s->layers; ++i)
        s->row[i + 1] = s->row[i] + i - s->first[i] + 1;
    s->matrix = memory[2] = calloc((size_t)s->row[s->layers - 1] + 1, sizeof *s->matrix);
    s->flow = memory[3] = calloc((size_t)s->flows + 1, sizeof *s->flow);
    return s->matrix != NULL && s->flow != NULL;
}

gsgd_status gsgd_balance(gsgd_plan *plan, const gsgd_array *weights, double *c, double *left) {
    balance s = {.plan = plan};
    void *memory[4] = {NULL};
    gsgd_bind(plan, weights, VIEW_W);
    int ready = prepare(&s, memory);
    if (ready) {
        *left = find_scale(&s);
        for (ptrdiff_t u = 0; u < plan->units; ++u)
            c[u] = exp(s.t[u]);
    }
    for (int i = 0; i < 4; ++i)
        free(memory[i]);
    return ready ? GSGD_OK : GSGD_NO_MEMORY;
}
