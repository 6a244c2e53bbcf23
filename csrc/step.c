/* step.c - one step in three stages.
 *
 * First the chain products A and B, from the tree edges alone.
 * Gather: per unit, the sum of w g over its out-edges, and for clip_norm the squares of dl / dx; reads
 * weights and gradients once. Solve: on the trees, O(units): the inverse chain rule, path ratios; validates
 * everything. Apply: one pass over the weights; then the tree edges get the values that solve found for them.
 */
#include "parallel.h"
#include "plan.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* The kernels are compiled for three generations of x86-64 and chosen at load time. Neither of the newer ones
 * implies fused multiply-add, which would change the bits. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define KERNEL __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define KERNEL
#endif

#ifdef __GNUC__
#define ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE inline
#endif

enum {
    CHUNK = 64,       /* rows that are summed in the weights' own type before the sum goes on in double */
    LANES = 8,        /* columns summed side by side where rows are the fast dimension */
    TASK = 1 << 15,   /* entries that a thread takes at a time */
    SERIAL = 1 << 17, /* networks of fewer entries are not worth a second thread */
};

/* Column i of a block, i in C order over (group, column, taps), as an index with row 0. */
static void column_index(const block *b, ptrdiff_t i, ptrdiff_t index[GSGD_NDIM]) {
    for (int d = GSGD_NDIM; d-- > GSGD_COL; i /= b->dim[d].extent)
        index[d] = i % b->dim[d].extent;
    index[GSGD_ROW] = 0;
    index[GSGD_GROUP] = i;
}

/* Piece i of a block, as an index: by rows a row, else a column. */
static void piece_index(const block *b, ptrdiff_t i, ptrdiff_t index[GSGD_NDIM]) {
    if (!b->by_rows) {
        column_index(b, i, index);
        return;
    }
    memset(index, 0, GSGD_NDIM * sizeof *index);
    index[GSGD_GROUP] = i / b->rows;
    index[GSGD_ROW] = i % b->rows;
}

static inline float root_f32(float x) { return sqrtf(x); }
static inline double root_f64(double x) { return sqrt(x); }

#define REAL float
#define N(name) name##_f32
#include "step.inc"
#undef REAL
#undef N
#define REAL double
#define N(name) name##_f64
#include "step.inc"
#undef REAL
#undef N

/* Whether columns and taps, taken in some order, lie side by side in v as they do in w. */
static int same_line(const block *b, const view *v) {
    if (v->data == NULL)
        return 1;
    for (int d = GSGD_COL; d < GSGD_NDIM; ++d)
        if (b->dim[d].extent > 1 && v->stride[d] != b->w.stride[d])
            return 0;
    return 1;
}

/* Whether rows lie side by side. */
static int rows_adjoin(const block *b) {
    const view *views[] = {&b->w, &b->g, &b->s, &b->m, &b->v};
    for (int i = 0; i < 5; ++i)
        if (views[i]->data != NULL && views[i]->stride[GSGD_ROW] != 1)
            return 0;
    return 1;
}

/* Decide how to walk a block, and learn the order of its line. */
static void plan_walk(block *b) {
    int order[GSGD_NDIM], n = 0;
    for (int d = GSGD_NDIM; d-- > GSGD_COL;)
        if (b->dim[d].extent > 1) {
            int i = n++;
            for (; i > 0 && b->w.stride[order[i - 1]] > b->w.stride[d]; --i)
                order[i] = order[i - 1];
            order[i] = d;
        }
    ptrdiff_t expected = 1;
    b->by_rows = same_line(b, &b->g) && same_line(b, &b->s) && same_line(b, &b->m) && same_line(b, &b->v);
    for (int i = 0; i < n; ++i) {
        b->by_rows &= b->w.stride[order[i]] == expected;
        expected *= b->dim[order[i]].extent;
    }
    ptrdiff_t line = b->cols * b->taps;
    if (line < b->rows && line <= LANES && rows_adjoin(b))
        b->by_rows = 0;
    b->shuffled = 0;
    for (int i = 1; i < n; ++i)
        b->shuffled |= order[i] > order[i - 1];
    if (!b->by_rows || !b->shuffled)
        return;
    for (ptrdiff_t k = 0; k < line; ++k) {
        ptrdiff_t index[GSGD_NDIM], at = 0;
        column_index(b, k, index);
        for (int d = GSGD_COL; d < GSGD_NDIM; ++d)
            at += index[d] * b->w.stride[d];
        b->unplace[k] = at;
        b->place[at] = k;
    }
}

