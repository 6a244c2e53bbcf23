/* step.c - one step in three stages.
 *
 * Gather: per unit, the sum of w g over its out-edges, and for clip_norm the squares of dl / dx; reads
 * weights and gradients once. Solve: on the trees, O(units): the inverse chain rule, path ratios; validates
 * everything. Apply: one pass over the weights; then the tree edges get the values that solve found for them.
 */
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

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define TRANSPOSES
#endif
#endif

enum {
    CHUNK = 64,       /* rows that are summed in the weights' own type before the sum goes on in double */
    SERIAL = 1 << 17, /* networks of fewer entries are not worth a second thread */
    MOST_THREADS = 256,
};

static inline float root_f32(float x) { return sqrtf(x); }
static inline double root_f64(double x) { return sqrt(x); }

#define REAL float
#define N(name) name##_f32
#include "kernel.inc"
#undef REAL
#undef N
#define REAL double
#define N(name) name##_f64
#include "kernel.inc"
#undef REAL
#undef N

/* A pass over all blocks by several threads. */
typedef struct {
    gsgd_plan *plan;
    const gsgd_rates *rates;
    double clip; /* what gradients are multiplied by */
    atomic_ptrdiff_t task;
    atomic_int not_finite;
} pass;

KERNEL static void divide(ptrdiff_t n, const double *restrict x, const double *restrict by,
                          double *restrict to) {
    for (ptrdiff_t i = 0; i < n; ++i)
        to[i] = x[i] / by[i];
}

