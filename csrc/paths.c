/* paths.c - the three methods of the paper each by itself, entry by entry: to look inside, not to train. */
#include "plan.h"

#include <math.h>

enum { ORDINARY, CHAIN, FREE };

/* What the weight at index is to the skeleton; for a chain edge *unit is the unit that it enters. */
static int role(const gsgd_plan *plan, ptrdiff_t k, const ptrdiff_t index[GSGD_NDIM]) {
    const block *b = &plan->block[k];
    int64_t u = col_unit(b, index), v = row_unit(b, index);
    int is_out = u != GSGD_PINNED && plan->out[u].block == k,
        is_in = v != GSGD_PINNED && plan->in[v].block == k;
    for (int d = 0; d < GSGD_NDIM; ++d) {
        is_out = is_out && plan->out[u].index[d] == index[d];
        is_in = is_in && plan->in[v].index[d] == index[d];
    }
    return is_out ? FREE : is_in ? CHAIN : ORDINARY;
}

static double weight(const gsgd_plan *plan, const tree_edge *e) {
    const block *b = &plan->block[e->block];
    return load(b->type, &b->w, e->index);
}

/* a(v) and b(v): products of weights along the trees, in to_a and to_b. */
static void products(gsgd_plan *plan) {
    double *a = plan->to_a, *b = plan->to_b;
    for (ptrdiff_t n = 0; n < plan->num_active; ++n) {
        int64_t v = plan->in_order[n];
        a[v] = a[plan->in_unit[v]] * weight(plan, &plan->in[v]);
        v = plan->out_order[n];
        b[v] = b[plan->out_unit[v]] * weight(plan, &plan->out[v]);
    }
}

/* log |a(v)| and log |b(v)|: they do not underflow. */
static void log_products(gsgd_plan *plan, double *log_a, double *log_b) {
    log_a[-1] = log_b[-1] = 0;
    for (ptrdiff_t n = 0; n < plan->num_active; ++n) {
        int64_t v = plan->in_order[n];
        log_a[v] = log_a[plan->in_unit[v]] + log(fabs(weight(plan, &plan->in[v])));
        v = plan->out_order[n];
        log_b[v] = log_b[plan->out_unit[v]] + log(fabs(weight(plan, &plan->out[v])));
    }
}

void gsgd_path_values(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *values,
                      const gsgd_array *logs) {
    double *log_a = plan->x, *log_b = plan->inv_x;
    gsgd_bind(plan, weights, VIEW_W);
    gsgd_bind(plan, values, VIEW_G);
    gsgd_bind(plan, logs, VIEW_S);
    products(plan);
    if (logs != NULL)
        log_products(plan, log_a, log_b);
    for (ptrdiff_t k = 0; k < plan->blocks; ++k) {
        const block *b = &plan->block[k];
        ptrdiff_t index[GSGD_NDIM] = {0};
        if (b->groups * b->rows * b->cols * b->taps == 0)
            continue;
        do {
            int what = role(plan, k, index);
            int64_t u = col_unit(b, index), v = row_unit(b, index);
            /* a chain edge's own path is in(v) + out(v): the same product */
            double w = load(b->type, &b->w, index), sign = w > 0 ? 1 : w < 0 ? -1 : 0;
            double value = plan->to_a[u] * w * plan->to_b[v], log_value = NAN;
            if (logs != NULL) {
                value = copysign(1, plan->to_a[u]) * sign * copysign(1, plan->to_b[v]);
                log_value = log_a[u] + log(fabs(w)) + log_b[v];
                store(GSGD_FLOAT64, &b->s, index, what == FREE ? NAN : log_value);
            }
            store(GSGD_FLOAT64, &b->g, index, what == FREE ? NAN : value);
        } while (advance(b, index));
    }
}

gsgd_status gsgd_path_gradients(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *gradients,
                                const gsgd_array *sums, const double *norm, const gsgd_array *out) {
    const gsgd_options options = {.clip_norm = INFINITY, .threads = 1};
    const double *sum = plan->gathered + row_at(plan, GSGD_SUM);
    gsgd_gather(plan, weights, gradients, sums, NULL, NULL, &options, NULL, plan->gathered);
    for (int64_t u = GSGD_PINNED; u < plan->units; ++u)
        if (!isfinite(sum[u]))
            return GSGD_NOT_FINITE;
    products(plan);
    gsgd_bind(plan, out, VIEW_M);
    for (ptrdiff_t k = 0; k < plan->blocks; ++k) {
        const block *b = &plan->block[k];
        ptrdiff_t index[GSGD_NDIM] = {0};
        if (b->groups * b->rows * b->cols * b->taps == 0)
            continue;
        do {
            int what = role(plan, k, index);
            int64_t u = col_unit(b, index), v = row_unit(b, index);
            double d = NAN;
            if (what == ORDINARY)
                d = load(b->type, &b->g, index) / (plan->to_a[u] * plan->to_b[v]);
            else if (what == CHAIN)
                d = (product(b->type, load(b->type, &b->w, index), load(b->type, &b->s, index)) - sum[v]) /
                    (plan->to_a[v] * plan->to_b[v] * (norm == NULL ? 1 : norm[v]));
            store(GSGD_FLOAT64, &b->m, index, d);
        } while (advance(b, index));
    }
    return GSGD_OK;
}

void gsgd_allocate(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *ratios,
                   const gsgd_array *out) {
    double *inv_rho = plan->x;
    inv_rho[-1] = 1;
    gsgd_bind(plan, weights, VIEW_W);
    gsgd_bind(plan, ratios, VIEW_G);
    gsgd_bind(plan, out, VIEW_M);
    for (ptrdiff_t n = 0; n < plan->num_active; ++n) {
        int64_t v = plan->in_order[n];
        const tree_edge *in = &plan->in[v];
        if (!plan->in_is_free[v])
            plan->ratio[v] = load(GSGD_FLOAT64, &plan->block[in->block].g, in->index);
        inv_rho[v] = 1 / plan->ratio[plan->root[v]];
    }
    for (ptrdiff_t k = 0; k < plan->blocks; ++k) {
        const block *b = &plan->block[k];
        ptrdiff_t index[GSGD_NDIM] = {0};
        if (b->groups * b->rows * b->cols * b->taps == 0)
            continue;
        do {
            double w = load(b->type, &b->w, index);
            if (role(plan, k, index) != FREE)
                w *= load(GSGD_FLOAT64, &b->g, index) * inv_rho[col_unit(b, index)];
            store(b->type, &b->m, index, w);
        } while (advance(b, index));
    }
}