static ptrdiff_t at_least(ptrdiff_t low, ptrdiff_t x) { return x > low ? x : low; }

/* Cut a block into pieces for gather and for apply. */
static void plan_pieces(block *b, int clips) {
    ptrdiff_t line = b->cols * b->taps, panels = (line + PANEL - 1) / PANEL;
    if (b->rows * line == 0) {
        b->gather_pieces = b->apply_pieces = 0;
        return;
    }
    b->apply_pieces = b->groups * (b->by_rows ? b->rows : line);
    b->apply_chunk = at_least(1, TASK / (b->by_rows ? line : b->rows));
    b->gather_pieces = b->apply_pieces;
    b->gather_chunk = b->apply_chunk;
    int sums = b->gathers || clips;
    if (sums && b->by_rows) {
        b->gather_pieces = b->groups * panels;
        b->gather_chunk = at_least(1, TASK / (b->rows * (line < PANEL ? line : PANEL)));
    } else if (sums) {
        b->gather_chunk = (b->gather_chunk + LANES - 1) / LANES * LANES;
    }
}

typedef struct {
    gsgd_plan *plan;
    const gsgd_options *options;
    int threads;
    atomic_ptrdiff_t gather_task, apply_task;
    atomic_int not_finite;
    gsgd_status status;
    double clip; /* what gradients are multiplied by */
    ptrdiff_t clamped;
    int64_t unit;
} job;

static int gather_block(block *b, ptrdiff_t first, ptrdiff_t last, int clips) {
    int single = b->type == GSGD_FLOAT32;
    if (b->s.data == NULL)
        return 1;
    if (!b->gathers && !clips)
        return single ? check_pieces_f32(b, first, last) : check_pieces_f64(b, first, last);
    if (single)
        gather_pieces_f32(b, first, last, clips);
    else
        gather_pieces_f64(b, first, last, clips);
    return 1;
}

static void apply_block(block *b, ptrdiff_t first, ptrdiff_t last, const gsgd_rates *rates, double clip) {
    if (b->type == GSGD_FLOAT32)
        apply_pieces_f32(b, first, last, rates, clip);
    else
        apply_pieces_f64(b, first, last, rates, clip);
}

static void gather(job *j) {
    ptrdiff_t done = 0, task = next_piece(&j->gather_task);
    for (ptrdiff_t n = 0; n < j->plan->blocks; ++n) {
        block *b = &j->plan->block[j->plan->order[n]];
        ptrdiff_t tasks = b->gather_pieces ? (b->gather_pieces - 1) / b->gather_chunk + 1 : 0;
        for (; task - done < tasks; task = next_piece(&j->gather_task)) {
            ptrdiff_t first = (task - done) * b->gather_chunk, last = first + b->gather_chunk;
            if (!gather_block(b, first, last < b->gather_pieces ? last : b->gather_pieces, j->plan->clips))
                atomic_store_explicit(&j->not_finite, 1, memory_order_relaxed);
        }
        done += tasks;
    }
}

/* Backwards: what was gathered last is still in the cache. */
static void apply(job *j) {
    ptrdiff_t done = 0, task = next_piece(&j->apply_task);
    for (ptrdiff_t n = j->plan->blocks; n-- > 0;) {
        block *b = &j->plan->block[j->plan->order[n]];
        ptrdiff_t tasks = b->apply_pieces ? (b->apply_pieces - 1) / b->apply_chunk + 1 : 0;
        for (; task - done < tasks; task = next_piece(&j->apply_task)) {
            ptrdiff_t first = (tasks - 1 - (task - done)) * b->apply_chunk, last = first + b->apply_chunk;
            apply_block(b, first, last < b->apply_pieces ? last : b->apply_pieces,
                        &j->options->rates[b->array], j->clip);
        }
        done += tasks;
    }
}

