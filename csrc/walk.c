/* walk.c - how a call walks over the entries of blocks.
 *
 * A block is walked by rows where a line over its columns and taps is contiguous in all buffers, whatever the
 * order of columns and taps in it; otherwise by columns, which run along rows. Gather and apply take it in
 * pieces: by rows, gather takes panels of a group's columns and apply lines; by columns, both take columns.
 * Results do not depend on the walk. */
#include "plan.h"

#include <string.h>

enum { TASK = 1 << 15 }; /* entries that a thread takes at a time */

void gsgd_bind(gsgd_plan *plan, const gsgd_array *arrays, int which) {
    for (ptrdiff_t k = 0; k < plan->blocks; ++k) {
        block *b = &plan->block[k];
        view *v = &b->views[which];
        v->data = NULL;
        if (arrays == NULL || arrays[b->array].data == NULL)
            continue;
        const gsgd_array *x = &arrays[b->array];
        for (int d = 0; d < GSGD_NDIM; ++d)
            v->stride[d] = b->dim[d].step ? b->dim[d].step * x->strides[b->dim[d].axis] : 0;
        ptrdiff_t first = b->start ? b->start * x->strides[b->start_axis] : 0;
        size_t size = b->type == GSGD_FLOAT32 ? sizeof(float) : sizeof(double);
        v->data = (char *)x->data + first * (ptrdiff_t)size;
    }
}

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
    for (int i = 0; i < VIEWS; ++i)
        if (b->views[i].data != NULL && b->views[i].stride[GSGD_ROW] != 1)
            return 0;
    return 1;
}

/* Decide how to walk a block, and learn the order of its line. */
static void choose_walk(block *b) {
    int order[GSGD_NDIM], n = 0;
    for (int d = GSGD_NDIM; d-- > GSGD_COL;)
        if (b->dim[d].extent > 1) {
            int i = n++;
            for (; i > 0 && b->w.stride[order[i - 1]] > b->w.stride[d]; --i)
                order[i] = order[i - 1];
            order[i] = d;
        }
    ptrdiff_t expected = 1;
    b->by_rows = 1;
    for (int i = 0; i < VIEWS; ++i)
        b->by_rows &= same_line(b, &b->views[i]);
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
static void cut(block *b, int clips) {
    ptrdiff_t line = b->cols * b->taps, panels = (line + PANEL - 1) / PANEL;
    if (b->groups * b->rows * line == 0) {
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

/* Whether the block's views have the strides of the call before; remembers them. */
static int same_strides(block *b) {
    int same = 1;
    for (int i = 0; i < VIEWS; ++i) {
        const view *now = &b->views[i], *before = &b->seen[i];
        same &= (now->data == NULL) == (before->data == NULL) &&
                (now->data == NULL || memcmp(now->stride, before->stride, sizeof now->stride) == 0);
        b->seen[i] = *now;
    }
    return same;
}

static void locate(const gsgd_plan *plan, tree_edge *e) {
    for (int i = 0; e->block >= 0 && i < VIEWS; ++i)
        e->at[i] = offset_of(&plan->block[e->block].views[i], e->index);
}

void gsgd_plan_walk(gsgd_plan *plan, int clips) {
    int changed = 0, other_pieces = clips != plan->clips;
    plan->clips = clips;
    for (ptrdiff_t k = 0; k < plan->blocks; ++k) {
        block *b = &plan->block[k];
        if (!same_strides(b)) {
            changed = 1;
            choose_walk(b);
            cut(b, clips);
        } else if (other_pieces) {
            cut(b, clips);
        }
    }
    for (ptrdiff_t n = 0; changed && n < plan->num_active; ++n) {
        locate(plan, &plan->in[plan->in_order[n]]);
        locate(plan, &plan->out[plan->in_order[n]]);
    }
}