KERNEL static int any_beyond(ptrdiff_t n, const double *restrict x, double limit) {
    int any = 0;
    for (ptrdiff_t i = 0; i < n; ++i)
        any |= fabs(x[i]) > limit;
    return any;
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

/* A and B of every unit, relative to the reference scale, from the weights of in-edges and out-edges, (2,
 * 1 + units): METHOD.md, section 4. Writes these rows of `solved`. */
static void chain_products(gsgd_plan *plan, const double *trees, double *solved) {
    double *a = solved + row_at(plan, GSGD_A), *b = solved + row_at(plan, GSGD_B),
           *inv_a = solved + row_at(plan, GSGD_INV_A), *inv_b = solved + row_at(plan, GSGD_INV_B),
           *to_a = plan->to_a, *to_b = plan->to_b;
    divide(plan->units, trees + row_at(plan, GSGD_IN_WEIGHT), plan->in0, to_a);
    divide(plan->units, trees + row_at(plan, GSGD_OUT_WEIGHT), plan->out0, to_b);
    for (int64_t u = 0; plan->num_active < plan->units && u < plan->units; ++u)
        if (!plan->active[u])
            to_a[u] = to_b[u] = 1;
    for (ptrdiff_t n = 0; n < plan->num_active; ++n) {
        int64_t v = plan->in_order[n], u = plan->out_order[n];
        to_a[v] *= to_a[plan->in_unit[v]];
        to_b[u] *= to_b[plan->out_unit[u]];
    }
    a[-1] = b[-1] = inv_a[-1] = inv_b[-1] = 1;
    scale_products(plan->units, to_a, to_b, plan->c, a, b, inv_a, inv_b, plan->x, plan->inv_x);
}

/* The factors of all rows; those for weight decay if there are rates that have it. */
static void spread_rows(gsgd_plan *plan, const gsgd_rates *rates, const double *solved) {
    const double *of_b = solved + row_at(plan, GSGD_B), *of_inv_b = solved + row_at(plan, GSGD_INV_B);
    for (ptrdiff_t k = 0; k < plan->blocks; ++k) {
        block *b = &plan->block[k];
        int decays = rates != NULL && rates[b->array].weight_decay != 0;
        if (b->type == GSGD_FLOAT32)
            spread_rows_f32(b, of_b, of_inv_b, decays);
        else
            spread_rows_f64(b, of_b, of_inv_b, decays);
    }
}

/* Gather: METHOD.md, section 2. */

static int gather_block(block *b, ptrdiff_t first, ptrdiff_t last, int clips) {
    int single = b->type == GSGD_FLOAT32;
    if (!b->gathers && !clips)
        return single ? check_pieces_f32(b, first, last) : check_pieces_f64(b, first, last);
    if (single)
        gather_pieces_f32(b, first, last, clips);
    else
        gather_pieces_f64(b, first, last, clips);
    return 1;
}

static int is_summed(const block *b) { return b->counts && b->s.data != NULL; }

static void gather_blocks(void *context) {
    pass *p = context;
    ptrdiff_t done = 0, task = next_piece(&p->task);
    for (ptrdiff_t n = 0; n < p->plan->blocks; ++n) {
        block *b = &p->plan->block[p->plan->order[n]];
        ptrdiff_t tasks = b->gather_pieces && is_summed(b) ? (b->gather_pieces - 1) / b->gather_chunk + 1 : 0;
        for (; task - done < tasks; task = next_piece(&p->task)) {
            ptrdiff_t first = (task - done) * b->gather_chunk, last = first + b->gather_chunk;
            if (!gather_block(b, first, last < b->gather_pieces ? last : b->gather_pieces, p->plan->clips))
                atomic_store_explicit(&p->not_finite, 1, memory_order_relaxed);
        }
        done += tasks;
    }
}

/* S(v) by chain root, from the columns of blocks. */
static void sum_columns(const gsgd_plan *plan, double *sum) {
    for (ptrdiff_t k = 0; k < plan->blocks; ++k) {
        const block *b = &plan->block[k];
        if (!b->gathers || b->rows == 0 || !is_summed(b))
            continue;
        for (ptrdiff_t j = 0, i = 0; j < b->groups * b->cols; ++j) {
            double column = 0;
            for (ptrdiff_t t = 0; t < b->taps; ++t, ++i)
                column += b->column_sum[i];
            sum[b->col_root[j]] += column;
        }
    }
}

/* 0 where the edge is not here, and where there is no such array. */
static double load_edge(const gsgd_plan *plan, const tree_edge *e, int which) {
    if (!e->counts)
        return 0;
    const block *b = &plan->block[e->block];
    return b->views[which].data == NULL ? 0 : load_at(b->type, &b->views[which], e->at[which]);
}

static void read_weights(const gsgd_plan *plan, double *gathered) {
    double *in_w = gathered + row_at(plan, GSGD_IN_WEIGHT), *out_w = gathered + row_at(plan, GSGD_OUT_WEIGHT);
    for (ptrdiff_t n = 0; n < plan->num_active; ++n) {
        int64_t u = plan->in_order[n];
        in_w[u] = load_edge(plan, &plan->in[u], VIEW_W);
        out_w[u] = load_edge(plan, &plan->out[u], VIEW_W);
    }
}

/* What else in-edges hold; and free edges leave the sums. */
static void read_trees(const gsgd_plan *plan, double *gathered) {
    const double *out_w = gathered + row_at(plan, GSGD_OUT_WEIGHT);
    double *sum = gathered + row_at(plan, GSGD_SUM), *in_g = gathered + row_at(plan, GSGD_IN_GRADIENT),
           *in_m = gathered + row_at(plan, GSGD_IN_M), *in_v = gathered + row_at(plan, GSGD_IN_V);
    for (ptrdiff_t n = 0; n < plan->num_active; ++n) {
        int64_t u = plan->in_order[n];
        const tree_edge *in = &plan->in[u], *out = &plan->out[u];
        in_g[u] = load_edge(plan, in, VIEW_S);
        in_m[u] = load_edge(plan, in, VIEW_M);
        in_v[u] = load_edge(plan, in, VIEW_V);
        if (out->counts)
            sum[plan->root[u]] -=
                product(plan->block[out->block].type, out_w[u], load_edge(plan, out, VIEW_S));
    }
}

/* The square that a tree edge has in column_square, times 1 / A^2. */
static double edge_square(const gsgd_plan *plan, const tree_edge *e, double inv_a, double inv_b) {
    if (!e->counts)
        return 0;
    gsgd_type type = plan->block[e->block].type;
    double d = product(type, load_edge(plan, e, VIEW_G), inv_b);
    return product(type, d, d) * inv_a * inv_a;
}

/* The sum of squares of dl / dx of ordinary edges: from the columns' sums, less those of tree edges. */
static double sum_of_squares(gsgd_plan *plan, const double *solved) {
    const double *inv_a = solved + row_at(plan, GSGD_INV_A), *inv_b = solved + row_at(plan, GSGD_INV_B);
    double total = 0;
    for (ptrdiff_t k = 0; k < plan->blocks; ++k) {
        const block *b = &plan->block[k];
        if (b->rows == 0 || !is_summed(b))
            continue;
        for (ptrdiff_t n = 0, i = 0; n < b->groups * b->cols; ++n) {
            double column = 0, by_a = inv_a[b->col_unit[n]];
            for (ptrdiff_t t = 0; t < b->taps; ++t, ++i)
                column += b->column_square[i];
            total += column * by_a * by_a;
        }
    }
    for (ptrdiff_t n = 0; n < plan->num_active; ++n) {
        int64_t v = plan->in_order[n];
        total -= edge_square(plan, &plan->out[v], inv_a[v], inv_b[plan->out_unit[v]]);
        if (!plan->in_is_free[v])
            total -= edge_square(plan, &plan->in[v], inv_a[plan->in_unit[v]], inv_b[v]);
    }
    return total;
}

/* Zeros where no unit with edges is. */
static void clear(const gsgd_plan *plan, double *rows, int count) {
    if (plan->num_active < plan->units)
        memset(rows, 0, (size_t)(count * (plan->units + 1)) * sizeof *rows);
    for (int i = 0; i < count; ++i)
        rows[row_at(plan, i) - 1] = 0;
}

static int threads_for(gsgd_plan *plan, const gsgd_options *options) {
    int wanted = options->threads < MOST_THREADS ? options->threads : MOST_THREADS;
    if (plan->entries < SERIAL || wanted <= 1)
        return 1;
    if (wanted > plan->threads_wanted) {
        plan->threads_wanted = wanted;
        plan->threads_startable = startable_threads(wanted);
    }
    return wanted < plan->threads_startable ? wanted : plan->threads_startable;
}

/* gsgd_gather from the views at hand. */
static void gather(gsgd_plan *plan, const gsgd_options *options, const double *trees, double *gathered) {
    pass p = {.plan = plan};
    double *sum = gathered + row_at(plan, GSGD_SUM);
    clear(plan, gathered, GSGD_GATHERED);
    memset(sum, 0, (size_t)plan->units * sizeof *sum);
    read_weights(plan, gathered);
    if (plan->clips) {
        chain_products(plan, trees == NULL ? gathered : trees, plan->solved);
        spread_rows(plan, NULL, plan->solved);
    }
    run_team(&plan->gather_team, threads_for(plan, options), gather_blocks, &p);
    sum_columns(plan, sum);
    read_trees(plan, gathered);
    if (plan->clips)
        gathered[row_at(plan, GSGD_IN_GRADIENT) - 1] = sum_of_squares(plan, plan->solved);
    if (p.not_finite)
        sum[-1] = NAN;
}

/* Solve: METHOD.md, section 3. */

typedef struct {
    gsgd_plan *plan;
    const gsgd_options *options;
    const double *in_w, *sum, *in_g, *in_m, *in_v;
    double *new_w, *new_m, *new_v, *inv_rho;
    double clip;
    ptrdiff_t limited;
} solver;

/* dl / dx of the chain that begins with v's in-edge, by the inverse chain rule. */
static double chain_gradient(const solver *s, int64_t v) {
    const gsgd_plan *plan = s->plan;
    double d = product(plan->type[plan->in_array[v]], s->in_w[v], s->in_g[v]) - s->sum[v];
    d *= plan->inv_x[v];
    return s->options->norm == NULL ? d : d / s->options->norm[v];
}

/* The norm of dl / dx, of ordinary edges, from their sum of squares, and of chains. */
static double gradient_norm(const solver *s, double ordinary) {
    const gsgd_plan *plan = s->plan;
    double chains = 0;
    for (ptrdiff_t n = 0; n < plan->num_active; ++n) {
        int64_t v = plan->in_order[n];
        if (plan->in_is_free[v] || !plan->has_gradient[plan->in_array[v]])
            continue;
        double d = chain_gradient(s, v);
        chains += d * d;
    }
    return sqrt((ordinary < 0 ? 0 : ordinary) + chains); /* NaN stays */
}

/* |r| limited to [1 / most, most], with the sign of r; 0 counts as positive. */
static double limited(double r, double most) {
    double size = fabs(r), low = 1 / most;
    size = size < low ? low : size > most ? most : size;
    return r < 0 ? -size : size;
}

/* The path ratio of the chain that begins with v's in-edge. 0: not finite, or so small that its inverse is
 * not. */
static int solve_chain(solver *s, int64_t v) {
    gsgd_plan *plan = s->plan;
    int64_t array = plan->in_array[v];
    const gsgd_rates *o = &s->options->rates[array];
    const rates_f64 rates = rates_of_f64(o, plan->has_m[array], s->clip);
    double r = 1, m = s->in_m[v], m2 = s->in_v[v];
    if (plan->has_gradient[array]) {
        double d = rates.clip * chain_gradient(s, v);
        r = 1 - o->lr * direction_f64(d, &m, &m2, &rates, o->method, rates.moves) * plan->inv_x[v];
    }
    plan->ratio[v] = limited(r, s->options->max_ratio);
    s->inv_rho[v] = 1 / plan->ratio[v];
    if (!isfinite(r) || !isfinite(s->inv_rho[v]))
        return 0;
    s->limited += r != plan->ratio[v];
    s->new_w[v] = s->in_w[v] * (plan->ratio[v] * s->inv_rho[plan->in_unit[v]]);
    if (plan->type[array] == GSGD_FLOAT32 && fabs(s->new_w[v]) > FLT_MAX)
        return 0;
    s->new_m[v] = m;
    s->new_v[v] = m2;
    return 1;
}

/* A unit one of whose factors is finite, but not in float32, where some array is; or -1. */
static int64_t overflow(const gsgd_plan *plan, const double *solved) {
    const double *factors = solved + row_at(plan, GSGD_A) - 1;
    ptrdiff_t row = plan->units + 1, count = (GSGD_INV_RHO - GSGD_A + 1) * row, first = 0;
    int single = 0;
    for (ptrdiff_t i = 0; i < plan->arrays; ++i)
        single |= plan->type[i] == GSGD_FLOAT32;
    if (!single || !any_beyond(count, factors, FLT_MAX))
        return -1;
    while (fabs(factors[first]) <= FLT_MAX)
        ++first;
    return first % row - 1;
}

/* A unit that has no finite x or 1 / x, or -1. */
static int64_t no_path_value(const gsgd_plan *plan) {
    if (all_finite_f64(plan->units, plan->x, 1) && all_finite_f64(plan->units, plan->inv_x, 1))
        return -1;
    for (int64_t v = 0;; ++v)
        if (!isfinite(plan->x[v]) || !isfinite(plan->inv_x[v]))
            return v;
}

gsgd_status gsgd_solve(gsgd_plan *plan, const double *gathered, const gsgd_options *options, double *solved,
                       ptrdiff_t *clamped, int64_t *unit) {
    ptrdiff_t units = plan->units;
    solver s = {
        .plan = plan,
        .options = options,
        .in_w = gathered + row_at(plan, GSGD_IN_WEIGHT),
        .sum = gathered + row_at(plan, GSGD_SUM),
        .in_g = gathered + row_at(plan, GSGD_IN_GRADIENT),
        .in_m = gathered + row_at(plan, GSGD_IN_M),
        .in_v = gathered + row_at(plan, GSGD_IN_V),
        .inv_rho = solved + row_at(plan, GSGD_INV_RHO),
        .new_w = solved + row_at(plan, GSGD_IN_WEIGHT),
        .new_m = solved + row_at(plan, GSGD_NEW_M),
        .new_v = solved + row_at(plan, GSGD_NEW_V),
        .clip = 1,
    };
    *clamped = 0;
    clear(plan, solved, GSGD_SOLVED);
    chain_products(plan, gathered, solved);
    if ((*unit = no_path_value(plan)) >= 0 || !all_finite_f64(units + 1, s.sum - 1, 1))
        return GSGD_NOT_FINITE;
    if (isfinite(options->clip_norm)) {
        double norm = gradient_norm(&s, s.in_g[-1]);
        if (!isfinite(norm))
            return GSGD_NOT_FINITE;
        s.clip = fmin(1, options->clip_norm / (norm + 1e-6)); /* as torch's clip_grad_norm_ */
    }
    s.inv_rho[-1] = 1;
    memcpy(s.new_w, s.in_w, (size_t)units * sizeof *s.new_w);
    memcpy(solved + row_at(plan, GSGD_OUT_WEIGHT), gathered + row_at(plan, GSGD_OUT_WEIGHT),
           (size_t)units * sizeof *s.new_w);
    for (ptrdiff_t n = 0; n < plan->num_active; ++n) {
        int64_t v = plan->in_order[n];
        if (plan->in_is_free[v]) {
            s.inv_rho[v] = s.inv_rho[plan->root[v]];
            s.new_m[v] = s.new_v[v] = 0;
        } else if (!solve_chain(&s, v)) {
            *unit = v;
            return GSGD_NOT_FINITE;
        }
    }
    s.new_w[-1] = s.clip;
    *clamped = s.limited;
    return (*unit = overflow(plan, solved)) < 0 ? GSGD_OK : GSGD_NOT_FINITE;
}

/* Apply: METHOD.md, section 3. */

/* Backwards: what was gathered last is still in the cache. */
static void apply_blocks(void *context) {
    pass *p = context;
    ptrdiff_t done = 0, task = next_piece(&p->task);
    for (ptrdiff_t n = p->plan->blocks; n-- > 0;) {
        block *b = &p->plan->block[p->plan->order[n]];
        ptrdiff_t tasks = b->apply_pieces ? (b->apply_pieces - 1) / b->apply_chunk + 1 : 0;
        for (; task - done < tasks; task = next_piece(&p->task)) {
            ptrdiff_t first = (tasks - 1 - (task - done)) * b->apply_chunk, last = first + b->apply_chunk;
            last = last < b->apply_pieces ? last : b->apply_pieces;
            if (b->type == GSGD_FLOAT32)
                apply_pieces_f32(b, first, last, &p->rates[b->array], p->clip);
            else
                apply_pieces_f64(b, first, last, &p->rates[b->array], p->clip);
        }
        done += tasks;
    }
}

/* The factors of all lines. */
static void spread_lines(gsgd_plan *plan, const gsgd_rates *rates, const double *solved) {
    const double *a = solved + row_at(plan, GSGD_A), *inv_a = solved + row_at(plan, GSGD_INV_A),
                 *inv_rho = solved + row_at(plan, GSGD_INV_RHO);
    for (ptrdiff_t k = 0; k < plan->blocks; ++k) {
        block *b = &plan->block[k];
        int decays = rates[b->array].weight_decay != 0;
        if (b->type == GSGD_FLOAT32)
            spread_lines_f32(b, a, inv_a, inv_rho, decays);
        else
            spread_lines_f64(b, a, inv_a, inv_rho, decays);
    }
}

/* Give a tree edge its weight and moments, if it is here. */
static void store_edge(const gsgd_plan *plan, const tree_edge *e, double w, double m, double v) {
    if (e->block < 0)
        return;
    const block *b = &plan->block[e->block];
    store_at(b->type, &b->w, e->at[VIEW_W], w);
    if (b->m.data != NULL)
        store_at(b->type, &b->m, e->at[VIEW_M], m);
    if (b->v.data != NULL)
        store_at(b->type, &b->v, e->at[VIEW_V], v);
}

/* gsgd_apply to the views at hand. */
static void apply(gsgd_plan *plan, const gsgd_options *options, const double *solved) {
    const double *new_w = solved + row_at(plan, GSGD_IN_WEIGHT),
                 *out_w = solved + row_at(plan, GSGD_OUT_WEIGHT), *new_m = solved + row_at(plan, GSGD_NEW_M),
                 *new_v = solved + row_at(plan, GSGD_NEW_V);
    pass p = {.plan = plan, .rates = options->rates, .clip = new_w[-1]};
    spread_rows(plan, options->rates, solved);
    spread_lines(plan, options->rates, solved);
    run_team(&plan->apply_team, threads_for(plan, options), apply_blocks, &p);
    for (ptrdiff_t n = 0; n < plan->num_active; ++n) {
        int64_t u = plan->in_order[n];
        if (!plan->in_is_free[u])
            store_edge(plan, &plan->in[u], new_w[u], new_m[u], new_v[u]);
        store_edge(plan, &plan->out[u], out_w[u], 0, 0);
    }
}

/* See all arrays of a step. */
static void see(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *gradients,
                const gsgd_array *sums, const gsgd_array *m, const gsgd_array *v, int clips) {
    const gsgd_array *arrays[VIEWS] = {weights, gradients, sums, m, v};
    for (int i = 0; i < VIEWS; ++i)
        gsgd_bind(plan, arrays[i], i);
    for (ptrdiff_t i = 0; i < plan->arrays; ++i) {
        plan->has_gradient[i] = gradients[i].data != NULL;
        plan->has_m[i] = m != NULL && m[i].data != NULL;
    }
    gsgd_plan_walk(plan, clips);
}

void gsgd_gather(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *gradients,
                 const gsgd_array *sums, const gsgd_array *m, const gsgd_array *v,
                 const gsgd_options *options, const double *trees, double *gathered) {
    see(plan, weights, gradients, sums, m, v, isfinite(options->clip_norm));
    gather(plan, options, trees, gathered);
}

void gsgd_apply(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *gradients, const gsgd_array *m,
                const gsgd_array *v, const gsgd_options *options, const double *solved) {
    see(plan, weights, gradients, gradients, m, v, plan->clips);
    apply(plan, options, solved);
}

gsgd_status gsgd_step(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *gradients,
                      const gsgd_array *sums, const gsgd_array *m, const gsgd_array *v,
                      const gsgd_options *options, ptrdiff_t *clamped, int64_t *unit) {
    see(plan, weights, gradients, sums, m, v, isfinite(options->clip_norm));
    gather(plan, options, NULL, plan->gathered);
    gsgd_status status = gsgd_solve(plan, plan->gathered, options, plan->solved, clamped, unit);
    if (status == GSGD_OK)
        apply(plan, options, plan->solved);
    return status;
}