static double tree_weight(const gsgd_plan *plan, const tree_edge *e) {
    const block *b = &plan->block[e->block];
    return load_at(b->type, &b->w, e->w);
}

/* w g of a tree edge of weight w, rounded as the kernels round it. */
static double product(const gsgd_plan *plan, const tree_edge *e, double w, const view *g, ptrdiff_t at) {
    if (g->data == NULL)
        return 0;
    gsgd_type type = plan->block[e->block].type;
    double d = load_at(type, g, at);
    return type == GSGD_FLOAT32 ? (double)((float)w * (float)d) : w * d;
}

double gsgd_product(const gsgd_plan *plan, const tree_edge *e) {
    return product(plan, e, tree_weight(plan, e), &plan->block[e->block].s, e->s);
}

/* S(v) by chain root: out-edges of the units that share it, free edges left out. */
static int sum_by_root(gsgd_plan *plan) {
    double *sum = plan->sum;
    memset(sum - 1, 0, (size_t)(plan->units + 1) * sizeof *sum);
    for (ptrdiff_t k = 0; k < plan->blocks; ++k) {
        const block *b = &plan->block[k];
        if (!b->gathers || b->rows == 0 || b->s.data == NULL)
            continue;
        for (ptrdiff_t j = 0, i = 0; j < b->groups * b->cols; ++j) {
            double column = 0;
            for (ptrdiff_t t = 0; t < b->taps; ++t, ++i)
                column += b->column_sum[i];
            sum[b->col_root[j]] += column;
        }
    }
    for (ptrdiff_t n = 0; n < plan->num_active; ++n) {
        int64_t u = plan->in_order[n];
        sum[plan->root[u]] -= gsgd_product(plan, &plan->out[u]);
    }
    return all_finite_f64(plan->units + 1, sum - 1, 1);
}

KERNEL static void divide(ptrdiff_t n, const double *restrict x, const double *restrict by,
                          double *restrict to) {
    for (ptrdiff_t i = 0; i < n; ++i)
        to[i] = x[i] / by[i];
}

/* From the trees' products relative to the start to A = to_a / c and B = to_b c, and their inverses. */
KERNEL static void scale_products(ptrdiff_t n, const double *restrict to_a, const double *restrict to_b,
                                  const double *restrict c, double *restrict a, double *restrict b,
                                  double *restrict inv_a, double *restrict inv_b, double *restrict x,
                                  double *restrict inv_x) {
    for (ptrdiff_t i = 0; i < n; ++i) {
        a[i] = to_a[i] / c[i];
        b[i] = to_b[i] * c[i];
        inv_a[i] = 1 / a[i];
        inv_b[i] = 1 / b[i];
        x[i] = a[i] * b[i];
        inv_x[i] = inv_a[i] * inv_b[i];
    }
}

/* A and B of every unit, relative to the reference scale, also by rows of blocks. A unit where one is 0 or
 * not finite, or -1. */
static int64_t chain_products(gsgd_plan *plan) {
    double *to_a = plan->to_a, *to_b = plan->to_b;
    for (ptrdiff_t n = 0; n < plan->num_active; ++n) {
        int64_t v = plan->in_order[n];
        plan->in_w[v] = tree_weight(plan, &plan->in[v]);
        plan->out_w[v] = tree_weight(plan, &plan->out[v]);
    }
    divide(plan->units, plan->in_w, plan->in0, to_a);
    divide(plan->units, plan->out_w, plan->out0, to_b);
    for (ptrdiff_t n = 0; n < plan->num_active; ++n) {
        int64_t v = plan->in_order[n], u = plan->out_order[n];
        to_a[v] *= to_a[plan->in_unit[v]];
        to_b[u] *= to_b[plan->out_unit[u]];
    }
    scale_products(plan->units, to_a, to_b, plan->c, plan->a, plan->b, plan->inv_a, plan->inv_b, plan->x,
                   plan->inv_x);
    for (ptrdiff_t k = 0; k < plan->blocks; ++k) {
        if (plan->block[k].type == GSGD_FLOAT32)
            spread_rows_f32(plan, &plan->block[k]);
        else
            spread_rows_f64(plan, &plan->block[k]);
    }
    if (all_finite_f64(plan->units, plan->x, 1) && all_finite_f64(plan->units, plan->inv_x, 1))
        return -1;
    for (int64_t v = 0;; ++v)
        if (!isfinite(plan->x[v]) || !isfinite(plan->inv_x[v]))
            return v;
}

/* dl / dx of the chain that begins with v's in-edge, by the inverse chain rule. */
static double chain_gradient(const job *j, int64_t v) {
    const gsgd_plan *plan = j->plan;
    const tree_edge *in = &plan->in[v];
    double d = product(plan, in, plan->in_w[v], &plan->block[in->block].s, in->s) - plan->sum[v];
    d *= plan->inv_x[v];
    return j->options->norm == NULL ? d : d / j->options->norm[v];
}

/* The square that a tree edge has in column_square, times 1 / A^2. */
static double edge_square(const gsgd_plan *plan, const tree_edge *e) {
    const block *b = &plan->block[e->block];
    if (b->g.data == NULL)
        return 0;
    double inv_a = plan->inv_a[col_unit(b, e->index)], f = plan->inv_b[row_unit(b, e->index)];
    double g = load_at(b->type, &b->g, e->g),
           d = b->type == GSGD_FLOAT32 ? (double)((float)g * (float)f) : g * f;
    return (b->type == GSGD_FLOAT32 ? (double)((float)d * (float)d) : d * d) * inv_a * inv_a;
}

/* The sum of squares of dl / dx: of ordinary edges from the columns' sums less those of tree edges; and of
 * chains. */
static double sum_of_squares(const job *j) {
    const gsgd_plan *plan = j->plan;
    double total = 0, chains = 0;
    for (ptrdiff_t k = 0; k < plan->blocks; ++k) {
        const block *b = &plan->block[k];
        if (b->rows == 0 || b->g.data == NULL)
            continue;
        for (ptrdiff_t n = 0, i = 0; n < b->groups * b->cols; ++n) {
            double column = 0, inv_a = plan->inv_a[b->col_unit[n]];
            for (ptrdiff_t t = 0; t < b->taps; ++t, ++i)
                column += b->column_square[i];
            total += column * inv_a * inv_a;
        }
    }
    for (ptrdiff_t n = 0; n < plan->num_active; ++n) {
        int64_t v = plan->in_order[n];
        total -= edge_square(plan, &plan->out[v]);
        if (plan->in_is_free[v] || plan->block[plan->in[v].block].g.data == NULL)
            continue;
        double d = chain_gradient(j, v);
        total -= edge_square(plan, &plan->in[v]);
        chains += d * d;
    }
    return (total < 0 ? 0 : total) + chains; /* NaN stays */
}

/* |r| limited to [1 / most, most], with the sign of r; 0 counts as positive. */
static double limited(double r, double most) {
    double size = fabs(r), low = 1 / most;
    size = size < low ? low : size > most ? most : size;
    return r < 0 ? -size : size;
}

/* The path ratio of the chain that begins with v's in-edge. 0: not finite, or so small that its inverse is
 * not. */
static int solve_chain(job *j, int64_t v) {
    gsgd_plan *plan = j->plan;
    const tree_edge *in = &plan->in[v];
    const block *b = &plan->block[in->block];
    const gsgd_rates *o = &j->options->rates[b->array];
    const rates_f64 rates = rates_of_f64(o, b->m.data != NULL, j->clip);
    double r = 1;
    double m1 = b->m.data == NULL ? 0 : load_at(b->type, &b->m, in->m);
    double m2 = b->v.data == NULL ? 0 : load_at(b->type, &b->v, in->v);
    if (b->g.data != NULL) {
        double d = rates.clip * chain_gradient(j, v);
        r = 1 - o->lr * direction_f64(d, &m1, &m2, &rates, o->method, rates.moves) * plan->inv_x[v];
    }
    plan->ratio[v] = limited(r, j->options->max_ratio);
    plan->inv_rho[v] = 1 / plan->ratio[v];
    if (!isfinite(r) || !isfinite(plan->inv_rho[v]))
        return 0;
    j->clamped += r != plan->ratio[v];
    plan->in_w[v] *= plan->ratio[v] * plan->inv_rho[plan->in_unit[v]];
    if (b->type == GSGD_FLOAT32 && fabs(plan->in_w[v]) > FLT_MAX)
        return 0;
    plan->new_m[v] = m1;
    plan->new_v[v] = m2;
    return 1;
}

/* A unit one of whose factors is finite, but not in float32; or -1. */
static int64_t overflow(const gsgd_plan *plan) {
    const double *factor[] = {plan->a, plan->b, plan->inv_a, plan->inv_b, plan->inv_rho};
    for (int i = 0; i < 5; ++i)
        for (int64_t v = 0; v < plan->units; ++v)
            if (plan->active[v] && fabs(factor[i][v]) > FLT_MAX)
                return v;
    return -1;
}

static gsgd_status solve(job *j) {
    gsgd_plan *plan = j->plan;
    j->unit = -1;
    if (atomic_load(&j->not_finite) || !sum_by_root(plan))
        return GSGD_NOT_FINITE;
    if (plan->clips) {
        double norm = sqrt(sum_of_squares(j));
        if (!isfinite(norm))
            return GSGD_NOT_FINITE;
        j->clip = fmin(1, j->options->clip_norm / (norm + 1e-6)); /* as torch's clip_grad_norm_ */
    }
    for (ptrdiff_t n = 0; n < plan->num_active; ++n) {
        int64_t v = plan->in_order[n];
        if (plan->in_is_free[v]) {
            plan->inv_rho[v] = plan->inv_rho[plan->root[v]];
        } else if (!solve_chain(j, v)) {
            j->unit = v;
            return GSGD_NOT_FINITE;
        }
    }
    int single = 0;
    for (ptrdiff_t k = 0; k < plan->blocks; ++k)
        single |= plan->block[k].type == GSGD_FLOAT32;
    if (single && (j->unit = overflow(plan)) >= 0)
        return GSGD_NOT_FINITE;
    for (ptrdiff_t k = 0; k < plan->blocks; ++k) {
        block *b = &plan->block[k];
        int decays = j->options->rates[b->array].weight_decay != 0;
        if (b->type == GSGD_FLOAT32)
            spread_lines_f32(plan, b, decays);
        else
            spread_lines_f64(plan, b, decays);
    }
    return GSGD_OK;
}

/* Give a tree edge its weight and moments. */
static void store_edge(const gsgd_plan *plan, const tree_edge *e, double w, double m, double v) {
    const block *b = &plan->block[e->block];
    store_at(b->type, &b->w, e->w, w);
    if (b->m.data != NULL)
        store_at(b->type, &b->m, e->m, m);
    if (b->v.data != NULL)
        store_at(b->type, &b->v, e->v, v);
}

static void store_trees(const gsgd_plan *plan) {
    for (ptrdiff_t n = 0; n < plan->num_active; ++n) {
        int64_t v = plan->in_order[n];
        if (!plan->in_is_free[v])
            store_edge(plan, &plan->in[v], plan->in_w[v], plan->new_m[v], plan->new_v[v]);
        store_edge(plan, &plan->out[v], plan->out_w[v], 0, 0);
    }
}

static void work(void *context, int leader) {
    job *j = context;
    gather(j);
    wait_for_all(j->threads);
    if (leader)
        j->status = solve(j);
    wait_for_all(j->threads);
    if (j->status == GSGD_OK)
        apply(j);
}

/* Whether the block's views have the strides of the call before; remembers them. */
static int same_strides(block *b) {
    const view now[] = {b->w, b->g, b->s, b->m, b->v};
    int same = 1;
    for (int i = 0; i < 5; ++i) {
        same &= (now[i].data == NULL) == (b->seen[i].data == NULL) &&
                (now[i].data == NULL || memcmp(now[i].stride, b->seen[i].stride, sizeof now[i].stride) == 0);
        b->seen[i] = now[i];
    }
    return same;
}

static void locate(const gsgd_plan *plan, tree_edge *e) {
    const block *b = &plan->block[e->block];
    e->w = offset_of(&b->w, e->index);
    e->g = offset_of(&b->g, e->index);
    e->s = offset_of(&b->s, e->index);
    e->m = offset_of(&b->m, e->index);
    e->v = offset_of(&b->v, e->index);
}

/* See the caller's arrays, and plan the walk over them unless it is that of the call before. The number of
 * entries. */
static ptrdiff_t plan_work(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *gradients,
                           const gsgd_array *sums, const gsgd_array *m, const gsgd_array *v, int clips) {
    ptrdiff_t size = 0;
    int changed = 0, other_pieces = clips != plan->clips;
    plan->clips = clips;
    gsgd_bind(plan, weights, offsetof(block, w));
    gsgd_bind(plan, gradients, offsetof(block, g));
    gsgd_bind(plan, sums, offsetof(block, s));
    gsgd_bind(plan, m, offsetof(block, m));
    gsgd_bind(plan, v, offsetof(block, v));
    for (ptrdiff_t k = 0; k < plan->blocks; ++k) {
        block *b = &plan->block[k];
        size += b->groups * b->rows * b->cols * b->taps;
        if (!same_strides(b)) {
            changed = 1;
            plan_walk(b);
            plan_pieces(b, clips);
        } else if (other_pieces) {
            plan_pieces(b, clips);
        }
    }
    for (ptrdiff_t n = 0; changed && n < plan->num_active; ++n) {
        locate(plan, &plan->in[plan->in_order[n]]);
        locate(plan, &plan->out[plan->in_order[n]]);
    }
    return size;
}

/* Threads wait for each other, and one whose core another process has makes all others wait, for longer than
 * it would have saved. So several threads are used on credit. Against the time of a step in one thread, their
 * steps earn what they save and spend what they lose, and every step in one thread earns a 32nd of its time:
 * enough for another try now and then. The time of a step in one thread is measured again after every 64 such
 * times that several threads have had; it follows shorter times at once and longer ones slowly, which may be
 * accidents. The limits of the credit are 32 steps to lose after good times, and 2^15 to wait after bad ones.
 * Results never depend on any of this. */
static int threads_that_pay(const gsgd_plan *plan, int most) {
    return plan->credit < 0 || plan->unmeasured > 64 * plan->alone ? 1 : most;
}

static void learn_what_pays(gsgd_plan *plan, int threads, double seconds) {
    if (threads == 1) {
        double slower = fmin((3 * plan->alone + seconds) / 4, 1.25 * plan->alone);
        plan->alone = plan->alone > 0 && seconds > plan->alone ? slower : seconds;
        plan->credit += seconds / 32;
        plan->unmeasured = 0;
    } else {
        plan->unmeasured += seconds;
        if (plan->alone > 0)
            plan->credit += plan->alone - seconds;
    }
    plan->credit = fmax(-1024 * plan->alone, fmin(32 * plan->alone, plan->credit));
}

gsgd_status gsgd_step(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *gradients,
                      const gsgd_array *sums, const gsgd_array *m, const gsgd_array *v,
                      const gsgd_options *options, ptrdiff_t *clamped, int64_t *unit) {
    ptrdiff_t size = plan_work(plan, weights, gradients, sums, m, v, isfinite(options->clip_norm));
    *clamped = 0;
    if ((*unit = chain_products(plan)) >= 0)
        return GSGD_NOT_FINITE;
    int several = size >= SERIAL && options->threads > 1;
    job j = {
        .plan = plan,
        .options = options,
        .clip = 1,
        .threads = several ? threads_that_pay(plan, options->threads) : 1,
    };
    double begin = several ? clock_now() : 0;
    run_parallel(j.threads, work, &j);
    if (j.status == GSGD_OK && several)
        learn_what_pays(plan, j.threads, clock_now() - begin);
    if (j.status == GSGD_OK)
        store_trees(plan);
    *clamped = j.clamped;
    *unit = j.unit;
    return j.status;
}

gsgd_status gsgd_gather(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *gradients,
                        const gsgd_array *sums) {
    job j = {.plan = plan};
    plan_work(plan, weights, gradients, sums, NULL, NULL, 0);
    gather(&j);
    return sum_by_root(plan) ? GSGD_OK : GSGD_NOT_FINITE;
}
